"""Labellers that ask a language model over the network, through the official clients (extra `labels`).

The key comes from the environment and goes into the client, nowhere else: what a server says (it might repeat the key) is cleaned of it before it is kept
or shown, and errors of the clients, which hold the request, are not passed on.
"""

import importlib
import importlib.util
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from stagediff.errors import StagediffError, UserError
from stagediff.evidence.labels.labeller import Answer, Question
from stagediff.evidence.labels.patience import NotNowError, Patience, retry_after
from stagediff.evidence.labels.prompt import AGAIN, instructions, question_text, understood
from stagediff.evidence.labels.spec import SERVERS, LabelsSpec, ModelSettings, Requests

__all__ = ["Asked", "LanguageModel", "NoAnswerError", "Reply", "check_client", "connect", "key_of"]

VARIABLES = {"openai": "OPENAI_API_KEY", "anthropic": "ANTHROPIC_API_KEY"}
BUSY = (408, 409, 425, 429)
"""Status codes below 500 after which it is tried again."""
TOO_OFTEN = (429, 529)
WIRES = ("openai", "anthropic", "httpx", "httpx2", "httpcore", "httpcore2")
"""Loggers of the clients and below them, which at level DEBUG write down what goes over the wire, headers included."""
UNCHECKED = "none"
"""Sent as key to a server of one's own that asks for none."""


class NoAnswerError(StagediffError):
    """A server that did not answer in all tries. Trying again later may help; answers so far are kept."""


@dataclass(frozen=True)
class Reply:
    """What came back from one request."""

    text: str
    tokens_in: int = 0
    tokens_out: int = 0
    model: str = ""


class Asked(Protocol):
    """One request to a server: instructions and question in, its reply out; raises NotNowError where it may be tried again, else UserError."""

    def __call__(self, instructions: str, question: str) -> Reply: ...


class LanguageModel:
    """Puts a question to a language model, once more where the answer cannot be understood; then it is unclear."""

    is_costly = True

    def __init__(self, ask: Asked, topics: Sequence[str], patience: Patience, at_once: int = 1):
        self._ask, self._topics, self._patience, self.at_once = ask, topics, patience, at_once
        self._instructions = instructions(topics)
        self._was_there = False

    def label(self, question: Question) -> Answer:
        """Raises NoAnswerError when the server gives none, UserError when it refuses for good."""
        text = question_text(question)
        tokens_in = tokens_out = 0
        for asked in (1, 2):
            reply = self._reply(text if asked == 1 else text + AGAIN)
            tokens_in, tokens_out = tokens_in + reply.tokens_in, tokens_out + reply.tokens_out
            answer = understood(reply.text, self._topics, len(question.excerpts))
            if answer is not None:
                break
        answer = answer or Answer("", False, unclear=True)
        return replace(answer, raw=reply.text, asked=asked, tokens_in=tokens_in, tokens_out=tokens_out, model=reply.model)

    def _reply(self, text: str) -> Reply:
        try:
            reply = self._patience.ask(lambda: self._ask(self._instructions, text))
            self._was_there = True
            return reply
        except NotNowError as error:
            tries = self._patience.retries + 1
            if error.is_away and not self._was_there:
                raise UserError(
                    f"There is no server to label with: in {tries} tries {error}. Start it, or correct labels.base_url."
                ) from None
            raise NoAnswerError(
                f"The labeller's server gave no answer in {tries} tries; the last time {error}. The answers so far are kept: run again to go on."
            ) from None


def key_of(labeller: str, base_url: str, requests: Requests) -> str:
    """The key from the environment. A server of one's own need not have one. Raises UserError where one is needed."""
    variable = requests.key_variable or VARIABLES[labeller]
    key = os.environ.get(variable, "").strip()
    if key:
        return key
    if base_url != SERVERS[labeller] and requests.key_variable is None:
        return UNCHECKED
    raise UserError(
        f"The labeller {labeller} at {base_url} needs a key, but the environment variable {variable} is not set. Set it where the run is started (and on "
        "workers), or name another one as labels.key_variable, or label offline with labels.labeller=keywords."
    )


def check_client(labeller: str) -> None:
    """Raises UserError where the labeller's client is not installed."""
    if importlib.util.find_spec(labeller) is None:
        raise UserError(f"The labeller {labeller} needs the package {labeller}, which is not installed: pip install 'stagediff[labels]'.")


def connect(spec: LabelsSpec) -> LanguageModel:
    """The labeller that a spec names. Sends nothing yet."""
    assert spec.model is not None
    check_client(spec.labeller)
    _silence_wires()
    key = key_of(spec.labeller, spec.model.base_url, spec.requests)
    ask = {"openai": _openai, "anthropic": _anthropic}[spec.labeller](spec.model, spec.requests, key)
    return LanguageModel(ask, spec.topics, Patience(spec.requests.retries, spec.requests.wait), spec.requests.parallel)


def _silence_wires() -> None:
    for name in WIRES:
        wire = logging.getLogger(name)
        wire.setLevel(max(wire.level, logging.INFO))


def _openai(model: ModelSettings, requests: Requests, key: str) -> Asked:
    module = importlib.import_module("openai")
    client = module.OpenAI(api_key=key, base_url=model.base_url, timeout=requests.timeout, max_retries=0)
    limit = "max_completion_tokens" if model.base_url == SERVERS["openai"] else "max_tokens"  # other servers know the older name
    options: dict[str, Any] = {limit: model.answer_tokens} | ({} if model.temperature is None else {"temperature": model.temperature})

    def ask(instructions: str, question: str) -> Reply:
        messages = [{"role": "system", "content": instructions}, {"role": "user", "content": question}]
        said = client.chat.completions.create(model=model.name, messages=messages, **options)
        text, usage = said.choices[0].message.content, said.usage  # no choices: not an answer of this interface
        return Reply(
            text or "", getattr(usage, "prompt_tokens", 0) or 0, getattr(usage, "completion_tokens", 0) or 0, str(said.model or "")
        )

    return _sorted_out(ask, module, model.base_url, key)


def _anthropic(model: ModelSettings, requests: Requests, key: str) -> Asked:
    module = importlib.import_module("anthropic")
    client = module.Anthropic(api_key=key, base_url=model.base_url, timeout=requests.timeout, max_retries=0)
    options: dict[str, Any] = {} if model.temperature is None else {"temperature": model.temperature}

    def ask(instructions: str, question: str) -> Reply:
        said = client.messages.create(
            model=model.name,
            max_tokens=model.answer_tokens,
            system=instructions,
            messages=[{"role": "user", "content": question}],
            **options,
        )
        text = "".join(getattr(block, "text", None) or "" for block in said.content)
        usage = said.usage
        return Reply(text, getattr(usage, "input_tokens", 0) or 0, getattr(usage, "output_tokens", 0) or 0, str(said.model or ""))

    return _sorted_out(ask, module, model.base_url, key)


def _sorted_out(ask: Asked, module: Any, url: str, key: str) -> Asked:
    """`ask` with a client's errors turned into what another try may help and what not, and with the key out of everything that it says."""

    def clean(text: str) -> str:
        return text.replace(key, "***") if key != UNCHECKED else text

    def asked(instructions: str, question: str) -> Reply:
        try:
            reply = ask(instructions, question)
        except module.APITimeoutError:
            raise NotNowError(f"{url} took too long") from None
        except module.APIConnectionError as error:
            raise NotNowError(clean(f"{url} could not be reached ({_reason(error)})"), is_away=True) from None
        except module.APIStatusError as error:
            raise _of_status(error.status_code, error.response.headers, clean(_message(error)), url) from None
        except (module.APIError, AttributeError, TypeError, ValueError, LookupError) as error:  # not an answer of this interface
            raise NotNowError(clean(f"{url} sent something that is no answer ({type(error).__name__}: {_reason(error)})")) from None
        return replace(reply, text=clean(reply.text), model=clean(reply.model))

    return asked


def _of_status(status: int, headers: Any, message: str, url: str) -> Exception:
    said = f"{url} answered {status}: {message}"
    if status in BUSY or status >= 500:
        return NotNowError(said, retry_after(headers.get("retry-after")), for_all=status in TOO_OFTEN)
    meant = {
        401: "the key is not accepted",
        403: "the key does not allow this",
        404: "there is no such model, or no such interface at this address (OpenAI-compatible servers usually end in /v1)",
    }.get(status, "the request is not accepted")
    return UserError(
        f"The labeller's server refused: {meant}. {said} Check labels.model, labels.base_url and the key in the environment; answers so far are kept."
    )


def _message(error: Any) -> str:
    """The server's own words, shortened."""
    body = error.body
    inner = body.get("error", body) if isinstance(body, dict) else body
    text = inner.get("message", inner) if isinstance(inner, dict) else inner
    return " ".join(str(text or error.message).split())[:300]


def _reason(error: Exception) -> str:
    cause = error.__cause__
    return " ".join(str(cause or error).split())[:200]

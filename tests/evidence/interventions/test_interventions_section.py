"""The report's parts: what the tables say stands on the page, escaped."""

import re

import pytest

from stagediff import steps
from stagediff.evidence.interventions.chart import Band, Line, chart
from stagediff.evidence.interventions.command import try_by_hand
from stagediff.evidence.interventions.section import section
from stagediff.sections import ReportContext


@pytest.fixture(scope="module")
def parts(world):
    nodes = {name: steps.run(getattr(world, name)(), world.store, device="cpu") for name in ("steer", "ablate")}
    return {s.name: s.html for s in section(ReportContext(world.store, nodes, {}, 10, 0))}, nodes


def test_effects_of_candidates_stand_with_their_interval_and_the_random_ones_below(world, parts):
    html, nodes = parts
    features = world.store.artifact(nodes["steer"]).read_table("features.parquet")
    shown = [int(i) for i in re.findall(r'<tr><th scope="row">(\d+)</th>', html["steering"])]
    assert set(shown) == set(features.feature)
    best = features.sort_values("steer_effect").iloc[-1]
    assert f"{100 * best.steer_effect:+.1f} %" in html["steering"]
    assert f"{100 * best.steer_low:+.1f} % … {100 * best.steer_high:+.1f} %" in html["steering"]
    assert html["steering"].count("<svg") == 3
    assert "random features, all" in html["steering"]


def test_curves_stand_for_every_measure_and_the_price(parts):
    html, _ = parts
    assert html["ablation"].count("<svg") == 4
    assert "No set that was tried" in html["ablation"] or "The smallest set that" in html["ablation"]
    assert "<script" not in html["ablation"] + html["steering"]


def test_a_run_without_interventions_has_no_such_part(world):
    assert section(ReportContext(world.store, {}, {}, 10, 0)) == []


def test_a_chart_draws_its_values_at_their_place_and_escapes_names():
    svg = chart(
        [Line("<b>", [1, 10, 100], [0, 0.5, 1], "red")], [Band("band", [1, 100], [0, 0], [1, 1], "grey")], x="x", y="y", title="t", log=True
    )
    points = re.search(r'polyline points="([^"]+)"', svg).group(1).split()
    (x0, y0), (x1, y1), (x2, y2) = ([float(v) for v in p.split(",")] for p in points)
    assert (x1 - x0) == pytest.approx(x2 - x1, abs=0.2)
    assert (y0 - y1) == pytest.approx(y1 - y2, abs=0.2)
    assert "<b>" not in svg


def test_trying_by_hand_shows_the_models_own_answer_first(world):
    """On a dictionary that knows which activations it was trained on."""
    from stagediff.sae.layout import CFG, WEIGHTS, to_bytes
    from stagediff.sae.spec import Budget, DictionaryConfig, TrainSpec

    spec = TrainSpec(data=world.data, budget=Budget(tokens=1), dictionary=DictionaryConfig(features=40))
    with world.store.write(spec) as w:
        cfg, weights = to_bytes(world.sae)
        w.write_bytes(CFG, cfg)
        w.write_bytes(WEIGHTS, weights)
        w.commit(figures={})
    found = try_by_hand(world.store, spec.key[:8], 3, "Human: w1 w2", (8.0,), tokens=4, device="cpu")
    assert [a["strength"] for a in found["answers"]] == [0, 8]
    assert found["answers"][1]["text"] == "bad bad bad bad"
    assert found["answers"][0]["text"] != found["answers"][1]["text"]

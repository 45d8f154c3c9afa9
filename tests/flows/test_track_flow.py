"""The track flow runs a whole chain; every deployment names a flow that exists."""

import importlib
from pathlib import Path

import pytest
import yaml
from prefect import Flow
from prefect.testing.utilities import prefect_test_harness
from tiny import tiny_track

from flows.track import track
from stagediff import steps
from stagediff.config import make_plan, parse_config
from stagediff.store import Store

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def prefect_server():
    with prefect_test_harness(server_startup_timeout=120):
        yield


def test_the_flow_runs_the_chain_and_then_nothing(tmp_path, monkeypatch):
    body = tiny_track(str(tmp_path / "store"), keep="tables")
    report = track(body, device="cpu")
    store = Store(tmp_path / "store")
    plan = make_plan(parse_config(body), store)
    assert report == plan["report"].ref
    assert plan.missing(store) == []
    ran = []
    monkeypatch.setattr(steps, "run", lambda *_, **__: ran.append(1))
    assert track(body, device="cpu") == report
    assert ran == []


@pytest.mark.parametrize("deployment", yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"], ids=lambda d: d["name"])
def test_every_deployment_names_a_flow(deployment):
    path, _, name = deployment["entrypoint"].partition(":")
    assert isinstance(getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), name), Flow)
    assert deployment["work_pool"]["name"]

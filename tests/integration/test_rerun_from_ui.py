"""A step fails; somebody presses Retry in the UI; what is missing runs, and nothing else. With a real server, a real worker and the real button."""

import shutil
from collections import Counter

import pytest
from local_prefect import until
from playwright.sync_api import expect, sync_playwright

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def press_retry(deployed):
    """Opens a flow run in the UI and presses Retry, and Retry again in the dialog."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])

        def press(run: str) -> None:
            before = deployed.server.flow_run(run)["state"]["id"]
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.goto(f"{deployed.server.url}/runs/flow-run/{run}")
            buttons = page.get_by_role("button", name="Retry", exact=True)
            expect(buttons.first).to_be_visible(timeout=120_000)
            buttons.first.click()
            expect(buttons).to_have_count(2, timeout=60_000)
            buttons.last.click()
            expect(page.get_by_role("dialog")).to_have_count(0, timeout=60_000)
            page.close()
            until(lambda: deployed.server.flow_run(run)["state"]["id"] != before, "the button has done its work", 120)

        yield press
        browser.close()


def test_retry_on_the_failed_step_and_then_on_the_pipeline(deployed, press_retry):
    case = deployed.case("step-then-pipeline", "finetune-M", "diff")
    fault = deployed.fault("finetune-M")
    pipeline = deployed.start(case)
    failed = deployed.server.wait(pipeline, "FAILED")
    (child,) = deployed.server.children(pipeline)
    assert child["name"] == f"finetune M · tiny · {case.plan['finetune-M'].ref.key[:4]}"
    assert {"stagediff", "finetune", "gpu", "auto-retry"} <= set(child["tags"])
    for said in (child["name"], "illegal memory access", f"/runs/flow-run/{child['id']}", "press Retry"):
        assert said in failed["state"]["message"]
    assert set(deployed.begun(case)) == {"finetune-M"}
    assert not deployed.done(case)

    fault.unlink()
    press_retry(child["id"])
    deployed.server.wait(child["id"], runs=2)
    assert deployed.done(case) == {"finetune-M": 1}
    press_retry(pipeline)
    deployed.server.wait(pipeline, runs=2)
    assert deployed.done(case) == {"finetune-M": 1, "diff": 1}
    children = deployed.server.children(pipeline)
    assert {c["name"].split(" · ")[0]: c["run_count"] for c in children} == {"finetune M": 2, "diff": 1}
    assert case.is_as_the_whole()


def test_retry_on_the_pipeline_alone_as_often_as_it_takes(deployed, press_retry):
    case = deployed.case("pipeline-alone", "finetune-M", "diff")
    fault = deployed.fault("diff")
    pipeline = deployed.start(case)
    deployed.server.wait(pipeline, "FAILED")
    assert deployed.done(case) == {"finetune-M": 1}
    press_retry(pipeline)  # the cause is still there
    deployed.server.wait(pipeline, "FAILED", runs=2)
    fault.unlink()
    press_retry(pipeline)
    deployed.server.wait(pipeline, runs=3)
    assert deployed.done(case) == {"finetune-M": 1, "diff": 1}
    children = deployed.server.children(pipeline)
    assert {c["name"].split(" · ")[0]: c["run_count"] for c in children} == {"finetune M": 1, "diff": 3}
    assert case.is_as_the_whole()


def test_a_finished_step_is_forced_and_what_depends_on_it_follows_only_if_its_bytes_changed(deployed):
    case = deployed.case("forced")
    pipeline = deployed.start(case, force=["finetune-m"])  # as people type it
    deployed.server.wait(pipeline)
    assert deployed.done(case) == {"finetune-M": 1}
    assert case.store.artifact(case.plan["finetune-M"].ref).manifest.same_bytes is True

    ref, report = case.plan["diff"].ref, case.plan["report"]
    manifest = case.store.artifact(ref).manifest
    other = [f.model_copy(update={"crc32c": "00000000"}) if f.path == "features.parquet" else f for f in manifest.files]
    manifest.files = other  # as if other code had made it, and the report had been written from that
    case.store.objects.put(f"{ref}/manifest.json", manifest.to_bytes())
    written = case.store.artifact(report.ref).manifest
    written.inputs = case.store.bytes_of(report.spec.refs())
    case.store.objects.put(f"{report.ref}/manifest.json", written.to_bytes())
    pipeline = deployed.start(case, force=["diff"])
    deployed.server.wait(pipeline)
    assert deployed.done(case) == {"finetune-M": 1, "diff": 1, "report": 1}
    assert case.store.artifact(ref).manifest.same_bytes is False


def test_a_run_of_which_all_is_there_starts_nothing(deployed):
    case = deployed.case("untouched")
    pipeline = deployed.start(case)
    deployed.server.wait(pipeline)
    assert deployed.server.children(pipeline) == []
    assert deployed.done(case) == Counter()


def test_cancel_on_the_pipeline_cancels_its_steps_and_a_retry_starts_them_again(deployed):
    case = deployed.case("cancelled", "finetune-M", "diff")
    hold = deployed.hold("finetune-M")
    pipeline = deployed.start(case)
    until(lambda: deployed.begun(case), "the step began", 600)
    (child,) = deployed.server.children(pipeline)
    assert deployed.processes_of([child["id"]])
    deployed.server.ask(f"/flow_runs/{pipeline}/set_state", state={"type": "CANCELLING"})
    deployed.server.wait(pipeline, "CANCELLED")
    until(lambda: deployed.server.flow_run(child["id"])["state_type"] == "CANCELLED", "the step is cancelled")
    until(lambda: not deployed.processes_of([child["id"], pipeline]), "their processes are gone", 120)
    hold.unlink()
    deployed.server.ask(f"/flow_runs/{pipeline}/set_state", state={"type": "SCHEDULED", "name": "AwaitingRetry"})
    deployed.server.wait(pipeline, runs=2)
    assert deployed.done(case) == {"finetune-M": 1, "diff": 1}
    assert case.is_as_the_whole()


def test_a_step_shows_its_progress_figures_and_links(deployed):
    case = deployed.case("shown", "finetune-D")
    pipeline = deployed.start(case)
    deployed.server.wait(pipeline)
    (child,) = deployed.server.children(pipeline)
    shown = {a["key"]: a for a in deployed.server.ask("/artifacts/filter", artifacts={"flow_run_id": {"any_": [child["id"]]}})}
    ref, report = case.plan["finetune-D"].ref, case.plan["report"].ref
    short = ref.key[:8]
    assert float(shown[f"progress-finetune-d-finetune-{short}"]["data"]) == 100
    assert "tokens/s" in shown[f"progress-finetune-d-finetune-{short}"]["description"]
    figures = case.store.artifact(ref).manifest.figures
    assert all(f"| {name} |" in shown[f"finetune-d-{short}"]["data"] for name in figures)
    assert f"file://{case.store.root}/{ref}" in shown[f"data-finetune-d-{short}"]["data"]
    assert f"file://{case.store.root}/{report}/index.html" in shown[f"link-report-{report.key[:8]}"]["data"]
    until(lambda: "finetune-D" in deployed.server.log(child["id"]), "the log has arrived", 120)

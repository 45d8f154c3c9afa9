"""What the real Kubernetes worker sends to an API server (here one that only writes it down): valid, and without the API's password."""

import json
import threading
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import kubernetes_asyncio
import kubernetes_validate
import pytest
from prefect.client.schemas.objects import Flow, FlowRun
from prefect.settings import PREFECT_API_AUTH_STRING, temporary_settings
from prefect_kubernetes.worker import KubernetesWorker, KubernetesWorkerJobConfiguration

TEMPLATE = Path(__file__).parents[2] / "infra" / "pools" / "kubernetes.json"
PASSWORD = "lab:planted-password"


class Recorder(BaseHTTPRequestHandler):
    """Takes every Job that is posted, as the API server would."""

    posted: list[bytes] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.posted.append(body)
        self.send_response(201)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def api() -> Iterator[str]:
    Recorder.posted.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Recorder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def send(url: str) -> dict[str, Any]:
    """Has the worker create the Job of a flow run; returns what arrived."""

    async def create() -> None:
        template = json.loads(TEMPLATE.read_text())
        make = KubernetesWorkerJobConfiguration.from_template_and_values
        job = await make(base_job_template=template, values={"gpus": 1}, client=SimpleNamespace())
        flow = Flow(id=uuid.uuid4(), name="train")
        job.prepare_for_flow_run(FlowRun(id=uuid.uuid4(), name="train S", flow_id=flow.id), flow=flow)
        async with kubernetes_asyncio.client.ApiClient(kubernetes_asyncio.client.Configuration(host=url)) as client:
            await KubernetesWorker("k8s")._create_job(job, client)

    with temporary_settings({PREFECT_API_AUTH_STRING: PASSWORD}):
        anyio.run(create)
    (body,) = Recorder.posted
    return json.loads(body)


def test_the_password_is_named_by_the_secret_and_not_written_out(api, monkeypatch):
    """With the two variables that infra/README.md has the worker's shell export."""
    monkeypatch.setenv("PREFECT_INTEGRATIONS_KUBERNETES_WORKER_API_AUTH_STRING_SECRET_NAME", "stagediff")
    monkeypatch.setenv("PREFECT_INTEGRATIONS_KUBERNETES_WORKER_API_AUTH_STRING_SECRET_KEY", "PREFECT_API_AUTH_STRING")
    manifest = send(api)
    kubernetes_validate.validate(manifest, "1.31", strict=True)
    assert PASSWORD not in json.dumps(manifest)
    (entry,) = [e for e in manifest["spec"]["template"]["spec"]["containers"][0]["env"] if e["name"] == "PREFECT_API_AUTH_STRING"]
    assert entry["valueFrom"] == {"secretKeyRef": {"name": "stagediff", "key": "PREFECT_API_AUTH_STRING"}}


def test_without_them_it_would_be_there(api):
    """Why the README says so; should Prefect change this, that passage can go."""
    assert PASSWORD in json.dumps(send(api))

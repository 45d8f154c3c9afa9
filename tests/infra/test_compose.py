"""The compose file: nothing is open to the network by default, no password is written down, everything that is mounted is kept."""

import re
from pathlib import Path

import yaml

SERVER = Path(__file__).parents[2] / "infra" / "server"


def test_ports_are_bound_to_this_machine_and_passwords_are_asked_for():
    text = (SERVER / "compose.yaml").read_text()
    services = yaml.safe_load(text)["services"]
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert len(ports) == 3
    assert all(port.startswith("${BIND:-127.0.0.1}:") for port in ports)
    secret = re.compile(r"PASSWORD|SECRET|AUTH|KEY")
    for service in services.values():
        for name, value in service.get("environment", {}).items():
            assert not secret.search(name) or ":?set it in .env}" in value, f"{name} is written down"
    asked = set(re.findall(r"\$\{([A-Z_0-9]+):\?", text))
    example = {
        line.split("=")[0]: line.split("=", 1)[1] for line in (SERVER / "env.example").read_text().splitlines() if re.match("[A-Z]", line)
    }
    assert example == dict.fromkeys(asked, "")


def test_data_lies_on_named_volumes_and_services_wait_for_each_other():
    body = yaml.safe_load((SERVER / "compose.yaml").read_text())
    mounted = {volume.split(":")[0] for service in body["services"].values() for volume in service.get("volumes", [])}
    assert mounted == set(body["volumes"])
    for service in body["services"].values():
        for needed, how in service.get("depends_on", {}).items():
            assert how == {"condition": "service_healthy"}
            assert "healthcheck" in body["services"][needed]


def test_the_env_file_with_passwords_is_not_committed():
    assert ".env" in (SERVER.parents[1] / ".gitignore").read_text().splitlines()

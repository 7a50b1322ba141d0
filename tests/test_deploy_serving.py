"""The files of deploy/serving: checked by their tools' schemas, and against each other.

`ALPACA_SCHEMAS` names a folder with the custom resource definitions of KubeRay
(ray.io_rayservices.yaml) and KServe (serving.kserve.io_llminferenceservices.yaml), which no package
of Python's index holds; without it the tests that need them are skipped.
"""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest
import yaml
from http_server import VLLM, needs_vllm
from jsonschema import Draft7Validator
from kubeflow_trainer_api import models

from alpaca.serving import settings as engine
from alpaca.web import server

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "deploy/serving"
SCHEMAS = Path(os.environ.get("ALPACA_SCHEMAS", "none"))
RAY = "2.60.0"


def read(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def pods() -> dict[str, dict[str, Any]]:
    [ray], [kserve], (runner, _) = map(read, ("ray.yaml", "kserve.yaml", "runner.yaml"))
    cluster = ray["spec"]["rayClusterConfig"]
    [worker] = cluster["workerGroupSpecs"]
    return {
        "head": cluster["headGroupSpec"]["template"]["spec"],
        "worker": worker["template"]["spec"],
        "kserve": kserve["spec"]["template"],
        "runner": runner["spec"]["template"]["spec"],
    }


def serve_config() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(read("ray.yaml")[0]["spec"]["serveConfigV2"])
    return found


def test_the_compose_file_fits_the_compose_specification() -> None:
    check = Path(sys.executable).with_name("check-jsonschema")
    words = [check, "--builtin-schema", "vendor.compose-spec", FOLDER / "compose.yaml"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["head", "worker", "kserve", "runner"])
def test_pods_fit_the_schema_of_kubernetes(name: str) -> None:
    pod = pods()[name]
    # What the schema does not know is dropped, so a misspelled key is missed here.
    assert models.IoK8sApiCoreV1PodSpec.from_dict(pod).to_dict() == pod
    mounts = {one["name"] for c in pod["containers"] for one in c.get("volumeMounts", [])}
    assert mounts == {volume["name"] for volume in pod.get("volumes", [])}


def test_all_name_one_model_one_address_and_settings_that_exist() -> None:
    [ray], [kserve], (runner, service), [compose] = map(
        read, ("ray.yaml", "kserve.yaml", "runner.yaml", "compose.yaml")
    )
    [model] = serve_config()["applications"][0]["args"]["llm_configs"]
    settings = {one["name"]: one for one in pods()["runner"]["containers"][0]["env"]}
    source = settings["COG_WEIGHTS"]["value"]
    assert model["model_loading_config"]["model_source"] == source
    [volume] = (one for one in pods()["runner"]["volumes"])
    claim = volume["persistentVolumeClaim"]["claimName"]
    assert kserve["spec"]["model"]["uri"] == f"pvc://{claim}/{Path(source).name}"
    # Ray Serve listens on 8000; KubeRay's service has the name of the RayService
    address = f"http://{ray['metadata']['name']}-serve-svc:8000/v1"
    assert settings[engine.URL]["value"] == address
    known = {engine.URL, "COG_WEIGHTS", server.PORT, "ALPACA_WEB_HOST", "ALPACA_API_KEY"}
    in_compose = compose["services"]["runner"]["environment"]
    assert set(settings) == {*in_compose, "ALPACA_CONTEXT"} == {*known, "ALPACA_CONTEXT"}
    allowed = model["engine_kwargs"]["max_model_len"]
    assert settings["ALPACA_CONTEXT"]["value"] == str(allowed)
    assert f"--max-model-len {allowed}" in pods()["kserve"]["containers"][0]["env"][0]["value"]
    assert in_compose[engine.URL] == "http://vllm:8000/v1"
    command = compose["services"]["vllm"]["command"]
    assert command[0] == compose["services"]["vllm"]["volumes"][0].split(":")[-2]
    assert command[command.index("--port") + 1] == "8000"
    labels = runner["spec"]["template"]["metadata"]["labels"]
    assert labels == runner["spec"]["selector"]["matchLabels"] == service["spec"]["selector"]
    ports = {
        one["name"]: one["containerPort"] for one in pods()["runner"]["containers"][0]["ports"]
    }
    assert {one["targetPort"]: one["port"] for one in service["spec"]["ports"]} == ports
    assert ray["spec"]["rayClusterConfig"]["rayVersion"] == RAY
    for name in ("head", "worker"):
        assert RAY in pods()[name]["containers"][0]["image"]


@pytest.mark.slow
@pytest.mark.skipif(not SCHEMAS.is_dir(), reason="ALPACA_SCHEMAS names no folder of schemas")
@pytest.mark.parametrize(
    ("name", "schema"),
    [
        ("ray.yaml", "ray.io_rayservices.yaml"),
        ("kserve.yaml", "serving.kserve.io_llminferenceservices.yaml"),
    ],
)
def test_a_cluster_would_take_it(name: str, schema: str) -> None:
    [document] = read(name)
    version = document["apiVersion"].partition("/")[2]
    definition = yaml.safe_load((SCHEMAS / schema).read_text())
    [found] = (one for one in definition["spec"]["versions"] if one["name"] == version)
    assert found["served"]
    closed = _closed(found["schema"]["openAPIV3Schema"])
    errors = [f"{e.json_path}: {e.message}" for e in Draft7Validator(closed).iter_errors(document)]
    assert not errors


def _closed(schema: Any) -> Any:
    """The schema with every object's keys known, as a cluster prunes or refuses other ones."""
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _closed(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    known = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    keeps = schema.get("x-kubernetes-preserve-unknown-fields")
    # An object's `metadata` is checked by Kubernetes itself, so definitions leave it empty.
    if known and schema["properties"] and not keeps and "additionalProperties" not in schema:
        made["additionalProperties"] = False
    return made


@pytest.mark.slow
def test_ray_serve_takes_its_configuration(tmp_path: Path) -> None:
    venv.create(tmp_path / "ray", with_pip=True)
    python = tmp_path / "ray/bin/python"
    install = [python, "-m", "pip", "install", "-q", f"ray[serve]=={RAY}"]
    subprocess.run(install, check=True)
    code = (
        "import json, sys; from ray.serve.schema import ServeDeploySchema as S; "
        "S.model_validate(json.load(sys.stdin))"
    )
    asked = json.dumps(serve_config())
    subprocess.run([python, "-c", code], input=asked, text=True, check=True)


@pytest.mark.parametrize("where", [pytest.param("all", marks=needs_vllm)])
def test_vllm_knows_every_flag(where: str) -> None:
    """Those of the compose file, of ray.yaml's engine and of the commands in deploy/README.md."""
    [model] = serve_config()["applications"][0]["args"]["llm_configs"]
    keys = [f"--{name.replace('_', '-')}" for name in model["engine_kwargs"]]
    command = read("compose.yaml")[0]["services"]["vllm"]["command"]
    text = (ROOT / "deploy/README.md").read_text()
    [by_hand] = [
        line.split() for line in text.splitlines() if line.strip().startswith("vllm serve")
    ]
    used = {word for word in [*keys, *command, *by_hand] if word.startswith("--")}
    assert len(used) > 6
    words = [VLLM, "-m", "vllm.entrypoints.openai.api_server", "--help=all"]
    told = subprocess.run(words, capture_output=True, text=True, check=True, timeout=180).stdout
    assert not {flag for flag in used if flag not in told.replace(",", " ").split()}, where

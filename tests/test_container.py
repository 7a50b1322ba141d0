"""The image, built as Cog builds it but on a CPU base, and spoken to over HTTP from outside.

Run by script/test-container; needs a Docker engine, and is skipped where there is none. The base
is made here (debootstrap), the packages come through this machine's pip, so nothing is pulled.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from http_server import ROOT, SETTINGS, Door, varied

from alpaca import verify
from alpaca.serving import schema

CACHE = ROOT / ".cache" / "test-container"
BASE, IMAGE = "alpaca-test-base", "alpaca-test"
PACKAGES = "python3,python3-pip,libstdc++6,ca-certificates,tini,libtcmalloc-minimal4"

DEPENDENCIES_DOCKERFILE = f"""
FROM {BASE} AS wheels
COPY . /context
RUN ln -s /usr/bin/python3 /usr/local/bin/python && \\
    python -m pip install --no-index --find-links=/context/wheels --break-system-packages \\
    --no-cache-dir --quiet --root-user-action=ignore -r /context/requirements.txt
FROM {BASE}
COPY --from=wheels /usr/local /usr/local
"""
# Named by what is in it: other requirements are another image.
CONTENT = DEPENDENCIES_DOCKERFILE.encode() + (ROOT / "requirements.txt").read_bytes()
DEPENDENCIES = f"alpaca-test-dependencies:{hashlib.sha256(CONTENT).hexdigest()[:16]}"


def docker(*arguments: str, **options: object) -> str:
    done = subprocess.run(
        ["docker", *arguments], capture_output=True, text=True, check=False, **options
    )  # type: ignore[call-overload]
    assert done.returncode == 0, f"docker {arguments[0]}: {done.stderr[-3000:]}"
    return str(done.stdout).strip()


def engine_answers() -> bool:
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "info"], capture_output=True, check=False).returncode == 0


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not engine_answers(), reason="there is no Docker engine on this machine"),
]


def dockerfile() -> str:
    """What cog.yaml becomes: the same environment, command and copy as `cog build` writes."""
    cog = yaml.safe_load((ROOT / "cog.yaml").read_text())
    file, _, name = cog["run"].partition(":")
    assert schema.RunnerSource(ROOT / file).entry(name, "run")
    concurrency = schema.find(ROOT, cog["run"], "run").concurrency
    given = "\n".join(f"ENV {pair}" for pair in cog["environment"])
    return f"""
FROM {DEPENDENCIES}
ENV DEBIAN_FRONTEND=noninteractive
ENV PYTHONUNBUFFERED=1
ENV LD_LIBRARY_PATH=$LD_LIBRARY_PATH:/usr/lib/x86_64-linux-gnu:/usr/local/nvidia/lib64:\
/usr/local/nvidia/bin
ENV NVIDIA_DRIVER_CAPABILITIES=all
ENTRYPOINT ["/usr/bin/tini", "--"]
WORKDIR /src
EXPOSE 5000
ENV COG_PREDICT_TYPE_STUB="{cog["run"]}"
ENV COG_TRAIN_TYPE_STUB="{cog["train"]}"
ENV COG_MAX_CONCURRENCY={concurrency}
{given}
CMD ["python", "-m", "cog.server.http"]
COPY . /src
"""


def have(image: str) -> bool:
    return bool(docker("images", "-q", image))


def make_base(folder: Path) -> None:
    """A Debian with Python 3.11, the version that cog.yaml names."""
    if shutil.which("debootstrap") is None:
        pytest.skip("the base image is made by debootstrap, which is not on this machine")
    root = folder / "root"
    subprocess.run(
        ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(root)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    archive = folder / "root.tar"
    subprocess.run(["tar", "-C", str(root), "-cf", str(archive), "."], check=True)
    docker("import", str(archive), BASE)


def make_dependencies() -> None:
    """The pinned requirements on that base, from wheels that this machine's pip fetches."""
    CACHE.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "requirements.txt", CACHE)
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:"]
    subprocess.run(
        [*fetch, "-r", "requirements.txt", "-d", str(CACHE / "wheels")], cwd=ROOT, check=True
    )
    docker("build", "-t", DEPENDENCIES, "-f", "-", str(CACHE), input=DEPENDENCIES_DOCKERFILE)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    if not have(BASE):
        make_base(tmp_path_factory.mktemp("base"))
    if not have(DEPENDENCIES):
        make_dependencies()
    train = schema.find(ROOT, "train.py:train", "train")
    schema.write(ROOT, schema.find(ROOT, "predict.py:Runner", "run"), train)
    docker("build", "-t", IMAGE, "-f", "-", ".", input=dockerfile(), cwd=ROOT)
    return IMAGE


class Container(Door):
    def __init__(self, image: str, *command: str, volume: str, **environment: str) -> None:
        self.id = docker(
            "run",
            "--detach",
            "--publish",
            "127.0.0.1::5000",
            "--volume",
            volume,
            *(word for name, value in environment.items() for word in ("--env", f"{name}={value}")),
            image,
            *command,
        )
        super().__init__(self.published())

    def published(self) -> int:
        """The port on this machine, which differs after a second start."""
        return int(docker("port", self.id, "5000").splitlines()[0].rpartition(":")[2])

    def remove(self) -> None:
        self.client.close()
        docker("rm", "--force", self.id)

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + 180
        while self.health() != "READY":
            assert time.monotonic() < deadline, docker("logs", self.id)
            time.sleep(0.2)


def serving(image: str, model: Path) -> Container:
    return Container(image, volume=f"{model}:/weights:ro", ALPACA_WEIGHTS="/weights", **SETTINGS)


@pytest.fixture(scope="module")
def container(image: str, endless_model: Path) -> Iterator[Container]:
    running = serving(image, endless_model)
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.remove()


def test_nothing_that_belongs_outside_is_in_the_image(image: str) -> None:
    listed = docker("run", "--rm", "--entrypoint", "find", image, "/src", "-maxdepth", "2")
    names = {line.removeprefix("/src/") for line in listed.splitlines()}
    assert {"predict.py", "train.py", ".cog/openapi_schema.json", "alpaca/serving"} <= names
    tops = {name.split("/")[0] for name in names}
    assert not tops & {".git", ".venv", ".venvs", ".cache", "tests", "bench", ".pytest_cache"}
    assert not tops & {"demo", "docs", ".schemathesis", "alpaca_out.tar", "alpaca_data.json"}
    assert not [n for n in names if n.endswith((".egg-info", ".journal.jsonl"))]
    for folder in ("unconverted-weights", "weights"):
        assert {n for n in names if n.startswith(f"{folder}/")} <= {f"{folder}/README.md"}


def test_health_and_schema(container: Container) -> None:
    assert container.health() == "READY"
    served = container.client.get("/openapi.json").json()
    assert served == json.loads((ROOT / schema.PATH).read_text())


def test_a_prediction(container: Container) -> None:
    answer = container.post(prompt="Say hello.", n=2, max_new_tokens=5).json()
    assert answer["status"] == "succeeded"
    assert len(answer["output"]) == 2
    assert container.post(prompt="a", n=9).status_code == 422


def test_server_sent_events(container: Container) -> None:
    seen = list(container.stream(prompt="Say hello.", max_new_tokens=20, temperature=0))
    chunks = [data["chunk"] for name, data in seen if name == "output"]
    assert len(chunks) > 3
    assert seen[-1][1]["output"] == chunks


def test_cancel(container: Container) -> None:
    assert container.cancel_one("long") == "canceled"
    assert container.idle()


def test_sixteen_at_once(container: Container) -> None:
    inputs = [varied(index) for index in range(16)]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda one: container.post(**one).json()["output"], inputs))
    assert together == [container.post(**one).json()["output"] for one in inputs]


def test_sigterm_lets_a_running_prediction_finish_and_a_second_start_works(
    image: str, endless_model: Path
) -> None:
    first = serving(image, endless_model)
    first.wait_until_ready()
    with ThreadPoolExecutor(1) as pool:
        inputs = {"prompt": "Tell a story.", "max_new_tokens": 1500, "temperature": 0}
        answer = pool.submit(first.post, **inputs)
        first.run_one()
        docker("stop", "--time", "60", first.id)
        assert answer.result().json()["status"] == "succeeded"
    assert docker("inspect", "--format", "{{.State.ExitCode}}", first.id) == "0"
    docker("start", first.id)
    again = Door(first.published())
    while again.health() != "READY":
        time.sleep(0.2)
    assert again.post(prompt="a", max_new_tokens=1).json()["status"] == "succeeded"
    again.client.close()
    first.remove()


def test_training_in_the_image_over_http_and_by_the_torchrun_line(
    image: str, tiny_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model, tmp_path / "weights" / "tiny")
    shutil.copy(ROOT / "data" / "seed_tasks.jsonl", tmp_path)
    volume = f"{tmp_path}:/data"
    words = ("python", "-m", "cog.server.http", "--x-mode", "train")
    trainer = Container(image, *words, volume=volume, ALPACA_OUT="/data/alpaca_out")
    try:
        trainer.wait_until_ready()
        inputs = {"data": "/data/seed_tasks.jsonl", "base": "/data/weights/tiny", "epochs": 0.2}
        answer = trainer.client.put("/trainings/mine", json={"input": inputs}).json()
        assert answer["status"] == "succeeded", answer
    finally:
        trainer.remove()
    verify.run(verify.parser().parse_args([str(tmp_path / "alpaca_out")]))
    flags = {
        "model_name_or_path": "/data/weights/tiny",
        "data_path": "/data/seed_tasks.jsonl",
        "output_dir": "/data/second",
        "max_steps": 1,
        "fsdp": "full_shard auto_wrap",
    }
    line = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    docker(
        "run",
        "--rm",
        "--volume",
        volume,
        image,
        "torchrun",
        "--nproc_per_node=2",
        "train.py",
        *line,
    )
    verify.run(verify.parser().parse_args([str(tmp_path / "second")]))

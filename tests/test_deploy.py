"""The launch files: checked by their own tools, and run, as far as one machine can."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubeflow_trainer_api import models
from nodes import losses, start, wait_until

from alpaca.recipe import arguments
from alpaca.training import checkpoint

ROOT = Path(__file__).resolve().parent.parent
SBATCH = ROOT / "deploy/slurm/train.sbatch"
MANIFESTS = ROOT / "deploy/kubernetes"
MODELS = {
    "TrainJob": models.TrainerV1alpha1TrainJob,
    "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
    "PersistentVolumeClaim": models.IoK8sApiCoreV1PersistentVolumeClaim,
}
# The options of sbatch's manual page that the file uses, each with whether it takes a value.
SBATCH_OPTIONS = {
    "job-name": True, "output": True, "open-mode": True, "nodes": True, "ntasks-per-node": True,
    "gpus-per-node": True, "exclusive": False, "mem": True, "requeue": False, "time": True,
    "signal": True,
}  # fmt: skip


def documents() -> list[dict[str, Any]]:
    texts = [path.read_text() for path in sorted(MANIFESTS.glob("*.yaml"))]
    return [document for text in texts for document in yaml.safe_load_all(text)]


def scripts() -> list[Path]:
    return [SBATCH, ROOT / "convert_weights.sh", ROOT / ".ci/run", *(ROOT / "script").iterdir()]


@pytest.mark.parametrize("path", scripts(), ids=lambda path: path.name)
def test_shell_scripts_satisfy_shellcheck(path: Path) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_sbatch_options_are_slurms() -> None:
    lines = [line for line in SBATCH.read_text().splitlines() if line.startswith("#SBATCH ")]
    assert len(lines) > 8
    for line in lines:
        name, equals, value = line.removeprefix("#SBATCH --").partition("=")
        assert SBATCH_OPTIONS[name] == bool(equals and value), line


@pytest.mark.parametrize("document", documents(), ids=lambda document: document["kind"])
def test_manifests_fit_the_schema_of_the_kubeflow_trainer(document: dict[str, Any]) -> None:
    read = MODELS[document["kind"]].from_dict(document)
    assert read is not None
    # What the schema does not know is dropped, so a misspelled key is missed here.
    assert read.to_dict() == document


def test_manifests_fit_each_other() -> None:
    found = {document["kind"]: document for document in documents()}
    job, runtime = found["TrainJob"]["spec"], found["TrainingRuntime"]
    assert job["runtimeRef"]["name"] == runtime["metadata"]["name"]
    assert job["runtimeRef"]["kind"] == runtime["kind"]
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pod = replicated["template"]["spec"]["template"]["spec"]
    claims = [v["persistentVolumeClaim"] for v in pod["volumes"] if "persistentVolumeClaim" in v]
    assert [c["claimName"] for c in claims] == [found["PersistentVolumeClaim"]["metadata"]["name"]]
    mounts = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}


def flags_of_both() -> list[list[str]]:
    """The words after train.py in each of the two launch files."""
    sbatch = SBATCH.read_text().partition("  train.py \\\n")[2].partition('"$@"')[0]
    (job,) = (document for document in documents() if document["kind"] == "TrainJob")
    (line,) = job["spec"]["trainer"]["args"]
    return [
        shlex.split(text) for text in (sbatch.replace("\\\n", " "), line.partition("train.py")[2])
    ]


def test_both_train_the_published_recipe_on_24_gpus() -> None:
    for words in flags_of_both():
        parsed, _ = arguments.parse(words)
        assert parsed.model_max_length == 512
        assert parsed.num_train_epochs == 3
        assert parsed.learning_rate == 2e-5
        assert parsed.per_device_train_batch_size * parsed.gradient_accumulation_steps * 24 == 288


def slurm(folder: Path) -> dict[str, str]:
    """An environment in which this machine is Slurm's only node, with two devices."""
    (folder / "srun").write_text(
        '#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"'
    )
    (folder / "scontrol").write_text(
        f'#!/bin/sh\nif [ "$1" = show ]; then echo localhost; else echo "$@" > {folder}/asked; fi'
    )
    for name in ("srun", "scontrol"):
        (folder / name).chmod(0o755)
    return {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NNODES": "1",
        "SLURM_GPUS_ON_NODE": "2",
    }


@pytest.mark.slow
def test_a_slurm_job_that_runs_out_of_time_saves_is_queued_again_and_goes_on(
    tiny_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    flags = {
        "model_name_or_path": tiny_model,
        "tokenizer_name_or_path": tiny_model,
        "data_path": ROOT / "data/seed_tasks.jsonl",
        "output_dir": out,
        "max_steps": 40,
        "gradient_accumulation_steps": 1,
    }
    settings = [f"{name}={value}" for name, value in slurm(tmp_path).items()]
    words = ["env", *settings, "bash", str(SBATCH)]
    words += [f"--{name}={value}" for name, value in flags.items()]
    job = start(words, tmp_path / "first")
    log = out / "log.jsonl"
    wait_until(lambda: log.exists() and log.read_text().count('"loss"') >= 5, job)
    job.process.send_signal(signal.SIGUSR1)
    assert job.process.wait(timeout=60) == 0, job.said
    assert (tmp_path / "asked").read_text().split() == ["requeue", str(os.getpid())]
    done = len(losses(out))
    assert 5 <= done < 40
    assert [path.name for path in checkpoint.found(out)] == [f"checkpoint-{done}"]
    start(words, tmp_path / "second").succeed()
    assert len(losses(out)) == 40

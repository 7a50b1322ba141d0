"""Many ranks on many hosts: whichever of them is lost, the job ends as if none had been."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from nodes import Host, Job, end_all, losses, many_nodes, start, torchrun, two_hosts, wait_until
from safetensors.torch import load_file

from alpaca.training import checkpoint

STEPS = 30
LOST_AFTER = 7  # a checkpoint stands by then, and most steps are still to come


def train(tiny_model: Path, out: Path, *more: str) -> list[str]:
    flags = {
        "model_name_or_path": tiny_model,
        "output_dir": out,
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 0.01,
        "save_steps": 5,
    }
    return ["train.py", *(f"--{name}={value}" for name, value in flags.items()), *more]


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    yield
    end_all()


@pytest.fixture(scope="module")
def one_host(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks of one host leave when nothing happens to them."""
    folder = tmp_path_factory.mktemp("one-host")
    words = torchrun("--standalone", "--nproc_per_node=2")
    start([*words, *train(tiny_model, folder / "out")], folder / "log").succeed()
    assert len(losses(folder / "out")) == STEPS
    return folder / "out"


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    with two_hosts(tmp_path) as both:
        yield both


def assert_same(out: Path, right: Path) -> None:
    assert losses(out) == losses(right)
    first, second = (load_file(folder / "model.safetensors") for folder in (out, right))
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)


def begun(out: Path, *jobs: Job) -> None:
    """Wait until a checkpoint stands and steps have been done since, but not all."""
    log = out / "log.jsonl"
    wait_until(lambda: log.exists() and log.read_text().count('"loss"') >= LOST_AFTER, *jobs)
    assert checkpoint.found(out)
    assert len(losses(out)) < STEPS


def start_both(hosts: tuple[Host, Host], words: list[str], folder: Path) -> list[Job]:
    return [host.start([*many_nodes(), *words], folder / host.name) for host in hosts]


def test_a_killed_rank_is_started_again_and_goes_on(
    tiny_model: Path, one_host: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = torchrun("--standalone", "--nproc_per_node=2", "--max_restarts=3")
    job = start([*words, *train(tiny_model, out)], tmp_path / "log")
    begun(out, job)
    first = job.ranks()
    first[1].kill()
    job.succeed()
    assert not any(rank.is_running() for rank in first)
    assert_same(out, one_host)


def test_a_lost_host_comes_back_and_the_job_goes_on(
    tiny_model: Path, one_host: Path, hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = train(tiny_model, out)
    kept, lost = start_both(hosts, words, tmp_path)
    begun(out, kept, lost)
    lost.kill()
    back = hosts[1].start([*many_nodes(), *words], tmp_path / "back")
    back.succeed()
    kept.succeed()
    assert_same(out, one_host)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", ["full_shard auto_wrap", "hybrid_shard auto_wrap"])
def test_two_hosts_give_the_model_of_one(
    tiny_model: Path, one_host: Path, hosts: tuple[Host, Host], tmp_path: Path, fsdp: str
) -> None:
    out = tmp_path / "out"
    for job in start_both(hosts, train(tiny_model, out, f"--fsdp={fsdp}"), tmp_path):
        job.succeed()
    if fsdp.startswith("full"):
        assert_same(out, one_host)
    else:  # gradients are summed in another order
        assert losses(out) == pytest.approx(losses(one_host), rel=1e-3)
        assert losses(out)[:5] == pytest.approx(losses(one_host)[:5], rel=1e-6)


@pytest.mark.slow
def test_the_host_of_the_rendezvous_is_lost_and_the_same_commands_go_on(
    tiny_model: Path, one_host: Path, hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = train(tiny_model, out)
    lost, other = start_both(hosts, words, tmp_path)
    begun(out, lost, other)
    lost.kill()
    assert other.process.wait(timeout=120) != 0  # it has nowhere to meet: its scheduler starts it
    for job in start_both(hosts, words, tmp_path):
        job.succeed()
    assert_same(out, one_host)


@pytest.mark.slow
def test_a_cable_pulled_for_some_seconds_changes_nothing(
    tiny_model: Path, one_host: Path, hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    jobs = start_both(hosts, train(tiny_model, out), tmp_path)
    begun(out, *jobs)
    hosts[1].plug("down")
    time.sleep(1)
    done = len(losses(out))
    time.sleep(4)
    assert len(losses(out)) == done < STEPS  # nobody trains alone
    hosts[1].plug("up")
    for job in jobs:
        job.succeed()
    assert_same(out, one_host)


@pytest.mark.slow
def test_a_host_told_to_stop_saves_first_and_the_job_waits_for_it(
    tiny_model: Path, one_host: Path, hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = train(tiny_model, out, "--save_strategy=no")
    kept, stopped = start_both(hosts, words, tmp_path)
    log = out / "log.jsonl"
    wait_until(lambda: log.exists() and log.read_text().count('"loss"') >= LOST_AFTER, kept)
    assert not checkpoint.found(out)
    stopped.process.send_signal(signal.SIGTERM)
    stopped.process.wait(timeout=60)
    assert len(checkpoint.found(out)) == 1
    assert psutil.pid_exists(kept.process.pid)
    assert kept.process.poll() is None
    back = hosts[1].start([*many_nodes(), *words], tmp_path / "back")
    back.succeed()
    kept.succeed()
    assert_same(out, one_host)

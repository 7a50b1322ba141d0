"""The machine that a plan is for: cards by name or found, a processor, its memory and disk."""

from pathlib import Path

import psutil
import torch

from alpaca import ram
from alpaca.model import compute_dtype
from alpaca.plan import devices, plan, planner, shapes
from alpaca.plan.plan import Machine
from alpaca.recipe import rules
from alpaca.recipe.arguments import Arguments

LLAMA_3 = shapes.KNOWN["llama-3.1-8b"]


def test_drivers_names_are_recognized_and_unknown_cards_keep_their_memory() -> None:
    names = {
        "Tesla T4": "t4",
        "Tesla V100-SXM2-32GB": "v100-32",
        "NVIDIA A100-SXM4-40GB": "a100-40",
        "NVIDIA A100 80GB PCIe": "a100-80",
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H100 PCIe": "h100-pcie",
        "NVIDIA H200": "h200",
        "NVIDIA L40S": "l40s",
        "NVIDIA L4": "l4",
        "NVIDIA A10G": "a10g",
        "NVIDIA A10": "a10",
        "NVIDIA GeForce RTX 4090": "rtx-4090",
        "NVIDIA B200": "b200",
    }
    for driver, key in names.items():
        assert devices.recognized(driver, 7).name == devices.GPUS[key].name
        assert devices.recognized(driver, 7).memory == 7
    other = devices.recognized("Voodoo 2", 12 << 20)
    assert (other.memory, other.bf16) == (12 << 20, None)


def test_memory_is_what_a_container_may_take(tmp_path: Path) -> None:
    assert ram.total(tmp_path) == psutil.virtual_memory().total
    (tmp_path / "memory.max").write_text("max\n")
    assert ram.total(tmp_path) == psutil.virtual_memory().total
    (tmp_path / "memory.max").write_text("5000000000\n")
    assert ram.total(tmp_path) == 5_000_000_000
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("4000000000\n")
    assert ram.total(tmp_path) == 4_000_000_000


def test_bf16_is_what_the_trainer_will_find_fast(tmp_path: Path) -> None:
    assert rules.cpu_multiplies_bf16() == (compute_dtype(torch.device("cpu")) == torch.bfloat16)
    for flags, fast in (("avx512f avx512_bf16", True), ("avx2 fma", False)):
        (tmp_path / "cpuinfo").write_text(f"flags\t\t: fpu {flags}\n")
        assert rules.cpu_multiplies_bf16(tmp_path / "cpuinfo") == fast
    assert devices.recognized("NVIDIA A40", 48 * 10**9, 8.6).fast_bf16
    assert not devices.recognized("Quadro RTX 8000", 48 * 10**9, 7.5).fast_bf16


def test_a_card_without_bf16_is_planned_in_fp32() -> None:
    chosen = plan.setting(LLAMA_3, Arguments(bf16=True), Machine(devices.named("t4")))
    assert chosen.compute == 4
    assert plan.setting(LLAMA_3, Arguments(bf16=True), Machine(devices.named("l4"))).compute == 2


def test_checkpoints_of_the_same_run_are_no_lack_of_disk(tmp_path: Path) -> None:
    """A run that goes on replaces them: it needs no more than it did when it began."""
    before = planner.this_machine(tmp_path, [devices.named("l4")]).disk
    (tmp_path / "checkpoint-5").mkdir()
    with open(tmp_path / "checkpoint-5" / "__0_0.distcp", "wb") as file:
        file.truncate(10**13)
    after = planner.this_machine(tmp_path, [devices.named("l4")]).disk
    assert before is not None
    assert after is not None
    assert after - before > 0.99e13

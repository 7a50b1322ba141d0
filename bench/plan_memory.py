"""Predicted and measured memory: short real runs of train.py, the peak of each rank.

    python bench/plan_memory.py [NAME ...] [--model DIR]

Each setting trains two steps of SmolLM2-135M on the CPU and exports. The largest VmHWM of a rank is
compared with the prediction of `alpaca plan` for the same flags. The 8-bit optimizer needs torchao,
in this environment or in .venv/apart, where ./script/setup dev installs it. Last line: JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BATCH = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 1}
SHORT = {
    "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "model_max_length": 96,
}  # fmt: skip
SETTINGS: dict[str, tuple[int, dict[str, object]]] = {
    "small packs": (1, {**BATCH, "max_tokens_per_pack": 512}),
    "large packs": (1, {**BATCH, "max_tokens_per_pack": 2048}),
    "checkpointing": (
        1, {**BATCH, "max_tokens_per_pack": 2048, "gradient_checkpointing": True},
    ),
    "two ranks": (2, {**BATCH, "per_device_train_batch_size": 3, "max_tokens_per_pack": 1024}),
    "offload": (1, {**BATCH, "max_tokens_per_pack": 1024, "fsdp": "full_shard offload"}),
    "8-bit optimizer": (1, {**BATCH, "max_tokens_per_pack": 1024, "optim": "adamw_8bit"}),
    "LoRA": (1, {**BATCH, "max_tokens_per_pack": 2048, "lora_rank": 16}),
    "LoRA, checkpointing": (
        1, {**BATCH, "max_tokens_per_pack": 2048, "lora_rank": 16, "gradient_checkpointing": True},
    ),
    "LoRA of q and v": (
        1, {**BATCH, "max_tokens_per_pack": 1024, "lora_rank": 16,
            "lora_target_modules": "q_proj,v_proj"},
    ),
    "DoRA": (1, {**BATCH, "max_tokens_per_pack": 1024, "lora_rank": 16, "use_dora": True}),
    "QLoRA": (
        1, {**BATCH, "max_tokens_per_pack": 2048, "lora_rank": 16, "quantize_base": "nf4"},
    ),
    "LoRA, two ranks": (
        2, {**BATCH, "per_device_train_batch_size": 3, "max_tokens_per_pack": 1024,
            "lora_rank": 16},
    ),
    # Short, because processors without bf16 instructions take a minute per step. There
    # ALPACA_CPU_BF16 forces the flag.
    "bf16": (1, {**SHORT, "bf16": True}),
    "two ranks, bf16": (2, {**SHORT, "bf16": True}),
}  # fmt: skip
PROGRAM = """
import sys
from alpaca import heap
heap.replace()
from alpaca.recipe import arguments
from alpaca.training import command
parsed, _ = arguments.parse(sys.argv[1:])
command.run(parsed)
peak = [line for line in open("/proc/self/status") if line.startswith("VmHWM")][0]
print("PEAK", int(peak.split()[1]) * 1024, flush=True)
"""


def flags(model: Path, out: Path, changed: dict[str, object]) -> list[str]:
    """The command line of a setting."""
    values: dict[str, object] = {
        "model_name_or_path": model,
        "data_path": ROOT / "data/seed_tasks.jsonl",
        "output_dir": out,
        "max_steps": 2,
        "save_strategy": "no",
        **changed,
    }
    return [f"--{name}={value}" for name, value in values.items()]


def process_environment(words: list[str]) -> dict[str, str]:
    """The environment, with torchao where a command needs it."""
    eight = "--optim=adamw_8bit" in words
    forced = {"ALPACA_CPU_BF16": "1"} if "--bf16=True" in words else {}
    apart = {"PYTHONPATH": str(ROOT / ".venv" / "apart")} if eight else {}
    return {**os.environ, **forced, **apart}


def measured(ranks: int, words: list[str]) -> int:
    """Peak bytes of the rank that used most."""
    environment = {
        **process_environment(words),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29655",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": "1",
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *words],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate()[0] for process in started]
    assert all(process.returncode == 0 for process in started), outputs
    return max(int(output.rpartition("PEAK ")[2]) for output in outputs)


def predicted(ranks: int, words: list[str]) -> dict[str, int]:
    """Bytes that the plan predicts, part by part."""
    command = [sys.executable, "-m", "alpaca", "plan", "--json", "--gpus", str(ranks), *words]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=process_environment(words),
        capture_output=True,
        text=True,
        check=True,
    )
    parts: dict[str, int] = json.loads(done.stdout)["memory"]
    return parts


def compared(name: str, model: Path) -> dict[str, object]:
    """One setting: bytes predicted and measured, and the first over the second."""
    ranks, changed = SETTINGS[name]
    with tempfile.TemporaryDirectory() as folder:
        words = flags(model, Path(folder, "out"), changed)
        parts = predicted(ranks, words)
        peak = measured(ranks, words)
    total = sum(value for part, value in parts.items() if part != "moment")
    return {"predicted": total, "measured": peak, "ratio": round(total / peak, 3), "parts": parts}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("names", nargs="*", metavar="NAME", help=", ".join(SETTINGS))
    options.add_argument("--model", type=Path, default=ROOT / "weights/smollm2-135m")
    arguments = options.parse_args()
    found = {}
    for name in arguments.names or SETTINGS:
        found[name] = compared(name, arguments.model)
        print(name, json.dumps(found[name]), flush=True)
    print(json.dumps({name: values["ratio"] for name, values in found.items()}))


if __name__ == "__main__":
    main()

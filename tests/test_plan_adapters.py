"""The plan of an adapter: its tensors, what autograd keeps for it, and what a plan says."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from training_runs import ROOT, finish

from alpaca.errors import UserError
from alpaca.folder import load_tokenizer
from alpaca.plan import adapters, disk, memory, plan, shapes, workload
from alpaca.plan.devices import cpu
from alpaca.plan.plan import Machine
from alpaca.recipe import packing
from alpaca.recipe.arguments import Arguments
from alpaca.recipe.corpus import open_corpus
from alpaca.tokens import Codec
from alpaca.training import loss, sharding

CPU = torch.device("cpu")
FLAGS: dict[str, dict[str, Any]] = {
    "all weights": {},
    "LoRA": {"lora_rank": 4},
    "LoRA of q and v": {"lora_rank": 4, "lora_target_modules": "q_proj,v_proj"},
    "LoRA of all but down": {
        "lora_rank": 4,
        "lora_target_modules": "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj",
    },
    "DoRA": {"lora_rank": 4, "use_dora": True},
    "dropout": {"lora_rank": 4, "lora_dropout": 0.1},
    "nf4": {"lora_rank": 4, "quantize_base": "nf4"},
    "int8": {"lora_rank": 4, "quantize_base": "int8"},
}


def kept(module: torch.nn.Module, run: Callable[[], object]) -> int:
    """Bytes of the storages that autograd saves, without those of weights."""
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        # FSDP puts a layer's gathered weights in place while it computes.
        weights = [
            t for t in [*module.parameters(), *module.buffers()] if not isinstance(t, DTensor)
        ]
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in {t.untyped_storage().data_ptr() for t in weights}:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return sum(found.values())


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    yield sharding.start(CPU)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", FLAGS)
def test_activations_are_those_that_autograd_keeps(
    name: str, mesh: DeviceMesh, tiny_model: Path, tmp_path: Path
) -> None:
    flags = Arguments(**FLAGS[name], model_name_or_path=tiny_model)
    corpus = open_corpus(
        ROOT / "data/seed_tasks.jsonl", Codec(load_tokenizer(tiny_model)), tmp_path, 160
    )
    pack = packing.build(corpus, range(8))
    adapter = flags if flags.lora_rank else None
    module = sharding.build(tiny_model, mesh, torch.float32, CPU, adapter=adapter)
    measured = kept(module, lambda: loss.pack_loss(module, pack, CPU))
    shape = shapes.find(tiny_model)
    setting = plan.setting(shape, flags, Machine(cpu(8 * 10**9)))
    index = loss.index(pack.segments, CPU)
    # The first layer needs no gradient of its input, so no mask of it: here of one layer in two.
    within = 0.07 if flags.lora_dropout else 0.03
    load = workload.LargestPack(pack.tokens, len(index.gather), len(pack.labels))
    assert memory.activations(shape, load, setting) == pytest.approx(measured, rel=within)


@pytest.mark.parametrize("name", ["LoRA", "LoRA of q and v", "DoRA"])
def test_the_adapters_tensors_and_its_size_on_disk_are_those_of_the_run(
    name: str, tiny_model: Path, tmp_path: Path
) -> None:
    flags = FLAGS[name]
    words = [f"--{flag}={value}" for flag, value in flags.items()]
    words += [f"--model_name_or_path={tiny_model}", f"--output_dir={tmp_path / 'out'}"]
    finish([sys.executable, "train.py", "--max_steps=1", *words])
    shape = shapes.find(tiny_model)
    adapter = adapters.chosen(shape, Arguments(**flags))
    assert adapter is not None
    stored = tmp_path / "out/adapter_model.safetensors"
    with safe_open(stored, "pt") as file:
        held = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    assert adapter.tensors(shape) == held
    assert disk.adapter_bytes(shape, adapter) == stored.stat().st_size


def planned(*words: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "alpaca", "plan", "--json", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_of_seven_billion_weights_an_adapter_fits_where_all_do_not() -> None:
    seven = ["--gpu=rtx-4090", "--gpus=1", "--model_name_or_path=llama-7b", "--bf16=True"]
    small = ["--gradient_checkpointing=True", "--examples=1000"]
    assert not planned(*seven, *small)["fits"]
    lora = planned(*seven, *small, "--lora_rank=16")
    quantized = planned(*seven, *small, "--lora_rank=16", "--quantize_base=nf4")
    assert lora["fits"]
    assert quantized["fits"]
    # a linear weight's two bytes become 4 bits, and 4 bytes for each 64 of them
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    spared = lora["memory"]["weights"] - quantized["memory"]["weights"]
    assert spared == linear * 2 - linear // 2 - linear // 16
    assert lora["trained"] == 16 * 32 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    counts = 4 * 2 * 7 * 32  # of steps, one for each tensor
    assert lora["checkpoint"] == 12 * lora["trained"] + counts


def test_a_layer_that_the_model_lacks_is_named(tiny_model: Path) -> None:
    shape = shapes.find(tiny_model)
    with pytest.raises(UserError, match="no linear layer qkv"):
        adapters.chosen(shape, Arguments(lora_rank=4, lora_target_modules="qkv"))

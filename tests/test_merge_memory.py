"""A merge takes little memory, whatever the size of the model: measured as processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from alpaca import adapter as adapters
from alpaca import layout

ROOT = Path(__file__).resolve().parent.parent
GB = 10**9
PROGRAM = """
import re, sys
from pathlib import Path
from alpaca.cli import main
try:
    main(sys.argv[1:])
finally:
    print("peak", re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


def sparse_model(
    folder: Path, tokenizer: PreTrainedTokenizerBase, width: int, inner: int, layers: int
) -> int:
    """A bf16 LLaMA of zeros, which take no space on the disk; returns its bytes."""
    tokenizer.save_pretrained(folder)
    heads, vocabulary = width // 128, len(tokenizer)
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
        "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": max(1, heads // 8),
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "vocab_size": vocabulary,
        "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, width), "lm_head.weight": (vocabulary, width),
        "model.norm.weight": (width,),
    }  # fmt: skip
    narrow = config["num_key_value_heads"] * 128  # type: ignore[operator]
    for number in range(layers):
        name = f"model.layers.{number}"
        shapes |= {
            f"{name}.self_attn.q_proj.weight": (width, width),
            f"{name}.self_attn.k_proj.weight": (narrow, width),
            f"{name}.self_attn.v_proj.weight": (narrow, width),
            f"{name}.self_attn.o_proj.weight": (width, width),
            f"{name}.mlp.gate_proj.weight": (inner, width),
            f"{name}.mlp.up_proj.weight": (inner, width),
            f"{name}.mlp.down_proj.weight": (width, inner),
            f"{name}.input_layernorm.weight": (width,),
            f"{name}.post_attention_layernorm.weight": (width,),
        }
    header = layout.header({name: (shape, "BF16") for name, shape in shapes.items()})
    size = len(header) + sum(layout.tensor_bytes(shape, "BF16") for shape in shapes.values())
    with open(folder / "model.safetensors", "wb") as file:
        file.write(header)
        file.truncate(size)
    return size


def lora(folder: Path, base: Path, rank: int) -> None:
    """An adapter of every linear layer."""
    from alpaca import stored

    folder.mkdir()
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
    (folder / adapters.CONFIG).write_text(
        json.dumps({**settings, "base_model_name_or_path": str(base)})
    )
    held = {}
    for name, entry in stored.tensors(base).items():
        if "_proj" in name:
            out, wide = entry.shape
            module = adapters.ROOT + name.removesuffix(".weight")
            held[f"{module}.lora_A.weight"] = torch.full((rank, wide), 0.01)
            held[f"{module}.lora_B.weight"] = torch.full((out, rank), 0.02)
    save_file(held, folder / adapters.WEIGHTS)


def peak(*words: object) -> int:
    """The most memory that the command held at once, in bytes."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, words)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return int(done.stdout.split()[-1]) * 1024


@pytest.mark.slow
@pytest.mark.parametrize("to", ["base", "fp32"])
def test_a_layer_of_the_70b_model_takes_less_than_1_5_gb(
    bpe: PreTrainedTokenizerBase, tmp_path: Path, to: str
) -> None:
    base = tmp_path / "base"
    assert sparse_model(base, bpe, 8192, 28672, 1) > 1.7 * GB
    lora(tmp_path / "adapter", base, 64)
    words = ["merge", tmp_path / "adapter", "-o", tmp_path / "out", "--dtype", to]
    found = peak(*words, "--proof", "always")
    assert found < 1.5 * GB, f"{found / GB:.2f} GB"
    print(f"{found / GB:.2f} GB")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_layers(
    bpe: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    found = []
    for layers in (2, 150):
        base = tmp_path / f"base-{layers}"
        size = sparse_model(base, bpe, 512, 2048, layers)
        lora(tmp_path / f"adapter-{layers}", base, 16)
        words = ["merge", tmp_path / f"adapter-{layers}", "-o", tmp_path / f"out-{layers}"]
        found.append(peak(*words, "--proof", "always"))
    assert size > 1.1 * GB
    assert found[1] < found[0] + 0.15 * GB, found
    print(found)

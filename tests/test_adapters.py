"""Adapters that train.py writes are those that peft and transformers alone would train."""

import json
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import set_eos
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from training_runs import ROOT, finish, losses, start, train, wait_until
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from alpaca import quantization
from alpaca.folder import load_tokenizer
from alpaca.records import read_records
from alpaca.tokens import Codec

STEPS, EXAMPLES, RATE = 4, 8, 1e-3
SLOW = pytest.mark.slow
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight seed tasks, of both templates: a step takes them all."""
    seeds = [json.loads(line) for line in (ROOT / "data/seed_tasks.jsonl").read_text().splitlines()]
    chosen = [s for s in seeds if s["input"]][:3] + [s for s in seeds if not s["input"]][:5]
    path = tmp_path_factory.mktemp("data") / "eight.json"
    path.write_text(json.dumps(chosen))
    return path


@pytest.fixture(scope="module")
def biased(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied model with biases, whose sizes are no powers of two."""
    tokenizer = load_tokenizer(tiny_model)
    config = Qwen2Config(
        vocab_size=len(tokenizer) + 3,
        hidden_size=72,
        intermediate_size=100,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    set_eos(config, tokenizer)
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("biased") / "base"
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def words(base: Path, data: Path, out: Path, **more: Any) -> list[str]:
    flags = {
        "model_name_or_path": base,
        "data_path": data,
        "output_dir": out,
        "per_device_train_batch_size": EXAMPLES,
        "gradient_accumulation_steps": 1,
        "max_steps": STEPS,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0,
        "lora_rank": 6,
        **more,
    }
    return [f"--{name}={value}" for name, value in flags.items()]


def run(base: Path, data: Path, out: Path, ranks: int = 0, **more: Any) -> Path:
    done = train(*words(base, data, out, **more), ranks=ranks)
    assert done.returncode == 0, done.stderr
    return out


def weights(folder: Path) -> Tensors:
    held: Tensors = load_file(folder / "adapter_model.safetensors")
    return held


def by_peft(
    start_from: Path, base: Path, data: Path, kind: str = "no"
) -> tuple[Tensors, list[float]]:
    """Train from an adapter's first values with peft, one example at a time; also the losses."""
    codec = Codec(load_tokenizer(base))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if kind != "no":
        for layer in model.model.layers:
            for part in layer.modules():
                if isinstance(part, torch.nn.Linear):
                    part.weight.data = quantization.rounded(kind, part.weight.data)
    model = PeftModel.from_pretrained(model, start_from, is_trainable=True)
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    examples = codec.examples(read_records(data), max_length=512)
    pairs = [(one.ids[: one.prompt_length], one.ids[one.prompt_length :]) for one in examples]
    targets = sum(len(answer) for _, answer in pairs)
    found = []
    for _ in range(STEPS):
        total = 0.0
        for prompt, answer in pairs:
            ids = torch.tensor([[*prompt, *answer]])
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
            loss = F.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum") / targets
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        found.append(total)
    names = {
        name.replace(".default", "").removesuffix(".weight")
        if "magnitude" in name
        else name.replace(".default", ""): parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return names, found


def relative(ours: Tensors, theirs: Tensors) -> float:
    assert ours.keys() == theirs.keys()
    apart = torch.cat([(ours[name] - theirs[name]).flatten() for name in theirs]).norm()
    return float(apart / torch.cat([one.flatten() for one in theirs.values()]).norm())


@pytest.mark.parametrize(
    ("base", "more", "ranks"),
    [
        ("tiny_model", {}, 2),
        ("tiny_model", {"quantize_base": "nf4", "lora_use_rslora": True}, 2),
        ("tiny_model", {"quantize_base": "int8", "gradient_checkpointing": True}, 0),
        ("biased", {"lora_target_modules": "q_proj,down_proj", "lora_alpha": 3}, 0),
        ("biased", {"use_dora": True}, 2),
        # in the first layer the gate has a gradient and its neighbour `up_proj` has none
        ("tiny_model", {"lora_target_modules": "gate_proj,down_proj"}, 0),
        pytest.param("biased", {"quantize_base": "nf4", "fsdp": "no_shard"}, 2, marks=SLOW),
        pytest.param("tiny_model", {"use_dora": True, "fsdp": "shard_grad_op"}, 2, marks=SLOW),
        pytest.param("tiny_model", {"fsdp": "full_shard offload"}, 0, marks=SLOW),
        pytest.param("tiny_model", {"packing": False, "quantize_base": "int8"}, 2, marks=SLOW),
        pytest.param("tiny_model", {"torch_compile": True}, 0, marks=SLOW),
    ],
)
def test_an_adapter_is_what_peft_trains(
    request: pytest.FixtureRequest,
    base: str,
    more: dict[str, Any],
    ranks: int,
    data: Path,
    tmp_path: Path,
) -> None:
    folder = request.getfixturevalue(base)
    if ranks:
        more = {**more, "per_device_train_batch_size": EXAMPLES // ranks}
    first = run(folder, data, tmp_path / "first", **{**more, "learning_rate": 0, "max_steps": 1})
    assert all(not value.any() for name, value in weights(first).items() if "lora_B" in name)
    wanted, their_losses = by_peft(first, folder, data, more.get("quantize_base", "no"))
    out = run(folder, data, tmp_path / "out", ranks, **more)
    assert losses(out) == pytest.approx(their_losses, rel=1e-5)
    assert relative(weights(out), wanted) < 2e-5
    moved = relative(weights(out), weights(first))
    assert moved > 1e-2  # so that the line above says something


def test_only_the_adapter_is_kept_and_a_killed_run_goes_on_bit_for_bit(
    tiny_model: Path, data: Path, tmp_path: Path
) -> None:
    more = {"max_steps": 12, "save_steps": 2, "lora_dropout": 0.2, "keep_last_checkpoint": True}
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(tiny_model, data, whole, **more)
    job = start([sys.executable, "train.py", *words(tiny_model, data, out, **more)])
    wait_until(lambda: bool(list(out.glob("checkpoint-*"))), job)
    job.send_signal(signal.SIGKILL)
    job.communicate()
    finish([sys.executable, "train.py", *words(tiny_model, data, out, **more)])
    assert losses(out) == losses(whole)
    ours, theirs = weights(out), weights(whole)
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    held = sum(path.stat().st_size for path in (out / "checkpoint-12").glob("*.distcp"))
    trained = sum(value.numel() for value in theirs.values())
    assert 12 * trained <= held < 12 * trained + 400_000  # fp32 values, two moments, torch's own


def test_a_frozen_embedding_is_in_no_checkpoint_under_the_name_it_is_tied_to(
    biased: Path, data: Path, tmp_path: Path
) -> None:
    out = run(biased, data, tmp_path / "out", max_steps=1, keep_last_checkpoint=True)
    state, shard = tmp_path / "state.pt", out / "checkpoint-1"
    dcp_to_torch_save(shard, state)
    held = torch.load(state, weights_only=True)["model"]
    assert held
    assert all("lora_" in name for name in held)


def test_a_base_whose_numbers_changed_is_another_one_without_a_passport_too(
    tiny_model: Path, data: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    (base / "passport.json").unlink(missing_ok=True)
    more = {"max_steps": 1, "keep_last_checkpoint": True}
    out = run(base, data, tmp_path / "out", **more)
    weights_file = base / "model.safetensors"
    held = load_file(weights_file)
    held["model.layers.1.self_attn.q_proj.weight"] += 0.5
    save_file(held, weights_file, {"format": "pt"})
    refused = train(*words(base, data, out, **{**more, "max_steps": 2}))
    assert refused.returncode == 2
    assert "holds another model" in refused.stderr


def test_a_merge_beside_the_run_is_that_of_the_newest_adapter(
    tiny_model: Path, data: Path, tmp_path: Path
) -> None:
    def merged() -> Tensors:
        held: Tensors = load_file(tmp_path / "out-merged" / "model.safetensors")
        return held

    more = {"max_steps": 1, "merge": True}
    out = run(tiny_model, data, tmp_path / "out", **more)
    first = merged()
    again = train(*words(tiny_model, data, out, **more))
    assert "already holds the merge of this adapter" in again.stdout
    run(tiny_model, data, out, **more, export_dtype="fp32")
    assert {one.dtype for one in merged().values()} == {torch.float32}
    run(tiny_model, data, out, **more, overwrite_output_dir=True, seed=7)
    second = merged()
    assert any(not second[name].equal(first[name]) for name in first)

    shutil.rmtree(out)
    shutil.copytree(tiny_model, tmp_path / "other-merged")
    refused = train(*words(tiny_model, data, tmp_path / "other", **more))
    assert refused.returncode == 2
    assert "something else is there" in refused.stderr
    assert not (tmp_path / "other").exists()


def test_an_adapter_takes_a_models_place_and_a_model_an_adapters(
    tiny_model: Path, data: Path, tmp_path: Path
) -> None:
    out = run(tiny_model, data, tmp_path / "out", max_steps=1, lora_rank=0)
    refused = train(*words(tiny_model, data, out, max_steps=1))
    assert refused.returncode == 2
    assert "already holds another model" in refused.stderr
    run(tiny_model, data, out, max_steps=1, overwrite_output_dir=True)
    assert not (out / "config.json").exists()
    assert not (out / "model.safetensors").exists()
    assert (out / "adapter_config.json").is_file()
    run(tiny_model, data, out, max_steps=1, lora_rank=0, overwrite_output_dir=True)
    assert not list(out.glob("adapter_*"))

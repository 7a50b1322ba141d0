"""Model folders that are easily misread, and what transformers computes with them."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from training_runs import losses, train
from transformers import AutoModelForCausalLM

from alpaca.folder import load_tokenizer
from alpaca.records import read_records
from alpaca.tokens import Codec

META = {"format": "pt"}
RECORDS = [
    {"instruction": "Name three colors.", "input": "", "output": "Red, green and blue."},
    {"instruction": "Say it shorter.", "input": "The sea is calm.", "output": "A calm sea."},
]
Tensors = dict[str, torch.Tensor]


def copied(source: Path, folder: Path, **config: Any) -> Path:
    """A copy of a model folder, with changes to its config.json."""
    shutil.copytree(source, folder)
    (folder / "passport.json").unlink(missing_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def tensors(folder: Path) -> Tensors:
    """The tensors of model.safetensors."""
    held: Tensors = load_file(folder / "model.safetensors")
    return held


def save(folder: Path, held: Tensors, name: str = "model.safetensors") -> Path:
    """Write tensors into one file of a folder."""
    save_file(held, folder / name, metadata=META)
    return folder


def save_sharded(folder: Path, held: Tensors) -> Path:
    """Write tensors into two files with an index."""
    names = sorted(held)
    where = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        save(folder, {name: held[name] for name in part}, file)
        where |= dict.fromkeys(part, file)
    index(folder, where)
    return folder


def index(folder: Path, where: Any) -> None:
    """Write an index with this weight_map."""
    content = json.dumps({"metadata": {}, "weight_map": where})
    (folder / "model.safetensors.index.json").write_text(content)


def zeros(held: Tensors) -> Tensors:
    """A model of the same shape that answers every token alike."""
    return {name: torch.zeros_like(tensor) for name, tensor in held.items()}


def trained_loss(folder: Path, scratch: Path) -> float:
    """The loss that `train.py` logs for its first step over both records, at learning rate 0."""
    done = train(*flags(folder, scratch))
    assert done.returncode == 0, done.stdout + done.stderr
    [loss] = losses(scratch / "out")
    return loss


def flags(folder: Path, scratch: Path) -> list[str]:
    """What that run is given."""
    scratch.mkdir(parents=True, exist_ok=True)
    (scratch / "two.json").write_text(json.dumps(RECORDS))
    return [
        f"--model_name_or_path={folder}",
        f"--data_path={scratch / 'two.json'}",
        f"--output_dir={scratch / 'out'}",
        "--learning_rate=0",
        "--max_steps=1",
        "--per_device_train_batch_size=2",
        "--gradient_accumulation_steps=1",
        "--bf16=False",
    ]


def transformers_loss(folder: Path, scratch: Path) -> float:
    """The mean loss of the same tokens, as transformers loads the folder and computes it."""
    (scratch / "records.json").write_text(json.dumps(RECORDS))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    codec = Codec(load_tokenizer(folder))
    total, targets = 0.0, 0
    for example in codec.examples(read_records(scratch / "records.json"), 512):
        ids = torch.tensor(example.ids)
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1]
        each = torch.nn.functional.cross_entropy(logits.double(), ids[1:], reduction="none")
        total += each[example.prompt_length - 1 :].sum().item()
        targets += example.targets
    return total / targets

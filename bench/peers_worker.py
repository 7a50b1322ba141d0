"""The worker of bench/peers.py: runs in .venvs/peers and answers a request with a line of JSON.

A request names a way to train. The answer has the seconds of its forward and backward passes over
all examples of a step, measured inside the library's own loop (from `on_step_begin` to
`on_pre_optimizer_step`), and how far its gradient is from the given one.
"""

import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer, pack_dataset

BATCH, LENGTH = 4, 512
WAYS = {
    "sfttrainer padded": {"batch": BATCH},
    "sfttrainer padded, grouped by length": {"batch": BATCH, "grouped": True},
    "sfttrainer padding-free": {"batch": BATCH, "padding_free": True},
    f"sfttrainer packed to {LENGTH}": {"pack": LENGTH},
    f"sfttrainer packed to {BATCH * LENGTH}": {"pack": BATCH * LENGTH},
    "trainer padded": {"batch": BATCH},
    "trainer padded, grouped by length": {"batch": BATCH, "grouped": True},
    "trainer flattened": {"batch": BATCH, "flatten": True},
}


class Watch(TrainerCallback):
    """Times the passes of a step, and compares their gradient with the reference."""

    def __init__(self, reference: dict[str, torch.Tensor]) -> None:
        """`reference`: the gradient of each parameter."""
        self.reference = reference
        self.seconds = self.difference = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Before the first forward pass."""
        self.seconds = time.perf_counter()

    def on_pre_optimizer_step(self, *_: Any, model: torch.nn.Module, **__: Any) -> None:
        """After the last backward pass."""
        self.seconds = time.perf_counter() - self.seconds
        missed, whole = 0.0, 0.0
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            right = self.reference[name.replace(".default", "")]
            assert parameter.grad is not None
            missed += float((parameter.grad - right).double().square().sum())
            whole += float(right.double().square().sum())
        self.difference = (missed / whole) ** 0.5


def settings(accumulation: int, batch: int, *, grouped: bool) -> dict[str, Any]:
    """Flags that both libraries share: one step, in the given order, and nothing else."""
    return {
        "output_dir": "unused",
        "max_steps": 1,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "train_sampling_strategy": "group_by_length" if grouped else "sequential",
        "learning_rate": 0.0,
        "max_grad_norm": 0.0,  # no clipping: the gradient is compared as it is
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
    }


def trainer(name: str, model: Any, tokenizer: Any, examples: list[dict[str, Any]]) -> Trainer:
    """The library's trainer for one way, set to make one step of all examples."""
    way: dict[str, Any] = WAYS[name]
    library = name.split()[0]
    batch = way.get("batch", 1)
    data = Dataset.from_list([{key: e[key] for key in COLUMNS[library]} for e in examples])
    rows = len(pack_dataset(data, way["pack"], "bfd")) if "pack" in way else len(data)
    shared = settings(-(-rows // batch), batch, grouped="grouped" in way)
    # Plain SGD holds no state; its step is not measured.
    common = {"optimizers": (torch.optim.SGD(model.parameters(), lr=0.0), None)}
    if library == "sfttrainer":
        packing = {"packing": True, "packing_strategy": "bfd"} if "pack" in way else {}
        limit = None if "padding_free" in way else way.get("pack", LENGTH)
        config = SFTConfig(
            **shared,
            **packing,
            max_length=limit,
            completion_only_loss=True,
            padding_free="padding_free" in way,
        )
        return SFTTrainer(
            model=model, args=config, train_dataset=data, processing_class=tokenizer, **common
        )
    collate = (
        DataCollatorWithFlattening()
        if "flatten" in way
        else DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    )
    return Trainer(
        model=model,
        args=TrainingArguments(**shared),
        train_dataset=data,
        data_collator=collate,
        processing_class=tokenizer,
        **common,
    )


COLUMNS = {"sfttrainer": ("input_ids", "completion_mask"), "trainer": ("input_ids", "labels")}


def main() -> None:
    """Answer requests until the input ends."""
    folder, work = Path(sys.argv[1]), Path(sys.argv[2])
    adapter = sys.argv[4] if len(sys.argv) > 4 else None
    torch.set_num_threads(int(sys.argv[3]))
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print; stdout is for answers only
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    examples = json.loads((work / "examples.json").read_text())
    reference = load_file(work / "gradient.safetensors")
    packages = ("torch", "transformers", "trl", "accelerate", "datasets", "peft")
    versions = {name: importlib.metadata.version(name) for name in packages}
    print(json.dumps({"ways": list(WAYS), "versions": versions}), file=answers, flush=True)
    for line in sys.stdin:
        watch = Watch(reference)
        # A fresh model each time, because trainers patch the model they are given.
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        )
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
        try:
            made = trainer(line.strip(), model, tokenizer, examples)
            made.add_callback(watch)
            made.train()
            answer: dict[str, Any] = {"seconds": watch.seconds, "difference": watch.difference}
        except (RuntimeError, ValueError, TypeError) as error:  # this version lacks the way
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()

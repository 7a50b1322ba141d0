"""TRL's DPOTrainer on given token ids; runs in .venvs/peers, for tests/test_preference.py.

    python trl_dpo.py JOB    JOB: a folder with job.json, adapter/ and what this writes, done.json

TRL tokenizes prompt and answer as one text, so a token may span the end of the prompt. The ids are
given here, as this project makes them, and TRL's own preparation is left out. All else is TRL's.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

MEASURES = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


class Given(DPOTrainer):
    """DPOTrainer that takes prompt_ids, chosen_ids and rejected_ids as they are."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def compute_loss(self, *arguments: Any, **more: Any) -> Any:
        loss = super().compute_loss(*arguments, **more)
        self.losses.append(loss.item())
        return loss


class Watch(TrainerCallback):
    """Keeps the first gradient, and each step's means, which logs round."""

    def __init__(self, job: Path) -> None:
        self.job, self.steps = job, []

    def on_pre_optimizer_step(self, _: Any, state: Any, *__: Any, model: Any, **___: Any) -> None:
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not self.steps:
            save_file({n: p.grad.clone() for n, p in trained.items()}, self.job / "gradient")
        measured = self.trainer._metrics["train"]
        means = {name: torch.tensor(measured[name]).double().mean().item() for name in MEASURES}
        means["loss"] = sum(self.trainer.losses) / len(self.trainer.losses)
        self.steps.append(means)
        self.trainer.losses.clear()
        measured.clear()


def main(job: Path) -> None:
    """Train as job.json says."""
    told = json.loads((job / "job.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(told["base"])
    tokenizer.pad_token = tokenizer.eos_token
    batch = 4
    settings = DPOConfig(
        output_dir=str(job / "unused"),
        beta=told["beta"],
        max_length=told["max_length"],
        max_steps=told["steps"],
        learning_rate=told["rate"],
        lr_scheduler_type="constant",
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=len(told["pairs"]) // batch,
        train_sampling_strategy="sequential",
        max_grad_norm=0.0,
        weight_decay=0.0,
        optim="adamw_torch",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
    )
    watch = Watch(job)
    config = LoraConfig.from_pretrained(job / "adapter")
    config.inference_mode = False  # as saved, it would be frozen
    trainer = Given(
        model=AutoModelForCausalLM.from_pretrained(told["base"], dtype=torch.float32),
        args=settings,
        train_dataset=Dataset.from_list(told["pairs"]),
        processing_class=tokenizer,
        peft_config=config,
        callbacks=[watch],
    )
    trainer.losses, watch.trainer = [], trainer
    given = load_file(job / "adapter" / "adapter_model.safetensors")
    assert not set_peft_model_state_dict(trainer.model, given).unexpected_keys
    trainer.train()
    trainer.model.save_pretrained(job / "trained")
    (job / "done.json").write_text(json.dumps(watch.steps))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

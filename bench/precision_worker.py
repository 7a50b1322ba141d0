"""TRL's SFTTrainer in bf16 for bench/precision.py; runs in the peers' environment, without alpaca.

    python precision_worker.py MODEL WORK RATE STEPS BATCH WARMUP THREADS

Reads WORK/examples.json, in the order of training, and writes the fp32 weights it ends with to
WORK/weights.safetensors.
"""

import json
import sys
from pathlib import Path

import torch
from bf16_products import products
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer


def main() -> None:
    folder, work = Path(sys.argv[1]), Path(sys.argv[2])
    count, batch, warmup, threads = map(int, sys.argv[4:8])
    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = SFTConfig(
        output_dir=str(work / "out"),
        max_steps=count,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=1,
        learning_rate=float(sys.argv[3]),
        lr_scheduler_type="cosine",
        warmup_steps=warmup,
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=True,
        use_cpu=True,
        gradient_checkpointing=False,
        completion_only_loss=True,
        max_length=None,
        train_sampling_strategy="sequential",
        dataloader_pin_memory=False,
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
    )
    data = Dataset.from_list(json.loads((work / "examples.json").read_text()))
    trainer = SFTTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer)
    with products():
        trainer.train()
    weights = {name: p.detach().float().contiguous() for name, p in model.named_parameters()}
    save_file(weights, work / "weights.safetensors")


if __name__ == "__main__":
    main()

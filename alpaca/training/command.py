"""What `train.py` does, from parsed flags to a finished model folder."""

import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from alpaca import passport
from alpaca.errors import UserError
from alpaca.model import compute_dtype, finish_install, load_tokenizer
from alpaca.passport import sha256
from alpaca.tokens import Codec
from alpaca.training import sharding, steps
from alpaca.training.arguments import Arguments
from alpaca.training.corpus import Corpus, open_corpus
from alpaca.training.export import export
from alpaca.training.loop import Result, Trainer, recipe

CACHE = Path(".cache/alpaca")


def run(arguments: Arguments) -> None:
    """Run the training job of one process.

    Raises:
        UserError: whatever is wrong with data, model or hardware, before the first step.
    """
    rank = int(os.environ.get("RANK", "0"))
    device = _device()
    dtype = _dtype(arguments, device)
    codec = Codec(load_tokenizer(arguments.tokenizer_name_or_path or arguments.model_name_or_path))
    corpus = _open(arguments, arguments.data_path, codec)
    identity = _identity(arguments, len(corpus))
    finish_install(arguments.output_dir)
    if _already_done(arguments, identity):
        print(f"train: {arguments.output_dir} already holds the model of exactly this run")
        return
    train, held_out = _split(arguments, corpus, codec)
    mesh = sharding.start(device)
    try:
        schedule = steps.schedule(arguments, len(train), dist.get_world_size())
        if rank == 0:
            _tell(arguments, corpus, len(train), schedule, dtype)
        module = sharding.build(arguments.model_name_or_path, mesh, dtype, device)
        result = Trainer(arguments, module, corpus, train, held_out, schedule, device).run()
        facts = {"run": identity, "base": _base(arguments), "result": vars(result)}
        export(module.model, codec, arguments.output_dir, facts)
        if rank == 0:
            _summary(arguments, result)
    finally:
        dist.destroy_process_group()


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def _dtype(arguments: Arguments, device: torch.device) -> torch.dtype:
    """The compute type the flags ask for, where the hardware is fast at it."""
    if arguments.tf32 and device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
    fast = compute_dtype(device)
    if arguments.bf16 and fast is not torch.bfloat16:
        print("train: --bf16 True: this device emulates bf16, so fp32 is used, which is faster")
    return fast if arguments.bf16 else torch.float32


def _open(arguments: Arguments, data: Path, codec: Codec) -> Corpus:
    return open_corpus(
        data, codec, CACHE, arguments.model_max_length, joint=arguments.joint_tokenization
    )


def _split(
    arguments: Arguments, corpus: Corpus, codec: Codec
) -> tuple[list[int], tuple[Corpus, list[int]]]:
    """Indices to train on, and the held-out corpus with its indices."""
    everything = [int(i) for i in range(len(corpus)) if corpus.targets(i) > 0]
    if not everything:
        raise UserError(
            f"No example of {arguments.data_path} has an answer token left after truncation.",
            f"Raise --model_max_length (now {arguments.model_max_length}).",
        )
    if arguments.eval_data_path:
        other = _open(arguments, arguments.eval_data_path, codec)
        return everything, (other, list(range(len(other))))
    count = round(arguments.eval_fraction * len(everything))
    if count == len(everything):
        raise UserError("--eval_fraction leaves nothing to train on.", "Lower it.")
    order = np.random.default_rng([arguments.seed]).permutation(everything)
    return sorted(int(i) for i in order[count:]), (corpus, sorted(int(i) for i in order[:count]))


def _identity(arguments: Arguments, examples: int) -> dict[str, object]:
    """What makes two runs the same run; kept in the passport of the result."""
    elsewhere = {
        "output_dir",
        "overwrite_output_dir",
        "model_name_or_path",
        "tokenizer_name_or_path",
        "data_path",
    }
    settings = {name: v for name, v in recipe(arguments).items() if name not in elsewhere}
    return {
        "data_sha256": sha256(arguments.data_path),
        "examples": examples,
        "base_sha256": passport.fingerprint(arguments.model_name_or_path),
        "recipe": settings,
    }


def _already_done(arguments: Arguments, identity: dict[str, object]) -> bool:
    """Whether output_dir holds this run's model; refuses to train over another one."""
    folder = arguments.output_dir
    found = passport.read(folder)
    same = found is not None and found.get("run") == json.loads(json.dumps(identity))
    if not same and (folder / "config.json").exists() and not arguments.overwrite_output_dir:
        raise UserError(
            f"{folder} already holds another model.",
            "Choose another --output_dir, or give --overwrite_output_dir to replace it.",
        )
    return same


def _base(arguments: Arguments) -> dict[str, object]:
    found = passport.read(arguments.model_name_or_path) or {}
    return {"folder": arguments.model_name_or_path.name, "files": found.get("files")}


def _tell(
    arguments: Arguments,
    corpus: Corpus,
    examples: int,
    schedule: steps.Schedule,
    dtype: torch.dtype,
) -> None:
    print(
        f"train: {examples} examples, {schedule.steps} steps of {schedule.batch}, "
        f"{dist.get_world_size()} rank(s), computing in {str(dtype).removeprefix('torch.')}; "
        f"{corpus.truncated} example(s) cut at {arguments.model_max_length} tokens, "
        f"{corpus.without_targets} of them left without an answer token (not trained on)"
    )


def _summary(arguments: Arguments, result: Result) -> None:
    saved = 1 - result.tokens / max(1, result.padded_tokens)
    print(f"train: {result.steps} steps in {result.seconds:.0f} s, loss {result.final_loss:.4f}")
    print(
        f"train: {result.tokens} tokens computed, {result.padded_tokens} in the padded recipe "
        f"({saved:.0%} saved)"
    )
    if result.eval_loss_before is not None:
        print(
            f"train: held-out loss {result.eval_loss_before:.4f} before, "
            f"{result.eval_loss_after:.4f} after"
        )
    print(f"train: the model is in {arguments.output_dir}")

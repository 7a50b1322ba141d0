"""Write an adapter and its base as one model folder, some rows at a time.

The folder is complete or absent. It is written under another name, read back from the disk and
compared with what was written. Its logits are compared with those of base + adapter before it gets
its name, so that a merge whose result differs by more than its rounding can be seen.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoConfig

from alpaca import (
    atomic,
    card,
    description,
    golden,
    layout,
    merging,
    model,
    passport,
    proof,
    shards,
    stored,
)
from alpaca.adapter import Adapter, hashed
from alpaca.errors import UserError
from alpaca.folder import explained_disk_errors, load_tokenizer
from alpaca.merging import Base, BaseWeight, Merge
from alpaca.proof import Rounded
from alpaca.shards import SHORT_NAMES, TYPES, Shard
from alpaca.stored import Entry
from alpaca.tokens import Codec

MADE_BY = "merge"
AGAIN = "Free some space and run the same command again."
SLACK = 64 << 20  # bytes besides the tensors: tokenizer, headers, file system metadata
# Files of a tokenizer, under the names that transformers and others read.
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
# What a merged folder keeps of its adapter's passport: how the adapter came to be.
CARRIED = ("run", "ranks", "changes", "checkpoint", "result", "quantized")


@dataclass(frozen=True)
class Layout:
    """What is written: the type (None: each tensor's own in the base), rounding, largest file.

    `quantized`: the base's weights are first rounded to that type, as the adapter was trained.
    """

    dtype: torch.dtype | None = None
    rounding: str = merging.ROUNDING
    shard_bytes: int = layout.SHARD_BYTES
    quantized: str | None = None

    @property
    def base_weight(self) -> BaseWeight | None:
        """What takes the place of a base tensor."""
        return merging.as_trained(self.quantized)


@dataclass(frozen=True)
class Weight:
    """A tensor to be written, and its place in the base."""

    name: str
    entry: Entry

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.entry.shape


def merge(
    adapter: Adapter,
    base: Path,
    output: Path,
    chosen: Layout,
    *,
    proving: str = "auto",
) -> Rounded | None:
    """Write the merged model folder, and return how far its logits are from base + adapter's.

    Args:
        adapter: of the base.
        base: the folder that it was trained on.
        output: the folder to write; what is there is replaced.
        chosen: type, rounding and sizes.
        proving: `auto` leaves the comparison out, with a note, where it takes minutes.

    Raises:
        UserError: an input was changed, they do not belong together, the disk is full, or the files
            read back differently.
    """
    entries = model.check_weights(base)
    adapter.check_base(base, entries)
    print(f"hashing {base} and {adapter.folder}", flush=True)
    hashes = Hashes(hashed(base), hashed(adapter.folder))
    hashes.check(adapter, base, entries)
    weights = _weights(base, entries)
    dtype, others = _types(weights, chosen.dtype)
    planned = shards.plan(weights, dtype, chosen.shard_bytes, others)
    _check_disk(output, sum(shard.size for shard in planned))
    merged = Merge(Base(entries, chosen.base_weight), adapter, merging.seed_of(chosen.rounding))
    with explained_disk_errors(output.parent, AGAIN), atomic.folder(output) as partial:
        _describe(partial, base, adapter, dtype)
        written = _write(partial, planned, merged)
        found, golden_facts = _prove(partial, base, adapter, dtype, chosen, proving)
        facts = _facts(adapter, base, hashes, dtype, chosen)
        facts |= {"tensors": golden.all_tensor_hashes(partial), **golden_facts}
        read = passport.write(partial, MADE_BY, **facts)["files"]
        shards.check(planned, partial)
        for name, value in written.items():
            if read[name] != value:
                raise UserError(
                    f"{partial / name} reads back differently from what was written.",
                    "The disk is failing; write to another one.",
                )
    if "run" in facts and "result" in facts:
        card.write(output, base)
    return found


@dataclass(frozen=True)
class Hashes:
    """SHA-256 of the files that were read, by name."""

    base: Mapping[str, str]
    adapter: Mapping[str, str]

    def check(self, adapter: Adapter, base: Path, entries: Mapping[str, Entry]) -> None:
        """Refuse files that differ from the passports, and a base of another adapter."""
        for folder, found in ((base, self.base), (adapter.folder, self.adapter)):
            recorded = passport.read(folder)
            for name, wanted in (recorded or {}).get("files", {}).items():
                if "/" not in name and found.get(name) != wanted:
                    raise UserError(
                        f"{folder / name} was changed after it was written, or is missing.",
                        f"See what else changed: python -m alpaca verify {folder}",
                    )
        adapter.check_base(base, dict(entries), self.base)


def _weights(base: Path, entries: Mapping[str, Entry]) -> list[Weight]:
    """The tensors of the merged model: those of the base without buffers and a tied copy."""
    tied = stored.is_tied(stored.read_json(base / "config.json"))
    return [
        Weight(name, entry)
        for name, entry in entries.items()
        if not name.endswith(stored.BUFFERS) and not (tied and name == "lm_head.weight")
    ]


def _types(
    weights: list[Weight], dtype: torch.dtype | None
) -> tuple[torch.dtype, dict[str, torch.dtype]]:
    """The type of most numbers, and the tensors of other types; `dtype`: one type for all."""
    if dtype is not None:
        return dtype, {}
    totals: dict[torch.dtype, int] = {}
    for weight in weights:
        kind = TYPES[weight.entry.dtype]
        totals[kind] = totals.get(kind, 0) + weight.entry.elements
    most = max(totals, key=lambda kind: totals[kind])
    kinds = {weight.name: TYPES[weight.entry.dtype] for weight in weights}
    return most, {name: kind for name, kind in kinds.items() if kind != most}


def _check_disk(output: Path, size: int) -> None:
    free = atomic.free_disk(output)
    if free < size + SLACK:
        raise UserError(
            f"{output} needs {(size + SLACK) / 1e9:,.1f} GB; {free / 1e9:,.1f} GB are free.", AGAIN
        )


def _write(partial: Path, planned: list[Shard[Weight]], merged: Merge) -> dict[str, str]:
    """Write the weight files and their index; returns the SHA-256 of each file."""
    total = sum(shard.data_bytes for shard in planned)
    hashes = {}
    with tqdm(total=total, unit="B", unit_scale=True, desc="merging", disable=None) as bar:
        for shard in planned:
            hashes[shard.name] = shards.write_rows(
                shard, partial, lambda weight, kind: merged.pieces(weight.name, kind), bar.update
            )
    if len(planned) > 1:
        atomic.write_text(partial / layout.INDEX, shards.index(planned))
    return hashes


def _describe(partial: Path, base: Path, adapter: Adapter, dtype: torch.dtype) -> None:
    """Write configuration, tokenizer and templates.

    An adapter of train.py answers Alpaca's prompts: its merge gets what an export of train.py gets.
    Any other keeps the files of its base, with the tokenizer next to the adapter, if there is one.
    """
    source = proof.tokenizer_folder(base, adapter)
    codec = Codec(load_tokenizer(source))
    config = stored.read_json(base / "config.json")
    if max(codec.tokenizer.get_vocab().values()) >= config["vocab_size"]:
        raise UserError(
            f"The tokenizer in {source} has more tokens than the model of {base}.",
            "The adapter belongs to a base with a larger vocabulary: name that one with --base.",
        )
    if (adapter.passport or {}).get("made_by") == "train":
        settings = AutoConfig.from_pretrained(base, local_files_only=True)
        description.write(partial, settings, description.vocabulary_of(codec), dtype)
        return
    kind = str(dtype).removeprefix("torch.")
    config |= {"dtype": kind, "torch_dtype": kind}
    atomic.write_text(partial / "config.json", json.dumps(config, indent=2) + "\n")
    for folder, names in ((base, ("generation_config.json",)), (source, TOKENIZER)):
        for name in names:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, partial / name)


def _prove(
    partial: Path,
    base: Path,
    adapter: Adapter,
    dtype: torch.dtype,
    chosen: Layout,
    proving: str,
) -> tuple[Rounded | None, dict[str, Any]]:
    """Compare the logits; returns what was found, and what the passport keeps of it."""
    base_weight = chosen.base_weight
    adapted = proof.AdaptedWeights(base, adapter, base_weight)
    reason = golden.unsupported(adapted.config)
    if reason is None and proving == "auto":
        reason = golden.too_slow(adapted, 3)
        reason = reason and f"{reason} (--proof always)"
    if proving == "never" or reason is not None:
        print(f"note: the merged logits are not compared: {reason or '--proof never'}")
        return None, {"golden": None, "proof": None}
    ids = golden.prompt_ids(partial)
    logits = golden.forward(adapted, ids)
    _check_golden(adapter, ids, logits, trained=adapter.quantized == chosen.quantized)
    found = proof.measure(
        base, adapter, ids, logits, chosen.rounding, base_weight, {"fp32": torch.float32}
    )
    own = golden.forward(golden.Float64Weights(partial), ids)
    name = SHORT_NAMES[dtype]
    found = Rounded({**found.differences, name: proof.largest(own, logits)}, found.rounding)
    return found, {"golden": golden.described(ids, own), "proof": found.facts}


def _check_golden(
    adapter: Adapter, ids: list[list[int]], logits: list[torch.Tensor], *, trained: bool
) -> None:
    """Refuse a base with which the adapter does not compute what it did after its training."""
    kept = (adapter.passport or {}).get("golden")
    if not kept or not trained:
        return
    if lines := golden.differences(kept, golden.described(ids, logits)):
        raise UserError(
            f"{adapter.folder} does not compute on this base what its passport holds:\n    "
            + "\n    ".join(lines),
            "Name the base that it was trained on: --base FOLDER",
        )


def _facts(
    adapter: Adapter, base: Path, hashes: Hashes, dtype: torch.dtype, chosen: Layout
) -> dict[str, Any]:
    """What the passport records of where the folder is from."""
    recorded = adapter.passport or {}
    carried = {key: recorded[key] for key in CARRIED if key in recorded}
    if "result" in carried:  # measured on other numbers
        carried["result"] = {**carried["result"], "eval_loss_exported": None}
    exact = dtype == torch.float32
    settings = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
    return {
        **carried,
        "base": {"folder": base.resolve().name, "files": dict(hashes.base)},
        "adapter": {
            "folder": adapter.folder.resolve().name,
            "files": dict(hashes.adapter),
            "settings": {key: adapter.config[key] for key in settings if adapter.config.get(key)},
        },
        **({"base_quantized": chosen.quantized} if chosen.quantized else {}),
        "export": {
            "dtype": SHORT_NAMES[dtype],
            "rounding": "none" if exact else chosen.rounding,
        },
    }


def summary(adapter: Adapter, base: Path, output: Path, found: Rounded | None) -> str:
    """What was done, for people."""
    lines = [
        f"{output}: {base} with the changes of {adapter.folder} to {len(adapter.modules)} layers"
    ]
    lines += [f"  {line}" for line in found.lines()] if found is not None else []
    return "\n".join([*lines, f"  python -m alpaca verify {output}"])

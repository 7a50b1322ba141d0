"""A model folder as one GGUF file, for llama.cpp, Ollama and what builds on them.

The `gguf` package writes the metadata and quantizes; tensors are read, converted and written a few
rows at a time, so memory does not grow with the model. GGUF keeps Meta's rotary channel order for
`llama`, so q and k are reordered as the converter reorders them back.
Format: the GGUF specification, version 3.
"""

import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tqdm import tqdm

from alpaca import atomic, golden, passport, rounding, shards, stored
from alpaca.convert.ggufmeta import ROPE_FACTORS, llama3_factors
from alpaca.convert.source import permute
from alpaca.errors import UserError
from alpaca.release import ggufvocab
from alpaca.release.ggufvocab import ELSEWHERE
from alpaca.release.streams import Digest, Later, ahead
from alpaca.stored import Entry

# model_type: the architecture's name in GGUF
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
Type = gguf.GGMLQuantizationType
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
K_QUANT = re.compile(r"Q[2-6]_K(_[SML])?")
NEEDED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "rms_norm_eps",
)  # fmt: skip


@dataclass(frozen=True)
class Written:
    """A finished file: its size, its SHA-256, and how far its numbers are from the folder's."""

    path: Path
    size: int
    sha256: str
    rounding: float


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file: `shape` and `kind` (of `Type`) there; `rows` yields the values."""

    name: str
    shape: tuple[int, ...]
    kind: Any
    rows: Callable[[], Iterator[torch.Tensor]]

    @property
    def size(self) -> int:
        """Bytes in the file."""
        block, block_bytes = gguf.GGML_QUANT_SIZES[self.kind]
        return int(math.prod(self.shape) // block * block_bytes)


def write(folder: Path, path: Path, kind: str) -> Written:
    """Write a model folder as a GGUF file of type `kind`, one of TYPES or a K-quant's name.

    The file is complete or absent. A K-quant is made by llama.cpp's `llama-quantize`, from a bf16
    file beside it.

    Raises:
        UserError: llama.cpp would compute another model, or tokenize texts in another way;
            `llama-quantize` is not on PATH, or fails; the file reads back differently.
    """
    if not K_QUANT.fullmatch(kind):
        return _write(folder, path, kind)
    program = shutil.which("llama-quantize")
    if program is None:
        raise UserError(
            f"{kind} is made by llama.cpp's llama-quantize, which is not on PATH.",
            f"Install llama.cpp, or choose one of {', '.join(TYPES)}.",
        )
    whole = path.with_name(f".{path.name}.bf16")
    partial = atomic.partial_path(path)
    try:
        _write(folder, whole, "BF16")
        done = subprocess.run([program, whole, partial, kind], capture_output=True, text=True)
        if done.returncode or not partial.is_file():
            raise UserError(f"llama-quantize failed: {(done.stderr or done.stdout)[-500:].strip()}")
        atomic.sync(partial)
        os.replace(partial, path)
    finally:
        whole.unlink(missing_ok=True)
        partial.unlink(missing_ok=True)
    return Written(path, path.stat().st_size, passport.sha256(path), math.nan)


def _write(folder: Path, path: Path, kind: str) -> Written:
    config = _config(folder)
    tensors = _tensors(folder, config, kind)
    partial = atomic.partial_path(path)
    partial.parent.mkdir(parents=True, exist_ok=True)
    error = rounding.Error()
    try:
        _write_header(partial, folder, config, kind, tensors)
        written = _append(partial, tensors, error)
        if passport.sha256(partial) != written:
            raise UserError(
                f"{partial} reads back differently from what was written.",
                "The disk is failing; write to another one.",
            )
        os.replace(partial, path)
        atomic.sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)
    return Written(path, path.stat().st_size, written, error.relative)


def _config(folder: Path) -> dict[str, Any]:
    """config.json; raises UserError where it lacks a number that GGUF states."""
    config = stored.read_json(folder / "config.json")
    if missing := [key for key in NEEDED if not isinstance(config.get(key), int | float)]:
        raise UserError(
            f"{folder / 'config.json'} does not say {missing[0]}.", "Convert the folder again."
        )
    return config


def _tensors(folder: Path, config: dict[str, Any], kind: str) -> list[Tensor]:
    """The tensors of the file, in the folder's order.

    Raises:
        UserError: llama.cpp has no such architecture, or computes it in another way.
    """
    name = config.get("model_type")
    reason = golden.unsupported(config)
    if name not in ARCHITECTURES or reason is not None:
        raise UserError(f"{folder}: {reason or f'models of type {name} are not known'}.", ELSEWHERE)
    architecture = gguf.MODEL_ARCH[ARCHITECTURES[str(name)].upper()]
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    found = []
    for hf_name, entry in stored.tensors(folder).items():
        if hf_name.endswith(stored.BUFFERS):
            continue
        if hf_name == "lm_head.weight" and stored.is_tied(config):
            continue
        name = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UserError(f"{folder}: {hf_name} has no name in GGUF.", ELSEWHERE)
        heads = _rotary_heads(architecture, hf_name, config)
        found.append(_tensor(name, entry, _kind(name, entry, kind), heads))
    scaled = golden.rope(config)
    if golden.rope_kind(scaled) == "llama3":
        head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        factors = torch.from_numpy(llama3_factors(scaled, scaled["rope_theta"], head)).float()
        found.append(Tensor(ROPE_FACTORS, (head // 2,), Type.F32, lambda: iter([factors])))
    return found


def _rotary_heads(architecture: Any, name: str, config: dict[str, Any]) -> int | None:
    """Heads of a tensor whose channels GGUF keeps in Meta's order; None for all others."""
    if architecture != gguf.MODEL_ARCH.LLAMA:
        return None
    if ".q_proj." in name:
        return int(config["num_attention_heads"])
    if ".k_proj." in name:
        return int(config.get("num_key_value_heads") or config["num_attention_heads"])
    return None


def _kind(name: str, entry: Entry, kind: str) -> Any:
    """The `Type` of a tensor: norms and biases stay fp32, as in llama.cpp's own files.

    The embedding and the output matrix get 8 bits where the others get fewer, and rows that do not
    divide into blocks stay fp16.
    """
    if len(entry.shape) < 2:
        return Type.F32
    wanted = Type[kind]
    if kind.startswith(("Q4", "Q5")) and name.startswith(("token_embd", "output")):
        wanted = Type.Q8_0
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    return wanted if entry.shape[-1] % block == 0 else Type.F16


def _tensor(name: str, entry: Entry, kind: Any, heads: int | None) -> Tensor:
    def rows() -> Iterator[torch.Tensor]:
        whole = entry.elements if heads is not None else shards.ROW_ELEMENTS
        for part in shards.read(entry, whole):
            yield part if heads is None else permute(part, heads).reshape(part.shape)

    return Tensor(name, entry.shape, kind, rows)


def _write_header(
    path: Path, folder: Path, config: dict[str, Any], kind: str, tensors: list[Tensor]
) -> None:
    with closing(gguf.GGUFWriter(path, ARCHITECTURES[config["model_type"]])) as writer:
        _add_model(writer, folder, config, kind)
        ggufvocab.read(folder, config["vocab_size"]).add_to(writer)
        for tensor in tensors:
            writer.add_tensor_info(
                tensor.name, tensor.shape, np.dtype(np.float32), tensor.size, tensor.kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()


def _add_model(writer: gguf.GGUFWriter, folder: Path, config: dict[str, Any], kind: str) -> None:
    """The keys that describe the model, and where it is from."""
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or config["hidden_size"] // heads
    scaled = golden.rope(config)
    writer.add_type("model")
    writer.add_name(folder.resolve().name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(scaled["rope_theta"])
    if golden.rope_kind(scaled) == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaled["factor"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    names = {"F32": "ALL_F32"}
    writer.add_file_type(gguf.LlamaFileType[names.get(kind, f"MOSTLY_{kind}")])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    recorded = passport.read(folder)
    if recorded is None:
        return
    writer.add_string("alpaca.made_by", recorded["made_by"])
    writer.add_string("alpaca.passport", recorded[passport.SEAL])
    writer.add_string("alpaca.template", recorded["template_sha256"])
    base = recorded.get("base", {}).get("folder")
    if base:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base)


def _append(path: Path, tensors: list[Tensor], error: rounding.Error) -> str:
    """Write the tensors behind the header; returns the SHA-256 of the whole file."""
    digest = Digest()
    total = sum(tensor.size for tensor in tensors)
    with (
        open(path, "r+b") as file,
        Later(file.write) as write,
        tqdm(total=total, unit="B", unit_scale=True, desc="gguf", disable=None) as bar,
    ):
        digest.update(file.read())

        def put(content: bytes | memoryview) -> None:
            digest.update(content)
            write(content)

        put(bytes(-file.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))
        for tensor in tensors:
            for part in ahead(tensor.rows()):
                content = _encode(tensor, part, error)
                put(content)
                bar.update(len(content))
            put(bytes(-tensor.size % gguf.GGUF_DEFAULT_ALIGNMENT))
        write.wait()
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return digest.hexdigest()


def _encode(tensor: Tensor, part: torch.Tensor, error: rounding.Error) -> bytes | memoryview:
    """The bytes of some rows in the file's type; `error` adds up what rounding changes."""
    plain = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}
    if tensor.kind in plain:
        value = part.to(plain[tensor.kind])
        if value.dtype not in (part.dtype, torch.float32):
            if not torch.isfinite(value).all():
                raise UserError(
                    f"{tensor.name} holds numbers that are too large for fp16.",
                    "Export with --type BF16.",
                )
            error.add(part.float(), value)
        return value.contiguous().reshape(-1).view(torch.uint8).numpy().data
    exact = part.float()
    quantized = gguf.quantize(exact.numpy(), tensor.kind)
    error.add(exact, torch.from_numpy(gguf.dequantize(quantized, tensor.kind)))
    content: bytes = quantized.tobytes()
    return content


def own_type(folder: Path) -> str:
    """The type that holds most of a folder's numbers exactly."""
    totals: dict[str, int] = {}
    for entry in stored.tensors(folder).values():
        totals[entry.dtype] = totals.get(entry.dtype, 0) + entry.elements
    return max(totals, key=lambda kind: totals[kind])

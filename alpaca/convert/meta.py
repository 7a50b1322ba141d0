"""Read Meta's checkpoints, LLaMA 1 to Llama 3.3: `params.json`, `consolidated.NN.pth`, tokenizer.

Each model-parallel shard holds a slice of each tensor. The slices are joined one tensor at a time,
on the axis that the name table gives. Checked before anything is written: missing or truncated
files; tensors that are missing, unknown or of the wrong shape.
"""

from functools import partial
from pathlib import Path

import torch

from alpaca.convert import names
from alpaca.convert.checksums import check_file, read_checklist
from alpaca.convert.families import size_name
from alpaca.convert.metafiles import check_sizes, open_shards, shard_files
from alpaca.convert.params import Params, config, read_params, recognize
from alpaca.convert.pickles import check_type
from alpaca.convert.source import Source, Tensor, unpermute
from alpaca.convert.vocabularies import read_vocabulary
from alpaca.description import Vocabulary
from alpaca.errors import UserError
from alpaca.shards import SHORT_NAMES

Shards = dict[Path, dict[str, torch.Tensor]]
ROTARY_TABLE = "rope.freqs"  # stored by LLaMA 1 and 2; transformers computes it


def open_meta(folder: Path, tokenizer: Path, name: str, *, instruct: bool | None) -> Source:
    """Describe a Meta checkpoint as a source.

    Args:
        folder: holds `params.json` and the shards.
        tokenizer: its `tokenizer.model`.
        name: of the folder to write.
        instruct: whether it is a chat model; None decides by the folder's name.

    Raises:
        UserError: something is missing or damaged, or contradicts `params.json`.
    """
    sums = read_checklist(folder / "checklist.chk")
    sums |= read_checklist(tokenizer.parent / "tokenizer_checklist.chk")
    small = [folder / "params.json", tokenizer]
    for path in small:
        if path.is_file():
            check_file(path, sums.get(path.name))
    params = read_params(small[0])
    vocabulary, kind = read_vocabulary(tokenizer, folder.resolve().name, instruct)
    family, published = recognize(params, kind, folder.resolve().name)
    vocab = _rows(params, vocabulary, tokenizer)
    files = shard_files(folder, list(sums), params)
    check_sizes(files, params, vocab)
    opened = open_shards(files, params)
    dtype, tied = _main_type(opened), _is_tied(opened)
    tensors = _tensors(opened, params, vocab, tied)
    count = sum(tensor.parameters for tensor in tensors)
    size = published.size if published else size_name(count)
    shards = "1 shard" if len(files) == 1 else f"{len(files)} shards"
    return Source(
        name=name,
        found=f"{family} {size}: {shards}, {count:,} parameters, {SHORT_NAMES[dtype]}, "
        f"tokenizer {vocabulary.pieces:,} pieces",
        files={path: sums.get(path.name) for path in [*files, *small]},
        config=config(params, family, kind, vocab, tied),
        dtype=dtype,
        tensors=tensors,
        vocabulary=vocabulary,
        facts={"family": family, "size": size, "parameters": count},
    )


def _rows(params: Params, vocabulary: Vocabulary, tokenizer: Path) -> int:
    """Rows of the embedding, from `params.json`; -1 there means one for each piece."""
    rows = params.vocab if params.vocab > 0 else vocabulary.pieces
    if vocabulary.pieces != rows:
        raise UserError(
            f"{tokenizer} has {vocabulary.pieces:,} pieces, but the model's vocabulary {rows:,}.",
            "Put this model's own tokenizer.model there.",
        )
    return rows


def _main_type(opened: Shards) -> torch.dtype:
    """The type of most of the numbers."""
    totals: dict[torch.dtype, int] = {}
    for path, tensors in opened.items():
        for name, tensor in tensors.items():
            if name != ROTARY_TABLE:
                check_type(path, name, tensor)
                totals[tensor.dtype] = totals.get(tensor.dtype, 0) + tensor.numel()
    return max(totals, key=lambda dtype: totals[dtype])


def _is_tied(opened: Shards) -> bool:
    """Whether the output projection is the embedding: absent, or a copy of it (Llama 3.2)."""
    first = next(iter(opened.values()))
    output, embedding = first.get("output.weight"), first.get("tok_embeddings.weight")
    if output is None or embedding is None:
        return output is None
    if len(opened) > 1 or output.shape != embedding.shape:
        return False
    # In an untied model the first rows differ already, so the whole is rarely compared.
    return torch.equal(output[:8], embedding[:8]) and torch.equal(output, embedding)


def _tensors(opened: Shards, params: Params, vocab: int, tied: bool) -> tuple[Tensor, ...]:
    rows = names.rows(params.layers, tied)
    wanted = names.to_dialect(params.layers, tied, "meta")
    _check_names(opened, set(wanted.values()), tied)
    tensors = []
    for name, meta_name in wanted.items():
        shape = whole_shape(rows[name], params, vocab)
        parts = [shard[meta_name] for shard in opened.values()]
        axis = _axis(meta_name, rows[name], parts, shape, list(opened))
        heads = None
        if rows[name].rotary:
            heads = params.heads if rows[name].meta == "attention.wq" else params.kv_heads
        join = partial(_join, meta_name, parts, axis, heads, shape)
        tensors.append(Tensor(name, shape, parts[0].dtype, join))
    return tuple(tensors)


def _check_names(opened: Shards, wanted: set[str], tied: bool) -> None:
    ignored = {ROTARY_TABLE} | ({"output.weight"} if tied else set())
    for path, shard in opened.items():
        missing, unknown = sorted(wanted - set(shard)), sorted(set(shard) - wanted - ignored)
        if missing:
            raise UserError(
                f"{path} lacks the tensor {missing[0]}.",
                "Check that params.json belongs to this model.",
            )
        if unknown:
            raise UserError(
                f"{path} holds the unknown tensor {unknown[0]}.",
                "Only text models of the LLaMA family can be converted; "
                "check that params.json belongs to this one.",
            )


def whole_shape(row: names.Row, params: Params, vocab: int) -> tuple[int, ...]:
    """Shape of a whole tensor, rows first."""
    kv_width = params.kv_heads * params.head_dim
    if row in (names.EMBEDDING, names.OUTPUT):
        return (vocab, params.dim)
    if row.axis is None:
        return (params.dim,)
    if row.meta in ("attention.wk", "attention.wv"):
        return (kv_width, params.dim)
    if row.meta in ("feed_forward.w1", "feed_forward.w3"):
        return (params.intermediate, params.dim)
    if row.meta == "feed_forward.w2":
        return (params.dim, params.intermediate)
    return (params.dim, params.dim)


def _axis(
    meta_name: str,
    row: names.Row,
    parts: list[torch.Tensor],
    shape: tuple[int, ...],
    paths: list[Path],
) -> int | None:
    """The axis on which the parts of a tensor are joined; checks each part's shape."""
    axis = row.axis
    if row is names.EMBEDDING:
        axis = 0 if parts[0].shape[-1] == shape[1] else 1
    expected = list(shape)
    if axis is not None:
        expected[axis] = shape[axis] // len(parts)
    for path, part in zip(paths, parts, strict=True):
        if list(part.shape) != expected:
            raise UserError(
                f"{path}: {meta_name} has shape {list(part.shape)}, but params.json and "
                f"{len(parts)} shard(s) imply {expected}.",
                "Check that params.json belongs to this model and that no shard is missing.",
            )
    return axis


def _join(
    meta_name: str,
    parts: list[torch.Tensor],
    axis: int | None,
    heads: int | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Join the parts of a tensor; rotary heads are reordered."""
    if axis is None and not all(torch.equal(parts[0], part) for part in parts[1:]):
        raise UserError(
            f"{meta_name} differs between the shards.",
            "They belong to different models: fetch them again.",
        )
    if heads is None and (axis is None or len(parts) == 1):
        return parts[0].to(dtype).contiguous()
    assert axis is not None
    out = torch.empty(shape, dtype=dtype)
    size = shape[axis] // len(parts)
    for number, part in enumerate(parts):
        target = out.narrow(axis, number * size, size)
        if heads is None:
            target.copy_(part)
        else:
            ordered = unpermute(part.contiguous(), heads // len(parts))
            target.view(ordered.shape).copy_(ordered)
    return out

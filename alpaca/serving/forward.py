"""A transformers model prepared for serving, and its forward pass over cache slots.

The model's own modules run. Three things differ from `generate`: the attention function, the layout
of linear weights on a CPU, and that logits are computed only where a token will be sampled.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PreTrainedModel

from alpaca.errors import UserError
from alpaca.serving import attention, packed
from alpaca.serving.attention import PrefillChunk, Probe, Ragged, Step, flash_works
from alpaca.serving.cache import Capacity, LayerShape, SlotCache
from alpaca.serving.lora import LoadedAdapter, applied
from alpaca.serving.transfer import send
from alpaca.stored import ADVICE, check_rope


@dataclass
class Batch:
    """Input of one pass: tokens by slot, in the order of `Step`, and where logits are needed.

    `wanted` are indices into the pass's tokens: the decoding tokens first, then the chunks.
    `adapted` gives such indices for each adapter that changes tokens, ascending.
    """

    decoding: list[tuple[int, int, int]]  # (slot, position, token), ascending slots
    chunks: Sequence[tuple[PrefillChunk, Sequence[int]]]
    wanted: list[int]
    adapted: Mapping[LoadedAdapter, Sequence[int]] = field(default_factory=dict)


class SlotModel:
    """A model and its key/value cache; `run` computes one forward pass."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> None:
        """Prepare a loaded model to compute in `dtype`; it is changed in place.

        Raises:
            UserError: the model has no output layer.
        """
        self.model = model.eval()
        self.device: torch.device = model.get_input_embeddings().weight.device
        self.vocabulary: int = model.config.get_text_config().vocab_size
        self.context: int = model.config.get_text_config().max_position_embeddings
        model.set_attn_implementation(attention.NAME)
        self.fp16_layers = packed.pack(model, dtype or model.dtype)
        if dtype is not None and dtype != model.dtype:
            cast(model, dtype)  # the layers that are not packed
        self.cache: SlotCache
        self.flash = False  # whether attention is one call of FlashAttention; found by `probe`
        self._wanted: torch.Tensor
        head = model.get_output_embeddings()
        if head is None:
            raise UserError(f"{type(model).__name__} has no output layer, so it cannot be served.")
        # Not `logits_to_keep`: its indices must be on the device of the last layer. In a model that
        # is spread over several devices, only the hook knows which one that is.
        head.register_forward_pre_hook(self._select)
        self._head = head

    @torch.inference_mode()
    def probe(self) -> list[LayerShape]:
        """The shapes of one token's keys in every layer, found by a pass over one token.

        Raises:
            UserError: the model does not use transformers' attention interface, or a token's key
                depends on the lengths of the other sequences.
        """
        check_rope(self.model.config.get_text_config().to_dict())
        trial = Probe()
        zero = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        self._pass(zero, zero, trial, zero[0])
        layers = self.model.config.get_text_config().num_hidden_layers
        if sorted(trial.shapes) != list(range(layers)):
            raise UserError(
                f"{type(self.model).__name__} does not use transformers' attention interface "
                f"in all {layers} layers, so it cannot be served here.",
                ADVICE,
            )
        shapes = [trial.shapes[layer] for layer in range(layers)]
        self.flash = self._has_flash(shapes)
        return shapes

    def allocate(self, shapes: list[LayerShape], capacity: Capacity) -> None:
        """Allocate the key/value cache, in pages where FlashAttention reads it."""
        self.cache = SlotCache(shapes, capacity, paged=self.flash)

    def _has_flash(self, shapes: list[LayerShape]) -> bool:
        heads = self.model.config.get_text_config().num_attention_heads
        kinds = set(shapes) if self.device.type == "cuda" else ()
        return bool(kinds) and all(flash_works(kind, heads // kind.heads) for kind in kinds)

    @torch.inference_mode()
    def run(self, batch: Batch) -> torch.Tensor:
        """One pass; returns float32 logits (wanted, vocabulary)."""
        slots = [slot for slot, _, _ in batch.decoding]
        positions = [position for _, position, _ in batch.decoding]
        tokens = [token for _, _, token in batch.decoding]
        lengths = [position + 1 for position in positions]
        rows = list(slots)
        for chunk, ids in batch.chunks:
            slots += [chunk.slot] * len(ids)
            positions += range(chunk.first, chunk.last)
            tokens += ids
        slot, position, token, where = send(
            self.device, torch.int64, slots, positions, tokens, batch.wanted
        )
        step = Step(
            cache=self.cache,
            slots=slot,
            positions=position,
            rows=rows,
            lengths=lengths,
            chunks=[chunk for chunk, _ in batch.chunks],
            ragged=self._ragged(batch) if self.flash else None,
        )
        if not batch.adapted:
            return self._pass(token[None], position[None], step, where)
        with applied(batch.adapted, self._head, batch.wanted):
            return self._pass(token[None], position[None], step, where)

    def _ragged(self, batch: Batch) -> Ragged:
        spans = [(slot, position, position + 1) for slot, position, _ in batch.decoding]
        spans += [(chunk.slot, chunk.first, chunk.last) for chunk, _ in batch.chunks]
        slots, firsts, lasts = zip(*spans, strict=True)
        counts = [last - first for first, last in zip(firsts, lasts, strict=True)]
        return Ragged.sent(self.device, counts, lasts, slots, self.cache.length)

    def _pass(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        step: Step | Probe,
        where: torch.Tensor,
    ) -> torch.Tensor:
        self._wanted = where
        logits: torch.Tensor = self.model(
            input_ids=tokens,
            position_ids=positions,
            use_cache=False,
            step=step,
        ).logits
        return logits[0].float().to(self.device)  # a model may span devices

    def _select(self, _: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        """Before the output layer: (1, tokens, hidden) -> (1, wanted, hidden)."""
        [hidden] = inputs
        return (hidden[:, self._wanted.to(hidden.device)],)


def cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give a loaded model the parameters and buffers that it would have if loaded in `dtype`.

    `model.to(dtype)` would also round buffers: rotary frequencies, which transformers computes in
    fp32 for every dtype, and Gemma's embedding scale, which it rounds to bf16 only in bf16. So the
    buffers are computed again, by a model without weights.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    with init_empty_weights(include_buffers=False):
        fresh = AutoModelForCausalLM.from_config(deepcopy(model.config), dtype=dtype)
    for name, buffer in fresh.named_buffers():
        owner, _, last = name.rpartition(".")
        old = model.get_buffer(name)
        setattr(model.get_submodule(owner), last, buffer.to(old.device))

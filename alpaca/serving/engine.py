"""Turns prompts into text, one request at a time."""

import asyncio
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from alpaca.tokens import Codec


@dataclass(frozen=True)
class Request:
    """What to answer, and how to sample; `total_tokens` counts prompt and answer."""

    prompt: tuple[int, ...]
    total_tokens: int
    temperature: float
    top_p: float
    repetition_penalty: float


class Engine:
    """Decodes with transformers' own `generate`."""

    def __init__(self, model: PreTrainedModel, codec: Codec) -> None:
        """Take a loaded model and its tokenizer."""
        self.model = model
        self.codec = codec
        self.turn = asyncio.Lock()

    async def complete(self, request: Request) -> str:
        """The whole answer to a request; waits for its turn."""
        async with self.turn:
            return await asyncio.to_thread(self.generate, request)

    def generate(self, request: Request) -> str:
        """Decode until the model ends its answer or the token limit is reached."""
        import torch

        limit = min(request.total_tokens, self.model.config.max_position_embeddings)
        fresh = limit - len(request.prompt)
        if fresh < 1:
            return ""
        ids = torch.tensor([request.prompt])
        warp: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None}
        if request.temperature > 0:
            warp = {"temperature": request.temperature, "top_p": request.top_p}
            warp |= {"do_sample": True, "top_k": 0}
        made = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=fresh,
            repetition_penalty=request.repetition_penalty,
            eos_token_id=self.codec.eos,
            pad_token_id=self.codec.eos,
            **warp,
        )
        return self.codec.decode(made[0, len(request.prompt) :].tolist())

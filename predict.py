"""The Cog runner: validates inputs, calls the engine, yields completions; nothing else."""

import os
from collections.abc import Iterator
from pathlib import Path

import cog
import torch

from alpaca import model, passport
from alpaca.serving import weights as serving_weights
from alpaca.serving.engine import Engine, Request
from alpaca.tokens import Codec

ROOT = Path(__file__).resolve().parent


class Runner(cog.BaseRunner):
    """Answers instructions with a fine-tuned LLaMA-family model."""

    def setup(self, weights: cog.Path | str | None = None) -> None:
        """Load the model that Cog hands over, else ALPACA_WEIGHTS, else alpaca_out/."""
        given = None if weights is None else Path(weights)
        found = serving_weights.locate(given, os.environ, ROOT)
        passport.check_template(found.folder, passport.read(found.folder))
        self.codec = Codec(model.load_tokenizer(found.folder))
        dtype = model.compute_dtype(torch.device("cpu"))
        self.engine = Engine(model.load_model(found.folder, dtype), self.codec)
        print(f"serving {found.folder}, from {found.origin}")

    @cog.streaming
    @cog.concurrent(max=256)
    async def run(
        self,
        prompt: str = cog.Input(description="The instruction to answer."),
        n: int = cog.Input(description="How many answers to make.", default=1, ge=1, le=5),
        total_tokens: int = cog.Input(
            description="Most tokens of prompt and answer together.", default=2000, ge=1
        ),
        temperature: float = cog.Input(
            description="Above 1 is more random, below is less, 0 always takes the likeliest.",
            default=0.75,
            ge=0,
            le=5,
        ),
        top_p: float = cog.Input(
            description="Sample from the likeliest tokens that make up this share of probability.",
            default=1.0,
            ge=0.01,
            le=1.0,
        ),
        repetition_penalty: float = cog.Input(
            description="Above 1 makes repeated words less likely, below 1 more likely.",
            default=1.0,
            ge=0.01,
            le=5,
        ),
    ) -> Iterator[str]:
        """Answer an instruction n times."""
        request = Request(
            prompt=tuple(self.codec.prompt(prompt)),
            total_tokens=total_tokens,
            temperature=temperature,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
        )
        texts = [await self.engine.complete(request) for _ in range(n)]
        # Cog sends what a plain generator yields; an async one it would collect first.
        return (text for text in texts)

"""The Cog runner: validates inputs, calls the engine, yields completions; nothing else."""

import asyncio
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cog
from cog import Input

from alpaca.serving import cancellation, listeners, loading, schema
from alpaca.serving import weights as serving_weights
from alpaca.serving.border import Engine
from alpaca.serving.request import Answer, CanceledError, Job, Request, Sampling
from alpaca.tokens import Codec

ROOT = Path(__file__).resolve().parent
LONG_TEXT = 10_000  # bytes; a shorter text is tokenized within a few milliseconds
LARGEST = 9007199254740991  # 2^53 - 1: JSON parsers may round larger integers

# Descriptions that a web form shows next to each input. Each must be one string literal, because
# `cog build` reads no other expression.
PROMPT = "What to do, in plain words. It is put into the template the model was trained with."
INPUT = "A text for the instruction, such as one to summarize. Empty if there is none."
ANSWERS = "How many answers to make, 1 to 5; each is sampled separately."
TOTAL_TOKENS = "Most tokens in prompt and answer together; a word is one or a few."
MAX_NEW_TOKENS = "Most tokens in an answer. Left out, only total_tokens limits it."
TEMPERATURE = "How freely to choose, 0 to 5: 0 always takes the likeliest token, 5 nearly any."
TOP_P = "Choose among the likeliest tokens that together reach this probability; 1 allows all."
TOP_K = "Choose among this many of the likeliest tokens; 0, the default, allows all."
REPETITION_PENALTY = "Above 1, tokens already in prompt or answer become less likely. 1 is neutral."
STOP = "Up to 16 texts that end an answer, of up to 1,000 characters each; not part of it."
SEED = "Repeats an answer: the same seed and inputs give the same text. Random if left out."
ADAPTER = "Which adapter answers, by its name; the base's name asks the base. Empty: the default."
STREAM = "Send pieces of text as they are generated, instead of whole answers. Needs n to be 1."


class Runner(cog.BaseRunner):
    """Answers instructions with a fine-tuned LLaMA-family model."""

    def setup(self, weights: cog.Path | str | None = None) -> None:
        """Load the model: the weights that Cog passes, else ALPACA_WEIGHTS, else alpaca_out/."""
        cancellation.install()
        self.web = started_web()
        try:
            with fetched(weights) as given:
                found = serving_weights.locate(given, os.environ, ROOT)
            self.engine, self.codec = loading.load(found)
        except BaseException:
            if self.web is not None:
                self.web.stop()  # it would say for ever that the model is loading
            raise
        if self.web is not None:
            self.web.serve(found.folder.name, self.engine, self.codec)
            if other := os.environ.get("ALPACA_COMPARE"):
                self.web.compare(other, os.environ)

    def healthcheck(self) -> bool:
        """Whether the engine is healthy."""
        return self.engine.healthy

    @cog.streaming
    @cog.concurrent(max=256)
    async def run(
        self,
        prompt: str = Input(description=PROMPT),
        input: str = Input(default="", description=INPUT),  # noqa: A002
        n: int = Input(default=1, ge=1, le=5, description=ANSWERS),
        total_tokens: int = Input(default=2000, ge=1, description=TOTAL_TOKENS),
        max_new_tokens: int | None = Input(default=None, ge=1, description=MAX_NEW_TOKENS),
        temperature: float = Input(default=0.75, ge=0, le=5, description=TEMPERATURE),
        top_p: float = Input(default=1.0, ge=0.01, le=1, description=TOP_P),
        top_k: int = Input(default=0, ge=0, description=TOP_K),
        repetition_penalty: float = Input(
            default=1.0, ge=0.01, le=5, description=REPETITION_PENALTY
        ),
        stop: list[str] = Input(default=[], description=STOP),
        seed: int | None = Input(default=None, ge=0, le=LARGEST, description=SEED),
        stream: bool = Input(default=False, description=STREAM),
        adapter: str = Input(default="", description=ADAPTER),
    ) -> Iterator[str]:
        """Answer an instruction n times."""
        sampling = Sampling(
            temperature=temperature,
            top_p=top_p,
            top_k=int(top_k),
            repetition_penalty=repetition_penalty,
            seed=secrets.randbits(32) if seed is None else int(seed),
        )
        request = Request(
            prompt=await tokens_of(self.engine, self.codec, prompt, input),
            n=int(n),  # Cog accepts JSON's 2.0 as an integer; Python parses it as a float
            total_tokens=int(total_tokens),
            max_new_tokens=None if max_new_tokens is None else int(max_new_tokens),
            stop=tuple(stop),
            sampling=sampling,
            adapter=adapter,
        )
        job = self.engine.submit(request)
        cancellation.on_cancel(job.cancel)
        # A plain generator, because Cog sends each piece it yields at once. The output of an async
        # generator is sent only after the generator has ended.
        if stream and n == 1:
            return pieces(job, self.scope, listeners.prediction_id())
        answers = await job.answers()
        record(self.scope, job, answers)
        return (answer.text for answer in answers)


def started_web() -> Any:
    """The server of /v1 and the page, if ALPACA_WEB_PORT asks for one; it answers 503 until then.

    Imported here, because a start without it should not take longer.
    """
    if not os.environ.get("ALPACA_WEB_PORT"):
        return None
    try:
        from alpaca.web import server as web

        inputs = schema.find(ROOT, "predict.py:Runner", "run").input_schema()["properties"]
        return web.start(os.environ, inputs, ROOT)
    except Exception as error:  # whatever it is, Cog's server goes on
        print(f"web: not started: {error!r}", flush=True)
        return None


async def tokens_of(engine: Engine, codec: Codec, prompt: str, given: str) -> tuple[int, ...]:
    """Tokenize a prompt; a long text in a thread, so that Cog's event loop is not blocked.

    Raises:
        UserError: the text is too long to fit into a slot; it is refused before it is tokenized.
    """
    size = len(prompt.encode()) + len(given.encode())
    engine.check_text(size)
    if size <= LONG_TEXT:
        return tuple(codec.prompt(prompt, given))
    return tuple(await asyncio.to_thread(codec.prompt, prompt, given))


def pieces(job: Job, scope: Any, prediction: str | None) -> Iterator[str]:
    """Yield the text of a job's only completion in pieces; runs on one of Cog's threads."""
    [completion] = job.completions
    try:
        listeners.check(prediction)
        yield from completion
        record(scope, job, [completion.result.result()])
    except CanceledError:
        raise asyncio.CancelledError from None
    finally:
        job.cancel()  # frees the slot if Cog stopped reading; no effect on a finished job


def record(scope: Any, job: Job, answers: list[Answer]) -> None:
    """Record the prediction's metrics with Cog. Times are in seconds from its submission."""
    now = time.monotonic()
    tokens = sum(answer.tokens for answer in answers)
    first = min((c.first_token for c in job.completions if c.first_token), default=now)
    metrics: dict[str, str | int | float] = {
        "prompt_tokens": len(job.request.prompt),
        "completion_tokens": tokens,
        "time_to_first_token": first - job.submitted,
        "tokens_per_second": tokens / (now - job.submitted),
        "finish_reason": ",".join(answer.reason for answer in answers),
        "seed": job.request.sampling.seed,
    }
    for name, value in metrics.items():
        scope.record_metric(name, value)


@contextmanager
def fetched(weights: cog.Path | str | None) -> Iterator[Path | None]:
    """Give a local path to the weights that Cog passes.

    If they are a URL, the download is deleted on leaving the context.
    """
    path: Any = None if weights is None else cog.Path.validate(weights)
    if not hasattr(path, "convert"):  # only a URL has this method; any other path is the user's own
        yield path
        return
    try:
        yield Path(path.convert())
    finally:
        path.unlink(missing_ok=True)  # the download

"""A model behind an OpenAI-compatible endpoint answers a suite.

A server of this project is sent the Alpaca prompt itself, as training and `/predictions` have it;
any other one the instruction and its input as a user's message, under its own chat template.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import openai

from alpaca.address import base_url
from alpaca.dataset.asking import Asker, Question
from alpaca.dataset.bootstrap import Limits
from alpaca.dataset.teacher import NO_KEY, RefusedError, Teacher
from alpaca.errors import UserError
from alpaca.evaluation.suites import Task
from alpaca.prompt import render


class Endpoint:
    """Answers of a model at a URL; the journal's settings name both."""

    def __init__(self, url: str, model: str | None, concurrency: int) -> None:
        """Ask the endpoint for its models.

        Raises:
            UserError: it cannot be reached, refuses, or does not have the model.
        """
        self.url = base_url(url, "--model")
        self._key = os.environ.get("OPENAI_API_KEY", "").strip() or NO_KEY
        self._concurrency = concurrency
        owners = self._models()
        self.name = model or next(iter(owners), "")
        if self.name not in owners and owners:
            raise UserError(
                f"{self.url} does not have {self.name}.",
                f"Set --model_id to one of: {', '.join(owners)}.",
            )
        self.own = owners.get(self.name) == "alpaca-cog"
        self.identity = f"{self.url} {self.name}"

    def _models(self) -> dict[str, str]:
        with openai.OpenAI(base_url=self.url, api_key=self._key, timeout=30) as client:
            try:
                return {one.id: one.owned_by for one in client.models.list()}
            except openai.APIConnectionError as error:
                why = f"cannot be reached ({error.__cause__ or error})"
            except openai.APIStatusError as error:
                why = f"answered with HTTP status {error.status_code}"
        raise UserError(
            f"{self.url} {why}.", "Check --model, which usually ends in /v1, and OPENAI_API_KEY."
        )

    def answer(self, tasks: Sequence[Task], settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the journal's entry of each task as its answer comes."""
        most = settings["max_new_tokens"]
        body = {"max_tokens": most, "temperature": settings["temperature"]}
        teacher = Teacher(
            url=self.url,
            model=self.name,
            key=self._key,
            endpoint="completion" if self.own else "chat",
            body={**body, "top_p": settings["top_p"], "seed": settings["seed"]},
            role="model",
            flag="--model",
            empty=True,
        )
        limits = Limits(wanted=len(tasks), concurrency=self._concurrency)
        questions = [Question(task.key, self._prompt(task), most) for task in tasks]
        for key, outcome in Asker(teacher, limits).ask(questions):
            entry = {"entry": "answer", "key": key}
            if isinstance(outcome, RefusedError):  # an answer, and none
                yield entry | {"output": "", "finish_reason": f"refused: {outcome}"}
                continue
            reason = "length" if outcome.cut else "stop"
            told = {} if outcome.usage.estimated else {"tokens": outcome.usage.tokens_out}
            yield entry | told | {"output": outcome.text, "finish_reason": reason}

    def _prompt(self, task: Task) -> str:
        if self.own:
            return render(task.instruction, task.input)
        return f"{task.instruction}\n\n{task.input}" if task.input else task.instruction

"""A model behind an OpenAI-compatible endpoint answers a suite.

A server of this project is sent the Alpaca prompt itself, as training and `/predictions` have it;
any other one the instruction and its input as a user's message, under its own chat template.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import openai

from alpaca.address import base_url
from alpaca.dataset.asking import Asker, Outcome, Question
from alpaca.dataset.limits import Limits
from alpaca.dataset.teacher import RefusedError, Teacher, api_key
from alpaca.errors import UserError
from alpaca.evaluation.suites import LONE, Task, seed_of
from alpaca.prompt import plain, render


class Endpoint:
    """Answers of a model at a URL; the journal's settings name both."""

    def __init__(
        self, url: str, tasks: Sequence[Task], model: str | None, concurrency: int
    ) -> None:
        """Ask the endpoint for its models; `tasks` is the whole suite, which sets the seeds.

        Raises:
            UserError: it cannot be reached, refuses, or does not have the model.
        """
        self.url = base_url(url, "--model")
        self._key = api_key()
        self._concurrency = concurrency
        self._places = {task.key: place for place, task in enumerate(tasks)}
        owners = self._models()
        self.name = model or next(iter(owners), "")
        if self.name not in owners and (owners or not model):
            raise UserError(
                f"{self.url} does not have {self.name or 'any model'}.",
                f"Set --model_id to one of: {', '.join(owners)}." if owners else "Set --model_id.",
            )
        self.own = owners.get(self.name) == "alpaca-cog"
        self.identity = f"{self.url} {self.name}"

    def _models(self) -> dict[str, str]:
        """The models that the endpoint lists, with their owners."""
        with openai.OpenAI(base_url=self.url, api_key=self._key, timeout=30) as client:
            try:
                listed = client.models.list()
                found = {one.id: getattr(one, "owned_by", "") for one in listed.data or []}
                if all(isinstance(name, str) for name in found):
                    return found
                why = "lists no models"
            except openai.APIConnectionError as error:
                why = f"cannot be reached ({error.__cause__ or error})"
            except openai.APIStatusError as error:
                why = f"answered with HTTP status {error.status_code}"
            except (
                openai.APIError,
                ValueError,
                AttributeError,
                TypeError,
            ):  # a page, or other JSON
                why = "lists no models"
        raise UserError(
            f"{self.url} {why}.", "Check --model, which usually ends in /v1, and OPENAI_API_KEY."
        )

    def answer(
        self, tasks: Sequence[Task], settings: dict[str, Any], *, answered: bool = False
    ) -> Iterator[dict[str, Any]]:
        """Yield the journal's entry of each task as its answer comes.

        `answered`: whether an earlier run had answers, so that refusals are about single tasks.
        """
        limits = Limits(wanted=len(tasks), concurrency=self._concurrency)
        asker = Asker(
            self._teacher(settings),
            limits,
            answered=answered,
            remedy="Check --model_id, --max_new_tokens and --temperature.",
        )
        most, seed = settings["max_new_tokens"], settings["seed"]
        questions = [
            Question(
                task.key,
                self._prompt(task),
                most,
                {"seed": seed_of(seed, self._places[task.key])},
            )
            for task in tasks
        ]
        for key, outcome in asker.ask(questions):
            yield {"entry": "answer", "key": key, **_told(outcome)}

    def _teacher(self, settings: dict[str, Any]) -> Teacher:
        body = {"max_tokens": settings["max_new_tokens"]}
        return Teacher(
            url=self.url,
            model=self.name,
            key=self._key,
            endpoint="completion" if self.own else "chat",
            body=body | {name: settings[name] for name in ("temperature", "top_p")},
            role="model",
            flag="--model",
            empty=True,
        )

    def _prompt(self, task: Task) -> str:
        if self.own:
            return render(task.instruction, task.input)
        return plain(task.instruction, task.input)


def _told(outcome: Outcome) -> dict[str, Any]:
    """What the journal has of a reply; a refusal is an answer without text."""
    if isinstance(outcome, RefusedError):
        return {"output": "", "finish_reason": f"refused: {outcome}"}
    counted = {} if outcome.usage.estimated else {"tokens": outcome.usage.tokens_out}
    text = LONE.sub("\ufffd", outcome.text)
    return {**counted, "output": text, "finish_reason": "length" if outcome.cut else "stop"}

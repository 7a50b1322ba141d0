"""Signals leave a mark that no save wipes out."""

import os
import signal
from collections.abc import Iterator

import pytest

from alpaca.training.signals import SAVE, STOP, Requests


@pytest.fixture
def requests() -> Iterator[Requests]:
    numbers = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield Requests()
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def test_a_save_answers_a_wish_to_save_and_not_one_to_stop(requests: Requests) -> None:
    assert requests.wanted == 0
    os.kill(os.getpid(), signal.SIGUSR1)
    assert requests.wanted == SAVE
    requests.saving()
    assert requests.wanted == 0
    os.kill(os.getpid(), signal.SIGTERM)
    assert requests.wanted == STOP
    requests.saving()
    assert requests.wanted == STOP
    assert requests.number == signal.SIGTERM


def test_a_wish_to_save_does_not_replace_one_to_stop(requests: Requests) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert requests.wanted == STOP
    assert requests.number == signal.SIGINT

"""Lets a run hear that Cog cancelled it, whenever that happens.

Cog 0.23 sends what an async generator yields only after it has ended, so a run that streams is a
coroutine that returns a plain generator. By then the future on which Cog calls `cancel()` is done,
and the call would go unheard; and in a run's first moments Cog raises in the submitting thread and
leaves the coroutine running. Runs reach Cog's event loop through
`asyncio.run_coroutine_threadsafe`, so its future is made to tell of both.
"""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from contextvars import ContextVar
from typing import Any


class _CancelSignal:
    """Who wants to hear of one run's cancellation; also those who ask after it."""

    def __init__(self) -> None:
        self._told = False
        self._hearers: list[Callable[[], None]] = []

    def add(self, hearer: Callable[[], None]) -> None:
        self._hearers.append(hearer)
        if self._told:
            hearer()

    def tell(self) -> None:
        self._told = True
        for hearer in self._hearers:
            hearer()


_CURRENT: ContextVar[_CancelSignal] = ContextVar("signal")
_submit = asyncio.run_coroutine_threadsafe


def on_cancel(hearer: Callable[[], None]) -> None:
    """Call `hearer` when the run that this is called in is cancelled, even after it returned.

    It may be called more than once.
    """
    if (signal := _CURRENT.get(None)) is not None:
        signal.add(hearer)


class _ToldFuture(Future[Any]):
    """Stands before the future of a submitted coroutine; tells when it is given up."""

    def __init__(self, inner: Future[Any], signal: _CancelSignal) -> None:
        super().__init__()
        self.inner = inner
        self.signal = signal

    def cancel(self) -> bool:
        self.signal.tell()
        return self.inner.cancel()

    def result(self, timeout: float | None = None) -> Any:
        try:
            return self.inner.result(timeout)
        except Exception:
            raise
        except BaseException:  # Cog's CancelationException, raised in the thread that waits
            self.cancel()
            raise CancelledError from None


def submit(coroutine: Coroutine[Any, Any, Any], loop: asyncio.AbstractEventLoop) -> Future[Any]:
    """`asyncio.run_coroutine_threadsafe`, with a future that tells `on_cancel`."""
    signal = _CancelSignal()
    token = _CURRENT.set(signal)  # the coroutine runs in a copy of this context
    inner: Future[Any] = Future()
    try:
        inner = _submit(coroutine, loop)
        return _ToldFuture(inner, signal)
    except Exception:
        raise
    except BaseException:  # the same, raised here
        told = _ToldFuture(inner, signal)
        told.cancel()
        return told
    finally:
        _CURRENT.reset(token)


def install() -> None:
    """From now on, runs that are submitted to an event loop of this process can be heard."""
    asyncio.run_coroutine_threadsafe = submit  # type: ignore[assignment]

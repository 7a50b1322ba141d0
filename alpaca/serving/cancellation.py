"""Notifies a run that Cog cancelled it, at any time in its life.

Cog 0.23 sends what an async generator yields only after it has ended, so a streaming run is a
coroutine that returns a plain generator. By then the future on which Cog calls `cancel()` is done,
and the call would have no effect. During a run's first moments Cog instead raises in the submitting
thread and leaves the coroutine running. Cog submits runs with `asyncio.run_coroutine_threadsafe`,
so this module replaces it, to return a future that reports both kinds of cancellation.
"""

import asyncio
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from contextvars import ContextVar
from typing import Any


class _CancelSignal:
    """Callbacks for one run's cancellation; one that is added after it is called at once."""

    def __init__(self) -> None:
        self._fired = False
        self._callbacks: list[Callable[[], None]] = []

    def add(self, callback: Callable[[], None]) -> None:
        self._callbacks.append(callback)
        if self._fired:
            callback()

    def fire(self) -> None:
        self._fired = True
        for callback in self._callbacks:
            callback()


_CURRENT: ContextVar[_CancelSignal] = ContextVar("signal")
_submit = asyncio.run_coroutine_threadsafe


def on_cancel(callback: Callable[[], None]) -> None:
    """Call `callback` when the current run is cancelled, even if its coroutine has returned.

    `callback` may be called more than once.
    """
    if (signal := _CURRENT.get(None)) is not None:
        signal.add(callback)


class _NotifyingFuture(Future[Any]):
    """Wraps the future of a submitted coroutine; fires `signal` when it is cancelled.

    It also fires when the future is deleted, which is when Cog drops it: at the end of the
    prediction. Cog's exception can be raised before the first line of `result`, so that Cog gives
    the prediction up while the coroutine goes on.
    """

    def __init__(self, inner: Future[Any], signal: _CancelSignal) -> None:
        super().__init__()
        self.inner = inner
        self.signal = signal
        weakref.finalize(self, signal.fire)

    def cancel(self) -> bool:
        self.signal.fire()
        return self.inner.cancel()

    def result(self, timeout: float | None = None) -> Any:
        try:
            return self.inner.result(timeout)
        except Exception:
            raise
        except BaseException:  # Cog's CancelationException, raised in the waiting thread
            self.cancel()
            raise CancelledError from None


def submit(coroutine: Coroutine[Any, Any, Any], loop: asyncio.AbstractEventLoop) -> Future[Any]:
    """`asyncio.run_coroutine_threadsafe`, with a future that triggers `on_cancel` callbacks."""
    signal = _CancelSignal()
    token = _CURRENT.set(signal)  # the coroutine runs in a copy of this context
    inner: Future[Any] = Future()
    try:
        inner = _submit(coroutine, loop)
        return _NotifyingFuture(inner, signal)
    except Exception:
        raise
    except BaseException:  # the same exception, raised while submitting
        future = _NotifyingFuture(inner, signal)
        future.cancel()
        return future
    finally:
        _CURRENT.reset(token)


def install() -> None:
    """Enable `on_cancel` for all runs that are submitted in this process from now on."""
    asyncio.run_coroutine_threadsafe = submit  # type: ignore[assignment]

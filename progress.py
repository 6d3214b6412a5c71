"""What long work tells of itself while it runs, to whoever listens: so many of so many are done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeAlias

Listener: TypeAlias = Callable[[str, int, int], None]
"""Called with what is counted ("kernels"), how many are done, and of how many."""
_LISTENER: ContextVar[Listener | None] = ContextVar("convloom_progress", default=None)


@contextmanager
def heard_by(listener: Listener) -> Iterator[None]:
    """Inside the block this thread's work is told to the listener."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def tell(what: str, done: int, total: int) -> None:
    """Says how far the work is."""
    if (listener := _LISTENER.get()) is not None:
        listener(what, done, total)

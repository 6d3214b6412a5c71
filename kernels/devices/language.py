"""The lock around Triton, whose language one thread at a time may change; and locks that a process
which was made by fork() finds open, whatever other threads were doing then: they are not there."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any

_LOCKS: weakref.WeakSet[Any] = weakref.WeakSet()


def forkable_lock() -> threading.Lock:
    """A lock that is open in a child, though another thread held it in the parent."""
    lock = threading.Lock()
    _LOCKS.add(lock)
    return lock


LANGUAGE = threading.RLock()
"""Held where Triton's language or settings are used or patched: they are global to the process, and
what one thread interprets must not be what another one is compiling."""


def _open_in_child() -> None:
    language: Any = LANGUAGE
    for lock in (*_LOCKS, *(() if language._is_owned() else (language,))):
        lock._at_fork_reinit()


os.register_at_fork(after_in_child=_open_in_child)

"""The lock around Triton, whose language one thread at a time may change."""

from __future__ import annotations

import threading

LANGUAGE = threading.RLock()
"""Held where Triton's language or settings are used or patched: they are global to the process, and
what one thread interprets must not be what another one is compiling."""

"""Ctrl-C ends a command within a second, whatever it is at.

`KeyboardInterrupt` alone does not: it waits for the end of a call into torch or Triton, of an
export, and of kernels that other processes compile. A thread hears of the signal when it comes,
gives the command a moment to end by itself, and then ends the process and all that it started.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from ..atomic import remove_unfinished

EXIT_STATUS = 130
PATIENCE_S = 0.3
"""What a command has to end by itself."""
SHOW_CURSOR = "\x1b[?25h"
_ENDING = threading.Lock()


def end_in_time() -> None:
    """From now on an interruption ends this process; called by its main thread."""
    heard, told = socket.socketpair()
    told.setblocking(False)
    signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(heard, told), daemon=True).start()


def _listen(heard: socket.socket, told: socket.socket) -> None:
    """Reads the numbers of signals; `told` is kept open for them."""
    while signal.SIGINT not in heard.recv(64):
        pass
    time.sleep(PATIENCE_S)
    end()


def end() -> NoReturn:
    """Ends the process and all that it started; nothing half written is left. What Python does at
    its end would take another second."""
    if _ENDING.acquire(blocking=False):
        for process in _below(os.getpid()):
            with suppress(OSError):
                os.kill(process, signal.SIGKILL)
        remove_unfinished()
        sockets = getattr(multiprocessing.current_process(), "_config", {}).get("tempdir")
        if sockets:  # Of the processes that compile.
            shutil.rmtree(sockets, ignore_errors=True)
        tell()
        os._exit(EXIT_STATUS)
    while True:  # The other thread is at it.
        time.sleep(1)


def tell() -> None:
    """Says on stderr that the command was interrupted."""
    cursor = SHOW_CURSOR if os.isatty(2) else ""
    with suppress(OSError):  # Not through sys.stderr, whose lock may be held for ever.
        os.write(2, f"{cursor}convloom: interrupted\n".encode())


def _below(parent: int) -> list[int]:
    """The processes that a process has started, and those that they have; as Linux tells them."""
    found: list[int] = []
    for children in Path(f"/proc/{parent}/task").glob("*/children"):
        with suppress(OSError):
            for child in map(int, children.read_text().split()):
                found += [child, *_below(child)]
    return found

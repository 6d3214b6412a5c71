"""Work in processes of its own: what crashes, hangs or poisons a CUDA context there harms nobody.

A `WorkerProcess` answers requests one at a time. It is started by a plain command line and not by
`multiprocessing`, whose processes first run the caller's main module again.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection, Pipe
from typing import IO, Any

from ...errors import ConvloomError
from ...extensions import register, registered_places

START_TIMEOUT_S = 300.0
"""Importing torch takes seconds, and much longer on a crowded machine."""
TAIL = 500
"""Bytes of a dead child's last words that are passed on."""

Handler = Callable[[Any], Any]


class WorkerError(ConvloomError):
    """A request that failed. kind: "error" (the child lives on), "died" or "timeout"."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class PoisonedError(Exception):
    """Raised by a handler whose process cannot be trusted any more: it ends after the answer."""


class WorkerProcess:
    """A process that makes a handler with `factory()` and answers `ask(x)` with `handler(x)`.

    factory: picklable, as are requests and answers. The process starts at the first request, and
    again at the first one after it died.
    """

    def __init__(self, factory: Callable[[], Handler]) -> None:
        self._factory = factory
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection[Any, Any] | None = None
        self._words: IO[bytes] | None = None

    def ask(self, request: Any, timeout_s: float) -> Any:
        """The handler's answer.

        Raises: WorkerError where the handler raised, the process died, or no answer came in time
        (it is then ended).
        """
        if self._process is None:
            self._start()
        return self._exchange(request, timeout_s)

    def _start(self) -> None:
        here, there = Pipe()
        # A package's own name: whoever imported it may have found it under another one.
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; "
            f"from {__name__} import serve; serve({there.fileno()}, {registered_places()!r})"
        )
        self._words = tempfile.TemporaryFile()  # noqa: SIM115  closed with the child
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=self._words,
            stderr=self._words,
            pass_fds=(there.fileno(),),
        )
        there.close()
        self._pipe = here
        try:
            self._exchange(self._factory, START_TIMEOUT_S)
        except WorkerError:
            self.close()
            raise

    def _exchange(self, message: Any, timeout_s: float) -> Any:
        assert self._pipe is not None
        try:
            self._pipe.send_bytes(pickle.dumps(message))
            if not self._pipe.poll(timeout_s):
                self.close()
                raise WorkerError("timeout", f"no answer after {timeout_s:.0f} s")
            kind, answer = pickle.loads(self._pipe.recv_bytes())
        except (EOFError, OSError) as error:
            raise WorkerError("died", self._epitaph()) from error
        except BaseException:
            # Interrupted in between: the next answer would be that of this request.
            self.close()
            raise
        if kind == "answer":
            return answer
        if kind == "poisoned":
            self.close()
        raise WorkerError("died" if kind == "poisoned" else "error", answer)

    def _epitaph(self) -> str:
        """How the process ended, and its last words; it is gone afterwards."""
        assert self._process is not None and self._words is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        status = self._process.poll()
        self._words.seek(0, os.SEEK_END)
        self._words.seek(max(0, self._words.tell() - TAIL))
        words = " ".join(self._words.read().decode(errors="replace").split())
        self.close()
        how = f"exit status {status}"
        if status is not None and status < 0:
            how = f"signal {signal.Signals(-status).name}"
        return f"the process ended by {how}" + (f": {words}" if words else "")

    def kill(self) -> None:
        """Ends the process, also while another thread waits for its answer."""
        if (process := self._process) is not None:
            process.kill()

    def close(self) -> None:
        """Ends the process and lets go of it."""
        self.kill()
        if self._process is not None:
            self._process.wait()
        for each in (self._pipe, self._words):
            if each is not None:
                each.close()
        self._process = self._pipe = self._words = None


class Crew:
    """Several children that take requests from one queue, in order.

    `submit` returns a future whose exceptions are those of `WorkerProcess.ask`.
    """

    def __init__(self, factory: Callable[[], Handler], workers: int, timeout_s: float) -> None:
        self._factory, self._timeout_s = factory, timeout_s
        self._own = threading.local()
        self._children: list[WorkerProcess] = []
        self._closed = False
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="convloom-crew")

    def submit(self, request: Any) -> Future[Any]:
        return self._threads.submit(self._ask, request)

    def _ask(self, request: Any) -> Any:
        if self._closed:
            raise WorkerError("died", "cancelled")
        if not hasattr(self._own, "child"):
            self._own.child = WorkerProcess(self._factory)
            self._children.append(self._own.child)
        return self._own.child.ask(request, self._timeout_s)

    def close(self) -> None:
        """Drops what waits, and ends the children in the middle of what they are at."""
        self._closed = True
        for child in self._children:
            child.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for child in self._children:
            child.close()


# In the child.


def serve(handle: int, registered: tuple[str, ...] = ()) -> None:
    """Answers requests until the other end of the connection is gone; registered: where the
    extensions stand that the other process has registered."""
    # Ctrl-C reaches the whole group; the parent decides when children end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection: Connection[Any, Any] = Connection(handle)
    handler: Handler | None = None
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            return
        kind, result = "answer", None
        try:
            value = pickle.loads(message)
            if handler is None:
                for place in registered:
                    register(place)
                handler = value()
            else:
                result = handler(value)
        except PoisonedError as error:
            kind, result = "poisoned", str(error)
        except Exception as error:
            kind, result = "error", str(error) or repr(error)
        connection.send_bytes(pickle.dumps((kind, result)))
        if kind == "poisoned":
            os._exit(1)

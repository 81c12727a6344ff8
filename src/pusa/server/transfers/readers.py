"""Start a process for the files of each request: forks of one that has loaded the decoders and reads nothing itself.

Loading them takes half a second, a fork some milliseconds.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO, cast

_CHILD_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # a process with threads cannot be forked


class Readers:
    """Hold the process whose forks read files; it is started when it is needed, and again where it has died.

    Its standard input is a socket over which it is given another one for each fork. All methods are thread-safe.

    Args:
        command: arguments of Python that start it.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self.process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._lock = threading.Lock()
        self._closed = False

    def warm(self) -> None:
        """Start the process, unless it runs."""
        with self._lock:
            if not self._closed:
                self._started()

    def close(self) -> None:
        """End the process for good."""
        with self._lock:
            self._closed = True
            self._end()

    @contextmanager
    def open(self, seconds: float) -> Iterator[IO[bytes]]:
        """Start a reader and yield its connection, which ends after `seconds` at the latest; the reader then dies."""
        connection = self._connect()
        with connection, connection.makefile("rwb") as stream:
            pid: int | None = None

            def end() -> None:
                if pid is None:  # there was no fork: something is wrong with the process itself
                    self._restart()
                else:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

            ending = threading.Timer(seconds, end)
            ending.start()
            try:
                line = stream.readline(32)
                pid = int(line) if line.strip().isdigit() else None
                yield cast(IO[bytes], stream)
            finally:
                ending.cancel()
                with suppress(OSError):  # what the reader has not taken
                    stream.close()

    def _connect(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        with theirs, self._lock:
            for is_last in (False, True):
                try:
                    socket.send_fds(self._started(), [b"r"], [theirs.fileno()])
                    break
                except OSError:  # it has died since it was looked at
                    if is_last:
                        ours.close()
                        raise
                    self._end()
        return ours

    def _restart(self) -> None:
        with self._lock:
            self._end()

    def _started(self) -> socket.socket:
        if self.process is not None and self.process.poll() is not None:
            self._end()
        if self._control is None:
            self._control, theirs = socket.socketpair()
            with theirs:
                self.process = subprocess.Popen(
                    [sys.executable, *self._command],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env={**os.environ, **_CHILD_ENVIRONMENT},
                    start_new_session=True,  # Ctrl-C in the terminal is the server's to handle
                )
        return self._control

    def _end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        if self._control is not None:
            self._control.close()
        self.process = self._control = None

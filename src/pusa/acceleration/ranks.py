"""Join processes that share the work of one model, one rank each, and find out which of them has failed.

A rank is a process with a device of its own. Rank 0 makes the video; the others compute what it sends them. Small
messages go over gloo, tensors over NCCL between GPUs. Every rank counts up a heartbeat in the store that they share, so
that one that is killed or hangs is named instead of waited for.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from pusa.acceleration.decisions import Parallel

TIMEOUT_SECONDS = 1800.0
SILENCE_SECONDS = 60.0
GRACE_SECONDS = 10.0
_IDLE = timedelta(days=365)  # between two videos a rank may wait for as long as it likes
_TENSOR_TYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}


class RankError(RuntimeError):
    """A rank has failed, was killed or does not answer; the message names it.

    Attributes:
        rank: its number; None if nobody knows.
    """

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


class Ranks:
    """Communicate between the ranks of one model, and watch them.

    Args:
        rank, size: this process, and how many there are.
        device: where this rank computes.
        store: what they share; None: no heartbeats are kept, for a group that others have made.
        timeout_seconds: longest wait for another rank inside a step.
        silence_seconds: a rank without a heartbeat for so long is taken for hung.
        grace_seconds: after a rank has failed, this process has so long to end what it does; then `give_up` is called.
        give_up: ends this process when it cannot be interrupted, as it waits for a device; gets the message.

    Attributes:
        stage: what this rank does, for messages: "load", "denoise", ...
        parallel: how the ranks share the work; None: `pusa.generate` chooses for each request.
        is_closed: rank 0 has ended the group.
        failure: the error that ended the group, once there is one.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        device: torch.device,
        *,
        store: dist.TCPStore | None = None,
        timeout_seconds: float = TIMEOUT_SECONDS,
        silence_seconds: float = SILENCE_SECONDS,
        grace_seconds: float = GRACE_SECONDS,
        give_up: Callable[[str], None] | None = None,
    ) -> None:
        self.rank, self.size, self.device = rank, size, device
        self.timeout_seconds = timeout_seconds
        self.stage = "start"
        self.parallel: Parallel | None = None
        self.is_closed = False
        self._store = store
        self._meshes: dict[tuple[tuple[str, int], ...], DeviceMesh] = {}
        self._control: dist.ProcessGroup | None = None
        self._owns_group = self._cannot_go_on = False
        self._watch = (
            None
            if store is None
            else _Watch(rank, size, store, silence_seconds, grace_seconds, give_up or _end_process, lambda: self.stage)
        )

    def __repr__(self) -> str:
        return f"Ranks(rank={self.rank}, size={self.size}, device={str(self.device)!r})"

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_connected(self) -> bool:
        return self._owns_group

    @property
    def has_failed(self) -> bool:
        """True once a rank, this one included, cannot go on: the ranks must be started again."""
        return self._cannot_go_on or self.failure is not None

    @property
    def failure(self) -> RankError | None:
        return None if self._watch is None else self._watch.failure

    def on_failure(self, action: Callable[[], None]) -> None:
        """Call `action` when a rank has failed, from another thread: it should wake this process if it waits."""
        if self._watch is not None:
            self._watch.actions.append(action)

    def watch_process(self, rank: int, describe_end: Callable[[], str | None]) -> None:
        """Watch the process of a rank that this one has started: `describe_end` returns how it ended, if it did."""
        if self._watch is not None:
            self._watch.ends[rank] = describe_end

    def check(self) -> None:
        """Raise RankError if a rank has failed, this one included."""
        if self.failure is not None:
            raise self.failure
        if self._cannot_go_on:
            raise RankError(f"rank {self.rank} of {self.size} has failed before: start the ranks again", self.rank)

    def wait_until_all_are_here(self) -> None:
        """Wait until every rank has begun and is ready to connect, then connect them.

        Raises:
            RankError: a rank has failed before, or does not come within the timeout.
        """
        assert self._store is not None
        self._store.set(f"ready/{self.rank}", "1")
        deadline = time.monotonic() + self.timeout_seconds
        for rank in range(self.size):
            while not self._store.check([f"ready/{rank}"]):
                self.check()
                if time.monotonic() > deadline:
                    raise RankError(f"rank {rank} of {self.size} has not begun within {self.timeout_seconds:g} s", rank)
                time.sleep(0.02)
        with self.naming_failures():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo",
                store=dist.PrefixStore("group", self._store),
                rank=self.rank,
                world_size=self.size,
                timeout=timedelta(seconds=self.timeout_seconds),
            )
            self._owns_group = True
            self.control()

    def mesh(self, **sizes: int) -> DeviceMesh:
        """Return the mesh of these dimensions; the first call makes it, on all ranks at once."""
        key = tuple(sizes.items())
        if key not in self._meshes:
            self._meshes[key] = init_device_mesh(
                self.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes.keys())
            )
        return self._meshes[key]

    def control(self) -> dist.ProcessGroup:
        """Return the group for messages; the first call makes it, on all ranks at once."""
        if self._control is None:
            self._control = dist.new_group(backend="gloo", timeout=_IDLE)
        return self._control

    @contextmanager
    def naming_failures(self) -> Iterator[None]:
        """Raise RankError, which names the rank, for an error of communication."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, RankError) or not _is_of_communication(error):
                raise
            failure = None if self._watch is None else self._watch.find_cause()
            raise (failure or RankError(f"rank {self.rank} of {self.size} has lost the others: {error}")) from error

    # ---- messages and tensors ---------------------------------------------------------------------------------------

    def send(self, message: dict[str, Any], tensors: Sequence[Tensor] = ()) -> None:
        """Send a message of JSON values, and tensors, from rank 0 to all others.

        Raises:
            TypeError: a value is no JSON.
            RankError: a rank has failed.
        """
        described = [{"shape": list(tensor.shape), "dtype": str(tensor.dtype)} for tensor in tensors]
        data = json.dumps({**message, "tensors": described}).encode()
        with self.naming_failures():
            dist.broadcast(torch.tensor([len(data)]), src=0, group=self.control())
            dist.broadcast(torch.frombuffer(bytearray(data), dtype=torch.uint8), src=0, group=self.control())
            for tensor in tensors:
                dist.broadcast(_bytes_of(tensor.to(self.device)), src=0)

    def receive(self) -> tuple[dict[str, Any], list[Tensor]]:
        """Wait for the next message of rank 0, with its tensors on this rank's device.

        Raises:
            RankError: a rank has failed.
        """
        length = torch.zeros(1, dtype=torch.int64)
        with self.naming_failures():
            dist.broadcast(length, src=0, group=self.control())
            data = torch.empty(int(length), dtype=torch.uint8)
            dist.broadcast(data, src=0, group=self.control())
            message = json.loads(data.numpy().tobytes())
            tensors = []
            for described in message.pop("tensors"):
                tensor = torch.empty(described["shape"], dtype=_TENSOR_TYPES[described["dtype"]], device=self.device)
                dist.broadcast(_bytes_of(tensor), src=0)
                tensors.append(tensor)
        return message, tensors

    def gather(self, tensor: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
        """Gather a tensor of the same shape and dtype from every rank of a group."""
        gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
        with self.naming_failures():
            dist.all_gather([_bytes_of(one) for one in gathered], _bytes_of(tensor.contiguous()), group=group)
        return gathered

    def report_failure(self, message: str) -> None:
        """Tell the other ranks why this one cannot go on."""
        self._cannot_go_on = True
        if self._store is not None:
            with suppress(RuntimeError):  # the store is gone if rank 0 is
                self._store.set(f"failed/{self.rank}", message)

    def close(self) -> None:
        """Leave the group; rank 0 ends it for all."""
        if self._watch is not None:
            self._watch.close()
        if self.is_main and self._owns_group and not self.has_failed:
            with suppress(RuntimeError):
                self.send({"kind": "close"})
        if self._owns_group and dist.is_initialized():
            with suppress(RuntimeError):
                dist.destroy_process_group()
        self._owns_group = False


def _is_of_communication(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(
        word in str(error).lower() for word in ("gloo", "nccl", "connection")
    )


def _bytes_of(tensor: Tensor) -> Tensor:
    """View a contiguous tensor as bytes, which every backend can send."""
    return tensor.contiguous().flatten().view(torch.uint8)


def _end_process(message: str) -> None:
    """End this process at once, without a file left."""
    sys.stdout.flush()
    print(f"pusa: {message}", file=sys.stderr, flush=True)
    if "pusa.media" in sys.modules:
        sys.modules["pusa.media"].discard_unfinished()
    os._exit(1)


class _Watch:
    """Count up this rank's heartbeat and look at those of the others, in a thread."""

    def __init__(
        self,
        rank: int,
        size: int,
        store: dist.TCPStore,
        silence_seconds: float,
        grace_seconds: float,
        give_up: Callable[[str], None],
        stage: Callable[[], str],
    ) -> None:
        self.rank, self.size, self.silence_seconds, self.grace_seconds = rank, size, silence_seconds, grace_seconds
        self.failure: RankError | None = None
        self.actions: list[Callable[[], None]] = []
        self.ends: dict[int, Callable[[], str | None]] = {}
        self._give_up, self._stage = give_up, stage
        # A connection of its own: one that waits for a value blocks the other threads that use it.
        self._store: dist.Store = store.clone()  # type: ignore[attr-defined]
        self._store.set(f"process/{rank}", f"{socket.gethostname()} {os.getpid()}")
        self._processes: dict[int, tuple[str, int]] = {}
        self._closed, self._found = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="pusa-ranks", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        if self._thread is not threading.current_thread():
            self._thread.join(5)

    def find_cause(self) -> RankError | None:
        """Wait for as long as it takes to see which rank is silent; None if none is."""
        self._found.wait(self.silence_seconds + 2)
        return self.failure

    def _run(self) -> None:
        counts: dict[int, tuple[int, float]] = {}
        interval = min(0.5, self.silence_seconds / 8)
        looked_at = time.monotonic()
        while not self._closed.wait(interval):
            now = time.monotonic()
            if now - looked_at > self.silence_seconds / 2:
                counts.clear()  # this process was stopped itself, and so perhaps all of them
            looked_at = now
            try:
                self._store.add(f"beat/{self.rank}", 1)
                failure = self._look(counts, now)
            except RuntimeError:  # the store ends with rank 0
                failure = RankError(f"rank 0 of {self.size} has ended during {self._stage()}", 0)
            if failure and not self._closed.is_set():
                self._fail(failure)
                return

    def _look(self, counts: dict[int, tuple[int, float]], now: float) -> RankError | None:
        """Return which rank has failed; None if none has."""
        for rank in range(self.size):
            if rank != self.rank and (problem := self._problem_of(rank, counts, now)):
                return RankError(f"rank {rank} of {self.size} {problem}", rank)
        return None

    def _problem_of(self, rank: int, counts: dict[int, tuple[int, float]], now: float) -> str | None:
        if self._store.check([f"failed/{rank}"]):
            return f"has failed: {self._store.get(f'failed/{rank}').decode()}"
        during = f"during {self._stage()}"
        if rank in self.ends:
            if end := self.ends[rank]():
                return f"has ended {during}: {end}"
        elif rank not in self._processes and self._store.check([f"process/{rank}"]):
            host, pid = self._store.get(f"process/{rank}").decode().split()
            self._processes[rank] = host, int(pid)
        if rank in self._processes and not _is_alive(*self._processes[rank]):
            return f"(process {self._processes[rank][1]}) has ended {during}"
        count = self._store.add(f"beat/{rank}", 0)
        if count and counts.get(rank, (-1, 0.0))[0] != count:
            counts[rank] = count, now
        elif count and now - counts[rank][1] > self.silence_seconds:
            return f"hangs {during}: no sign of life for {self.silence_seconds:g} s"
        return None

    def _fail(self, failure: RankError) -> None:
        self.failure = failure
        self._found.set()
        for action in self.actions:
            action()
        if not self._closed.wait(self.grace_seconds):
            self._give_up(str(failure))


def _is_alive(host: str, pid: int) -> bool:
    """Tell if a process lives, as far as this machine can know."""
    if host != socket.gethostname():
        return True
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

"""Start the ranks of a model on this machine, or join those that torchrun has started.

The calling process is rank 0; every other rank is a process of its own that runs a module. They talk over the loopback
device only.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import IO, Any

import psutil
import torch
import torch.distributed as dist

from pusa.acceleration.ranks import Ranks

FOLLOWER = "pusa.generate.follower"
_END_SECONDS = 10.0
_HOST = "127.0.0.1"


def check_gpus(count: int) -> None:
    """Raise ValueError unless this machine has as many GPUs."""
    have = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < 1:
        raise ValueError(f"--gpus {count} is below 1")
    if count > have:
        if have == 0:
            raise ValueError(f"--gpus {count}: this machine has no GPU that PyTorch can use: leave --gpus out")
        raise ValueError(f"--gpus {count}: this machine has {have}: give 1..{have}, or leave --gpus out")


@contextmanager
def launch(size: int, *, device_type: str = "cuda", module: str = FOLLOWER, **watching: Any) -> Iterator[Ranks]:
    """Start ranks 1 to `size` - 1 as processes, connect to them as rank 0, and end them afterwards.

    Args:
        device_type: "cuda": a GPU for each rank; "cpu": for tests and checks.
        module: a module that calls `join_launched` with its arguments, and follows.
        watching: arguments of `Ranks` about time.

    Yields:
        The ranks, not connected yet: `Ranks.wait_until_all_are_here` connects them.

    Raises:
        ValueError: this machine has fewer GPUs.
    """
    ranks, port = host(size, device_type=device_type, **watching)
    followers: list[_Follower] = []
    try:
        for rank in range(1, size):
            follower = _Follower(module, rank, size, port, device_type, watching)
            followers.append(follower)
            ranks.watch_process(rank, follower.describe_end)
            ranks.on_failure(follower.kill)  # so that nobody waits for it any more
        yield ranks
    finally:
        ranks.close()
        deadline = time.monotonic() + _END_SECONDS
        for follower in followers:
            follower.end(0.0 if ranks.has_failed or not ranks.is_connected else deadline - time.monotonic())


def host(size: int, port: int = 0, *, device_type: str = "cuda", **watching: Any) -> tuple[Ranks, int]:
    """Be rank 0 of ranks that are started elsewhere on this machine, and that `join` at a port of the loopback.

    Args:
        port: 0 takes a free one.
        watching: arguments of `Ranks` about time.

    Returns:
        The ranks, not connected yet, and the port.

    Raises:
        ValueError: this machine has fewer GPUs.
        OSError: the port is taken.
    """
    if device_type == "cuda":
        check_gpus(size)
    _use_loopback()
    listener = socket.create_server((_HOST, port), backlog=size + 8)
    store = dist.TCPStore(
        _HOST,
        listener.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),  # else it would listen on every network
        timeout=timedelta(seconds=60),
    )
    return Ranks(0, size, _device(device_type, 0), store=store, **watching), store.port


class _Follower:
    """Run one rank in a process of its own, and keep what it writes to standard error."""

    def __init__(
        self, module: str, rank: int, size: int, port: int, device_type: str, watching: Mapping[str, Any]
    ) -> None:
        options = {name: value for name, value in watching.items() if name.endswith("_seconds")}
        arguments = [
            *(f"--rank={rank}", f"--size={size}", f"--port={port}", f"--device-type={device_type}"),
            *(f"--threads={torch.get_num_threads()}",),  # on a CPU another number rounds in another way
            *(f"--{name.replace('_', '-')}={value}" for name, value in options.items()),
        ]
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the process)
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=self._errors,
            stderr=self._errors,
        )

    def describe_end(self) -> str | None:
        """Return how the process ended; None while it runs."""
        code = self._process.poll()
        if code is None:
            return None
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"exit code {code}" + (f" ({lines[-1]})" if lines else "")

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            self._process.kill()

    def end(self, wait_seconds: float) -> None:
        """Wait for the process to end by itself, then kill it."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(max(wait_seconds, 0.0))
        self.kill()
        self._process.wait()
        self._errors.close()


def join(rank: int, size: int, port: int, *, device_type: str = "cuda", **watching: Any) -> Ranks:
    """Join ranks whose rank 0 listens at a port of this machine, and connect to them.

    Args:
        rank: 1 to `size` - 1.
        watching: arguments of `Ranks` about time.

    Raises:
        RankError: another rank has failed.
    """
    _use_loopback()
    store = dist.TCPStore(_HOST, port, is_master=False, timeout=timedelta(seconds=60))
    return Ranks(rank, size, _device(device_type, rank), store=store, **watching)


def join_torchrun(device_type: str = "cuda", **watching: Any) -> Ranks:
    """Join the ranks that torchrun has started; they are not connected yet.

    Raises:
        ValueError: this machine has fewer GPUs than ranks.
    """
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    if device_type == "cuda":
        check_gpus(local_size)
    if local_size == int(os.environ["WORLD_SIZE"]):
        _use_loopback()
    store, rank, size = next(dist.rendezvous("env://"))
    assert isinstance(store, dist.TCPStore)
    return Ranks(rank, size, _device(device_type, int(os.environ.get("LOCAL_RANK", rank))), store=store, **watching)


def _device(device_type: str, index: int) -> torch.device:
    if device_type == "cpu":
        return torch.device("cpu")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _use_loopback() -> None:
    """Keep gloo and NCCL on the loopback device, unless the environment names another."""
    names = [
        name for name, addresses in psutil.net_if_addrs().items() if any(one.address == _HOST for one in addresses)
    ]
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if names else ():
        os.environ.setdefault(variable, names[0])

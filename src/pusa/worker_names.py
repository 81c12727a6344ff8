"""Name the processes that share work, so that another one can tell which of them have died."""

import itertools
import os
import socket
from contextlib import suppress
from pathlib import Path

import psutil

_worker_numbers = itertools.count()


def worker_name() -> str:
    """Make a unique name, ``host/boot/pid-start/n``, that tells other workers of this machine if the process runs."""
    process = psutil.Process()
    return f"{_machine_id()}/{process.pid}-{process.create_time():.2f}/{next(_worker_numbers)}"


def _machine_id() -> str:
    """Return host, boot and container, within which process ids are comparable."""
    boot = f"{psutil.boot_time():.0f}"
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with suppress(OSError):
        boot += "-" + os.readlink("/proc/self/ns/pid").strip("pid:[]")
    return f"{socket.gethostname()[:60]}/{boot}"


def is_dead(name: str) -> bool:
    """Return True if a worker's process ran on this machine and has ended; False for workers of other machines."""
    machine, _, rest = name.rpartition("/")[0].rpartition("/")
    if machine != _machine_id():
        return False
    pid, _, started = rest.partition("-")
    try:
        return f"{psutil.Process(int(pid)).create_time():.2f}" != started
    except psutil.NoSuchProcess:
        return True
    except (ValueError, psutil.Error):
        return False

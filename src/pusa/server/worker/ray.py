"""Actors of a Ray cluster as executors: ``pip install 'pusa[ray]'``, ``pusa worker --executor ray``.

Ray places processes on machines; it is not what keeps jobs. Its retries are off (a retry would begin at step 0 on an
actor that may be as dead as the first), so that whatever happens to an actor or its machine ends the task with
``worker_lost``, and the queue's next attempt goes on from the checkpoint in the store.

An actor shares no disk with the worker: inputs and checkpoints travel with the messages. The model has to be there, or
be downloaded, on every machine of the cluster. Who reaches Ray's ports may run code there (clusters that newer versions
start ask for a token, others for nothing): keep it in a private network. The worker itself ends when the Ray node that
it is connected to does: give it a process of its own (``pusa worker``) rather than run it in the server.
"""

import logging
import os
import queue
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
import ray
from ray.exceptions import RayError

from pusa.server.worker.engine_process import PUSA_ENGINE, Inbox, make_engine, work
from pusa.server.worker.executor import Child, ChildExecutor
from pusa.server.worker.messages import CHECKPOINT_FILE, CancelTask, Checkpoint, Done, Error, Task

logger = logging.getLogger(__name__)

_POLL_SECONDS = 1.0  # that an actor waits for something to say
_SILENT_SECONDS = 300.0  # without an answer to that, an actor is lost (what is dead, Ray knows after about 15)
_NAMESPACE = "pusa"


@dataclass(frozen=True)
class Placed:
    """Where an actor is."""

    pid: int
    node: str


class EngineActor:
    """An engine in a thread of a Ray actor; its messages are fetched, which also shows that it is alive."""

    def __init__(self, target: str, model: str, *loras: str) -> None:
        self._inbox = Inbox()
        self._messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._send(Placed(os.getpid(), ray.util.get_node_ip_address()))
        threading.Thread(target=self._work, args=(target, model, *loras), name="pusa-engine", daemon=True).start()

    def _work(self, target: str, model: str, *loras: str) -> None:
        try:
            work(make_engine(target, model, *loras), self._inbox, self._send)
        finally:
            self._messages.put(None)

    def _send(self, message: Any) -> None:
        self._messages.put(packed(message))

    def put(self, command: "Task | CancelTask", files: dict[str, bytes]) -> None:
        """A task's files are written to a folder of this machine, which is removed with the next one's."""
        if isinstance(command, Task):
            self._folder = tempfile.TemporaryDirectory(prefix="pusa-")  # closes the one before
            folder = Path(self._folder.name)
            inputs = {}
            for number, (key, name) in enumerate(sorted((key, path.name) for key, path in command.inputs.items())):
                inputs[key] = folder / str(number) / name
                inputs[key].parent.mkdir()
                inputs[key].write_bytes(files[key])
            if CHECKPOINT_FILE in files:
                (folder / CHECKPOINT_FILE).write_bytes(files[CHECKPOINT_FILE])
            command = replace(command, folder=folder, inputs=inputs)
        self._inbox.put(command)

    def poll(self, seconds: float) -> list[tuple[Any, dict[str, bytes]] | None]:
        """Messages with the contents of their files, at least one if there is one in so many seconds; None: no more."""
        found = []
        try:
            found.append(self._messages.get(timeout=seconds))
            while True:
                found.append(self._messages.get_nowait())
        except queue.Empty:
            return found


def packed(message: Any) -> tuple[Any, dict[str, bytes]]:
    """A message and the contents of the files that it names, by their names."""
    match message:
        case Checkpoint(path, _):
            files = [path]
        case Done(results, _):
            files = list(results.values())
        case Error(latents=Path() as path):
            files = [path]
        case _:
            files = []
    return message, {path.name: path.read_bytes() for path in dict.fromkeys(files)}


def unpacked(message: Any, files: dict[str, bytes], folder: Path) -> Any:
    """The message about files in `folder`, which have been written, each whole or not at all."""
    for name, content in files.items():
        temporary = folder / f".{name}.tmp"
        temporary.write_bytes(content)
        temporary.replace(folder / name)
    match message:
        case Checkpoint(path, step):
            return Checkpoint(folder / path.name, step)
        case Done(results, timings):
            return Done({kind: folder / path.name for kind, path in results.items()}, timings)
        case Error(latents=Path() as path):
            return replace(message, latents=folder / path.name)
    return message


class RayExecutor(ChildExecutor):
    """An actor somewhere in a Ray cluster.

    Args:
        model, loras: what it loads, as in a request; on the actor's machine.
        target: ``module:name`` of the `pusa.server.worker.engine_process.Engine` in it.
        address: of the cluster; None: the one that Ray finds (RAY_ADDRESS), or a new one on this machine.
        gpus: that Ray sets aside for the actor (a share below 1 is possible), and shows it alone; 0: none.
        resources: further ones that its machine must have, as Ray names them.
        limits: as for `ChildExecutor`.
    """

    def __init__(
        self,
        model: str,
        loras: Sequence[str] = (),
        *,
        target: str = PUSA_ENGINE,
        address: str | None = None,
        gpus: float = 1.0,
        resources: dict[str, float] | None = None,
        **limits: float,
    ) -> None:
        options = {
            "num_cpus": 0 if gpus else 1,
            "num_gpus": gpus,
            "resources": resources or {},
            "max_restarts": 0,
            "max_task_retries": 0,
            "max_concurrency": 4,  # a task is put, cancelled and followed at once
            "scheduling_strategy": "SPREAD",
        }

        def new_actor() -> Any:
            connect(address)
            return ray.remote(EngineActor).options(**options).remote(target, model, *loras)

        super().__init__(lambda: _Actor(new_actor, model), model, **limits)


_connecting = threading.Lock()


def connect(address: str | None) -> None:
    """Join the cluster, once in a process."""
    with _connecting:
        if not ray.is_initialized():
            ray.init(
                address, namespace=_NAMESPACE, log_to_driver=False, include_dashboard=False if not address else None
            )


class _Actor(Child):
    """An actor, with a thread that fetches what it says."""

    def __init__(self, new_actor: Callable[[], Any], model: str) -> None:
        super().__init__(model)
        self._why: str | None = None
        self._where = "the actor that holds the model"
        self._folder = Path()
        self._actor: Any = None
        self._ended = threading.Event()
        threading.Thread(target=self._follow, args=(new_actor,), name="pusa-actor", daemon=True).start()

    def _follow(self, new_actor: Callable[[], Any]) -> None:
        try:
            self._actor = new_actor()
            self._take_all()
        except Exception as error:  # of Ray: a lost actor or machine; of the connection to the cluster: of any kind
            self._why = self._why or f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        if self._actor is not None:
            ray.kill(self._actor)
        self._is_over()
        self._ended.set()

    def _take_all(self) -> None:
        is_placed = False
        while not self._is_ending:
            # Until it is placed, it waits for a free GPU: for as long as `load_seconds` allows.
            fetched = ray.get(self._actor.poll.remote(_POLL_SECONDS), timeout=_SILENT_SECONDS if is_placed else None)
            for entry in fetched:
                if entry is None:
                    return
                is_placed = True
                self._fetched(*entry)

    def _fetched(self, message: Any, files: dict[str, bytes]) -> None:
        if isinstance(message, Placed):
            self._where = f"the actor that holds the model (process {message.pid} on {message.node})"
            self.state = replace(self.state, pids=(message.pid,))
        else:
            self._take(unpacked(message, files, self._folder))

    def send(self, command: Task | CancelTask) -> None:
        files = {}
        if isinstance(command, Task):
            self._folder = command.folder
            files = {key: path.read_bytes() for key, path in command.inputs.items()}
            if command.checkpoint.exists():
                files[CHECKPOINT_FILE] = command.checkpoint.read_bytes()
        try:
            self._actor.put.remote(command, files)
        except RayError as error:
            logger.info("the actor takes no more commands: %s", error)

    def kill(self, why: str | None = None) -> None:
        self._why = self._why or why
        super().kill(why)

    def _kill(self) -> None:
        if self._actor is not None:
            ray.kill(self._actor)

    def end(self) -> None:
        self._is_ending = True
        if self._actor is not None:
            ray.kill(self._actor)
        self._ended.wait(2 * _POLL_SECONDS)

    def how_it_ended(self) -> str:
        return f"{self._where} has ended" + (f" ({self._why})" if self._why else "")

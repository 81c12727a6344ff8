"""Run tasks in actors of a Ray cluster: ``pip install 'pusa[ray]'``, ``pusa worker --executor ray``.

Ray places processes on machines; it does not keep the jobs. Its retries are off (a retry would start at step 0, on an
actor that may be dead as well): the loss of an actor or its machine ends the task with ``worker_lost``, and the queue's
next attempt continues from the checkpoint in the store.

An actor shares no disk with the worker: inputs and checkpoints travel with the messages. Every machine of the cluster
needs the model, or downloads it. Whoever reaches Ray's ports may run code there (clusters of newer versions require a
token, others do not): keep it in a private network. The worker ends when the Ray node that it is connected to ends: run
it in a process of its own (``pusa worker``), not in the server.
"""

import logging
import os
import queue
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
import ray
from ray.exceptions import RayError

from pusa.errors import first_line
from pusa.events import Checkpoint, Done, Frames
from pusa.server.worker.engine_process import PUSA_ENGINE, Inbox, make_engine, work
from pusa.server.worker.executor import Child, ChildExecutor
from pusa.server.worker.messages import CHECKPOINT_FILE, CancelTask, Error, Task

logger = logging.getLogger(__name__)

_POLL_SECONDS = 1.0  # time that an actor waits for a message
_POLL_TIMEOUT_SECONDS = 300.0  # an actor without an answer is lost (Ray itself notices a dead one after about 15 s)
_NAMESPACE = "pusa"


@dataclass(frozen=True)
class ActorLocation:
    """Report the process and the node of an actor."""

    pid: int
    node: str


class EngineActor:
    """Run an engine in a thread of a Ray actor; the worker polls its messages, which also shows that it is alive."""

    def __init__(self, target: str, model: str, *loras: str) -> None:
        self._inbox = Inbox()
        self._messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._send(ActorLocation(os.getpid(), ray.util.get_node_ip_address()))
        threading.Thread(target=self._work, args=(target, model, *loras), name="pusa-engine", daemon=True).start()

    def _work(self, target: str, model: str, *loras: str) -> None:
        try:
            work(make_engine(target, model, *loras), self._inbox, self._send)
        finally:
            self._messages.put(None)

    def _send(self, message: Any) -> None:
        self._messages.put(pack(message))

    def put(self, command: "Task | CancelTask", files: dict[str, bytes]) -> None:
        """Receive a command, and write a task's files to a folder of this machine that the next task removes."""
        if isinstance(command, Task):
            self._folder = tempfile.TemporaryDirectory(prefix="pusa-")  # closes the previous one
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
        """Return messages with the contents of their files; wait for the first for some seconds. None is the last."""
        found = []
        try:
            found.append(self._messages.get(timeout=seconds))
            while True:
                found.append(self._messages.get_nowait())
        except queue.Empty:
            return found


def pack(message: Any) -> tuple[Any, dict[str, bytes]]:
    """Return a message with the contents of the files it names, by file name."""
    match message:
        case Checkpoint(path, _):
            files = [path]
        case Frames(path=Path() as path):
            files = [path] if path.exists() else []  # it is gone at the end
        case Done(results, _):
            files = list(results.values())
        case Error(latents=Path() as path):
            files = [path]
        case _:
            files = []
    return message, {path.name: path.read_bytes() for path in dict.fromkeys(files)}


def unpack(message: Any, files: dict[str, bytes], folder: Path) -> Any:
    """Write each file atomically to `folder` and return the message with their new paths."""
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
        case Frames(path=Path() as path):
            return replace(message, path=folder / path.name)
    return message


class RayExecutor(ChildExecutor):
    """Run tasks in an actor of a Ray cluster.

    Args:
        model, loras: names to load on the actor's machine, as in a request.
        target: ``module:name`` of the `pusa.server.worker.engine_process.Engine` to run.
        address: of the cluster; None: the one that Ray finds (RAY_ADDRESS), or a new one on this machine.
        gpus: number that Ray reserves for the actor and makes visible to it (may be below 1); 0: none.
        resources: further resources that its machine must have, by Ray's names.
        env: environment variables to set for the actor.
        limits: see `ChildExecutor`.
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
        env: Mapping[str, str] | None = None,
        **limits: float,
    ) -> None:
        options = {
            "num_cpus": 0 if gpus else 1,
            "num_gpus": gpus,
            "resources": resources or {},
            **({"runtime_env": {"env_vars": dict(env)}} if env else {}),
            "max_restarts": 0,
            "max_task_retries": 0,
            "max_concurrency": 4,  # put, cancel and poll run at the same time
            "scheduling_strategy": "SPREAD",
        }

        def new_actor() -> Any:
            connect(address)
            return ray.remote(EngineActor).options(**options).remote(target, model, *loras)

        super().__init__(lambda: _Actor(new_actor, model), model, **limits)


_connecting = threading.Lock()


def connect(address: str | None) -> None:
    """Connect this process to the cluster, once."""
    with _connecting:
        if not ray.is_initialized():
            ray.init(
                address, namespace=_NAMESPACE, log_to_driver=False, include_dashboard=False if not address else None
            )


class _Actor(Child):
    """Start an actor, and a thread that polls its messages."""

    def __init__(self, new_actor: Callable[[], Any], model: str) -> None:
        super().__init__(model)
        self._end_reason: str | None = None
        self._location = "the actor that holds the model"
        self._folder = Path()
        self._actor: Any = None
        self._ended = threading.Event()
        threading.Thread(target=self._listen, args=(new_actor,), name="pusa-actor", daemon=True).start()

    def _listen(self, new_actor: Callable[[], Any]) -> None:
        try:
            self._actor = new_actor()
            self._poll_messages()
        except Exception as error:  # Ray's, of a lost actor or machine; those of the connection are of any type
            self._end_reason = self._end_reason or f"{type(error).__name__}: {first_line(error)}"
        if self._actor is not None:
            ray.kill(self._actor)
        self._mark_ended()
        self._ended.set()

    def _poll_messages(self) -> None:
        is_placed = False
        while not self._is_ending:
            # Before it is placed, the actor waits for a free GPU, as long as `load_seconds` allows.
            fetched = ray.get(
                self._actor.poll.remote(_POLL_SECONDS), timeout=_POLL_TIMEOUT_SECONDS if is_placed else None
            )
            for entry in fetched:
                if entry is None:
                    return
                is_placed = True
                self._receive_packed(*entry)

    def _receive_packed(self, message: Any, files: dict[str, bytes]) -> None:
        if isinstance(message, ActorLocation):
            self._location = f"the actor that holds the model (process {message.pid} on {message.node})"
            self.state = replace(self.state, pids=(message.pid,))
        else:
            self._receive(unpack(message, files, self._folder))

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

    def kill(self, reason: str | None = None) -> None:
        self._end_reason = self._end_reason or reason
        super().kill(reason)

    def _kill(self) -> None:
        if self._actor is not None:
            ray.kill(self._actor)

    def end(self) -> None:
        self._is_ending = True
        if self._actor is not None:
            ray.kill(self._actor)
        self._ended.wait(2 * _POLL_SECONDS)

    def describe_end(self) -> str:
        return f"{self._location} has ended" + (f" ({self._end_reason})" if self._end_reason else "")

"""Make the videos of a run in actors on the nodes of a Ray cluster.

The actors are those of the server (`pusa.server.worker.ray`): each holds the model and shares no disk with this
process. Conditions' files travel to them, checkpoints and videos back, and this process, which has the folder, claims
the items. What a lost node was making is made by another one, from its last checkpoint.
"""

import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pusa.acceleration.decisions import LoadOptions
from pusa.evaluation.runs.folder import RunFolder
from pusa.evaluation.runs.items import Item
from pusa.events import Checkpoint, Done
from pusa.server.worker.engine_process import LOAD_WORDS, PUSA_ENGINE
from pusa.server.worker.executor import Executor
from pusa.server.worker.messages import Error, Task

_CHECKPOINT_SECONDS = 60.0
_FAILED_STARTS = 5  # in a row, after which a maker gives up
_LOOK_SECONDS = 0.2  # between two looks at whether to stop


class ExecutorMaker:
    """Make videos by an executor of the server's worker, such as an actor of a Ray cluster.

    Args:
        executor: holds the model; it is started at the first look.
        checkpoint_seconds: minimum time between two checkpoints.
    """

    survives_crashes = True  # the executor tells of a process that has died over an item

    def __init__(self, executor: Executor, *, checkpoint_seconds: float = _CHECKPOINT_SECONDS) -> None:
        self._executor, self._checkpoint_seconds = executor, checkpoint_seconds
        self._failed_starts, self._was_failed = 0, False

    def is_ready(self) -> bool:
        """Tell if the model is loaded; start to load it where it is not, as after the loss of its node.

        Raises:
            RuntimeError: that has failed several times.
        """
        state = self._executor.state
        if state.ready:
            self._failed_starts = 0
            return True
        is_failed = state.stage == "failed"
        if is_failed and not self._was_failed:
            self._failed_starts += 1
            if self._failed_starts > _FAILED_STARTS:
                raise RuntimeError(f"the model cannot be loaded: {state.error}")
        self._was_failed = is_failed
        self._executor.start()
        return False

    def make(self, item: Item, output: Path, stop: Callable[[], bool]) -> None:
        folder, kept = output.parent, output.parent.with_name(f"{item.id}.safetensors")
        task = self._task(item, folder)
        if kept.exists():
            shutil.copyfile(kept, task.checkpoint)
        ended = threading.Event()
        watcher = threading.Thread(target=self._cancel_on_stop, args=(stop, ended), daemon=True)
        watcher.start()
        try:
            for message in self._executor.run(task):
                match message:
                    case Checkpoint(path, _):
                        with suppress(FileNotFoundError):  # the one before was this file already, if both came at once
                            os.replace(path, kept)
                    case Error():
                        raise RuntimeError(message.message)
                    case Done(results, _):
                        if results["video"] != output:
                            os.replace(results["video"], output)
                        kept.unlink(missing_ok=True)
        finally:
            ended.set()
            watcher.join()

    def close(self) -> None:
        """End the process that holds the model."""
        self._executor.close()

    def _task(self, item: Item, folder: Path) -> Task:
        """Make the task of an item, whose conditions' files are sent under keys."""
        request = item.request.model_dump(mode="json")
        inputs = {}
        for number, condition in enumerate(request["conditions"]):
            key = f"{number:03d}"
            inputs[key], condition["file"] = Path(condition["file"]), key
        return Task(
            job_id=item.id,
            attempt=1,
            request=request,
            folder=folder,
            inputs=inputs,
            checkpoint_seconds=self._checkpoint_seconds,
        )

    def _cancel_on_stop(self, stop: Callable[[], bool], ended: threading.Event) -> None:
        while not ended.wait(_LOOK_SECONDS):
            if stop():
                return self._executor.cancel()


@contextmanager
def ray_makers(
    address: str | None,
    run: RunFolder,
    actors: int | None = None,
    *,
    load: LoadOptions | None = None,
    target: str = PUSA_ENGINE,
    gpus: float | None = None,
    checkpoint_seconds: float = _CHECKPOINT_SECONDS,
    **options: Any,
) -> Iterator[Sequence[ExecutorMaker]]:
    """Connect to a Ray cluster and yield makers, each with an actor of its own; end the actors afterwards.

    The actors load the model of the run's first item; every node needs its files and those of LoRAs, or downloads them.

    Args:
        address: ``auto``, or ``HOST:PORT`` of the cluster.
        actors: how many; None: as many as the cluster has cards, or nodes where it has none.
        load: how each loads the model; single files are not sent.
        target: ``module:name`` of the engine to run, for tests and benchmarks.
        gpus: that an actor reserves; None: 1 where the cluster has any.
        options: further ones of `RayExecutor`, such as `resources`.

    Raises:
        RuntimeError: Ray is not installed, or no cluster answers.
        ValueError: `load` has single files.
    """
    load = load or LoadOptions()
    if load.files:
        raise ValueError("--ray: single files are not sent to the nodes: give --model a folder that each of them has")
    try:
        import ray

        from pusa.server.worker.ray import RayExecutor, connect
    except ImportError as error:
        raise RuntimeError("--ray needs Ray, which is not installed: pip install 'pusa[ray]'") from error
    try:
        connect(address)
    except ConnectionError as error:
        raise RuntimeError(f"no Ray cluster answers at {address}: start one with `ray start --head`") from error
    cards = ray.cluster_resources().get("GPU", 0)
    if actors is None:
        actors = int(cards) or sum(bool(node["Alive"]) for node in ray.nodes())
    first = run.items[0].request
    words = {f"PUSA_{name.upper()}": str(getattr(load, name)) for name in LOAD_WORDS}
    options["env"] = {**words, **(options.get("env") or {})}
    gpus = (1.0 if cards else 0.0) if gpus is None else gpus
    makers = [
        ExecutorMaker(
            RayExecutor(first.model, first.lora, target=target, address=address, gpus=gpus, **options),
            checkpoint_seconds=checkpoint_seconds,
        )
        for _ in range(actors)
    ]
    try:
        yield makers
    finally:
        for maker in makers:
            maker.close()

"""Let the engine processes of a group share each task: rank 0 runs it, the others follow until rank 0 ends it.

The worker starts the ranks and watches them (`pusa.server.worker.local`): it names one that was killed or hangs. The
watch of `Ranks` itself is the second one, for errors that a rank reports.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pusa.acceleration.decisions import LoadOptions, Parallel
from pusa.events import Done
from pusa.server.worker.messages import Message

if TYPE_CHECKING:
    from pusa.acceleration.ranks import Ranks

PARALLEL_VARIABLE = "PUSA_ENGINE_PARALLEL"
"""Environment variable that says how the ranks share the work: a `Parallel` as JSON; without it they choose."""

_SILENCE_FACTOR = 2.0  # later than the worker, which names a silent rank


def world_size() -> int:
    """Return the number of ranks in this process's group, by the variables that the worker sets."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join_group() -> "Ranks | None":
    """Join the ranks that the worker has started beside this one; None if it has started none."""
    if world_size() == 1:
        return None
    import torch

    from pusa.acceleration import launch

    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    rank, port = int(os.environ["RANK"]), int(os.environ["MASTER_PORT"])
    silence_seconds = _SILENCE_FACTOR * float(os.environ.get("PUSA_RANK_SECONDS", "120"))
    if rank:
        return launch.join(rank, world_size(), port, device_type=device_type, silence_seconds=silence_seconds)
    ranks, _ = launch.host(world_size(), port, device_type=device_type, silence_seconds=silence_seconds)
    if shared := os.environ.get(PARALLEL_VARIABLE):
        ranks.parallel = Parallel(**json.loads(shared))
    return ranks


def load_shared(
    ranks: "Ranks", model: str, loras: Sequence[str], options: LoadOptions, progress: Callable[[int, int], None]
) -> None:
    """Load a model on this rank, as all of them must, and share its steps among them.

    Args:
        progress: called on rank 0 with the bytes read so far and those of all.

    Raises:
        RankError: another rank has failed.
    """
    from pusa import zoo
    from pusa.generate import sharing
    from pusa.generate.residents import resident_of
    from pusa.request import placeholder_request

    if not ranks.is_main:
        for _ in follow_task(ranks):
            pass
        return
    defaults = zoo.defaults_of(model)
    request = placeholder_request(defaults, model=model, lora=list(loras)).resolved(defaults)
    sharing.request_model(ranks, request, options)
    resident = resident_of(request, options)
    pipe = resident.prepare(request, None, lambda event: None, progress=progress)
    sharing.share(ranks, pipe, request, resident.plan)
    _release(ranks)


@contextmanager
def released_on_error(ranks: "Ranks | None") -> Iterator[None]:
    """Enclose what rank 0 does before `generate`, which ends a task for the other ranks: here an error must."""
    try:
        yield
    except BaseException:
        if ranks is not None:
            _release(ranks)
        raise


def _release(ranks: "Ranks") -> None:
    """Let the other ranks end the task that they follow."""
    if ranks.is_connected and not ranks.has_failed:
        ranks.send({"kind": "done"})


def follow_task(ranks: "Ranks") -> Iterator[Message]:
    """Compute this rank's share of a task until rank 0 has ended it.

    Yields:
        Stages and steps, and an empty `Done`.

    Raises:
        RankError: another rank has failed.
        Exception: this one has, and the others know it.
    """
    from pusa.generate.follower import follow_run

    yield from follow_run(ranks)
    yield Done({})

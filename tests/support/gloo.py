"""Help tests of several processes with gloo, the backend of CPUs."""

import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor


def fork_warm(function: Callable[..., None], args: tuple[Any, ...], count: int) -> None:
    """Call a function of a module with its rank and these arguments in so many processes, and wait for them.

    They are forks of one process that has imported the libraries, which costs a new process several seconds.
    """
    multiprocessing.set_forkserver_preload(["pusa.pipeline", "pusa.training.trainer"])
    mp.start_processes(function, args=args, nprocs=count, join=True, start_method="forkserver")


def run_in_processes(find: Callable[[int], dict[str, Any]], count: int, folder: Path) -> list[dict[str, Any]]:
    """Call a function of a module with its rank in each process of a new group; return what each found, by rank.

    Args:
        find: returns values that JSON can hold.
        folder: an empty one, for what the processes exchange.
    """
    fork_warm(_find, (find, count, folder), count)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


def _find(rank: int, find: Callable[[int], dict[str, Any]], count: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=count)
    (folder / f"{rank}.json").write_text(json.dumps(find(rank)))
    dist.destroy_process_group()


def all_gather_of_any_size(gathered: list[Tensor], tensor: Tensor, group: dist.ProcessGroup) -> None:
    """Gather uneven tensors, as NCCL does and gloo refuses: every process of the group broadcasts its own."""
    for rank, piece in zip(dist.get_process_group_ranks(group), gathered, strict=True):
        if rank == dist.get_rank():
            piece.copy_(tensor)
        dist.broadcast(piece, src=rank, group=group)

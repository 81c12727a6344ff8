"""Set up the processes of a run, started by accelerate, torchrun or plain python, and communicate between them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

_BUCKET_NUMEL = 64 * 2**20  # gradients averaged together: 256 MB in fp32


@dataclass(frozen=True)
class Processes:
    """Divide the work among processes and communicate between them.

    Group `data_rank` of `data_parallel` has clips of its own, which `context_parallel` neighbouring processes share.
    """

    rank: int
    world: int
    device: torch.device
    context_parallel: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        return self.rank // self.context_parallel

    @property
    def data_parallel(self) -> int:
        return self.world // self.context_parallel

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.world > 1:
            dist.barrier()

    def sum(self, values: Tensor) -> Tensor:
        """Sum a tensor over all processes; fp64 on the CPU."""
        if self.world == 1:
            return values.double().cpu()
        total = values.double().to(self.device)
        dist.all_reduce(total)
        return total.cpu()

    def mean(self, values: Sequence[float]) -> list[float]:
        """Average each number over all processes."""
        if self.world == 1:
            return list(values)
        return (self.sum(torch.tensor(values, dtype=torch.float64)) / self.world).tolist()

    def agree(self, value: int) -> int:
        """Return the main process's value: a file may appear sooner on one machine than on another."""
        return int(self.sum(torch.tensor([value if self.is_main else 0]))[0])

    def average(self, gradients: Sequence[Tensor], values: Sequence[float]) -> list[float]:
        """Average gradients over all processes in place, and numbers with them (as fp32), which are returned.

        Buckets have a fixed layout: reductions that are cut differently round differently, and a resumed run must give
        the same bits.
        """
        if self.world == 1:
            return list(values)
        extra = torch.tensor(values, dtype=torch.float32, device=self.device)
        for bucket in _buckets([*gradients, extra]):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.all_reduce(flat)
            flat /= self.world
            for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))
        return extra.tolist()

    def mesh(self) -> DeviceMesh:
        """Return the mesh to shard over: all processes in one dimension."""
        return init_device_mesh(self.device.type, (self.world,))

    def context_mesh(self) -> DeviceMesh:
        """Return the mesh of groups and of the processes that share a clip, with the names that diffusers requires."""
        shape = (self.data_parallel, 1, self.context_parallel)
        return init_device_mesh(self.device.type, shape, mesh_dim_names=("data", "ring", "ulysses"))


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    buckets: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if buckets[-1] and (filled + tensor.numel() > _BUCKET_NUMEL or tensor.dtype != buckets[-1][0].dtype):
            buckets.append([])
            filled = 0
        buckets[-1].append(tensor)
        filled += tensor.numel()
    return buckets


def connect_processes(context_parallel: int = 1) -> Processes:
    """Connect the processes of the launcher; one that runs alone needs no connection.

    Raises:
        ValueError: their number is no multiple of `context_parallel`, or the launcher is configured to wrap the model.
    """
    for variable, remedy in (
        ("ACCELERATE_USE_DEEPSPEED", "use FSDP2 instead: parallel.fsdp=true"),
        ("ACCELERATE_USE_FSDP", "the trainer shards by itself: set parallel.fsdp=true"),
    ):
        if os.environ.get(variable, "").lower() == "true":
            raise ValueError(
                f"accelerate is configured to wrap the model ({variable}): launch without it, and {remedy}"
            )
    wants_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    state = PartialState(cpu=wants_cpu or not torch.accelerator.is_available())  # torchrun sets no such variable
    if dist.is_initialized() and dist.get_world_size() != state.num_processes:
        raise ValueError(
            f"{dist.get_world_size()} processes are connected and the environment says {state.num_processes}: start "
            "them with accelerate launch or torchrun"
        )
    if state.num_processes % context_parallel:
        raise ValueError(
            f"context_parallel={context_parallel} does not divide the {state.num_processes} processes there are"
        )
    return Processes(state.process_index, state.num_processes, state.device, context_parallel)

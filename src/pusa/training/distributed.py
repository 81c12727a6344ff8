"""The processes of a run, as accelerate, torchrun or plain python started them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

_BUCKET_NUMEL = 64 * 2**20  # of gradients that are averaged together: 256 MB in fp32


@dataclass(frozen=True)
class Processes:
    """Who does what: `data_rank` of `data_parallel` groups has clips of its own, shared by `context_parallel`
    neighbouring processes."""

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
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()

    def sum(self, values: Tensor) -> Tensor:
        """Over all processes; on the CPU, fp64."""
        if self.world == 1:
            return values.double().cpu()
        total = values.double().to(self.device)
        dist.all_reduce(total)
        return total.cpu()

    def mean(self, values: Sequence[float]) -> list[float]:
        """Of each number over all processes."""
        if self.world == 1:
            return list(values)
        return (self.sum(torch.tensor(values, dtype=torch.float64)) / self.world).tolist()

    def agree(self, value: int) -> int:
        """The main process's value: files may be seen sooner on one machine than on another."""
        return int(self.sum(torch.tensor([value if self.is_main else 0]))[0])

    def average(self, gradients: Sequence[Tensor], values: Sequence[float]) -> list[float]:
        """Average gradients over all processes in place, and numbers with them (as fp32), which are returned.

        In buckets of a fixed layout: reductions that are cut differently round differently, and a run that goes on
        after a kill must give the same bits.
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
        """All processes in one row, to shard over."""
        return init_device_mesh(self.device.type, (self.world,))

    def context_mesh(self) -> DeviceMesh:
        """Groups and, inside, the processes that share a clip, named as diffusers wants them."""
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


def launched(context_parallel: int = 1) -> Processes:
    """The processes there are; communication between them is set up if it is not yet.

    Raises:
        ValueError: their number is no multiple of `context_parallel`, or the launcher was told to wrap the model.
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
    state = PartialState(cpu=wants_cpu or not torch.accelerator.is_available())  # torchrun alone does not say so
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

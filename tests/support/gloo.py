"""Help tests of several processes with gloo, the backend of CPUs."""

import torch.distributed as dist
from torch import Tensor


def all_gather_of_any_size(gathered: list[Tensor], tensor: Tensor, group: dist.ProcessGroup) -> None:
    """Gather uneven tensors, as NCCL does and gloo refuses: every process of the group broadcasts its own."""
    for rank, piece in zip(dist.get_process_group_ranks(group), gathered, strict=True):
        if rank == dist.get_rank():
            piece.copy_(tensor)
        dist.broadcast(piece, src=rank, group=group)

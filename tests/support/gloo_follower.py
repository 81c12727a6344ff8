"""Follow rank 0 with a gloo that gathers uneven tensors, as NCCL does: ``python -m gloo_follower``."""

import sys

import torch.distributed as dist
from gloo import all_gather_of_any_size

from pusa.generate.follower import main

if __name__ == "__main__":
    dist.all_gather = all_gather_of_any_size  # type: ignore[assignment]
    sys.exit(main())

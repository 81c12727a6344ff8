"""Follow rank 0 with a transformer that runs out of memory in the second step: ``python -m memory_follower``."""

import itertools
import sys
from typing import Any

import torch

from pusa import PusaWanTransformer3DModel
from pusa.generate.follower import main

if __name__ == "__main__":
    forward, calls = PusaWanTransformer3DModel.forward, itertools.count(1)

    def short(self: Any, *args: Any, **options: Any) -> Any:
        if next(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 1 has ...")
        return forward(self, *args, **options)

    PusaWanTransformer3DModel.forward = short
    sys.exit(main())

"""Keep the threads that compute for one thread out of the way of another one's."""

import ctypes
import sys

_OMP_PAUSE_SOFT = 1  # what is given back comes again by itself


def release_threads() -> None:
    """End the threads that have computed for the calling one: call it before another thread computes.

    GNU OpenMP, which torch has on Linux, keeps such threads for each thread that has computed anything. As soon as it
    has more of them than there are cores, all of them sleep between any two operations, and a small model takes two to
    three times as long on a CPU.
    """
    if sys.platform != "linux" or "torch" not in sys.modules:
        return
    omp_pause_resource_all = getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)  # of OpenMP 5.0
    if omp_pause_resource_all is not None:
        omp_pause_resource_all(_OMP_PAUSE_SOFT)

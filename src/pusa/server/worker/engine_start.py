"""Start the process that holds the model, with its life tied to its parent's before anything slow is imported.

    python -m pusa.server.worker.engine_start PARENT MODULE:CLASS MODEL [LORA...]

PARENT is the parent's process id.
"""

import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Have Linux kill this process, even a stopped one, when the thread that started it ends.

    Args:
        parent: process id of the parent, as this process may have lost it already.
    """
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended before
        os._exit(0)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))

    from pusa.server.worker.engine_process import main

    main(*sys.argv[2:])

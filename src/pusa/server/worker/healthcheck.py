"""Check that a worker of this machine or container is alive: ``python -m pusa.server.worker.healthcheck``.

Workers have no port; they record their state in the queue's table of workers.
"""

import socket
import sys
from collections.abc import Sequence

from pusa.server.jobs.queue import JobQueue, WorkerRecord
from pusa.server.settings_sources import load_settings

SEEN_WITHIN_SECONDS = 45.0  # a worker records its state every ten


def on_this_machine(workers: Sequence[WorkerRecord]) -> list[WorkerRecord]:
    """Select the workers of this machine by their names, see `pusa.worker_names.worker_name`."""
    return [worker for worker in workers if worker.name.startswith(socket.gethostname()[:60] + "/")]


def main() -> int:
    """Return 0 if a worker is alive, else 1 with a line on stderr. Read the settings as `pusa worker` does."""
    queue = JobQueue(load_settings().database_url, check=False)
    try:
        alive = on_this_machine(queue.workers(seen_within_seconds=SEEN_WITHIN_SECONDS))
    finally:
        queue.close()
    if not alive:
        print(f"no worker of this machine was heard of in the last {SEEN_WITHIN_SECONDS:g} seconds", file=sys.stderr)
        return 1
    for worker in alive:
        pids = ",".join(map(str, worker.state.get("pids") or ()))
        print(worker.name, worker.state.get("stage"), f"pids={pids}", worker.state.get("job") or "")
    return 0


if __name__ == "__main__":
    sys.exit(main())

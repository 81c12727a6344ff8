"""Run a Ray cluster whose nodes have addresses of the loopback only."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import ray
from paths import SUPPORT

LOOPBACK = {"include_dashboard": False, "object_store_memory": 100_000_000}
_ENVIRONMENT = {
    "PYTHONPATH": str(SUPPORT),  # where actors find the fake engine
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "5000",
}


class Machines:
    """The cluster: a head, where the driver is, and other nodes for actors."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        # 127.0.0.1 would become the machine's outer address, which nobody answers on.
        self.cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 1, "node_ip_address": "127.0.0.2", **LOOPBACK}
        )
        self.addresses = iter(f"127.0.0.{number}" for number in range(3, 250))
        self.other: Any = None
        ray.init(self.cluster.address, _node_ip_address="127.0.0.2", namespace="pusa", log_to_driver=False)

    def add(self, places: int = 2) -> str:
        """Add a node for so many actors; return its address."""
        address = next(self.addresses)
        self.other = self.cluster.add_node(
            num_cpus=places, resources={"video": places}, node_ip_address=address, **LOOPBACK
        )
        return address

    def pull_the_plug(self) -> None:
        """Kill the node that was added last."""
        self.cluster.remove_node(self.other, allow_graceful=False)


@contextmanager
def running_machines() -> Iterator[Machines]:
    """Start a cluster with a head only, and end it."""
    with patch.dict(os.environ, _ENVIRONMENT):
        found = Machines()
        try:
            yield found
        finally:
            ray.shutdown()
            found.cluster.shutdown()

"""Make plans by hand."""

from typing import Any

from pusa.acceleration.decisions import Offload, PartPlan, Plan, Storage, Wish

PARTS = ("text_encoder", "transformer", "transformer_2", "vae")


def make_plan(
    offload: Offload = "none",
    storage: Storage = "float32",
    *,
    merge: bool = False,
    wish: Wish = "balanced",
    device: Any = "cuda",
    **others: PartPlan,
) -> Plan:
    """Make a plan with all parts in fp32 and one kind of offloading, and the transformers stored as `storage`."""
    parts = {
        name: PartPlan("float32", storage if name.startswith("transformer") else "float32", device, offload)
        for name in PARTS
    }
    return Plan("tiny", wish, {**parts, **others}, merge=merge)

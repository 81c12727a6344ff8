"""Measure this machine, or describe another one, for `pusa.acceleration.plan`."""

import shutil
from dataclasses import replace
from pathlib import Path

from pusa import resources
from pusa.acceleration.decisions import Card, Link, Machine

GIB = 2**30
CONTEXT_BYTES = 500_000_000  # of a card: CUDA's context and its libraries
_MOST_GB = 1e6
_CARD_SHARE = 0.98  # of a card's memory that programs see
SYSTEM_BYTES = 2 * 10**9  # of RAM: the operating system
OFFLOAD_BYTES_PER_SECOND = {(8, 9): 22e9, (9, 0): 45e9, (12, 0): 45e9}  # of pinned memory: PCIe 4 and 5 with 16 lanes
_OFFLOAD_ELSEWHERE = 20e9
# Capabilities before (8, 0) are mostly behind PCIe 3.
_OFFLOAD_BEFORE_AMPERE = 11e9


def machine_without_cards(*, disk_folder: Path | None = None) -> Machine:
    """Measure free RAM and disk as `machine` does, and ask for no cards, which would load torch."""
    folder = disk_folder or Path.home()
    return Machine(
        ram_bytes=resources.free_memory_bytes(),
        disk_bytes=shutil.disk_usage(folder).free if folder.exists() else 0,
    )


def machine(*, disk_folder: Path | None = None) -> Machine:
    """Measure what is free on this machine now.

    Args:
        disk_folder: whose disk counts; None: this user's home.

    Returns:
        Its CUDA cards with their free memory, none without CUDA; free RAM, within a container's limit; free disk.
    """
    import torch

    cards: list[Card] = []
    link: Link = "none"
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, _ = torch.cuda.mem_get_info(index)
        cards.append(Card(free, torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)))
    if len(cards) > 1:
        link = _link_of(cards[0].name) if _have_peer_access(len(cards)) else "pcie"
    return replace(
        machine_without_cards(disk_folder=disk_folder),
        cards=tuple(cards),
        link=link,
        offload_bytes_per_second=offload_rate(cards[0].capability if cards else None),
        cpu_has_bf16=resources.is_bf16_fast("cpu"),
    )


def described_machine(
    *,
    gpu_gb: float = 0.0,
    count: int = 1,
    ram_gb: float = 64.0,
    disk_gb: float = 200.0,
    capability: tuple[int, int] = (8, 9),
    link: Link = "pcie",
) -> Machine:
    """Describe a machine by what it is sold as; the context of CUDA and the operating system take their part.

    Args:
        gpu_gb: memory of each card, in GiB as vendors count ("24 GB"); 0: no card.
        count: how many cards.
        ram_gb: RAM, in GiB.
        disk_gb: free disk, in decimal GB.

    Raises:
        ValueError: a negative number or one above 1,000,000 GB, or no card.
    """
    for name, value in (("gpu_gb", gpu_gb), ("ram_gb", ram_gb), ("disk_gb", disk_gb)):
        if not value >= 0:
            raise ValueError(f"{name}={value:g} is below 0")
        if value > _MOST_GB:
            raise ValueError(f"{name}={value:g} is above {_MOST_GB:,.0f}")
    if count < 1:
        raise ValueError(f"count={count} is below 1: for a machine without a card, give gpu_gb=0")
    memory = max(round(_CARD_SHARE * gpu_gb * GIB) - CONTEXT_BYTES, 0)
    cards = (Card(memory, f"{gpu_gb:g} GB", capability),) * (count if gpu_gb else 0)
    return Machine(
        cards=cards,
        ram_bytes=max(round(ram_gb * GIB) - SYSTEM_BYTES, 0),
        disk_bytes=round(disk_gb * 1e9),
        link=link if len(cards) > 1 else "none",
        offload_bytes_per_second=offload_rate(capability if cards else None),
        cpu_has_bf16=False,
    )


def offload_rate(capability: tuple[int, int] | None) -> float:
    """Return the bytes per second from pinned RAM to a card: those of the bus that cards of its age have."""
    if capability is None:
        return _OFFLOAD_ELSEWHERE
    if capability < (8, 0):
        return _OFFLOAD_BEFORE_AMPERE
    known = [at for at in OFFLOAD_BYTES_PER_SECOND if at <= capability]
    return OFFLOAD_BYTES_PER_SECOND[max(known)] if known else _OFFLOAD_ELSEWHERE


def _have_peer_access(count: int) -> bool:
    import torch

    return all(torch.cuda.can_device_access_peer(0, other) for other in range(1, count))


def _link_of(name: str) -> Link:
    """Guess the link of cards that reach each other's memory: torch does not tell NVLink from PCIe."""
    has_nvlink = any(word in name for word in ("SXM", "HBM3", "H100", "H200", "B200", "GB200"))
    return "nvlink" if has_nvlink and "PCIe" not in name and "NVL" not in name else "pcie"

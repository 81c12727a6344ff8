"""A machine is measured where it is, and described by what it is sold as."""

import pytest
import torch

from pusa import resources
from pusa.acceleration.machine import described_machine, machine

GIB = 2**30


def test_this_machine_is_measured() -> None:
    found = machine()
    assert len(found.cards) == torch.cuda.device_count()
    assert 0 < found.ram_bytes <= resources.psutil.virtual_memory().total + resources.psutil.swap_memory().total
    assert found.disk_bytes > 0
    assert found.cpu_has_bf16 == resources.is_bf16_fast("cpu")


def test_a_container_s_limit_is_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "free_memory_bytes", lambda: 3 * GIB)
    assert machine().ram_bytes == 3 * GIB


def test_cards_are_measured_by_what_is_free_on_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: ((20 + index) * GIB, 48 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA RTX A6000")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 6))
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: True)
    found = machine()
    assert [card.memory_bytes for card in found.cards] == [20 * GIB, 21 * GIB]
    assert found.cards[0].capability == (8, 6)
    assert found.link == "pcie"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100 80GB HBM3")
    assert machine().link == "nvlink"


def test_a_card_of_24_gb_has_24_gib_less_what_cuda_takes() -> None:
    found = described_machine(gpu_gb=24, count=2, ram_gb=64, capability=(8, 9))
    assert len(found.cards) == 2
    assert 22.5 * GIB < found.cards[0].memory_bytes < 23.5 * GIB
    assert 61 * GIB < found.ram_bytes < 64 * GIB
    assert found.link == "pcie"
    assert described_machine(gpu_gb=0).cards == ()
    assert described_machine(gpu_gb=24).link == "none"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gpu_gb": -1}, "gpu_gb=-1 is below 0"),
        ({"gpu_gb": 24, "ram_gb": -2}, "ram_gb=-2 is below 0"),
        ({"gpu_gb": 24, "count": 0}, "count=0 is below 1: .*gpu_gb=0"),
    ],
)
def test_impossible_machines_are_errors(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        described_machine(**values)

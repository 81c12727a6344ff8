"""Estimate how fast a model denoises on a card: documented rates, not measurements of this machine.

Only ratios leave this module as `Plan.relative_speed`; whether a copy hides behind computing depends on the rates
themselves. Nothing here imports torch.
"""

from dataclasses import dataclass

from pusa.acceleration.decisions import Machine, Storage

# Operations per second that long sequences of Wan reach in bf16, by compute capability: from published times of RTX
# A6000, RTX 4090 and H100; the others are scaled by their data sheets.
_RATES = {
    (7, 0): 15e12,
    (8, 0): 220e12,
    (8, 6): 90e12,
    (8, 9): 130e12,
    (9, 0): 550e12,
    (10, 0): 1100e12,
    (12, 0): 190e12,
}
_CPU_RATE = 0.5e12
# Linear layers alone, of quantised weights and inputs against bf16. Attention stays in bf16.
_FP8_GAIN = {(8, 9): 3.0, (9, 0): 1.7, (10, 0): 1.8, (12, 0): 2.0}
_INT8_GAIN = {(7, 5): 1.6, (8, 0): 1.6, (8, 6): 1.6, (8, 9): 1.8, (9, 0): 1.5}
UNMERGED = 1.2  # time of a forward with an adapter of rank 0.1 * width, against without
_CAST = 1.03  # weights are cast to bf16 for each forward
_GGUF_CAST = 1.15
_LEAVES = 1.1  # copies of single layers wait for each other
DISK_BYTES_PER_SECOND = 2e9
_LINK_BYTES_PER_SECOND = {"none": 10e9, "pcie": 10e9, "nvlink": 150e9}
_SEQUENCE_EFFICIENCY = {"none": 0.75, "pcie": 0.75, "nvlink": 0.92}  # of each further card that shares the tokens
_GUIDANCE_EFFICIENCY = 0.97


@dataclass(frozen=True)
class Work:
    """One forward pass on one rank of a parallel group, and the bytes that it has to move.

    Attributes:
        linear, attention: operations of the whole pass.
        streamed_bytes: weights that are copied to the card for each pass.
        gathered_bytes: weights that come from other cards for each pass.
        swapped_bytes: weights that are copied once per video.
        passes: forward passes of a video, on a rank.
    """

    linear: float
    attention: float
    streamed_bytes: int = 0
    from_disk: bool = False
    by_leaf: bool = False
    gathered_bytes: int = 0
    swapped_bytes: int = 0
    passes: int = 20
    sequence: int = 1
    guidance: int = 1

    @property
    def ranks(self) -> int:
        return self.sequence * self.guidance


def rate_of(capability: tuple[int, int] | None) -> float:
    """Return the operations per second in bf16 of a card, or of a CPU (None)."""
    if capability is None:
        return _CPU_RATE
    return _RATES[max((known for known in _RATES if known <= capability), default=(7, 0))]


def gain_of(storage: Storage, capability: tuple[int, int] | None) -> float:
    """Return how much faster linear layers compute from a storage than from bf16; 1 where they only cast."""
    gains = {"fp8": _FP8_GAIN, "int8": _INT8_GAIN}.get(storage, {})
    known = [at for at in gains if capability is not None and at <= capability]
    return gains[max(known)] if known else 1.0


def relative_speed(
    work: Work,
    machine: Machine,
    capability: tuple[int, int] | None,
    storage: Storage,
    *,
    merged: bool,
    in_8_bits: bool,
) -> float:
    """Compute denoising steps per second relative to one such card with all weights resident in bf16, merged.

    A copy costs nothing as long as it takes less time than the computing that it hides behind. Reading from disk hides
    behind nothing.

    Args:
        merged: no adapter is attached.
        in_8_bits: quantised layers multiply in 8 bits; otherwise their weights are cast to bf16.
    """
    rate = rate_of(capability)
    resident = (work.linear + work.attention) / rate
    gain = gain_of(storage, capability) if in_8_bits else 1.0
    computing = (work.linear / gain + work.attention) / rate
    if storage in ("fp8", "int8") and gain == 1:
        computing *= _CAST
    if storage == "gguf":
        computing *= _GGUF_CAST
    if not merged:
        computing *= UNMERGED
    computing /= 1 + (work.sequence - 1) * _SEQUENCE_EFFICIENCY[machine.link]
    copying = work.gathered_bytes / _LINK_BYTES_PER_SECOND[machine.link]
    if work.from_disk:
        computing += work.streamed_bytes / DISK_BYTES_PER_SECOND * work.ranks
    elif work.streamed_bytes:
        copying += work.streamed_bytes / machine.offload_bytes_per_second
        computing *= _LEAVES if work.by_leaf else 1.01
    swapping = work.swapped_bytes / machine.offload_bytes_per_second / work.passes
    seconds = max(computing, copying) + swapping
    if work.guidance == 2:
        seconds /= 2 * _GUIDANCE_EFFICIENCY
    return resident / seconds

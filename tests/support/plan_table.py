"""Describe the machines and models of the tests of planning, and write the table of their plans."""

from collections.abc import Iterator
from functools import cache
from typing import Literal

from pusa import zoo
from pusa.acceleration.decisions import LoadOptions, Machine, Plan, Wish
from pusa.acceleration.machine import described_machine
from pusa.acceleration.planning import plans

TI2V_5B = zoo.get("wan2.2-ti2v-5b")
MODELS = {
    **{name: zoo.get(name) for name in ("wan2.1-1.3b", "wan2.1-14b", "wan2.2-a14b")},
    "ti2v-5b": TI2V_5B,
    "pusa-v0.5": zoo.get("pusa-v0.5"),
}
SIZES = {"480p": (832, 480, 81), "720p": (1280, 704, 81), "163 frames": (848, 480, 163)}
# How many cards of which memory, and their compute capability: an RTX 3060 Ti, 3060, 4060 Ti, 4090, 5090, A6000, ...
CARDS = {
    "1x8": (8, 6),
    "1x12": (8, 6),
    "1x16": (8, 9),
    "1x24": (8, 9),
    "1x32": (12, 0),
    "1x48": (8, 6),
    "1x80": (9, 0),
    "1x141": (9, 0),
    "2x24": (8, 9),
    "2x48": (8, 6),
    "4x48": (8, 6),
    "8x80": (9, 0),
}
RAM = (16, 32, 64, 128, 256)
_SHORT = {"bfloat16": "bf16", "float32": "fp32"}


def sizes_of(model: str) -> tuple[str, ...]:
    return ("163 frames",) if model == "pusa-v0.5" else ("480p", "720p")


def machine_of(cards: str, ram: int, capability: tuple[int, int] | None = None) -> Machine:
    """Describe a machine such as "2x48" with RAM in GB."""
    count, memory = map(int, cards.split("x"))
    link: Literal["nvlink", "pcie"] = "nvlink" if count == 8 else "pcie"
    return described_machine(
        gpu_gb=memory, count=count, ram_gb=ram, capability=capability or CARDS[cards], link=link, disk_gb=500
    )


@cache
def plans_of(model: str, size: str, cards: str, ram: int, wish: Wish) -> list[Plan]:
    return plans(MODELS[model], size=SIZES[size], machine=machine_of(cards, ram), options=LoadOptions(memory=wish))


def plan_of(model: str, size: str, cards: str, ram: int, wish: Wish = "balanced") -> Plan:
    return plans_of(model, size, cards, ram, wish)[0]


def cell(found: Plan) -> str:
    """Describe a plan in a few words: storage and offloading, tiles, how cards share the work."""
    if found.problem:
        return "-"
    transformer = found.parts["transformer"]
    words = [_SHORT.get(transformer.storage, transformer.storage)]
    words += [transformer.offload] * (transformer.offload != "none")
    words += ["tiles"] * found.parts["vae"].tiles
    parallel = found.parallel
    words += [f"g{parallel.guidance}"] * (parallel.guidance > 1) + [f"u{parallel.ulysses}"] * (parallel.ulysses > 1)
    words += ["shard"] * parallel.shard
    if "transformer_2" in found.parts and found.parts["transformer_2"].card:
        words.append("apart")
    return "-".join(words)


def table() -> Iterator[str]:
    """Yield the lines of plans.txt."""
    for model in MODELS:
        for size in sizes_of(model):
            plans = {(cards, ram): plan_of(model, size, cards, ram) for cards in CARDS for ram in RAM}
            merged = {found.merge for found in plans.values() if not found.problem}
            assert len(merged) == 1
            yield f"{model} {size}, {'LoRA merged' if merged.pop() else 'no LoRA'}"
            yield "cards " + "".join(f"{f'{ram} GB':<20}" for ram in RAM).rstrip()
            for cards in CARDS:
                yield f"{cards:<6}" + "".join(f"{cell(plans[cards, ram]):<20}" for ram in RAM).rstrip()
            yield ""

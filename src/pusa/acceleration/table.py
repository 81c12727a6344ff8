"""Make the table of docs/on_your_card.md: how the models run on common cards."""

from collections.abc import Iterator

from pusa import zoo
from pusa.acceleration.decisions import Link, LoadOptions, Plan, Wish
from pusa.acceleration.machine import described_machine
from pusa.acceleration.planning import plan

# Cards as people buy them: what it says on the box, how many, memory of one, RAM beside them, compute capability.
_MACHINES = (
    ("8 GB (RTX 3060 Ti)", 1, 8, 64, (8, 6)),
    ("12 GB (RTX 3060)", 1, 12, 64, (8, 6)),
    ("16 GB (RTX 4080)", 1, 16, 32, (8, 9)),
    ("", 1, 16, 64, (8, 9)),
    ("24 GB (RTX 4090)", 1, 24, 32, (8, 9)),
    ("", 1, 24, 64, (8, 9)),
    ("32 GB (RTX 5090)", 1, 32, 64, (12, 0)),
    ("48 GB (RTX A6000)", 1, 48, 64, (8, 6)),
    ("80 GB (H100)", 1, 80, 128, (9, 0)),
    ("141 GB (H200)", 1, 141, 128, (9, 0)),
    ("2 x 24 GB (RTX 4090)", 2, 24, 64, (8, 9)),
    ("2 x 48 GB (RTX A6000)", 2, 48, 128, (8, 6)),
    ("4 x 48 GB (RTX A6000)", 4, 48, 256, (8, 6)),
    ("8 x 80 GB (H100)", 8, 80, 512, (9, 0)),
)
_COLUMNS = (
    ("wan2.1-1.3b", (832, 480, 81)),
    ("wan2.2-ti2v-5b", (1280, 704, 121)),
    ("wan2.1-14b", (832, 480, 81)),
    ("wan2.1-14b", (1280, 720, 81)),
    ("wan2.2-a14b", (832, 480, 81)),
    ("wan2.2-a14b", (1280, 720, 81)),
    ("pusa-v0.5", (848, 480, 163)),
)
_STORAGE = {"bfloat16": "exact", "fp8": "fp8", "int8": "int8"}
_OFFLOAD = {"none": "", "model": " in turns", "blocks": " streamed", "leaves": " streamed", "disk": " from disk"}


def buyers_table(wish: Wish = "balanced") -> str:
    """Return the table in Markdown, a row for each machine and a column for each model and size."""
    columns = [(name, size) for name, size in _COLUMNS if name in zoo.ZOO]
    heads = ["cards", "RAM", *(f"{name} {width}x{height}" for name, (width, height, _) in columns)]
    return "\n".join([_row(heads), _row(["---"] * len(heads)), *map(_row, _rows(columns, wish))])


def _rows(columns: list[tuple[str, tuple[int, int, int]]], wish: Wish) -> Iterator[list[str]]:
    for title, count, memory, ram, capability in _MACHINES:
        link: Link = "nvlink" if count == 8 else "pcie"
        machine = described_machine(
            gpu_gb=memory,
            count=count,
            ram_gb=ram,
            capability=capability,
            link=link,
        )
        plans = [plan(name, size=size, machine=machine, options=LoadOptions(memory=wish)) for name, size in columns]
        yield [title or "the same", f"{ram} GB", *map(_cell, plans)]


def _cell(found: Plan) -> str:
    if found.problem:
        return "no"
    transformer = found.parts["transformer"]
    return f"{_STORAGE[transformer.storage]}{_OFFLOAD[transformer.offload]}, {found.relative_speed:.2f}"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"

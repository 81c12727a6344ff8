"""Define the items of a run: each is one video to make, with its request, its name and its labels."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pusa.evaluation.runs.cut import Cut
from pusa.request import GenerationRequest, stored_request

SUFFIX = ".mp4"
_MAX_NAME_BYTES = 255 - len(SUFFIX)


@dataclass(frozen=True)
class Item:
    """Hold one video of a run.

    Attributes:
        name: of its file, without folder and suffix; unique in the run: ``a cat on a bench-0``.
        request: what makes it. Its seed is set, so that the video can be made again.
        labels: what scoring and reports need to know of it, as JSON.
        cut: the frames that are kept of what the request makes; None: all.

    Raises:
        ValueError: the name is no name of a file, or the request has no seed.
    """

    name: str
    request: GenerationRequest
    labels: Mapping[str, Any] = field(default_factory=dict)
    cut: Cut | None = None

    def __post_init__(self) -> None:
        if not self.name or self.name.startswith(".") or set(self.name) & {"/", "\\", "\0", "\n"}:
            raise ValueError(f"{self.name[:80]!r} is no name of a file: leave out slashes and a dot at the beginning")
        if len(self.name.encode()) > _MAX_NAME_BYTES:
            raise ValueError(f"{self.name[:40]!r}... has more than {_MAX_NAME_BYTES} bytes: shorten it")
        if self.request.seed is None:
            raise ValueError(f"{self.name!r} has no seed: set one, such as seed_of(0, name)")

    @cached_property
    def id(self) -> str:
        """Name the item by 16 hexadecimal digits: a hash of its name, the same in every run."""
        return hashlib.sha256(self.name.encode()).hexdigest()[:16]

    def as_json(self) -> dict[str, Any]:
        """Convert to plain JSON."""
        request = self.request.model_dump(mode="json", exclude_defaults=True)
        cut = {} if self.cut is None else {"cut": self.cut.as_json()}
        return {"name": self.name, "request": request, "labels": dict(self.labels), **cut}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Item":
        """Read what `as_json` made. Raises ValueError."""
        return cls(values["name"], stored_request(values["request"]), values["labels"], Cut.of_json(values.get("cut")))


def seed_of(base_seed: int, *parts: str | int) -> int:
    """Derive a seed, 0..2**31 - 1, from a run's seed and what tells an item from others (a prompt, a number).

    It is the same on every machine and in every version of Python.
    """
    text = json.dumps([base_seed, *parts], ensure_ascii=False)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def shard_of(item: Item, count: int) -> int:
    """Return which of `count` shards, from 1 on, an item belongs to; other items of the run do not matter."""
    return int(item.id, 16) % count + 1

"""Hold several tensors of one length as the columns of a table."""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor


class Columns:
    """Index and join dataclasses whose fields are tensors, or further `Columns`, of one length."""

    def __len__(self) -> int:
        return len(next(iter(vars(self).values())))

    def __getitem__(self, chosen: Tensor | slice) -> Self:
        return type(self)(**{name: column[chosen] for name, column in vars(self).items()})

    def to(self, device: torch.device | str) -> Self:
        return type(self)(**{name: column.to(device) for name, column in vars(self).items()})

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Join the rows of tables of tensors."""
        return cls(**{name: torch.cat([vars(part)[name] for part in parts]) for name in vars(parts[0])})

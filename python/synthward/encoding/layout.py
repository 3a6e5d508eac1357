"""The shape of an encoded table: what a generator is told about the columns, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Layout:
    """Sizes of the encoded columns.

    ``token_sizes[j]`` is the number of tokens of token column ``j``; ``continuous`` is the number of
    normal-score columns; ``contexts`` is the number of values of the conditioning variable (how many
    records the privacy unit has, in classes); ``label`` is the token column of the declared label or None.
    ``presence[k]`` is the token column that says whether continuous column ``k`` is present, or -1.
    """

    token_sizes: tuple[int, ...]
    continuous: int
    contexts: int
    label: int | None
    presence: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Number of token columns."""
        return len(self.token_sizes)

    @property
    def vocabulary(self) -> int:
        """Total number of tokens over all token columns."""
        return int(sum(self.token_sizes))

    @property
    def offsets(self) -> np.ndarray:
        """First global token index of each column, int64 [tokens + 1]."""
        return np.concatenate([[0], np.cumsum(np.asarray(self.token_sizes, dtype=np.int64))]).astype(np.int64)

    def to_dict(self) -> dict[str, Any]:
        return {
            "token_sizes": list(self.token_sizes),
            "continuous": self.continuous,
            "contexts": self.contexts,
            "label": self.label,
            "presence": list(self.presence),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Layout:
        return cls(
            token_sizes=tuple(int(v) for v in data["token_sizes"]),
            continuous=int(data["continuous"]),
            contexts=int(data["contexts"]),
            label=None if data["label"] is None else int(data["label"]),
            presence=tuple(int(v) for v in data["presence"]),
        )

"""Record and replay: one run on D, the same run on a neighbour D', and whatever then differs is a leak.

Each charged mechanism shows what it is asked (`tap`), before its noise. A run under `recording()` keeps that; a run
under `recording(replayed=first)` goes on with what the first run asked instead. The noise is a function of key and
counter alone, so that with the same seed each mechanism then answers the second run as it answered the first, bit for
bit. Everything that comes after an answer (parameters, moments, files, control flow) must be equal in the two runs,
and what the mechanisms were asked may differ by no more than the sensitivity that they declare: `differences` says
where it does. The method is that of dp-recorder (PETS 2026, arXiv:2602.17454).

Nothing here is for a run on real keys: a mechanism under a recording refuses to work unless its keys come from a seed,
so that neither can a recording hold what was asked in private, nor a replay stand in for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from synthward.engine.errors import PrivacyError

# float64 [n], or counts by name where which names there are is itself private (categories that are discovered).
Values = NDArray[np.float64] | dict[str, float]
T = TypeVar("T", Tensor, NDArray[np.float64], Mapping[str, float])

NORMS = {"l1": 1, "l2": 2, "linf": math.inf}
# What two sums of the same terms may differ by when their physical batches are not the same, relative to the bound:
# 2 B u per unit of depth (u = 2^-24) for B units of norm at most the bound.
ROUNDING = 1e-4


@dataclass(frozen=True)
class Release:
    """What one charged mechanism was asked.

    Attributes:
        kind: the mechanism.
        values: its input, before noise.
        sensitivity: how far it says that one unit can move the input, in `norm` ("l1", "l2" or "linf").
        public: all else that the mechanism went by; a function of settings and of earlier answers.
    """

    kind: str
    values: Values
    sensitivity: float
    norm: str
    public: dict[str, Any]

    def distance(self, other: Release) -> float:
        """How far apart two inputs lie, in the norm of the sensitivity; infinite for unlike shapes."""
        mine, theirs = self.values, other.values
        if isinstance(mine, dict) and isinstance(theirs, dict):
            names = sorted(mine.keys() | theirs.keys())
            gaps = np.array([mine.get(name, 0.0) - theirs.get(name, 0.0) for name in names])
        elif isinstance(mine, dict) or isinstance(theirs, dict) or mine.shape != theirs.shape:
            return math.inf
        else:
            gaps = (mine - theirs).ravel()
        return float(np.linalg.norm(gaps, NORMS[self.norm])) if gaps.size else 0.0


class Recording:
    """The mechanisms of one run in their order; of a replay, held against those of the run before it."""

    def __init__(self, replayed: Recording | None = None) -> None:
        self.releases: list[Release] = []
        self.replayed = replayed

    def take(self, release: Release) -> Values:
        """Keep what a mechanism was asked; returns what it is to work on.

        Raises:
            PrivacyError: in a replay, if this is not what the first run did at this point.
        """
        self.releases.append(release)
        if self.replayed is None:
            return release.values
        number = len(self.releases)
        if number > len(self.replayed.releases):
            raise PrivacyError(f"replay: mechanism {number} ({release.kind}) was not used in the first run")
        first = self.replayed.releases[number - 1]
        for what in ("kind", "norm", "sensitivity", "public"):
            then, now = getattr(first, what), getattr(release, what)
            if then != now:
                raise PrivacyError(
                    f"replay: mechanism {number} ({first.kind}): its {what} was {then!r} in the first run and is "
                    f"{now!r} now, though all answers before it were the same"
                )
        if math.isinf(first.distance(release)):
            raise PrivacyError(f"replay: mechanism {number} ({first.kind}): its input has another shape now")
        return first.values


_current: ContextVar[Recording | None] = ContextVar("synthward_recording", default=None)


@contextmanager
def recording(replayed: Recording | None = None) -> Iterator[Recording]:
    """Record the charged mechanisms of what runs inside, in this thread; with `replayed`, as a replay of it.

    Raises:
        PrivacyError: keys are not from a seed, or a replay leaves the path of the first run.
    """
    made = Recording(replayed)
    token = _current.set(made)
    try:
        yield made
    finally:
        _current.reset(token)
    if replayed is not None and len(made.releases) < len(replayed.releases):
        missing = replayed.releases[len(made.releases)]
        raise PrivacyError(f"replay: mechanism {len(made.releases) + 1} ({missing.kind}) was not used again")


def tap(kind: str, values: T, *, sensitivity: float, is_private: bool, norm: str = "l2", **public: Any) -> T:
    """What a charged mechanism is to work on: `values`, unless a replay is under way.

    To be called once per release, before noise. A tensor is overwritten in place by a replay.

    Args:
        kind: name of the mechanism.
        values: its input: Tensor, float64 array, or a mapping of names to counts.
        sensitivity: L2 (or `norm`) change of `values` when one unit is added or removed.
        is_private: whether the mechanism's keys are from the operating system.
        public: settings that the release depends on besides.

    Raises:
        PrivacyError: a recording is under way and the keys are private.
    """
    record = _current.get()
    if record is None:
        return values
    if is_private:
        raise PrivacyError(
            "recording: the keys of this run are from the operating system; record and replay need keys from a seed"
        )
    taken = record.take(Release(kind, _copy(values), float(sensitivity), norm, public))
    if record.replayed is None:
        return values
    if isinstance(values, Tensor):
        assert not isinstance(taken, dict)
        with torch.no_grad():
            return values.copy_(torch.from_numpy(taken))
    return cast(T, taken.copy())


def differences(first: Recording, second: Recording, *, rounding: float = ROUNDING) -> list[str]:
    """Where what was asked of two neighbours differs by more than was declared, one line each; empty if nowhere.

    Args:
        rounding: allowed beyond the sensitivity, relative to it.
    """
    found: list[str] = []
    if len(first.releases) != len(second.releases):
        found.append(f"{len(first.releases)} mechanisms were used, then {len(second.releases)}")
    for number, (one, two) in enumerate(zip(first.releases, second.releases, strict=False), 1):
        if (one.kind, one.sensitivity, one.norm, one.public) != (
            two.kind,
            two.sensitivity,
            two.norm,
            two.public,
        ):
            found.append(f"mechanism {number}: {one.kind} and {two.kind} are not the same")
            continue
        moved = one.distance(two)
        if not moved <= one.sensitivity * (1.0 + rounding):
            found.append(
                f"mechanism {number} ({one.kind}): moved by {moved:.6g} ({one.norm}), declared {one.sensitivity:.6g}"
            )
    return found


def _copy(values: Tensor | NDArray[np.float64] | Mapping[str, float]) -> Values:
    if isinstance(values, Tensor):
        return values.detach().cpu().double().numpy().copy()
    if isinstance(values, Mapping):
        return {str(name): float(count) for name, count in values.items()}
    return np.array(values, dtype=np.float64)

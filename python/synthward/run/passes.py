"""The passes of a training run over its physical batches: as they are, or recorded (on a GPU).

A recording holds operations and no numbers, so the random numbers of a batch are drawn before it: in the order in which
the losses asked for them the first time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from synthward.engine import PrivateTrainer
from synthward.engine.compiled import CompiledPass
from synthward.generators.base import Batch, Generator
from synthward.generators.randomness import Randomness


@dataclass(frozen=True)
class _Request:
    kind: str
    rows: int
    width: int


class _Noting:
    """Passes requests on and notes them."""

    def __init__(self, random: Randomness) -> None:
        self._random = random
        self.requests: list[_Request] = []

    def uniform(self, rows: int, k: int) -> Tensor:
        self.requests.append(_Request("uniform", rows, k))
        return self._random.uniform(rows, k)

    def normal(self, rows: int, k: int) -> Tensor:
        self.requests.append(_Request("normal", rows, k))
        return self._random.normal(rows, k)


class _Drawn:
    """Gives out what was drawn beforehand, if it is asked for in the same order."""

    def __init__(self, requests: list[_Request], values: tuple[Tensor, ...]) -> None:
        self._rest: Iterator[tuple[_Request, Tensor]] = iter(zip(requests, values, strict=True))

    def uniform(self, rows: int, k: int) -> Tensor:
        return self._next(_Request("uniform", rows, k))

    def normal(self, rows: int, k: int) -> Tensor:
        return self._next(_Request("normal", rows, k))

    def _next(self, asked: _Request) -> Tensor:
        found, value = next(self._rest, (None, None))
        if found != asked or value is None:
            raise RuntimeError(f"losses asked for {asked} where they had asked for {found} before")
        return value


class Passes:
    """Takes the passes of one generator's private training.

    Args:
        is_recorded: whether they are recorded; else each runs as it is.
    """

    def __init__(self, trainer: PrivateTrainer, generator: Generator, *, is_recorded: bool) -> None:
        self._trainer, self._generator = trainer, generator
        # By rows of the batch.
        self._requests: dict[int, list[_Request]] = {}
        self._run: CompiledPass | None = None
        if is_recorded:
            self._run = trainer.compile(
                self._losses, rows_per_unit=generator.rows_per_unit, fixed=_tensors_of(generator)
            )

    def take(self, batch: Batch, mask: Tensor, random: Randomness, *, is_last: bool) -> None:
        """One pass over a physical batch of static size."""
        rows = len(batch.context)
        if self._run is None or rows not in self._requests:
            self._take_as_it_is(batch, mask, random, is_last=is_last)
            return
        values = [getattr(random, r.kind)(r.rows, r.width) for r in self._requests[rows]]
        self._run(batch.context, batch.tokens, batch.scores, *values, unit_mask=mask, is_last=is_last)

    def _take_as_it_is(self, batch: Batch, mask: Tensor, random: Randomness, *, is_last: bool) -> None:
        noting = _Noting(random)
        with self._trainer.capture():
            losses = self._generator.unit_losses(batch, noting)
        self._requests[len(batch.context)] = noting.requests
        self._trainer.backward(
            losses, rows_per_unit=self._generator.rows_per_unit, unit_mask=mask, is_last=is_last
        )

    def _losses(self, context: Tensor, tokens: Tensor, scores: Tensor, *values: Tensor) -> Tensor:
        drawn = _Drawn(self._requests[len(context)], values)
        return self._generator.unit_losses(Batch(tokens, scores, context), drawn)


def _tensors_of(generator: Generator) -> list[Tensor]:
    """What a generator's losses read beside the batch: tables of its layout, networks that see no records."""
    found: list[Tensor] = []
    for value in vars(generator).values():
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, nn.Module) and value is not generator.private_module:
            found += [*value.parameters(), *value.buffers()]
    return found

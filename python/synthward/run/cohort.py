"""Rows of a cohort: drawn from a generator, decoded to typed columns, and held to the schema's constraints."""

from __future__ import annotations

import numpy as np
import torch

from synthward.data import enforce_constraints
from synthward.encoding import TableEncoder, TokenCoder
from synthward.engine.errors import ConfigError
from synthward.generators import Generator
from synthward.run.where import Where
from synthward.schema import Schema

# Rows are made in chunks; each depends on (seed, chunk) alone, so that a resumed cohort is the same cohort.
CHUNK_ROWS = 8192
MAX_BARREN_ROUNDS = 40


class CohortSampler:
    """Draws typed columns from a trained generator, under conditions if there are any."""

    def __init__(
        self, schema: Schema, encoder: TableEncoder, generator: Generator, where: Where | None = None
    ) -> None:
        self.schema, self.encoder, self.generator, self.where = schema, encoder, generator, where
        self.allowed_levels = where.allowed_levels() if where else {}
        self.allowed_tokens: dict[int, torch.Tensor] = {}
        coders = [c for c in encoder.coders if isinstance(c, TokenCoder)]
        for column, coder in enumerate(coders):
            levels = self.allowed_levels.get(coder.name)
            if levels is not None and len(levels) == len(coder.group):
                tokens = coder.allowed_tokens(levels)
                if not tokens.any():
                    raise ConfigError(
                        f"--where: the generator never draws such a value of column {coder.name!r}"
                    )
                self.allowed_tokens[column] = torch.from_numpy(tokens)
        mass = torch.from_numpy(encoder.context_mass)
        self.context_mass = (mass * generator.context_weights(self.allowed_tokens).double()).numpy()

    def chunk(self, seed: int, index: int, rows: int = CHUNK_ROWS) -> dict[str, np.ndarray]:
        """The columns of one chunk of exactly ``rows`` rows, a function of (seed, index) alone."""
        rng = np.random.default_rng([seed, index])
        torch_rng = torch.Generator().manual_seed(int(rng.integers(2**62)))
        pieces: list[dict[str, np.ndarray]] = []
        found = barren = 0
        while found < rows:
            columns = self._draw(rows, rng, torch_rng)
            if self.where is not None:
                held = self.where.holds(columns)
                columns = {name: values[held] for name, values in columns.items()}
            got = len(next(iter(columns.values())))
            barren = 0 if got else barren + 1
            if barren >= MAX_BARREN_ROUNDS:
                raise ConfigError(
                    f"--where: none of {barren * rows} sampled rows satisfied it; the condition is too rare"
                )
            pieces.append(columns)
            found += got
        return {name: np.concatenate([p[name] for p in pieces])[:rows] for name in pieces[0]}

    def _draw(self, rows: int, rng: np.random.Generator, torch_rng: torch.Generator) -> dict[str, np.ndarray]:
        share = self.context_mass / self.context_mass.sum()
        context = torch.from_numpy(rng.choice(len(share), size=rows, p=share).astype(np.int64))
        tokens, scores = self.generator.sample(context, torch_rng, self.allowed_tokens or None)
        honoured = self.allowed_levels if self.generator.honours_conditions else {}
        columns = self.encoder.decode(self.schema, tokens.numpy(), scores.numpy(), rng, honoured)
        return enforce_constraints(self.schema, columns)

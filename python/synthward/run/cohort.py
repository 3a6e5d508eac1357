"""Rows of a cohort: drawn from a generator, decoded to typed columns, and held to the schema's constraints."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import torch

from synthward.data import enforce_constraints, to_arrow
from synthward.encoding import TableEncoder, TokenCoder
from synthward.engine.device import CPU, copy_to, use_device
from synthward.engine.draws import Draws, sampling_key
from synthward.engine.errors import ConfigError
from synthward.generators import Generator
from synthward.run.where import Where
from synthward.schema import Schema

# Rows are made in chunks; each depends on (seed, chunk) alone, so that a cohort is the same whoever makes which part of
# it. This many stay near the core that works on them.
CHUNK_ROWS = 4096
MAX_BARREN_ROUNDS = 40


class CohortSampler:
    """Draws typed columns from a trained generator, where that is, under conditions if there are any."""

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
                self.allowed_tokens[column] = torch.from_numpy(tokens).to(generator.device)
        mass = torch.from_numpy(encoder.context_mass)
        weights = generator.context_weights(self.allowed_tokens).cpu()
        self.context_mass = (mass * weights.double()).numpy()

    def chunk(self, seed: int, index: int, rows: int = CHUNK_ROWS) -> dict[str, np.ndarray]:
        """The first ``rows`` rows of a chunk, and of those after it if there are more, a function of (seed, index).

        Without a condition row n of the cohort, the first being ``index * CHUNK_ROWS``, depends on (seed, n) alone.
        With one, each round draws candidates for the whole chunk, and those that satisfy it follow each other.
        """
        key, first = sampling_key(seed), index * CHUNK_ROWS
        batch = rows if self.where is None else max(rows, CHUNK_ROWS)
        pieces: list[dict[str, np.ndarray]] = []
        found = barren = tries = 0
        while found < rows:
            columns = self._draw(batch, Draws(key, step=tries, first=first))
            tries += 1
            if self.where is not None:
                held = self.where.holds(columns)
                columns = {name: values[held] for name, values in columns.items()}
            got = len(next(iter(columns.values())))
            barren = 0 if got else barren + 1
            if barren >= MAX_BARREN_ROUNDS:
                raise ConfigError(
                    f"--where: none of {barren * batch} sampled rows satisfied it; the condition is too rare"
                )
            pieces.append(columns)
            found += got
        return {name: np.concatenate([p[name] for p in pieces])[:rows] for name in pieces[0]}

    def batches(self, seed: int, first: int, end: int) -> Iterator[pa.RecordBatch]:
        """Rows ``first`` to ``end`` of the cohort in order, at most a chunk in each batch.

        As many threads as torch has work on a chunk each, ahead of what is taken by a chunk at most: memory does not
        depend on the number of rows.
        """
        workers = torch.get_num_threads()
        starts = iter(range(first - first % CHUNK_ROWS, end, CHUNK_ROWS))
        pool = ThreadPoolExecutor(workers, initializer=_begin_thread, initargs=(self.generator.device,))
        ahead: deque[Future[pa.RecordBatch]] = deque()
        try:
            for start in starts:
                ahead.append(pool.submit(self._batch, seed, start, first, end))
                if len(ahead) > workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
            # A thread's setting is also the one that later threads begin with.
            torch.set_num_threads(workers)

    def _batch(self, seed: int, start: int, first: int, end: int) -> pa.RecordBatch:
        columns = self.chunk(seed, start // CHUNK_ROWS, min(CHUNK_ROWS, end - start))
        return to_arrow(
            self.schema, {name: values[max(first - start, 0) :] for name, values in columns.items()}
        )

    @torch.inference_mode()
    def _draw(self, rows: int, draws: Draws) -> dict[str, np.ndarray]:
        cumulated = np.cumsum(self.context_mass)
        place = draws.uniform(rows, 1).double().numpy()[:, 0] * cumulated[-1]
        context = torch.from_numpy(np.searchsorted(cumulated[:-1], place, side="right"))
        device = self.generator.device
        tokens, scores = self.generator.sample(
            copy_to(context, device), draws.to(device), self.allowed_tokens or None
        )
        draws.to(CPU)
        honoured = self.allowed_levels if self.generator.honours_conditions else {}
        within = draws.uniform(rows, tokens.shape[1]).numpy()
        columns = self.encoder.decode(
            self.schema, tokens.cpu().numpy(), scores.cpu().numpy(), within, honoured
        )
        return enforce_constraints(self.schema, columns)


def _begin_thread(device: torch.device) -> None:
    torch.set_num_threads(1)
    use_device(device)

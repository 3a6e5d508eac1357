"""One-run audits of a whole generator (Steinke, Nasr and Jagielski 2023): who took part, told from what came out.

Each unit that is guessed about was included by an independent fair coin. In a finished run the coin is the split of
held-out units (a keyed hash of each unit's own id), thinned until it is fair; in a run made for the audit it is drawn
for canaries: records without sense, uniform over the declared values, that nothing else in the data explains. The
score is the loss of the released network where it gives one, else the distance to the nearest sample.

Both attack from outside and average over what training does, so that they find a small part of epsilon; a bound of
zero is the usual answer, and shows nothing. Real records take part: for their custodian's eyes only.
"""

from __future__ import annotations

import secrets
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from synthward.audit.bounds import GUESSED, best_one_run, f_dp_epsilon, one_run_epsilon
from synthward.audit.membership import MOST_UNITS, Distances, Floats, as_records, unit_distances
from synthward.data import Records
from synthward.encoding import TableEncoder
from synthward.engine import KeySchedule, Ledger
from synthward.engine.errors import ConfigError
from synthward.generators import Batch, DiffusionGenerator, Generator
from synthward.progress import NullProgress
from synthward.run import RunFolder
from synthward.run.cohort import CHUNK_ROWS, CohortSampler
from synthward.run.fit import train_run
from synthward.schema import Schema

#: Canary records of one run.
CANARIES = 1000
_SAMPLES = 2 * CHUNK_ROWS
# Draws of time and noise over which a unit's loss is averaged.
_LOSS_DRAWS = 16


@dataclass(frozen=True)
class OneRun:
    """Scores of units that were included by fair coins, larger where inclusion is likelier."""

    included: NDArray[np.bool_]
    scores: Floats

    def bounds(self, delta: float, significance: float) -> dict[str, float]:
        """Lower bounds on epsilon: `one_run` for any mechanism, `one_run_f_dp` for Gaussian-DP ones."""
        found = {}
        for name, bound in (("one_run", one_run_epsilon), ("one_run_f_dp", f_dp_epsilon)):
            few = len(self.scores) < len(GUESSED)
            found[name] = (
                0.0 if few else best_one_run(self.included, self.scores, delta, significance, bound=bound)
            )
        return found


def audit_split(
    folder: RunFolder, train: Records, others: Records, cohort: Records, rng: np.random.Generator
) -> OneRun:
    """A finished run against its own split: were these units trained on or held out?"""
    share = float(folder.info["holdout"]["fraction"])
    if not 0.0 < share < 1.0:
        raise ConfigError(f"{folder.path}: held no units out, so that there is nothing to tell apart")
    # Each unit was held out with probability `share`; keeping some of the likelier side makes the coin fair.
    keep = (min(1.0, share / (1.0 - share)), min(1.0, (1.0 - share) / share))
    expected = keep[0] * train.num_units + keep[1] * others.num_units
    keep = (keep[0] * min(1.0, MOST_UNITS / expected), keep[1] * min(1.0, MOST_UNITS / expected))
    encoder = folder.load_encoder()
    generator = folder.load_generator(encoder)
    parts = []
    for records, kept in zip((train, others), keep, strict=True):
        chosen = records.select_units(rng.random(records.num_units) < kept)
        parts.append(score_units(generator, encoder, chosen, cohort, rng))
    included = np.r_[np.ones(len(parts[0]), dtype=bool), np.zeros(len(parts[1]), dtype=bool)]
    return OneRun(included, np.concatenate(parts))


def audit_canaries(
    folder: RunFolder, train: Records, rng: np.random.Generator, count: int = CANARIES
) -> tuple[OneRun, float]:
    """A run as `folder` records it, on `train` and half of `count` canaries; its scores, and what it claims.

    The run is made in a temporary folder, on keys of its own, and is deleted.
    """
    schema, info = folder.schema, folder.info
    canaries = random_records(schema, count, rng)
    included = rng.random(count) < 0.5
    keys = KeySchedule.from_os()
    with tempfile.TemporaryDirectory(prefix="synthward-audit-") as place:
        run_id = secrets.token_hex(8)
        fresh = {"run_id": run_id, "status": "started", "seed": None, "private": True}
        fresh |= {"budget_id": None, "ledger_head": None}
        made = RunFolder.create(Path(place) / "run", {**info, **fresh}, schema)
        ledger = Ledger.create(
            made.ledger_path,
            run_id=run_id,
            unit=info["unit"],
            delta=info["delta"],
            key_id=keys.key_id,
            private=True,
            target_epsilon=info["epsilon"],
            accountant=info["accountant"],
        )
        train_run(made, joined(train, canaries.select_units(included)), keys, ledger, NullProgress())
        with Ledger.open(made.ledger_path, readonly=True) as spent:
            claimed = spent.epsilon()
        encoder = made.load_encoder()
        generator = made.load_generator(encoder)
        cohort = draw_cohort(schema, encoder, generator, rng)
        return OneRun(included, score_units(generator, encoder, canaries, cohort, rng)), float(claimed)


def draw_cohort(
    schema: Schema, encoder: TableEncoder, generator: Generator, rng: np.random.Generator
) -> Records:
    """Samples to hold records against; sampling is post-processing."""
    sampler, seed = CohortSampler(schema, encoder, generator), int(rng.integers(2**31))
    chunks = [sampler.chunk(seed, index) for index in range(_SAMPLES // CHUNK_ROWS)]
    return as_records(schema, {name: np.concatenate([c[name] for c in chunks]) for name in chunks[0]})


def score_units(
    generator: Generator, encoder: TableEncoder, records: Records, cohort: Records, rng: np.random.Generator
) -> Floats:
    """A score of each unit, larger where the generator seems to know it."""
    if isinstance(generator, DiffusionGenerator):
        return -diffusion_losses(generator, encoder, records, rng)
    distances = Distances(records.schema, cohort)
    return -unit_distances(distances, records, np.arange(records.num_units))[:, 0]


@torch.no_grad()
def diffusion_losses(
    generator: DiffusionGenerator, encoder: TableEncoder, records: Records, rng: np.random.Generator
) -> Floats:
    """Loss of each unit under the averaged network, the one that a run releases, float64 [units].

    Every unit is given the same draws of time and noise: what differs is the unit.
    """
    encoded, draws = encoder.encode(records, rng), generator.settings.draws
    tensors = [torch.from_numpy(a) for a in (encoded.tokens, encoded.scores, encoded.context)]
    first, last = records.unit_offsets[:-1], records.unit_offsets[1:]
    seed = int(rng.integers(2**62))
    released, generator.network = generator.network, generator.averaged
    try:
        losses = np.zeros(records.num_units)
        for unit in range(records.num_units):
            torch_rng = torch.Generator().manual_seed(seed)
            reach = np.arange(_LOSS_DRAWS * draws) % (last[unit] - first[unit])
            rows = torch.from_numpy(first[unit] + reach)
            batch = Batch(*(tensor[rows] for tensor in tensors))
            losses[unit] = float(generator.unit_losses(batch, torch_rng).mean())
    finally:
        generator.network = released
    return losses


def random_records(schema: Schema, count: int, rng: np.random.Generator) -> Records:
    """`count` units of one row, uniform over what the schema declares."""
    columns: dict[str, Any] = {}
    for column in schema.modelled:
        if column.is_discrete:
            columns[column.name] = rng.integers(0, len(column.levels), count).astype(np.int32)
        else:
            assert column.min is not None and column.max is not None
            values = rng.uniform(column.min, column.max, count)
            columns[column.name] = np.rint(values) if column.is_integral else values
    keys = np.array([f"canary-{index:06d}" for index in range(count)])
    return as_records(schema, columns, keys)


def joined(first: Records, second: Records) -> Records:
    """The units of both, those of `first` before those of `second`."""
    keys = [first.unit_keys.astype(np.str_), second.unit_keys.astype(np.str_)]
    return Records(
        first.schema,
        {name: np.concatenate([values, second.columns[name]]) for name, values in first.columns.items()},
        np.concatenate([first.unit_offsets, first.num_rows + second.unit_offsets[1:]]),
        np.concatenate(keys),
        first.report,
    )

"""A generator's training, planned from the schema alone: no record is read."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from synthward.encoding.encoder import CONTEXTS, is_token_column, level_count
from synthward.encoding.layout import Layout
from synthward.engine.errors import ConfigError
from synthward.engine.estimate import Built, Workload
from synthward.generators import Batch, build_generator
from synthward.schema import Schema


def largest_layout(schema: Schema) -> Layout:
    """The encoded table if no two levels shared a token: what the charged query finds has at most as many.

    Raises:
        ConfigError: no column is modelled.
    """
    sizes: list[int] = []
    presence: list[int] = []
    label: int | None = None
    if not schema.modelled:
        raise ConfigError("schema: no column is left to model; remove `exclude` from at least one")
    for column in schema.modelled:
        if is_token_column(column):
            if column.name == schema.label:
                label = len(sizes)
            sizes.append(level_count(column) + int(column.missing))
        elif column.missing:
            presence.append(len(sizes))
            sizes.append(2)
        else:
            presence.append(-1)
    contexts = 1 if schema.unit is None else CONTEXTS
    return Layout(tuple(sizes), len(presence), contexts, label, tuple(presence))


def generator_workload(schema: Schema, name: str, settings: Any) -> Workload:
    """A generator of `name` over the schema's table; `settings` comes from `make_settings`."""
    layout = largest_layout(schema)
    mass = np.full(layout.vocabulary, 1.0 / max(layout.vocabulary, 1))
    rng = torch.Generator()

    def build() -> Built:
        generator = build_generator(name, layout, mass, settings)
        private = generator.private_module
        others = [v for v in vars(generator).values() if isinstance(v, nn.Module) and v is not private]
        return Built(
            private,
            lambda tokens, scores, context: generator.unit_losses(Batch(tokens, scores, context), rng),
            others=others,
        )

    def data(units: int) -> tuple[Tensor, ...]:
        rows = units * records
        return (
            torch.zeros(rows, layout.tokens, dtype=torch.int64),
            torch.zeros(rows, layout.continuous),
            torch.zeros(rows, dtype=torch.int64),
        )

    records, rows_per_unit = _rows(name, settings)
    told = (
        f"{layout.vocabulary} tokens of {layout.tokens} columns: every declared level has one of its own (rare ones "
        "will share some, which the charged query tells)",
        "records in memory, and the steps of networks that see no records, are not counted",
    )
    return Workload(name, build, data, rows_per_unit, told)


def _rows(name: str, settings: Any) -> tuple[int, int]:
    """Records and rows of the network for each unit and step."""
    tiny = Layout((2,), 0, 1, None, ())
    smallest = type(settings)(**{**vars(settings), "hidden": 1})
    generator = build_generator(name, tiny, np.full(2, 0.5), smallest)
    return generator.records_per_unit, generator.rows_per_unit

"""Generators by name, and their settings from plain dictionaries."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

import numpy as np

from synthward.encoding.layout import Layout
from synthward.engine.errors import ConfigError
from synthward.generators.base import Generator
from synthward.generators.diffusion import DiffusionGenerator, DiffusionSettings
from synthward.generators.gan import GanGenerator, GanSettings

GENERATORS: dict[str, tuple[type[Generator], type]] = {
    "diffusion": (DiffusionGenerator, DiffusionSettings),
    "gan": (GanGenerator, GanSettings),
}


def make_settings(name: str, values: dict[str, Any]) -> Any:
    """The settings object of a generator; unknown names and unusable values are a `ConfigError`."""
    if name not in GENERATORS:
        raise ConfigError(f"generator: got {name!r}; choose one of {', '.join(sorted(GENERATORS))}")
    kind = GENERATORS[name][1]
    fields = {f.name: f for f in dataclasses.fields(kind)}
    usable: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {near[0]!r}" if near else f"; known: {', '.join(fields)}"
            raise ConfigError(f"setting {key!r} is not one of generator {name!r}{hint}")
        default: Any = fields[key].default
        try:
            number = type(default)(value)
        except (TypeError, ValueError):
            raise ConfigError(f"setting {key!r}: got {value!r}, expected {type(default).__name__}") from None
        if not number > 0:
            raise ConfigError(f"setting {key!r}: got {value!r}, expected a positive number")
        usable[key] = number
    return kind(**usable)


def build_generator(name: str, layout: Layout, token_mass: np.ndarray, settings: Any) -> Generator:
    """Construct a generator over an encoded table; ``settings`` comes from `make_settings`."""
    return GENERATORS[name][0](layout, token_mass, settings)

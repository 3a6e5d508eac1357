"""Generators of tables: networks that learn an encoded table through the private engine."""

from synthward.generators.base import Batch, Generator
from synthward.generators.diffusion import DiffusionGenerator, DiffusionSettings
from synthward.generators.gan import GanGenerator, GanSettings
from synthward.generators.registry import GENERATORS, build_generator

__all__ = [
    "GENERATORS",
    "Batch",
    "DiffusionGenerator",
    "DiffusionSettings",
    "GanGenerator",
    "GanSettings",
    "Generator",
    "build_generator",
]

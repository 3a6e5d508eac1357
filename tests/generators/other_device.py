"""A device with shapes and no numbers (torch's "meta") in the place of a GPU, and who notices what is not on it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from synthward.encoding.layout import Layout
from synthward.generators import Batch, Generator, build_generator
from synthward.generators.registry import make_settings

META = torch.device("meta")
COPIES = ("copy_", "_to_copy")
LAYOUTS = {
    "mixed": Layout((3, 4, 2), 2, 3, 2, (-1, 1)),
    "tokens": Layout((5, 2), 0, 1, None, ()),
    "scores": Layout((), 2, 2, None, (-1, -1)),
}
SETTINGS = {
    "diffusion": {"hidden": 8, "draws": 2, "sampling_steps": 3},
    "gan": {"hidden": 8, "draws": 2, "latent": 4, "generator_batch": 16},
}


class OneDevice(TorchDispatchMode):
    """No operation inside, copies apart, has tensors of two devices, numbers (without a dimension) of the CPU's apart.

    Reading a number of the other device fails by itself: it has none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [t for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)]
        kinds = {t.device.type for t in given if t.dim() or t.device.type != "cpu"}
        name = func.overloadpacket.__name__
        assert len(kinds) <= 1 or name in COPIES, f"{name} of tensors on {', '.join(sorted(kinds))}"
        self.operations += "meta" in kinds
        return func(*args, **(kwargs or {}))


def make_generator(name: str, layout: str = "mixed") -> Generator:
    shape = LAYOUTS[layout]
    mass = np.full(shape.vocabulary, 0.3)
    return build_generator(name, shape, mass, make_settings(name, SETTINGS[name]))


def make_batch(generator: Generator, units: int, device: torch.device = META) -> Batch:
    layout, rows = generator.layout, units * generator.records_per_unit
    return Batch(
        torch.zeros(rows, layout.tokens, dtype=torch.int64, device=device),
        torch.zeros(rows, layout.continuous, device=device),
        torch.zeros(rows, dtype=torch.int64, device=device),
    )

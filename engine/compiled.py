"""Passes over physical batches of static shape as recorded graphs: no Python between kernels, CUDA graphs on GPUs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from synthward.engine.errors import ConfigError
from synthward.engine.fusing import fused
from synthward.engine.layout import Layout
from synthward.engine.precision import exact_products
from synthward.engine.step import DPStep
from synthward.engine.tracing import LossesOf, TracedPass, trace_pass

logger = logging.getLogger("synthward")
# Recorded passes at once; each has memory of its own on a GPU.
_MOST_SHAPES = 8

# Gives losses and squared norms, as `TracedPass.graph`.
Run = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Given:
    """One physical batch: tensors of its rows, whose they are (None: as many for each), and which units count."""

    batch: tuple[Tensor, ...]
    offsets: Tensor | None = None
    unit_mask: Tensor | None = None
    is_last: bool = False


# Runs the pass as it is and looks at it: whether units mix, and what the engine refuses.
RunAsItIs = Callable[[Given], Tensor]


@dataclass
class _Recorded:
    """What is known of batches of one form. Whose numbers are in the form is held, so that no other object has them."""

    held: list[object]
    calls: int = 0
    traced: TracedPass | None = None
    run: Run | None = None
    graph: _CudaGraph | None = None

    def forget(self) -> None:
        """Begin anew."""
        self.calls, self.traced, self.run, self.graph = 0, None, None, None


class CompiledPass:
    """What `PrivateTrainer.compile` returns: called with a batch, it gives losses [U], detached, and adds the clipped
    gradients to the step, as `capture` and `backward` do.

    The first two passes over batches of a form (shapes, strides, dtypes, device, autocast, training mode, the module's
    layers and their hooks), and the 4th, 8th, 16th, ... are run as they are and looked at. The third is traced by its
    shapes; from then on the recorded operations run, on a GPU as one CUDA graph from the second time on. What the
    losses compute in Python is that of the trace. Where the module holds another tensor than was recorded (a buffer or
    an attribute was replaced, or its memory), passes are counted and recorded anew.

    Guarantees: the same units, norms, factors and sums as of the pass that was traced, with all its checks; no noise
        is recorded: it comes with `apply`, once a step.
    """

    def __init__(
        self,
        step: DPStep,
        losses_of: LossesOf,
        as_it_is: RunAsItIs,
        *,
        rows_per_unit: int | None,
        loss_scale: float,
        fuse: bool,
        fixed: Sequence[Tensor] = (),
    ) -> None:
        self._step, self._losses_of, self._as_it_is, self._fixed = step, losses_of, as_it_is, tuple(fixed)
        self._rows_per_unit, self._scale, self._fuse = rows_per_unit, 1.0 / loss_scale, fuse
        self._recorded: dict[Any, _Recorded] = {}
        self._warned: set[str] = set()

    def __call__(
        self,
        *batch: Tensor,
        offsets: Tensor | None = None,
        unit_mask: Tensor | None = None,
        is_last: bool = False,
    ) -> Tensor:
        """One pass.

        Args:
            batch: what the losses take; without a mask the first axis of the first one is the rows of all units.
            offsets: int64 [U + 1] in CPU memory, where `compile` was given no rows_per_unit; the number of rows is part
                of the form, so padding rows belong to a unit that the mask leaves out.
            unit_mask, is_last: as of `PrivateTrainer.backward`.

        Raises:
            ConfigError: an argument that is no tensor, or rows that are not the units'. Otherwise as
                `PrivateTrainer.backward`.
        """
        for place, value in enumerate(batch):
            if not isinstance(value, Tensor):
                raise ConfigError(
                    f"compile: argument {place} is a {type(value).__name__}; give tensors only, whatever changes from "
                    "batch to batch"
                )
        given = Given(batch, offsets, unit_mask, is_last)
        units = self._units(given)
        recorded = self._of(given, units)
        if recorded is None:
            return self._as_it_is(given)
        if recorded.traced is not None and not recorded.traced.is_current():
            self._warn(
                "the module holds other tensors than were recorded, so that its passes are recorded anew"
            )
            recorded.forget()
        recorded.calls += 1
        # Powers of two, as passes are probed: a path that a gate closes at first may open at any time.
        if recorded.calls & (recorded.calls - 1) == 0:
            return self._as_it_is(given)
        try:
            return self._replay(recorded, given, units)
        except BaseException:
            self._step.is_broken = True
            self._step.drop()
            raise

    def _of(self, given: Given, units: int) -> _Recorded | None:
        device, module = self._step.flat.device.type, self._step.module
        layers, parameters = list(module.modules()), list(module.parameters())
        buffers = list(module.buffers())
        key = (
            units,
            # Strides, since what is contiguous is copied nowhere in a trace.
            tuple((tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in given.batch),
            torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
            tuple((id(layer), layer.training, *_hooks(layer)) for layer in layers),
            tuple((id(p), p.requires_grad) for p in parameters),
            tuple(map(id, buffers)),
        )
        if key not in self._recorded:
            if len(self._recorded) >= _MOST_SHAPES:
                self._warn(
                    f"batches of more than {_MOST_SHAPES} forms; further ones run as they are. Pad physical batches to "
                    "one shape"
                )
                return None
            self._recorded[key] = _Recorded([*layers, *parameters, *buffers])
        return self._recorded[key]

    def _warn(self, what: str) -> None:
        if what not in self._warned:
            logger.warning("compile: %s", what)
        self._warned.add(what)

    def _replay(self, recorded: _Recorded, given: Given, units: int) -> Tensor:
        step = self._step
        mask = self._mask(given.unit_mask, units)
        inputs = given.batch
        if given.offsets is not None:
            inputs = (given.offsets.contiguous().to(step.flat.device, non_blocking=True), *inputs)
        step.flat.check_unchanged(allow_frozen=True)
        step.flat.check_in_place()
        # Forward pass and norms are one graph: both without TF32.
        with exact_products():
            if recorded.traced is None:
                self._record(recorded, inputs, mask, units)
            assert recorded.traced is not None and recorded.run is not None
            constants = recorded.traced.constants
            step.sums.begin_pass(is_last=given.is_last)
            step.has_sum = True
            with torch.no_grad():
                if recorded.graph is None and recorded.calls > 3 and _has_graphs(step.flat.device):
                    recorded.graph = _CudaGraph(recorded.run, constants, step.sums.flat, mask, inputs)
                if recorded.graph is not None:
                    losses = recorded.graph.replay(mask, inputs)
                else:
                    losses, _ = recorded.run(*constants, step.sums.flat, mask, *inputs)
        for position in range(len(step.sums.shapes)):
            step.sums.done(position)
        step.sums.end_pass()
        if step.discrete is not None:
            step.discrete.count(units, recorded.traced.most_rows)
        return losses

    def _units(self, given: Given) -> int:
        rows, offsets = len(given.batch[0]), given.offsets
        if self._rows_per_unit is not None:
            if offsets is not None:
                raise ConfigError("compile: units of rows_per_unit rows have no offsets; give one of both")
            if given.unit_mask is not None:
                # The rows of the batch need not be those of the network (several for each of them).
                return given.unit_mask.numel()
            if rows % self._rows_per_unit:
                raise ConfigError(f"compile: {rows} rows are not {self._rows_per_unit} for each unit")
            return rows // self._rows_per_unit
        if offsets is None or offsets.device.type != "cpu":
            raise ConfigError("compile: without rows_per_unit, give offsets (int64 [U + 1]) in CPU memory")
        layout = Layout.ragged(offsets)
        if layout.num_rows != rows:
            raise ConfigError(f"offsets: describe {layout.num_rows} rows, the batch has {rows}")
        return layout.num_units

    def _mask(self, unit_mask: Tensor | None, units: int) -> Tensor:
        if unit_mask is None:
            return torch.ones(units, dtype=torch.bool, device=self._step.flat.device)
        if unit_mask.dtype != torch.bool or unit_mask.shape != (units,):
            raise ConfigError(f"unit_mask: expected bool [{units}]")
        return unit_mask.to(self._step.flat.device, non_blocking=True)

    def _record(self, recorded: _Recorded, inputs: tuple[Tensor, ...], mask: Tensor, units: int) -> None:
        step = self._step
        how = (self._rows_per_unit, inputs, mask, self._scale, self._fixed)
        traced = trace_pass(step, self._losses_of, units, *how)
        recorded.traced, recorded.run = traced, traced.graph
        if self._fuse:
            constants = traced.constants
            recorded.run = fused(traced.graph, (*constants, step.sums.flat, mask, *inputs), len(constants))


def _hooks(layer: nn.Module) -> Iterator[int]:
    """Numbers of a layer's hooks, no two of which are alike."""
    for hooks in (
        layer._forward_hooks,
        layer._forward_pre_hooks,
        layer._backward_hooks,
        layer._backward_pre_hooks,
    ):
        yield from hooks


def _has_graphs(device: torch.device) -> bool:
    return device.type == "cuda"


class _CudaGraph:
    """A run captured in a CUDA graph, with its own copies of the batch."""

    def __init__(
        self, run: Run, constants: list[Tensor], flat: Tensor, mask: Tensor, inputs: tuple[Tensor, ...]
    ) -> None:
        self._inputs = [torch.empty_like(tensor, device=flat.device) for tensor in (mask, *inputs)]
        # The graph has their addresses.
        self._held = (constants, flat)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads (those that pin memory) may go on.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._losses, _ = run(*constants, flat, *self._inputs)

    def replay(self, mask: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        for own, given in zip(self._inputs, (mask, *inputs), strict=True):
            own.copy_(given, non_blocking=True)
        self._graph.replay()
        return self._losses.clone()

"""One physical batch, from the forward pass to the clipped sums, on tensors that have no numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from synthward.engine.capture import Batch, CaptureMode, CaptureState, Kept
from synthward.engine.contributions import Contributions, Item
from synthward.engine.distributed.ranks import Ranks
from synthward.engine.estimate.meter import Counts, Meter
from synthward.engine.estimate.setting import Built, Device, Setting, Workload
from synthward.engine.layout import Layout
from synthward.engine.planner import Choice, Planner, seconds
from synthward.engine.products import Products
from synthward.engine.rates import Rates
from synthward.engine.rules.conv import ConvUse
from synthward.engine.rules.registry import CHECKS, HANDLERS, HINTS, check_modules
from synthward.engine.rules.uses import BlockOuterUse, OuterUse, Use
from synthward.engine.step import make_groups
from synthward.engine.sums import Buckets, FlatSums, new_sums
from synthward.kernels import place_of, planned_device

# Phases of the meter. What is made in the forward pass waits for the backward pass; what is made in that waits for the
# clip factors, or is gone at once.
_DATA, _FORWARD, _BACKWARD, _SUMS = "batch", "activations", "gradients", "clip"
# Rows of a unit from which most blocks of a weighted sum have one weight (kernels/outer/README.md).
_ONE_WEIGHT = 64


@dataclass(frozen=True)
class Rehearsal:
    """What one physical batch of `units` units needs and does.

    Attributes:
        memory: bytes at the moment when most are in use, by what they are.
        counts: what the network's own operations do, forward and backward.
        choices: how the norm of each parameter is taken.
        sum_flops: operations of the weighted sums.
        sum_bytes: what they read.
        norm_seconds: of the norms on the device, by its rates for operands of their types.
        sum_seconds: of the products that the weighted sums are made of.
    """

    units: int
    memory: dict[str, int]
    counts: Counts
    choices: tuple[Choice, ...]
    sum_flops: float
    sum_bytes: float
    norm_seconds: float
    sum_seconds: float

    @property
    def peak(self) -> int:
        """Most bytes in use at once, over what lies there in all steps."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class Shape:
    """Sizes of a network: numbers of elements.

    Attributes:
        parameters: by name.
        kinds: the kind of layer that each belongs to, by name.
        blocks: of each layer that is sharded by itself.
        others: of networks beside it.
    """

    parameters: dict[str, int]
    kinds: dict[str, str]
    blocks: tuple[int, ...]
    others: int

    @property
    def total(self) -> int:
        return sum(self.parameters.values())


@contextmanager
def shapes_only(kind: str) -> Iterator[None]:
    """Tensors that are made inside have no numbers, and stand for those of a device of that kind."""
    token = planned_device.set("cpu" if kind == "cpu" else "cuda")
    try:
        # Constants of a few numbers may come from elsewhere.
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        planned_device.reset(token)


def shape_of(workload: Workload) -> Shape:
    """Sizes of the network."""
    with shapes_only("cpu"):
        built = workload.build()
    parameters = {n: p.numel() for n, p in built.module.named_parameters() if p.requires_grad}
    kinds = {
        f"{prefix}.{name}" if prefix else name: f"{type(layer).__name__}.{name}"
        for prefix, layer in built.module.named_modules()
        for name, _ in layer.named_parameters(recurse=False)
    }
    blocks = tuple(sum(p.numel() for p in block.parameters()) for block in built.blocks)
    return Shape(parameters, kinds, blocks, sum(p.numel() for o in built.others for p in o.parameters()))


def rehearse(workload: Workload, units: int, setting: Setting, device: Device) -> Rehearsal:
    """Run one physical batch of `units` units for its shapes.

    Raises:
        UnsupportedOperationError: an operation that the engine has no rule for.
    """
    with shapes_only(device.kind):
        built = workload.build()
        check_modules(built.module)
        pass_ = _Pass(built, setting, device)
        meter = Meter(copies_convolutions=device.kind == "cpu")
        # Parameters and sums lie there in all steps: they are no part of this.
        with meter:
            with meter.phase(_DATA):
                data = workload.data(units)
            with meter.phase(_FORWARD):
                pass_.run(data, workload.rows_per_unit, meter)
    memory = {name: phase.at_peak for name, phase in meter.phases.items()}
    return Rehearsal(
        units,
        memory,
        meter.counts,
        tuple(pass_.planner.explain()),
        pass_.sum_flops,
        pass_.sum_bytes,
        sum(pass_.norm_seconds.values()),
        pass_.sum_seconds,
    )


class _Pass:
    """The part of `DPStep` and `PrivateTrainer` that has a physical batch in it."""

    def __init__(self, built: Built, setting: Setting, device: Device) -> None:
        self._built, self._setting, self._device = built, setting, device
        named = {n: p for n, p in built.module.named_parameters() if p.requires_grad}
        names, parameters = [*named], [*named.values()]
        # Who multiplies makes no difference to memory.
        self.state = CaptureState(parameters, names, Products("library"))
        self.planner = _Telling(self, setting, names, device)
        self._groups = make_groups(setting.clip, names)
        self._sums = _sums_of(parameters)
        self.state.start_pass = self._start
        self.state.mode = CaptureMode(self.state, HANDLERS, CHECKS, HINTS)
        self.sum_flops = self.sum_bytes = self.sum_seconds = 0.0
        # By position, as the planner's choices.
        self.norm_seconds: dict[int, float] = {}

    def note_sum(self, use: Use, products: int = 1) -> None:
        """A weighted sum, made of so many products, or the forming of gradients in its place."""
        flops = _sum_flops(use)
        self.sum_flops += flops
        self.sum_seconds += products * flops / self._device.sum_flops_of(use.evidence.dtype)

    def _start(
        self,
        batch: Batch,
        factors: list[tuple[Tensor, Tensor]] | None = None,
        *,
        measure_only: bool = False,
    ) -> Contributions:
        return _Counted(
            self,
            self.state,
            batch,
            clip=self._setting.clip,
            groups=self._groups,
            sums=self._sums,
            planner=self.planner,
            factors=factors,
            measure_only=measure_only,
        )

    def run(self, data: tuple[Tensor, ...], rows_per_unit: int, meter: Meter) -> None:
        state = self.state
        state.forward += 1
        state.provenance.begin(self._built.module)
        assert state.mode is not None
        with _autocast(self._setting), state.mode:
            losses = self._built.losses(*data)
        state.provenance.clear()
        with meter.phase(_BACKWARD):
            self._backward(losses, Layout.uniform(len(losses), rows_per_unit), meter)

    def _backward(self, losses: Tensor, layout: Layout, meter: Meter) -> None:
        state, ones = self.state, torch.ones_like(losses)
        state.batch = Batch(layout, 1.0, torch.ones_like(losses, dtype=torch.bool))
        self._probe(losses, meter)
        if self._setting.perf.keep == "recompute":
            state.start_pass = lambda batch: self._start(batch, measure_only=True)
            torch.autograd.backward(losses, ones, retain_graph=True)
            measured = state.take()
            assert measured is not None
            with torch.no_grad():
                measured.finish()
            factors = measured.factors()
            del measured
            state.start_pass = lambda batch: self._start(batch, factors)
        torch.autograd.backward(losses, ones)
        contributions = state.take()
        with meter.phase(_SUMS), torch.no_grad():
            if contributions is not None:
                contributions.finish()

    def _probe(self, losses: Tensor, meter: Meter) -> None:
        """The memory of the backward pass of one unit's loss alone, which precedes some steps; time apart."""
        before, meter.counts = meter.counts, Counts()
        with self.state.probe(_look):
            torch.autograd.grad(losses, [self.state.anchor], torch.zeros_like(losses), retain_graph=True)
        meter.counts = before


def _look(kept: Kept) -> None:
    """What `IndependenceProbe` makes of a captured call."""
    for _, use in kept.uses:
        grads = use.evidence
        is_zero = (grads == 0).flatten(1)
        (is_zero | grads.isnan().flatten(1)).all(1)


class _Telling(Planner):
    """The engine's planner, which tells what forming gradients costs: it stands in place of their weighted sum."""

    def __init__(self, told: _Pass, setting: Setting, names: list[str], device: Device) -> None:
        super().__init__(setting.perf, names, rates=device.norm_rates)
        self._told, self._device = told, device

    def _rates_of(self, evidence: Tensor) -> Rates:
        return self._device.rates_of(evidence.dtype)

    def prepare(
        self, use: Use, layout: Layout, position: int, *, may_keep: bool = True
    ) -> tuple[Use, Layout]:
        found, own = super().prepare(use, layout, position, may_keep=may_keep)
        self._told.norm_seconds[position] = seconds(self.choices[position], self._rates_of(use.evidence))
        if type(found) is not type(use):
            self._told.note_sum(use)
        return found, own


class _Counted(Contributions):
    """Contributions that tell what their sums cost."""

    def __init__(self, told: _Pass, *args: object, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self._told = told

    def finish(self) -> None:
        # A repetition is compared with the pass before by numbers.
        self._given = None
        super().finish()

    def _sum(self, item: Item, factors: Tensor, is_bad: Tensor, index: int) -> None:
        self._told.note_sum(item[1], _products(item[1], item[2]))
        self._told.sum_bytes += _bytes_of(item[1])
        super()._sum(item, factors, is_bad, index)


def _bytes_of(use: Use) -> float:
    return float(sum(v.nbytes for v in vars(use).values() if isinstance(v, Tensor)))


def _sum_flops(use: Use) -> float:
    """Operations of the weighted sum of a use, as one product."""
    if isinstance(use, OuterUse | BlockOuterUse):
        return 2.0 * use.activations.numel() * use.output_grads.shape[-1]
    if isinstance(use, ConvUse):
        return 2.0 * use.rows * use.shape.places * use.shape.numel
    return _bytes_of(use) / 2.0


def _products(use: Use, layout: Layout) -> int:
    """How many products of half precision the weighted sum of a use is made of."""
    if not (isinstance(use, OuterUse) and use.is_half and place_of(use.evidence) == "cuda"):
        return 1
    # Rows of one weight are multiplied as they are.
    return 1 if (layout.rows_per_unit or 0) >= _ONE_WEIGHT else use.terms


def _sums_of(parameters: list[nn.Parameter]) -> FlatSums:
    ranges, at = [], 0
    for parameter in parameters:
        ranges.append((at, at + parameter.numel(), parameter.shape))
        at += parameter.numel()
    return new_sums(ranges, Buckets(at, Ranks.alone(), 1), torch.float32, torch.device("cpu"))


def _autocast(setting: Setting) -> torch.autocast | nullcontext[None]:
    if setting.precision == "fp32":
        return nullcontext()
    # Weights that are spread over ranks are converted layer by layer, and not kept.
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=setting.parallel == "replicate")

"""From sizes and rehearsals to memory, operations and time of a rank."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields, replace

from synthward.engine.estimate.rehearsal import Rehearsal, Shape
from synthward.engine.estimate.setting import Device, Setting
from synthward.engine.planner import Choice

_FLOAT = 4
# Buckets of sums that are exchanged at once, and the most coordinates of one (`synthward.engine.sums`).
_BUCKETS, _BUCKET = 4, 1 << 24
# Whole sums of sharded parameters that are on their way while one forms (`synthward.engine.distributed.sharded`).
_SENT = 2
# Layers that are whole at once: one runs while the next one is gathered.
_WHOLE_LAYERS = 2
# What the allocator leaves unused between blocks, and scratch of kernels and threads: measured over the models of
# benchmarks/models.py on a CPU (tests/engine/test_estimate.py holds them to it).
_GAP_SHARE, _GAP = 0.04, 4 << 20
# Bytes that the update moves per parameter: it reads parameter, sum and both moments and writes all four.
_UPDATE_BYTES = 8 * _FLOAT


@dataclass(frozen=True)
class Memory:
    """Most bytes that one rank holds at once, by what they are.

    Attributes:
        parameters: fp32, of the network and of networks beside it.
        sums: clipped sums, fp32.
        moments: Adam's, fp32.
        batch: the physical batch.
        activations: what the forward pass keeps (copies of weights in bf16 included).
        gradients: what the backward pass keeps for the clip, and what it is working on.
        working: copies that convolutions work on.
        exchange: buckets under way to other ranks, layers and sums that are whole for a while.
        gaps: what the allocator does not use, and scratch.
        host: in the host's memory, beside all that: parameters, sums and moments that are offloaded.
    """

    parameters: int
    sums: int
    moments: int
    batch: int
    activations: int
    gradients: int
    working: int
    exchange: int
    gaps: int
    host: int = 0

    @property
    def total(self) -> int:
        """On the device."""
        return sum(getattr(self, part.name) for part in fields(self) if part.name != "host")


@dataclass(frozen=True)
class Method:
    """How norms of one kind of parameter are taken."""

    kind: str
    method: str
    parameters: int


@dataclass(frozen=True)
class Step:
    """What one rank does in a logical step.

    Attributes:
        flops: all of it; `norm_flops` of these are for norms, over the products that a plain step takes as well.
        bytes: read and written.
        exchanged_bytes: sent to other ranks.
        seconds: of computing and of exchanging, one after the other.
    """

    flops: float
    norm_flops: float
    bytes: float
    exchanged_bytes: float
    compute_seconds: float
    exchange_seconds: float

    @property
    def seconds(self) -> float:
        return self.compute_seconds + self.exchange_seconds


@dataclass(frozen=True)
class Estimate:
    """What is told of a training.

    Attributes:
        parameters: trainable ones.
        physical_batch_size: units at once on a rank.
        physical_batches: of a rank in a logical step.
        largest_physical_batch_size: that fits, up to all units of a step; 0 if not even one does.
        fits: whether the memory is enough.
        days: of all steps.
    """

    parameters: int
    physical_batch_size: int
    physical_batches: int
    largest_physical_batch_size: int
    fits: bool
    memory: Memory
    methods: tuple[Method, ...]
    step: Step
    days: float
    assumptions: tuple[str, ...]


def memory_of(shape: Shape, setting: Setting, device: Device, found: Rehearsal) -> Memory:
    """Memory of one rank."""
    total, ranks = shape.total, setting.ranks
    is_sharded = setting.parallel == "shard"
    owned = -(-total // ranks)
    whole = owned if is_sharded else total
    parts = found.memory
    parameters, sums, moments = _FLOAT * whole, _FLOAT * whole, 2 * _FLOAT * owned
    memory = Memory(
        parameters=_FLOAT * shape.others,
        sums=0,
        moments=0,
        batch=parts.get("batch", 0),
        activations=parts.get("activations", 0),
        gradients=parts.get("gradients", 0) + parts.get("clip", 0),
        working=parts.get("working", 0),
        exchange=_exchange(shape, setting, device),
        gaps=0,
    )
    if setting.offload:
        memory = replace(memory, host=parameters + sums + moments)
    else:
        memory = replace(memory, parameters=parameters + memory.parameters, sums=sums, moments=moments)
    return replace(memory, gaps=_GAP + round(_GAP_SHARE * memory.total))


def _exchange(shape: Shape, setting: Setting, device: Device) -> int:
    if setting.parallel == "shard":
        # What no block holds is whole for the whole pass, and what is gathered comes in one piece that is then taken
        # apart.
        rest, block = shape.total - sum(shape.blocks), max(shape.blocks, default=0)
        gathered = rest + _WHOLE_LAYERS * block + max(rest, block)
        return _compute_bytes(setting) * gathered + _whole_sums(shape, setting, device)
    if setting.ranks == 1:
        return 0
    if device.kind == "cpu":
        # One copy of the parameters that all ranks of the machine see.
        return _FLOAT * -(-shape.total // setting.ranks)
    return _FLOAT * min(_BUCKETS * min(_BUCKET, max(shape.total // 8, 1 << 18)), shape.total)


def _whole_sums(shape: Shape, setting: Setting, device: Device) -> int:
    """Most bytes of whole sums at once: they leave from the last parameter to the first, and gloo receives as much as
    it sends."""
    sizes = [*shape.parameters.values()]
    sent = 0 if setting.ranks == 1 else 2 if device.kind == "cpu" else 1
    return _FLOAT * max(size + sent * sum(sizes[i + 1 : i + 1 + _SENT]) for i, size in enumerate(sizes))


def _compute_bytes(setting: Setting) -> int:
    return 2 if setting.precision == "bf16" else _FLOAT


def step_of(shape: Shape, setting: Setting, device: Device, found: Rehearsal, batches: int) -> Step:
    """Operations, traffic and time of one rank in a logical step of that many physical batches."""
    counts = found.counts
    norm_flops = sum(choice.flops for choice in found.choices)
    norm_bytes = sum(choice.bytes for choice in found.choices)
    products = counts.flops + found.sum_flops
    owned = -(-shape.total // setting.ranks)
    own_seconds = found.norm_seconds + found.sum_seconds
    pass_seconds = counts.flops / device.flops + counts.other_bytes / device.bandwidth + own_seconds
    update = float(_UPDATE_BYTES * owned)
    moved = counts.product_bytes + counts.other_bytes + found.sum_bytes + norm_bytes
    exchanged = _exchanged(shape, setting, batches)
    # The host's memory is reached at the rate of the link between ranks: by the update, and in each pass by what layers
    # gather and by sums.
    far = update + batches * float((_gathers(setting) + 1) * _FLOAT * owned) if setting.offload else 0.0
    return Step(
        flops=batches * (products + norm_flops),
        norm_flops=batches * norm_flops,
        bytes=batches * moved + update,
        exchanged_bytes=exchanged,
        compute_seconds=batches * pass_seconds + update / device.bandwidth + far / device.link,
        exchange_seconds=exchanged / device.link,
    )


def _exchanged(shape: Shape, setting: Setting, batches: int) -> float:
    """Bytes that a rank sends: in rings or directly, each rank sends all but its own part of what it gathers."""
    if setting.ranks == 1:
        return 0.0
    others = shape.total * (setting.ranks - 1) / setting.ranks
    if setting.parallel == "replicate":
        return 2.0 * _FLOAT * others
    return batches * others * (_gathers(setting) * _compute_bytes(setting) + _FLOAT)


def _gathers(setting: Setting) -> int:
    """How often a sharded layer is made whole in a pass: forward, and in each backward pass."""
    return 2 + int(setting.perf.keep == "recompute")


def methods_of(shape: Shape, choices: tuple[Choice, ...]) -> tuple[Method, ...]:
    """How the norms of each kind of layer are taken, in the order of the network."""
    counted = Counter((shape.kinds[choice.parameter], choice.method) for choice in choices)
    return tuple(Method(kind, method, count) for (kind, method), count in counted.items())

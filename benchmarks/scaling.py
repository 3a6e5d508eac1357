"""A model of what a private step takes on many GPUs, and benchmarks/SCALING.md made from it.

    python -m benchmarks.scaling [--count] [--check]

Operations, traffic and memory of a physical batch are counted by a rehearsal of the engine's own step on shapes
(`synthward.engine.estimate`, as `synthward plan` does); `--count` counts anew, which takes minutes, and keeps what it
finds in benchmarks/results/scaling.json. All else is assumed, and every assumption is in `ASSUMED` with its source. No
GPU was measured. The formulas are held against what `python -m benchmarks.distributed` measured on two CPU ranks.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS, write_result

PAGE = Path(__file__).parent / "SCALING.md"
COUNTS = RESULTS / "scaling.json"
MODELS, TIMES = ("gpt2-small", "1.3b", "10b"), 1024
BATCHES, GPUS = (4096, 65536), (8, 64, 512)
STEPS = 10_000
# Units of the two rehearsals that a line is drawn through.
_FEW, _MORE = 2, 6
_FLOAT = 4


@dataclass(frozen=True)
class Assumed:
    """One number that was not measured, and where it is from."""

    name: str
    value: float
    told: str
    source: str


_SAME_AS_PLAN = "assumed, as `synthward plan` does (`Device.gpu`); not measured"
ASSUMED = {
    a.name: a
    for a in (
        Assumed("node", 8, "8 GPUs in a node", "DGX/HGX H100 (NVIDIA's data sheet)"),
        Assumed("memory", 80.0 * 2**30, "80 GiB a GPU", "H100 SXM5 (NVIDIA's data sheet: 80 GB)"),
        Assumed("gaps", 1.04, "the allocator leaves 4% unused", "measured on a CPU for `synthward plan`"),
        Assumed(
            "peak", 989e12, "bf16 products with fp32 sums: 989 TFLOP/s stated", "H100 SXM5 data sheet, dense"
        ),
        Assumed("share", 0.30, "of which products reach 30%", _SAME_AS_PLAN),
        Assumed(
            "split",
            3.0,
            "a weighted sum is three such products",
            "kernels/outer/README.md: gradients kept in bf16 are scaled, then split into three bf16 that hold all bits",
        ),
        Assumed("hbm", 3.35e12, "memory: 3.35 TB/s stated", "H100 SXM5 data sheet"),
        Assumed("hbm_share", 0.60, "of which 60% is reached", _SAME_AS_PLAN),
        Assumed(
            "nvlink",
            450e9,
            "NVLink 4 and NVSwitch: 450 GB/s a GPU and direction stated",
            "H100 data sheet: 900 in both",
        ),
        Assumed(
            "infiniband",
            50e9,
            "InfiniBand NDR: 50 GB/s a GPU and direction stated",
            "DGX H100: an adapter of 400 Gb/s for each GPU",
        ),
        Assumed("link_share", 0.80, "of both links 80% is reached", "assumed; not measured"),
        Assumed("hop_inside", 3e-6, "3 us for each step of a ring inside a node", "assumed; not measured"),
        Assumed("hop_between", 6e-6, "6 us for each step of a ring between nodes", "assumed; not measured"),
        Assumed(
            "update",
            32.0,
            "noise and Adam move 32 bytes a parameter, and noise costs no time beside that",
            "`engine/estimate/cost.py`; the arithmetic of ChaCha20 (about 90 operations a number) is below the time of "
            "32 bytes on an H100. Derived; not measured",
        ),
        Assumed(
            "reach",
            2.5,
            "a step has room for 2.5 standard deviations over the expected batch, and computes all of it",
            "`engine/estimate/planning.py`; static batches, masked",
        ),
    )
}


def assumed(name: str) -> float:
    return ASSUMED[name].value


@dataclass(frozen=True)
class Counted:
    """What a rehearsal counted of one model, of any number of units: a line through two numbers of them.

    Attributes:
        parameters: trainable ones; `largest` of one tensor, `block` of one layer that is sharded by itself, `blocks` of
            these, `tensors` in all.
        flops: of the network's products, forward and for input gradients, of one unit.
        norm_flops: of norms, over those.
        sum_flops: of weighted sums.
        pass_bytes: that operations other than products move in a pass, whatever the number of units.
        unit_bytes: that they move for each unit, norms included.
        pass_memory: that a pass holds; `unit_memory` for each unit.
        recomputes: whether blocks are run again in the backward pass.
    """

    model: str
    recomputes: bool
    parameters: int
    largest: int
    block: int
    blocks: int
    tensors: int
    flops: float
    norm_flops: float
    sum_flops: float
    pass_bytes: float
    unit_bytes: float
    pass_memory: float
    unit_memory: float


def count(model: str, *, recomputes: bool) -> Counted:
    """Rehearse a model of `synthward plan --decoder` with sequences of `TIMES` tokens, each a privacy unit."""
    from synthward.engine.estimate import Device, Setting
    from synthward.engine.estimate.rehearsal import rehearse, shape_of
    from synthward.engine.spec import PerfSpec
    from synthward.run.decoder import DECODERS, decoder_workload

    workload = decoder_workload(replace(DECODERS[model], times=TIMES), recomputes=recomputes)
    setting = Setting(
        batch=BATCHES[0], ranks=8, parallel="shard", precision="bf16", perf=PerfSpec(keep="bf16")
    )
    device, shape = Device.gpu("bf16"), shape_of(workload)
    few, more = (rehearse(workload, units, setting, device) for units in (_FEW, _MORE))
    step = _MORE - _FEW

    def each(of_few: float, of_more: float) -> float:
        return (of_more - of_few) / step

    norm_bytes = [sum(choice.bytes for choice in found.choices) for found in (few, more)]
    unit_bytes = each(few.counts.other_bytes, more.counts.other_bytes)
    unit_memory = each(few.peak, more.peak)
    return Counted(
        model,
        recomputes,
        shape.total,
        max(shape.parameters.values()),
        max(shape.blocks),
        len(shape.blocks),
        len(shape.parameters),
        each(few.counts.flops, more.counts.flops),
        each(*(sum(choice.flops for choice in found.choices) for found in (few, more))),
        each(few.sum_flops, more.sum_flops),
        few.counts.other_bytes - _FEW * unit_bytes,
        unit_bytes + each(*norm_bytes),
        few.peak - _FEW * unit_memory,
        unit_memory,
    )


@dataclass(frozen=True)
class Step:
    """A logical step on `gpus`; seconds of its parts on each of them, one after the other.

    Attributes:
        needed: what the expected units would take if every GPU only computed its share of them.
        padding: room for larger draws, and batches that do not divide.
        passes: what each pass costs whatever its size.
        update: noise and Adam.
        gathers, sums: of exchanging parameters and sums, what nothing hides.
        exchanged: bytes that a GPU sends.
    """

    model: str
    batch: int
    gpus: int
    way: str
    units: int
    physical: int
    passes_taken: int
    needed: float
    padding: float
    passes: float
    update: float
    gathers: float
    sums: float
    exchanged: float

    @property
    def seconds(self) -> float:
        return self.needed + self.padding + self.passes + self.update + self.gathers + self.sums

    @property
    def efficiency(self) -> float:
        """Share of the step that is needed computing."""
        return self.needed / self.seconds

    @property
    def largest_loss(self) -> str:
        losses = {
            "room for larger draws and uneven division": self.padding,
            "costs of each pass": self.passes,
            "noise and Adam": self.update,
            "gathering parameters": self.gathers,
            "exchanging sums": self.sums,
        }
        return max(losses, key=lambda name: losses[name])


@dataclass(frozen=True)
class Cluster:
    """GPUs in nodes.

    Args:
        gpus: all of them.
    """

    gpus: int

    def collective(self, size: float) -> float:
        """Seconds of a reduce-scatter or an all-gather whose whole tensor has so many bytes: rings on all adapters,
        inside a node and between nodes at the same time."""
        inside = min(self.gpus, int(assumed("node")))
        nodes = self.gpus // inside
        fast = size * (inside - 1) / inside / (assumed("nvlink") * assumed("link_share"))
        slow = size / inside * (nodes - 1) / nodes / (assumed("infiniband") * assumed("link_share"))
        hops = (inside - 1) * assumed("hop_inside") + (nodes - 1) * assumed("hop_between")
        return max(fast, slow) + hops


@dataclass(frozen=True)
class Plan:
    """One way to take a step: replicas or shards, flat or per-layer clipping."""

    counted: Counted
    batch: int
    gpus: int
    is_sharded: bool
    is_per_layer: bool = False

    @property
    def way(self) -> str:
        how = "FSDP2" if self.is_sharded else "replicas"
        return how + (", blocks run twice" if self.counted.recomputes else "")

    def memory(self, units: int) -> float:
        """Bytes that a GPU holds: parameters, sums, moments and the pass, and what is whole for the exchange."""
        c = self.counted
        owned = math.ceil(c.parameters / self.gpus)
        whole = owned if self.is_sharded else c.parameters
        if self.is_sharded:
            # What no block holds and two blocks in bf16; one sum forms while two are on their way.
            layers = c.parameters - c.block * c.blocks + 2 * c.block
            exchange = 2.0 * layers + 3.0 * _FLOAT * c.largest
        else:
            exchange = 4.0 * _FLOAT * min(bucket_size(c.parameters), c.parameters)
        held = 2.0 * _FLOAT * (whole + owned) + c.pass_memory + units * c.unit_memory + exchange
        return held * assumed("gaps")

    @cached_property
    def units(self) -> int:
        """Of a GPU, in most steps."""
        return math.ceil((self.batch + assumed("reach") * math.sqrt(self.batch) + 1.0) / self.gpus)

    @cached_property
    def physical(self) -> int:
        """Units at once: an equal part of the fewest batches that fit; 0 if not even one unit does."""
        room, each = assumed("memory") - self.memory(1), self.memory(2) - self.memory(1)
        if room < 0:
            return 0
        largest = 1 + math.floor(room / each)
        return math.ceil(self.units / math.ceil(self.units / largest))

    def step(self) -> Step:
        """Seconds by part."""
        c, rate = self.counted, assumed("peak") * assumed("share")
        moved = assumed("hbm") * assumed("hbm_share")
        passes = math.ceil(self.units / self.physical)
        products = (c.flops + c.norm_flops) / rate + c.unit_bytes / moved
        sums = assumed("split") * c.sum_flops / rate
        each = products + sums
        fixed = c.pass_bytes / moved
        owned = math.ceil(c.parameters / self.gpus)
        window = self.physical * (sums if not self.is_per_layer else sums + 0.5 * products)
        pass_seconds = self.physical * each + fixed
        gathers, reduced, sent = self._exchange(passes, window, pass_seconds)
        needed = self.batch / self.gpus * each
        return Step(
            c.model,
            self.batch,
            self.gpus,
            self.way,
            self.units,
            self.physical,
            passes,
            needed,
            passes * self.physical * each - needed,
            passes * fixed,
            assumed("update") * owned / moved,
            gathers,
            reduced,
            sent,
        )

    def _exchange(self, passes: int, window: float, pass_seconds: float) -> tuple[float, float, float]:
        """Seconds of parameters and of sums that nothing hides, and bytes sent."""
        c, cluster = self.counted, Cluster(self.gpus)
        others = (self.gpus - 1) / self.gpus
        if not self.is_sharded:
            # All buckets but the last one are hidden, as far as the sums of the last pass last.
            bucket = bucket_size(c.parameters)
            count = math.ceil(c.parameters / bucket)
            whole = count * cluster.collective(_FLOAT * bucket)
            left = max(whole / count, whole - window * (count - 1) / count)
            return whole, left, 2.0 * _FLOAT * c.parameters * others
        # Each block is gathered while the one before it runs: forward, backward, and once more where blocks run twice.
        times = 2 + int(c.recomputes)
        block = cluster.collective(2 * c.block)
        rest = cluster.collective(2 * max(c.parameters - c.block * c.blocks, 0))
        beside = pass_seconds / (times * c.blocks)
        gathers = passes * (2 * block + rest + times * c.blocks * max(0.0, block - beside))
        # Each tensor's sum is reduced while later ones form.
        hops = cluster.collective(0.0)
        whole = cluster.collective(_FLOAT * c.parameters) + (c.tensors - 1) * hops
        last = cluster.collective(_FLOAT * c.largest)
        sums = passes * max(last, whole - window * (c.tensors - 1) / c.tensors)
        return gathers, sums, passes * others * c.parameters * (2.0 * times + _FLOAT)


def bucket_size(parameters: int) -> int:
    """Coordinates of a bucket, as `synthward.engine.sums` cuts them."""
    return min(max(parameters // 8, 1 << 18), 1 << 24)


def plans(counted: list[Counted], batch: int, gpus: int, *, is_per_layer: bool = False) -> Iterator[Plan]:
    """All ways that fit the memory."""
    for found in counted:
        for is_sharded in (False, True):
            plan = Plan(found, batch, gpus, is_sharded, is_per_layer)
            if plan.physical:
                yield plan


def best(counted: list[Counted], batch: int, gpus: int, *, is_per_layer: bool = False) -> Step | None:
    """The fastest way, or None if none fits."""
    steps = [plan.step() for plan in plans(counted, batch, gpus, is_per_layer=is_per_layer)]
    return min(steps, key=lambda step: step.seconds, default=None)


def limit(counted: list[Counted], batch: int) -> tuple[Step, Step] | None:
    """The last number of GPUs (doubled from a node's) where half of the step is needed computing, and the next one."""
    before, gpus = None, int(assumed("node"))
    while gpus <= batch:
        step = best(counted, batch, gpus)
        if step is not None and step.efficiency < 0.5:
            return (before or step), step
        before, gpus = step, 2 * gpus
    return None


def read_counts() -> dict[str, list[Counted]]:
    """What was counted, by model."""
    rows = [Counted(**row) for row in json.loads(COUNTS.read_text())["counted"]]
    return {model: [row for row in rows if row.model == model] for model in MODELS}


def main() -> None:
    from benchmarks.scaling_page import page

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", action="store_true", help="rehearse all models anew (minutes)")
    parser.add_argument("--check", action="store_true", help="fail if the page is not what would be written")
    options = parser.parse_args()
    if options.count:
        found = [count(model, recomputes=twice) for model in MODELS for twice in (False, True)]
        print(write_result("scaling", {"times": TIMES, "counted": [asdict(c) for c in found]}))
    text = page()
    if options.check:
        raise SystemExit(0 if PAGE.read_text() == text else f"{PAGE.name} is not up to date")
    PAGE.write_text(text)
    print(PAGE)


def measured() -> dict[str, Any] | None:
    """What was measured on two ranks, of the first machine that has it."""
    for file in sorted(RESULTS.glob("*-cores.json")):
        parts = json.loads(file.read_text())
        if "distributed" in parts:
            found: dict[str, Any] = parts["distributed"]
            return found
    return None


if __name__ == "__main__":
    main()

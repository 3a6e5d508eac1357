"""benchmarks/SCALING.md: the model's assumptions, what it says, and how far it is right where that was measured."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.scaling import (
    ASSUMED,
    BATCHES,
    GPUS,
    MODELS,
    STEPS,
    TIMES,
    Counted,
    Step,
    best,
    bucket_size,
    limit,
    measured,
    plans,
    read_counts,
)

_FLOAT = 4

_HEAD = f"""# How a private step scales: a model, and what of it was measured

Made by `python -m benchmarks.scaling`; do not edit. **No GPU was measured.** Operations, bytes and memory of a
physical batch are counted by a rehearsal of the engine's own step on shapes; what links and GPUs do is stated by
their vendor or assumed, and listed below. The same formulas are compared at the end with two ranks on a CPU, which
were measured.

## What a step is made of

Decoders of `synthward plan --decoder`, sequences of {TIMES} tokens, one for each privacy unit, flat clipping, bf16 by
autocast, what waits for the clip kept in bf16. The logical batch is public; a rank's part of it, with room for larger
draws, is taken in physical batches (passes) of one static size, the largest that fits.

* A pass: forward, input gradients, norms, weighted sums. Products at the assumed rate, all else by the bytes it moves.
* Replicas: sums of the last pass are reduce-scattered in buckets while later sums form (earlier passes send nothing);
  each rank noises and updates its part; parameters are gathered, which nothing hides. Sent: 8 bytes a parameter and
  step, whatever the number of passes.
* FSDP2: blocks are gathered in bf16 before their forward and backward pass, the next one while one runs; each pass
  reduces its own sums, tensor by tensor, while later ones form. Sent: 8 bytes a parameter and **pass** (10 where
  blocks run twice).
* Under flat clipping sums form after the last norm is known, so the exchange hides behind the weighted sums alone;
  per-layer clipping sums behind the backward pass, too. No exchange slows what computes beside it (optimistic: NCCL
  takes some multiprocessors).
"""


def page() -> str:
    """The whole text."""
    counts = read_counts()
    lines = [
        _HEAD,
        *_assumptions(),
        *_counted(counts),
        *_steps(counts),
        *_limits(counts),
        *_per_layer(counts),
    ]
    lines += _anchors(measured())
    return "\n".join(lines) + "\n"


def _paragraph(text: str) -> str:
    return "\n" + textwrap.fill(" ".join(text.split()), 118) + "\n"


def _assumptions() -> Iterator[str]:
    yield "## Assumptions\n"
    yield "| name | value | what | from |"
    yield "|---|---|---|---|"
    for a in ASSUMED.values():
        yield f"| {a.name} | {a.value:.4g} | {a.told} | {a.source} |"


def _counted(counts: dict[str, list[Counted]]) -> Iterator[str]:
    yield "\n## Counted"
    yield _paragraph(
        """For each unit: operations of the network's products forward and backward, of norms, of weighted sums;
        bytes that all other operations move; memory. A norm of 0 TFLOP is that of gradients which are formed
        anyway."""
    )
    yield (
        "| model | parameters | blocks run twice | products, TFLOP | norms | sums | GB moved | "
        "GB for each pass | MB held |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for rows in counts.values():
        for c in rows:
            flops = " | ".join(f"{x / 1e12:.2f}" for x in (c.flops, c.norm_flops, c.sum_flops))
            moved = f"{c.unit_bytes / 1e9:.0f} | {c.pass_bytes / 1e9:.0f} | {c.unit_memory / 1e6:,.0f}"
            twice = "yes" if c.recomputes else "no"
            yield f"| {c.model} | {c.parameters / 1e9:.3g} B | {twice} | {flops} | {moved} |"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f}" if seconds < 0.1 else f"{1e3 * seconds:,.0f}"


def _steps(counts: dict[str, list[Counted]]) -> Iterator[str]:
    yield "\n## Predicted steps"
    yield _paragraph(
        f"""The fastest way that fits, parts in milliseconds: needed (the expected units, each at the cost of one
        more in a pass), room (for larger draws, and batches that do not divide), what each pass costs whatever
        its size, noise and Adam, parameters and sums (exchanges that nothing hides). Efficiency: needed over
        all. Days: of {STEPS:,} steps."""
    )
    yield (
        "| model | batch | GPUs | way | units x passes | step | needed | room | passes | update | parameters | sums | "
        "GB sent | efficiency | days |"
    )
    yield "|" + "---|" * 15
    for model in MODELS:
        for batch in BATCHES:
            for gpus in GPUS:
                step = best(counts[model], batch, gpus)
                yield _row(step) if step else f"| {model} | {batch} | {gpus} | does not fit |" + " |" * 11


def _row(s: Step) -> str:
    parts = " | ".join(_ms(x) for x in (s.needed, s.padding, s.passes, s.update, s.gathers, s.sums))
    return (
        f"| {s.model} | {s.batch:,} | {s.gpus} | {s.way} | {s.physical} x {s.passes_taken} | {_ms(s.seconds)} | "
        f"{parts} | {s.exchanged / 1e9:.2f} | {s.efficiency:.0%} | {STEPS * s.seconds / 86400:,.2f} |"
    )


def _limits(counts: dict[str, list[Counted]]) -> Iterator[str]:
    yield "\n## Where it stops scaling, and why\n"
    yield "GPUs are doubled until less than half of the step is needed computing.\n"
    yield "| model | batch | last | units of a GPU there | then efficiency | because of |"
    yield "|---|---|---|---|---|---|"
    for model in MODELS:
        for batch in BATCHES:
            found = limit(counts[model], batch)
            if found is None:
                yield f"| {model} | {batch:,} | one GPU for each unit ({batch:,}) | 1 | - | - |"
                continue
            last, after = found
            then = f"{after.efficiency:.0%} at {after.gpus:,} | {after.largest_loss}"
            yield f"| {model} | {batch:,} | {last.gpus:,} ({last.efficiency:.0%}) | {last.units} | {then} |"
    yield _paragraph(
        """The logical batch bounds it: a GPU that has few units of a fixed public batch pays for room (a static
        size is a whole number of units), for an exchange that is as large as before, and for what each pass
        costs, shared by fewer units. With thousands of GPUs most of what is not hidden is steps of rings; trees would
        take fewer. Larger batches are what private training wants for its noise, too."""
    )


def _per_layer(counts: dict[str, list[Counted]]) -> Iterator[str]:
    yield "\n## Flat against per-layer clipping"
    yield _paragraph(
        f"""Exchanges of sums that are not hidden, in milliseconds, at a batch of {BATCHES[0]:,}; per-layer clipping
        sums while the backward pass runs."""
    )
    yield "| model | GPUs | flat | of the step | per-layer |"
    yield "|---|---|---|---|---|"
    for model in MODELS:
        for gpus in GPUS:
            ways = [*plans(counts[model], BATCHES[0], gpus)]
            if ways:
                plan = min(ways, key=lambda way: way.step().seconds)
                flat, layered = plan.step(), replace(plan, is_per_layer=True).step()
                share = f"{flat.sums / flat.seconds:.1%}"
                yield f"| {model} | {gpus} | {_ms(flat.sums)} | {share} | {_ms(layered.sums)} |"


@dataclass(frozen=True)
class Line:
    """Seconds of a collective by bytes of the whole tensor, ``start + bytes / rate``."""

    start: float
    rate: float

    @classmethod
    def through(cls, points: dict[str, float]) -> Line:
        """The line of least squares of relative errors through seconds by number of float32 elements."""
        rows = [(4.0 * float(n), s) for n, s in points.items()]
        # Weighted by 1 / s^2, so that each size counts alike.
        weights = [1.0 / s**2 for _, s in rows]
        total = sum(weights)
        x = sum(w * b for w, (b, _) in zip(weights, rows, strict=True)) / total
        y = sum(w * s for w, (_, s) in zip(weights, rows, strict=True)) / total
        slope = sum(w * (b - x) * (s - y) for w, (b, s) in zip(weights, rows, strict=True))
        slope /= sum(w * (b - x) ** 2 for w, (b, _) in zip(weights, rows, strict=True))
        return cls(max(y - slope * x, 0.0), 1.0 / slope)

    def seconds(self, size: float) -> float:
        return self.start + size / self.rate


def _anchors(found: dict[str, Any] | None) -> Iterator[str]:
    yield "\n## Against what was measured: two ranks on a CPU"
    if found is None or "collectives" not in found:
        yield "\nNothing is in benchmarks/results yet (`python -m benchmarks.distributed`)."
        return
    lines = {name: Line.through(points) for name, points in found["collectives"].items()}
    yield _paragraph(
        """`python -m benchmarks.distributed`: pieces were measured alone, the step is predicted from them by the
        formulas above, and the whole was measured in the same rounds. A pass is that of two processes that
        exchange nothing; noise and Adam take half of theirs. On a CPU nothing counts as hidden: who sends and
        receives needs the cores that compute. Over loopback the exchange is predicted from these lines; in
        memory that ranks have in common it is what was measured alone."""
    )
    for name, line in lines.items():
        told = f"{1e3 * line.start:.2f} ms + bytes of the whole tensor / ({line.rate / 1e9:.2f} GB/s)"
        yield f"* {name.replace('_', '-')} over loopback: {told}"
    yield (
        "\n| model | exchange | pass, ms | update | exchange predicted | measured alone | step predicted | "
        "measured | error |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for model, result in found["models"].items():
        yield from _anchor_rows(model, result, lines)
    yield from _overlap(found["models"])


def _anchor_rows(model: str, result: dict[str, Any], lines: dict[str, Line]) -> Iterator[str]:
    pieces = result.get("pieces", {})
    apart = pieces.get("synthward apart")
    if apart is None:
        return
    parameters, half = result["parameters"], apart["apply_seconds"] / 2
    count = math.ceil(parameters / bucket_size(parameters))
    each = _FLOAT * parameters / count
    loopback = sum(count * lines[name].seconds(each) for name in ("reduce_scatter", "all_gather"))
    ways = {
        "loopback": ("exchange, loopback", "synthward replicas, loopback", loopback),
        "memory in common": ("exchange, memory in common", "synthward replicas", None),
    }
    for way, (piece, whole, predicted) in ways.items():
        alone, found = pieces[piece]["seconds"], pieces[whole]["seconds"]
        step = apart["pass_seconds"] + half + (alone if predicted is None else predicted)
        told = "-" if predicted is None else _ms(predicted)
        parts = " | ".join([_ms(apart["pass_seconds"]), _ms(half), told, *map(_ms, (alone, step, found))])
        yield f"| {model} | {way} | {parts} | {step / found - 1.0:+.0%} |"


def _overlap(models: dict[str, Any]) -> Iterator[str]:
    yield _paragraph(
        """Overlap over loopback: the same step where the engine is told that the pass is the last (sums leave while
        later ones form), and where it is not; medians and quartiles. Some of a private step's first ones look for
        units that mix, which takes three backward passes more; they are in the upper quartiles."""
    )
    yield "| model | exchange alone, ms | told | not told |"
    yield "|---|---|---|---|"
    for model, result in models.items():
        pieces = result.get("pieces", {})
        names = ("exchange, loopback", "synthward replicas, loopback", "synthward replicas, loopback, untold")
        if all(name in pieces for name in names):
            yield f"| {model} | " + " | ".join(_spread(pieces[name]) for name in names) + " |"


def _spread(row: dict[str, float]) -> str:
    return f"{_ms(row['seconds'])} ({_ms(row['low'])} to {_ms(row['high'])})"

"""Noise alone, and noise with Adam in one kernel beside the same kernel without noise and what torch has for both."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.clock import interleaved, spread
from benchmarks.gpu.result import recorded
from benchmarks.gpu.section import Job, Options, Section

_ROUNDS, _SECONDS = 30, 4.0
_KEY = bytes(range(32))
# The parameters of GPT-2 small and medium and of a decoder of 1.3 billion.
_SIZES = {"124 M": 124_000_000, "355 M": 355_000_000, "1.3 B": 1_300_000_000}
_STD, _SCALE, _LR = 1.0, 1e-2, 1e-3
_BETAS, _EPS, _DECAY = (0.9, 0.999), 1e-8, 0.01


def _alone(options: Options, count: int) -> dict[str, Any]:
    """Normals added to a flat buffer, by the cipher and by torch's own generator."""
    from synthward.kernels import add_gaussian_noise_

    count = 700 if options.small else count
    mine, theirs, room = (torch.randn(count, device=options.device) for _ in range(3))
    variants: dict[str, Callable[[], object]] = {
        "synthward": lambda: add_gaussian_noise_(
            mine, key=_KEY, stream=1, step=1, noise_std=_STD, backend="triton"
        ),
        "torch": lambda: theirs.add_(room.normal_(), alpha=_STD),
    }
    return _row(count, variants)


def _with_adam(options: Options, count: int) -> dict[str, Any]:
    count = 700 if options.small else count
    mine, theirs = _buffers(options.device, count), _buffers(options.device, count)
    room = torch.empty_like(theirs[0])
    steps = [torch.ones((), device=options.device) for _ in range(2)]

    def drawn() -> None:
        theirs[1].add_(room.normal_(), alpha=_STD).mul_(_SCALE)
        _torch_adam(theirs, steps[1])
        theirs[1].zero_()

    return _row(
        count,
        {
            "fused": lambda: _fused(mine, _STD),
            "fused without noise": lambda: _fused(mine, 0.0),
            "torch fused Adam": lambda: _torch_adam(theirs, steps[0]),
            "torch normal, add, fused Adam": drawn,
        },
    )


def _buffers(device: str, count: int) -> list[Tensor]:
    """Parameters, gradients, both moments."""
    made = [torch.randn(count, device=device) for _ in range(3)]
    return [*made, torch.rand(count, device=device)]


def _fused(tensors: list[Tensor], noise_std: float) -> None:
    from synthward.kernels import noisy_adam_

    noisy_adam_(
        *tensors,
        **{"key": _KEY, "stream": 1, "step": 1, "noise_std": noise_std, "grad_scale": _SCALE, "lr": _LR},
        **{"beta1": _BETAS[0], "beta2": _BETAS[1], "eps": _EPS, "weight_decay": _DECAY},
        **{"decoupled": True, "adam_step": 3, "backend": "triton"},
    )


def _torch_adam(tensors: list[Tensor], step: Tensor) -> None:
    """AdamW as torch.optim.AdamW(fused=True) runs it."""
    param, grad, mean, square = tensors
    torch._fused_adamw_(
        *([param], [grad], [mean], [square], [], [step]),
        **{"lr": _LR, "beta1": _BETAS[0], "beta2": _BETAS[1], "weight_decay": _DECAY, "eps": _EPS},
        **{"amsgrad": False, "maximize": False, "grad_scale": None, "found_inf": None},
    )


def _row(count: int, variants: dict[str, Callable[[], object]]) -> dict[str, Any]:
    taken = interleaved(variants, _ROUNDS, _SECONDS)
    row: dict[str, Any] = {"parameters": count, "shape": f"{count} float32"}
    row["variants"] = {name: spread(times) for name, times in taken.items()}
    for variant in row["variants"].values():
        if variant:
            variant["per_second"] = count / variant["seconds"]
    return row


def _jobs(options: Options) -> list[Job]:
    jobs = [Job("alone", 8.0, functools.partial(_alone, options, 1 << 28))]
    for name, count in _SIZES.items():
        jobs.append(Job(f"Adam {name}", 12.0, functools.partial(_with_adam, options, count)))
    return jobs


def extra_seconds(parameters: float) -> float | None:
    """What noise adds to an update of so many parameters, by the largest update measured."""
    rows = [row for job, row in recorded("noise").items() if job.startswith("Adam") and _times(row)]
    if not rows:
        return None
    row = max(rows, key=lambda row: row["parameters"])
    times = _times(row)
    return (times["fused"] - times["fused without noise"]) / row["parameters"] * parameters


def _times(row: dict[str, Any]) -> dict[str, float]:
    return {name: v["seconds"] for name, v in row.get("variants", {}).items() if "seconds" in v}


def _table(rows: dict[str, dict[str, Any]]) -> str:
    lines = []
    for job, row in rows.items():
        times = _times(row)
        if not times:
            lines.append(f"{job}: ran")
            continue
        first, *others = times
        each = row["parameters"] / times[first]
        ratios = ", ".join(f"{times[first] / times[other]:.3f} x {other}" for other in others)
        lines.append(f"{job:10s} {1e3 * times[first]:8.3f} ms, {each / 1e9:.1f} G/s, {ratios}")
    shares = _shares()
    return "\n".join([*lines, *([f"of a step: {shares}"] if shares else [])])


def _shares() -> str:
    """What noise takes of the private steps that the file holds."""
    found = []
    for job, row in recorded("steps").items():
        seconds = _times(row).get("private")
        extra = extra_seconds(row.get("trained", 0))
        if seconds and extra is not None:
            found.append(f"{job} {100 * extra / seconds:.1f}%")
    return ", ".join(found)


SECTION = Section("noise", "noise: fused beside without noise and torch's own", _jobs, _table)

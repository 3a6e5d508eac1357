"""Private step over plain PyTorch step for the networks of the two table generators, Opacus beside it.

Every variant trains the same network on the same rows: forward, backward, (clip, noise,) Adam. A privacy unit
has four rows (noise draws of diffusion; two real and two fake rows of the GAN's discriminator). Variants run
interleaved, one step each per round, so that a machine whose speed drifts slows all of them; the ratio is
the median over rounds of private / plain in the same round.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.machine import write_result
from synthward.engine import KeySchedule, PrivacyPlan, PrivateTrainer
from synthward.generators.networks import ResidualMLP

ROWS_PER_UNIT = 4
# Inputs and outputs as they come out of the diabetes130 schema (48 columns) at epsilon 3.
NETWORKS = {
    "diffusion": {"inputs": 400, "hidden": 256, "blocks": 2, "outputs": 391},
    "gan": {"inputs": 397, "hidden": 256, "blocks": 1, "outputs": 1},
}
LEARNING_RATE, CLIP, NOISE = 1e-3, 1.0, 1.9

Step = Callable[[], None]


def unit_losses(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error per privacy unit; output and target [units, rows, outputs]."""
    return ((output - target) ** 2).mean(dim=(1, 2))


def plain_step(network: nn.Module, x: Tensor, y: Tensor, *, fused: bool) -> Step:
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE, fused=fused)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        unit_losses(network(x).unflatten(0, (-1, ROWS_PER_UNIT)), y).mean().backward()
        optimizer.step()

    return step


def private_step(network: nn.Module, x: Tensor, y: Tensor) -> Step:
    units = len(y)
    plan = PrivacyPlan(
        sample_rate=0.036, noise_multiplier=NOISE, max_grad_norm=CLIP, steps=10**6, expected_batch_size=units
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    trainer = PrivateTrainer(network, optimizer, plan, keys=KeySchedule.from_os(), ledger=None)

    def step() -> None:
        with trainer.capture():
            losses = unit_losses(network(x).unflatten(0, (-1, ROWS_PER_UNIT)), y)
        trainer.backward(losses, rows_per_unit=ROWS_PER_UNIT)
        trainer.apply()

    return step


class PerUnit(nn.Module):
    """A criterion that Opacus' ghost mode accepts: one loss per unit, or their mean."""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        losses = unit_losses(output, target)
        return losses if self.reduction == "none" else losses.mean()


def opacus_step(network: nn.Module, x: Tensor, y: Tensor, mode: str) -> Step:
    """Opacus on [units, rows, features]: the same privacy unit of four rows."""
    import opacus

    x = x.unflatten(0, (-1, ROWS_PER_UNIT))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=len(y))
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    made = opacus.PrivacyEngine().make_private(
        module=network,
        optimizer=optimizer,
        criterion=PerUnit(),
        data_loader=loader,
        noise_multiplier=NOISE,
        max_grad_norm=CLIP,
        poisson_sampling=False,
        grad_sample_mode=mode,
    )
    module, optimizer = made[0], made[1]
    criterion = made[2] if mode == "ghost" else PerUnit()

    def step() -> None:
        optimizer.zero_grad()
        criterion(module(x), y).backward()
        optimizer.step()

    return step


def measure(name: str, units: int, rounds: int, peers: bool) -> dict[str, Any]:
    shape = NETWORKS[name]
    torch.manual_seed(0)
    base = ResidualMLP(**shape, zero_head=False)
    x = (torch.rand(units * ROWS_PER_UNIT, shape["inputs"]) < 0.12).float()
    y = torch.randn(units, ROWS_PER_UNIT, shape["outputs"])
    steps: dict[str, Step] = {
        "plain (foreach Adam)": plain_step(copy.deepcopy(base), x, y, fused=False),
        "plain (fused Adam)": plain_step(copy.deepcopy(base), x, y, fused=True),
        "synthward": private_step(copy.deepcopy(base), x, y),
    }
    if peers:
        steps["opacus ghost"] = opacus_step(copy.deepcopy(base), x, y, "ghost")
        steps["opacus hooks"] = opacus_step(copy.deepcopy(base), x, y, "hooks")
    times: dict[str, list[float]] = {variant: [] for variant in steps}
    for round_index in range(rounds + 3):
        for variant, step in steps.items():
            begin = time.perf_counter()
            step()
            if round_index >= 3:
                times[variant].append(time.perf_counter() - begin)
    reference = {"foreach": times["plain (foreach Adam)"], "fused": times["plain (fused Adam)"]}
    rows = {}
    for variant, values in times.items():
        rows[variant] = {"median_ms": round(1e3 * statistics.median(values), 3)}
        for key, plain in reference.items():
            ratios = sorted(a / b for a, b in zip(values, plain, strict=True))
            rows[variant][f"ratio_to_{key}"] = round(statistics.median(ratios), 4)
            low, high = ratios[len(ratios) // 5], ratios[4 * len(ratios) // 5]
            rows[variant][f"ratio_to_{key}_p20_p80"] = [round(low, 4), round(high, 4)]
    parameters = sum(p.numel() for p in base.parameters())
    return {
        "shape": shape,
        "units": units,
        "rows_per_unit": ROWS_PER_UNIT,
        "parameters": parameters,
        "steps": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--units", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--dry", action="store_true", help="print only; write no result")
    options = parser.parse_args()
    results = {name: measure(name, options.units, options.rounds, not options.no_peers) for name in NETWORKS}
    for name, result in results.items():
        print(f"{name}: {result['units']} units x {ROWS_PER_UNIT} rows, {result['parameters']} parameters")
        for variant, row in result["steps"].items():
            ratio = f"x{row['ratio_to_foreach']:.3f} of foreach, x{row['ratio_to_fused']:.3f} of fused"
            print(f"  {variant:22s} {row['median_ms']:9.2f} ms  {ratio}")
    if not options.dry:
        print(write_result("generator_step", {"rounds": options.rounds, "networks": results}))


if __name__ == "__main__":
    main()

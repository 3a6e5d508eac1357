"""Errors of correlated noise at equal epsilon: benchmarks/results/correlated_noise.json.

    python -m benchmarks.correlated_noise [--quick] [--dry]

For each setting: the root mean squared error of the sums that SGD follows, in units of the clip bound, at equal epsilon
and equal expected batch. Independent noise is amplified by Poisson sampling; cyclic sampling of a banded strategy is
amplified within its groups, and stands with its best number of bands; the others take every unit once a pass,
unamplified. `factors` are the errors of strategies alone, at one Gaussian mechanism's privacy.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from benchmarks.machine import write_result
from synthward.engine.accounting import (
    CorrelatedGaussianEvent,
    CyclicPoissonGaussianEvent,
    PoissonGaussianEvent,
)
from synthward.engine.accounting.calibrate import calibrate_noise_of
from synthward.engine.accounting.matrix import Strategy
from synthward.engine.correlation import (
    banded_inverse_strategy,
    banded_strategy,
    blt_strategy,
    expected_error,
    state_slots,
)

DELTA = 1e-5
INDEPENDENT = Strategy("banded", (1.0,))


def strategies(steps: int, period: int) -> Iterator[tuple[str, Strategy]]:
    """What may run without amplification at this period."""
    yield "independent", INDEPENDENT
    for bands in (4, 16, 64):
        if bands <= period:
            yield f"banded, {bands} bands", banded_strategy(steps, bands)
    for buffers in (1, 2, 3):
        yield f"blt, {buffers} buffers", blt_strategy(steps, buffers, period)
    for bands in (2, 4, 8, 16):
        yield f"banded inverse, {bands} bands", banded_inverse_strategy(steps, bands, period)
    yield "square root inverse, 16 bands", banded_inverse_strategy(steps, 16, optimized=False)


def error_of_noise(strategy: Strategy, steps: int, noise: float) -> float:
    """Error of the sums where the white noise has this standard deviation."""
    return noise * expected_error(strategy, steps, steps) / strategy.sensitivity(steps, steps)


def independent(steps: int, period: int, epsilon: float) -> dict[str, Any]:
    noise = calibrate_noise_of(lambda z: PoissonGaussianEvent(1.0 / period, z, steps), epsilon, DELTA)
    return {"noise_multiplier": noise, "error": error_of_noise(INDEPENDENT, steps, noise)}


def cyclic(steps: int, period: int, epsilon: float) -> dict[str, Any]:
    """The best number of bands: more of them cancel more noise, and leave less to sampling."""
    found = []
    for bands in [b for b in (2, 4, 8, 16, 32, 64, 128) if b < period] + [period]:
        noise = calibrate_noise_of(
            lambda z, bands=bands: CyclicPoissonGaussianEvent(bands / period, z, bands, steps), epsilon, DELTA
        )
        error = error_of_noise(banded_strategy(steps, bands), steps, noise)
        found.append({"bands": bands, "noise_multiplier": noise, "error": error})
    return min(found, key=lambda row: row["error"])


def unamplified(strategy: Strategy, steps: int, period: int, epsilon: float) -> dict[str, Any]:
    noise = calibrate_noise_of(lambda z: CorrelatedGaussianEvent(z, strategy, period, steps), epsilon, DELTA)
    return {"noise_multiplier": noise, "error": error_of_noise(strategy, steps, noise)}


def measure(steps: int, period: int, epsilons: tuple[float, ...]) -> dict[str, Any]:
    made = dict(strategies(steps, period))
    factors = {
        name: {"error": expected_error(strategy, steps, period), "state": state_slots(strategy)}
        for name, strategy in made.items()
    }
    rows = []
    for epsilon in epsilons:
        row = {"independent, Poisson": independent(steps, period, epsilon)}
        row["banded, cyclic Poisson"] = cyclic(steps, period, epsilon)
        for name in ("blt, 2 buffers", "banded inverse, 4 bands", "banded inverse, 16 bands"):
            row[name] = unamplified(made[name], steps, period, epsilon)
        rows.append({"epsilon": epsilon, "errors": row})
    return {"steps": steps, "period": period, "delta": DELTA, "factors": factors, "rows": rows}


def lines(found: dict[str, Any]) -> Iterator[str]:
    head = f"steps {found['steps']}, period {found['period']}"
    for name, factor in found["factors"].items():
        yield f"{head}: factor {factor['error']:9.3f}  state {factor['state']:3d}  {name}"
    for row in found["rows"]:
        for name, own in row["errors"].items():
            bands = f", {own['bands']} bands" if "bands" in own else ""
            yield f"{head}: epsilon {row['epsilon']:g} error {own['error']:9.2f}  {name}{bands}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one small setting")
    parser.add_argument("--dry", action="store_true", help="print, write nothing")
    options = parser.parse_args()
    epsilons = (1.0, 2.0, 4.0, 8.0)
    settings = [(2000, 2000, (1.0, 8.0)), (2000, 500, epsilons), (2000, 100, epsilons)]
    if options.quick:
        settings = [(32, 4, (2.0,))]
    results = []
    for setting in settings:
        results.append(measure(*setting))
        print("\n".join(lines(results[-1])), flush=True)
    if not options.dry:
        write_result("correlated_noise", {"settings": results})


if __name__ == "__main__":
    main()

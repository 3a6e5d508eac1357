"""One variant of a step in a process of its own: runs steps for each line on its standard input.

    python -m benchmarks.worker MODEL VARIANT

A line is a number of steps (none: one); it is answered with the seconds of each, on average. At the end of input the
process prints, as JSON, the peak of its memory over what it held before the network was built, and what the step itself
has found.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path


def _status(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    return 0


def main(model: str, variant: str) -> None:
    from benchmarks.steps import make_step

    warm_up()
    serve(lambda: make_step(model, variant))


def serve(make: Callable[[], Callable[[], None]]) -> None:
    """Make a step, and take it as often as it is asked for."""
    before = _status("VmRSS")
    # Starts the peak anew.
    Path("/proc/self/clear_refs").write_text("5")
    step = make()
    step()
    step()
    print("ready", flush=True)
    for line in sys.stdin:
        count = int(line) if line.strip() else 1
        begun = time.perf_counter()
        for _ in range(count):
            step()
        print((time.perf_counter() - begun) / count, flush=True)
    found = getattr(step, "found", {})
    print(json.dumps({"peak_bytes": _status("VmHWM") - before, **found}), flush=True)


def warm_up() -> None:
    """Load what torch loads at its first step, threads included, so that it does not count as the step's."""
    import torch

    from synthward.engine.rates import measured_rates

    layer = torch.nn.Sequential(torch.nn.Conv2d(2, 2, 3), torch.nn.Flatten(), torch.nn.Linear(8, 8))
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.randn(64, 2, 4, 4)).sum().backward()
    optimizer.step()
    torch.randn(512, 512) @ torch.randn(512, 512)
    # Measured once on a machine, then read from a file.
    measured_rates(torch.device("cpu"))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])

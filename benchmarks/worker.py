"""One variant of a step in a process of its own: runs a step for each line on its standard input.

    python -m benchmarks.worker MODEL VARIANT

Answers each line with the step's seconds. At the end of input it prints, as JSON, the peak of its memory over what it
held before the network was built.
"""

from __future__ import annotations

import json
import sys
import time
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
    before = _status("VmRSS")
    # Starts the peak anew.
    Path("/proc/self/clear_refs").write_text("5")
    step = make_step(model, variant)
    step()
    step()
    print("ready", flush=True)
    for _ in sys.stdin:
        begun = time.perf_counter()
        step()
        print(time.perf_counter() - begun, flush=True)
    print(json.dumps({"peak_bytes": _status("VmHWM") - before}), flush=True)


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

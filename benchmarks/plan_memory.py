"""What `synthward plan` tells of a step's memory beside what the step uses: benchmarks/results/plan_memory.json.

    python -m benchmarks.plan_memory [--dry]

Each run is a process of its own (or two ranks of one); memory is its peak over what it held before the network was
built, as `benchmarks.worker` has it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from typing import Any

from benchmarks.machine import write_result
from synthward.engine import ClipSpec, PerfSpec
from synthward.engine.estimate import Device, Setting, rehearse
from synthward.engine.estimate.cost import memory_of
from synthward.engine.estimate.rehearsal import shape_of
from tests.distributed.launch import run_ranks
from tests.engine.used_memory import KINDS, ROOT

# Network, units on a rank, clipping, what is kept.
ALONE = [
    ("mlp", 1024, "flat", "full"),
    ("mlp", 1024, "per-layer", "full"),
    ("mlp", 1024, "flat", "recompute"),
    ("gpt", 32, "flat", "full"),
    ("gpt", 32, "per-layer", "full"),
    ("unet", 64, "flat", "full"),
    ("unet", 64, "per-layer", "full"),
    ("ehr", 32, "flat", "full"),
    ("decoder", 32, "flat", "full"),
    ("decoder", 32, "per-layer", "full"),
    ("decoder, recomputed", 32, "flat", "full"),
    ("decoder, recomputed", 32, "per-layer", "full"),
    ("decoder, recomputed", 32, "flat", "bf16"),
    ("diffusion", 4096, "flat", "full"),
    ("diffusion", 4096, "per-layer", "full"),
    ("gan", 4096, "flat", "full"),
    ("gan", 4096, "per-layer", "full"),
]
# Network, units on a rank, how it is spread over two ranks.
TOGETHER = [
    ("mlp", 256, "replicate"),
    ("mlp", 256, "shard"),
    ("decoder", 4, "replicate"),
    ("decoder", 4, "shard"),
    ("ehr", 2, "replicate"),
    ("ehr", 2, "shard"),
]


def told(name: str, units: int, setting: Setting) -> int:
    """Bytes of a rank."""
    work, device = KINDS[name](), Device.here(setting.ranks)
    return memory_of(shape_of(work), setting, device, rehearse(work, units, setting, device)).total


def alone(name: str, units: int, clipping: str, keep: str) -> dict[str, Any]:
    """One process."""
    setting = Setting(batch=units, clip=ClipSpec(1.0, clipping), perf=PerfSpec(keep=keep))
    words = [sys.executable, "-m", "tests.engine.used_memory", name, str(units), clipping, keep]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    facts = {"network": name, "units": units, "ranks": 1, "clipping": clipping, "keep": keep}
    return _compared(facts, told(name, units, setting), int(done.stdout))


def together(name: str, units: int, parallel: str) -> dict[str, Any]:
    """The rank of two that uses more."""
    setting = Setting(batch=2 * units, ranks=2, parallel=parallel)
    arguments = (name, units, "flat", "full", parallel)
    used = max(run_ranks(2, "tests.engine.used_memory:main", *arguments, timeout=600.0))
    facts = {"network": name, "units": units, "ranks": 2, "clipping": "flat", "keep": "full"}
    return _compared({**facts, "parallel": parallel}, told(name, units, setting), used)


def _compared(facts: dict[str, Any], expected: int, used: int) -> dict[str, Any]:
    found = {**facts, "told_mb": expected / 1e6, "used_mb": used / 1e6, "told_over_used": expected / used}
    print(" ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in found.values()), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dry", action="store_true", help="print only")
    arguments = parser.parse_args()
    runs = [alone(*run) for run in ALONE] + [together(*run) for run in TOGETHER]
    if not arguments.dry:
        print(write_result("plan_memory", {"runs": runs}))


if __name__ == "__main__":
    main()

"""What a training step really uses, in a process of its own, by the meter of benchmarks/worker.py.

    python -m tests.engine.used_memory WORKLOAD UNITS CLIPPING KEEP PRECISION

Prints the peak of its memory over what it held before the network was built, in bytes.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from synthward.engine.estimate import Built, Workload

ROOT = Path(__file__).resolve().parents[2]
HOSPITAL = ROOT / "python/synthward/simulate/hospital.toml"
DECODER = "layers=6,width=384,heads=6,vocab=512,times=128"


def of_benchmark(name: str) -> Workload:
    """A model of benchmarks/models.py."""
    work = _benchmark("models").WORKLOADS[name]

    def build() -> Built:
        network = work.build()
        return Built(network, lambda x, y: work.row_losses(network(x), y), _layers(network))

    return Workload(name, build, work.data)


def _layers(network: nn.Module) -> list[nn.Module]:
    """Those that are sharded by themselves: a list of layers, which has no pass of its own, counts as its layers."""
    layers: list[nn.Module] = []
    for child in network.children():
        layers += child if isinstance(child, nn.ModuleList) else [child]
    return [layer for layer in layers if any(True for _ in layer.parameters())]


@functools.cache
def _benchmark(name: str) -> Any:
    """A module of benchmarks/, which is no package where pytest runs."""
    spec = importlib.util.spec_from_file_location(f"{name}_to_plan", ROOT / f"benchmarks/{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def of_decoder(*, recomputes: bool) -> Workload:
    from synthward.run.decoder import decoder_workload, parse_decoder

    return decoder_workload(parse_decoder(DECODER), recomputes=recomputes)


def of_generator(name: str) -> Workload:
    from synthward.generators.registry import make_settings
    from synthward.run.estimate import generator_workload
    from synthward.schema import load_schema

    return generator_workload(load_schema(HOSPITAL), name, make_settings(name, {"hidden": 512}))


KINDS: dict[str, Callable[[], Workload]] = {
    **{name: (lambda name=name: of_benchmark(name)) for name in ("mlp", "gpt", "unet", "ehr")},
    "decoder": lambda: of_decoder(recomputes=False),
    "decoder, recomputed": lambda: of_decoder(recomputes=True),
    "diffusion": lambda: of_generator("diffusion"),
    "gan": lambda: of_generator("gan"),
}


def main(
    name: str, units: int, clipping: str, keep: str, parallel: str = "replicate", precision: str = "fp32"
) -> int:
    """Two steps; returns the peak of memory."""
    import torch

    # What it loads is no part of what a step uses.
    import torch.distributed.fsdp

    from synthward.engine import KeySchedule, PerfSpec, PrivacyPlan, PrivateTrainer
    from synthward.engine.distributed.ranks import Ranks

    work, ranks, meter = KINDS[name](), Ranks.current(), _benchmark("worker")
    meter.warm_up()
    before = meter._status("VmRSS")
    # Starts the peak anew.
    Path("/proc/self/clear_refs").write_text("5")
    built, data = work.build(), work.data(units)
    if parallel == "shard":
        _shard(built)
    plan = PrivacyPlan(0.1, 1.0, 1.0, 10, float(units), clipping)
    optimizer = torch.optim.Adam(built.module.parameters())
    keys = KeySchedule.shared(ranks)
    trainer = PrivateTrainer(built.module, optimizer, plan, keys=keys, perf=PerfSpec(keep=keep))
    mask = torch.ones(units, dtype=torch.bool)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"), trainer.capture():
            losses = built.losses(*data)
        trainer.backward(losses, rows_per_unit=work.rows_per_unit, unit_mask=mask)
        trainer.apply()
    peak = meter._status("VmHWM") - before
    # What several ranks have in common counts once for all of them. It is there to the end.
    return peak - meter._status("RssShmem") + _shared_part()


def _shard(built: Built) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in built.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(built.module, mesh=mesh)


def _shared_part() -> int:
    """This process's part of memory that it shares, in bytes."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss_Shmem:"):
            return int(line.split()[1]) << 10
    return 0


if __name__ == "__main__":
    print(main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4], precision=sys.argv[5]))

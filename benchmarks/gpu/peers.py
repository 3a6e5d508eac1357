"""Steps of other engines beside plain PyTorch and this engine: the same model, batch and optimizer, in turns.

Opacus by hooks and by ghost clipping; fastDP where it can be imported. What a peer refuses is its row. Where it runs
out of memory the batch is halved for all three. Before that, on a small model of the same layers and without noise, its
steps are held to plain ones if nothing is clipped, and to ours if all is: what trains something else says so.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from dataclasses import replace
from typing import Any

import torch

from benchmarks.gpu.models import workloads
from benchmarks.gpu.section import Job, Options, Section
from benchmarks.gpu.side_by_side import PLAIN, PRIVATE, Made, Setup, Variant, compare, disagreement
from benchmarks.gpu.steps import DTYPES, VARIANTS, Batch
from benchmarks.gpu.worker import one_line
from benchmarks.steps import Mean

# What rounding makes of three steps in fp32, and what is added to norms before they divide.
SAME = 1e-3
# Below the norms of all rows of the small models.
CLIPS_ALL = 1e-2


def opacus(setup: Setup, batch: Batch, mode: str) -> Made:
    """Its hooks or ghost clipping, with its default noise (torch's generator)."""
    from opacus import PrivacyEngine

    network = setup.network()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*batch), batch_size=setup.batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: Any = PrivacyEngine().make_private(
            module=network,
            optimizer=setup.optimizer_of(network, fused=True),
            criterion=Mean(setup.work),
            data_loader=loader,
            noise_multiplier=setup.noise,
            max_grad_norm=setup.clip,
            poisson_sampling=False,
            grad_sample_mode=mode,
        )
    module, optimizer = made[0], made[1]
    criterion = made[2] if mode == "ghost" else Mean(setup.work)

    def step() -> None:
        optimizer.zero_grad()
        with setup.precision():
            loss = criterion(module(*batch[:-1]), batch[-1])
        loss.backward()
        optimizer.step()

    return Made(step, network)


def fastdp(setup: Setup, batch: Batch) -> Made:
    """awslabs/fast-differential-privacy as its documentation has it: book-keeping, the cheaper method by layer."""
    from fastDP import PrivacyEngine

    network = setup.network()
    optimizer = setup.optimizer_of(network, fused=True)
    engine = PrivacyEngine(
        network,
        batch_size=setup.batch,
        sample_size=100 * setup.batch,
        epochs=1,
        noise_multiplier=setup.noise,
        max_grad_norm=setup.clip,
        clipping_fn="Abadi",
        clipping_mode="MixOpt",
        clipping_style="all-layer",
    )
    engine.attach(optimizer)

    def step() -> None:
        setup.losses(network, batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return Made(step, network)


PEERS: dict[str, Variant] = {
    "opacus hooks": Variant(functools.partial(opacus, mode="hooks")),
    "opacus ghost": Variant(functools.partial(opacus, mode="ghost")),
}
OPTIONAL: dict[str, tuple[str, Variant]] = {"fastDP": ("fastDP", Variant(fastdp))}


def peers() -> dict[str, Variant]:
    """Those that there are here."""
    found = {
        name: variant
        for name, (package, variant) in OPTIONAL.items()
        if importlib.util.find_spec(package) is not None
    }
    return {**PEERS, **found}


def measure(name: str, dtype: str, peer: str, options: Options) -> dict[str, Any]:
    """A peer beside the plain and the private step of a model."""
    variant = peers()[peer]
    small = workloads(True)[name]
    row: dict[str, Any] = {"model": name, "peer": peer}
    work = workloads(options.small)[name]
    setup = Setup(work, work.batch, DTYPES[dtype], options.device)
    try:
        exact = replace(setup, work=small, batch=small.batch, dtype=torch.float32)
        row["off_plain"] = disagreement(variant, VARIANTS[PLAIN], exact)
        row["off_clipped"] = disagreement(variant, VARIANTS[PRIVATE], exact, clip=CLIPS_ALL)
    except torch.AcceleratorError:
        raise
    except Exception as error:
        # What it can not do in the small it can not do at all.
        return {**row, "dtype": str(setup.dtype).removeprefix("torch."), "refused": one_line(error)}
    row["is_same"] = max(row["off_plain"], row["off_clipped"]) <= SAME
    three = {PLAIN: VARIANTS[PLAIN], PRIVATE: VARIANTS[PRIVATE], peer: variant}
    return {**row, **compare(setup, three, base=(PLAIN, PRIVATE), must=[*three])}


# Of the sweep, where T squared is small and where it is not.
_STACKS = ("stack T 1", "stack T 1024", "stack T 32768")
_SECONDS = {"gpt2-small": 25.0, "gpt2-medium": 30.0, "1.3b": 60.0, "1.3b lora": 45.0}


def _jobs(options: Options) -> list[Job]:
    """fp32 first: it is what peers document."""
    names = [name for name in workloads(options.small) if not name.startswith("stack") or name in _STACKS]
    return [
        Job(
            f"{name} {dtype} {peer}",
            _SECONDS.get(name, 12.0),
            functools.partial(measure, name, dtype, peer, options),
        )
        for dtype in ("fp32", "bf16")
        for name in names
        for peer in peers()
    ]


def _table(rows: dict[str, dict[str, Any]]) -> str:
    """A line for each model and type of numbers: what a peer's step takes over ours, time and memory."""
    models: dict[tuple[str, str], dict[str, str]] = {}
    refused: dict[str, list[str]] = {}
    for job, row in rows.items():
        peer = row["peer"]
        model = job.removesuffix(f" {peer}")
        said, why = _said(row)
        models.setdefault((row["model"], model), {})[peer] = said
        if why:
            refused.setdefault(f"{peer}: {why}", []).append(model)
    lines = [
        f"{model:20} {', '.join(f'{peer} {said}' for peer, said in found.items())}"
        for (_, model), found in models.items()
    ]
    return "\n".join(
        ["peer over private, time and peak memory (batch)", *lines]
        + [f"{', '.join(models)}: {why}" for why, models in refused.items()]
    )


def _said(row: dict[str, Any]) -> tuple[str, str]:
    """A peer's figures, and why there are none or what is wrong with them."""
    if "refused" in row:
        return "refuses", row["refused"]
    found, private = row["variants"][row["peer"]], row["variants"].get(PRIVATE, {})
    if "failed" in found:
        return "fails", found["failed"]
    if "failed" in private:
        return "runs, private does not", ""
    mark = "" if row["is_same"] else " (trains something else)"
    why = "" if row["is_same"] else _off(row)
    if f"over {PRIVATE}" not in found:
        return f"ran{mark}", why
    memory = found["peak_bytes"] / max(1, private["peak_bytes"])
    batch = f"{row['batch']}{'*' if row['halved'] else ''}"
    return f"{found[f'over {PRIVATE}']:.2f}x {memory:.2f}x ({batch}){mark}", why


def _off(row: dict[str, Any]) -> str:
    return f"without noise {row['off_plain']:.1%} off plain steps, clipped {row['off_clipped']:.1%} off ours"


SECTION = Section("peers", "other engines' steps over ours", _jobs, _table)

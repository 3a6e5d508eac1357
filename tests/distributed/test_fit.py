"""The same command on any number of processes: the same model, the same ledger, and a run that goes on elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from synthward.engine.distributed.ranks import Ranks
from synthward.engine.errors import ConfigError, SynthwardError
from synthward.run.fit import FitOptions, fit_run, follow_run
from synthward.run.training import Training
from synthward.schema import load_schema
from tests.distributed.together import on_ranks
from tests.tinydata import write_tiny

# The network that a GAN releases is trained on the private one by an Adam without momentum, which takes a step of full
# length by the sign of a gradient that may be of the last bit alone; and tokens are the largest of several numbers.
TOLERANCE = {"diffusion": 1e-5, "gan": 5e-3}
# More than one lease.
STEPS = {"diffusion": 60, "gan": 20}


def fit(folder: Path, place: str, generator: str, parallel: str, **more: Any) -> str:
    """A rank's part of a run in ``folder / place``; the message of what ended it."""
    ranks = Ranks.current()
    try:
        if ranks.is_main:
            lead(folder, place, generator, parallel, ranks=ranks, **more)
        else:
            follow_run(ranks)
    except SynthwardError as error:
        return str(error)
    return ""


def lead(
    folder: Path,
    place: str,
    generator: str,
    parallel: str = "replicate",
    *,
    ranks: Ranks | None = None,
    resume: bool = False,
    schema: str = "schema.toml",
    physical_batch_size: int = 7,
) -> None:
    settings = {"hidden": 24, "draws": 2}
    options = FitOptions(
        generator, steps=STEPS.get(generator, 20), sample_rate=0.3, seed=5, settings=settings, parallel=parallel,
        physical_batch_size=physical_batch_size,
    )  # fmt: skip
    fit_run(
        folder / "data.csv", load_schema(folder / schema), epsilon=5.0, delta=1e-4, out=folder / place,
        options=options, resume=resume, ranks=ranks,
    )  # fmt: skip


def half(folder: Path, place: str, generator: str, parallel: str) -> str:
    """A run that all ranks leave after their first lease."""
    lease = Training._lease

    def stopping(self: Training, first: int, *rest: Any) -> int:
        if first:
            raise ConfigError("left")
        return lease(self, first, *rest)

    Training._lease = stopping  # type: ignore[method-assign]
    try:
        return fit(folder, place, generator, parallel)
    finally:
        Training._lease = lease  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("ranks")
    write_tiny(made)
    for generator in ("diffusion", "gan"):
        lead(made, f"{generator}-alone", generator, physical_batch_size=4096)
    return made


CASES = [
    (generator, parallel, size)
    for generator in ("diffusion", "gan")
    for parallel in ("replicate", "shard")
    for size in (2, 4)
]


@pytest.fixture(scope="module")
def runs(folder) -> dict[int, Any]:
    """All runs of one world size on one group of processes."""
    here, found = "tests.distributed.test_fit", {}
    for size in (2, 4):
        work = {
            f"{generator}-{parallel}-{size}": (
                f"{here}:fit",
                (folder, f"{generator}-{parallel}-{size}", generator, parallel),
            )
            for generator, parallel, n in CASES
            if n == size
        }
        if size == 4:
            work["half"] = (f"{here}:half", (folder, "half", "diffusion", "replicate"))
            work["half-shard"] = (f"{here}:half", (folder, "half-shard", "diffusion", "shard"))
        work["no such setting"] = (f"{here}:fit", (folder, f"none-{size}", "vae", "replicate"))
        found[size] = on_ranks(size, work, timeout=240.0)
    return found


@pytest.mark.parametrize(("generator", "parallel", "size"), CASES)
def test_the_model_is_that_of_one_process(folder, runs, generator, parallel, size):
    name = f"{generator}-{parallel}-{size}"
    assert runs[size][name] == [""] * size
    assert_same(folder / name, folder / f"{generator}-alone", TOLERANCE[generator])


@pytest.mark.parametrize(("generator", "parallel", "size"), CASES)
def test_the_ledger_is_that_of_one_process(folder, runs, generator, parallel, size):
    name = f"{generator}-{parallel}-{size}"
    assert runs[size][name] == [""] * size
    assert lines(folder / name) == lines(folder / f"{generator}-alone")


@pytest.mark.parametrize("half_run", ["half", "half-shard"])
def test_a_run_of_four_goes_on_alone(folder, runs, half_run):
    """What four ranks saved, replicated or in shards, one reads; the first half of the steps is not taken again."""
    assert all("left" in message for message in runs[4][half_run])
    assert (folder / half_run / "checkpoint").is_dir()
    lead(folder, half_run, "diffusion", resume=True)
    assert not (folder / half_run / "checkpoint").exists()
    leases = [line for line in lines(folder / half_run) if line["kind"] == "lease"]
    assert [(line["first_step"], line["steps"]) for line in leases] == [
        (0, 50),
        (50, STEPS["diffusion"] - 50),
    ]


@pytest.mark.parametrize("size", [2, 4])
def test_what_is_wrong_is_told_to_all(runs, size):
    told = runs[size]["no such setting"]
    assert len(set(told)) == 1 and "choose one of" in told[0]


def test_shards_need_several_processes(folder):
    with pytest.raises(ConfigError, match="torchrun"):
        lead(folder, "sharded-alone", "diffusion", "shard")


def assert_same(run: Path, other: Path, tolerance: float) -> None:
    found, expected = load_file(run / "model.safetensors"), load_file(other / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.linalg.norm(found[name] - value) <= tolerance * max(np.linalg.norm(value), 1e-6), name


def lines(run: Path) -> list[dict[str, Any]]:
    """The ledger, without what is of the one run."""
    own = ("hash", "prev", "time", "run_id", "key_id")
    read = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in own} for line in read]

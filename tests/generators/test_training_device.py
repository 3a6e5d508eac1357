"""Training on a device that is not the CPU: what is put together in CPU memory goes there, and nothing comes back in a
step. On torch's "meta" device (`other_device`), with stand-ins for what looks at numbers: the engine's pass, which
`tests/engine/test_other_device.py` traces, and its kernels."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from synthward.engine.device import CPU
from synthward.engine.distributed.ranks import Ranks
from synthward.engine.draws import Draws
from synthward.engine.errors import ConfigError
from synthward.observe import TrainingObserver
from synthward.run import FitOptions, RunFolder, fit_run, shared
from synthward.run.shared import Units, agreed_device, device_for
from synthward.run.training import Training
from synthward.schema import load_schema
from tests.generators.other_device import META, SETTINGS, OneDevice
from tests.observe.lines import INFO, lines, plan
from tests.tinydata import write_tiny


class LeftError(Exception):
    """All that a test wanted to see of a run."""


def fit(folder: Path, generator: str = "diffusion", *, resume: bool = False, **options: Any) -> RunFolder:
    settings = {"hidden": 8, "draws": 2} if generator == "diffusion" else SETTINGS[generator]
    return fit_run(
        folder / "data.csv",
        load_schema(folder / "schema.toml"),
        epsilon=5.0,
        delta=1e-4,
        out=folder / "run",
        options=FitOptions(generator, steps=4, sample_rate=0.3, seed=5, settings=settings, **options),
        resume=resume,
    )


@pytest.mark.parametrize("generator", ["diffusion", "gan"])
def test_a_step_is_on_the_device_of_the_network(tmp_path, monkeypatch, generator):
    write_tiny(tmp_path)
    losses_seen: list[Tensor] = []

    def run(self: Training) -> None:
        parameters = [*self.generator.private_module.parameters()]

        def backward(losses: Tensor, *, unit_mask: Tensor, **_: Any) -> None:
            torch.autograd.grad(losses @ unit_mask.float(), parameters)
            losses_seen.append(losses)

        monkeypatch.setattr(self.trainer, "capture", nullcontext)
        monkeypatch.setattr(self.trainer, "backward", backward)
        monkeypatch.setattr(self.trainer, "apply", lambda: None)
        with OneDevice():
            for step in range(3):
                self._step(step)
        assert all(p.is_meta for p in parameters) and self.trainer._step.flat.data.is_meta
        assert self.data.tokens.device == self.data.offsets.device == CPU
        raise LeftError

    monkeypatch.setattr(Training, "run", run)
    monkeypatch.setattr(shared, "choose_device", lambda asked, one_each: META)
    with pytest.raises(LeftError):
        fit(tmp_path, generator, physical_batch_size=16)
    assert len(losses_seen) >= 3 and all(losses.is_meta for losses in losses_seen)


def test_a_batch_is_the_same_wherever_it_goes(monkeypatch):
    """And goes there whole, by the copy that is not waited for."""
    copied: list[Tensor] = []
    monkeypatch.setattr(shared, "copy_to", lambda tensor, device: copied.append(tensor) or tensor.to(device))
    units = Units.__new__(Units)
    units.tokens, units.scores = torch.arange(12).view(6, 2), torch.rand(6, 1)
    units.context, units.offsets = torch.arange(6) % 2, torch.tensor([0, 2, 3, 6])
    wanted = torch.tensor([2, 0, -1])
    here, mask = units.batch(wanted, 4, Draws(bytes(32)))
    copied.clear()
    there, mask_there = units.batch(wanted, 4, Draws(bytes(32)), META)
    assert all(t.is_meta for t in (there.tokens, there.scores, there.context, mask_there))
    assert all(map(torch.equal, copied, (here.tokens, here.scores, here.context, mask)))
    assert mask.tolist() == [True, True, False] and len(copied) == 4


def test_the_device_is_noted_and_a_run_goes_on_on_another(tmp_path, monkeypatch):
    """It is no part of what a resumed run has to have in common with its beginning."""
    write_tiny(tmp_path)
    lease = Training._lease
    monkeypatch.setattr("synthward.run.training.LEASE_STEPS", 2)

    def stopping(self: Training, first: int, *rest: Any) -> int:
        if first:
            raise LeftError
        return lease(self, first, *rest)

    monkeypatch.setattr(Training, "_lease", stopping)
    with pytest.raises(LeftError):
        fit(tmp_path, device="cpu")
    folder = RunFolder(tmp_path / "run")
    assert folder.info["device"] == "cpu"
    # As if it had been begun on a GPU.
    folder.update(device="cuda")
    monkeypatch.setattr(Training, "_lease", lease)
    assert fit(tmp_path, device="cpu", resume=True).info["device"] == "cpu"
    events = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    begun = [line for line in events if line["event"] in ("started", "resumed")]
    assert [line["device"] for line in begun] == ["cpu", "cpu"]
    ledger = (tmp_path / "run" / "ledger.jsonl").read_text()
    assert "device" not in ledger and '"cpu"' not in ledger


def test_the_log_looks_at_parameters_when_a_line_is_due(tmp_path):
    """And not at other steps: here there is nothing to look at."""
    parameters = [torch.nn.Parameter(torch.zeros(3, device=META))]
    with pytest.raises(RuntimeError, match="meta"), TrainingObserver(tmp_path, every=10) as observer:
        observer.started(INFO, plan(20), parameters, step=0, device="cuda")
        for step in range(1, 10):
            observer.stepped(step, 0.1, 1e-3)
        assert not [line for line in lines(tmp_path) if line["event"] == "progress"]
        observer.stepped(10, 0.1, 1e-3)


@pytest.mark.parametrize("asked", ["cuda", "cuda:1", "gpu"])
def test_a_device_that_is_not_there_ends_it_before_anything_is_read(tmp_path, monkeypatch, asked):
    write_tiny(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("synthward.run.fit.read_records", pytest.fail)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="device: got"):
        fit(tmp_path, device=asked)
    assert sorted(tmp_path.rglob("*")) == before


class Group(Ranks):
    """Two processes, of which the other one gives the answers that it is told to."""

    def __init__(self, backends: dict[str, str], other: Any = None) -> None:
        super().__init__(None)
        self.world_size, self._backends, self._other = 2, backends, other

    @property
    def backend(self) -> str:
        return ",".join(f"{kind}:{name}" for kind, name in self._backends.items())

    def gather(self, value: Any) -> list[Any]:
        return [value, self._other]


GLOO, BOTH = {"cpu": "gloo", "cuda": "gloo"}, {"cpu": "gloo", "cuda": "nccl"}


def test_processes_that_can_not_exchange_tensors_of_gpus_stay_on_cpus(monkeypatch):
    gpu = torch.device("cuda:1")
    monkeypatch.setattr(shared, "choose_device", lambda asked, one_each: gpu)
    assert device_for("auto", Group(GLOO)) == CPU
    assert device_for("auto", Group(BOTH)) == device_for("cuda", Group(BOTH)) == gpu
    with pytest.raises(ConfigError, match="cpu:gloo,cuda:nccl"):
        device_for("cuda", Group(GLOO))


def test_what_one_process_does_not_have_none_uses(monkeypatch):
    monkeypatch.setattr(shared, "choose_device", lambda asked, one_each: torch.device("cuda:0"))
    assert agreed_device("auto", Group(BOTH, ("cuda", None))) == torch.device("cuda:0")
    with pytest.raises(ConfigError, match="some of the processes see a GPU"):
        agreed_device("auto", Group(BOTH, ("cpu", None)))
    with pytest.raises(ConfigError, match="its own"):
        agreed_device("auto", Group(BOTH, ("cpu", ConfigError("its own"))))

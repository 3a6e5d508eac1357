"""A fit whose passes are recorded, as on a GPU, trains the same network to the bit."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from synthward.engine.compiled import CompiledPass
from synthward.run import FitOptions, RunFolder, fit, fit_run
from synthward.run.folder import MODEL_FILE
from synthward.run.training import Training
from synthward.schema import load_schema
from tests.tinydata import write_tiny

SETTINGS = {"diffusion": {"hidden": 8, "draws": 2}, "gan": {"hidden": 8}}


def run(folder: Path, generator: str, out: str) -> RunFolder:
    return fit_run(
        folder / "data.csv",
        load_schema(folder / "schema.toml"),
        epsilon=5.0,
        delta=1e-4,
        out=folder / out,
        options=FitOptions(generator, steps=7, sample_rate=0.3, seed=5, settings=SETTINGS[generator]),
    )


@pytest.mark.parametrize("generator", SETTINGS)
def test_the_same_network_is_trained(tmp_path, monkeypatch, generator):
    write_tiny(tmp_path)
    expected = load_file(run(tmp_path, generator, "plain").path / MODEL_FILE)
    replayed: list[int] = []
    replay = CompiledPass._replay

    def noted(self: CompiledPass, recorded, given, units):
        replayed.append(units)
        return replay(self, recorded, given, units)

    monkeypatch.setattr(CompiledPass, "_replay", noted)
    monkeypatch.setattr(fit, "Training", functools.partial(Training, is_recorded=True))
    found = load_file(run(tmp_path, generator, "recorded").path / MODEL_FILE)
    # One of the first kind notes what is drawn; of the others the first, second and fourth are looked at.
    assert len(replayed) >= 3
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)

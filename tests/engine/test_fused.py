"""Recorded passes that torch's compiler has fused, and the order of things on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from synthward.engine import compiled as compiled_module
from synthward.engine.errors import UnsupportedOperationError
from tests.engine.recorded import CLIPS, NETS, ROUNDS, assert_same, pair, record, take


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("clip", ["flat", "per-layer"])
@pytest.mark.parametrize("name", ["rows", "mixed", "attention", "images"])
def test_fused_passes_are_close(name, clip):
    make, batch = NETS[name]
    plain, recorded = pair(make, clip=CLIPS[clip])
    run = record(recorded, fuse=True)
    for round_ in range(6):
        take(plain, batch(round_))
        run(batch(round_))
        mine, other = plain._step.sums.flat, recorded._step.sums.flat
        assert (mine - other).norm() <= 1e-5 * mine.norm()
        plain._step.discard()
        recorded._step.discard()


def test_a_compiler_that_errs_is_noticed(monkeypatch):
    def compile_wrongly(graph, **_options):
        def run(*args: Tensor) -> Tensor:
            found = graph(*args)
            args[-3].mul_(1.01)
            return found

        return run

    trainer, _ = pair(NETS["rows"][0])
    run, x = record(trainer, fuse=True), NETS["rows"][1](0)
    run(x)
    run(x)
    monkeypatch.setattr(torch, "compile", compile_wrongly)
    with pytest.raises(UnsupportedOperationError, match="gives other sums"):
        run(x)


def test_on_a_gpu_the_recording_is_a_cuda_graph(monkeypatch):
    """The order of things, with a stand-in for the graph: warm first, captured once, replayed with copies."""
    made: list[object] = []

    class Graph:
        def __init__(self, run, constants, flat, mask, inputs) -> None:
            made.append(self)
            self._run = lambda mask, inputs: run(*constants, flat, mask, *inputs)

        def replay(self, mask: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
            return self._run(mask, inputs)

    monkeypatch.setattr(compiled_module, "_CudaGraph", Graph)
    monkeypatch.setattr(compiled_module, "_has_graphs", lambda device: True)
    plain, recorded = pair(NETS["rows"][0])
    run = record(recorded)
    for round_ in range(ROUNDS):
        x = NETS["rows"][1](round_)
        take(plain, x)
        run(x)
        assert_same(plain, recorded)
        assert len(made) == (round_ >= 4)
        plain.apply()
        recorded.apply()

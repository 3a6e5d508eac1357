"""Recorded passes that torch's compiler has fused, and the order of things on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from synthward.engine import ClipSpec
from synthward.engine import compiled as compiled_module
from synthward.engine.errors import UnsupportedOperationError
from tests.engine.nets import row_losses
from tests.engine.recorded import CLIPS, NETS, ROUNDS, assert_same, pair, record, take


def wrong(norms: float = 1.0, sums: float = 1.0):
    """A compiler whose passes have other norms, or sums."""

    def compile_wrongly(graph, **_options):
        def run(*args: Tensor) -> tuple[Tensor, Tensor]:
            losses, found = graph(*args)
            args[-3].mul_(sums)
            return losses, found * norms

        return run

    return compile_wrongly


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
    trainer, _ = pair(NETS["rows"][0])
    run, x = record(trainer, fuse=True), NETS["rows"][1](0)
    run(x)
    run(x)
    monkeypatch.setattr(torch, "compile", wrong(sums=1.01))
    with pytest.raises(UnsupportedOperationError, match="gives other sums"):
        run(x)


def test_norms_are_compared_also_where_no_unit_is_clipped(monkeypatch):
    """Sums would be the same ones, until the first unit comes that is longer than C."""
    trainer, _ = pair(NETS["rows"][0], clip=ClipSpec(1e6))
    run, x = record(trainer, fuse=True), NETS["rows"][1](0)
    run(x)
    run(x)
    monkeypatch.setattr(torch, "compile", wrong(norms=0.5))
    with pytest.raises(UnsupportedOperationError, match="other sums or norms"):
        run(x)
    monkeypatch.setattr(torch, "compile", wrong())
    run(x)
    run(x)


def test_a_batch_of_padding_shows_what_a_compiler_did(monkeypatch):
    trainer, _ = pair(NETS["rows"][0])
    run, x, mask = record(trainer, fuse=True), NETS["rows"][1](0), torch.zeros(5, dtype=torch.bool)
    run(x)
    run(x)
    monkeypatch.setattr(torch, "compile", wrong(sums=1.01))
    with pytest.raises(UnsupportedOperationError, match="gives other sums"):
        run(x, unit_mask=mask)


def test_where_all_gradients_are_zero_nothing_is_compared_and_nothing_fused(monkeypatch):
    trainer, _ = pair(lambda: torch.nn.Linear(4, 2, bias=False))
    run, x = record(trainer, fuse=True), torch.zeros(5, 4)
    run(x)
    run(x)
    monkeypatch.setattr(torch, "compile", wrong(sums=1.01))
    with pytest.raises(UnsupportedOperationError, match="can not be compared"):
        run(x)


def test_a_pass_that_writes_into_its_batch_is_compared_on_a_copy(monkeypatch):
    trainer, plain = pair(NETS["rows"][0])
    module = trainer._step.module
    monkeypatch.setattr(torch, "compile", wrong())
    run = trainer.compile(lambda x: row_losses(module, x.mul_(2.0)), fuse=True)
    for round_ in range(4):
        x = NETS["rows"][1](round_)
        take(plain, 2.0 * x)
        run(x)
        assert_same(plain, trainer)
        plain.apply()
        trainer.apply()


def test_on_a_gpu_the_recording_is_a_cuda_graph(monkeypatch):
    """The order of things, with a stand-in for the graph: warm first, captured once, replayed with copies."""
    made: list[object] = []

    class Graph:
        def __init__(self, run, constants, flat, mask, inputs) -> None:
            made.append(self)
            self._run = lambda mask, inputs: run(*constants, flat, mask, *inputs)

        def replay(self, mask: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
            return self._run(mask, inputs)[0]

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

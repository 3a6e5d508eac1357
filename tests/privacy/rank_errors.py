"""What one rank alone does wrong: errors that it swallows or has for itself. Every function is called on all ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import TensorDataset

from synthward import PrivacyEngine
from synthward.engine import KeySchedule, Ledger, PrivateTrainer
from synthward.engine.distributed.ledger import SharedLedger
from synthward.engine.distributed.ranks import Ranks
from synthward.engine.errors import SynthwardError
from tests.distributed.cases import whole
from tests.privacy.harness import make_plan
from tests.privacy.rank_faults import engine_over, outcome, parameters_of
from tests.privacy.rank_scenes import NOISY, loss_of, network, pass_over, records, trainer_of


class _BatchLostError(Exception):
    """What a loop swallows, as it would a batch that does not fit into memory."""


class _Breaks(torch.autograd.Function):
    """Raises in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise _BatchLostError


# ids


def ids_on_one_rank(how: str, rank: int) -> dict[str, Any]:
    """A loader of each rank's own; one rank says whose its rows are, the others do not."""
    module = network(how)
    optimizer, _, engine = engine_over(module, TensorDataset(records(2)), poisson_sampling=False)
    before = parameters_of(module)
    try:
        with engine.units([7, 8]) if dist.get_rank() == rank else contextlib.nullcontext():
            module(records(2)).sum().backward()
        optimizer.step()
    except SynthwardError as error:
        return outcome(module, before, error)
    return outcome(module, before, None)


def ids_beside_nobody(how: str) -> dict[str, Any]:
    """One rank gives ids, the other has no row in this step."""
    module = network(how)
    optimizer, _, engine = engine_over(module, TensorDataset(records(2)), poisson_sampling=False)
    before, x = parameters_of(module), records(2)
    with engine.units([7, 8]) if dist.get_rank() == 0 else contextlib.nullcontext():
        module(x if dist.get_rank() == 0 else x[:0]).sum().backward()
    optimizer.step()
    return outcome(module, before, None)


# errors that a loop swallows


def swallowed_by_a_trainer(where: str) -> list[dict[str, Any]]:
    """The second of three physical batches fails on rank 1, whose loop goes on: what `apply` says, and what it says of
    the step that all ranks begin afresh."""
    module = network("replicas")
    trainer = trainer_of(module, max_grad_norm=0.5)
    before, found = parameters_of(module), []
    for fails in (True, False):
        error = None
        for batch in range(3):
            is_bad = fails and batch == 1 and dist.get_rank() == 1
            with contextlib.suppress(_BatchLostError, SynthwardError):
                _pass_that_fails(trainer, module, where if is_bad else "")
        try:
            trainer.apply()
        except SynthwardError as raised:
            error = raised
            trainer.discard()
        found.append(outcome(module, before, error))
    return found


def _pass_that_fails(trainer: PrivateTrainer, module: nn.Module, where: str) -> None:
    x = records(4)[dist.get_rank() :: 2]
    with trainer.capture():
        losses = loss_of(module, x)
        if where == "forward":
            raise _BatchLostError
    if where == "units mix":
        losses = losses - losses.mean()
    elif where == "backward":
        losses = _Breaks.apply(losses)
    elif where == "arguments":
        losses = losses[:, None]
    trainer.backward(losses, rows_per_unit=1)


def swallowed_while_sharded(folder: str, where: str) -> None:
    """The same where ranks wait for each other in each pass. To be started without a group."""
    with Ranks.join(patience=60.0):
        module = network("whole")
        trainer = trainer_of(module, max_grad_norm=0.5)
        for batch in range(3):
            is_bad = batch == 1 and dist.get_rank() == 1
            with contextlib.suppress(_BatchLostError, SynthwardError):
                _pass_that_fails(trainer, module, where if is_bad else "")
        trainer.apply()
        Path(folder, "went on").touch()


def swallowed_by_all() -> dict[str, Any]:
    """On all ranks alike: none goes on from there either."""
    module = network("replicas")
    trainer = trainer_of(module, max_grad_norm=0.5)
    before = parameters_of(module)
    for where in ("", "units mix", ""):
        with contextlib.suppress(SynthwardError):
            _pass_that_fails(trainer, module, where)
    try:
        trainer.apply()
    except SynthwardError as error:
        return outcome(module, before, error)
    return outcome(module, before, None)


class _Failing(nn.Module):
    """A module whose forward pass fails when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.where = network("replicas"), ""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        if self.where == "forward":
            raise _BatchLostError
        return out


def swallowed_by_a_loop(where: str) -> list[dict[str, Any]]:
    """Rank 1 loses a batch of its own loader and takes the next one for the same step; then all begin afresh."""
    module = _Failing()
    optimizer, _, _ = engine_over(module, TensorDataset(records(2)), poisson_sampling=False)
    before, found = parameters_of(module), []
    for fails in (True, False):
        error = None
        for batch in range(2 if fails and dist.get_rank() == 1 else 1):
            optimizer.zero_grad()
            module.where = where if fails and dist.get_rank() == 1 and batch == 0 else ""
            with contextlib.suppress(_BatchLostError):
                out = module(records(2))
                (_Breaks.apply(out) if module.where == "backward" else out).sum().backward()
        try:
            optimizer.step()
        except SynthwardError as raised:
            error = raised
        found.append(outcome(module, before, error))
    return found


def unequal_batches() -> list[np.ndarray]:
    """The same eight units in physical batches of one size, or of as many as each rank likes: both releases."""
    found, rank = [], dist.get_rank()
    for sizes in ((2, 2), (1, 4)):
        module = network("replicas")
        trainer = trainer_of(module, max_grad_norm=0.5)
        for part in records(8)[rank::2].split(sizes[rank]):
            pass_over(trainer, module, part)
        trainer.apply()
        found.append(parameters_of(module))
    return found


# errors of one rank alone while things are made


def made_wrong_on_one(folder: str, what: str, rank: int) -> str:
    """The error of a call that only one rank makes wrongly."""
    differs = dist.get_rank() == rank
    try:
        with _kept(folder, what) as kept:
            _make(what, differs, kept)
    except SynthwardError as error:
        return f"{type(error).__name__}: {error}"
    return ""


@contextlib.contextmanager
def _kept(folder: str, what: str) -> Iterator[Ledger]:
    """A ledger of this rank's own, private."""
    path = Path(folder) / f"{what} {dist.get_rank()}.jsonl".replace(" ", "-")
    ledger = Ledger.create(path, run_id="r", unit="row", delta=1e-5, key_id="0" * 32, private=True)
    try:
        yield ledger
    finally:
        ledger.close()
        path.unlink()


def _make(what: str, differs: bool, kept: Ledger) -> None:
    ranks = Ranks.current()
    module: nn.Module = nn.Linear(4, 4)
    if what == "seed":
        PrivacyEngine(seed=1 if differs else None, ledger=kept if ranks.is_main else None)
    elif what == "seed of all":
        PrivacyEngine(seed=1, ledger=kept if ranks.is_main else None)
    elif what == "accountant":
        PrivacyEngine("abacus" if differs else "rdp")
    elif what == "ledger elsewhere":
        PrivacyEngine(ledger=kept if differs else None)
    elif what == "shared ledger":
        SharedLedger(ranks, kept if ranks.is_main or differs else None)
    elif what == "plain ledger":
        keys = KeySchedule.shared(ranks)
        optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
        PrivateTrainer(module, optimizer, make_plan(**NOISY), keys=keys, ledger=kept if differs else None)
    elif what == "layer":
        trainer_of(nn.Sequential(module, nn.BatchNorm1d(4)) if differs else module, **NOISY)
    else:
        wrong: dict[str, dict[str, Any]] = {
            "clipping": {"clipping": "upwards"},
            "reduction": {"loss_reduction": "median"},
            "ids": {"unit_ids": [1, 2, 3]},
            "batch": {"expected_batch_size": -1.0},
        }
        engine_over(module, TensorDataset(torch.zeros(8, 4)), **(wrong[what] if differs else {}))


# modules


def mesh_in_another_order() -> tuple[str, str]:
    """Sharded over the same two ranks, the second one first: its rows are not where their noise would be."""
    module = nn.Linear(4, 4)
    fully_shard(module, mesh=DeviceMesh("cpu", [1, 0]))
    try:
        trainer_of(module, **NOISY)
    except SynthwardError as error:
        return type(error).__name__, str(error)
    return "", ""


def pairs_of_four(is_crossed: bool) -> tuple[str, list[np.ndarray]]:
    """Two pairs of ranks train apart, each a module that is sharded over itself, or over one rank of each pair: the
    refusal, or the parameters after a step."""
    rank = dist.get_rank()
    groups = [dist.new_group(pair) for pair in ([0, 1], [2, 3])]
    crossed = [dist.new_group(pair) for pair in ([0, 2], [1, 3])]
    ranks, module = Ranks(groups[rank // 2]), network("replicas")
    spread = crossed[rank % 2] if is_crossed else groups[rank // 2]
    fully_shard(module, mesh=DeviceMesh.from_group(spread, "cpu"))
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    try:
        keys = KeySchedule.reproducible(3)
        trainer = PrivateTrainer(module, optimizer, make_plan(**NOISY), keys=keys, ranks=ranks)
    except SynthwardError as error:
        return f"{type(error).__name__}: {error}", []
    pass_over(trainer, module, records(4)[ranks.rank :: 2])
    trainer.apply()
    return "", [whole(p) for p in module.parameters()]


class _Shifted(nn.Module):
    """A layer, and beside it what is not trained: buffers, and a parameter that `fully_shard` leaves alone."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.register_buffer("shift", torch.randn(3))
        self.register_buffer("codes", torch.randint(-9, 9, (4,), dtype=torch.int16))
        self.register_buffer("count", torch.tensor(dist.get_rank()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x) + self.shift + self.frozen
        return out


def untrained_values(how: str) -> list[np.ndarray]:
    """What is not trained of a module that was begun with other values on each rank."""
    torch.manual_seed(dist.get_rank())
    module = _Shifted()
    if how != "replicas":
        fully_shard(module, ignored_params={module.frozen})
    trainer_of(module, torch.optim.SGD(module.inner.parameters(), lr=1.0), **NOISY)
    return [whole(value) for value in (module.frozen, *module.buffers())]


def buffers_that_differ(how: str) -> str:
    """The refusal of a module that has a buffer more on rank 1."""
    torch.manual_seed(0)
    module = _Shifted()
    module.frozen = None  # type: ignore[assignment]
    if dist.get_rank() == 1:
        module.register_buffer("more", torch.zeros(2))
    if how != "replicas":
        fully_shard(module)
    try:
        trainer_of(module, **NOISY)
    except SynthwardError as error:
        return f"{type(error).__name__}: {error}"
    return ""

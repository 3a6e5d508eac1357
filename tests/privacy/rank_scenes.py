"""What each rank does in the tests of privacy on several ranks. Every function is called on all of them."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from synthward.engine import KeySchedule, Ledger, PrivateTrainer
from synthward.engine.accounting.matrix import Strategy
from synthward.engine.distributed.ledger import SharedLedger
from synthward.engine.distributed.ranks import Ranks
from synthward.engine.errors import RankLostError, SynthwardError
from tests.distributed.cases import spread, watched, whole
from tests.privacy.harness import make_plan

SIGMA, CLIP, EXPECTED = 1.7, 0.5, 4.0
NOISY = {"noise_multiplier": SIGMA, "max_grad_norm": CLIP, "expected_batch_size": EXPECTED}


def silent(how: str, width: int) -> nn.Module:
    """Zero weights; with inputs of zero its gradient is zero, and it releases noise alone."""
    module = nn.Linear(width, width, bias=False)
    nn.init.zeros_(module.weight)
    spread(module, how)
    return module


def trainer_of(module: nn.Module, optimizer: Any = None, keys: Any = None, **plan: Any) -> PrivateTrainer:
    """By keys from the operating system that all ranks share, unless others are given."""
    optimizer = optimizer or torch.optim.SGD(module.parameters(), lr=1.0)
    keys = keys or KeySchedule.shared(Ranks.current())
    ledger = plan.pop("ledger", None)
    return PrivateTrainer(module, optimizer, make_plan(**plan), keys=keys, ledger=ledger)


def pass_over(trainer: PrivateTrainer, module: nn.Module, x: Tensor, mask: list[bool] | None = None) -> None:
    """One physical batch on this rank, a row a unit."""
    with trainer.capture():
        losses = loss_of(module, x)
    trainer.backward(losses, rows_per_unit=1, unit_mask=None if mask is None else torch.tensor(mask))


def loss_of(module: nn.Module, x: Tensor) -> Tensor:
    out = module(x)
    return torch.sin(out).sum(1) + out.square().sum(1)


# noise


def noise(how: str, batches: int, optimizer: str, width: int = 1000) -> np.ndarray | None:
    """One release of zeros; rank 0's answer, None elsewhere."""
    module = silent(how, width)
    made: Any = None
    if optimizer == "RMSprop":
        # With no memory and a huge eps the update is the noisy mean itself.
        made = torch.optim.RMSprop(module.parameters(), lr=1e6, eps=1e6, alpha=0.0)
    trainer = trainer_of(module, made, **NOISY)
    for _ in range(batches):
        pass_over(trainer, module, torch.zeros(2, width))
    trainer.apply()
    moved = whole(module.weight)
    return -moved if dist.get_rank() == 0 else None


def noise_of_steps(how: str) -> list[np.ndarray]:
    """Three releases in a row, and one of a second network under the same keys."""
    keys, found = KeySchedule.shared(Ranks.current()), []
    for steps in (3, 1):
        module = silent(how, 300)
        trainer = trainer_of(module, keys=keys, **NOISY)
        for _ in range(steps):
            before = whole(module.weight)
            pass_over(trainer, module, torch.zeros(1, 300))
            trainer.apply()
            found.append((before - whole(module.weight)).ravel())
    return found


def noise_after_seeds(how: str) -> list[np.ndarray]:
    """Two releases, each after the same global seed on all ranks."""
    found = []
    for _ in range(2):
        torch.manual_seed(123)
        np.random.seed(123)  # noqa: NPY002 - the legacy global state is what is under test
        module = silent(how, 300)
        torch.manual_seed(123)
        state = torch.get_rng_state()
        trainer = trainer_of(module, **NOISY)
        pass_over(trainer, module, torch.zeros(1, 300))
        trainer.apply()
        assert torch.equal(state, torch.get_rng_state()), "the global state was drawn from"
        found.append(-whole(module.weight).ravel())
    return found


def noise_under_seeds(how: str) -> list[np.ndarray]:
    """Two releases under the same reproducible key and different global seeds, other ones on each rank."""
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed + 10 * dist.get_rank())
        module = silent(how, 30)
        trainer = trainer_of(module, keys=KeySchedule.reproducible(7), **NOISY)
        trainer.apply()
        found.append(whole(module.weight))
    return found


def places_of_noise(how: str) -> list[tuple[int, int, int]]:
    """Where this rank's noise was taken from: two steps, gone back, two more, forward over three, one more."""
    keys, places = KeySchedule.shared(Ranks.current()), []
    module = silent(how, 20)
    trainer = trainer_of(module, keys=keys, **NOISY)
    saved = trainer.state_dict()
    with watched(keys.key("noise"), places):
        for _ in range(2):
            trainer.apply()
        trainer.load_state_dict(saved)
        for _ in range(2):
            trainer.apply()
        trainer.advance_to(5)
        trainer.apply()
    return places


# refusals


def refused(what: str) -> tuple[str, str]:
    """The error of a trainer whose rank 1 differs in one thing from the others: its class and text."""
    differs = dist.get_rank() == 1
    try:
        _differ(what, differs)
    except SynthwardError as error:
        return type(error).__name__, str(error)
    return "", ""


PLANS: dict[str, dict[str, Any]] = {
    "sample_rate": {"sample_rate": 0.25},
    "noise_multiplier": {"noise_multiplier": 1.0},
    "max_grad_norm": {"max_grad_norm": 2.0},
    "steps": {"steps": 11},
    "expected_batch_size": {"expected_batch_size": 2.0},
    "clipping": {"clipping": "automatic"},
    "strategy": {"strategy": Strategy("banded", (1.0, 0.5))},
    "period": {"period": 2},
    "max_batch_size": {"max_batch_size": 5, "max_units": 50},
    "arithmetic": {"arithmetic": "discrete"},
}

MODULES: dict[str, Callable[[], nn.Module]] = {
    "one layer more": lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)),
    "another shape": lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4)),
    "another name": lambda: nn.Sequential(nn.Linear(4, 4), nn.Identity(), nn.Linear(4, 4)),
    "no bias": lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False)),
    "a frozen parameter": lambda: _frozen(),
}

OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "another class": lambda m: torch.optim.Adam(m.parameters(), lr=0.1),
    "learning rate": lambda m: torch.optim.SGD(m.parameters(), lr=0.2),
    "momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
    "weight decay": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, weight_decay=0.1),
    "two groups": lambda m: torch.optim.SGD(
        [{"params": m[0].parameters()}, {"params": m[1].parameters()}], lr=0.1
    ),
    # Of the same shapes, so that nothing else would show it.
    "another order": lambda m: torch.optim.SGD([*m[1].parameters(), *m[0].parameters()], lr=0.1),
}


def _frozen() -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[0].bias.requires_grad_(False)
    return module


def _differ(what: str, differs: bool) -> None:
    kind, _, name = what.partition(": ")
    torch.manual_seed(0)
    module: nn.Module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    if kind == "module" and differs:
        module = MODULES[name]()
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer: Any = torch.optim.SGD(trained, lr=0.1)
    if kind == "optimizer" and differs:
        optimizer = OPTIMIZERS[name](module)
    keys = KeySchedule.shared(Ranks.current())
    if kind == "keys":
        keys = KeySchedule.from_os() if name == "of their own" else KeySchedule.reproducible(int(differs))
    plan = make_plan(**(PLANS[name] if kind == "plan" and differs else {}))
    ledger: Any = None
    if kind == "ledger":
        ledger = _ledger(Path(name), keys, f"{dist.get_rank()}")
    PrivateTrainer(module, optimizer, plan, keys=keys, ledger=ledger)


def _ledger(folder: Path, keys: KeySchedule, name: str, **changes: Any) -> Ledger:
    settings: dict[str, Any] = {"unit": "row", "delta": 1e-5, "private": keys.is_private, "accountant": "rdp"}
    return Ledger.create(folder / f"{name}.jsonl", run_id="r", key_id=keys.key_id, **(settings | changes))


def first_values() -> list[np.ndarray]:
    """Ranks that begin with other weights each: what each has when its trainer is made, and after a step."""
    torch.manual_seed(dist.get_rank())
    module = nn.Linear(7, 5)
    trainer = trainer_of(module, **NOISY)
    found = [whole(p) for p in module.parameters()]
    pass_over(trainer, module, torch.ones(2, 7))
    trainer.apply()
    return [*found, *(whole(p) for p in module.parameters())]


def wrapped_by_ddp(how: str) -> str:
    """The refusal of a module whose gradients torch itself would add up without noise."""
    module = nn.parallel.DistributedDataParallel(nn.Linear(4, 3))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    try:
        if how == "trainer":
            trainer = trainer_of(module, optimizer)
            pass_over(trainer, module, torch.ones(2, 4))
        else:
            from synthward import PrivacyEngine

            data = torch.utils.data.TensorDataset(torch.ones(8, 4), torch.zeros(8, dtype=torch.int64))
            loader = torch.utils.data.DataLoader(data, batch_size=4)
            PrivacyEngine().make_private(
                module=module,
                optimizer=optimizer,
                data_loader=loader,
                noise_multiplier=1.0,
                max_grad_norm=1.0,
            )
    except SynthwardError as error:
        return str(error)
    return ""


# units


def network(how: str) -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 7), nn.SiLU(), nn.Linear(7, 3))
    spread(module, how)
    return module


def records(count: int) -> Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(4))


def released(
    how: str, rows: list[Tensor], clipping: str = "flat", masks: list[Any] | None = None
) -> np.ndarray:
    """The sum that one step without noise releases, where rank r has the units `rows[r]`; float64 [P]."""
    module, rank = network(how), dist.get_rank()
    trainer = trainer_of(module, max_grad_norm=CLIP, clipping=clipping)
    before = _vector(module)
    pass_over(trainer, module, rows[rank], None if masks is None else masks[rank])
    trainer.apply()
    return before - _vector(module)


def _vector(module: nn.Module) -> np.ndarray:
    return np.concatenate([whole(p).ravel().astype(np.float64) for p in module.parameters()])


def parts_of(x: Tensor, size: int) -> list[Tensor]:
    """Row r, r + size, ... for rank r."""
    return [x[rank::size] for rank in range(size)]


def bad_unit(how: str, bad: float, clipping: str) -> np.ndarray:
    """Eight units, of which one of rank 1's is not finite."""
    x = records(8)
    x[1, 2] = bad
    return released(how, parts_of(x, dist.get_world_size()), clipping)


def neighbours(how: str, clipping: str) -> list[np.ndarray]:
    """Eight units: all of them, and all but each, which is masked where it would have been."""
    size = dist.get_world_size()
    parts = parts_of(records(8), size)
    found = [released(how, parts, clipping)]
    for left_out in range(8):
        masks = [[rank + size * i != left_out for i in range(len(parts[rank]))] for rank in range(size)]
        found.append(released(how, parts, clipping, masks))
    return found


def moved_between_ranks(how: str) -> list[np.ndarray]:
    """The same eight units, spread over the ranks in other ways; at last all on rank 0, and none on others."""
    x, size = records(8), dist.get_world_size()
    ways = [parts_of(x, size), parts_of(x.flip(0), size), [x, *(x[:0] for _ in range(size - 1))]]
    return [released(how, rows) for rows in ways]


# the ledger


def unpaid(how: str, folder: str, failure: str) -> dict[str, Any]:
    """A step that is not paid for, and then one that is. Of each rank: errors, and whether anything moved."""
    ranks, keys = Ranks.current(), KeySchedule.shared(Ranks.current())
    limit = {"target_epsilon": 0.5} if failure == "the budget is too small" else {}
    kept = _ledger(Path(folder), keys, "ledger", **limit) if ranks.is_main else None
    ledger, module = SharedLedger(ranks, kept), network(how)
    plan = {**NOISY, "sample_rate": 0.01, "steps": 1000}
    trainer = trainer_of(module, keys=keys, ledger=ledger, **plan)
    before, errors = _vector(module), []
    flush = os.fsync
    if failure == "the disk is full" and ranks.is_main:
        os.fsync = _full  # type: ignore[assignment]
    try:
        if failure != "no lease":
            ledger.lease(trainer.plan.event(1), 0, 1000)
    except SynthwardError as error:
        errors.append((type(error).__name__, str(error)))
    finally:
        os.fsync = flush
    x = records(8)[ranks.rank :: ranks.world_size]
    pass_over(trainer, module, x)
    try:
        trainer.apply()
    except SynthwardError as error:
        errors.append((type(error).__name__, str(error)))
    found = {
        "errors": errors,
        "moved": float(np.abs(_vector(module) - before).max()),
        "steps": trainer.steps_done,
    }
    ledger.lease(trainer.plan.event(1), 0, 1)
    trainer.apply()
    found["moved then"] = float(np.abs(_vector(module) - before).max())
    found["charged"] = sum(event.steps for event in ledger.events())  # type: ignore[attr-defined]
    if kept is not None:
        kept.close()
    return found


def _full(_: int) -> None:
    raise OSError(28, "No space left on device")


def one_refuses(folder: str) -> tuple[str, float]:
    """Rank 1 is handed an operation that mixes units in the middle of a step, and ends. What the others raise, and how
    far their parameters moved. To be started without a group."""
    with Ranks.join(patience=60.0) as ranks:
        module = network("replicas")
        trainer = trainer_of(module, **NOISY)
        pass_over(trainer, module, records(2))
        trainer.apply()
        before, x = _vector(module), records(2)
        with trainer.capture():
            losses = loss_of(module, x)
        if ranks.rank == 1:
            losses = losses - losses.mean()
        try:
            trainer.backward(losses, rows_per_unit=1)
            trainer.apply()
        except RankLostError as error:
            return str(error), float(np.abs(_vector(module) - before).max())
        Path(folder, "went on").touch()
        return "", float(np.abs(_vector(module) - before).max())


# what is left behind


def left_behind(how: str, arithmetic: str, needles: dict[str, np.ndarray]) -> dict[str, Any]:
    """What can be seen of the sums in the middle of a step and after it; `needles`: what no tensor may hold then."""
    module, rank, size = network(how), dist.get_rank(), dist.get_world_size()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    trainer = trainer_of(module, optimizer, **(NOISY | {"arithmetic": arithmetic}))
    found: dict[str, Any] = {}
    pass_over(trainer, module, records(8)[rank::size])
    found["gradients"] = [name for name, p in module.named_parameters() if p.grad is not None]
    found["moments"] = [list(state) for state in optimizer.state.values() if state]
    found["held"] = _holding(needles)
    try:
        trainer.state_dict()
    except SynthwardError as error:
        found["refused"] = type(error).__name__, str(error)
    trainer.apply()
    found["gradients then"] = [name for name, p in module.named_parameters() if p.grad is not None]
    found["names"] = sorted(trainer.state_dict())
    found["held then"] = _holding(needles)
    return found


def _holding(needles: dict[str, np.ndarray]) -> list[str]:
    """Which of the vectors stand somewhere in a tensor that is alive, to fp32."""
    gc.collect()
    found = set()
    for thing in gc.get_objects():
        if type(thing) not in (Tensor, nn.Parameter) or not thing.is_floating_point():
            continue
        # FSDP frees the memory of a layer's whole parameters, and leaves the tensors.
        if thing.untyped_storage().nbytes() < thing.numel() * thing.element_size():
            continue
        values = thing.detach().double().flatten().numpy()
        for name, needle in needles.items():
            if len(values) >= len(needle):
                windows = np.lib.stride_tricks.sliding_window_view(values, len(needle))
                if (np.abs(windows - needle) <= 1e-4 * np.abs(needle).max()).all(1).any():
                    found.add(name)
    return sorted(found)

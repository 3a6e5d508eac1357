"""Invariant 4, counted: which blocks of the cipher a run uses, and that no part of one serves twice.

A spy stands before every function of the extension that is given a key, and writes down the place that it was asked
for. The blocks are then enumerated by the layout that kernels/_chacha.py documents. A block is named by key, nonce and
counter; float32 noise that ends within a block may be continued in it by other normals of the same block, made of
other words, so normals are counted one by one. Blocks of two kinds of use must differ altogether.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from synthward import _C
from tests.privacy.harness import accumulate, dummy_loader, make_plan
from tests.privacy.nets import CASES
from tests.tinydata import SCHEMA, table, write_csv

EXTENSION = 1 << 63  # of the nonce
DISCRETE = np.uint64(1 << 63)  # of the counter
# What each function does with its place, and the argument whose length is the number of elements.
NORMALS = {
    "gaussian_noise": "out",
    "add_gaussian_noise": "tensor",
    "noisy_adam": "param",
    "noisy_sgd": "param",
}
INTEGERS = {"rounded_gaussian": "out", "discrete_release": "sums"}
WORDS = {"chacha20_words"}

# Parts of blocks, 16 * block + lane or word, uint64 [n]: sixteen lanes at most, or sixteen words.
Parts = NDArray[np.uint64]


def parts_of_normals(element: NDArray[np.uint64]) -> Parts:
    block = element // np.uint64(256) * np.uint64(16) + element % np.uint64(16)
    return block * np.uint64(16) + element % np.uint64(256) // np.uint64(16)


def parts_of_integers(element: NDArray[np.uint64]) -> Parts:
    """Without the bit of the counter that marks their blocks."""
    block = element // np.uint64(128) * np.uint64(16) + element % np.uint64(16)
    return block * np.uint64(16) + element % np.uint64(128) // np.uint64(16)


def counters_of(kind: str, parts: Parts) -> NDArray[np.uint64]:
    blocks = parts >> np.uint64(4)
    return np.unique(blocks | DISCRETE if kind == "integers" else blocks)


class Uses:
    """Everything that was drawn from the cipher while the spy stood there."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, bytes, int, int, int, int]] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> Uses:
        for name, function in vars(_C).items():
            signature = str(getattr(function, "__doc__", "")).split("->")[0]
            # Types hold colons of their own in no argument of these functions.
            names = re.findall(r"[(,] ?(\w+): ", signature)
            if "key" in names:
                assert name in {*NORMALS, *INTEGERS, *WORDS}, f"{name}: takes a key and is not known here"
                monkeypatch.setattr(_C, name, self._spy(name, function, names))
        return self

    def _spy(self, name: str, function: Callable[..., Any], names: list[str]) -> Callable[..., Any]:
        def spy(*arguments: Any, **options: Any) -> Any:
            given = dict(zip(names, arguments, strict=False)) | options
            count = given["count"] if name in WORDS else len(given[(NORMALS | INTEGERS)[name]])
            if given.get("noise_std") != 0.0:
                place = (bytes(given["key"]), given["stream"], given["step"], given["start"])
                self.calls.append((name, *place, count))
            return function(*arguments, **options)

        return spy

    def places(self) -> dict[tuple[bytes, int], dict[str, Parts]]:
        """By key and nonce: the parts of blocks that each kind of use took, as often as it did."""
        found: dict[tuple[bytes, int], dict[str, list[Parts]]] = defaultdict(lambda: defaultdict(list))
        for name, key, stream, step, start, count in self.calls:
            assert 0 <= stream < 1 << 15 and 0 <= step < 1 << 48
            nonce = stream << 48 | step
            place = np.arange(start, start + count, dtype=np.uint64)
            if name in WORDS:
                found[key, nonce]["words"].append(place)
            elif name in INTEGERS:
                found[key, nonce]["integers"].append(parts_of_integers(place))
            else:
                found[key, nonce]["normals"].append(parts_of_normals(place))
                # Those of them that have a rare radius use the block of the same counter here.
                found[key, nonce | EXTENSION]["normals"].append(parts_of_normals(place))
        return {
            place: {kind: np.concatenate(used) for kind, used in kinds.items()}
            for place, kinds in found.items()
        }

    def assert_once(self) -> None:
        for (_, nonce), kinds in self.places().items():
            where = f"stream {nonce >> 48}, step {nonce & (1 << 48) - 1}"
            for kind, used in kinds.items():
                assert len(np.unique(used)) == len(used), f"{kind} twice: {where}"
            for one, other in combinations(kinds, 2):
                shared = np.intersect1d(counters_of(one, kinds[one]), counters_of(other, kinds[other]))
                assert not len(shared), f"{one} and {other} from one block: {where}"


@pytest.fixture
def uses(monkeypatch: pytest.MonkeyPatch) -> Uses:
    return Uses().install(monkeypatch)


# the test of the test


def draw(name: str, start: int = 0, count: int = 300, step: int = 0, key: bytes = bytes(32)) -> None:
    from synthward import kernels

    place = {"key": key, "stream": 1, "step": step, "start": start}
    if name == "words":
        kernels.chacha20_words(count=count, **place)
    elif name == "normals":
        kernels.gaussian_noise(count, **place)
    elif name == "integers":
        kernels.rounded_gaussian(count, scale=4.0, **place)
    else:
        kernels.discrete_release_(
            torch.zeros(count, dtype=torch.float64), torch.zeros(count), grid=1.0, noise_std=4.0, **place
        )


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("normals", 0), ("normals", 299)),
        (("integers", 0), ("integers", 0)),
        (("integers", 0), ("release", 299)),
        (("words", 0), ("words", 299)),
        # Words and normals of one block are not the same numbers, and would not be independent.
        (("normals", 0), ("words", 0)),
        (("words", 0), ("normals", 5)),
    ],
)
def test_a_second_use_is_noticed(uses, first, second):
    draw(*first)
    uses.assert_once()
    draw(*second)
    with pytest.raises(AssertionError, match=r"twice|from one block"):
        uses.assert_once()


def test_uses_side_by_side_are_none(uses):
    """Another range, step or key; and integers at the very place of normals, or of words."""
    draw("normals", 0, 300)
    draw("normals", 300, 1)
    draw("normals", 301, 300)
    draw("integers", 0, 300)
    draw("release", 300, 129)
    draw("words", step=1)
    draw("integers", step=1)
    draw("normals", key=bytes(31) + b"\1")
    assert len(uses.calls) == 8
    uses.assert_once()


# runs


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "fused Adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
    "fused SGD, two groups": lambda parameters: torch.optim.SGD(
        [{"params": parameters[:1]}, {"params": parameters[1:], "momentum": 0.9}], lr=1e-3
    ),
    "torch's own": lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3),
}


def private_trainer(module: nn.Module, keys: Any, optimizer: str, clipping: str) -> Any:
    from synthward.engine import PrivateTrainer

    plan = make_plan(noise_multiplier=1.3, steps=20, expected_batch_size=64, clipping=clipping)
    return PrivateTrainer(
        module, OPTIMIZERS[optimizer](list(module.parameters())), plan, keys=keys, ledger=None
    )


def train(trainer: Any, module: nn.Module, sampler: Any, steps: int) -> None:
    """Logical steps of no, one or two physical batches, whatever the sampler draws."""
    for index in range(steps):
        units = CASES[0].units([1] * 3)
        sampler.draw(trainer.steps_done)
        for _ in range(index % 3):
            accumulate(trainer, module, units)
        trainer.apply()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("clipping", ["flat", "adaptive"])
def test_nothing_is_used_twice_by_trainers_samplers_and_queries(uses, tmp_path, optimizer, clipping):
    """Two trainers on one key schedule, queries between their steps, one trainer rolled back, one resumed with its own
    keys, as a new process would."""
    from synthward.engine import KeySchedule, Ledger, PoissonSampler, QueryMechanism

    keys = KeySchedule.from_os()
    settings = {"run_id": "r", "unit": "patient", "delta": 1e-5, "private": True}
    with Ledger.create(tmp_path / "ledger.jsonl", key_id=keys.key_id, **settings) as ledger:
        queries = [QueryMechanism(ledger, keys) for _ in range(2)]

        def ask() -> None:
            for mechanism in queries:
                for size in (1, 700):
                    mechanism.gaussian_vector(
                        np.zeros(size), l2_sensitivity=1.0, noise_multiplier=2.0, note="a query"
                    )

        modules = [CASES[0].module(seed) for seed in range(3)]
        trainers = [private_trainer(module, keys, optimizer, clipping) for module in modules[:2]]
        sampler = PoissonSampler(1000, 0.01, keys.key("sampler"))
        ask()
        train(trainers[0], modules[0], sampler, 4)
        saved = trainers[0].state_dict()
        train(trainers[1], modules[1], PoissonSampler(0, 0.01, keys.key("sampler")), 4)
        ask()
        train(trainers[0], modules[0], sampler, 3)
        # Rolled back: the trainer's steps are counted from the checkpoint again, its noise is not.
        trainers[0].load_state_dict(saved)
        train(trainers[0], modules[0], PoissonSampler(0, 0.01, keys.key("sampler")), 3)
        fresh = KeySchedule.from_os()
        resumed = private_trainer(modules[2], fresh, optimizer, clipping)
        resumed.load_state_dict(saved)
        train(resumed, modules[2], PoissonSampler(1000, 0.01, fresh.key("sampler")), 3)
    drawn = {name for name, *_ in uses.calls}
    assert "chacha20_words" in drawn and drawn & NORMALS.keys()
    places = uses.places()
    assert len({key for key, _ in places}) == 5  # noise, sampler and queries; of the resumed one, no queries
    # 17 steps of five runs, each with its own nonce, that of its extension blocks, and what was asked and sampled.
    noise_steps = {place for place in places if place[0] in (keys.key("noise"), fresh.key("noise"))}
    assert len(noise_steps) == 2 * 17
    uses.assert_once()


def test_nothing_is_used_twice_by_two_modules_of_one_engine(uses):
    """Each has its own loader of Poisson draws, over the same records, and is trained for more than one epoch."""
    from synthward import PrivacyEngine

    engine = PrivacyEngine()
    units = CASES[0].units([1] * 12)
    inputs, targets = torch.cat([unit[0] for unit in units]), torch.cat([unit[1] for unit in units])
    for seed in range(2):
        module = CASES[0].module(seed)
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
        module, optimizer, loader = engine.make_private(
            module=module,
            optimizer=optimizer,
            data_loader=dummy_loader(inputs, targets, 4),
            noise_multiplier=1.1,
            max_grad_norm=1.0,
        )
        for _ in range(2):
            for x, y in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(module(x), y).backward()
                optimizer.step()
    drawn = [name for name, *_ in uses.calls]
    assert drawn.count("noisy_adam") == drawn.count("chacha20_words") == 2 * 2 * 3
    assert len({call[1] for call in uses.calls}) == 4
    uses.assert_once()


class Stopped(Exception):
    """Where the process would have died."""


@pytest.mark.slow
@pytest.mark.parametrize("generator", ["diffusion", "gan"])
def test_nothing_is_used_twice_by_a_fit_that_is_broken_off_and_resumed(
    uses, tmp_path, generator, monkeypatch
):
    from synthward.engine import PrivateTrainer
    from synthward.run import FitOptions, fit_run
    from synthward.schema import load_schema

    data = write_csv(tmp_path / "data.csv", table(60, 90))
    (tmp_path / "schema.toml").write_text(SCHEMA)
    options = FitOptions(generator=generator, accountant="rdp", steps=6, holdout=0.0)
    settings = {"epsilon": 3.0, "delta": 1e-5, "out": tmp_path / "run", "options": options}
    apply = PrivateTrainer.apply
    # What a lease pays for is not taken again, so there have to be several.
    monkeypatch.setattr("synthward.run.training.LEASE_STEPS", 2)

    def stop(self: Any) -> None:
        if self.steps_done == 3:
            raise Stopped
        apply(self)

    with monkeypatch.context() as patch:
        patch.setattr(PrivateTrainer, "apply", stop)
        with pytest.raises(Stopped):
            fit_run(data, load_schema(tmp_path / "schema.toml"), **settings)
    before = len(uses.calls)
    fit_run(data, load_schema(tmp_path / "schema.toml"), resume=True, **settings)
    assert 0 < before < len(uses.calls)
    uses.assert_once()
    # Nothing that was drawn before is drawn again: the keys are others.
    assert not {call[1] for call in uses.calls[:before]} & {call[1] for call in uses.calls[before:]}

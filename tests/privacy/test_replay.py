"""Record and replay over a whole `fit`: preparation, every training step, and all that is written.

A seeded run on D + x, then on D with what the mechanisms were asked in the first run. x is the last unit in the
sampler's order, so that all other units are drawn alike; it has several rows. Everything but times and names must be
equal to the byte, and no mechanism may be asked something that one unit moves by more than it declares.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from synthward.engine import KeySchedule, PrivateTrainer
from synthward.engine.errors import PrivacyError
from synthward.engine.replay import Recording, Release, differences, recording, tap
from tests.commandline import ACCOUNTANT
from tests.oracles import flat_parameters
from tests.privacy.harness import make_trainer
from tests.tinydata import SCHEMA, table, write_csv

STEPS, RATE = 60, 0.15
# Small enough that a mistake of one unit's clip is far above rounding: sums of some ten units in fp32.
ROUNDING = 1e-5
SETTINGS = {"hidden": 16, "blocks": 1}


@dataclass
class Fitted:
    """A run folder and what its mechanisms were asked."""

    folder: Path
    asked: Recording
    control: list[tuple[object, ...]]


def fitted(folder: Path, rows: list[dict[str, str]], generator: str, first: Fitted | None = None) -> Fitted:
    """A seeded fit under a recording; as a replay of `first` if it is given."""
    from synthward.run import FitOptions, fit_run
    from synthward.schema import load_schema

    folder.mkdir()
    (folder / "schema.toml").write_text(SCHEMA)
    options = FitOptions(
        generator=generator,
        accountant=ACCOUNTANT,
        steps=STEPS,
        sample_rate=RATE,
        max_grad_norm=0.5,
        holdout=0.25,
        seed=5,
        settings=SETTINGS,
    )
    progress = Watched()
    with recording(None if first is None else first.asked) as asked:
        fit_run(
            write_csv(folder / "data.csv", rows),
            load_schema(folder / "schema.toml"),
            epsilon=3.0,
            delta=1e-5,
            out=folder / "run",
            options=options,
            progress=progress,
        )
    return Fitted(folder / "run", asked, progress.seen)


class Watched:
    """Keeps what a run says of its course; the number of rows that were read is for the custodian's eyes only."""

    def __init__(self) -> None:
        self.seen: list[tuple[object, ...]] = []

    def task(self, name: str, total: int | None = None) -> WatchedTask:
        self.seen.append(("task", name, total))
        return WatchedTask(self, name)

    def note(self, text: str) -> None:
        self.seen.append(("note", text))


class WatchedTask:
    def __init__(self, watched: Watched, name: str) -> None:
        self._watched, self._name = watched, name

    def advance(self, count: int, **figures: object) -> None:
        self._watched.seen.append((self._name, count, tuple(figures.items())))

    def at(self, count: int, **figures: object) -> None:
        if self._name != "read":
            self._watched.seen.append((self._name, "at", count, tuple(figures.items())))

    def close(self) -> None:
        self._watched.seen.append((self._name, "closed"))


def neighbours(extra: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(D + x, D): x is a patient of `extra` rows, trained on, the last in the sampler's order."""
    others = table(60, 90)
    more = [row | {"patient": "p90001"} for row in table(30, 45, seed=4)[:extra]]
    return others + more, others


UNLIKE = re.compile(
    rb'"(created|time|t_utc|run_id|hash|prev|ledger_head)": ?"[^"]*"'
    rb'|"(steps_per_second|seconds_left|seconds)": ?[^,}]*'
)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run, without times, names and the hashes over them."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {name: UNLIKE.sub(b"", data) for name, data in files.items()}


@pytest.fixture(scope="module", params=["diffusion", "gan"])
def pair(request, tmp_path_factory) -> tuple[Fitted, Fitted]:
    """The runs on D + x and, replayed, on D."""
    with_x, without_x = neighbours(extra=7)
    folder = tmp_path_factory.mktemp(request.param)
    first = fitted(folder / "with", with_x, request.param)
    return first, fitted(folder / "without", without_x, request.param, first)


def test_each_mechanism_is_asked_within_its_sensitivity(pair):
    first, second = pair
    assert differences(first.asked, second.asked, rounding=ROUNDING) == []
    kinds = [release.kind for release in first.asked.releases]
    assert kinds == ["gaussian_vector"] + ["step"] * STEPS


def test_the_unit_is_in_what_is_asked(pair):
    """In about the share of steps that the sampler says, at the whole of C; else the test above shows nothing."""
    first, second = pair
    moved = [a.distance(b) for a, b in zip(first.asked.releases, second.asked.releases, strict=True)][1:]
    bound = first.asked.releases[1].sensitivity
    taken = [m for m in moved if m > 1e-3 * bound]
    assert 1 <= len(taken) <= 25  # Binomial(60, .15) is there but for 1e-4 on either side; the seed is fixed
    assert max(taken) > 0.99 * bound
    assert all(m < 1e-5 * bound for m in moved if m not in taken), "a step without the unit is another step"


def test_all_that_is_written_is_equal_to_the_byte(pair):
    first, second = (contents(fit.folder) for fit in pair)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []
    assert "model.safetensors" in first


def test_the_course_of_the_run_is_the_same(pair):
    first, second = pair
    assert first.control == second.control


# The tests above can fail: leaks, each put into a fit


def leak(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """One of the mistakes of section 3 of the catalogue, in the fit of this process."""
    from synthward.engine import QueryMechanism
    from synthward.generators.diffusion import DiffusionGenerator
    from synthward.run import fit, training

    if what == "denominator":
        real = training.Training.__init__

        def init(self, folder, encoder, records, plan, *rest, **more):
            real(self, folder, encoder, records, plan, *rest, **more)
            self.trainer._step._grad_scale = 1.0 / (plan.sample_rate * records.num_units)

        monkeypatch.setattr(training.Training, "__init__", init)
    elif what == "count in a file":
        real_run = fit.train_run

        def run(folder, train, *rest, **more):
            folder.update(records=train.num_rows)
            return real_run(folder, train, *rest, **more)

        monkeypatch.setattr(fit, "train_run", run)
    elif what == "draws apart":
        losses, backward = DiffusionGenerator.unit_losses, PrivateTrainer.backward

        def losses_of_draws(self, batch, rng):
            settings, self.settings = self.settings, replace(self.settings, draws=1)
            try:
                return losses(self, batch, rng)
            finally:
                self.settings = settings

        def backward_of_draws(self, values, *, rows_per_unit, unit_mask, is_last):
            backward(self, values, rows_per_unit=1, unit_mask=unit_mask.repeat_interleave(rows_per_unit))

        monkeypatch.setattr(DiffusionGenerator, "unit_losses", losses_of_draws)
        monkeypatch.setattr(PrivateTrainer, "backward", backward_of_draws)
    elif what == "early stop":
        real_step = training.Training._step

        def step(self, index):
            if index < STEPS - 1 or self.data.offsets[-1] % 2:
                real_step(self, index)

        monkeypatch.setattr(training.Training, "_step", step)
    else:
        asked = QueryMechanism.gaussian_vector

        def undeclared(self, values, *, l2_sensitivity, **rest):
            return asked(self, values, l2_sensitivity=0.1 * l2_sensitivity, **rest)

        monkeypatch.setattr(QueryMechanism, "gaussian_vector", undeclared)


LEAKS = {
    "denominator": "model.safetensors",
    "count in a file": "run.json",
    "query": "(gaussian_vector): moved by",
    "early stop": "mechanism 61 (step) was not used in the first run",
    "draws apart": "(step): moved by",
}


@pytest.mark.parametrize("what", LEAKS)
def test_a_leak_is_noticed(tmp_path, monkeypatch, what):
    with_x, without_x = neighbours(extra=7)
    leak(monkeypatch, what)
    first = fitted(tmp_path / "with", with_x, "diffusion")
    try:
        second = fitted(tmp_path / "without", without_x, "diffusion", first)
    except PrivacyError as error:
        found = str(error)
    else:
        before, after = contents(first.folder), contents(second.folder)
        unlike = [name for name in before if before[name] != after.get(name)]
        found = " ".join(unlike + differences(first.asked, second.asked, rounding=ROUNDING))
    assert LEAKS[what] in found


# The tap itself


def adaptive_step(rows: torch.Tensor, keys: KeySchedule | None = None) -> tuple[PrivateTrainer, nn.Module]:
    """A trainer of adaptive clipping that has yet to apply its step over `rows`."""
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    settings = {"clipping": "adaptive", "noise_multiplier": 1.0, "expected_batch_size": 100}
    trainer = make_trainer(module, keys=keys or KeySchedule.reproducible(3), **settings)
    with trainer.capture():
        losses = module(rows).square().sum(1)
    trainer.backward(losses, rows_per_unit=1)
    return trainer, module


ROWS = 3.0 * torch.randn(5, 3, generator=torch.Generator().manual_seed(1))


def test_a_replay_answers_as_the_first_run_did():
    """Adaptive clipping: the count is recorded beside the sum, and what follows from both is the same to the bit."""
    runs = []
    for rows in (ROWS, ROWS[:-1]):
        trainer, module = adaptive_step(rows)
        with recording(runs[0][0] if runs else None) as asked:
            trainer.apply()
        runs.append((asked, flat_parameters(module), trainer.state_dict()["clipping.bound"].item()))
    (first, made, bound), (second, again, bound_again) = runs
    assert [release.kind for release in first.releases] == ["count of a step", "step"]
    assert differences(first, second) == []
    assert first.releases[0].distance(second.releases[0]) == 0.5
    assert np.array_equal(made, again) and bound == bound_again
    trainer, module = adaptive_step(ROWS[:-1])
    trainer.apply()
    assert not np.array_equal(flat_parameters(module), made), "without a replay the sum is another one"


@pytest.mark.parametrize("replayed", [None, Recording()])
def test_a_run_on_real_keys_is_neither_recorded_nor_replayed(replayed):
    trainer, module = adaptive_step(ROWS, KeySchedule.from_os())
    before = flat_parameters(module)
    with recording(replayed) as asked, pytest.raises(PrivacyError, match="from the operating system"):
        trainer.apply()
    assert asked.releases == [] and np.array_equal(flat_parameters(module), before)
    trainer.apply()


def test_without_a_recording_the_tap_hands_back_what_it_got():
    values = torch.ones(3)
    assert tap("step", values, sensitivity=1.0, is_private=True) is values


def ask(values, kind="count", **settings):
    return tap(kind, values, **({"sensitivity": 1.0, "is_private": False} | settings))


@pytest.mark.parametrize(
    ("again", "mention"),
    [
        ({"kind": "quantile"}, "its kind was 'count'"),
        ({"sensitivity": 2.0}, "its sensitivity was 1.0"),
        ({"norm": "l1"}, "its norm"),
        ({"bins": 4}, "its public"),
        ({"values": np.zeros(4)}, "another shape"),
        ({"values": {"a": 1.0}}, "another shape"),
    ],
)
def test_a_replay_that_leaves_the_path_is_stopped(again, mention):
    with recording() as first:
        ask(np.zeros(3))
    with pytest.raises(PrivacyError, match=mention), recording(first):
        ask(**({"values": np.zeros(3)} | again))


def test_a_replay_of_more_or_fewer_mechanisms_is_stopped():
    with recording() as first:
        ask(np.zeros(3))
    with pytest.raises(PrivacyError, match="was not used in the first run"), recording(first):
        ask(np.zeros(3))
        ask(np.zeros(3))
    with pytest.raises(PrivacyError, match="was not used again"), recording(first):
        pass


def test_distances_are_taken_in_the_norm_that_was_declared():
    def release(values, norm):
        return Release("count", values, 1.0, norm, {})

    one, two = np.array([1.0, 2.0, 2.0]), np.zeros(3)
    found = [release(one, norm).distance(release(two, norm)) for norm in ("l1", "l2", "linf")]
    assert found == [5.0, 3.0, 2.0]
    named = release({"a": 3.0, "b": 1.0}, "l1").distance(release({"a": 1.0, "c": 4.0}, "l1"))
    assert named == 7.0
    assert release(one, "l2").distance(release(np.zeros(2), "l2")) == np.inf


def test_names_and_tensors_are_replayed_too():
    tensor = torch.tensor([1.0, 2.0])
    with recording() as first:
        ask({"flu": 3.0})
        ask(tensor)
    other = torch.tensor([5.0, 6.0])
    with recording(first) as second:
        assert ask({"rare": 1.0}) == {"flu": 3.0}
        assert ask(other) is other
    assert other.tolist() == [1.0, 2.0]
    assert len(differences(first, second)) == 2

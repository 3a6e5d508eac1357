"""Invariants 5 to 7 over the whole fit: what a run folder says may depend on the records only where it was
charged.

Two ways to look. From outside: the folders of three fits on different numbers of patients are compared, and
no exact count may stand in any of them. From inside: a fit is recorded on D and replayed on D without one
patient, with the recorded answers of the charged queries; the questions must then be the same, and their
inputs may differ by no more than the sensitivity that was declared (the method of record and replay).
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from tests.commandline import ACCOUNTANT, fit_arguments, run
from tests.tinydata import SCHEMA, table, write_csv, write_tiny

pytestmark = pytest.mark.slow  # whole fits

SIZES = ((211, 307), (223, 331), (239, 353))  # patients, rows: numbers that nothing else has reason to show

TEXTS = (".json", ".jsonl", ".toml", ".txt", ".log", ".md", ".html", ".csv")


@pytest.fixture(scope="module", params=["diffusion", "gan"])
def runs(request, tmp_path_factory):
    """Three finished runs with the counts that they must not tell: [(folder, {name: count})]."""
    found = []
    for patients, rows in SIZES:
        folder = tmp_path_factory.mktemp(f"{request.param}{patients}")
        data, schema = write_tiny(folder, patients, rows)
        outcome = run(*fit_arguments(data, schema, folder / "run", generator=request.param))
        assert outcome.code == 0, outcome.stderr[-3000:]
        found.append((folder / "run", private_counts(data, schema, folder / "run", patients, rows)))
        data.unlink()
    return found


def private_counts(data: Path, schema: Path, folder: Path, patients: int, rows: int) -> dict[str, int]:
    """The exact counts of the file and of its training and held-out parts."""
    from synthward.data import read_records, split_records
    from synthward.schema import load_schema

    counts = {"patients": patients, "rows": rows}
    holdout = find_key(json.loads((folder / "run.json").read_text()), "holdout")
    if isinstance(holdout, dict):
        train, rest = split_records(
            read_records(data, load_schema(schema)),
            holdout_fraction=holdout["fraction"],
            salt=holdout["salt"],
        )
        counts |= {"train_rows": train.num_rows, "train_units": train.num_units}
        counts |= {"holdout_rows": rest.num_rows, "holdout_units": rest.num_units}
    return counts


def find_key(value: object, key: str) -> object:
    """The first value stored under `key` in nested JSON, or None."""
    if isinstance(value, dict):
        if key in value:
            return value[key]
        return next((f for v in value.values() if (f := find_key(v, key)) is not None), None)
    if isinstance(value, list):
        return next((f for v in value if (f := find_key(v, key)) is not None), None)
    return None


def documents(folder: Path) -> dict[str, object]:
    """Every JSON file and every line of every JSON-lines file of a run, by name."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".json":
            found[path.name] = json.loads(path.read_text())
        elif path.suffix == ".jsonl":
            found[path.name] = [json.loads(line) for line in path.read_text().splitlines()]
    return found


def leaves(value: object, path: str = "") -> dict[str, object]:
    """Leaves of nested JSON by their path."""
    if isinstance(value, dict):
        return {p: v for k, item in value.items() for p, v in leaves(item, f"{path}.{k}").items()}
    if isinstance(value, list):
        return {p: v for k, item in enumerate(value) for p, v in leaves(item, f"{path}.{k}").items()}
    return {path: value}


def tensor_shapes(folder: Path) -> dict[str, list[int]]:
    """Shapes of every tensor in every safetensors file of a run."""
    from safetensors import safe_open

    shapes = {}
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                shapes[f"{path.name}:{name}"] = file.get_slice(name).get_shape()
    return shapes


def test_the_folders_have_the_same_files_and_fields(runs):
    """File names, JSON fields, ledger lines and tensor names do not depend on how many patients there were.

    How long a list is may follow a charged answer (a histogram that is cut where it is noisy), so that the
    positions in lists are left out here; the replay below holds those answers fixed and compares everything.
    """
    folders = [folder for folder, _ in runs]
    names = [sorted(str(p.relative_to(f)) for p in f.rglob("*")) for f in folders]
    assert names[0] == names[1] == names[2]
    fields = [{re.sub(r"[.][0-9]+", ".*", path) for path in leaves(documents(f))} for f in folders]
    assert fields[0] == fields[1] == fields[2]
    lines = [len(documents(f)["ledger.jsonl"]) for f in folders]
    assert lines[0] == lines[1] == lines[2]
    tensors = [set(tensor_shapes(f)) for f in folders]
    assert tensors[0], "a run has a model"
    assert tensors[0] == tensors[1] == tensors[2]


def test_no_exact_count_stands_in_a_field(runs):
    """A field that equals the same private count in all three runs tells it (a noised count would not,
    thrice)."""
    for name in runs[0][1]:
        telling = None
        for folder, counts in runs:
            equal = {p for p, v in leaves(documents(folder)).items() if v == counts[name] and v is not True}
            telling = equal if telling is None else telling & equal
        assert not telling, f"{name} is told by {sorted(telling)}"


def test_no_product_of_rate_and_count_stands_in_a_field(runs):
    """An expected batch size of q N gives N away as well as N does."""
    telling = {name: None for name in runs[0][1]}
    for folder, counts in runs:
        found = leaves(documents(folder))
        rate = find_key(documents(folder), "sample_rate")
        numbers = {p: v for p, v in found.items() if isinstance(v, int | float) and v is not True}
        for name, count in counts.items():
            # Rounded products are so small here that any setting equals one: only exact ones are looked for.
            products = (rate * count, rate * count * 0.8, count * 0.8)
            equal = {p for p, v in numbers.items() if any(abs(v - known) < 1e-9 for known in products)}
            telling[name] = equal if telling[name] is None else telling[name] & equal
    assert not any(telling.values()), telling


def test_no_exact_count_stands_in_any_text(runs):
    """Also outside of fields: in notes, logs or messages. Numbers within longer numbers or hashes do not
    count."""
    for name in runs[0][1]:
        telling = None
        for folder, counts in runs:
            pattern = re.compile(rf"(?<![0-9a-zA-Z.])-?{counts[name]}(?![0-9a-zA-Z]|\.[0-9])")
            texts = [p for p in folder.rglob("*") if p.is_file() and p.suffix in TEXTS]
            equal = {p.name for p in texts if pattern.search(p.read_bytes().decode("utf-8", "ignore"))}
            telling = equal if telling is None else telling & equal
        assert not telling, f"{name} is told by {sorted(telling)}"


def test_no_patient_is_named_in_any_file(runs):
    for folder, counts in runs:
        for path in (p for p in folder.rglob("*") if p.is_file()):
            content = path.read_bytes()
            assert not any(f"p{i:05d}".encode() in content for i in range(counts["patients"])), path.name


def test_nothing_in_the_folder_is_a_pickle(runs):
    """Loading a run must not be able to run code: JSON, TOML and safetensors only."""
    for folder, _ in runs:
        kinds = {p.suffix for p in folder.rglob("*") if p.is_file()}
        assert kinds <= {".json", ".jsonl", ".toml", ".safetensors", ".txt", ".md", ".lock"}, kinds
        for path in (p for p in folder.rglob("*") if p.is_file()):
            head = path.read_bytes()[:4]
            assert head[:2] not in (b"\x80\x02", b"\x80\x04", b"\x80\x05", b"PK"), path.name


def test_the_ledger_pays_for_exactly_what_the_run_says(runs):
    """Sampling rate, noise and steps of run.json are those of the ledger; epsilon is the accountant's own."""
    from synthward.engine import Ledger
    from synthward.engine.accounting import epsilon_of

    for folder, _ in runs:
        info = json.loads((folder / "run.json").read_text())
        ledger = Ledger.open(next(folder.rglob("ledger*.json*")))
        events = ledger.events()
        training = [e for e in events if hasattr(e, "sample_rate")]
        assert sum(e.steps for e in training) == 20
        assert {e.sample_rate for e in training} == {find_key(info, "sample_rate")}
        assert {e.noise_multiplier for e in training} == {find_key(info, "noise_multiplier")}
        assert len(events) > len(training), "the preparation of the data was charged too"
        spent = ledger.epsilon(1e-5, ACCOUNTANT)
        assert spent == pytest.approx(epsilon_of(events, 1e-5, ACCOUNTANT), rel=1e-12)
        assert epsilon_of(events, 1e-5, "pld") <= spent
        assert 2.7 < spent <= 3.0


def test_sampling_needs_no_records(runs, tmp_path):
    """The data files of these runs are gone."""
    for index, (folder, _) in enumerate(runs):
        out = tmp_path / f"c{index}.csv"
        outcome = run("sample", folder, "--rows", 30, "--out", out)
        assert outcome.code == 0, outcome.stderr[-2000:]
        assert len(out.read_text().splitlines()) == 31


# record and replay


class Recorder:
    """Stands in for the noisy queries: records each question, answers by noise or from an earlier
    recording."""

    def __init__(self, answers=None) -> None:
        self.questions: list[tuple] = []
        self.answers = answers
        self.given: list[np.ndarray] = []

    def install(self, monkeypatch) -> Recorder:
        from synthward.engine import QueryMechanism

        original, recorder = QueryMechanism.gaussian_vector, self

        def gaussian_vector(self, values, **settings):
            answer = original(self, values, **settings)
            if recorder.answers is not None:
                answer = recorder.answers[len(recorder.given)].copy()
            recorder.questions.append((np.array(values, dtype=np.float64), settings))
            recorder.given.append(answer.copy())
            return answer

        monkeypatch.setattr(QueryMechanism, "gaussian_vector", gaussian_vector)
        return self


def recorded_fit(folder: Path, rows, generator, monkeypatch, answers=None):
    """A seeded fit of two steps under the recorder; returns it and the plan that the trainer was given."""
    from synthward.engine import PrivateTrainer
    from synthward.run import FitOptions, fit_run
    from synthward.schema import load_schema

    folder.mkdir()
    data = write_csv(folder / "data.csv", rows)
    (folder / "schema.toml").write_text(SCHEMA)
    plans, original = [], PrivateTrainer.__init__

    def init(self, module, optimizer, plan, **settings):
        plans.append(plan)
        original(self, module, optimizer, plan, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(PrivateTrainer, "__init__", init)
        recorder = Recorder(answers).install(patch)
        fit_run(
            data,
            load_schema(folder / "schema.toml"),
            epsilon=3.0,
            delta=1e-5,
            out=folder / "run",
            options=FitOptions(generator=generator, accountant=ACCOUNTANT, steps=2, holdout=0.0, seed=11),
        )
    return recorder, plans


@pytest.mark.parametrize("generator", ["diffusion", "gan"])
@pytest.mark.parametrize("who", ["many_visits", "one_visit", "extreme"])
def test_one_patient_moves_each_charged_query_by_at_most_its_sensitivity(
    tmp_path, monkeypatch, generator, who
):
    """The patient may have many visits or cells at and beyond the bounds; D and D + x differ in that
    patient."""
    others = table(60, 90)
    extra = table(30, 45, seed=4)[: {"many_visits": 25, "one_visit": 1, "extreme": 5}[who]]
    extra = [row | {"patient": "p99999"} for row in extra]
    if who == "extreme":
        extra = [
            row | {"weight": "1e30", "age": "100000", "stage": "", "visited": "1960-01-01"} for row in extra
        ]
    first, plans = recorded_fit(tmp_path / "with", others + extra, generator, monkeypatch)
    second, plans_without = recorded_fit(tmp_path / "without", others, generator, monkeypatch, first.given)
    assert len(first.questions) == len(second.questions) > 0
    total = 0.0
    for (values, settings), (other, other_settings) in zip(first.questions, second.questions, strict=True):
        assert settings == other_settings
        assert values.shape == other.shape
        moved = float(np.linalg.norm(values - other))
        assert moved <= settings["l2_sensitivity"] * (1 + 1e-9), settings["note"]
    total = sum(
        np.linalg.norm(v - o) for (v, _), (o, _) in zip(first.questions, second.questions, strict=True)
    )
    assert total > 0, "the extra patient was asked about"
    assert plans == plans_without, "the mechanism that trains is chosen without looking at uncharged data"
    assert_same_but_for_training(tmp_path / "with" / "run", tmp_path / "without" / "run")


UNLIKE = re.compile(
    r"[.](created|time|hash|prev|run_id|key_id|salt|ledger_head"
    # Of the log: times, and norms of what was trained.
    r"|seconds|seconds_left|steps_per_second|parameter_norm|update_norm)$"
)


def assert_same_but_for_training(first: Path, second: Path) -> None:
    """With the same answers to the same queries, two runs differ in names, times and trained weights only."""
    found = [{p: v for p, v in leaves(documents(f)).items() if not UNLIKE.search(p)} for f in (first, second)]
    assert found[0] == found[1]
    assert tensor_shapes(first) == tensor_shapes(second)
    assert (first / "schema.toml").read_text() == (second / "schema.toml").read_text()


@pytest.mark.parametrize("generator", ["diffusion", "gan"])
def test_a_seeded_run_says_that_it_is_not_private(tmp_path, generator):
    """In the run's own record, on the screen and in the report; and its key does not stand in the folder."""
    from synthward.engine import KeySchedule

    data, schema = write_tiny(tmp_path)
    outcome = run(*fit_arguments(data, schema, tmp_path / "run", "--seed", 12345, generator=generator))
    assert outcome.code == 0, outcome.stderr[-2000:]
    assert "not private" in (outcome.stdout + outcome.stderr).lower()
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert find_key(info, "private") is False
    keys = KeySchedule.reproducible(12345)
    for path in (p for p in (tmp_path / "run").rglob("*") if p.is_file()):
        for purpose in ("noise", "sampler", "queries", "canaries"):
            assert keys.key(purpose) not in path.read_bytes()
            assert keys.key(purpose).hex().encode() not in path.read_bytes()


def test_two_fits_of_the_same_records_differ(tmp_path):
    """Keys come from the operating system: the same command twice gives two different models."""
    data, schema = write_tiny(tmp_path)
    models = []
    for name in ("a", "b"):
        outcome = run(*fit_arguments(data, schema, tmp_path / name))
        assert outcome.code == 0, outcome.stderr[-2000:]
        models.append(sorted(p.read_bytes() for p in (tmp_path / name).rglob("*.safetensors")))
    assert models[0] != models[1]
    ids = [find_key(documents(tmp_path / name), "key_id") for name in ("a", "b")]
    assert ids[0] != ids[1]


def test_a_fit_killed_between_paying_and_keeping_its_histograms_pays_again(tmp_path, monkeypatch):
    """Both charges stay, the steps get more noise for it, and the whole still fits the budget."""
    from synthward.engine import Ledger
    from synthward.run import FitOptions, RunFolder, fit_run
    from synthward.schema import load_schema

    data = write_csv(tmp_path / "data.csv", table(60, 90))
    (tmp_path / "schema.toml").write_text(SCHEMA)
    schema, out = load_schema(tmp_path / "schema.toml"), tmp_path / "run"
    settings = {"epsilon": 3.0, "delta": 1e-5, "out": out}
    settings["options"] = FitOptions(accountant=ACCOUNTANT, steps=3, holdout=0.0)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunFolder, "save_encoder", killed)
        fit_run(data, schema, **settings)
    planned = RunFolder(out).info["noise_multiplier"]
    with monkeypatch.context() as patch:
        recorder = Recorder().install(patch)
        fit_run(data, schema, **settings, resume=True)
    with Ledger.open(out / "ledger.jsonl") as ledger:
        events = ledger.events()
        assert ledger.epsilon(1e-5, ACCOUNTANT) <= 3.0
    paid = sum(event.count for event in events if not hasattr(event, "steps"))
    assert len(recorder.questions) == 1 and paid == 2
    noise = {event.noise_multiplier for event in events if hasattr(event, "steps")}
    assert noise == {RunFolder(out).info["noise_multiplier"]} and noise.pop() > planned

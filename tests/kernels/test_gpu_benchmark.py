"""The measurements on a GPU, as far as they run without one: the checks that come before any time is taken, and how
jobs that fail, hang and are cut short are gone on from."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton cannot be imported here"
)
ROOT = Path(__file__).resolve().parents[2]
SCHEMA = ROOT / "benchmarks" / "schemas" / "gpu.schema.json"
OWN = ("correctness", "ceilings", "kernels", "noise")
FAULTY = "tests.kernels.gpu_section"
KERNELS = {
    *("rank1_norms", "gram_norms", "tile_norms", "outer_unit_grads", "outer_sum", "scale_rows"),
    *("diagonal_sq_norms", "diagonal_weighted_sum", "scatter_sq_norms", "scatter_weighted_sum"),
    *("layer_norm_backward", "group_norm_backward", "conv_norms", "conv_unit_grads", "conv_sum"),
    *("chacha20_words", "gaussian_noise", "add_gaussian_noise_", "rounded_gaussian", "discrete_release_"),
    *("noisy_adam_", "noisy_sgd_", "residual_features", "linear_rows", "draw_tokens"),
}


def environment(interpret: bool = True, **more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return {**kept, **({"TRITON_INTERPRET": "1"} if interpret else {}), **more}


def command(*options: str) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu", *options]


def run(*options: str, interpret: bool = True, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*options),
        cwd=ROOT,
        env=environment(interpret, **more),
        capture_output=True,
        text=True,
        check=False,
    )


def run_script(text: str, **more: str) -> str:
    """Standard output of a program that imports `benchmarks`, which is not installed."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", text],
        cwd=ROOT,
        env=environment(**more),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check(value: Any, schema: dict[str, Any], whole: dict[str, Any], place: str = "$") -> None:
    """That a value fits a JSON schema, of those words that ours has."""
    known = {
        *("$schema", "$defs", "title", "description", "$ref", "type", "const", "required", "properties"),
        *("additionalProperties", "items", "minItems", "maxItems", "minimum", "exclusiveMinimum"),
        *("minLength", "pattern"),
    }
    assert schema.keys() <= known, f"words that are not understood here: {schema.keys() - known}"
    if "$ref" in schema:
        check(value, whole["$defs"][schema["$ref"].removeprefix("#/$defs/")], whole, place)
        return
    names = {
        "object": dict,
        "array": list,
        "string": str,
        "integer": int,
        "number": (int, float),
        "null": type(None),
    }
    if "type" in schema:
        types = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
        fits = any(isinstance(value, names[t]) and not isinstance(value, bool) for t in types)
        assert fits, f"{place}: {value!r} is no {types}"
    if "const" in schema:
        assert value == schema["const"] and type(value) is type(schema["const"]), place
    if isinstance(value, dict):
        assert set(schema.get("required", [])) <= value.keys(), (
            f"{place}: lacks something of {schema['required']}"
        )
        for key, part in value.items():
            further = schema.get("properties", {}).get(key, schema.get("additionalProperties", {}))
            assert further is not False, f"{place}: {key} is not expected"
            check(part, further, whole, f"{place}.{key}")
    if isinstance(value, list):
        assert schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)), place
        for number, part in enumerate(value):
            check(part, schema.get("items", {}), whole, f"{place}[{number}]")
    if isinstance(value, str):
        assert len(value) >= schema.get("minLength", 0) and re.search(schema.get("pattern", ""), value), place
    if isinstance(value, int | float):
        assert value >= schema.get("minimum", value), place
        assert value > schema.get("exclusiveMinimum", value - 1), place


def read(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text())
    schema = json.loads(SCHEMA.read_text())
    check(content, schema, schema)
    return content


def rows_of(file: Path, section: str = FAULTY) -> dict[str, Any]:
    return read(file)["sections"][section]["rows"]


# What is measured


@pytest.mark.slow
def test_every_kernel_is_right_before_it_is_timed(tmp_path):
    done = run("--small", "--sections", ",".join(OWN), "--out", str(tmp_path / "found.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WRONG" not in done.stdout and "FAILED" not in done.stdout
    sections = read(tmp_path / "found.json")["sections"]
    assert list(sections) == list(OWN)
    for name in ("correctness", "kernels"):
        assert {job.split()[0] for job in sections[name]["rows"]} == KERNELS
    assert sum(row["cases"] for row in sections["correctness"]["rows"].values()) > 200
    assert all(row["cases"] for row in sections["correctness"]["rows"].values())
    assert not [row for row in sections["kernels"]["rows"].values() if "seconds" in row]
    assert all(row["bytes"] > 0 for row in sections["kernels"]["rows"].values())


def test_some_kernels_are_right_and_what_is_written_fits_the_schema(tmp_path):
    file = tmp_path / "found.json"
    done = run("--small", "--sections", "correctness,kernels", "--only", "scale_rows", "--out", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    content = read(file)
    # What is installed may leave out what it was built for.
    assert torch.__version__.startswith(content["versions"]["torch"]) and content["tf32"] is False
    assert list(content["sections"]["kernels"]["rows"]) == ["scale_rows float32 1", "scale_rows bfloat16 1"]
    with pytest.raises(AssertionError, match="is no"):
        check({**content, "command": 1}, json.loads(SCHEMA.read_text()), json.loads(SCHEMA.read_text()))


WRONG = """
import dataclasses, itertools, json, torch
from benchmarks.gpu import cases_outer, clock, correctness, kernels
from benchmarks.gpu.case import Maker
from benchmarks.gpu.section import Options

make, asked = Maker("cpu", True), []
kernels.interleaved = lambda variants, *_: asked.append([*variants]) or {name: [2.0, 1.0] for name in variants}
rate = lambda: {"copy": 1e9, "float32": 1e9, "bfloat16": 1e9, "integers": 1e9}
kernels.recorded = lambda section: {"outer_sum float32": {"wrong": ["at some other shape"]}}
right = next(cases_outer.KERNELS["scale_rows"].timed(make, torch.float32))()
def more(): right.run(); right.result().mul_(1.0 + 1e-5)
def nan(): right.run(); right.result()[0, 0] = float("nan")
cases = [right, *(dataclasses.replace(right, run=run) for run in (more, nan))]
cases.append(next(cases_outer.KERNELS["outer_sum"].timed(make, torch.float32))())
found = [kernels.measure(lambda case=case: case, Options("cpu", True), rate) for case in cases]
checked = correctness.check(iter([lambda case=case: case for case in cases[:3]] + [lambda: 1 / 0]))
kernels.recorded = lambda section: {"scale_rows float32 large": {"wrong": [], "right": [right.shape]}}
found.append(kernels.measure(lambda: cases[1], Options("cpu", True), rate))

print(json.dumps([found, asked, checked]))
"""


def test_a_wrong_kernel_is_named_and_never_timed():
    (right, *wrong, known), asked, checked = json.loads(run_script(WRONG))
    assert right["seconds"] == 1.5 and asked == [[""]] * 2
    # What was found right once is not checked twice.
    assert known["seconds"] == 1.5
    assert right["binds"] == "bytes" and right["of_floor"] == pytest.approx(right["bytes"] / 1e9 / 1.5)
    reasons = [row["wrong"][0].split(",")[0] for row in wrong]
    assert [reason[:9] for reason in reasons[:2]] == ["error 1.0", "error inf"]
    assert reasons[2:] == ["wrong in outer_sum float32: not timed"]
    assert not [row for row in wrong if "seconds" in row]
    assert checked["cases"] == 4
    assert [line.split(": ", 1)[1][:7] for line in checked["wrong"]] == ["error 1", "error i", "ZeroDiv"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_one_line_says_so():
    done = run(interpret=False)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.strip() == "benchmarks.gpu: no CUDA device here, so nothing was checked or measured"


def test_what_is_asked_for_must_exist():
    done = run("--sections", "kernels,colonels")
    assert done.returncode == 2 and "no section colonels" in done.stderr
    assert run(interpret=True).stderr.startswith("benchmarks.gpu: TRITON_INTERPRET is set")


# How jobs are run

RUN = """
import sys, time
from pathlib import Path
from benchmarks.gpu.result import Result, describe
from benchmarks.gpu.runner import Run
from benchmarks.gpu.section import Options
from benchmarks.gpu.table import table

result = Result(Path(sys.argv[1]) if len(sys.argv) > 1 else Path({file!r}))
result.begin(describe(on_gpu=False))
run = Run(result, Options("cpu", True), time.monotonic() + 120.0, limit=lambda seconds: 3.0)
run.section("tests.kernels.gpu_section")
print(table(result, ["tests.kernels.gpu_section"], run.not_run))
"""


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "log"
    monkeypatch.setenv("GPU_SECTION_LOG", str(file))
    return file


def begun(log: Path) -> list[str]:
    return [line.rsplit(" ", 1)[0] for line in log.read_text().splitlines()] if log.is_file() else []


def is_alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.slow
def test_jobs_that_fail_are_named_and_the_others_are_run(tmp_path, log):
    file = tmp_path / "found.json"
    printed = run_script(RUN.format(file=str(file)))
    rows = rows_of(file)
    # (What follows a second colon differs between versions of Python.)
    failed = {n: ":".join(row["failed"].split(":")[:2]) for n, row in rows.items() if "failed" in row}
    assert failed == {
        "raises": "ValueError: no such thing",
        "no json": "ValueError: Out of range float values are not JSON compliant",
        "crashes": "the process ended: exit code 3",
        "hangs": "longer than 3 s",
    }
    # In their order, each once; and the one that does not fit in the time is named, not tried.
    assert list(rows) == ["first", "raises", "no json", "crashes", "after", "hangs", "last"]
    assert begun(log) == ["first", "raises", "no json", "crashes", "after", "hangs", "child", "last"]
    assert "not run, for lack of time: tests.kernels.gpu_section: too long" in printed
    assert "FAILED crashes: the process ended: exit code 3" in printed and "after found after" in printed
    assert not [line for line in log.read_text().splitlines() if is_alive(int(line.rsplit(" ", 1)[1]))]

    # The next run tries what failed, and nothing else.
    log.unlink()
    printed = run_script(RUN.format(file=str(file)), GPU_SECTION_WELL="1")
    assert begun(log) == ["raises", "no json", "crashes", "hangs"]
    assert "FAILED" not in printed and len(rows_of(file)) == 7


def test_several_processes_run_a_section_that_allows_it(tmp_path, log):
    file = tmp_path / "found.json"
    run_script(RUN.format(file=str(file)), GPU_SECTION_PARALLEL="3")
    rows = rows_of(file)
    assert {name for name, row in rows.items() if "failed" in row} == {
        "raises",
        "no json",
        "crashes",
        "hangs",
    }
    assert sorted(rows) == sorted(["first", "raises", "no json", "crashes", "after", "hangs", "last"])
    assert len({line.rsplit(" ", 1)[1] for line in log.read_text().splitlines()}) >= 4


@pytest.mark.slow
def test_rows_of_another_source_are_measured_anew_and_kept_until_then(tmp_path, log):
    file = tmp_path / "found.json"
    options = ("--small", "--sections", FAULTY, "--only", "first", "--out", str(file))
    for _ in range(2):
        assert run(*options).returncode == 0
    assert begun(log) == ["first"]
    content = json.loads(file.read_text())
    content["sections"][FAULTY]["measured_on"]["digest"] = "0" * 16
    file.write_text(json.dumps(content))
    done = run("--small", "--sections", FAULTY, "--minutes", "0", "--out", str(file))
    assert "of another source" in done.stdout and "first found first" in done.stdout
    assert run(*options).returncode == 0 and begun(log) == ["first", "first"]
    assert run(*options, "--again", FAULTY).returncode == 0 and begun(log) == ["first"] * 3


def started(log: Path, file: Path) -> tuple[subprocess.Popen[str], list[int]]:
    """A run that has come to the job that hangs; it and the processes that are to end with it."""
    process = subprocess.Popen(
        command("--small", "--sections", FAULTY, "--out", str(file)),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        # A shell that starts the tests in the background leaves it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    until = time.monotonic() + 60.0
    while "child" not in begun(log):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)
    lines = [line.rsplit(" ", 1) for line in log.read_text().splitlines()]
    return process, [int(number) for name, number in lines if name in ("hangs", "child")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_run_that_is_interrupted_ends_all_and_keeps_its_rows(tmp_path, log, number):
    file = tmp_path / "found.json"
    process, others = started(log, file)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert "after found after" in printed and not [other for other in others if is_alive(other)]
    assert list(rows_of(file)) == ["first", "raises", "no json", "crashes", "after"]


def test_a_run_that_is_killed_keeps_its_rows_and_leaves_no_worker(tmp_path, log):
    file = tmp_path / "found.json"
    process, (worker, child) = started(log, file)
    process.kill()
    process.communicate()
    until = time.monotonic() + 10.0
    while is_alive(worker):
        assert time.monotonic() < until
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    assert list(rows_of(file)) == ["first", "raises", "no json", "crashes", "after"]


CLOCK = """
import json
from benchmarks.gpu import ceilings, clock, kernels, noise, result
from benchmarks.gpu.section import Options
import torch

# A device whose time is that of the calls that were made: each takes as many milliseconds as it says.
now, calls = [0.0], []

class Event:
    def __init__(self, enable_timing): assert enable_timing
    def record(self): self.at = now[0]
    def elapsed_time(self, end): return end.at - self.at

def takes(name, milliseconds):
    def run():
        calls.append(name)
        now[0] += milliseconds
    return run

clock.timed = lambda: True
torch.cuda.Event, torch.cuda.synchronize = Event, lambda: None
clock._flushed.append(torch.empty(8))
taken = clock.interleaved({"a": takes("a", 2.0), "b": takes("b", 3.0)}, 40, 100.0)
few = clock.interleaved({"a": takes("c", 2.0)}, 40, 0.0)
torch.cuda.reset_peak_memory_stats = lambda: None
torch.cuda.memory_allocated, torch.cuda.max_memory_allocated = lambda: 5, lambda: 12
times = clock.spread([4.0, 1.0, 2.0, 3.0, 5.0, 6.0])
print(json.dumps([taken, few, calls[6:86], times, clock.spread([]), clock.peak_bytes(lambda: None)]))
copy = {"alone": {"parameters": 1000, "variants": {"synthward": {"seconds": 1e-6}, "torch": {"seconds": 2e-6}}}}
print(noise.SECTION.table(copy))
print(ceilings.SECTION.table({"copy": {"per_second": 4.3e12}, "bfloat16": {"per_second": 7.9e14}}))
noise.recorded = lambda name: {
    "steps": {"gpt": {"trained": 2e6, "variants": {"plain": {"seconds": 0.09}, "private": {"seconds": 0.1}}}},
    "noise": {"Adam 1": {"parameters": 1e6, "variants": {
        "fused": {"seconds": 3e-3}, "fused without noise": {"seconds": 2e-3}}}},
}[name]
print(noise.SECTION.table({}))
"""


def test_times_are_taken_in_turns_by_the_devices_own_clock():
    measured, *tables = run_script(CLOCK).splitlines()
    taken, few, calls, times, none, peak = json.loads(measured)
    assert taken == {"a": pytest.approx([2e-3] * 40), "b": pytest.approx([3e-3] * 40)}
    assert len(few["a"]) == 5
    rounds = {tuple(calls[i : i + 2]) for i in range(0, 80, 2)}
    assert rounds == {("a", "b"), ("b", "a")}
    assert times == {"seconds": 3.5, "p20_p80": [2.0, 5.0], "rounds": 6} and none == {} and peak == 7
    assert tables == [
        "alone         0.001 ms, 1.0 G/s, 0.500 x torch",
        "copy 4.3 TB/s, bfloat16 790 TFLOP/s",
        "of a step: gpt 2.0%",
    ]


TABLE = """
import json
from pathlib import Path
from benchmarks.gpu.result import Result, describe
from benchmarks.gpu.table import table

result = Result(Path({file!r}))
assert result.rows("kernels") == {{}} and not result.jobs("kernels"), "before anything was written"
result.begin(describe(on_gpu=False))
for number in range(100):
    result.put("kernels", f"norm {{number}}", {{"failed": "x" * 300}})
    row = {{"kernel": f"kernel {{number}}", "dtype": "float32"}}
    times = {{"seconds": 1e-3, "of_floor": 0.5, "binds": "bytes"}} if number else {{"wrong": ["error"]}}
    result.put("kernels", f"kernel{{number}} float32 1", {{**row, "kernel": f"kernel{{number}}", **times}})
result.put("correctness", "norm float32", {{"cases": 3, "wrong": ["4 x 5: error"], "worst_of_tolerance": 0.1}})
print(table(result, ["kernels"], {{"kernels": [f"job {{n}}" for n in range(50)]}}))
"""


def test_the_table_is_short(tmp_path):
    lines = run_script(TABLE.format(file=str(tmp_path / "found.json"))).splitlines()
    assert len(lines) < 60 and max(map(len, lines)) <= 150
    assert "2 of 3 cases of 1 kernels are right, in 1 groups" in lines
    assert "WRONG norm float32: 4 x 5: error" in lines
    assert "kernel0                f32 WRONG" in lines
    assert "kernel1                f32 1000 us: 50%b" in lines
    assert lines[-2] == (
        "not run, for lack of time: kernels: job 0, job 1, job 2, job 3, job 4, job 5 and 44 more"
    )

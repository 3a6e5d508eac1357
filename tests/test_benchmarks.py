"""The measurements run: every benchmark of a kernel once, a step of one model. What they measure is not looked at."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
SUITES = sorted((ROOT / "benchmarks" / "kernels").glob("test_bench_*.py"))


def run(module: str, *options: str) -> list[str]:
    """Lines of a measurement's output."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def results() -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (ROOT / "benchmarks" / "results").iterdir()}


@pytest.fixture
def machine() -> ModuleType:
    """benchmarks/machine.py by its place: other packages install something named `benchmarks`."""
    spec = importlib.util.spec_from_file_location("measured_machine", ROOT / "benchmarks" / "machine.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_kernel_benchmark_runs():
    before = results()
    head, *lines = run("kernel_table", "--passes", "1", "--quick", "--dry")
    columns = head.index("over floor"), head.index("over torch")
    written = {
        line.split("(")[0].removeprefix("def test_")
        for file in SUITES
        for line in file.read_text().splitlines()
        if line.startswith("def test_")
    }
    assert len(written) > 15 and {line.split()[0] for line in lines} == written
    for line in lines:
        over_floor, over_torch = line[columns[0] : columns[1]], line[columns[1] :]
        assert over_floor.strip() if "bytes/s" in line or "flops/s" in line else not over_floor.strip()
        # Each executor is compared with torch, and torch with nothing.
        assert not over_torch.strip() if " torch " in line else float(over_torch) > 0.0
    assert results() == before


def test_a_step_of_a_model_is_measured():
    before = results()
    options = ("--models", "gan", "--variants", "synthward", "--rounds", "2", "--seconds", "0", "--dry")
    _, *lines = run("model_step", *options)
    assert [line.split()[:2] for line in lines] == [["gan", "plain"], ["gan", "synthward"]]
    assert all(float(figure) >= 0.0 for line in lines for figure in line.split()[2:])
    assert results() == before


def test_errors_of_correlated_noise_are_measured():
    before = results()
    printed = run("correlated_noise", "--quick", "--dry")
    errors = [float(line.split(" error ")[1].split()[0]) for line in printed if " error " in line]
    assert len(errors) == 5 and all(0.0 < error < 100.0 for error in errors)
    assert results() == before


def test_noise_is_measured():
    before = results()
    lines = run("noise", "--rounds", "2", "--small", "4096", "--large", "5000", "--dry")
    rates = [line for line in lines if line.endswith("G elements/s")]
    assert sum("Adam" in line for line in rates) == 3 and sum("(torch)" in line for line in rates) == 1
    assert sum("releases (" in line for line in rates) == sum("normals (" in line for line in rates) - 1 > 0
    assert all(float(line.split()[-5]) > 0.0 for line in rates)
    ratios = [line for line in lines if line.startswith("noise and adam over")]
    assert len(ratios) == 2 and all(float(line.split(": ")[1].split()[0]) > 0.0 for line in ratios)
    assert results() == before


def test_parts_of_a_result_keep_each_other(tmp_path: Path, machine: ModuleType):
    machine.RESULTS = tmp_path / "results"
    machine.write_part("kernels", {"rows": [1]}, machine={"torch_threads": 1})
    machine.write_part("steps", {"models": {"gan": 2}})
    file = machine.write_part("steps", {"models": {"gan": 3}})
    content = json.loads(file.read_text())
    assert file.stem == machine.machine_name() and list(content) == ["kernels", "steps"]
    assert content["kernels"]["rows"] == [1] and content["kernels"]["machine"] == {"torch_threads": 1}
    assert content["steps"]["models"] == {"gan": 3}
    assert content["steps"]["machine"]["versions"]["torch"]
    assert content["kernels"]["command"] and content["steps"]["command"]


def test_ranks_are_measured_beside_their_peers():
    before = results()
    variants = "plain DDP;synthward;synthward replicas;synthward FSDP2"
    pieces = "exchange, memory in common;exchange, loopback"
    options = (
        "--models",
        "gan",
        "--variants",
        f"{variants};{pieces}",
        "--rounds",
        "2",
        "--seconds",
        "0",
        "--patience",
        "0",
    )
    _, *lines = run("distributed", *options, "--dry")
    for variant in variants.split(";"):
        # What pieces are told beside is measured with them once more.
        line, *_ = [line for line in lines if line.startswith(f"gan  {variant}  ")]
        figures = [
            float(word.strip("(),")) for word in line[len(f"gan  {variant}") :].split() if word != "to"
        ]
        # Seconds and quartiles, two parts of a private step, a peak for each process.
        processes = 1 if variant == "synthward" else 2
        assert len(figures) == 3 + 2 * ("synthward" in variant) + processes
        assert min(figures) > 0.0
    for piece in pieces.split(";"):
        assert any(line.startswith(f"gan  {piece}  ") for line in lines)
    ratios = [line for line in lines if " ratio " in line]
    assert len(ratios) == 3 and all(float(line.split(": ")[1].split()[0]) > 0.0 for line in ratios)
    assert any("goal throughput of ranks over one process" in line for line in lines)
    assert not [line for line in lines if "failed" in line] and results() == before


SCALING = """
import json
from benchmarks.scaling import ASSUMED, BATCHES, MODELS, Cluster, Plan, best, limit, read_counts
counts = read_counts()
steps = {model: {gpus: best(counts[model], 65536, gpus) for gpus in (1, 8, 64, 512)} for model in MODELS}
plan = lambda sharded, layered: Plan(counts["1.3b"][1], 4096, 64, sharded, layered).step()
print(json.dumps({
    "seconds": {m: {g: s.seconds for g, s in of.items() if s} for m, of in steps.items()},
    "efficiency": {m: {g: s.efficiency for g, s in of.items() if s} for m, of in steps.items()},
    "alone": Cluster(1).collective(1e9),
    "node": Cluster(8).collective(1e9),
    "nodes": Cluster(64).collective(1e9),
    "link": ASSUMED["infiniband"].value * ASSUMED["link_share"].value,
    "sent": [plan(False, False).exchanged, plan(True, False).exchanged, plan(True, False).passes_taken],
    "parameters": counts["1.3b"][1].parameters,
    "sums": [plan(True, False).sums, plan(True, True).sums],
    "limits": [limit(counts["gpt2-small"], batch)[0].gpus for batch in BATCHES],
}))
"""


def test_the_scaling_model_keeps_its_own_rules():
    done = subprocess.run(
        [sys.executable, "-c", SCALING], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    for model, seconds in found["seconds"].items():
        ordered = list(seconds.values())
        assert ordered == sorted(ordered, reverse=True) and len(ordered) >= 3
        assert all(0.0 < share <= 1.0 for share in found["efficiency"][model].values())
    # A tenth of 10 B parameters does not fit on one GPU with its moments.
    assert "1" in found["seconds"]["gpt2-small"] and "1" not in found["seconds"]["10b"]
    assert found["alone"] == 0.0 < found["node"] < found["nodes"]
    # Between 8 nodes, an eighth of the tensor goes over each GPU's adapter, but for the node's own part.
    assert found["nodes"] == pytest.approx(1e9 / 8 * 7 / 8 / found["link"], rel=0.05)
    replicas, shards, passes = found["sent"]
    assert replicas == pytest.approx(8 * found["parameters"] * 63 / 64)
    assert shards == pytest.approx(10 * found["parameters"] * 63 / 64 * passes)
    assert found["sums"][1] <= found["sums"][0]
    # Sixteen times the batch feeds more GPUs.
    assert found["limits"][0] < found["limits"][1]


def test_the_page_on_scaling_is_what_the_model_says():
    run("scaling", "--check")

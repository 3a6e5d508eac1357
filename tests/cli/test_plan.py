"""`synthward plan`: stable keys, budgets as fit has them, large models in little memory, refusals in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from synthward.cli import main
from synthward.engine.accounting import calibrate_noise
from synthward.run.budget import plan_budget
from synthward.run.fit import FitOptions
from synthward.simulate import SIMULATION_SCHEMA_TOML
from tests.commandline import environment

SCHEMA = ("--schema", SIMULATION_SCHEMA_TOML)
TINY = ("--decoder", "layers=2,width=64,heads=4,vocab=96,times=32")
KEYS = {
    *("model", "parameters", "ranks", "parallel", "precision", "clipping", "keep", "checkpoint", "offload"),
    *("device", "batch", "physical_batch_size", "physical_batches", "largest_physical_batch_size", "fits"),
    *("memory", "methods", "step", "steps", "days", "privacy", "assumptions"),
}
MEMORY = {
    *("parameters", "sums", "moments", "batch", "activations", "gradients", "working", "exchange", "gaps"),
    *("host", "total"),
}
STEP = {
    *("flops", "norm_flops", "bytes", "exchanged_bytes", "compute_seconds", "exchange_seconds", "seconds"),
}


@pytest.fixture
def call(capsys):
    """`synthward plan ...` in this process: (code, stdout, stderr)."""

    def invoke(*arguments):
        capsys.readouterr()
        code = main(["plan", *map(str, arguments)])
        streams = capsys.readouterr()
        return code, streams.out, streams.err

    return invoke


def answer(outcome):
    code, out, errors = outcome
    assert code == 0 and not errors, outcome
    return json.loads(out)


@pytest.mark.parametrize(
    "what",
    [(*SCHEMA, "--units", 20_000), (*SCHEMA, "--units", 500, "--generator", "gan"), (*TINY, "--batch", 64)],
)
def test_the_keys_are_stable(call, what):
    found = answer(call(*what, "--json"))
    assert set(found) == KEYS
    assert set(found["memory"]) == MEMORY and set(found["step"]) == STEP
    assert set(found["device"]) == {"kind", "memory", "flops", "exact_flops", "bandwidth", "link"}
    assert all(set(method) == {"kind", "method", "parameters"} for method in found["methods"])
    parts = sum(size for name, size in found["memory"].items() if name not in ("host", "total"))
    assert parts == found["memory"]["total"]
    assert found["privacy"] is None and found["assumptions"]


def test_a_schema_is_enough(call):
    """No record is read: the batch is a public guess times the rate that fit has by default."""
    found = answer(call(*SCHEMA, "--units", 20_000, "--json"))
    assert found["batch"] == 20_000 * FitOptions.sample_rate
    assert (found["physical_batches"], found["device"]["kind"]) == (1, "cpu")
    assert any("every declared level" in line for line in found["assumptions"])
    larger = answer(call(*SCHEMA, "--units", 20_000, "--set", "hidden=512", "--json"))
    assert larger["parameters"] > 2 * found["parameters"]
    assert larger["memory"]["total"] > found["memory"]["total"]


def test_the_noise_is_the_one_of_fit(call):
    found = answer(
        call(
            *SCHEMA,
            "--units",
            500,
            "--steps",
            20,
            "--epsilon",
            3,
            "--delta",
            1e-5,
            "--accountant",
            "rdp",
            "--json",
        )
    )
    mechanism = FitOptions(steps=20, accountant="rdp").mechanism(3.0, 1e-5)
    budget = plan_budget(3.0, 1e-5, "rdp", mechanism, 20)
    assert found["privacy"]["noise_multiplier"] == budget.noise_multiplier
    assert found["privacy"]["query_noise_multiplier"] == budget.query_noise_multiplier


def test_a_decoder_s_noise_is_that_of_its_rate(call):
    budget = ("--epsilon", 2, "--delta", 1e-6, "--accountant", "rdp", "--steps", 50)
    found = answer(call(*TINY, "--batch", 64, "--units", 6400, *budget, "--json"))
    assert found["privacy"]["sample_rate"] == 0.01
    assert found["privacy"]["noise_multiplier"] == calibrate_noise(2.0, 1e-6, 0.01, 50, "rdp")


def test_ranks_and_options_show(call):
    one = answer(call(*TINY, "--batch", 64, "--json"))
    four = answer(call(*TINY, "--batch", 64, "--ranks", 4, "--parallel", "shard", "--json"))
    assert four["memory"]["parameters"] < 0.3 * one["memory"]["parameters"]
    assert four["physical_batch_size"] * four["physical_batches"] * 4 >= 64
    again = answer(call(*TINY, "--batch", 64, "--clipping", "per-layer", "--checkpoint", "--json"))
    assert again["memory"]["activations"] < one["memory"]["activations"]
    away = answer(call(*TINY, "--batch", 64, "--parallel", "shard", "--offload", "--json"))
    assert (away["memory"]["moments"], away["memory"]["host"]) == (0, 16 * one["parameters"])
    given = answer(call(*TINY, "--batch", 64, "--physical-batch-size", 10, "--json"))
    assert given["physical_batch_size"] <= 10 < given["physical_batches"] * given["physical_batch_size"]


def test_the_device_is_the_one_that_is_given(call):
    rates = ("--device-flops", 100, "--exact-flops", 50, "--bandwidth", 1000, "--link", 10)
    found = answer(call(*TINY, "--batch", 64, "--device-memory", 2, *rates, "--json"))
    expected = {"kind": "gpu", "memory": 2.0 * 2**30, "flops": 1e14, "exact_flops": 5e13}
    assert found["device"] == {**expected, "bandwidth": 1e12, "link": 1e10}
    slow = answer(call(*TINY, "--batch", 64, "--device-flops", 0.01, "--json"))
    assert slow["days"] > found["days"]


def test_a_plan_for_people(call):
    code, out, errors = call(
        *TINY, "--batch", 64, "--epsilon", 2, "--delta", 1e-6, "--units", 640, "--accountant", "rdp"
    )
    assert code == 0 and not errors
    for word in (
        "parameters",
        "fits: yes",
        "total",
        "norms by:",
        "Linear.weight",
        "days",
        "noise multiplier",
        "assumed:",
    ):
        assert word in out
    assert call(*TINY, "--batch", 64, "--device-memory", 0.001)[1].count("fits: NO") == 1


# In a process of its own, whose memory is what the plan took; its own seconds, whatever else the machine does.
_LARGE = """
import json, resource, sys, time
from synthward.cli import main
from synthward.run import plan
before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
code = main(sys.argv[1:])
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps([code, grown << 10, time.process_time() - begin]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--checkpoint", "--precision", "bf16", "--offload")])
def test_ten_billion_parameters_take_a_minute_and_little_memory(options):
    words = [
        "plan",
        "--decoder",
        "10b",
        "--batch",
        "2048",
        "--ranks",
        "64",
        "--parallel",
        "shard",
        "--json",
        *options,
    ]
    done = subprocess.run(
        [sys.executable, "-P", "-c", _LARGE, *words],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
    )
    result, facts = (json.loads(line) for line in done.stdout.splitlines())
    code, grown, seconds = facts
    assert code == 0 and result["parameters"] > 10**10
    assert grown < 2 << 30, f"grew by {grown / 2**20:.0f} MiB"
    assert seconds < 60.0


REFUSED = [
    ((), "--schema, --decoder"),
    ((*SCHEMA, *TINY), "--schema, --decoder"),
    (SCHEMA, "--units"),
    (TINY, "--batch"),
    ((*TINY, "--units", 100, "--batch", 200), "--batch"),
    ((*TINY, "--units", 100, "--batch", 20, "--sample-rate", 0.5), "--batch"),
    ((*TINY, "--batch", 64, "--epsilon", 3), "--epsilon, --delta"),
    ((*TINY, "--batch", 64, "--epsilon", 3, "--delta", 1e-6), "sample rate"),
    ((*TINY, "--batch", 64, "--set", "hidden=3"), "--set"),
    ((*TINY, "--batch", 64, "--clipping", "grouped"), "--clipping"),
    ((*TINY, "--batch", 64, "--keep", "half"), "keep"),
    ((*TINY, "--batch", 64, "--ranks", 0), "ranks"),
    ((*TINY, "--batch", 64, "--offload"), "offload"),
    ((*TINY, "--batch", 64, "--device", "tpu"), "--device"),
    ((*TINY, "--batch", 64, "--device-memory", -1), "memory"),
    (("--decoder", "7b", "--batch", 64), "10b"),
    (("--decoder", "layers=2,width=65,heads=4", "--batch", 64), "width"),
    (("--decoder", "layers=0", "--batch", 64), "layers"),
    ((*SCHEMA, "--units", 100, "--checkpoint"), "--checkpoint"),
    ((*SCHEMA, "--units", 100, "--set", "hiden=3"), "hidden"),
    ((*SCHEMA, "--units", 100, "--generator", "vae"), "vae"),
    (("--schema", Path("nothing.toml"), "--units", 100), "nothing.toml"),
]


@pytest.mark.parametrize(("options", "mention"), REFUSED)
def test_what_is_no_plan_is_one_line(call, options, mention):
    code, out, errors = call(*options, "--json")
    assert code == 2 and not out
    assert errors.startswith("synthward: error: ") and errors.count("\n") == 1
    assert mention in errors

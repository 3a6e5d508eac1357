"""What `benchmarks.gpu` trains and samples on a GPU, in the small and without one: all variants train the same thing,
what fails says so, and the tables have what was found. Times are not looked at."""

from __future__ import annotations

import functools
import json
import time
from dataclasses import replace

import pytest
import torch

from tests.measuring import measuring

models, steps, peers = measuring("gpu.models"), measuring("gpu.steps"), measuring("gpu.peers")
sampling, beside = measuring("gpu.sampling"), measuring("gpu.side_by_side")
measured, Options = measuring("gpu.worker").measured, measuring("gpu.section").Options

SMALL = Options(device="cpu", small=True)
FEW = [
    name for name in models.workloads(True) if name not in ("stack T 1024", "stack T 4096", "stack T 32768")
]
# Weights that are tied, checkpoints, layers of one row beside layers of many, frozen layers.
RECORDED = ["gpt2-small", "1.3b", "dit-b/2", "1.3b lora"]


def setup(name: str, dtype: torch.dtype = torch.float32):
    work = models.workloads(True)[name]
    return beside.Setup(work, work.batch, dtype, "cpu")


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        ("gan", 679_937),
        ("mlp", 3_674_368),
        ("gpt", 12_269_568),
        ("unet", 554_081),
        ("ehr", 11_836_416),
        # As published for GPT-2, and for DiT-B/2 (without the variances that it predicts there).
        ("gpt2-small", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("1.3b", 1_313_626_112),
        ("dit-b/2", 130_303_504),
        ("1.3b lora", 24 * 16 * (2048 * (1 + 3 + 1 + 1 + 1 + 4 + 4 + 1))),
        ("stack T 1", 8 * (1024 * 1024 + 1024)),
    ],
)
def test_parameters_are_those_of_the_models_that_are_named(name, trained):
    assert models.parameter_counts(models.workloads(False)[name])[0] == trained


def test_the_sweep_has_as_many_rows_at_every_length():
    swept = {name: work for name, work in models.workloads(False).items() if name.startswith("stack")}
    assert len(swept) == 6
    for name, work in swept.items():
        with torch.device("meta"):
            x, _ = work.data(work.batch)
        assert x.shape[1] == int(name.split()[-1]) and x.shape[0] * x.shape[1] == 65536


@pytest.mark.parametrize("variant", ["private", "private per-layer"])
@pytest.mark.parametrize("name", FEW)
def test_private_steps_train_what_plain_ones_do(name, variant):
    """Without noise and with a bound that clips nothing they are the same steps."""
    assert beside.disagreement(steps.VARIANTS[variant], steps.VARIANTS["plain"], setup(name)) < 1e-5


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_steps_train_what_plain_ones_do(name):
    found = beside.disagreement(steps.VARIANTS["private recorded"], steps.VARIANTS["plain"], setup(name))
    assert found < 1e-5


@pytest.mark.parametrize("name", ["gpt", "dit-b/2"])
def test_in_bf16_they_differ_by_its_rounding(name):
    found = beside.disagreement(
        steps.VARIANTS["private"], steps.VARIANTS["plain"], setup(name, torch.bfloat16)
    )
    assert 1e-7 < found < 3e-2


@pytest.mark.parametrize("variant", ["plain", "private"])
@pytest.mark.parametrize("name", FEW)
def test_a_step_moves_everything_that_is_trained(name, variant):
    given = replace(setup(name), noise=0.0)
    made = steps.VARIANTS[variant].make(given, given.data())
    before = {key: p.detach().clone() for key, p in made.network.named_parameters()}
    # Layers that begin at zero let gradients through to others from the second step on.
    for _ in range(4):
        made.step()
    for key, parameter in made.network.named_parameters():
        assert torch.equal(parameter, before[key]) != parameter.requires_grad, key


def test_another_variant_would_be_noticed():
    def twice(given, batch):
        made = steps.plain(given, batch)
        return replace(made, step=lambda: (made.step(), made.step()))

    assert beside.disagreement(beside.Variant(twice), steps.VARIANTS["plain"], setup("mlp")) > 0.1


def refuse(given, batch):
    raise ValueError("no such layer\nand more")


def short_of_memory(given, batch):
    if given.batch > 2:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return steps.plain(given, batch)


def compared(must=("plain",), **variants):
    named = {"plain": steps.VARIANTS["plain"]} | {k: beside.Variant(v) for k, v in variants.items()}
    return beside.compare(setup("gan"), named, base=("plain",), must=must)


def test_a_variant_that_fails_says_so_and_others_go_on():
    row = compared(refuses=refuse, full=short_of_memory, private=steps.private)
    assert row["variants"]["refuses"] == {"failed": "ValueError: no such layer"}
    assert row["variants"]["full"] == {"failed": "out of memory"}
    assert row["batch"] == 8 and not row["halved"]
    assert "failed" not in row["variants"]["private"] and row["variants"]["private"]["methods"]
    json.dumps(row, allow_nan=False)


def test_without_a_plain_step_there_is_no_row():
    with pytest.raises(RuntimeError, match="plain: ValueError: no such layer"):
        beside.compare(setup("gan"), {"plain": beside.Variant(refuse)}, base=("plain",), must=("plain",))


def test_a_batch_that_does_not_fit_is_halved_for_all():
    row = compared(must=("plain", "full"), full=short_of_memory)
    assert row["batch"] == 2 and [entry["batch"] for entry in row["halved"]] == [8, 4]
    assert row["shape"].startswith("[2, 7]") and "failed" not in row["variants"]["full"]

    def never(given, batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    row = compared(must=("plain", "full"), full=never)
    assert row["batch"] == 1 and row["variants"]["full"] == {"failed": "out of memory"}


def test_what_does_not_fit_together_takes_turns_in_groups():
    def alone(held, reserved):
        return beside.Alone(held, reserved, reserved, 1.0)

    found = {"plain": alone(10, 30), "a": alone(20, 40), "b": alone(20, 45), "c": alone(5, 80)}
    names = [[*group] for group in beside.in_groups(found, ["plain"], room=75.0)]
    assert names == [["plain", "a", "b"], ["plain", "c"]]
    assert [[*g] for g in beside.in_groups(found, ["plain", "a"], room=1e9)] == [["plain", "a", "b", "c"]]
    assert [[*g] for g in beside.in_groups({"plain": found["plain"]}, ["plain"], room=0.0)] == [["plain"]]


def test_turns_take_steps_of_every_variant():
    taken = {"plain": 0, "other": 0}

    def counted(name, given, batch):
        made = steps.plain(given, batch)

        def step():
            taken[name] += 1
            made.step()

        return replace(made, step=step)

    variants = {name: beside.Variant(functools.partial(counted, name), warm_up=2) for name in taken}
    found = {name: beside.Alone(None, None, None, 0.02) for name in taken}
    given = setup("gan")
    assert beside.take_turns(variants, found, given, given.data()) == {"plain": [], "other": []}
    # The warm-up, and one turn of two steps (0.03 s of 0.02 s each).
    assert taken == {"plain": 4, "other": 4}


def test_ratios_are_taken_round_by_round():
    alone = {name: beside.Alone(1, 100, 120, 1.0) for name in ("plain", "private", "peer")}
    turns = {"plain": [1.0, 2.0, 4.0], "private": [1.1, 2.2, 4.4], "peer": [3.3, 4.4, 4.4]}
    row = beside._found("peer", alone, [turns], ("plain", "private"))
    assert row["ratio"] == pytest.approx(2.2) and row["over private"] == pytest.approx(2.0)
    assert row["over private, p20_p80"] == pytest.approx([1.0, 3.0]) and row["peak_ratio"] == 1.0


def test_what_takes_too_long_is_ended():
    with pytest.raises(TimeoutError, match="longer than 0 s"), beside.time_limit(0.05):
        time.sleep(5)

    def slow(given, batch):
        try:
            time.sleep(5)
        except TimeoutError as error:
            raise RuntimeError("backend raised") from error

    with pytest.raises(TimeoutError, match="not compiled within"):
        beside.begin(beside.Variant(slow, limit=0.05), setup("gan"), ())


def test_the_section_of_steps_runs_and_prints():
    jobs = {job.name: job for job in steps.SECTION.jobs(SMALL)}
    assert {"gan bf16", "1.3b lora bf16", "stack T 16 bf16", "gpt fp32"} <= jobs.keys()
    rows = {name: measured(jobs[name]) for name in ("gan bf16", "dit-b/2 bf16", "stack T 1 bf16")}
    assert not any("failed" in row for row in rows.values()), rows
    assert rows["gan bf16"]["flops"] == 2 * 8 * (7 * 9 * 2 + 9 * 1 * 3)
    assert {m["kind"] for m in rows["dit-b/2 bf16"]["variants"]["private"]["methods"]} >= {
        "Conv2d.weight",
        "Linear.weight",
        "Embedding.weight",
    }
    lines = steps.SECTION.table(rows).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["gan", "dit-b/2", "stack,"]


def test_the_table_of_steps_has_the_figures():
    def variant(ratio):
        return {"seconds": 0.01 * ratio, "ratio": ratio, "peak_ratio": 1.01, "of_rate": 0.5 / ratio}

    row = {
        "batch": 8,
        "halved": [{"batch": 16}],
        "variants": {"plain": variant(1.0), "private": variant(1.04)},
    }
    more = {
        **row,
        "variants": {
            "plain": variant(1.0),
            "plain compiled": variant(0.8),
            "private fused": {"failed": "E: x"},
        },
    }
    lines = steps.SECTION.table({"gpt bf16": row, "gpt bf16 compiled": more}).splitlines()
    words = lines[1].split()
    assert words[:5] == ["gpt", "bf16", "8*", "10.00", "50%"] and words[5:7] == ["1.040", "1.010"]
    assert "0.800" in words and "failed" in words and len(lines[0]) <= 150
    assert lines[2] == "gpt bf16: private fused: E: x" and lines[3].startswith("* halved")


@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_peers_are_measured_or_say_why_not(monkeypatch):
    monkeypatch.setattr(peers, "OPTIONAL", {})
    jobs = {job.name: job for job in peers.SECTION.jobs(SMALL)}
    names = ("gpt fp32 opacus hooks", "gpt fp32 opacus ghost", "gpt2-small fp32 opacus ghost")
    rows = {name: measured(jobs[name]) for name in names}
    for name in names[:2]:
        assert rows[name]["is_same"] and {*rows[name]["variants"]} == {"plain", "private", name[9:]}
    assert rows[names[2]]["refused"].startswith("NotImplementedError: Parameter tying")
    table = peers.SECTION.table(rows)
    assert "opacus hooks ran, opacus ghost ran" in table and "opacus ghost refuses" in table
    assert "gpt2-small fp32: opacus ghost: NotImplementedError: Parameter tying" in table


def test_a_peer_that_clips_otherwise_says_so(monkeypatch):
    wrong = beside.Variant(lambda given, batch: steps.private(replace(given, clip=2 * given.clip), batch))
    monkeypatch.setattr(peers, "PEERS", {"wrong": wrong})
    monkeypatch.setattr(peers, "OPTIONAL", {"absent": ("no_such_package", wrong)})
    assert [*peers.peers()] == ["wrong"]
    row = peers.measure("mlp", "fp32", "wrong", SMALL)
    assert (
        not row["is_same"] and row["off_plain"] < 1e-5 and row["off_clipped"] == pytest.approx(1.0, abs=0.1)
    )
    assert "clipped 99.9% off ours" in peers.SECTION.table({"mlp fp32 wrong": row})


def test_a_decoder_that_keeps_keys_and_values_gives_the_whole_one_s_logits():
    torch.manual_seed(0)
    network = models.initialise_decoder(sampling.Decoder(sampling._SMALL))
    decoder = sampling.CachedDecoder(network, 3, torch.float32)
    ids = torch.randint(0, 50, (3, 6))
    with torch.inference_mode():
        whole = network(ids)
        for place in range(6):
            torch.testing.assert_close(decoder.logits(ids[:, place], place), whole[:, place])
        drawn = decoder.draw()
    assert drawn.shape == (3, 6) and drawn.unique().numel() > 3


def test_the_section_of_sampling_runs_and_prints():
    jobs = {job.name: job for job in sampling.SECTION.jobs(SMALL)}
    rows = {name: measured(jobs[name]) for name in ("gan", "decoder ehr")}
    assert rows["gan"]["cpu"]["streamed"]["rows"] > 0 and rows["gan"]["shape"].startswith("48 columns")
    assert sampling.SECTION.table(rows) == "gan: ran\ndecoder ehr: ran"
    rate = {"rows_per_second": 1234.5}
    row = {"what": "rows", "cuda": {"streamed": rate, "alone": {"4096": rate}}, "cpu": {"streamed": rate}}
    said = sampling.SECTION.table({"gan": row})
    assert said == "gan: cuda 1234 rows/s streamed, 1234 alone by 4096, cpu 1234 rows/s streamed"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("variant", ["plain compiled", "private fused"])
def test_compiled_steps_train_what_plain_ones_do(variant):
    assert beside.disagreement(steps.VARIANTS[variant], steps.VARIANTS["plain"], setup("gpt")) < 1e-4


def test_a_step_that_compiles_is_given_a_time():
    compiled = [v for name, v in steps.VARIANTS.items() if "compiled" in name or "fused" in name]
    assert len(compiled) == 2 and all(variant.limit < 120 for variant in compiled)
    assert steps.VARIANTS["plain"].limit == float("inf")

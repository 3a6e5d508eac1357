"""What the compiler makes of the Triton kernels for an H200, which need not be here: read off the instructions."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="the package triton cannot be imported here"
    ),
]
MULTIPLYING = ("_gram_kernel", "_tile_kernel", "_sum_kernel")
CONVOLVING = ("_conv_tile_kernel", "_conv_sum_kernel")  # of fp32, and of groups too small for tensor cores
HALF_CONVOLVING = ("_conv_half_tile_kernel", "_conv_half_sum_kernel")


@pytest.fixture(scope="module")
def listings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Of each kernel, what stands in the code of each of its cases. Every kernel has a case, and compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    script = Path(__file__).with_name("triton_compile.py")
    done = subprocess.run(
        [sys.executable, "-P", script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_no_product_of_fp32_is_tf32(listings):
    """Three digits of a norm would be three digits of the sensitivity."""
    assert not [name for name, cases in listings.items() for case in cases if case["tf32"]]
    for name in CONVOLVING:
        assert {case["mma"] for case in listings[name]} == {False}
    for name in HALF_CONVOLVING:
        assert {case["mma"] for case in listings[name]} == {True}
    for name in MULTIPLYING:
        assert {case["mma"] for case in listings[name] if case["operands"] == "fp32"} == {False}
        # The same look finds tensor instructions where they are wanted.
        assert {case["mma"] for case in listings[name] if case["operands"] == "bf16"} == {True}


def test_nothing_is_added_in_the_order_of_arrival(listings):
    assert not [name for name, cases in listings.items() for case in cases if case["atomic"]]


def test_noise_and_updates_are_unfused_and_rounded_as_on_the_cpu(listings):
    """That is what makes them the same bits there."""
    for name in ("_noise_kernel", "_adam_kernel", "_adam_silent_kernel", "_sgd_kernel", "_sgd_silent_kernel"):
        assert not [case for case in listings[name] if case["approximate"] or case["fused_fp32"]], name
    assert any(case["fused_fp32"] for name in (*MULTIPLYING, *CONVOLVING) for case in listings[name])


def test_integer_noise_is_products_and_sums_of_doubles(listings):
    """The same integers as on the CPU, and nothing whose time could depend on them."""
    for name in ("_rounded_kernel", "_release_kernel"):
        assert not [case for case in listings[name] if case["fused_fp64"] or case["divides"]], name
    # The same looks find both where they are.
    assert any(case["fused_fp64"] for cases in listings.values() for case in cases)
    assert all(case["divides"] for case in listings["_noise_kernel"])


def test_sums_of_normalisations_are_of_doubles(listings):
    """Nor is the only division, by the number of elements, one of floats."""
    for name in ("_row_sums_kernel", "_row_coefficients_kernel", "_layer_norm_units_kernel"):
        assert not [case for case in listings[name] if case["fused_fp32"]], name
    for name in ("_layer_norm_kernel", "_group_norm_kernel", "_row_coefficients_kernel"):
        assert not [case for case in listings[name] if case["approximate"]], name

"""The block shapes that the outer family's Triton kernels choose, compiled for an H200, which need not be here."""

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
ROOT = Path(__file__).parents[2]
MULTIPLYING = ("_gram_kernel", "_tile_kernel", "_sum_kernel")


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What `benchmarks.gpu.static` reads off the machine code of each launch."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.static", "--json"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_all_kernels_are_there(codes):
    assert {*MULTIPLYING, "_rank1_kernel", "_join_kernel", "_order_kernel"} <= {c["kernel"] for c in codes}
    assert {c["operation"].split()[1] for c in codes} == {"float32", "bfloat16"}


def test_nothing_is_spilled_and_everything_fits(codes):
    assert not [c for c in codes if c["spilled_bytes"]]
    assert all(c["blocks_per_processor"] >= 1 and c["shared_bytes"] <= 227 << 10 for c in codes)


def test_no_product_is_tf32(codes):
    assert not [c for c in codes if c["tf32"]]
    assert all(c["ffma"] and not c["mma"] + c["wgmma"] for c in codes if single(c))


def single(code: dict[str, Any]) -> bool:
    return code["kernel"] in MULTIPLYING and "float32" in code["operation"]


def test_bf16_is_multiplied_by_warp_groups(codes):
    """Blocks of 16 rows are too few for that, and take a warp's own instruction."""
    half = [c for c in codes if c["kernel"] in MULTIPLYING and "bfloat16" in c["operation"]]
    assert half
    for code in half:
        assert code["mma"] if "BT=16 " in code["blocks"] else code["wgmma"], code


def test_operands_of_half_precision_are_loaded_16_bytes_at_a_time(codes):
    """Rows of odd width, too: they are padded."""
    for code in codes:
        if code["kernel"] in MULTIPLYING and "bfloat16" in code["operation"]:
            assert code["widest_load_bytes"] == 16, code


def test_sums_of_squares_convert_one_number_of_sixteen(codes):
    """Conversions to fp64 go at a sixteenth of the rate of fp32 additions."""
    tiles = [c for c in codes if c["kernel"] == "_tile_kernel" and "bfloat16" in c["operation"]]
    assert tiles
    for code in tiles:
        numbers = 128 * 128 // (32 * code["warps"])
        assert "BP=128 BD=128" in code["blocks"] and code["to_fp64"] <= numbers // 16

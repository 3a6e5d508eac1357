"""The measurements on a GPU, as far as they run without one: the checks that come before any time is taken."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton cannot be imported here"
)
ROOT = Path(__file__).resolve().parents[2]


def run(*options: str, interpret: bool) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu", *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_every_kernel_is_right_before_it_is_timed():
    done = run("--small", interpret=True)
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = {line.split()[0] for line in done.stdout.splitlines()}
    assert {"rank1_norms", "gram_norms", "tile_norms", "outer_sum", "noisy_adam_", "noisy_sgd_"} <= kernels
    assert {"conv_norms", "conv_unit_grads", "conv_sum"} <= kernels
    assert {"layer_norm_backward", "group_norm_backward"} <= kernels
    assert "WRONG" not in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_one_line_says_so():
    done = run(interpret=False)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.strip() == "benchmarks.gpu: no CUDA device here, so nothing was checked or measured"

"""The custom ops: what they declare is what they do, and a compiled function with them is one graph."""

from __future__ import annotations

import inspect
import shutil

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from synthward import kernels
from synthward.kernels import ConvShape, ops
from tests.kernels.cases import generator, matrix

KEY = torch.arange(32, dtype=torch.uint8)
A, G = matrix(6, 5, 1), matrix(6, 7, 2)
OFFSETS = torch.tensor([0, 1, 1, 4, 6])
IDS = torch.tensor([1, -1, 0, 1, 2, 2])
WEIGHTS = torch.tensor([0.5, 0.0, 1.0, 0.25, 1.0, 0.0])


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


CONV = ConvShape(1, 2, 3, (1, 1, 5), (1, 1, 3), (1, 1, 1), (0, 0, 0), (1, 1, 1), (1, 1, 3)).numbers()
IMAGES, MAPS = matrix(6, 10, 3), matrix(6, 9, 4)
CUBE = matrix(6, 12, 5).view(6, 4, 3)
NORMED = (zeros(6, 7), zeros(4, 7), zeros(4, 7))
NOISE = (KEY, 1, 5, 3, 0.7)
CALLS = {
    "outer_sq_norms": (A, G, OFFSETS, zeros(4)),
    "outer_weighted_sum": (A, G, WEIGHTS, zeros(7, 5)),
    "rank1_norms": (A, G, zeros(6), zeros(6)),
    "outer_norms": (A, G, OFFSETS, zeros(4), zeros(4), "gram"),
    "outer_sum": (A, G, WEIGHTS, zeros(7, 5), zeros(7)),
    "outer_unit_grads": (A, G, OFFSETS),
    "scale_rows": (G, WEIGHTS),
    "new_output": ([2, 3], torch.float32, torch.device("cpu"), True),
    "product": (A, G[:5], None, False),
    "conv_norms": (CONV, IMAGES, MAPS, OFFSETS, zeros(4), zeros(4), None, "tile"),
    "conv_unit_grads": (CONV, IMAGES, MAPS, OFFSETS),
    "conv_sum": (CONV, IMAGES, MAPS, WEIGHTS, zeros(3 * 3 * 2)),
    "layer_norm_backward": (G, G.flip(0), G[:, 0], G[:, 1].abs(), G[0], OFFSETS, None, *NORMED),
    "group_norm_backward": (
        *(CUBE, CUBE.flip(0), A[:, :2], A[:, 1:3].abs(), A[0, :4]),
        *(zeros(6, 4), zeros(6, 4), torch.zeros_like(CUBE)),
    ),
    "diagonal_sq_norms": (G, OFFSETS, G.flip(0), zeros(4)),
    "diagonal_weighted_sum": (G, WEIGHTS, None, zeros(7)),
    "scatter_sq_norms": (IDS, G, None, zeros(6)),
    "scatter_weighted_sum": (IDS, G, WEIGHTS, zeros(3, 7)),
    "add_gaussian_noise_": (zeros(9), *NOISE),
    "discrete_release_": (zeros(9).double(), zeros(9), KEY, 1, 5, 3, 0.125, 0.75),
    "noisy_adam_": (
        zeros(9),
        zeros(9),
        zeros(9),
        zeros(9),
        *NOISE,
        0.1,
        0.1,
        0.9,
        0.999,
        1e-8,
        0.0,
        False,
        1,
    ),
    "noisy_sgd_": (zeros(9), zeros(9), None, *NOISE, 0.1, 0.1, 0.0, 0.0, False, 0.0, True),
}


def test_every_op_is_called_here():
    made = [name for name, value in vars(ops).items() if isinstance(value, torch.library.CustomOpDef)]
    assert set(made) - {"_operation"} == set(CALLS)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_an_op_does_what_it_declares(name, backend):
    arguments = tuple(x.clone() if isinstance(x, Tensor) else x for x in CALLS[name])
    options = {} if name == "new_output" else {"backend": backend}
    opcheck(getattr(torch.ops.synthward, name).default, arguments, options)


# What ops of noise do not take.
WITHOUT = {
    "add_gaussian_noise_": {"correlation"},
    "noisy_adam_": {"correlation", "bias_variance", "min_second_moment"},
    "noisy_sgd_": {"correlation"},
}


@pytest.mark.parametrize("name", [name for name in CALLS if name != "new_output"])
def test_what_no_op_takes_is_no_part_of_a_recorded_pass(name):
    """Of updates and noise, which are refused in a trace; all others take what their functions take."""
    function = getattr(kernels, name)
    given = set(inspect.signature(getattr(ops, name)._init_fn).parameters)
    left_out = set(inspect.signature(function).parameters) - given
    assert left_out == WITHOUT.get(name, set())
    if name in WITHOUT:
        assert not hasattr(function, "__wrapped__"), "it would be written into the graph of a recorded pass"


def private_step(
    a: Tensor, g: Tensor, ids: Tensor, offsets: Tensor, param: Tensor, key: Tensor, step: int
) -> Tensor:
    """Norms of two families, clipping, sums, noise and update: what one step of a layer and a table does."""
    units = offsets.shape[0] - 1
    norms = torch.zeros(units)
    ops.outer_sq_norms(a, g, offsets, norms)
    ops.diagonal_sq_norms(g, offsets, None, norms)
    ops.scatter_sq_norms(ids, g, offsets, norms)
    factors = (1.0 / norms.sqrt()).clamp(max=1.0)
    weights = factors.nan_to_num(0.0).repeat_interleave(offsets.diff(), output_size=a.shape[0])
    weight, bias, table = torch.zeros(7, 5), torch.zeros(7), torch.zeros(3, 7)
    ops.outer_sum(a, g, weights, weight, bias)
    ops.scatter_weighted_sum(ids, g, weights, table)
    summed = torch.cat([weight.flatten(), bias, table.flatten()])
    ops.noisy_sgd_(param, summed, None, key, 0, step, 0, 0.5, 0.25, 0.1, 0.0, 0.0, False, 0.0, True)
    return norms


def run_steps(function: object) -> list[Tensor]:
    param = torch.randn(63, generator=generator())
    norms = [function(A, G, IDS, OFFSETS, param, KEY, step) for step in range(3)]
    return [param, *norms]


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param(
            "inductor",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler for inductor here"),
            ],
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, inside inductor
def test_a_private_step_compiles_to_one_graph(backend, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    compiled = torch.compile(private_step, fullgraph=True, backend=backend)
    for found, expected in zip(run_steps(compiled), run_steps(private_step), strict=True):
        torch.testing.assert_close(found, expected)
    assert run_steps(private_step)[0].isfinite().all()
    # What the compiler keeps on disk may not hold the noise key.
    kept = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    assert kept or backend == "aot_eager"
    assert not any(
        bytes(KEY.tolist()) in content or str(KEY.tolist()).encode() in content for content in kept
    )


@pytest.mark.parametrize("name", CALLS)
def test_what_is_written_is_always_given(name):
    """torch 2.11 leaves out what has its default, and then looks for it among what was written."""
    for argument in getattr(ops, name)._opoverload._schema.arguments:
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        assert not (is_written and argument.has_default_value()), argument.name


def test_the_key_is_checked():
    with pytest.raises(TypeError, match=r"^key: "):
        ops.add_gaussian_noise_(zeros(3), KEY.float(), 0, 0, 0, 1.0)
    with pytest.raises(ValueError, match=r"^key: "):
        ops.add_gaussian_noise_(zeros(3), KEY[:31], 0, 0, 0, 1.0)


def test_the_ops_noise_is_that_of_the_function():
    found, key = zeros(300), bytes(range(32))
    ops.add_gaussian_noise_(found, KEY, 1, 5, 3, 1.0)
    assert torch.equal(found, kernels.gaussian_noise(300, key=key, stream=1, step=5, start=3))

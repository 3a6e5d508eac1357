"""Every instruction set that this machine runs, one after the other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from synthward.kernels import available_isas, force_isa


@pytest.fixture(params=available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Name of the instruction set that is forced while the test runs."""
    force_isa(request.param)
    yield request.param
    force_isa(None)


@pytest.fixture(params=["reference", *available_isas()])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The reference, then the compiled kernels in each instruction set."""
    if request.param == "reference":
        yield "reference"
        return
    force_isa(request.param)
    yield "cpp"
    force_isa(None)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)

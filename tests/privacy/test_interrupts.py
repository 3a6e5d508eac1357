"""Forward passes of the user's own loop that Ctrl-C cuts short."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.overrides import _get_current_function_mode_stack

from synthward.engine.errors import PrivacyError
from tests.oracles import clipped_sum, flat_parameters, per_unit_gradients
from tests.privacy.test_session_holes import Body, private, records


class Interrupted(Body):
    """Ctrl-C in the middle of a forward pass."""

    is_cut = False

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        if self.is_cut:
            raise KeyboardInterrupt
        return self.head(hidden)

    def cut(self, x):
        self.is_cut = True
        with pytest.raises(KeyboardInterrupt):
            self(x)
        self.is_cut = False


def test_after_an_interrupt_rows_are_those_of_the_next_batch():
    _, module, optimizer, _ = private(Interrupted(), poisson_sampling=False)
    module.cut(records()[:1])
    optimizer.zero_grad()
    before, x = flat_parameters(module), records()[:4]
    (100 * module(x)).sum().backward()
    optimizer.step()
    gradients = per_unit_gradients(Body(), lambda net, row: 100 * net(row.unsqueeze(0)).sum(), list(x))
    np.testing.assert_allclose(before - flat_parameters(module), clipped_sum(gradients, 0.1), atol=3e-6)


def test_after_an_interrupt_units_are_those_of_the_next_batch():
    engine, module, optimizer, _ = private(Interrupted(), poisson_sampling=False)
    with engine.units(torch.tensor([0, 1, 2, 3])):
        module.cut(records()[:4])
    optimizer.zero_grad()
    before = flat_parameters(module)
    with engine.units(torch.tensor([7, 7, 7, 7])):
        (100 * module(records()[:1].expand(4, 4).contiguous())).sum().backward()
    optimizer.step()
    assert 0 < np.linalg.norm(before - flat_parameters(module)) <= 0.1


def test_an_interrupt_ends_the_step_under_way(caplog):
    """What was accumulated before is gone, and the mode of the capture is off, whatever lies above it."""
    _, module, optimizer, _ = private(Interrupted(), poisson_sampling=False)
    module(records()).sum().backward()
    modes = _get_current_function_mode_stack()
    module.cut(records())
    assert len(_get_current_function_mode_stack()) == len(modes) + 1
    with torch.device("cpu"):
        module(records())
        assert _get_current_function_mode_stack()[: len(modes)] == modes
        assert len(_get_current_function_mode_stack()) == len(modes) + 1
    assert _get_current_function_mode_stack() == modes
    assert caplog.text.count("interrupted") == 1
    before = flat_parameters(module)
    with pytest.raises(PrivacyError, match="failed"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert np.array_equal(before, flat_parameters(module))


def test_an_interrupt_and_then_a_step():
    _, module, optimizer, _ = private(Interrupted(), poisson_sampling=False)
    modes = _get_current_function_mode_stack()
    module.cut(records())
    before = flat_parameters(module)
    with pytest.raises(PrivacyError, match="failed"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert np.array_equal(before, flat_parameters(module)) and _get_current_function_mode_stack() == modes

"""A generator that is not in CPU memory: no tensor of its own is left behind there, and no number is waited for.

Without such a device: on torch's "meta" device, whose tensors have no numbers to read (`other_device`).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from synthward.engine.device import CPU
from synthward.engine.draws import Draws
from synthward.generators import gan
from tests.generators.other_device import LAYOUTS, META, OneDevice, make_batch, make_generator

NAMES = ("diffusion", "gan")
KEY = bytes(range(32))


@pytest.fixture
def stand_in(monkeypatch):
    """For drawing tokens, whose reference looks at numbers: the same tensors in, tokens out."""

    def draw_tokens(
        features: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, columns: Tensor, uniforms: Tensor,
        *, added: Tensor | None = None, sums: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        given = (features, weight, bias, offsets, columns, uniforms, added, sums)
        assert {t.device for t in given if t is not None} == {META}
        return torch.zeros_like(columns)

    monkeypatch.setattr("synthward.generators.sampler.draw_tokens", draw_tokens)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("numbered", [True, False])
def test_losses_and_their_gradients(name, layout, numbered):
    generator = make_generator(name, layout).to(META)
    rng = Draws(KEY).to(META) if numbered else torch.Generator()
    with OneDevice() as seen:
        losses = generator.unit_losses(make_batch(generator, 5), rng)
        grads = torch.autograd.grad(losses.sum(), [*generator.private_module.parameters()])
    assert losses.shape == (5,) and losses.is_meta and all(grad.is_meta for grad in grads)
    assert seen.operations > 20


@pytest.mark.parametrize("name", NAMES)
def test_what_follows_a_step_reads_nothing(name, monkeypatch):
    """But for the GAN's schedule, which looks at its fakes once in many updates."""
    generator = make_generator(name).to(META)
    rng, looks = torch.Generator(), []
    # Reached once all is computed: the schedule looks at a number here, and not before.
    monkeypatch.setattr(gan, "float", lambda value: looks.append(value) or 1.0, raising=False)
    with OneDevice() as seen:
        for step in range(gan.UPDATES_BEFORE_RAISE):
            assert not looks
            generator.after_step(step, 100, rng)
    assert seen.operations and len(looks) == (name == "gan")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_sampling(name, layout, stand_in):
    generator = make_generator(name, layout).to(META)
    # Masks come from a condition, and so from CPU memory.
    allowed = (
        {0: torch.tensor([True] + [False] * (LAYOUTS[layout].token_sizes[0] - 1))}
        if layout != "scores"
        else {}
    )
    with OneDevice():
        tokens, scores = generator.sample(
            torch.zeros(6, dtype=torch.int64, device=META), Draws(KEY).to(META), allowed or None
        )
        weights = generator.context_weights(allowed)
        generator.calibrate(lambda rows: torch.zeros(rows, dtype=torch.int64), torch.Generator(), rounds=1)
    assert tokens.is_meta and scores.is_meta and weights.is_meta and generator.logit_shift.is_meta
    assert tokens.shape == (6, LAYOUTS[layout].tokens) and scores.shape == (6, LAYOUTS[layout].continuous)


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter:UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_what_was_kept_goes_where_the_generator_is(name):
    """A checkpoint or a released network is read into CPU memory."""
    kept = make_generator(name).state(resume=True)
    generator = make_generator(name).to(META)
    generator.load_state(kept)
    assert all(value.is_meta for value in generator.state(resume=False).values())
    generator.after_step(0, 100, torch.Generator())


@pytest.mark.parametrize("name", NAMES)
def test_moving_there_leaves_nothing_behind(name):
    generator = make_generator(name).to(META)
    held = [value for value in vars(generator).values() if isinstance(value, Tensor)]
    held += [*generator.private_module.parameters(), *generator.averaged.parameters()]
    assert held and all(value.is_meta for value in held) and generator.device == META
    if name == "gan":
        assert generator.optimizer.param_groups[0]["params"] == [*generator.network.parameters()]


@pytest.mark.parametrize("left", ["offsets", "membership", "column_of_token"])
def test_a_tensor_that_is_left_behind_is_noticed(left):
    generator = make_generator("gan").to(META)
    setattr(generator, left, getattr(make_generator("gan"), left))
    with pytest.raises((AssertionError, RuntimeError)), OneDevice():
        generator.unit_losses(make_batch(generator, 5), Draws(KEY).to(META))


@pytest.mark.parametrize("name", NAMES)
def test_the_numbers_do_not_depend_on_where_it_was_built(name):
    """`to` with the device it is on is no change of anything."""
    batch: Any = None
    found = []
    for moved in (False, True):
        torch.manual_seed(1)
        generator = make_generator(name)
        if moved:
            generator = generator.to(CPU)
        batch = batch or make_batch(generator, 5, CPU)
        found.append(generator.unit_losses(batch, Draws(KEY)))
    assert torch.equal(*found)


@pytest.mark.skipif(
    not torch.backends.cuda.is_built(),
    reason="this build of torch knows no CUDA tensors, not even without numbers",
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_losses_of_cuda_tensors_without_numbers(name, layout, monkeypatch):
    """The forward pass by torch's own rules for CUDA (FakeTensor); its backward pass would need the device."""
    for module in ("synthward.generators.base", "synthward.generators.randomness"):
        # Pinned memory has no such form.
        monkeypatch.setattr(f"{module}.copy_to", lambda tensor, device: tensor.to(device))
    generator = make_generator(name, layout)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        generator.device = torch.device("cuda", 0)
        for key, value in vars(generator).items():
            if isinstance(value, Tensor):
                setattr(generator, key, torch.empty_like(value, device=generator.device))
        for module in [value for value in vars(generator).values() if isinstance(value, nn.Module)]:
            for layer in module.modules():
                for key, value in layer._parameters.items():
                    layer._parameters[key] = nn.Parameter(torch.empty_like(value, device=generator.device))
        batch = make_batch(generator, 5, generator.device)
        losses = generator.unit_losses(batch, Draws(KEY).to(generator.device))
    assert losses.device == generator.device and losses.shape == (5,)

"""Conditional sampling, learned without noise: what is asked for is drawn, and the other columns follow it."""

import numpy as np
import torch

from synthward.encoding import Layout
from synthward.generators import Batch, DiffusionGenerator, DiffusionSettings


def test_other_columns_follow_the_condition():
    layout = Layout((3, 3, 2), 1, 1, 2, (-1,))
    rng = np.random.default_rng(0)
    first = rng.integers(0, 3, 4096)
    # The second column copies the first, the label says whether it is 2, the score is high where the label is 1.
    tokens = np.stack([first, first, (first == 2).astype(int)], axis=1)
    scores = (np.where(first == 2, 1.5, -0.7) + 0.3 * rng.normal(size=4096)).astype(np.float32)[:, None]
    mass = np.array([1 / 3] * 6 + [2 / 3, 1 / 3])
    settings = DiffusionSettings(hidden=32, blocks=1, draws=2, learning_rate=5e-3, sampling_steps=8)
    generator = DiffusionGenerator(layout, mass, settings)
    torch_rng = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(generator.private_module.parameters(), lr=5e-3)
    for step in range(400):
        rows = torch.randint(4096, (512,), generator=torch_rng)
        context = torch.zeros(512, dtype=torch.int64)
        batch = Batch(torch.from_numpy(tokens)[rows], torch.from_numpy(scores)[rows], context)
        loss = generator.unit_losses(batch, torch_rng).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        generator.after_step(step, 400, torch_rng)
    context = torch.zeros(2000, dtype=torch.int64)
    for label in (0, 1):
        allowed = {2: torch.arange(2) == label}
        drawn, score = generator.sample(context, torch_rng, allowed)
        assert (drawn[:, 2] == label).all()
        assert ((drawn[:, 0] == 2) == bool(label)).float().mean() > 0.9
        assert (drawn[:, 0] == drawn[:, 1]).float().mean() > 0.9
        assert (score.mean() > 0.5) == bool(label)
    weights = generator.context_weights({2: torch.tensor([False, True])})
    assert abs(float(weights[0]) - 1 / 3) < 0.1

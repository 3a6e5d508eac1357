"""The Poisson loader: any kind of batch, empty draws, workers, whole units."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler

from synthward.engine.errors import ConfigError
from synthward.engine.loader import PoissonLoader
from synthward.engine.spec import SamplingSpec

KEY = bytes(range(32))


class Records(Dataset):
    """Dictionaries with a tensor, a number and a string."""

    def __len__(self) -> int:
        return 30

    def __getitem__(self, index):
        return {"x": torch.full((4,), float(index)), "y": index % 2, "name": f"r{index}"}


def test_batches_of_dictionaries_with_none_drawn():
    loader = PoissonLoader(DataLoader(Records(), batch_size=1), SamplingSpec(1 / 60, 1.0), KEY, None)
    sizes = set()
    for _ in range(4):
        for batch in loader:
            size = len(batch["y"])
            sizes.add(size)
            assert batch["x"].shape == (size, 4) and batch["x"].dtype == torch.float32
            assert batch["y"].dtype == torch.int64 and len(batch["name"]) == size
    assert 0 in sizes and max(sizes) > 0


def test_an_epoch_is_the_public_rate_and_epochs_differ():
    dataset = TensorDataset(torch.arange(40))
    loader = PoissonLoader(DataLoader(dataset, batch_size=4), SamplingSpec(0.1, 4.0), KEY, None)
    assert len(loader) == 10
    epochs = [[batch[0].tolist() for batch in loader] for _ in range(2)]
    assert len(epochs[0]) == len(epochs[1]) == 10 and epochs[0] != epochs[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_draw_of_a_batch_is_known_when_it_is_handed_out(workers):
    """Workers fetch ahead; the record of the draw stays with its batch."""
    ids = torch.arange(40) // 4
    dataset = TensorDataset(torch.arange(40), ids)
    loader = PoissonLoader(
        DataLoader(dataset, batch_size=4, num_workers=workers), SamplingSpec(0.2, 4.0), KEY, ids.numpy()
    )
    seen = []
    for rows, units in loader:
        assert loader.draw.rows == len(rows) and loader.draw.unit_ids.tolist() == units.tolist()
        drawn = sorted(set(units.tolist()))
        assert sorted(rows.tolist()) == [4 * unit + row for unit in drawn for row in range(4)]
        seen.append(loader.draw.index)
    assert seen == list(range(5))
    next(iter(loader))
    assert loader.draw.index > 4, "a pass that was left early never hands out its draws again"


class Endless(IterableDataset):
    def __iter__(self):
        yield torch.zeros(1)


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(Endless()),
        DataLoader(TensorDataset(torch.zeros(4)), sampler=WeightedRandomSampler([1.0] * 4, 4)),
        DataLoader(TensorDataset(torch.zeros(4)), batch_sampler=[[0, 1], [2, 3]]),
        DataLoader(TensorDataset(torch.zeros(0)), batch_size=2),
        DataLoader([1.5, 2.5], batch_size=1, collate_fn=lambda items: items[0]),
    ],
    ids=["iterable", "weighted", "batch_sampler", "empty", "not a tensor"],
)
def test_loaders_that_poisson_sampling_cannot_stand_in_for(loader):
    with pytest.raises(ConfigError, match="data_loader"):
        PoissonLoader(loader, SamplingSpec(0.5, 1.0), KEY, None)

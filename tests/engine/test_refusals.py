"""An operation on a parameter is exact or refused by name, for every operation that someone may think of."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from synthward import PrivacyEngine
from synthward.engine.errors import PrivacyError, UnsupportedOperationError
from tests.engine.measure import distance, plain_gradients, read_pass, unit_gradients
from tests.engine.nets import accumulate, make_trainer, oracle, released
from tests.oracles import flat_parameters

TIMES, WIDTH = 3, 4


class Odd(nn.Module):
    """A layer, an operation of its output and the parameter `odd`, and a head."""

    def __init__(self, operation, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(1, 2)
        self.odd, self.operation = nn.Parameter(torch.rand(shape) + 0.5), operation

    def forward(self, x: Tensor) -> Tensor:
        made = self.operation(torch.tanh(self.stem(x)), self.odd)
        return self.head(torch.sin(made.reshape(len(x), -1)).sum(1, keepdim=True))


def _scattered(h: Tensor, w: Tensor) -> Tensor:
    ids = (h[:, 0].abs() * 2).long().clamp_max(WIDTH - 1)
    return torch.zeros_like(h[:, 0]).scatter_add(1, ids, w.expand_as(h[:, 0]))


def _masked(h: Tensor, w: Tensor) -> Tensor:
    return h.masked_scatter(h > 0, w.expand_as(h))


def _spline(h: Tensor, w: Tensor) -> Tensor:
    place = torch.searchsorted(torch.linspace(-1, 1, WIDTH - 1), h.detach().contiguous())
    return h * torch.take(w, place)


D, TD, DD = (WIDTH,), (TIMES, WIDTH), (WIDTH, WIDTH)
# h [rows, times, width], in double precision for the loop.
OPERATIONS = {
    # distances and similarities
    "cdist": (lambda h, w: torch.cdist(h, w.expand(len(h), -1, -1)), DD),
    "pairwise_distance": (lambda h, w: F.pairwise_distance(h[:, 0], w), D),
    "cosine_similarity": (lambda h, w: F.cosine_similarity(h, w, dim=-1), D),
    "dist of each": (lambda h, w: (h - w).norm(dim=-1), D),
    "kron": (lambda h, w: torch.kron(h[:, 0], w.unsqueeze(0)), D),
    "cross": (lambda h, w: torch.linalg.cross(h[..., :3], w.expand(len(h), TIMES, 3)), (3,)),
    "dot of each": (lambda h, w: torch.vmap(lambda row: row @ w)(h[:, 0]), D),
    # running operations of a product with data
    "cumsum": (lambda h, w: torch.cumsum(h * w, 1), D),
    "cumprod": (lambda h, w: torch.cumprod(1 + 0.1 * h * w, -1), D),
    "logcumsumexp": (lambda h, w: torch.logcumsumexp(h * w, 1), D),
    "cumsum of the parameter": (lambda h, w: h * w.cumsum(0), D),
    "diff": (lambda h, w: torch.diff(h, prepend=w.expand(len(h), 1, WIDTH), dim=1), D),
    # Fourier transforms
    "fft of a product": (lambda h, w: torch.fft.rfft(h * w).abs(), D),
    "fft of the parameter": (lambda h, w: h[..., :3] * torch.fft.rfft(w).abs(), D),
    "a spectral filter": (lambda h, w: torch.fft.irfft(torch.fft.rfft(h) * torch.complex(w, w)), (3,)),
    "stft window": (
        lambda h, w: torch.stft(h.flatten(1), 4, window=w, return_complex=True).abs(),
        D,
    ),
    # activations with parameters
    "prelu": (lambda h, w: F.prelu(h.transpose(1, 2), w), D),
    "prelu of one": (F.prelu, (1,)),
    "snake": (lambda h, w: h + torch.sin(w * h).square() / w, D),
    "softplus of a temperature": (lambda h, w: F.softplus(h * w) / w, D),
    "threshold": (lambda h, w: F.relu(h - w), D),
    "clamp": (lambda h, w: torch.clamp(h, min=-w * 0.1, max=w * 0.1), D),
    "glu": (lambda h, w: F.glu(torch.cat([h, w.expand_as(h)], -1)), D),
    "rrelu of a product": (lambda h, w: F.rrelu(h * w, 0.2, 0.2), D),
    # losses whose weights and targets are parameters
    "gaussian_nll_loss": (
        lambda h, w: F.gaussian_nll_loss(h, torch.zeros_like(h), w.expand_as(h), reduction="none"),
        D,
    ),
    "mse_loss": (lambda h, w: F.mse_loss(h, w.expand_as(h), reduction="none"), D),
    "smooth_l1_loss": (lambda h, w: F.smooth_l1_loss(h, w.expand_as(h), reduction="none"), D),
    "kl_div": (lambda h, w: F.kl_div(h.log_softmax(-1), w.softmax(0).expand_as(h), reduction="none"), D),
    # indices, sorts, reductions
    "gather": (lambda h, w: torch.gather(w.expand_as(h), -1, h.argsort(-1)), D),
    "take": (_spline, D),
    "index_add": (lambda h, w: h.index_add(1, torch.tensor([0]), w.expand(len(h), 1, WIDTH)), D),
    "index_copy": (lambda h, w: h.index_copy(1, torch.tensor([0]), w.expand(len(h), 1, WIDTH)), D),
    "index_put": (lambda h, w: h.index_put((torch.arange(len(h)),), w.expand_as(h)), D),
    "scatter_add": (_scattered, D),
    "masked_scatter": (_masked, D),
    "masked_fill": (lambda h, w: h.masked_fill(h > 0, w), ()),
    "sort of a product": (lambda h, w: torch.sort(h * w, -1).values, D),
    "topk of a sum": (lambda h, w: torch.topk(h + w, 2).values, D),
    "max of both": (lambda h, w: torch.stack([h, w.expand_as(h)]).amax(0), D),
    "logsumexp of both": (lambda h, w: torch.logsumexp(torch.stack([h, w.expand_as(h)], -1), -1), D),
    "pad with the parameter": (lambda h, w: torch.cat([w.expand(len(h), 1, WIDTH), h, h], 1), D),
    "roll": (lambda h, w: h * torch.roll(w, 1), D),
    "flip": (lambda h, w: h * w.flip(0), D),
    "repeat_interleave": (lambda h, w: h * w.repeat_interleave(2), (2,)),
    "unfold of the parameter": (lambda h, w: h * w.unfold(0, WIDTH, 1)[1], (6,)),
    # linear algebra
    "solve": (lambda h, w: torch.linalg.solve(w + 3 * torch.eye(WIDTH).to(w), h.mT), DD),
    "solve of data": (
        lambda h, w: torch.linalg.solve(h.mT @ h + torch.eye(WIDTH).to(h), w.expand(len(h), -1, -1)),
        DD,
    ),
    "triangular solve": (
        lambda h, w: torch.linalg.solve_triangular(w.tril() + torch.eye(WIDTH).to(w), h.mT, upper=False),
        DD,
    ),
    "matrix_exp": (lambda h, w: h @ torch.matrix_exp(0.1 * w), DD),
    "inverse": (lambda h, w: h @ torch.linalg.inv(w + 3 * torch.eye(WIDTH).to(w)), DD),
    "orthogonal factor": (lambda h, w: h @ torch.linalg.qr(w)[0], DD),
    "multi_dot": (lambda h, w: torch.linalg.multi_dot([h[:, 0], w, w]), DD),
    "chain_matmul of a power": (lambda h, w: h @ torch.linalg.matrix_power(w, 2), DD),
    "einsum of three": (lambda h, w: torch.einsum("btd,de,bse->bts", h, w, h), DD),
    "trace of a product": (lambda h, w: torch.einsum("btd,td->b", h, w), TD),
    # resampling and filters
    "grid_sample": (
        lambda h, w: F.grid_sample(
            w.expand(len(h), 1, -1, -1), h[..., :2].unsqueeze(1).contiguous(), align_corners=True
        ),
        DD,
    ),
    "affine_grid": (
        lambda h, w: F.affine_grid(h[:, :2, :3] * w, [len(h), 1, 2, 2], align_corners=False),
        (2, 3),
    ),
    "interpolate": (lambda h, w: h * F.interpolate(w.view(1, 1, -1), WIDTH, mode="linear")[0, 0], (2,)),
    "bilinear": (lambda h, w: F.bilinear(h, h.sin(), w), (2, *DD)),
    "fold": (lambda h, w: F.fold(h * w.unsqueeze(1), (2, 2), (1, 3), padding=(0, 1)), (3,)),
    "local_response_norm": (lambda h, w: F.local_response_norm(h * w, 2), D),
    "batch_norm in eval": (
        lambda h, w: F.batch_norm(h.mT, torch.zeros_like(w.detach()), torch.ones_like(w.detach()), w, w),
        D,
    ),
    # other ways to a parameter
    "lookup": (lambda h, w: h + w[(h[..., 0] > 0).long()], (2, WIDTH)),
    "lookup of a slice": (lambda h, w: h + w[:, 0][(h > 0).long()], (2, 2)),
    "where by data": (lambda h, w: torch.where(h > 0, h, w * h), D),
    "lerp": (lambda h, w: torch.lerp(h, h.sin(), w), D),
    "heaviside": (lambda h, w: h * torch.heaviside(h.detach(), w.detach()) * w, D),
    "xlogy": (lambda h, w: torch.xlogy(h.exp(), w), D),
    "ldexp": (lambda h, w: torch.ldexp(h, w), D),
    "fmod": (lambda h, w: torch.fmod(h, w), D),
    "copysign": (lambda h, w: torch.copysign(w, h), D),
    "polar": (lambda h, w: torch.polar(w.expand_as(h).contiguous(), h).real, D),
    "as_strided": (lambda h, w: h * w.as_strided((WIDTH,), (2,)), (2 * WIDTH,)),
    "set_ of storage": (lambda h, w: h * torch.Tensor.view_as(w, h[0, 0]), D),
    "sparse product": (lambda h, w: torch.sparse.mm(h[:, 0].to_sparse(), w), DD),
}


def outcome_of(net: nn.Module, counts: list[int]) -> str:
    """Whether it is exact, or the message of the refusal."""
    x = torch.randn(sum(counts), TIMES, WIDTH, generator=torch.Generator().manual_seed(1))
    gradients, plain = unit_gradients(net, x, counts), plain_gradients(net, x, counts)
    assert np.linalg.norm(gradients) > 1e-3
    try:
        found = read_pass(net, x, counts, 1e6)
    except UnsupportedOperationError as error:
        return str(error)
    off = 2 * np.linalg.norm(plain - gradients, axis=1).max()
    assert np.linalg.norm(found.sums - gradients.sum(0)) <= max(1e-5 * np.linalg.norm(gradients), off)
    norms = np.linalg.norm(gradients, axis=1)
    assert (np.abs(np.sqrt(found.sq_norms[0]) - norms) <= np.maximum(1e-5 * norms, off)).all()
    return "exact"


@pytest.mark.parametrize("counts", [[1] * 5, [2, 0, 3], [1]], ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_exact_or_refused_by_name(name, counts):
    torch.manual_seed(0)
    operation, shape = OPERATIONS[name]
    outcome = outcome_of(Odd(operation, shape), counts)
    assert outcome == "exact" or ("'odd'" in outcome and "operation '" in outcome)


@pytest.mark.parametrize(
    "name", ["cosine_similarity", "masked_fill", "solve", "stft window", "take", "xlogy"]
)
def test_a_refusal_moves_nothing_and_leaves_nothing(name):
    """Neither a parameter nor a sum; a batch after it counts as if it had never been."""
    torch.manual_seed(0)
    operation, shape = OPERATIONS[name]

    class Switched(Odd):
        def forward(self, x: Tensor) -> Tensor:
            self.operation = operation if x.shape[1] == TIMES else (lambda h, w: h * w.sum())
            return super().forward(x)

    net, x = Switched(operation, shape), torch.randn(4, TIMES, WIDTH)
    trainer, before = make_trainer(net, max_grad_norm=0.1), flat_parameters(net)
    with pytest.raises(UnsupportedOperationError, match=r"'odd' in operation"):
        accumulate(trainer, net, x, [1] * 4)
    trainer.discard()
    trainer.apply()
    assert np.array_equal(before, flat_parameters(net))
    accumulate(trainer, net, x[:, :2], [1] * 4)
    trainer.apply()
    expected = oracle(_with(net, before), x[:, :2], [1] * 4, 0.1)
    np.testing.assert_allclose(before - flat_parameters(net), expected, rtol=2e-4, atol=2e-6)


def _with(net: nn.Module, values: np.ndarray) -> nn.Module:
    """A copy of the network with these parameters."""
    twin, at = copy.deepcopy(net), 0
    with torch.no_grad():
        for parameter in twin.parameters():
            part = values[at : at + parameter.numel()]
            parameter.copy_(torch.from_numpy(part).view(parameter.shape))
            at += parameter.numel()
    return twin


def test_a_vectorised_map_is_an_error():
    """torch.vmap can not look into a captured call, and torch says so."""
    torch.manual_seed(0)
    net = Odd(lambda h, w: torch.vmap(lambda row: torch.sin(row * w))(h), D)
    with pytest.raises(RuntimeError, match="functorch"):
        released(net, torch.randn(4, TIMES, WIDTH), [1] * 4, 0.1)


# layers that mix the units of a batch

NORMS = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(WIDTH), (WIDTH,)),
    "BatchNorm1d over times": (lambda: nn.BatchNorm1d(WIDTH), (WIDTH, TIMES)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(WIDTH), (WIDTH, 3, 2)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(WIDTH), (WIDTH, 2, 3, 2)),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(WIDTH), (WIDTH, 3, 2)),
    "LazyBatchNorm1d": (lambda: nn.LazyBatchNorm1d(), (WIDTH,)),
    "BatchNorm1d without statistics": (lambda: nn.BatchNorm1d(WIDTH, track_running_stats=False), (WIDTH,)),
    "BatchNorm2d without scale": (lambda: nn.BatchNorm2d(WIDTH, affine=False), (WIDTH, 3, 2)),
}


class Normed(nn.Module):
    """A linear layer over the last axis and the norm, deep inside."""

    def __init__(self, norm: nn.Module, inner: tuple[int, ...]) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Linear(inner[-1], inner[-1]), nn.Sequential(nn.Sequential(norm))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x))


def private_loop(net: nn.Module, x: Tensor) -> None:
    """One step in a user's own loop."""
    module, optimizer, _ = PrivacyEngine().make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=1.0),
        data_loader=DataLoader(TensorDataset(x), batch_size=len(x)),
        noise_multiplier=0.0,
        max_grad_norm=0.1,
        poisson_sampling=False,
    )
    module(x).flatten(1).square().sum(1).mean().backward()
    optimizer.step()


def trainer_step(net: nn.Module, x: Tensor) -> None:
    released(net, x, [1] * len(x), 0.1)


@pytest.mark.parametrize("step", [trainer_step, private_loop])
@pytest.mark.parametrize("name", NORMS)
def test_batch_norm_in_training_is_refused_with_its_replacement(name, step):
    make, inner = NORMS[name]
    x, norm = torch.randn(4, *inner), make()
    if "Lazy" in name:
        norm(x)
    net, kind = Normed(norm, inner), type(norm).__name__
    with pytest.raises(UnsupportedOperationError) as caught:
        step(net, x)
    message = str(caught.value)
    assert kind in message and "'blocks.0.0'" in message
    assert "nn.GroupNorm" in message and "nn.LayerNorm" in message


@pytest.mark.parametrize("name", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"])
def test_batch_norm_that_is_switched_to_training_later_is_refused(name):
    make, inner = NORMS[name]
    net, x = Normed(make().requires_grad_(False).eval(), inner), torch.randn(4, *inner)
    optimizer = torch.optim.SGD(net.stem.parameters(), lr=1.0)
    trainer = make_trainer(net, optimizer, max_grad_norm=0.1)
    accumulate(trainer, net, x, [1] * 4)
    trainer.apply()
    net.train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(PrivacyError, match=f"{name}.*GroupNorm"):
        accumulate(trainer, net, x, [1] * 4)
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", ["BatchNorm1d over times", "BatchNorm2d", "BatchNorm3d"])
def test_batch_norm_with_fixed_statistics_is_a_constant(name):
    """In evaluation mode, its scale frozen: every row on its own."""
    make, inner = NORMS[name]
    torch.manual_seed(0)
    net, x = Normed(make().requires_grad_(False).eval(), inner), torch.randn(4, *inner)
    net.blocks[0][0].running_var.uniform_(0.5, 2.0)
    gradients = unit_gradients(net, x, [1] * 4)
    found = read_pass(net, x, [1] * 4, 1e6)
    assert distance(found.sums, gradients.sum(0)) <= 1e-5

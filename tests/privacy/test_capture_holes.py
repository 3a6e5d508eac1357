"""Ways in which records could get past the capture: tensors that were constant until they were written into, running
statistics that the forward pass keeps, weights of a place in the batch, complex numbers."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantize, FusedMovingAvgObsFakeQuantize, MovingAverageMinMaxObserver
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

from synthward import PrivacyEngine
from synthward.engine.errors import UnsupportedOperationError
from tests.engine.nets import accumulate, make_trainer, oracle, released

ROWS, WIDTH = 4, 3


class Net(nn.Module):
    """A layer, an operation, and a head; with what the operation may want to write into."""

    def __init__(self, operation, scale: tuple[int, ...] = (WIDTH,)) -> None:
        super().__init__()
        self.stem, self.head, self.operation = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2), operation
        self.scale = nn.Parameter(torch.rand(scale) + 0.5)
        self.codes = nn.Embedding(5, WIDTH)
        self.frozen = nn.Parameter(torch.ones(WIDTH), requires_grad=False)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(
            self.operation(self, torch.tanh(self.stem(x))) + self.codes(torch.zeros_like(x[:, 0]).long())
        )


def records(*shape: int) -> Tensor:
    return torch.randn(*(shape or (ROWS, WIDTH)), generator=torch.Generator().manual_seed(1))


def build(operation, *scale: int) -> Net:
    torch.manual_seed(0)
    return Net(operation, scale or (WIDTH,))


def assert_exact(net: nn.Module, x: Tensor, bound: float = 0.1) -> None:
    expected = oracle(copy.deepcopy(net), x, [1] * len(x), bound)
    np.testing.assert_allclose(released(net, x, [1] * len(x), bound), expected, atol=3e-6)


def unscaled(net: Net, z: Tensor) -> Tensor:
    """What a bare parameter makes of rows from which their mean was taken: units mix if they are data."""
    return torch.tanh((z - z.mean(0)) * net.scale)


def _item(net: Net, h: Tensor) -> Tensor:
    z = torch.zeros(ROWS, WIDTH)
    z[:] = h
    return h + unscaled(net, z)


def _view(net: Net, h: Tensor) -> Tensor:
    z = torch.zeros(ROWS, WIDTH)
    z.view(-1)[: h.numel()].copy_(h.reshape(-1))
    return h + unscaled(net, z)


def _data_alias(net: Net, h: Tensor) -> Tensor:
    z = torch.zeros(ROWS * WIDTH)
    alias = z.data
    alias.copy_(h.reshape(-1))
    return h + unscaled(net, alias.view(ROWS, WIDTH))


def _out(net: Net, h: Tensor) -> Tensor:
    z = torch.zeros(ROWS, WIDTH)
    z.add_(1.0).add_(h)
    return h + unscaled(net, z)


@pytest.mark.parametrize("write", [_item, _view, _data_alias, _out])
def test_a_constant_that_data_is_written_into_is_data(write):
    """Its rows are looked at like any others: units that mix through it are found."""
    with pytest.raises(UnsupportedOperationError, match="units mix"):
        released(build(write), records(), [1] * ROWS, 0.1)


@pytest.mark.parametrize("is_recorded", [True, False])
def test_provenance_follows_each_write(is_recorded):
    """Writes of data end a constant, also through another name of its memory; writes of constants do not."""
    module = nn.Linear(WIDTH, 2)
    module.register_buffer("table", torch.ones(WIDTH))
    trainer, x = make_trainer(module), records()
    known = trainer._step.state.provenance
    with trainer.capture(), torch.set_grad_enabled(is_recorded):
        a, b, c, d = (torch.zeros(ROWS, WIDTH) for _ in range(4))
        view, alias = b.view(-1), c.data
        a[0].fill_(2.0)
        a.add_(torch.ones(WIDTH)).mul_(module.table)
        torch.add(a, 1.0, out=d)
        module.table.mul_(2.0)
        assert all(known.is_constant(t) for t in (a, b, c, d, view, alias, a + d, module.table))
        b[1] = x[1]
        alias.copy_(x)
        torch.add(x, 1.0, out=d)
        assert not any(known.is_constant(t) for t in (b, c, d, view, alias, a + d, b * 0.0))
        view.zero_()
        assert known.is_constant(a) and not known.is_constant(b)


def test_what_an_autograd_function_makes_of_a_parameter_is_no_constant():
    """Its gradient would be lost without a word; it is refused like every operation without a rule."""

    class Rounded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight):
            return weight.round()

        @staticmethod
        def backward(ctx, grad):
            return grad

    net = build(lambda net, h: F.linear(h, Rounded.apply(net.scale) * net.codes.weight[:WIDTH]), WIDTH, WIDTH)
    with pytest.raises(UnsupportedOperationError, match=r"'codes\.weight' in operation 'mul'"):
        released(net, records(), [1] * ROWS, 0.1)


# Statistics of records, in what the module keeps.


def _without_gradient(write):
    def run(net: Net, h: Tensor) -> Tensor:
        with torch.no_grad():
            write(net, h)
        return h

    return run


def _detached(write):
    def run(net: Net, h: Tensor) -> Tensor:
        write(net, h.detach())
        return h

    return run


def _assign(net: Net, h: Tensor) -> None:
    net.mean = 0.5 * net.mean + 0.5 * h.mean(0)


def _set_data(net: Net, h: Tensor) -> None:
    net.mean.data = h.mean(0)


def _number(net: Net, h: Tensor) -> None:
    net.mean.add_(h.mean().item())


def _indexed(net: Net, h: Tensor) -> None:
    net.mean[0] = h.mean()


def _augmented(net: Net, h: Tensor) -> None:
    net.mean += h.mean(0)


STATISTICS = {
    "lerp_": (lambda net, h: net.mean.lerp_(h.mean(0), 0.5), "buffer 'mean' in operation 'lerp_'"),
    "a view": (lambda net, h: net.mean[1:].copy_(h.mean(0)[1:]), "buffer 'mean' in operation 'copy_'"),
    "an item": (_indexed, "buffer 'mean' in operation '__setitem__'"),
    "an augmented assignment": (_augmented, "buffer 'mean'"),
    "data": (lambda net, h: net.mean.data.add_(h.mean(0)), "buffer 'mean' in operation 'add_'"),
    "data, set": (_set_data, "buffer 'mean' in operation '__set__'"),
    "out": (lambda net, h: torch.sum(h, 0, out=net.mean), "buffer 'mean' in operation 'sum'"),
    "several at once": (lambda net, h: torch._foreach_add_([net.mean], [h.mean(0)]), "buffer 'mean'"),
    "an operator": (lambda net, h: torch.ops.aten.copy_(net.mean, h.mean(0)), "buffer 'mean'"),
    "a counter of records": (
        lambda net, h: net.count.add_((h > 0).sum()),
        "buffer 'count' in operation 'add_'",
    ),
    "a new buffer": (_assign, "buffer 'mean'"),
    "a number": (_number, "buffer 'mean' in operation 'add_'"),
    "a frozen parameter": (
        lambda net, h: net.frozen.copy_(h.mean(0)),
        "parameter 'frozen' in operation 'copy_'",
    ),
    "a codebook": (
        lambda net, h: net.codes.weight.data[1].copy_(h.mean(0)),
        r"parameter 'codes\.weight' in operation 'copy_'",
    ),
    "a scale": (lambda net, h: net.scale.data.mul_(h.mean()), "parameter 'scale' in operation 'mul_'"),
    "batch statistics": (
        lambda net, h: torch.batch_norm(h, None, None, net.mean, net.mean + 1.0, True, 0.1, 1e-5, False),
        "buffer 'mean' in operation 'batch_norm'",
    ),
    "a renormalised table": (
        lambda net, h: F.embedding((h[:, 0] > 9).long(), net.frozen.detach().view(1, WIDTH), max_norm=0.1),
        "parameter 'frozen' in operation 'embedding'",
    ),
}


@pytest.mark.parametrize("way", [_without_gradient, _detached])
@pytest.mark.parametrize("name", STATISTICS)
def test_a_statistic_of_records_is_not_kept(name, way):
    write, message = STATISTICS[name]
    with pytest.raises(UnsupportedOperationError, match=message + ".*without noise"):
        released(build(way(write)), records(), [1] * ROWS, 0.1)


def test_a_parameter_is_not_written_from_records_where_no_gradient_is_recorded():
    def write(net: Net, h: Tensor) -> Tensor:
        with torch.no_grad():
            net.codes.weight.copy_(h.mean(0).expand(5, WIDTH))
        return h

    net = build(write)
    before = net.codes.weight.detach().clone()
    with pytest.raises(UnsupportedOperationError, match=r"parameter 'codes\.weight' in operation 'copy_'"):
        released(net, records(), [1] * ROWS, 0.1)
    assert torch.equal(net.codes.weight, before)


OBSERVED = {
    "fused": lambda: FusedMovingAvgObsFakeQuantize(
        observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=255
    ),
    "in turn": lambda: FakeQuantize(observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=255),
}


@pytest.mark.parametrize("name", OBSERVED)
def test_observers_of_quantisation_are_refused(name):
    quantize = OBSERVED[name]()
    net = build(lambda net, h: quantize(h))
    net.quantize = quantize
    with pytest.raises(
        UnsupportedOperationError, match=r"buffer 'quantize\.\S+' in operation '\w+'.*without noise"
    ):
        released(net, records(), [1] * ROWS, 0.1)


def _count(net: Net, h: Tensor) -> Tensor:
    with torch.no_grad():
        net.count.add_(1)
        net.mean.mul_(0.5).add_(net.frozen * 2)
    return h * net.mean


def _cache(net: Net, h: Tensor) -> Tensor:
    net.register_buffer("places", torch.arange(WIDTH).float().div(WIDTH).to(h), persistent=False)
    net.mean = net.places * 2
    net.mean[0] = 1.0
    return h * net.mean + net.places


def _clamp(net: Net, h: Tensor) -> Tensor:
    with torch.no_grad():
        net.scale.clamp_(0.0, 0.7)
        net.codes.weight.mul_(net.frozen)
    return h * net.scale


def _other(net: Net, h: Tensor) -> Tensor:
    """What is not the module's own may be written: it is the caller's."""
    _other.seen.copy_(h.detach().mean(0))
    return h


_other.seen = torch.zeros(WIDTH)


@pytest.mark.parametrize("operation", [_count, _cache, _clamp, _other])
def test_what_constants_write_stays_allowed(operation):
    released(build(operation), records(), [1] * ROWS, 0.1)


@pytest.mark.parametrize("wrap", [spectral_norm, nn.utils.spectral_norm])
def test_power_iteration_is_no_statistic_of_records(wrap):
    """It writes u and v from the weight alone, in each forward pass."""
    torch.manual_seed(0)
    net = nn.Sequential(wrap(nn.Linear(WIDTH, 4)), nn.Tanh(), nn.Linear(4, 2))
    trainer = make_trainer(net)
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    for _ in range(2):
        accumulate(trainer, net, records(), [1] * ROWS)
        trainer.apply()
    assert before and all(not torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())


def test_buffers_in_eval_mode_are_constants():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(WIDTH, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2))
    net[1].running_mean.normal_()
    net[1].eval()
    assert_exact(net, records())


class Masked(nn.Module):
    """A weight times a buffer, computed again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
        self.register_buffer("mask", torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]))

    def _masked(self, h: Tensor) -> Tensor:
        return F.linear(torch.tanh(h), self.layer.weight * self.mask, self.layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._masked, self.stem(x), use_reentrant=False)


def test_constants_are_known_when_a_checkpoint_is_computed_again():
    torch.manual_seed(0)
    assert_exact(Masked(), records())


# Weights of a place in the batch.


PLACES = {
    "twice": (lambda net, h: h + 2 * net.scale, (ROWS, WIDTH)),
    "a copy": (lambda net, h: h * net.scale[::2].contiguous(), (2 * ROWS, WIDTH)),
    "the first rows, scaled": (lambda net, h: h * torch.exp(net.scale[: len(h)]), (ROWS + 2, WIDTH)),
    "normalised": (lambda net, h: h + F.normalize(net.scale, dim=1), (ROWS, WIDTH)),
    "transposed and scaled": (lambda net, h: h + (net.scale * 2).t(), (WIDTH, ROWS)),
    "reshaped": (lambda net, h: h + (net.scale * 2).view(ROWS, WIDTH), (ROWS * WIDTH,)),
    "of another axis": (lambda net, h: h + (net.scale.unsqueeze(0) * 2)[0], (ROWS, WIDTH)),
    "a column": (lambda net, h: h * (net.scale + 1.0).unsqueeze(1), (ROWS,)),
    "less their mean": (lambda net, h: h + (net.scale - net.scale.mean(0)), (ROWS, WIDTH)),
    "looked up in turn": (lambda net, h: h + F.embedding(torch.arange(len(h)), net.scale), (ROWS, WIDTH)),
    "projected": (lambda net, h: h + F.linear(net.scale, torch.eye(WIDTH)), (ROWS, WIDTH)),
    "concatenated": (lambda net, h: torch.cat([h, 2 * net.scale], 1)[:, :WIDTH], (ROWS, WIDTH)),
    "with noise": (lambda net, h: h + torch.randn(ROWS, 1) * net.scale, (ROWS, WIDTH)),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_weight_of_each_place_in_the_batch_is_refused(name):
    operation, shape = PLACES[name]
    with pytest.raises(
        UnsupportedOperationError, match=r"'scale' in operation .*(place in the batch|batch's)"
    ):
        released(build(operation, *shape), records(), [1] * ROWS, 0.1)


SHARED = {
    "twice": (lambda net, h: h + 2 * net.scale, (WIDTH,)),
    "one row": (lambda net, h: h * torch.exp(net.scale), (1, WIDTH)),
    "rows of constants": (lambda net, h: h + torch.full((len(h), 1), 0.5) * net.scale, (WIDTH,)),
    "noise": (lambda net, h: h + torch.full((len(h), 1), 2.0).add_(1.0) * net.scale, (WIDTH,)),
    "of another axis": (
        lambda net, h: h + net.scale.expand(2, len(h), WIDTH).transpose(0, 1).sum(1),
        (2, 1, WIDTH),
    ),
    "repeated": (lambda net, h: h + net.scale.repeat(len(h), 1).view(len(h), 2, WIDTH).sum(1), (2, WIDTH)),
    "rows of constants, projected": (
        lambda net, h: h + F.linear(torch.ones(len(h), 2, dtype=h.dtype), net.scale),
        (WIDTH, 2),
    ),
}


@pytest.mark.parametrize("name", SHARED)
def test_a_weight_that_all_rows_share_is_exact(name):
    operation, shape = SHARED[name]
    assert_exact(build(operation, *shape), records())


# Complex numbers.


def _spectral_product(net: Net, h: Tensor) -> Tensor:
    return torch.fft.irfft(torch.fft.rfft(h) * torch.view_as_complex(net.scale), n=WIDTH)


def _spectral_contraction(net: Net, h: Tensor) -> Tensor:
    return torch.fft.irfft(
        torch.einsum("nk,k->nk", torch.fft.rfft(h), torch.view_as_complex(net.scale)), n=WIDTH
    )


def _real_scale(net: Net, h: Tensor) -> Tensor:
    return torch.fft.irfft(torch.fft.rfft(h) * net.scale[:, 0], n=WIDTH)


@pytest.mark.parametrize("operation", [_spectral_product, _spectral_contraction, _real_scale])
def test_complex_operands_are_refused_by_name(operation):
    with pytest.raises(UnsupportedOperationError, match=r"'scale' in operation '(mul|einsum)'.*complex"):
        released(build(operation, 2, 2), records(), [1] * ROWS, 0.1)


def test_a_real_weight_that_is_computed_through_complex_ones_is_exact():
    def operation(net: Net, h: Tensor) -> Tensor:
        return h * torch.fft.irfft(torch.view_as_complex(net.scale), n=WIDTH)

    assert_exact(build(operation, 2, 2), records())


# Rows that the data put somewhere.


def _order(h: Tensor) -> Tensor:
    """Places by the data, which are those of the rows as long as the first number grows."""
    return h.detach()[:, 0].argsort().argsort()


def _placed(h: Tensor) -> Tensor:
    z = torch.zeros(len(h), WIDTH)
    z[_order(h)] = h
    return z


def _put(h: Tensor) -> Tensor:
    return torch.zeros(len(h), WIDTH).index_put((_order(h),), h)


ARRANGED = {
    "assigned": _placed,
    "put": _put,
    "added": lambda h: torch.zeros(len(h), WIDTH).index_add(0, _order(h), h),
    "scattered": lambda h: torch.zeros(len(h), WIDTH).scatter(0, _order(h).unsqueeze(1).expand_as(h), h),
    "looked up": lambda h: F.embedding(_order(h), h),
    "the greatest": lambda h: h.topk(len(h), 0, largest=False).values,
}


@pytest.mark.parametrize("name", ARRANGED)
def test_rows_that_the_data_put_into_constants_are_looked_at_in_every_batch(name):
    class Arranged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(1, WIDTH), nn.Linear(WIDTH, 2)
            nn.init.constant_(self.stem.weight, 1.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(ARRANGED[name](self.stem(x)))

    torch.manual_seed(0)
    net = Arranged()
    trainer = make_trainer(net)
    rows = torch.arange(4.0).unsqueeze(1)
    for _ in range(9):
        accumulate(trainer, net, rows, [1] * 4)
    with pytest.raises(UnsupportedOperationError, match="units mix"):
        accumulate(trainer, net, rows.flip(0), [1] * 4)


def test_a_statistic_of_records_is_not_kept_in_the_user_s_own_loop():
    net = build(_without_gradient(lambda net, h: net.mean.lerp_(h.mean(0), 0.5)))
    x = records()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=ROWS)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1.0)
    net, _, _ = PrivacyEngine(accountant="pld").make_private(
        module=net,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
    )
    with pytest.raises(UnsupportedOperationError, match="buffer 'mean' in operation 'lerp_'"):
        net(x)
    assert torch.equal(net.mean, torch.zeros(WIDTH))

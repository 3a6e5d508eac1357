"""Invariant 4 at its root: the noise is ChaCha20 of (key, stream, step, element), and nothing but that."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.oracles import chacha20_words
from tests.privacy.stats import assert_gaussian, assert_uncorrelated

KEY = bytes(range(7, 39))


@pytest.mark.parametrize(
    ("stream", "step", "start", "count"),
    [(0, 0, 0, 64), (1, 0, 5, 40), (0, 1, 16, 16), (2**15 - 1, 2**48 - 1, 31, 3), (3, 2**33, 2**36 - 8, 40)],
)
def test_the_words_are_those_of_the_cipher(stream, step, start, count):
    """Against the block function in Python integers, over block borders and beyond 32-bit counters."""
    from synthward.kernels import chacha20_words as words

    expected = chacha20_words(KEY, stream=stream, step=step, start=start, count=count)
    actual = words(KEY, stream=stream, step=step, start=start, count=count)
    assert actual.dtype == np.uint32
    assert actual.tolist() == expected


@pytest.mark.parametrize("bad", [b"", b"k" * 31, b"k" * 33])
def test_a_key_of_another_length_is_refused(bad):
    from synthward.kernels import gaussian_noise

    with pytest.raises(ValueError):
        gaussian_noise(8, key=bad, stream=0, step=0)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_an_element_of_the_noise_does_not_depend_on_the_slice(backend):
    """Any split of the parameters into buffers, shards or threads gives the same numbers."""
    from synthward.kernels import gaussian_noise

    place = {"key": KEY, "stream": 2, "step": 9, "backend": backend}
    whole = gaussian_noise(1000, start=0, **place)
    for start, count in ((0, 1), (1, 2), (37, 411), (999, 1), (512, 488)):
        assert torch.equal(whole[start : start + count], gaussian_noise(count, start=start, **place))


def test_any_number_of_threads_gives_the_same_noise():
    from synthward.kernels import gaussian_noise

    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(gaussian_noise(500_001, key=KEY, stream=0, step=0, start=11))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_the_noise_is_normal(backend):
    from synthward.kernels import gaussian_noise

    noise = gaussian_noise(1_000_000, key=KEY, stream=0, step=0, backend=backend)
    assert noise.dtype == torch.float32
    assert_gaussian(noise.double().numpy(), 1.0)


def test_streams_steps_and_keys_share_nothing():
    from synthward.kernels import gaussian_noise

    def noise(key=KEY, stream=0, step=0):
        return gaussian_noise(100_000, key=key, stream=stream, step=step).double().numpy()

    first = noise()
    assert_uncorrelated(first, noise(stream=1))
    assert_uncorrelated(first, noise(step=1))
    assert_uncorrelated(first, noise(key=KEY[::-1]))
    assert_uncorrelated(noise(stream=1), noise(step=1))

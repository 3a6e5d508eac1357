"""The cipher against its standard, the layout of the normals, and their law far into the tail."""

from __future__ import annotations

import hashlib
import struct
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats

from synthward import _C
from synthward.kernels import (
    add_gaussian_noise_,
    available_isas,
    chacha20_words,
    force_isa,
    gaussian_noise,
    uniform_noise,
)
from synthward.kernels._chacha import EXTENSION_BIT, RARE, reference_blocks
from tests.privacy.stats import FALSE_ALARM, assert_gaussian, assert_uncorrelated

KEY = bytes(range(32))
PLACE = {"key": KEY, "stream": 3, "step": 7}
NONCE = 3 << 48 | 7

# RFC 8439: section 2.3.2, and appendix A.1 vectors 1 to 5. (key, last row of the state, output bytes)
VECTORS = [
    (
        bytes(range(32)),
        struct.unpack("<4I", bytes.fromhex("01000000000000090000004a00000000")),
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e",
    ),
    (
        bytes(32),
        (0, 0, 0, 0),
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
    ),
    (
        bytes(32),
        (1, 0, 0, 0),
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
    ),
    (
        bytes(31) + b"\x01",
        (1, 0, 0, 0),
        "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
        "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0",
    ),
    (
        b"\x00\xff" + bytes(30),
        (2, 0, 0, 0),
        "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca"
        "13b25aa26cb4a648cb9b9d1be65b2c0924a66c54d545ec1b7374f4872e99f096",
    ),
    (
        bytes(32),
        (0, 0, 0, 0x02000000),
        "c2c64d378cd536374ae204b9ef933fcd1a8b2288b3dfa49672ab765b54ee27c7"
        "8a970e0e955c14f3a88e741b97c286f75f8fc299e8148362fa198a39531bed6d",
    ),
]


@pytest.mark.parametrize(("key", "tail", "expected"), VECTORS)
def test_vectors_of_the_standard(isa, key, tail, expected):
    state = np.array(
        [*struct.unpack("<4I", b"expand 32-byte k"), *struct.unpack("<8I", key), *tail], np.uint32
    )
    assert _C.chacha20_block(state).tobytes().hex() == expected
    # The reference takes the last row as counter and nonce, 64 bits each.
    counter, nonce = tail[0] | tail[1] << 32, tail[2] | tail[3] << 32
    assert reference_blocks(key, nonce, np.array([counter], np.uint64)).tobytes().hex() == expected


@pytest.mark.parametrize("start", [0, 1, 255, 16 * (2**32 - 7), 16 * (2**40 - 1) + 5])
def test_words_are_those_of_the_reference(isa, start):
    """Also where the counter's low half wraps in the middle of a vector of blocks."""
    count = 700
    blocks = np.arange(start // 16, (start + count) // 16 + 1, dtype=np.uint64)
    words = reference_blocks(KEY, NONCE, blocks).reshape(-1)[start % 16 :][:count]
    assert np.array_equal(chacha20_words(KEY, stream=3, step=7, start=start, count=count), words)


def places_of(elements: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Block and lane of each element, as documented in kernels/_chacha.py."""
    return elements // 256 * 16 + elements % 16, elements % 256 // 16


def expected_normals(elements: np.ndarray, *, refined: bool = True) -> np.ndarray:
    """Normals of the documented layout in float64; unrefined: as if no radius had more than 32 bits."""
    block, lane = places_of(elements)
    rows, pair = np.arange(len(elements)), lane % 8
    words = reference_blocks(KEY, NONCE, block.astype(np.uint64))
    extension = reference_blocks(KEY, EXTENSION_BIT | NONCE, block.astype(np.uint64))
    radius_word = words[rows, pair]
    uniform = radius_word.astype(np.float32) / 2.0**32
    if refined:
        fine = (radius_word + (extension[rows, pair] + 0.5) / 2.0**32) / 2.0**32
        uniform = np.where(radius_word < RARE, fine, uniform)
    angle = 2 * np.pi * words[rows, 8 + pair] / 2.0**32
    return np.sqrt(-2 * np.log(uniform)) * np.where(lane < 8, np.cos(angle), np.sin(angle))


@pytest.mark.parametrize("start", [0, 100, 256 * 2**33 + 3])
def test_normals_follow_the_documented_layout(backend, start):
    found = gaussian_noise(3000, start=start, **PLACE, backend=backend).double().numpy()
    expected = expected_normals(np.arange(start, start + 3000))
    # A few units in the last place of the radius, which here is below 8.
    assert np.abs(found - expected).max() <= 4 * 8 * 2.0**-24


def test_no_word_serves_two_normals():
    """Each pair of words has one cosine and one sine, in every block."""
    elements = np.arange(256 * 40)
    block, lane = places_of(elements)
    assert np.array_equal(np.sort(block * 16 + lane), elements)


def test_rare_radii_are_refined_to_64_bits(backend):
    radius_words = np.concatenate(
        [
            reference_blocks(KEY, NONCE, np.arange(first, first + 16384, dtype=np.uint64))[:, :8]
            for first in range(0, 1 << 17, 16384)
        ]
    )
    block, pair = np.nonzero(radius_words < RARE)
    assert len(block) > 4, "the sample holds too few rare radii to test anything"
    elements = block // 16 * 256 + pair * 16 + block % 16
    found = [float(gaussian_noise(1, start=int(e), **PLACE, backend=backend)) for e in elements]
    refined, unrefined = expected_normals(elements), expected_normals(elements, refined=False)
    assert found == pytest.approx(refined, rel=5e-7)
    # Half of the words are below 2^15, where 32 bits more move the radius by up to 3e-6 of itself.
    moved = np.abs(refined - unrefined) > 2e-6 * np.abs(refined)
    assert moved.any()
    assert (np.abs(np.array(found) - unrefined)[moved] > 1e-6 * np.abs(unrefined)[moved]).all()


def test_bits_do_not_depend_on_split_instruction_set_or_threads(restore_threads):
    count, start = 200_003, 77
    found = []
    for name in available_isas():
        force_isa(name)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(gaussian_noise(count, start=start, **PLACE))
            added = torch.zeros(count)
            found.append(add_gaussian_noise_(added, start=start, noise_std=1.0, **PLACE))
        cuts = [0, 1, 255, 256, 4097, 100_000, count]
        pieces = [gaussian_noise(b - a, start=start + a, **PLACE) for a, b in pairwise(cuts)]
        found.append(torch.cat(pieces))
    force_isa(None)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_the_noise_of_a_stream_never_changes(isa):
    """Pinned bits: a run that is repeated from its recorded seed elsewhere, or later, gets the same noise."""
    noise = gaussian_noise(100_000, **PLACE).numpy().astype("<f4").tobytes()
    assert hashlib.sha256(noise).hexdigest() == (
        "c1731af6fc09e5eab9af9121b350f3b4af70aabec1143ebe44db9b549d810629"
    )


def test_law(isa):
    count = 1 << 21
    z = gaussian_noise(count, **PLACE).double().numpy()
    assert_gaussian(z, 1.0)
    # Cosine and sine of one radius lie 128 apart: neither they nor their squares may be correlated.
    pairs = z.reshape(-1, 2, 128)
    assert_uncorrelated(pairs[:, 0].ravel(), pairs[:, 1].ravel())
    assert_uncorrelated((pairs[:, 0] ** 2).ravel(), (pairs[:, 1] ** 2).ravel())


@pytest.mark.parametrize("threshold", [2.0, 3.0, 4.0, 4.5, 5.0])
def test_tail(threshold):
    """Counts beyond each threshold, both sides together, in 2^24 normals."""
    beyond = count = 0
    for part in range(4):
        z = gaussian_noise(1 << 22, start=part << 22, **PLACE)
        count += len(z)
        beyond += int((z.abs() > threshold).sum())
    assert stats.binomtest(beyond, count, 2 * stats.norm.sf(threshold)).pvalue > FALSE_ALARM


@pytest.mark.parametrize("count", [0, 1, 2, 255, 257])
def test_added_noise_is_scaled_noise(backend, count):
    tensor = torch.linspace(-1, 1, count)
    z = gaussian_noise(count, start=5, **PLACE, backend=backend)
    expected = tensor + 2.5 * z
    assert add_gaussian_noise_(tensor, start=5, noise_std=2.5, **PLACE, backend=backend) is tensor
    assert torch.equal(tensor, expected)


@pytest.mark.parametrize("start", [0, 5, 16 * 2**33 - 3])
@pytest.mark.parametrize("count", [0, 1, 40])
def test_uniform_numbers_are_the_upper_bits_of_the_words(start, count):
    words = chacha20_words(KEY, stream=3, step=7, start=start, count=count)
    expected = torch.from_numpy((words >> 8) / 2.0**24)
    for backend in ("auto", "cpp", "reference"):
        found = uniform_noise(count, start=start, **PLACE, backend=backend)
        assert found.dtype == torch.float32 and torch.equal(found.double(), expected)
    with pytest.raises(ValueError, match="count"):
        uniform_noise(-1, **PLACE)

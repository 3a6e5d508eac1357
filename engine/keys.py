"""Keys of a run: one 256-bit root from the operating system, one derived key per purpose.

The root is never written anywhere; a resumed run draws a fresh one, so that no noise repeats.
"""

from __future__ import annotations

import hashlib
import itertools
import secrets
from typing import TYPE_CHECKING, Literal, get_args

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from synthward.engine.errors import ConfigError

if TYPE_CHECKING:
    from synthward.engine.distributed.ranks import Ranks

Purpose = Literal["noise", "sampler", "queries", "canaries", "training"]
_DOMAIN = b"synthward/v1/"


class KeySchedule:
    """Derives purpose keys by HKDF-SHA256 (RFC 5869) from a root that stays in memory.

    Guarantees: keys of different purposes are independent; a schedule from the operating system never
    equals another one; one made from a seed says so (`is_private` is False) and protects nobody.
    """

    def __init__(self, root: bytes, *, is_private: bool) -> None:
        if len(root) != 32:
            raise ValueError(f"root: has {len(root)} bytes, expected 32")
        self._root = root
        self._is_private = is_private
        self._queries = itertools.count()

    @classmethod
    def from_os(cls) -> KeySchedule:
        """A fresh schedule from the operating system's random source."""
        return cls(secrets.token_bytes(32), is_private=True)

    @classmethod
    def shared(cls, ranks: Ranks, keys: KeySchedule | None = None) -> KeySchedule:
        """A schedule that all processes of a run have: rank 0's `keys`, or a fresh one from the operating system.

        It goes through the group's own connections once, as sums do later on: who can read those, can take the noise
        off.
        """
        mine = keys or cls.from_os()
        root, is_private = ranks.broadcast((mine._root, mine._is_private) if ranks.is_main else (b"", False))
        return mine if ranks.is_main else cls(root, is_private=is_private)

    @classmethod
    def reproducible(cls, seed: int) -> KeySchedule:
        """A schedule that anybody who knows the seed can recompute: reproducible, not private."""
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ConfigError(f"seed: got {seed!r}; give a whole number of at least 0")
        root = hashlib.sha256(_DOMAIN + b"reproducible/" + str(seed).encode()).digest()
        return cls(root, is_private=False)

    def key(self, purpose: Purpose) -> bytes:
        """The 32-byte key of a purpose."""
        if purpose not in get_args(Purpose):
            raise ValueError(f"purpose: got {purpose!r}, expected one of {', '.join(get_args(Purpose))}")
        info = _DOMAIN + b"key/" + purpose.encode()
        return HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(self._root)

    def next_query(self) -> int:
        """Noise step of the next query: never given out twice, whatever number of objects ask."""
        return next(self._queries)

    @property
    def key_id(self) -> str:
        """Hash of the root, hex: tells keys apart in the ledger and gives nothing away."""
        return hashlib.sha256(_DOMAIN + b"key-id/" + self._root).hexdigest()[:32]

    @property
    def is_private(self) -> bool:
        """False when the keys come from a user's seed."""
        return self._is_private

    def __repr__(self) -> str:
        return f"KeySchedule(key_id={self.key_id!r}, is_private={self.is_private})"

    def __reduce__(self) -> str:
        raise TypeError("a key schedule can not be pickled: its root stays in this process")

"""Names that a person taught: features of a few examples, and none of the media themselves."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mico_chat.media.kinds import Kind

MOST_EXAMPLES: Final = 5  # of one request
NAMED_AS: Final[dict[Kind, Kind]] = {"image": "image", "video": "image", "audio": "audio"}
"""The kinds of media that a taught name can name, and the kind of its examples."""


@dataclass(frozen=True, eq=False)
class TaughtName:
    """A name with its tokens, and the features (n, D) of its examples, all of the kind ``kind``."""

    name: str
    kind: Kind
    examples: NDArray[np.float32]
    ids: tuple[int, ...]

    @cached_property
    def digest(self) -> bytes:
        data = np.ascontiguousarray(self.examples).tobytes()
        return hashlib.sha256(f"{self.kind} {self.ids}\n".encode() + data).digest()


def features_of(data: bytes, n: int) -> NDArray[np.float32]:
    """The features (n, D) of n examples from their bytes: little-endian float32.

    Raises:
        ValueError: the bytes are not those of n examples.
    """
    return np.frombuffer(data, "<f4").astype(np.float32).reshape(n, -1)


def names_for(taught: Sequence[TaughtName], kind: Kind) -> tuple[TaughtName, ...]:
    """Those of the names that can name a medium of a kind."""
    return tuple(one for one in taught if one.kind == NAMED_AS.get(kind))


def digest_of(taught: Sequence[TaughtName]) -> bytes:
    """What the taught names add to the key of an encoded medium; nothing where there are none."""
    return hashlib.sha256(b"".join(one.digest for one in taught)).digest() if taught else b""

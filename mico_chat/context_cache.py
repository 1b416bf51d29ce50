"""Context tokens of media that were shown before: within bytes, the least recently used goes."""

from __future__ import annotations

import threading
from collections import OrderedDict

from pydantic import BaseModel, ConfigDict

from mico_chat.media.encoded import EncodedMedium


class CacheStats(BaseModel):
    """A cache at one moment. ``hits`` and ``misses`` count look-ups since it was made."""

    model_config = ConfigDict(frozen=True)

    hits: int
    misses: int
    entries: int
    bytes: int
    max_bytes: int

    @property
    def hit_rate(self) -> float:
        """Hits of all look-ups, 0 before the first."""
        return self.hits / max(1, self.hits + self.misses)


class ContextCache:
    """Encoded media by the digest of what they were made from, at most ``max_bytes`` of tokens.

    Safe to use from several threads.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._entries: OrderedDict[bytes, EncodedMedium] = OrderedDict()
        self._bytes = self._hits = self._misses = 0
        self._lock = threading.Lock()

    def get(self, key: bytes) -> EncodedMedium | None:
        """What is kept under a key, which becomes the most recently used."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                self._misses += 1
                return None
            self._hits += 1
            self._entries.move_to_end(key)
            return entry

    def put(self, key: bytes, medium: EncodedMedium) -> None:
        """Keep a medium, unless it alone is beyond the limit."""
        if medium.nbytes > self.max_bytes:
            return
        with self._lock:
            old = self._entries.pop(key, None)
            self._bytes += medium.nbytes - (0 if old is None else old.nbytes)
            self._entries[key] = medium
            while self._bytes > self.max_bytes:
                _, gone = self._entries.popitem(last=False)
                self._bytes -= gone.nbytes

    def clear(self) -> None:
        """Forget everything; the counts of look-ups stay."""
        with self._lock:
            self._entries.clear()
            self._bytes = 0

    def stats(self) -> CacheStats:
        """Counts at this moment."""
        with self._lock:
            return CacheStats(
                hits=self._hits,
                misses=self._misses,
                entries=len(self._entries),
                bytes=self._bytes,
                max_bytes=self.max_bytes,
            )

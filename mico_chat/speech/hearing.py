"""Where somebody speaks in a stream of sound, and when the turn ends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import av
import numpy as np
from av.audio.frame import AudioFrame
from numpy.typing import NDArray

from mico_chat.speech.events import TurnDetection

RATE = 16_000
"""Samples a second of what is listened to, in Hz."""
WINDOW = 512  # samples that Silero's network takes at a time, and the last of the window before
CONTEXT = 64
LONGEST_S = 120.0
"""Seconds of a turn: a longer one ends, and so does a buffer that nobody commits."""


class Resampler:
    """Samples (n,) of one rate to another, piece by piece."""

    def __init__(self, source: int, target: int) -> None:
        self._source = source
        self._made = None if source == target else av.AudioResampler("flt", "mono", target)

    def __call__(self, samples: NDArray[np.float32], *, last: bool = False) -> NDArray[np.float32]:
        if self._made is None:
            return samples
        frames = []
        if samples.size:
            frame = AudioFrame.from_ndarray(samples[None], format="flt", layout="mono")
            frame.sample_rate = self._source
            frames = self._made.resample(frame)
        if last:
            frames += self._made.resample(None)
        pieces = [one.to_ndarray()[0] for one in frames]
        return np.concatenate(pieces) if pieces else np.zeros(0, np.float32)


class VoiceDetector:
    """Silero's network (MIT), which comes with faster-whisper, over a stream of windows."""

    def __init__(self) -> None:
        from faster_whisper.vad import get_vad_model

        self._session: Any = get_vad_model().session
        self._state = [np.zeros((1, 1, 128), np.float32) for _ in range(2)]
        self._context = np.zeros(CONTEXT, np.float32)

    def __call__(self, window: NDArray[np.float32]) -> float:
        """The probability that somebody speaks in a window (512,)."""
        given = np.concatenate([self._context, window])[None]
        self._context = window[-CONTEXT:]
        h, c = self._state
        found, *self._state = self._session.run(None, {"input": given, "h": h, "c": c})
        return float(found.reshape(-1)[0])


PAUSE = 6 * WINDOW
"""Samples of quiet, 0.19 s, after which what was said can be listened to, should the turn end."""


class Turn(NamedTuple):
    """Speech began, pauses, goes on, or ended at a time of the stream; with the sound so far (n,)
    where it pauses or ended.

    ``listened``: nothing was said since the last pause that was told.
    """

    what: Literal["started", "paused", "resumed", "stopped"]
    at_ms: int
    sound: NDArray[np.float32] | None = None
    listened: bool = False


@dataclass
class Ear:
    """What a client has sent and not yet committed, at 16,000 Hz.

    With ``detection`` it tells where turns begin and end, and forgets the silence between them;
    without, all is kept until it is taken. ``detector`` is made for the first window.
    """

    detection: TurnDetection | None
    detector: VoiceDetector | None = None
    speaking: bool = False
    _kept: list[NDArray[np.float32]] = field(default_factory=list)
    _rest: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    _length: int = 0  # samples that are kept
    _heard: int = 0  # samples of whole windows
    _quiet: int = 0  # samples since the last that may be speech

    @property
    def seconds(self) -> float:
        return (self._length + len(self._rest)) / RATE

    def take(self) -> NDArray[np.float32]:
        """All that is kept, which is then forgotten."""
        sound = np.concatenate([*self._kept, self._rest])
        self.clear()
        return sound

    def clear(self) -> None:
        self._heard += len(self._rest)
        self._kept, self._rest, self._length = [], self._rest[:0], 0
        self.speaking, self._quiet = False, 0

    def hear(self, samples: NDArray[np.float32]) -> Iterator[Turn]:
        """The turns that begin and end in samples (n,); computes for a while."""
        if self.detection is None:
            self._kept.append(samples)
            self._length += len(samples)
            return
        joined = np.concatenate([self._rest, samples])
        whole = len(joined) - len(joined) % WINDOW
        self._rest = joined[whole:]
        for start in range(0, whole, WINDOW):
            yield from self._window(joined[start : start + WINDOW])

    def _window(self, window: NDArray[np.float32]) -> Iterator[Turn]:
        assert self.detection is not None
        if self.detector is None:
            self.detector = VoiceDetector()
        spoken = self.detector(window)
        threshold = self.detection.threshold
        self._kept.append(window)
        self._length += WINDOW
        self._heard += WINDOW
        if not self.speaking:
            padding = 1 + RATE * self.detection.prefix_padding_ms // 1000 // WINDOW
            if spoken < threshold:
                del self._kept[:-padding]
                self._length = WINDOW * len(self._kept)
                return
            self.speaking, self._quiet = True, 0
            yield Turn("started", max(0, self._ms - 1000 * WINDOW * len(self._kept) // RATE))
            return
        # As in Silero's own: speech goes on above a lower threshold than it begins.
        goes_on = spoken >= max(threshold - 0.15, 0.01)
        if goes_on and self._quiet >= PAUSE:
            yield Turn("resumed", self._ms)
        self._quiet = 0 if goes_on else self._quiet + WINDOW
        if 1000 * self._quiet >= RATE * self.detection.silence_ms or self.seconds >= LONGEST_S:
            rest, self._rest = self._rest, self._rest[:0]
            listened = self._quiet >= PAUSE
            yield Turn("stopped", self._ms, self.take(), listened)
            self._rest = rest
        elif self._quiet == PAUSE:
            yield Turn("paused", self._ms, np.concatenate(self._kept))

    @property
    def _ms(self) -> int:
        return 1000 * self._heard // RATE

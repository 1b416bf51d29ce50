"""Media, costs and conversations in words, and arrays as pictures, for browser and terminal.

Legend: H height, W width, n samples, B mel bands.
"""

import re
from collections.abc import Iterable
from itertools import pairwise
from textwrap import shorten

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.filesize import decimal

from mico_chat.media import Depth, MediaReport
from mico_chat.media.kinds import TABLE
from mico_chat.media.medium import SpokenText, WrittenText
from mico_chat.wire import ConversationObject, Estimate, Progress, TurnObject, Usage

# viridis at equal steps, from Matplotlib (CC0): even in lightness, and safe for colour-blind eyes.
_VIRIDIS = np.array(
    [
        *((68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141)),
        *((39, 173, 129), (92, 200, 99), (170, 220, 50), (253, 231, 37)),
    ],
    dtype=np.float64,
)
_HOLE = (128, 128, 128)

UNSURE = " (not sure)"
"""Stands behind an answer that the server marks as unsure."""

BROKEN_OFF = " (broke off)"
"""Stands behind what is there of an answer whose server ended."""

WAVE_SIZE = (480, 72)
MEL_SIZE = (480, 96)
_WAVE_COLOUR = (42, 120, 214)

Pixels = NDArray[np.uint8]


def facts(report: MediaReport) -> tuple[str, ...]:
    found = []
    if report.width and report.height:
        found.append(f"{report.width} × {report.height} px")  # noqa: RUF001
    if report.estimated:
        unit = " (relative)" if report.metric is False else ""
        found.append(f"estimated by {report.estimated}{unit}")
    if report.seconds is not None:
        found.append(f"{report.seconds:.1f} s")
    row = TABLE[report.kind]
    if report.frames_used is not None and report.frames_total is not None:
        some = ", spread evenly" if report.frames_used < report.frames_total else ""
        some = "" if row.made_of else some
        found.append(f"{report.frames_used} of {report.frames_total} {row.piece}s{some}")
    if row.layout == "frames" and not row.made_of:
        sound = {True: "sound track used", False: "sound track not used", None: "no sound track"}
        found.append(sound[report.audio_used])
    elif report.sample_rate:
        channels = {1: "mono", 2: "stereo"}.get(report.channels or 0, f"{report.channels} channels")
        found.append(f"{report.sample_rate / 1000:g} kHz, {channels}")
    for name, texts in (("text", report.written), ("speech", report.spoken)):
        if texts:
            found.append(f"{name}: \u201c{shorten(joined(texts), 80, placeholder=' …')}\u201d")
    if report.format and report.bytes:
        found.append(f"{report.format}, {decimal(report.bytes)}")
    return tuple(found)


def joined(texts: Iterable[WrittenText | SpokenText]) -> str:
    """Recognised texts in one line."""
    return " ".join(" ".join(one.text for one in texts).split())


def in_short(report: MediaReport) -> str:
    """The facts of a medium and its tokens: ``640 × 480 px, JPEG, 35.2 kB, 32 tokens``."""  # noqa: RUF002
    tokens = () if report.tokens is None else (count(report.tokens, "token"),)
    return ", ".join((*facts(report), *tokens))


def cuts(report: MediaReport) -> tuple[str, ...]:
    """The parts of a medium that the model does not get. The names of limits are for operators."""
    found = (re.sub(r" \([^()]*MICO_\w+\)", "", cut) for cut in report.cut)
    return tuple(cut for cut in found if not cut.startswith("frames:"))


def distances(depth: Depth) -> str:
    """The nearest and the farthest measured distance of a depth map, in words."""
    if not np.isfinite(depth.values).any():
        return "nothing was measured"
    nearest, farthest = np.nanmin(depth.values), np.nanmax(depth.values)
    if not depth.metric:
        return f"nearest {nearest:.2f}, farthest {farthest:.2f} (relative)"
    return f"nearest {nearest:.2f} m, farthest {farthest:.2f} m"


_DOING = {"model": "loading the model", "media": "looking and listening"}
_DOING |= {"prompt": "reading the conversation", "explain": "leaving out each part in turn"}


def progress(told: Progress) -> str:
    """What an answer waits for: ``reading the conversation: 1,024 of 4,100``."""
    write = decimal if told.what == "model" else "{:,}".format
    of = f" of {write(told.total)}" if told.total else ""
    return f"{_DOING[told.what]}: {write(told.done)}{of}"


def count(n: int, thing: str) -> str:
    return f"{n:,} {thing}{'' if n == 1 else 's'}"


def usage(tokens: Usage, seconds: float) -> str:
    return f"{_prompt(tokens)} + {tokens.completion_tokens:,} in {seconds:.1f} s"


def cost(estimate: Estimate) -> str:
    verdict = "fits" if estimate.fits else "does not fit"
    return (
        f"{_prompt(estimate)} + up to {estimate.max_tokens:,} for the answer: "
        f"{verdict} the context of {estimate.context_length:,}"
    )


def _prompt(tokens: Usage | Estimate) -> str:
    media = f" ({tokens.media_tokens:,} of media)" if tokens.media_tokens else ""
    return f"{count(tokens.prompt_tokens, 'token')}{media}"


def age(seconds: float) -> str:
    if seconds < 60:
        return "just now"
    if seconds < 86400:
        return f"{seconds // 60:.0f} min ago" if seconds < 3600 else f"{seconds // 3600:.0f} h ago"
    return f"{count(int(seconds // 86400), 'day')} ago"


def left_out(usage: Usage) -> str:
    """What of a conversation the model was not given, in a sentence; empty if it had all."""
    turns, media = usage.turns_left_out, usage.media_left_out
    gone = f"without {count(turns, 'earlier turn')}" if turns else ""
    named = f"with {count(media, 'earlier file')} named and not shown" if media else ""
    return " and ".join(filter(None, (gone, named)))


def mark(turn: TurnObject) -> str:
    """What stands behind an answer that is unsure or not whole; empty behind any other."""
    if turn.finish_reason == "unanswered":
        return BROKEN_OFF.strip() if turn.answer else "(not answered)"
    return UNSURE.strip() if turn.unsure else ""


def markdown(conversation: ConversationObject) -> str:
    lines = [f"# {conversation.title}", ""]
    if conversation.system:
        lines += [f"> {line}" for line in conversation.system.splitlines()] + [""]
    for turn in conversation.turns:
        lines += ["## Question", ""]
        for number, medium in enumerate(turn.media):
            found = in_short(turn.reports[number]) if number < len(turn.reports) else ""
            lines.append(f"- {medium.kind}: {medium.name}" + (f" ({found})" if found else ""))
        answer = f"{turn.answer} {mark(turn)}".strip()
        lines += ["", turn.message, "", f"## Answer ({conversation.model})", "", answer, ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def colours(values: NDArray[np.floating]) -> Pixels:
    """Values in [0, 1] of any shape as colours (..., 3), dark to bright; NaN is grey."""
    steps = np.linspace(0.0, 1.0, len(_VIRIDIS))
    known = np.nan_to_num(values, nan=0.0)
    channels = [np.interp(known, steps, _VIRIDIS[:, c]) for c in range(3)]
    mapped = np.stack(channels, axis=-1).round().astype(np.uint8)
    mapped[np.isnan(values)] = _HOLE
    return mapped


def depth_pixels(values: NDArray[np.float32]) -> Pixels:
    """A depth map (H, W) as colours, near bright and far dark; holes are grey."""
    measured = values[~np.isnan(values)]
    nearest, farthest = (measured.min(), measured.max()) if len(measured) else (0.0, 0.0)
    span = farthest - nearest
    return colours((farthest - values) / span if span > 0 else values * 0 + 1)


def wave_pixels(samples: NDArray[np.float32]) -> Pixels:
    """The waveform of a sound (n,) as bars of lowest to highest sample, on white."""
    width, height = WAVE_SIZE
    picture = np.full((height, width, 3), 255, np.uint8)
    edges = np.linspace(0, len(samples), width + 1).astype(int)
    middle = (height - 1) / 2
    for column, (start, end) in enumerate(pairwise(edges)):
        part = samples[start : max(end, start + 1)]
        if len(part):
            top = int(middle - part.max() * middle)
            bottom = int(np.ceil(middle - part.min() * middle))
            picture[max(0, top) : bottom + 1, column] = _WAVE_COLOUR
    return picture


def mel_pixels(samples: NDArray[np.float32], sample_rate: int) -> Pixels:
    """The log-mel spectrogram of a sound (n,): time to the right, pitch upwards, loud bright.

    80 dB from dark to bright, 64 bands to half the sample rate, windows of 64 ms.
    """
    size, n_bands = 1024, 64
    padded = np.pad(samples, (size // 2, size))
    n_columns = min(MEL_SIZE[0], max(1, len(samples) // 160))
    starts = np.linspace(0, max(0, len(samples) - 1), n_columns).astype(int)
    windows = padded[starts[:, None] + np.arange(size)] * np.hanning(size)
    power = np.abs(np.fft.rfft(windows, axis=1)) ** 2  # (columns, size / 2 + 1)
    mel = power @ _mel_filters(n_bands, size, sample_rate)  # (columns, B)
    decibels = 10 * np.log10(np.maximum(mel, 1e-10))
    loudness = np.clip((decibels - decibels.max()) / 80 + 1, 0, 1)
    picture = Image.fromarray(colours(loudness.T[::-1]))
    return np.asarray(picture.resize(MEL_SIZE, Image.Resampling.BILINEAR))


def _mel_filters(n_bands: int, size: int, sample_rate: int) -> NDArray[np.float64]:
    """Triangles (size / 2 + 1, B), evenly spread on the mel scale (O'Shaughnessy 1987)."""
    highest = 2595 * np.log10(1 + sample_rate / 2 / 700)
    corners = 700 * (10 ** (np.linspace(0, highest, n_bands + 2) / 2595) - 1)
    at = np.linspace(0, sample_rate / 2, size // 2 + 1)[:, None]
    low, centre, high = corners[:-2], corners[1:-1], corners[2:]
    rising, falling = (at - low) / (centre - low), (high - at) / (high - centre)
    return np.maximum(0.0, np.minimum(rising, falling))

"""Media, sizes and costs in a few words."""

from __future__ import annotations

from mico_chat.media.medium import MediaReport
from mico_ui.answers import Estimate, Usage


def facts(report: MediaReport) -> str:
    """What the server found in a medium, shortly: ``640 x 480, 35 kB, 32 tokens``."""
    found: list[str] = []
    if report.width and report.height:
        found.append(f"{report.width} x {report.height}")
    if report.seconds is not None:
        found.append(f"{report.seconds:.1f} s")
    if report.frames_used is not None:
        found.append(f"{report.frames_used} of {report.frames_total or '?'} frames")
    if report.sample_rate is not None:
        channels = {None: "", 1: " mono", 2: " stereo"}
        shown = channels.get(report.channels, f" {report.channels} channels")
        found.append(f"{report.sample_rate / 1000:g} kHz{shown}")
    if report.kind == "video":
        sound = {True: "with its sound", False: "without its sound", None: "silent"}
        found.append(sound[report.audio_used])
    if report.bytes:
        found.append(size(report.bytes))
    if report.tokens is not None:
        found.append(count(report.tokens, "token"))
    return ", ".join(found)


def size(n_bytes: int) -> str:
    """Bytes in the unit that fits: ``812 B``, ``35 kB``, ``1.2 MB``."""
    if n_bytes < 1000:
        return f"{n_bytes} B"
    if n_bytes < 1_000_000:
        return f"{n_bytes / 1000:.0f} kB"
    return f"{n_bytes / 1_000_000:.1f} MB"


def count(n: int, what: str) -> str:
    """``1 token``, ``2 tokens``."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def usage(tokens: Usage, seconds: float) -> str:
    """What an answer cost."""
    media = f" ({tokens.media_tokens:,} of media)" if tokens.media_tokens else ""
    asked = count(tokens.prompt_tokens, "token")
    return f"{asked}{media} + {tokens.completion_tokens:,} in {seconds:.1f} s"


def cost(estimate: Estimate) -> str:
    """What a question would cost, and whether it fits."""
    media = f" ({estimate.media_tokens:,} of media)" if estimate.media_tokens else ""
    asked = count(estimate.prompt_tokens, "token")
    verdict = "fits" if estimate.fits else "does not fit"
    return (
        f"{asked}{media} + up to {estimate.max_tokens:,} for the answer: "
        f"{verdict} the context of {estimate.context_length:,}"
    )


def age(seconds: float) -> str:
    """How long ago, roughly: ``just now``, ``5 min ago``, ``3 h ago``, ``2 days ago``."""
    if seconds < 60:
        return "just now"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min ago"
    if seconds < 86400:
        return f"{seconds // 3600:.0f} h ago"
    return f"{count(int(seconds // 86400), 'day')} ago"

"""Media, costs and conversations in words: the same in the browser and in the terminal."""

from __future__ import annotations

import re

from rich.filesize import decimal

from mico_chat.media.medium import MediaReport
from mico_chat.wire import ConversationObject, Estimate, Usage


def facts(report: MediaReport) -> tuple[str, ...]:
    found = []
    if report.width and report.height:
        found.append(f"{report.width} × {report.height} px")  # noqa: RUF001
    if report.seconds is not None:
        found.append(f"{report.seconds:.1f} s")
    if report.frames_used is not None and report.frames_total is not None:
        some = ", spread evenly" if report.frames_used < report.frames_total else ""
        found.append(f"{report.frames_used} of {report.frames_total} frames{some}")
    if report.kind == "video":
        sound = {True: "sound track used", False: "sound track not used", None: "no sound track"}
        found.append(sound[report.audio_used])
    elif report.sample_rate:
        channels = {1: "mono", 2: "stereo"}.get(report.channels or 0, f"{report.channels} channels")
        found.append(f"{report.sample_rate / 1000:g} kHz, {channels}")
    if report.format and report.bytes:
        found.append(f"{report.format}, {decimal(report.bytes)}")
    return tuple(found)


def in_short(report: MediaReport) -> str:
    """The facts of a medium and its tokens: ``640 × 480 px, JPEG, 35.2 kB, 32 tokens``."""  # noqa: RUF002
    tokens = () if report.tokens is None else (count(report.tokens, "token"),)
    return ", ".join((*facts(report), *tokens))


def cuts(report: MediaReport) -> tuple[str, ...]:
    """The parts of a medium that the model does not get. The names of limits are for operators."""
    found = (re.sub(r" \([^()]*MICO_\w+\)", "", cut) for cut in report.cut)
    return tuple(cut for cut in found if not cut.startswith("frames:"))


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
    if seconds < 3600:
        return f"{seconds // 60:.0f} min ago"
    if seconds < 86400:
        return f"{seconds // 3600:.0f} h ago"
    return f"{count(int(seconds // 86400), 'day')} ago"


def markdown(conversation: ConversationObject) -> str:
    lines = [f"# {conversation.title}", ""]
    if conversation.system:
        lines += [f"> {line}" for line in conversation.system.splitlines()] + [""]
    for turn in conversation.turns:
        lines += ["## Question", ""]
        for number, medium in enumerate(turn.media):
            found = in_short(turn.reports[number]) if number < len(turn.reports) else ""
            lines.append(f"- {medium.kind}: {medium.name}" + (f" ({found})" if found else ""))
        answer = "(not answered)" if turn.finish_reason == "unanswered" else turn.answer
        lines += ["", turn.message, "", f"## Answer ({conversation.model})", "", answer, ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))

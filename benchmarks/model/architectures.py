"""Other projects' architectures: are the answers those of the library's own ``generate``?

For each architecture of the installed transformers that reads media, a replica is made: its classes
and structure, tiny and random, from a seed. Each kind of medium is shown to it in several ways, and
the greedy tokens of mico-chat are compared with the library's. ``--page`` gets the table, between
two marks.
"""

import asyncio
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Annotated, Any

import numpy as np
import yaml
from transformers.utils.logging import disable_progress_bar

from benchmarks.harness import Report, write
from mico_chat.ask import Ask
from mico_chat.assistant import Assistant
from mico_chat.engine.base import GenerationOptions
from mico_chat.errors import ConfigError, MicoError
from mico_chat.load import EngineOptions, load_assistant
from mico_chat.media.medium import Audio, Image, Medium, Video
from mico_chat.messages import Message, TextPart
from mico_chat.tools import Tool
from tests.support import replicas
from tests.support.fakes import FakeDecoder
from tests.support.replicas import Conversation, medium, user
from tests.support.replicas.equal import Answered
from tests.support.replicas.shrunk import KINDS

N_TOKENS = 8
CASES = ("alone", "four at once", "second turn", "two media", "of different sizes")
ASKED = "What is this?"
TOOL = Tool("weather", "The weather of a city.", {"type": "object", "properties": {"city": {}}})
THOUGHT = "<think>\nA cat.\n</think>\n\n A cat, I think.\n"
MARKS = "<!-- architectures -->", "<!-- end of architectures -->"
EQUAL = "equal"
ORDER = "5", "differs", "not", "4", "answered"
TEMPLATES = Path(__file__).parents[1] / "reports.yaml"

Asked = tuple[Conversation, tuple[Tool, ...]]
"""A conversation as the library takes it, and its tools."""


def cases(kind: str) -> Iterator[list[Asked]]:
    """The conversations of each case; those of one case are asked at the same time, but for those
    of the first, whose text has spaces, newlines, a system prompt, tools and thoughts."""
    one, *three = (medium(kind, seed) for seed in range(1, 5))
    other = medium(kind, 5, other=True)
    history = [user(one, " Look.\n"), said_before(THOUGHT)]
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief. "}]}
    texts = [ASKED, f"\n  {ASKED}\n\n", "a < b, [c] > d?\t"]
    alone: list[Asked] = [([user(one, text)], ()) for text in texts]
    alone += [([system, user("This:", one, "\nis what? ")], ()), ([user(one, ASKED)], (TOOL,))]
    yield [*alone, ([user(ASKED), said_before(THOUGHT), user(one, ASKED)], ())]
    yield [([user(shown, ASKED)], ()) for shown in (one, *three)]
    yield [([*history, user("And now? ")], ()), ([*history, user(three[0], ASKED)], ())]
    yield [([user(one, three[0], ASKED)], ()), ([user(one, "and", three[0], ASKED)], ())]
    yield [([user(shown, ASKED)], ()) for shown in (one, other)] + [([user(one, other, ASKED)], ())]


def said_before(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def decoded(part: dict[str, Any]) -> Medium | TextPart:
    """A part of the library's messages as mico-chat's own decoder would give it."""
    if part["type"] == "text":
        return TextPart(part["text"])
    if part["type"] == "image":
        return Image(np.asarray(part["image"]))
    if part["type"] == "audio":
        return Audio(part["audio"])
    return Video(part["video"], np.array(part["times"], np.float64))


async def together(assistant: Assistant, asked: Sequence[Asked]) -> list[Any]:
    """The greedy tokens of each conversation, or its error."""

    async def tokens(conversation: Conversation, tools: tuple[Tool, ...]) -> list[int]:
        messages = [Message(m["role"], tuple(map(decoded, m["content"]))) for m in conversation]
        messages[0] = replace(messages[0], tools=tools)
        prompt, _ = await assistant.prepare(Ask(messages))
        options = GenerationOptions(max_tokens=N_TOKENS, logprobs=3).over(assistant.defaults)
        return Answered([d async for d in assistant.engine.generate(prompt, options)])

    work = [tokens(*one) for one in asked]
    return await asyncio.gather(*work, return_exceptions=True)


def measure(
    *names: str,
    seed: int = 0,
    width: Annotated[int, "of the replicas' layers, a multiple of 32"] = 32,
    page: Annotated[Path | None, "a Markdown file that gets the table"] = None,
) -> Report:
    """Compare each architecture's answers with those of its own library."""
    if unknown := set(names) - set(replicas.ARCHITECTURES):
        raise ConfigError(f"no architecture {', '.join(sorted(unknown))} reads media")
    disable_progress_bar()
    rows, reasons = list[list[str]](), list[str]()
    missing, refused = dict[str, str](), dict[str, str]()
    for name in names or replicas.ARCHITECTURES:
        with TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                replicas.build(name, Path(folder) / name, seed=seed, width=width)
                compared = _Compared(name, Path(folder) / name)
            except Exception as error:  # the library's, or the replica's
                missing[name] = said(error)
                continue
            for kind, *cells in compared.rows(missing, refused):
                rows.append([f"`{name}`", kind, *(_numbered(cell, reasons) for cell in cells)])
                print(*rows[-1], sep=" | ", flush=True)
    for one, why in missing.items():
        print(f"no replica of {one}: {why}")
    found: dict[str, Any] = {"rows": rows, "missing": missing, "reasons": reasons}
    found |= {"cases": "|".join(CASES), "n": len({row[0] for row in rows}), "refused": refused}
    found |= {"seed": seed, "width": width, "equal": sum(row.count(EQUAL) for row in rows)}
    found["cells"] = len(rows) * len(CASES)
    if page is not None:
        text = page.read_text(encoding="utf-8")
        before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
        template = yaml.safe_load(TEMPLATES.read_text("utf-8"))["architectures"]["text"]
        between = f"{MARKS[0]}\n\n{write(template, found)}\n\n{MARKS[1]}"
        page.write_text(f"{before}{between}{after}", encoding="utf-8")
    return Report(found)


def _numbered(cell: str, reasons: list[str]) -> str:
    """A cell with the number of its reason, if it has one."""
    what, _, why = cell.partition(": ")
    if why and why not in reasons:
        reasons.append(why)
    return f"{what} ({reasons.index(why) + 1})" if why else what


def said(error: BaseException) -> str:
    """An error in a line of a table, without the folder of the replica."""
    text = str(error) if isinstance(error, MicoError) else f"{type(error).__name__}: {error}"
    text = re.sub(rf"{gettempdir()}/[^/\s]+/", "", text).replace("|", "/").replace("`", "")
    return textwrap.shorten(text, 160, placeholder=" ...")


class _Compared:
    """A replica in mico-chat and in its own library."""

    def __init__(self, name: str, folder: Path) -> None:
        self._name, self._folder = name, folder
        self._model, self._processor = replicas.load(folder)

    def rows(self, missing: dict[str, str], refused: dict[str, str]) -> Iterator[tuple[str, ...]]:
        """The kind, how requests run, and a cell for each case. What the library itself cannot do
        with a replica is ``missing``; what is not loaded, and says why, is ``refused``."""
        kinds = []
        for kind in KINDS if hasattr(self._processor, "tokenizer") else ():
            if getattr(self._processor, f"{kind}_token", None) is None:
                continue
            try:
                asked = [user(medium(kind, 1), ASKED)]
                replicas.answer(self._model, self._processor, asked, (), N_TOKENS)
                kinds.append(kind)
            except Exception as error:  # the library's own
                missing[f"{self._name} ({kind})"] = said(error)
        if not kinds:
            if not any(one.startswith(f"{self._name} (") for one in missing):
                missing[self._name] = "its processor names no media"
            return
        try:
            assistant = load_assistant(self._folder, FakeDecoder(), EngineOptions(dtype="float32"))
        except MicoError as error:
            refused[self._name] = said(error)
            return
        with closing(assistant):
            why = next((one for one in assistant.notes if "run alone" in one), "").partition(": ")
            way = f"alone: {why[2]}" if why[2] else "together"
            for kind in kinds:
                if kind in assistant.adapter.input_modalities:
                    yield kind, way, *[self._cell(assistant, asked) for asked in cases(kind)]
                    continue
                notes = (one for one in assistant.notes if f"the kind {kind} here: " in one)
                reason = next(notes, " here: its class names no such kind").partition(" here: ")
                yield kind, way, *[f"not advertised: {reason[2]}"] * len(CASES)

    def _cell(self, assistant: Assistant, asked: Sequence[Asked]) -> str:
        """Whether all answers of a case are equal; else the worst of them, and why."""
        assistant.encoder.cache.clear()
        if not assistant.adapter.template.takes_tools:
            asked = [(conversation, ()) for conversation, _ in asked]
        found = asyncio.run(together(assistant, asked))
        return max(map(self._judged, asked, found), key=lambda one: (*map(one.startswith, ORDER),))

    def _judged(self, asked: Asked, found: list[int] | Exception) -> str:
        try:
            right = replicas.answer(self._model, self._processor, *asked, N_TOKENS)
        except Exception as error:  # the library's own
            if isinstance(found, Exception):
                status = getattr(found, "status", 500)
                return f"{status}: the library fails too: {said(error)}"
            return f"answered: the library itself fails: {said(error)}"
        if isinstance(found, Exception):
            return f"{getattr(found, 'status', 500)}: {said(found)}"
        return EQUAL if found == right else f"differs: {list(found)} for {right}"

"""``mico-chat ask``: one question about some media, or a file of them."""

from __future__ import annotations

import asyncio
import importlib
import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, aclosing, closing
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text
from tqdm import tqdm

from mico_chat.ask import Ask
from mico_chat.assistant import Answer, Assistant, decode_media
from mico_chat.engine.base import Delta, GenerationOptions
from mico_chat.errors import DataError, MediaError, MissingFileError
from mico_chat.explain import LEAST_EFFECT
from mico_chat.late import late
from mico_chat.load import without_collection
from mico_chat.media import MediaFile
from mico_chat.media.decoder import Decoder
from mico_chat.media.kinds import KINDS, Kind
from mico_chat.media.medium import Medium
from mico_chat.media.taught import TaughtName, features_of
from mico_chat.messages import Message, with_depth_scale
from mico_chat.wire import ExplainedPart, Explanation

with late():
    from mico_server import settings as server

SHOWN_PARTS = 3


class Waiting(Live):
    """Shows a spinner and the present step on ``out`` during a block, if ``out`` is a terminal.

    The line disappears when the block ends or ``stop`` is called.
    """

    def __init__(self, out: TextIO) -> None:
        super().__init__(console=Console(file=out, force_terminal=out.isatty()), transient=True)

    def say(self, what: str) -> None:
        """Show the present step, without the control characters that a file's name may hold."""
        printable = "".join(c if c.isprintable() else "?" for c in what)
        text = Text(printable, no_wrap=True, overflow="ellipsis")
        self.update(Spinner("dots", text), refresh=True)


@dataclass
class Asking:
    """How questions are asked: of which assistant, with which options, and where answers go.

    Media are decoded before ``load`` loads the model, so that a broken file is reported at once.
    """

    decoder: Decoder
    load: Callable[[Sequence[MediaFile | Medium]], Assistant]
    """It takes decoded media that may be read meanwhile."""
    options: GenerationOptions
    as_json: bool
    out: TextIO

    def one(self, question: str, media: Sequence[tuple[Kind, Path]], waiting: Waiting) -> None:
        """Print the answer to one question: piece by piece, or as one JSON object."""
        scale = self.options.depth_scale
        parts = [MediaFile(kind, path, depth_scale=scale) for kind, path in media]
        messages = [Message.user(*parts, question)]
        with waiting:
            if media:
                names = ", ".join(path.name for _, path in media)
                only_sounds = all(kind == "audio" for kind, _ in media)
                waiting.say(f"{'listening to' if only_sounds else 'looking at'} {names}")
                messages = _decoded(messages, self.decoder)
            waiting.say("loading the model")
            with closing(self.load(messages[0].media)) as assistant:
                depth = "estimating depth and " if self.options.estimate_depth else ""
                waiting.say(f"{depth}answering")
                if self.as_json:
                    (answer,) = assistant.answer_all([messages], self.options)
                    waiting.stop()
                    self.out.write(json.dumps(_details(answer), ensure_ascii=False) + "\n")
                else:
                    asyncio.run(self._print(assistant, messages, waiting))

    async def _print(self, assistant: Assistant, messages: list[Message], waiting: Waiting) -> None:
        async with aclosing(assistant.stream(Ask(messages, self.options))) as deltas:
            async for delta in deltas:
                if isinstance(delta, Delta) and (delta.text or delta.unsure):
                    waiting.stop()
                    self.out.write(delta.text + " (not sure)" * bool(delta.unsure))
                    self.out.flush()
                if isinstance(delta, Delta) and delta.explanation is not None:
                    names = [Path(medium.name).name for medium in messages[-1].media]
                    found = "\n".join(explained(delta.explanation, names))
                    self.out.write(f"\n\n{found}")
        waiting.stop()
        self.out.write("\n")

    def file(self, file: Path, batch_size: int, progress: TextIO) -> int:
        """Answer every line of a JSONL file, in order.

        A line is ``{"id": ..., "message": ..., "image": [paths], "audio": [...], ...}``; media are
        shown in the order of the line. The answer is ``{"id", "answer"}`` (with ``as_json`` also
        ``finish_reason``, ``confidence``, ``unsure``, ``usage`` and ``media``), or ``{"id",
        "error"}``. A relative path starts at the working directory, or else at the file's own
        folder. Other keys are ignored, unless one looks like a misspelt key.

        Returns:
            the number of lines that could not be answered.
        """
        requests = [_parse(file, number, line) for number, line in _lines(file)]
        failed = 0
        assistant: Assistant | None = None
        with ExitStack() as stack:
            bar = stack.enter_context(
                tqdm(total=len(requests), file=progress, unit="answer", dynamic_ncols=True)
            )
            for start in range(0, len(requests), batch_size):
                batch = requests[start : start + batch_size]
                for request in batch:
                    try:
                        messages = with_depth_scale(request.messages, self.options.depth_scale)
                        request.messages = decode_media(messages, self.decoder)
                    except MediaError as error:
                        request.error = str(error)
                if assistant is None and any(request.error is None for request in batch):
                    assistant = stack.enter_context(closing(self.load([])))
                good = [request.messages for request in batch if request.error is None]
                answers = iter(assistant.try_all(good, self.options) if assistant else [])
                for request in batch:
                    result = next(answers) if request.error is None else request.error
                    record: dict[str, Any] = {"error": str(result)}
                    if isinstance(result, Answer):
                        record = _details(result) if self.as_json else {"answer": result.text}
                    failed += "error" in record
                    line = json.dumps({"id": request.id} | record, ensure_ascii=False)
                    self.out.write(f"{line}\n")
                    request.messages = []  # the media of answered lines must not pile up
                self.out.flush()
                bar.update(len(batch))
        return failed


def with_taught(assistant: Assistant) -> Assistant:
    """The assistant, which says the names that were taught on this machine without a key.

    SQLite alone reads them: the server's own packages would take longer to import than the model.
    """
    file = server.ServerSettings().data_dir.expanduser() / "mico-chat.db"

    async def names(tenant: str, space: str) -> list[TaughtName]:
        with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as database:
            if not database.execute("PRAGMA table_info(taught)").fetchall():
                return []  # of an older version
            query = "SELECT name, kind, features, examples, ids FROM taught WHERE tenant = ?"
            rows = database.execute(f"{query} AND space = ?", ("local", space)).fetchall()
        return [
            TaughtName(name, kind, features_of(data, n), tuple(json.loads(ids)))
            for name, kind, data, n, ids in rows
        ]

    if file.is_file():
        assistant.say(names)
    return assistant


def _decoded(messages: list[Message], decoder: Decoder) -> list[Message]:
    """The messages with their media decoded by the decoder's process.

    Meanwhile this process imports the packages that the model will need.
    """
    pool = ThreadPoolExecutor(1)
    try:
        decoding = pool.submit(decode_media, messages, decoder)
        for module in ("torch", "mico_chat.encode"):
            if not decoding.done():
                with without_collection():
                    importlib.import_module(module)
        return decoding.result()
    finally:
        pool.shutdown(wait=False)  # if the user interrupts, closing the decoder ends the work


def explained(explanation: Explanation, names: Sequence[str]) -> Iterator[str]:
    """An explanation in lines: a medium each, with its share, its words and what matters in it."""
    if explanation.same_without_media:
        yield "Without any medium, the model would answer the same."
    for number, (name, medium) in enumerate(zip(names, explanation.media, strict=True)):
        words = " ".join(word.text.strip() for word in explanation.words if word.medium == number)
        yield f"{medium.share:4.0%}  {name}{f': {words}' if words else ''}"
        parts = sorted(medium.parts, key=lambda part: -part.effect)[:SHOWN_PARTS]
        for part in parts:
            if part.effect > LEAST_EFFECT:
                yield f"      {_place_of(part)} ({part.effect:.1f})"


def _place_of(part: ExplainedPart) -> str:
    if part.box is not None:
        left, top, right, bottom = part.box
        return f"{left:.0%} to {right:.0%} from the left, {top:.0%} to {bottom:.0%} from the top"
    if part.time is not None:
        start, end = part.time
        return f"{part.what} at {start:.1f} s" if start == end else f"{start:.1f} to {end:.1f} s"
    names = {"words": "the words in it", "order": "the order of its frames"}
    return names.get(part.what, f"the {part.what}")


def _details(answer: Answer) -> dict[str, Any]:
    told, thoughts = answer.explanation, answer.choices[0].reasoning_content
    return {
        "answer": answer.text,
        **({"reasoning_content": thoughts} if thoughts else {}),
        **answer.choices[0].model_dump(include={"finish_reason", "confidence", "unsure"}),
        "usage": answer.usage.model_dump(),
        "media": [report.model_dump(mode="json") for report in answer.media],
        **({} if told is None else {"explanation": told.model_dump(mode="json")}),
    }


@dataclass
class _Request:
    """A line of a batch: a question, or the error that keeps it from being answered."""

    id: str | int | None
    messages: list[Message] = field(default_factory=list)
    error: str | None = None


def _lines(file: Path) -> list[tuple[int, str]]:
    """The lines that are not blank, each with its number from 1."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise MissingFileError(str(file)) from error
    except UnicodeDecodeError as error:
        raise DataError(file, None, "not UTF-8 text") from error
    except OSError as error:
        raise DataError(file, None, f"cannot be read ({error.strerror})") from error
    # splitlines() would also split at U+2028, which JSON strings may hold.
    return [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]


def _parse(file: Path, number: int, line: str) -> _Request:
    request = _Request(None)
    try:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(file, number, f"not JSON ({error})") from error
        if not isinstance(record, dict):
            raise DataError(file, number, "expected an object")
        given = record.get("id")
        if isinstance(given, bool) or not isinstance(given, str | int):
            raise DataError(file, number, f"id: expected a string or an integer, got {given!r}")
        request.id = given
        missing = KINDS if "message" in record else ("message", *KINDS)
        parts: list[MediaFile] = []
        for key, value in record.items():
            if key in KINDS:
                parts += _media(file, number, key, value)
            elif key not in ("id", "message") and (meant := get_close_matches(key, missing, n=1)):
                raise DataError(file, number, f"unknown key {key!r}; did you mean {meant[0]!r}?")
        if "message" not in record:
            raise DataError(file, number, "the key 'message' is missing")
        message = record["message"]
        if not isinstance(message, str):
            raise DataError(file, number, f"message: expected a string, got {message!r}")
        request.messages = [Message.user(*parts, message)]
    except DataError as error:
        request.error = str(error)
    return request


def _media(file: Path, number: int, kind: Kind, value: Any) -> list[MediaFile]:
    if value is None:
        return []
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise DataError(file, number, f"{kind}: expected a list of paths, got {value!r}")
    return [MediaFile(kind, _located(path, file.parent), name=path) for path in paths]


def _located(path: str, folder: Path) -> Path:
    try:
        return Path(path) if Path(path).exists() else folder / path
    except (OSError, ValueError):  # a path that is too long or holds a NUL; the decoder reports it
        return Path(path)

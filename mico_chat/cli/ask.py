"""``mico-chat ask``: one question about some media, or a file of them."""

from __future__ import annotations

import asyncio
import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, aclosing, closing
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any, Self, TextIO

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text
from tqdm import tqdm

from mico_chat.assistant import Answer, Assistant, decode_media
from mico_chat.engine.base import Delta, GenerationOptions
from mico_chat.errors import DataError, MediaError, MicoError, MissingFileError
from mico_chat.load import without_collection
from mico_chat.media import MediaFile
from mico_chat.media.decoder import Decoder
from mico_chat.media.kinds import KINDS, Kind
from mico_chat.messages import Message, with_depth_scale

AssistantLoader = Callable[[], Assistant]


class Waiting:
    """A spinner and the present step on ``out`` while the block runs, if it is a terminal.

    The line is gone when the block ends or :meth:`done` is called, and before an error is printed.
    """

    def __init__(self, out: TextIO) -> None:
        console = Console(file=out)
        shown = out.isatty() and not console.is_dumb_terminal
        self._line = Live(console=console, transient=True) if shown else None

    def say(self, what: str) -> None:
        """Show the present step; a file's name may hold characters that a terminal obeys."""
        if self._line is not None:
            printable = "".join(c if c.isprintable() else "?" for c in what)
            text = Text(printable, no_wrap=True, overflow="ellipsis")
            self._line.update(Spinner("dots", text), refresh=True)

    def done(self) -> None:
        """Clear the line; may be called more than once."""
        if self._line is not None:
            self._line.stop()

    def __enter__(self) -> Self:
        if self._line is not None:
            self._line.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.done()


def ask(
    question: str,
    media: Sequence[tuple[Kind, Path]],
    *,
    decoder: Decoder,
    load: AssistantLoader,
    options: GenerationOptions,
    as_json: bool,
    depth_scale: float,
    out: TextIO,
    waiting: Waiting,
) -> None:
    """Answer one question on ``out``: piece by piece, or as one JSON object.

    Media are decoded before the model is loaded, so that a broken file is reported at once.
    """
    parts = [MediaFile(kind, path, depth_scale=depth_scale) for kind, path in media]
    messages = [Message.user(*parts, question)]
    with waiting:
        if media:
            waiting.say(_perceiving(media))
            messages = _decoded(messages, decoder)
        waiting.say("loading the model")
        with closing(load()) as assistant:
            waiting.say("answering")
            if as_json:
                (answer,) = assistant.answer_all([messages], options)
                waiting.done()
                out.write(json.dumps(_details(answer), ensure_ascii=False) + "\n")
            else:
                asyncio.run(_print(assistant, messages, options, out, waiting))


def _perceiving(media: Sequence[tuple[Kind, Path]]) -> str:
    names = ", ".join(path.name for _, path in media)
    only_sounds = all(kind == "audio" for kind, _ in media)
    return f"{'listening to' if only_sounds else 'looking at'} {names}"


def _decoded(messages: list[Message], decoder: Decoder) -> list[Message]:
    """The messages with their media decoded, which another process does: meanwhile, this one
    imports what the model will need."""
    pool = ThreadPoolExecutor(1)
    try:
        decoding = pool.submit(decode_media, messages, decoder)
        _import_beside(decoding)
        return decoding.result()
    finally:
        pool.shutdown(wait=False)  # interrupted: closing the decoder ends it


def _import_beside(work: Future[Any]) -> None:
    for module in ("torch", "mico_chat.encode"):
        if work.done():
            return
        with without_collection():
            importlib.import_module(module)


async def _print(
    assistant: Assistant,
    messages: list[Message],
    options: GenerationOptions,
    out: TextIO,
    waiting: Waiting,
) -> None:
    async with aclosing(assistant.stream(messages, options)) as deltas:
        async for delta in deltas:
            if isinstance(delta, Delta) and delta.text:
                waiting.done()
                out.write(delta.text)
                out.flush()
    waiting.done()
    out.write("\n")


def _details(answer: Answer) -> dict[str, Any]:
    return {
        "answer": answer.text,
        "finish_reason": answer.choices[0].finish_reason,
        "usage": answer.usage.model_dump(),
        "media": [report.model_dump(mode="json") for report in answer.media],
    }


@dataclass
class _Request:
    """A line of a batch: a question, or why there is none. Decoding may turn one into the other."""

    id: str | int | None
    messages: list[Message] = field(default_factory=list)
    error: str | None = None


def ask_batch(
    file: Path,
    *,
    decoder: Decoder,
    load: AssistantLoader,
    options: GenerationOptions,
    batch_size: int,
    as_json: bool,
    depth_scale: float,
    out: TextIO,
    progress: TextIO,
) -> int:
    """Answer every line of a JSONL file, in order; returns how many could not be answered.

    A line is ``{"id": ..., "message": ..., "image": [paths], "audio": [...], ...}``; media are
    shown in the order of the line. It is answered with ``{"id", "answer"}`` (with ``as_json``
    also ``finish_reason``, ``usage`` and ``media``), or with ``{"id", "error"}`` in its place. A
    relative path starts at the working directory, or else at the file's own folder. Other keys are
    left alone, unless one looks like a misspelt key.

    Raises:
        MissingFileError, DataError: for the file itself.
    """
    requests = [_parse(file, number, line) for number, line in _lines(file)]
    for request in requests:
        request.messages = with_depth_scale(request.messages, depth_scale)
    failed = 0
    assistant: Assistant | None = None
    with ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(total=len(requests), file=progress, unit="answer", dynamic_ncols=True)
        )
        for batch in _batches(requests, batch_size):
            for request in batch:
                _decode(request, decoder)
            good = [request for request in batch if request.error is None]
            if good and assistant is None:
                assistant = stack.enter_context(closing(load()))
            conversations = [request.messages for request in good]
            answers = iter(
                assistant.answer_all(conversations, options, errors="return") if assistant else []
            )
            for request in batch:
                result = request.error if request.error is not None else next(answers)
                failed += not isinstance(result, Answer)
                out.write(json.dumps(_line(request.id, result, as_json), ensure_ascii=False) + "\n")
                request.messages = []  # the media of answered lines must not pile up
            out.flush()
            bar.update(len(batch))
    return failed


def _lines(file: Path) -> list[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise MissingFileError(str(file)) from error
    except UnicodeDecodeError as error:
        raise DataError(file, None, "not UTF-8 text") from error
    except OSError as error:
        raise DataError(file, None, f"cannot be read ({error.strerror})") from error
    # Not splitlines(): JSON strings may hold U+2028, which it takes for the end of a line.
    numbered = enumerate(text.split("\n"), start=1)
    return [(number, line) for number, line in numbered if line.strip()]


def _parse(file: Path, number: int, line: str) -> _Request:
    request_id: str | int | None = None
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
        request_id = given
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
    except DataError as error:
        return _Request(request_id, error=str(error))
    return _Request(request_id, [Message.user(*parts, message)])


def _media(file: Path, number: int, kind: Kind, value: Any) -> list[MediaFile]:
    if value is None:
        return []
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise DataError(file, number, f"{kind}: expected a list of paths, got {value!r}")
    return [MediaFile(kind, _located(path, file.parent), name=path) for path in paths]


def _located(path: str, folder: Path) -> Path:
    """``path`` from the working directory where it exists there, or else from ``folder``."""
    try:
        return Path(path) if Path(path).exists() else folder / path
    except (OSError, ValueError):  # too long, or with a NUL: the decoder says so
        return Path(path)


def _batches(requests: list[_Request], size: int) -> Iterator[list[_Request]]:
    remaining = iter(requests)
    while batch := list(islice(remaining, size)):
        yield batch


def _decode(request: _Request, decoder: Decoder) -> None:
    if request.error is not None:
        return
    try:
        request.messages = decode_media(request.messages, decoder)
    except MediaError as error:
        request.error = str(error)


def _line(
    request_id: str | int | None, result: Answer | MicoError | str, as_json: bool
) -> dict[str, Any]:
    if not isinstance(result, Answer):
        return {"id": request_id, "error": str(result)}
    return {"id": request_id, **(_details(result) if as_json else {"answer": result.text})}

"""What the service costs beside the GPU, measured on this machine: seconds of a core, and bytes.

The service answers over HTTP from a stand-in for the language model, which gives a token every
:data:`PACE` seconds: what its process computes meanwhile is the service's own work. The stores
write conversations into a database, and real media are decoded, prepared and read.
"""

import asyncio
import sys
import tempfile
import threading
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import psutil
from sqlalchemy import text

from benchmarks.engines.overhead import Asked, OverHttp, together
from benchmarks.harness import core_seconds
from benchmarks.http_client import address_of
from benchmarks.processes import program
from mico_chat.adapters.mico import MicoAdapter
from mico_chat.assistant import Assistant
from mico_chat.checkpoints.load import load_encoder
from mico_chat.encode import MediaEncoder
from mico_chat.engine.base import Delta, GenerationOptions, Prompt
from mico_chat.media import MediaDecoder, MediaFile
from mico_chat.media.kinds import Kind
from mico_chat.media.worker import decode
from mico_chat.reading import installed_reader
from mico_chat.wire import Usage
from mico_server.app import serve
from mico_server.host import ModelSource
from mico_server.settings import ServerSettings
from mico_server.store.conversation import (
    NewTurn,
    StoredMedium,
    StoredText,
)
from mico_server.store.conversations import ConversationStore
from mico_server.store.database import Database
from mico_server.store.media import MediaStore
from mico_server.store.tables import new_id
from tests.support.fakes import FakeEngine

PACE, AT_ONCE, ROUNDS = 0.02, 32, 3
CONVERSATIONS, TURNS = 100, 2
MEDIA: dict[Kind, str] = {
    "image": "images/tower.jpg",
    "audio": "audio/recording1.wav",
    "video": "videos/world.mp4",
}
"""Media that come with gradio, which the page needs."""


class MediumCost(NamedTuple):
    """A file's bytes, and the seconds of a core that it takes to decode, prepare and read it."""

    name: str
    bytes: int
    decode: float
    prepare: float
    read: float


class TurnCost(NamedTuple):
    """A stored turn: its bytes in the database and in PostgreSQL's log; its median seconds."""

    database: str
    bytes: float
    log: float
    seconds: float


class Costs(NamedTuple):
    """``answer``: seconds of a core for an answer that is streamed and stored."""

    answer: float
    media: dict[Kind, MediumCost]
    turn: TurnCost


def measured(processor: Any, database_url: str | None, prompt: float, answer: float) -> Costs:
    """What answers, media and turns cost whose question and answer have so many tokens."""
    tokenizer = processor.tokenizer
    ids = tokenizer((Path(__file__).parents[1] / "README.md").read_text()).input_ids
    question, said = (tokenizer.decode(ids[: round(n)]) for n in (prompt, answer))
    media = {kind: medium_cost(kind, processor) for kind in MEDIA}
    with tempfile.TemporaryDirectory() as folder:
        turn = asyncio.run(turn_cost(database_url, Path(folder), question, said))
    return Costs(answer_cost(round(answer), question), media, turn)


def medium_cost(kind: Kind, processor: Any) -> MediumCost:
    file, reader = _file(kind), installed_reader()
    medium = decode(file)
    works: list[tuple[Callable[[], object], int]] = [
        (lambda: decode(file), 5),
        (lambda: processor.units(medium), 5),
        (lambda: reader and reader.read(medium, threading.Event()), 2),
    ]
    for work, _ in works:
        work()
    taken = [median(core_seconds(work) for _ in range(n)) for work, n in works]
    path = Path(file.name)
    return MediumCost(path.name, path.stat().st_size, *taken)


def _file(kind: Kind) -> MediaFile:
    return MediaFile(kind, Path(str(files("gradio").joinpath("media_assets", MEDIA[kind]))))


async def turn_cost(url: str | None, folder: Path, question: str, answer: str) -> TurnCost:
    """Of turns with these texts, the first of each conversation with a picture."""
    database = Database(url, folder)
    await database.start()

    async def sizes() -> tuple[float, float]:
        if database.is_sqlite:
            return (folder / "mico-chat.db").stat().st_size, 0.0
        asked = "pg_database_size(current_database()), pg_current_wal_insert_lsn() - '0/0'::pg_lsn"
        async with database.reading() as connection:
            size, log = (await connection.execute(text(f"SELECT {asked}"))).one()
            return float(size), float(log)

    media = MediaStore(database, folder / "media")
    store = ConversationStore(database, media)
    report = decode(_file("image")).report
    before, taken = await sizes(), list[float]()
    usage = Usage(prompt_tokens=100, completion_tokens=200, media_tokens=32)
    for _ in range(CONVERSATIONS):
        conversation = new_id("conv")
        async with media.work_folder() as work:
            work.file("0").write_bytes(conversation.encode())  # each picture is a new one
            shown = await media.prepare("image", work.file("0"), "picture.jpg")
            medium = StoredMedium(type="image", media_id=shown.id)
            for number in range(1, TURNS + 1):
                said = StoredText(text=question)
                turn = NewTurn([said], "mico-chat-7b", usage=usage, parent=number - 1)
                reports = []
                if number == 1:
                    turn = replace(turn, parts=[medium, said], new_media=[shown])
                    reports = [report]
                ended = replace(turn, answer=answer, finish_reason="stop", reports=reports)
                start = time.perf_counter()
                await store.add_turn("t", conversation, number, turn, create=number == 1)
                await store.answer_turn("t", conversation, number, ended)
                taken.append(time.perf_counter() - start)
    if database.is_sqlite:
        await database.close()  # which moves SQLite's log into its file
    after = await sizes()
    await database.close()
    size, log = ((late - early) / len(taken) for late, early in zip(after, before, strict=True))
    return TurnCost("SQLite" if database.is_sqlite else "PostgreSQL", size, log, median(taken))


def answer_cost(n_tokens: int, question: str) -> float:
    """Seconds of a core for an answer, :data:`AT_ONCE` at a time."""
    with (
        tempfile.TemporaryDirectory() as folder,
        program("-m", __name__, folder, ready=r"(http\S+)") as (process, url),
    ):
        way = OverHttp(address_of(url), "stand-in", chat=True, stream=True, store=True)
        child = psutil.Process(process.pid)

        asked = [Asked(question, None, n_tokens)] * AT_ONCE
        together(way, asked)  # warms up
        start = child.cpu_times()
        for _ in range(ROUNDS):
            _, tokens = together(way, asked)
            assert tokens == n_tokens * AT_ONCE
        end = child.cpu_times()
    seconds: float = end.user + end.system - start.user - start.system
    return seconds / (ROUNDS * AT_ONCE)


class StandIn(FakeEngine):
    """An engine that says as many words as it may, one every :data:`PACE` seconds."""

    name, max_position = "stand-in", 8192

    async def generate(
        self, prompt: Prompt, options: GenerationOptions
    ) -> AsyncGenerator[Delta, None]:
        n = options.max_tokens
        for _ in range(n):
            await asyncio.sleep(PACE)
            yield Delta(text=" word", token_ids=(1,))
        usage = Usage(prompt_tokens=100, completion_tokens=n, media_tokens=0)
        yield Delta(finish_reason="length", usage=usage)


def main(folder: Path) -> None:
    """The service's process."""

    def load(decoder: MediaDecoder) -> Assistant:
        model, processor = load_encoder()
        encoder = MediaEncoder(MicoAdapter(model, processor), decoder)
        return Assistant(StandIn(), encoder, name="stand-in")

    settings = ServerSettings(port=0, data_dir=folder)
    with closing(MediaDecoder()) as decoder:
        sources = [ModelSource("stand-in", partial(load, decoder))]
        serve(sources, announce=partial(print, flush=True), settings=settings)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

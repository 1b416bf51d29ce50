"""What the service costs beside the GPU, measured on this machine: seconds of a core, and bytes.

The service answers over HTTP from a stand-in for the language model, which gives a token every
:data:`PACE` seconds: what its process computes meanwhile is the service's own work. The stores
write conversations into a database, and real media are decoded, prepared and read.
"""

import asyncio
import importlib.util
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import typer
from sqlalchemy import text

from benchmarks.http_client import address_of
from benchmarks.overhead import Asked, OverHttp
from mico_chat.adapters.mico import MicoAdapter
from mico_chat.assistant import Assistant
from mico_chat.checkpoints.load import load_encoder
from mico_chat.encode import MediaEncoder
from mico_chat.engine.base import Delta, EngineStats, GenerationOptions, Prompt
from mico_chat.media import MediaDecoder, MediaFile
from mico_chat.media.kinds import Kind
from mico_chat.media.worker import decode
from mico_chat.reading import Reader
from mico_chat.wire import Usage
from mico_server.app import serve
from mico_server.host import ModelSource
from mico_server.settings import ServerSettings
from mico_server.store.conversations import ConversationStore, NewTurn, StoredMedium, StoredText
from mico_server.store.database import Database
from mico_server.store.media import MediaStore
from mico_server.store.tables import new_id

PACE = 0.02
AT_ONCE = 32
CONVERSATIONS, TURNS = 100, 2


@dataclass(frozen=True)
class MediumCost:
    """A file's bytes, and the seconds of a core that it takes to decode, prepare and read it."""

    name: str
    bytes: int
    decode: float
    prepare: float
    read: float


@dataclass(frozen=True)
class TurnCost:
    """A stored turn: its bytes in the database and in PostgreSQL's log; its median seconds."""

    database: str
    bytes: float
    log: float
    seconds: float


def real_media() -> dict[Kind, Path]:
    """Media that come with gradio, which the page needs."""
    found = importlib.util.find_spec("gradio")
    assert found is not None
    assert found.origin is not None
    folder = Path(found.origin).parent / "media_assets"
    files: dict[Kind, str] = {
        "image": "images/tower.jpg",
        "audio": "audio/recording1.wav",
        "video": "videos/world.mp4",
    }
    return {kind: folder / name for kind, name in files.items()}


def core_seconds(work: Callable[[], Any], repeats: int = 5) -> float:
    """The median, once the work has run; seconds of all threads."""
    work()
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return median(taken)


def medium_cost(kind: Kind, path: Path, processor: Any, reader: Reader | None) -> MediumCost:
    file = MediaFile(kind, path)
    medium, never = decode(file), threading.Event()
    return MediumCost(
        path.name,
        path.stat().st_size,
        core_seconds(lambda: decode(file)),
        core_seconds(lambda: processor.units(medium)),
        0.0 if reader is None else core_seconds(lambda: reader.read(medium, never), 2),
    )


async def turn_cost(url: str | None, folder: Path, question: str, answer: str) -> TurnCost:
    """Of turns with these texts, the first of each conversation with a picture."""
    database = Database(url, folder)
    await database.start()
    postgres = not database.is_sqlite

    async def sizes() -> tuple[float, float]:
        if not postgres:
            return (folder / "mico-chat.db").stat().st_size, 0.0
        asked = "pg_database_size(current_database()), pg_current_wal_insert_lsn() - '0/0'::pg_lsn"
        async with database.reading() as connection:
            size, log = (await connection.execute(text(f"SELECT {asked}"))).one()
            return float(size), float(log)

    media = MediaStore(database, folder / "media")
    store = ConversationStore(database, media)
    report = decode(MediaFile("image", real_media()["image"])).report
    before, taken = await sizes(), list[float]()
    for _ in range(CONVERSATIONS):
        conversation = new_id("conv")
        async with media.work_folder() as work:
            work.file("0").write_bytes(conversation.encode())  # each picture is a new one
            shown = await media.prepare("image", work.file("0"), "picture.jpg")
            medium = StoredMedium(type="image", media_id=shown.id)
            for number in range(1, TURNS + 1):
                said = StoredText(text=question)
                turn = NewTurn([said], "mico-chat-7b", usage=Usage(
                    prompt_tokens=100, completion_tokens=200, media_tokens=32
                ))  # fmt: skip
                if number == 1:
                    turn = replace(turn, parts=[medium, said], new_media=[shown])
                ended = replace(turn, answer=answer, finish_reason="stop")
                ended = replace(ended, reports=[report] if number == 1 else [])
                start = time.perf_counter()
                await store.add_turn("t", conversation, number, turn, create=number == 1)
                await store.answer_turn("t", conversation, number, ended)
                taken.append(time.perf_counter() - start)
    if postgres:
        after = await sizes()
        await database.close()
    else:
        await database.close()  # which moves SQLite's log into its file
        after = await sizes()
    n = CONVERSATIONS * TURNS
    size, log = ((late - early) / n for late, early in zip(after, before, strict=True))
    return TurnCost("PostgreSQL" if postgres else "SQLite", size, log, median(taken))


def answer_cost(n_tokens: int, question: str, rounds: int = 3) -> float:
    """Seconds of a core for an answer that is streamed and stored, :data:`AT_ONCE` at a time."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", __name__, folder]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            address = address_of(line.split()[-1])
            way = OverHttp(address, "stand-in", chat=True, stream=True, store=True)
            child = psutil.Process(process.pid)

            async def ask() -> None:
                asked = (way.ask(Asked(question, None, n_tokens)) for _ in range(AT_ONCE))
                for _, tokens in await asyncio.gather(*asked):
                    assert tokens == n_tokens

            asyncio.run(ask())  # warms up
            start = child.cpu_times()
            for _ in range(rounds):
                asyncio.run(ask())
            end = child.cpu_times()
        finally:
            process.kill()  # nothing of what it stored is kept
            process.wait()
    seconds: float = end.user + end.system - start.user - start.system
    return seconds / (rounds * AT_ONCE)


class StandIn:
    """An engine that says as many words as it may, one every :data:`PACE` seconds."""

    name, max_position, failure = "stand-in", 8192, None
    scores = repeats = False
    busy_s = 0.0

    async def generate(
        self, prompt: Prompt, options: GenerationOptions
    ) -> AsyncGenerator[Delta, None]:
        n = options.max_tokens
        for _ in range(n):
            await asyncio.sleep(PACE)
            yield Delta(text=" word", token_ids=(1,))
        usage = Usage(prompt_tokens=100, completion_tokens=n, media_tokens=0)
        yield Delta(finish_reason="length", usage=usage)

    def stats(self) -> EngineStats:
        return EngineStats.model_validate(dict.fromkeys(EngineStats.model_fields, 0))

    def prepare(self) -> None:
        """There is nothing to prepare."""

    def give_up(self, reason: str) -> None:
        """Its steps end."""

    def close(self) -> None:
        """There is nothing to end."""


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
    typer.run(main)

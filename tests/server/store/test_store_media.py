"""Media: an id that was given out has its bytes, and what nobody needs is removed."""

import asyncio
import os
import random
import stat
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from mico_chat.errors import LimitError, RequestError
from mico_chat.media.medium import MediaReport
from mico_server.errors import ConflictError, GoneError, NotFoundError
from mico_server.store import blobs as blob_files
from mico_server.store.batches import BatchStore
from mico_server.store.database import Database
from mico_server.store.keys import History
from mico_server.store.media import MediaStore
from mico_server.store.quota import Quota
from mico_server.store.tables import blobs
from tests.server.conftest import BOTH
from tests.server.support.stored import Stores

pytestmark = pytest.mark.anyio


async def test_what_is_added_can_be_had(stores: Stores) -> None:
    report = MediaReport(name="cat.jpg", kind="image", bytes=5, cut=["half of it"])
    record = await stores.add(report=report)
    assert record == await stores.media.get("t", record.id)
    assert (record.kind, record.bytes, record.report) == ("image", 5, report)
    assert record.created_at.tzinfo is UTC
    path = stores.media.path(record)
    assert path.read_bytes() == b"bytes"
    for folder in (path.parent, path.parent.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert path.relative_to(stores.folder).parts[1:] == (record.sha256[:2], record.sha256)
    assert (await stores.add(ttl_s=None)).expires_at is None


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/b\\c", "ü" * 3000])
async def test_names_are_in_no_path(stores: Stores, name: str) -> None:
    record = await stores.add(name=name, tenant=name)
    assert record.name == name
    (path,) = stores.files()
    assert path == stores.media.path(record)
    assert path.name == record.sha256
    with pytest.raises(RequestError, match="name of the image"):
        await stores.add(name=f"{name}\0")


async def test_the_same_content_is_one_file_for_each_tenant(stores: Stores) -> None:
    one, two = await stores.add(), await stores.add(name="again.jpg")
    other = await stores.add(tenant="other")
    assert one.id != two.id
    assert stores.media.path(one) == stores.media.path(two) != stores.media.path(other)
    assert len(stores.files()) == 2

    await stores.media.delete("t", one.id)
    assert stores.media.path(two).read_bytes() == b"bytes"
    await stores.media.delete("t", two.id)
    assert stores.files() == [stores.media.path(other)]


async def test_anothers_medium_is_as_none(stores: Stores) -> None:
    record = await stores.add()
    none = ("media-" + "0" * 24, "", "media-\0", "\ud800", "' OR 1=1 --", "media-%")
    for tenant, id_ in [("other", record.id), *(("t", id_) for id_ in none)]:
        for call in (stores.media.get, stores.media.delete):
            with pytest.raises(NotFoundError) as missing:
                await call(tenant, id_)
            assert str(missing.value) == f"no medium {id_!r}"
        with pytest.raises(NotFoundError):
            await stores.media.list(tenant, limit=5, after=id_)
    assert await stores.media.list("other", limit=5) == ()
    assert await stores.media.get("t", record.id) == record


@BOTH
async def test_pages_are_the_newest_first(stores: Stores) -> None:
    kinds = ["image", "audio", "image", "video", "image"]
    records = [await stores.add(bytes([n]), kind=kind) for n, kind in enumerate(kinds)]
    await stores.add(tenant="other")
    newest = tuple(reversed(records))
    assert await stores.media.list("t", limit=9) == newest
    pages, after = [], None
    while page := await stores.media.list("t", limit=2, after=after):
        pages.append(page)
        after = page[-1].id
        await stores.add(b"later")  # does not move what comes behind
    assert pages == [newest[:2], newest[2:4], newest[4:]]
    images = [record.id for record in newest if record.kind == "image"]
    listed = await stores.media.list("t", limit=9, kind="image", after=newest[0].id)
    assert [record.id for record in listed] == images[1:]


async def test_a_file_that_vanished(stores: Stores) -> None:
    record = await stores.add()
    stores.media.path(record).unlink()
    with pytest.raises(GoneError, match=rf"{record.id} \(cat.jpg\).*upload it again") as gone:
        stores.media.path(record)
    assert str(stores.folder) not in str(gone.value)
    again = await stores.add()
    assert stores.media.path(record) == stores.media.path(again), "the same content puts it back"
    stores.media.path(record).unlink()
    await stores.media.delete("t", record.id)
    await stores.media.delete("t", again.id)


async def test_a_shown_medium_cannot_be_deleted(stores: Stores) -> None:
    record = await stores.add()
    conversation = await stores.say(show=[record.id])
    with pytest.raises(ConflictError, match=conversation):
        await stores.media.delete("t", record.id)
    await stores.expire(record)
    assert await stores.media.sweep() == 0
    assert stores.media.path(await stores.media.get("t", record.id)).read_bytes() == b"bytes"

    await stores.conversations.delete("t", conversation)
    assert await stores.media.sweep() == 1


@BOTH
async def test_sweep(stores: Stores) -> None:
    folder = stores.folder
    assert await stores.media.sweep() == 0, "no folder yet"
    kept, old = await stores.add(b"kept"), await stores.add(b"old")
    same = await stores.add(b"kept")
    await stores.expire(old)
    await stores.expire(same)
    orphan = folder / ("a" * 16) / "bb" / ("b" * 64)
    orphan.parent.mkdir(parents=True)
    orphan.write_bytes(b"left by a crash")
    stranger = folder / "README"
    stranger.write_text("not ours")
    left = folder / "tmp" / "work-left"
    left.mkdir()
    (left / "0").write_bytes(b"x")
    os.utime(left, (time.time() - 90000,) * 2)

    async with stores.media.work_folder() as work:
        work.file("0").write_bytes(b"arriving")
        swept = await stores.media.sweep()
        assert work.file("0").exists()
    assert swept == 2
    assert not left.exists()
    assert stores.files() == sorted([stores.media.path(kept), stranger])
    with pytest.raises(NotFoundError):
        await stores.media.get("t", old.id)
    async with stores.database.reading() as connection:
        assert list(await connection.scalars(select(blobs.c.id))) == [
            f"{stores.media.path(kept).parent.parent.name}/{kept.sha256}"
        ]


async def test_a_request_cancelled_while_its_files_are_removed(tmp_path: Path) -> None:
    gate = threading.Event()
    with ThreadPoolExecutor(max_workers=1) as pool:
        asyncio.get_running_loop().set_default_executor(pool)
        work = blob_files.WorkFolder(tmp_path)
        work.file("0").write_bytes(b"x")
        pool.submit(gate.wait)  # no thread is free to remove it
        leaving = asyncio.create_task(work.__aexit__())
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        gate.set()
    assert list((tmp_path / "tmp").iterdir()) == []


async def test_a_crash_between_file_and_record(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    move_in = blob_files.move_in

    def move_in_and_fail(*arguments: Any) -> None:
        move_in(*arguments)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mico_server.store.blobs.move_in", move_in_and_fail)
    with pytest.raises(OSError, match="No space left"):
        await stores.add()
    assert stores.files() == []
    assert await stores.media.list("t", limit=1) == ()


async def test_bytes_are_on_disk_before_the_record(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step towards durability happens before anyone can see the id."""
    steps: list[str] = []

    def noted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            steps.append(name)
            return call(*arguments)

        return run

    monkeypatch.setattr(os, "fsync", noted("sync", os.fsync))
    monkeypatch.setattr(os, "replace", noted("replace", os.replace))
    commit = Database.writing

    def writing(self: Database) -> Any:
        steps.append("begin")
        return commit(self)

    monkeypatch.setattr(Database, "writing", writing)
    await stores.add()
    assert steps == ["sync", "begin", "replace", "sync", "sync", "sync"]


class Limited(Stores):
    """Of which one key may store 4 files and media, and 20 bytes."""

    @property
    def media(self) -> MediaStore:
        return MediaStore(self.database, self.folder, Quota(20, 4))


@BOTH
async def test_a_key_has_a_quota_with_all_its_users(stores: Stores, tmp_path: Path) -> None:
    own = Limited(stores.database, stores.folder)
    first, same = await own.add(), await own.add(name="again.jpg")  # 5 bytes, once
    await own.add(b"x" * 15, tenant="t/anna")
    stored = own.files()
    said = r"cat.jpg: .*21 bytes.*limit of 20 \(MICO_SERVER_MAX_STORED_BYTES\); delete .*/v1/media"
    with pytest.raises(LimitError, match=said):
        await own.add(b"y", tenant="t/bob")
    with pytest.raises(LimitError, match=r"0.jpg: .*21 bytes"):
        await own.say(send=[b"y"])
    assert own.files() == stored, "nothing is left of what was refused"
    await own.say()  # a text needs no place
    for tenant in ("T", "t2", "other/t"):
        await own.add(b"y" * 20, tenant=tenant)
    path = tmp_path / "asked.jsonl"
    path.write_bytes(b"")
    batches = BatchStore(own.database, tmp_path / "uploads", Quota(20, 4))
    file = await batches.add_file("t/anna", "asked.jsonl", path)
    with pytest.raises(LimitError, match=r"5 files and media .*limit of 4 .*STORED_FILES"):
        await own.add()
    await batches.delete_file("t/anna", file.id)
    for record in (first, same):
        await own.media.delete("t", record.id)
    await own.add(b"12345", tenant="t/bob")
    await History(own.database, own.folder).move("t", "u")
    await own.add(b"x" * 20)
    with pytest.raises(LimitError, match="25 bytes"):
        await own.add(b"y" * 5, tenant="u/bob")


@BOTH
async def test_a_quota_holds_for_those_who_add_at_once(
    stores: Stores, database_url: str, tmp_path: Path
) -> None:
    other = Limited(Database(database_url, tmp_path / "data"), stores.folder)
    await other.database.start()
    pair = [Limited(stores.database, stores.folder), other]
    adding = (pair[n % 2].add(bytes([n]), tenant=f"t/{n}") for n in range(12))
    added = await asyncio.gather(*adding, return_exceptions=True)
    assert sum(not isinstance(one, LimitError) for one in added) == len(stores.files()) == 4
    await other.database.close()


@BOTH
async def test_adding_and_deleting_one_content_do_not_cross(
    stores: Stores, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two servers, many tasks, one content: whoever has an id finds the bytes, at any moment."""

    remove = blob_files.remove

    def slowly(*arguments: Any) -> None:  # so that a whole upload fits in between
        time.sleep(0.02)
        remove(*arguments)

    monkeypatch.setattr("mico_server.store.blobs.remove", slowly)
    other = Stores(Database(database_url, tmp_path / "data"), stores.folder)
    await other.database.start()
    pair = [stores, other]
    draw = random.Random(0)

    async def one(own: Stores) -> None:
        for _ in range(4):
            record = await own.add()
            for _ in range(draw.randrange(3)):
                assert own.media.path(record).read_bytes() == b"bytes"
                await asyncio.sleep(draw.random() / 200)
            await draw.choice(pair).media.delete("t", record.id)
            if draw.random() < 0.2:
                await own.media.sweep()

    async with asyncio.TaskGroup() as tasks:
        for number in range(16):
            tasks.create_task(one(pair[number % 2]))
    assert stores.files() == []
    await other.database.close()

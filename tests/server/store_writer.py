"""Store things without end, and say of each that it is stored; a test kills this process.

python -m tests.server.store_writer DATABASE_URL FOLDER
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

from mico_server.store.conversations import ConversationStore, NewTurn, StoredMedium, StoredText
from mico_server.store.database import Database
from mico_server.store.keys import KeyStore
from mico_server.store.media import MediaStore


async def write(url: str, folder: Path) -> None:
    database = Database(url, folder / "data")
    await database.start()
    media = MediaStore(database, folder / "media")
    keys, conversations = KeyStore(database), ConversationStore(database, media)

    async def one() -> None:
        id_ = None
        while True:
            secret, _ = await keys.create("bob")
            data = os.urandom(5000)
            async with media.work_folder() as work:
                work.file("0").write_bytes(data)
                work.file("1").write_bytes(data[::-1])
                upload = await media.add("t", "image", work.file("0"), "0.jpg", ttl_s=600)
                new = await media.prepare("image", work.file("1"), "1.jpg")
                shown = [StoredMedium(type="image", media_id=m.id) for m in (upload, new)]
                turn = NewTurn([*shown, StoredText(text="?")], secret, "stop", "m", new_media=[new])
                id_, number = await conversations.add_turn("t", id_, turn)
            said = {"secret": secret, "media": [upload.id, new.id], "turn": [id_, number]}
            print(json.dumps(said), flush=True)

    await asyncio.gather(*(one() for _ in range(4)))


if __name__ == "__main__":
    asyncio.run(write(sys.argv[1], Path(sys.argv[2])))

"""/v1/teach and ``mico-chat teach``: taught names are listed, moved and forgotten."""

import base64
import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from mico_chat.errors import LimitError
from mico_chat.media import MediaDecoder, MediaLimits
from mico_chat.media.taught import TaughtName
from mico_chat.model.config import MicoChatConfig
from mico_server.store.keys import History
from mico_server.store.taught import MOST_KEPT, MOST_NAMES, TaughtStore
from mico_training.data.mixture import open_source
from mico_training.recipe import DataRecipe
from tests.server.conftest import BOTH, Start
from tests.server.support.echo import decoding_assistant
from tests.server.support.running import new_key
from tests.server.support.sent import mp4, png, square, wav
from tests.server.support.stored import Stores
from tests.support.tiny import command

PICTURE = png(square())


@pytest.fixture(scope="module")
def decoder() -> Iterator[MediaDecoder]:
    with MediaDecoder(MediaLimits()) as decoder:
        yield decoder


@pytest.fixture
def tiny(start: Start, decoder: MediaDecoder) -> httpx.Client:
    return start(decoding_assistant(decoder))


def teach(
    client: httpx.Client, name: str, *files: bytes, kind: str = "image", **more: Any
) -> httpx.Response:
    headers = more.pop("headers", {})
    parts: list[Any] = [("name", (None, name)), *((n, (None, str(v))) for n, v in more.items())]
    parts += [(kind, (f"{n}.bin", data)) for n, data in enumerate(files)]
    return client.post("/v1/teach", files=parts, headers=headers)


def names(client: httpx.Client, **headers: str) -> list[str]:
    found = client.get("/v1/teach", headers=headers).json()["data"]
    return [f"{one['name']}{one['examples']}" for one in found]


def cached(client: httpx.Client, **headers: str) -> bool:
    """Whether the picture's tokens are those of an earlier question of this client."""
    sent = {"image": ("a.png", PICTURE)}
    answer = client.post("/v1/chat", data={"message": "?"}, files=sent, headers=headers)
    assert answer.status_code == 200, answer.text
    return bool(answer.json()["media"][0]["cached"])


def test_a_name_is_taught_listed_renamed_and_forgotten(tiny: httpx.Client) -> None:
    assert [cached(tiny), cached(tiny)] == [False, True]
    told = teach(tiny, " Z ", PICTURE, PICTURE)
    assert told.status_code == 201, told.text
    assert told.json() | {"id": "", "space": "", "created_at": 0} == {
        **{"id": "", "object": "taught", "name": "Z", "kind": "image", "examples": 2},
        **{"model": "tiny", "space": "", "corrections": [], "features": None, "created_at": 0},
    }
    assert [cached(tiny), cached(tiny)] == [False, True], "it counts at once, and is cached then"
    assert teach(tiny, "Z", PICTURE).json()["examples"] == 3, "the same name gets more examples"
    assert teach(tiny, "Q", wav(), kind="audio").status_code == 201
    # JSON with a stored medium or a data URI teaches as well.
    stored = tiny.post("/v1/media", files={"image": ("a.png", PICTURE)}).json()["id"]
    url = f"data:image/png;base64,{base64.b64encode(PICTURE).decode()}"
    sent = {"name": "Y", "image": [f"media:{stored}", url]}
    assert tiny.post("/v1/teach", json=sent).json()["examples"] == 2
    assert names(tiny) == ["Z3", "Q1", "Y2"]
    path = f"/v1/teach/{told.json()['id']}"
    assert tiny.patch(path, json={"name": "W"}).json()["name"] == "W"
    assert names(tiny) == ["W3", "Q1", "Y2"]
    assert tiny.patch(path, json={"name": "Wolfgang"}).status_code == 400
    assert tiny.delete(path).json() == {"id": path.rpartition("/")[2], "deleted": True}
    assert tiny.delete(path).status_code == 404
    assert tiny.patch(path, json={"name": "W"}).status_code == 404
    assert names(tiny) == ["Q1", "Y2"]


def test_a_correction_keeps_the_turn_that_it_corrects(tiny: httpx.Client) -> None:
    asked: dict[str, Any] = {"data": {"message": "?"}, "files": {"image": ("a.png", PICTURE)}}
    id_ = tiny.post("/v1/chat", **asked).json()["conversation_id"]
    told = teach(tiny, "Z", PICTURE, conversation_id=id_, turn=1)
    assert told.json()["corrections"] == [{"conversation_id": id_, "turn": 1}]
    assert teach(tiny, "Z", PICTURE, conversation_id=id_, turn=2).status_code == 404
    assert teach(tiny, "Z", PICTURE, conversation_id="conv-" + "0" * 24, turn=1).status_code == 404
    assert len(teach(tiny, "Z", PICTURE).json()["corrections"]) == 1


def test_names_are_exported_and_imported(tiny: httpx.Client) -> None:
    teach(tiny, "Z", PICTURE, PICTURE)
    whole = tiny.get("/v1/teach?features=true").json()
    one = whole["data"][0]
    tiny.delete(f"/v1/teach/{one['id']}")
    assert tiny.put("/v1/teach", json=whole).status_code == 200
    assert names(tiny) == ["Z2"]
    again = tiny.get("/v1/teach?features=true").json()["data"][0]
    assert again["features"] == one["features"]
    width = len(np.frombuffer(base64.b64decode(one["features"]), "<f4")) // 2
    huge, nan = (
        base64.b64encode(np.full(width, v, "<f4").tobytes()).decode() for v in (7.0, np.nan)
    )
    for change, reason in (
        ({"space": "of-another"}, "was taught to tiny and means nothing to tiny: teach it again"),
        ({"features": "?"}, "data[0].features: expected base64"),
        ({"features": None}, "expected"),
        ({"examples": 3}, "expected"),
        ({"examples": 0}, "expected"),
        ({"examples": -1}, "features"),
        ({"kind": "audio"}, "expected"),
        ({"examples": 1, "features": huge}, "numbers from -1 to 1"),
        ({"examples": 1, "features": nan}, "numbers from -1 to 1"),
        ({"name": "Bella"}, "name: 'Bella' has 6 tokens, and 2 fit"),
        ({"name": "\0"}, "name"),
    ):
        refused = tiny.put("/v1/teach", json={"data": [one | change]})
        assert refused.status_code == 400, change
        assert reason in refused.json()["error"]["message"], change
    assert names(tiny) == ["Z2"]


def test_keys_and_users_have_names_of_their_own(
    start: Start, decoder: MediaDecoder, tmp_path: Path
) -> None:
    client = start(decoding_assistant(decoder))
    teach(client, "L", PICTURE)
    anna, ben = (
        {"authorization": f"Bearer {new_key(tmp_path / 'data', name)}"} for name in ("anna", "ben")
    )
    teach(client, "A", PICTURE, headers=anna)
    teach(client, "U", PICTURE, headers=anna | {"x-mico-user": "u"})
    assert names(client, **anna) == ["A1"]
    assert names(client, **anna, **{"x-mico-user": "u"}) == ["A1", "U1"], "the key's, and one's own"
    assert names(client, **anna, **{"x-mico-user": "v"}) == ["A1"]
    assert names(client, **ben) == []
    theirs = client.get("/v1/teach", headers=anna).json()["data"][0]["id"]
    for headers in (ben, anna | {"x-mico-user": "u"}):  # a user cannot forget the key's
        assert client.delete(f"/v1/teach/{theirs}", headers=headers).status_code == 404
    assert [cached(client, **who) for who in (anna, ben, ben, anna)] == [False, False, True, True]
    metrics = {"authorization": f"Bearer {new_key(tmp_path / 'data', 'm', scopes=('metrics',))}"}
    assert client.get("/v1/teach", headers=metrics).status_code == 403


def test_without_a_key_page_and_terminal_share_one_set(tiny: httpx.Client) -> None:
    page = {"x-mico-user": "b-0123456789abcdef"}
    teach(tiny, "Z", PICTURE, headers=page)
    assert names(tiny) == names(tiny, **page) == ["Z1"]


def test_limits_and_hostile_input(tiny: httpx.Client, start: Start) -> None:
    assert teach(tiny, "Z", PICTURE).status_code == 201
    for files, name, more, status, reason in (
        ([], "Z", {}, 400, "0 examples"),
        ([PICTURE] * 6, "Z", {}, 400, "6 examples, but a request takes 1 to 5"),
        ([b"nothing"], "Z", {}, 422, "0.bin"),
        ([mp4()], "Z", {"kind": "video"}, 400, "unknown field 'video'; known are image, audio"),
        ([wav()], "Z", {"kind": "audio"}, 400, "'Z' was taught by image examples"),
        ([PICTURE], " ", {}, 400, "expected 1 to 60 printable characters"),
        ([PICTURE], "a\u202eb", {}, 400, "printable"),
        ([PICTURE], "x" * 61, {}, 400, "printable"),
        ([PICTURE], "Bella", {}, 400, "'Bella' has 6 tokens, and 2 fit"),
        ([PICTURE], "Z", {"model": "other"}, 404, "other"),
        ([PICTURE], "Z", {"turn": "x", "conversation_id": "y"}, 400, "turn"),
    ):
        refused = teach(tiny, name, *files, **more)
        assert (refused.status_code, reason in refused.text) == (status, True), refused.text
    five = [PICTURE] * 5
    for _ in range((MOST_KEPT - 1) // 5):
        assert teach(tiny, "Z", *five).status_code == 201
    assert "would have 21 examples" in teach(tiny, "Z", *five).text
    assert names(tiny) == ["Z16"]
    assert tiny.post("/v1/teach", content=b"{").status_code == 400
    assert tiny.put("/v1/teach", json={"data": "x"}).status_code == 400


def test_the_commands_of_the_terminal(
    tiny: httpx.Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = []
    for name, data in (("a.png", PICTURE), ("b.png", PICTURE), ("c.wav", wav())):
        files.append(str(tmp_path / name))
        Path(files[-1]).write_bytes(data)

    def mico(*words: str, code: int = 0) -> str:
        command("teach", *words, "--api", str(tiny.base_url), code=code)
        said = capsys.readouterr()
        return said.out if code == 0 else said.err

    assert mico("Z", *files[:2]) == "Z: 2 pictures, for tiny\n"
    assert mico("Q", files[2]) == "Q: 1 sound, for tiny\n"
    assert mico("--list") == mico() == "Z: 2 pictures, for tiny\nQ: 1 sound, for tiny\n"
    assert mico("--rename", "Z", "W") == "W: 2 pictures, for tiny\n"
    mico("--export", str(tmp_path / "names.json"))
    assert len(json.loads((tmp_path / "names.json").read_text())["data"]) == 2
    assert mico("--forget", "W") == "Q: 1 sound, for tiny\n"
    assert "no name 'W' is taught; taught are: Q" in mico("--forget", "W", code=2)
    mico("--forget", "Q")
    assert mico("--import", str(tmp_path / "names.json")).startswith("W: 2 pictures")
    assert "give a NAME with its FILES, or one option" in mico("Z", files[0], "--list", code=2)
    assert "0 examples" in mico("Z", code=2)
    assert "No such file" in mico("Z", str(tmp_path / "none.png"), code=2)
    (tmp_path / "names.json").write_text("{")
    assert "names.json" in mico("--import", str(tmp_path / "names.json"), code=2)


def test_corrections_are_written_as_lines_with_their_media(
    tiny: httpx.Client,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def asked(*media: bytes, kind: str = "image", id_: str | None = None) -> str:
        files = [(kind, (f"{n}.bin", data)) for n, data in enumerate(media)]
        data = {"message": "?"} | ({"conversation_id": id_} if id_ else {})
        answer = tiny.post("/v1/chat", data=data, files=files)
        return str(answer.json()["conversation_id"])

    def written() -> tuple[list[Any], str]:
        command("teach", "--corrections", str(folder), "--api", str(tiny.base_url))
        rows = (folder / "corrections.jsonl").read_text().splitlines()
        return [json.loads(row) for row in rows], capsys.readouterr().out

    folder, seen, gone = tmp_path / "corrected", asked(PICTURE), asked(PICTURE)
    asked(id_=seen)  # a turn without a picture of its own, about the one before
    assert written()[0] == []
    teach(tiny, "d", PICTURE, conversation_id=seen, turn=1)
    teach(tiny, "Z", PICTURE, conversation_id=seen, turn=2)
    teach(tiny, "Q", wav(), kind="audio", conversation_id=asked(wav(), kind="audio"), turn=1)
    teach(tiny, "G", PICTURE, conversation_id=gone, turn=1)
    teach(tiny, "T", PICTURE, conversation_id=asked(PICTURE, PICTURE), turn=1)
    teach(tiny, "N", PICTURE, conversation_id=asked(wav(), kind="audio"), turn=1)
    tiny.delete(f"/v1/conversations/{gone}")
    rows, said = written()
    media = [row.pop("audio" if "audio" in row else "image") for row in rows]
    assert rows == [
        {"question": "What is this?", "answer": "A d."},
        {"question": "What is this?", "answer": "Z."},
        {"question": "What do you hear?", "answer": "Q."},
    ]
    assert [(folder / name).read_bytes() for name in media] == [PICTURE, PICTURE, wav()]
    assert f"G: left out, because of {gone}: " in said
    assert "T: left out" in said
    assert "turn 1 of 1, 2 media of the kind image" in said
    assert "turn 1 of 1, 0 media of the kind image" in said
    assert "corrections.jsonl: 3 corrections" in said
    tiny.delete(f"/v1/conversations/{seen}/turns/2")
    assert "Z: left out, because of " in (said := written()[1])
    assert "turn 2 of 1, 1 media" in said
    # What training reads takes them as they are.
    source = open_source(DataRecipe(path=str(folder / "corrections.jsonl")), "conversation")
    assert [source[n].turns[0].answer for n in range(len(source))] == ["A d.", "Q."]
    command("teach", "Z", "--corrections", str(folder), "--api", str(tiny.base_url), code=2)
    assert "one option" in capsys.readouterr().err
    # Without a file, tune takes those of this machine's server.
    here = nullcontext((str(tiny.base_url), None))
    monkeypatch.setattr("mico_ui.terminal.teach.local_server", lambda: here)
    command("tune", "--output", str(tmp_path / "mine"), code=2)
    said = capsys.readouterr().err
    assert "corrections.jsonl: 2 corrections" in said
    assert "the lines are about 2 media, and 12 or more are needed" in said


@pytest.mark.anyio
@BOTH
async def test_names_move_with_the_history_and_are_few(stores: Stores) -> None:
    store = TaughtStore(stores.database)
    one = TaughtName("Z", "image", np.full((1, 4), 0.5, np.float32), (3,))
    await store.add("local/b-1", one, "mini", "s")
    history = History(stores.database, stores.folder)
    await history.move("local", "key-1")
    assert await store.names("local", "s") == []
    (moved,) = await store.names("key-1/u", "s")
    assert (moved.name, moved.ids, moved.digest) == ("Z", (3,), one.digest)
    assert await store.names("key-1", "other") == []
    for n in range(1, MOST_NAMES):
        await store.add("key-1", TaughtName(str(n), "image", one.examples, (3,)), "mini", "s")
    with pytest.raises(LimitError, match="forget some"):
        await store.add("key-1", TaughtName("more", "image", one.examples, (3,)), "mini", "s")
    await store.add("key-1", one, "mini", "s")


def test_another_model_says_that_it_cannot_be_taught(start: Start, decoder: MediaDecoder) -> None:
    client = start(decoding_assistant(decoder, MicoChatConfig.tiny(concepts=False)))
    refused = teach(client, "Z", PICTURE)
    assert refused.status_code == 400
    assert "model: this model cannot be taught" in refused.json()["error"]["message"]
    assert not cached(client), "its questions are answered all the same"

"""Two models answer one question side by side: versions, which one is better, and its export."""

import json
import threading
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from mico_server.app import create_app
from mico_server.host import ModelSource
from mico_server.settings import ServerSettings
from tests.server.dialects.test_chat_turns import ask
from tests.server.support.running import error_of, live, wait_until_ready
from tests.support.fakes import FakeAssistant
from tests.support.waiting import PATIENCE_S, until


@contextmanager
def two_models(folder: Path, **gates: threading.Event) -> Iterator[httpx.Client]:
    """A service of the models ``a`` and ``b``; one with a gate answers once that is set."""
    made = {name: FakeAssistant(gates.get(name)) for name in "ab"}
    for name, assistant in made.items():
        assistant.name = name
    sources = [ModelSource(name, lambda name=name: made[name]) for name in made]  # type: ignore[misc]
    with live(create_app(sources, ServerSettings(data_dir=folder)), lifespan="on") as client:
        wait_until_ready(client)
        yield client


@pytest.fixture
def client(tmp_path: Path) -> Iterator[httpx.Client]:
    with two_models(tmp_path) as client:
        yield client


def beside(client: httpx.Client, first: dict[str, Any], message: str, **fields: str) -> Any:
    """The answer of ``b`` beside a turn."""
    given = {"conversation_id": first["conversation_id"], "beside": str(first["turn"]), **fields}
    return ask(client, message, model="b", **given)


def prefer(client: httpx.Client, better: dict[str, Any], over: int) -> httpx.Response:
    path = f"/v1/conversations/{better['conversation_id']}/turns/{better['turn']}/preference"
    return client.put(path, json={"over": over})


def path_of(client: httpx.Client, turn: dict[str, Any], **params: Any) -> list[Any]:
    url = f"/v1/conversations/{turn['conversation_id']}"
    shown = client.get(url, params=params).json()["turns"]
    return [(one["turn"], one["model"], one["rival"], one["preferred"]) for one in shown]


def exported(client: httpx.Client, **params: Any) -> list[dict[str, Any]]:
    response = client.get("/v1/preferences", params=params)
    assert response.headers["content-type"] == "application/jsonl"
    return [json.loads(line) for line in response.text.split("\n")[:-1]]


def test_the_better_answer_is_kept_and_exported_for_training(client: httpx.Client) -> None:
    zero = ask(client, "Zero?", ("image", ("cat.jpg", b"one")), model="a", system="Be brief.")
    chat = {"conversation_id": zero["conversation_id"]}
    one = ask(client, "One?", model="a", **chat)
    two = beside(client, one, "One?")
    # The chat goes on with the first one, and with its model, until somebody decides.
    assert path_of(client, one) == [(1, "a", None, None), (2, "a", 3, None)]
    assert client.get("/v1/conversations").json()["data"][0]["model"] == "a"
    assert exported(client) == []
    assert prefer(client, two, 2).json()["model"] == "b"
    assert path_of(client, one) == [(1, "a", None, None), (3, "b", 2, 3)]
    three = ask(client, "And?", **chat)
    assert (three["model"], path_of(client, one)[1:]) == (
        "b",
        [(3, "b", 2, 3), (4, "b", None, None)],
    )
    (row,) = exported(client)
    said = [(m["role"], m["content"]) for m in row["prompt"]]
    asked = [("user", "Zero?"), ("assistant", zero["answer"]), ("user", "One?")]
    assert said == [("system", "Be brief."), *asked]
    for name, answer in (("chosen", two), ("rejected", one)):
        assert row[name] == [{"role": "assistant", "content": answer["answer"]}]
    assert row["models"] == {"chosen": "b", "rejected": "a"}
    (medium,) = row["media"]
    assert (medium["kind"], medium["name"]) == ("image", "cat.jpg")
    assert client.get(f"/v1/media/{medium['id']}/content").content == b"one"
    # A changed mind, an edit of the question, and another answer beside.
    assert prefer(client, one, 3).status_code == 200
    assert exported(client)[0]["models"] == {"chosen": "a", "rejected": "b"}
    ask(client, "Other?", **chat, after="1")
    again = beside(client, two, "One?")  # beside the first one, as the other is
    assert prefer(client, again, 2).status_code == 200
    assert [row["models"]["chosen"] for row in exported(client)] == ["a", "b"]
    # An import keeps them; what is deleted takes its preference along.
    url = f"/v1/conversations/{zero['conversation_id']}"
    whole = client.get(url, params={"all_versions": True}).json()
    assert client.delete(f"{url}/turns/{again['turn']}").status_code == 200
    assert [row["models"]["chosen"] for row in exported(client)] == ["a"]
    assert client.delete(f"{url}/turns/2").status_code == 200
    assert exported(client) == []
    assert prefer(client, two, 2).status_code == 400
    assert client.post("/v1/conversations", json=whole).status_code == 201
    rows = exported(client)
    assert [row["models"]["chosen"] for row in rows] == ["a", "b"]
    assert rows[0]["prompt"] == row["prompt"]


def test_pictures_stand_in_the_pairs_where_they_were_shown(client: httpx.Client) -> None:
    """As TRL's collator of pictures wants it: a part for each, and in all rows the same columns."""
    picture, other = b"\xff\xd8\xff one", b"\x89PNG\r\n\x1a\n two"
    zero = ask(
        client, "Zero?", ("image", ("a.jpg", picture)), ("audio", ("b.wav", b"s")), model="a"
    )
    chat = {"conversation_id": zero["conversation_id"]}
    one = ask(client, "On\u2028e?", ("image", ("c.png", other)), model="a", **chat)
    turns = client.get(f"/v1/conversations/{one['conversation_id']}").json()["turns"]
    id_ = turns[1]["media"][0]["id"]
    prefer(client, beside(client, one, "On\u2028e?", image=f"media:{id_}"), one["turn"])
    plain = ask(client, "Two?", model="a", system="Be brief.")
    prefer(client, beside(client, plain, "Two?"), plain["turn"])
    shown, bare = exported(client, images=True)

    def text(said: str) -> dict[str, str]:
        return {"type": "text", "text": said}

    assert shown["images"] == [
        f"data:{mime};base64,{b64encode(data).decode()}"
        for mime, data in (("image/jpeg", picture), ("image/png", other))
    ]
    said = [message["content"] for message in shown["prompt"]]
    assert said == [
        [{"type": "image"}, text("Zero?")],
        [text(zero["answer"])],
        [{"type": "image"}, text("On\u2028e?")],
    ]
    assert shown["rejected"] == [{"role": "assistant", "content": [text(one["answer"])]}]
    assert [one["kind"] for one in shown["media"]] == ["image", "audio", "image"]
    assert (bare["images"], bare["prompt"][0]["content"]) == ([], [text("Be brief.")])
    assert shown.keys() == bare.keys()
    assert exported(client)[0]["prompt"][2]["content"] == "On\u2028e?"
    assert "images" not in exported(client)[0]
    assert client.get("/v1/preferences?images=all").status_code == 400


def test_what_cannot_be_beside_or_better_is_refused(client: httpx.Client) -> None:
    one = ask(client, "One?", model="a")
    chat = {"conversation_id": one["conversation_id"], "message": "One?"}
    other = ask(client, "Elsewhere?", model="a")
    refused: list[tuple[dict[str, str], int, str]] = [
        ({**chat, "message": "Two?", "beside": "1"}, 400, "asks something else"),
        ({**chat, "beside": "7"}, 404, "no turn 7"),
        ({**chat, "beside": "1", "after": "0"}, 400, "beside says where"),
        ({"message": "One?", "beside": "1"}, 400, "conversation_id does not say where"),
        (
            {**chat, "conversation_id": "conv-" + 24 * "0", "create": "true", "beside": "1"},
            404,
            "no",
        ),
    ]
    for form, status, said in refused:
        response = client.post("/v1/chat", data=form)
        assert response.status_code == status, form
        assert said in error_of(response)["message"], form
    assert path_of(client, one, all_versions=True) == [(1, "a", None, None)], "nothing is left"
    for better, over in ((one, 1), (one, 2), (other, 7)):
        assert "was not answered beside" in error_of(prefer(client, better, over))["message"]
    assert prefer(client, {**one, "turn": 9}, 1).status_code == 404
    assert exported(client) == []


def test_both_are_answered_at_the_same_time_and_each_may_leave(tmp_path: Path) -> None:
    gates = {"a": threading.Event(), "b": threading.Event()}
    with two_models(tmp_path, **gates) as client, ThreadPoolExecutor(2) as pool:
        gates["a"].set()
        zero = ask(client, "Zero?", model="a")
        gates["a"].clear()
        chat = {"conversation_id": zero["conversation_id"]}
        first = pool.submit(ask, client, "One?", model="a", **chat)
        url = f"/v1/conversations/{zero['conversation_id']}"
        until(lambda: len(client.get(url).json()["turns"]) == 2)
        one = {**chat, "turn": 2}
        second = pool.submit(beside, client, one, "One?")
        until(lambda: len(client.get(f"{url}?all_versions=true").json()["turns"]) == 3)
        third = client.post("/v1/chat", data={"message": "One?", "beside": "2", **chat})
        assert third.status_code == 409
        assert prefer(client, {**one, "turn": 3}, 2).status_code == 409
        gates["b"].set()
        assert second.result(PATIENCE_S)["turn"] == 3
        assert path_of(client, one)[-1] == (2, "a", 3, None), "the first one still waits"
        gates["a"].set()
        assert first.result(PATIENCE_S)["turn"] == 2
        assert path_of(client, one)[-1] == (2, "a", 3, None)
        refused = client.post("/v1/chat", data={"message": "refuse", "model": "a", **chat})
        assert refused.status_code == 400
        assert path_of(client, one)[-1] == (2, "a", 3, None)

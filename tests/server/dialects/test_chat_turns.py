"""Conversations over HTTP: several turns of /v1/chat, and what /v1/conversations does with them."""

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from mico_chat.media import MediaFile
from mico_chat.messages import Message
from tests.server.conftest import Start
from tests.server.support.running import error_of, events_of, new_key
from tests.support.fakes import EXPLAINED, FakeAssistant
from tests.support.waiting import PATIENCE_S


def ask(
    client: httpx.Client, message: str, *files: tuple[str, Any], **fields: str
) -> dict[str, Any]:
    """The answer to a message, which must be one."""
    data = {"message": message, **fields}
    response = client.post("/v1/chat", data=data, files=list(files) or None)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def shown(message: Message) -> list[tuple[str, str, int]]:
    reports = [m.report for m in message.media if not isinstance(m, MediaFile)]
    return [(report.kind, report.name, report.bytes) for report in reports]


def test_earlier_media_need_not_be_sent_again(start: Start) -> None:
    assistant = FakeAssistant()
    client = start(assistant)
    first = ask(client, "What?", ("image", ("cat.jpg", b"one")), ("audio", ("purr.ogg", b"three")))
    second = ask(
        client, "And this?", ("image", ("dog.jpg", b"a")), conversation_id=first["conversation_id"]
    )
    form = {"message": "Sure?", "conversation_id": first["conversation_id"], "stream": "true"}
    third = events_of(client.post("/v1/chat", data=form).text)[-1][1]
    assert [a["turn"] for a in (first, second, third)] == [1, 2, 3]
    assert len({a["conversation_id"] for a in (first, second, third)}) == 1
    asked = assistant.asked[-1]
    assert [m.role for m in asked] == ["user", "assistant"] * 2 + ["user"]
    answers = (first["answer"], second["answer"])
    assert [m.text for m in asked] == ["What?", answers[0], "And this?", answers[1], "Sure?"]
    assert shown(asked[0]) == [("image", "cat.jpg", 3), ("audio", "purr.ogg", 5)]
    assert shown(asked[2]) == [("image", "dog.jpg", 1)]
    assert [report["name"] for report in third["media"]] == ["cat.jpg", "purr.ogg", "dog.jpg"]
    assert third["usage"]["media_tokens"] == 3


def test_a_conversation_outlives_the_service(start: Start) -> None:
    one = start(FakeAssistant())
    first = ask(one, "What?", ("depth", ("room.png", b"far")))
    assistant = FakeAssistant()
    again = ask(start(assistant), "And?", conversation_id=first["conversation_id"])
    assert again["turn"] == 2
    assert shown(assistant.asked[0][0]) == [("depth", "room.png", 3)]
    for system, expected in (("One.", "One."), (None, "One."), ("Two.", "Two.")):
        given = {} if system is None else {"system": system}
        ask(one, "Go on.", conversation_id=first["conversation_id"], **given)
        kept = one.get(f"/v1/conversations/{first['conversation_id']}").json()
        assert kept["system"] == expected


def test_a_turn_is_told_as_it_was(start: Start) -> None:
    client = start(FakeAssistant())
    answer = ask(client, "What?", ("video", ("a.mp4", b"xx")), system="Be kind.")
    told = client.get(f"/v1/conversations/{answer['conversation_id']}").json()
    (turn,) = told.pop("turns")
    assert (told["title"], told["system"], told["model"]) == ("What?", "Be kind.", "fake")
    assert (turn["turn"], turn["message"], turn["answer"]) == (1, "What?", answer["answer"])
    assert (turn["finish_reason"], turn["usage"]) == ("stop", answer["usage"])
    assert turn["reports"] == answer["media"]
    (medium,) = turn["media"]
    assert (medium["kind"], medium["name"]) == ("video", "a.mp4")
    assert client.get(f"/v1/media/{medium['id']}/content").content == b"xx"


def test_nothing_is_stored_if_not_wanted(start: Start) -> None:
    client = start(FakeAssistant())
    answer = ask(client, "Secret", ("image", ("a.png", b"x")), store="false", system="Be brief.")
    assert (answer["conversation_id"], answer["turn"]) == (None, None)
    assert client.get("/v1/conversations").json()["data"] == []
    assert client.get("/v1/media").json()["data"] == []
    id_ = ask(client, "Hi")["conversation_id"]
    form = {"message": "x", "store": "false", "conversation_id": id_}
    refused = client.post("/v1/chat", data=form)
    assert refused.status_code == 400
    assert error_of(refused)["param"] == "store"


def test_ids_that_show_nothing(start: Start) -> None:
    client = start(FakeAssistant())
    id_ = client.post("/v1/media", files={"image": ("kept.png", b"kept")}).json()["id"]
    for kind, value, status, code in (
        ("audio", f"media:{id_}", 400, "request_error"),
        ("image", "media:media-000000000000000000000000", 404, "not_found_error"),
        ("image", "media:../../etc/passwd", 404, "not_found_error"),
        ("image", id_, 400, "request_error"),
    ):
        response = client.post("/v1/chat", data={"message": "x", kind: value})
        assert (response.status_code, error_of(response)["code"]) == (status, code), value


def test_one_question_of_a_conversation_at_a_time(start: Start) -> None:
    assistant = FakeAssistant(gate := threading.Event())
    client = start(assistant)
    gate.set()
    id_ = ask(client, "one")["conversation_id"]
    assert assistant.started.acquire(timeout=PATIENCE_S)
    gate.clear()
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(ask, client, "two", conversation_id=id_)
        assert assistant.started.acquire(timeout=PATIENCE_S)
        for stream in ("true", "false"):
            form = {"message": "three", "conversation_id": id_, "stream": stream}
            refused = client.post("/v1/chat", data=form)
            assert (refused.status_code, error_of(refused)["code"]) == (409, "conflict_error")
        gate.set()
        assert second.result()["turn"] == 2
    assert ask(client, "three", conversation_id=id_)["turn"] == 3


def test_turns_taken_back_and_asked_again(start: Start) -> None:
    assistant = FakeAssistant()
    client = start(assistant)
    id_ = ask(client, "one")["conversation_id"]
    ask(client, "two", ("image", ("cat.jpg", b"meow")), conversation_id=id_)
    turns = f"/v1/conversations/{id_}/turns"
    medium = client.get(f"/v1/conversations/{id_}").json()["turns"][1]["media"][0]["id"]
    for number, status in ((3, 404), (0, 404), (-1, 404), ("x", 400)):
        assert client.delete(f"{turns}/{number}").status_code == status
    assert client.delete(f"{turns}/2").json() == {"id": id_, "deleted": True}
    again = ask(client, "two, please", conversation_id=id_, image=f"media:{medium}")
    assert again["turn"] == 3, "whoever saw turn 2 must not take another one for it"
    assert [m.text for m in assistant.asked[-1]] == ["one", "[] one", "two, please"]
    assert shown(assistant.asked[-1][2]) == [("image", "cat.jpg", 4)]


def test_a_tab_cannot_delete_a_turn_that_it_did_not_see(start: Start) -> None:
    client = start(FakeAssistant())
    id_ = ask(client, "one")["conversation_id"]
    ask(client, "two", conversation_id=id_)
    last = f"/v1/conversations/{id_}/turns/2?turns=1"
    assert client.delete(last).status_code == 200
    assert ask(client, "three", conversation_id=id_)["turn"] == 3
    form = {"message": "four", "conversation_id": id_, "after": "2"}
    assert client.delete(last).status_code == client.post("/v1/chat", data=form).status_code == 404
    turns = client.get(f"/v1/conversations/{id_}").json()["turns"]
    assert [turn["message"] for turn in turns] == ["one", "three"]


def test_a_refused_question_and_an_import_keep_the_chosen_version(start: Start) -> None:
    client = start(FakeAssistant())
    id_ = ask(client, "one")["conversation_id"]
    ask(client, "two", conversation_id=id_, after="0")
    path = f"/v1/conversations/{id_}"
    client.patch(path, json={"turn": 1})

    def shown(path: str) -> tuple[str, list[str]]:
        found = client.get(path).json()
        return found["title"], [turn["message"] for turn in found["turns"]]

    refused = {"message": "refuse", "conversation_id": id_, "after": "0"}
    assert client.post("/v1/chat", data=refused).status_code == 400
    assert shown(path) == ("two", ["one"])
    exported = client.get(f"{path}?all_versions=true").json()
    new = client.post("/v1/conversations", json=exported).json()["id"]
    assert shown(f"/v1/conversations/{new}") == ("two", ["one"])


def test_conversations_are_listed_renamed_and_deleted(start: Start) -> None:
    client = start(FakeAssistant())
    ids = {title: ask(client, title)["conversation_id"] for title in ("one", "two", "three")}

    def listed(**parameters: Any) -> tuple[list[str], bool]:
        body = client.get("/v1/conversations", params=parameters).json()
        return [info["title"] for info in body["data"]], body["has_more"]

    assert listed(limit=2) == (["three", "two"], True)
    assert listed(limit=2, before=ids["two"]) == (["one"], False)
    assert listed(query="TWO") == (["two"], False)
    url = f"/v1/conversations/{ids['three']}"
    assert client.patch(url, json={"title": "Three"}).json()["title"] == "Three"
    bad: list[Any] = [{"title": title} for title in (" ", "x" * 201, "a\0b", 7)]
    bad += [{"system": 7}, {"system": "a\0b"}, {"pinned": None}, {"archived": "perhaps"}]
    for body in (*bad, {}, [], {"title": "a", "id": "b"}):
        assert client.patch(url, json=body).status_code == 400
    assert client.delete(url).json() == {"id": ids["three"], "deleted": True}
    assert client.get(url).status_code == client.delete(url).status_code == 404
    for query in ("limit=0", "limit=101", "query=a%00b", "query=" + "x" * 1001):
        assert client.get(f"/v1/conversations?{query}").status_code == 400


def test_conversations_are_pinned_and_archived(start: Start) -> None:
    client = start(FakeAssistant())
    ids = {title: ask(client, title)["conversation_id"] for title in "abcde"}

    def change(title: str, **changes: bool) -> None:
        told = client.patch(f"/v1/conversations/{ids[title]}", json=changes).json()
        assert {name: told[name] for name in changes} == changes

    def listed(**parameters: Any) -> str:
        body = client.get("/v1/conversations", params=parameters).json()
        return "".join(info["title"] for info in body["data"])

    for title in "bd":
        change(title, pinned=True)
    assert listed() == "dbeca"
    pages: list[str] = []
    before: dict[str, str] = {}
    while page := client.get("/v1/conversations", params={"limit": 1, **before}).json()["data"]:
        pages.append(page[0]["title"])
        before = {"before": page[0]["id"]}
    assert pages == list("dbeca"), "pages go on behind the pinned ones"
    ask(client, "b again", conversation_id=ids["b"])
    change("d", archived=True)
    change("c", archived=True)
    assert (listed(archived=False), listed(archived=True)) == ("bea", "dc")
    assert (listed(pinned=True), listed(pinned=False, archived=False)) == ("bd", "ea")
    (found,) = client.get("/v1/conversations", params={"query": "c"}).json()["data"]
    assert (found["title"], found["archived"], found["pinned"]) == ("c", True, False)
    change("d", archived=False, pinned=False)
    assert listed(archived=False) == "beda"


def test_a_system_prompt_that_is_set_during_an_answer_stays(start: Start) -> None:
    assistant = FakeAssistant(gate := threading.Event())
    client = start(assistant)
    id_ = "conv-" + "0" * 24
    url = f"/v1/conversations/{id_}"
    for number, given in enumerate(({"create": "true", "system": "Old."}, {"system": "Else."}, {})):
        gate.clear()
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(ask, client, "Hi", conversation_id=id_, **given)
            assert assistant.started.acquire(timeout=PATIENCE_S)
            before = client.get(url).json()["system"]
            new = f"New {number}."
            assert client.patch(url, json={"system": new}).json()["system"] == new
            gate.set()
            asked.result()
        assert assistant.asked[-1][0] == Message.system(given.get("system", before))
        assert client.get(url).json()["system"] == new
    assert client.patch(url, json={"system": None}).json()["system"] is None
    ask(client, "Hi", conversation_id=id_)
    assert [message.role for message in assistant.asked[-1][:1]] == ["user"]


def test_media_of_a_conversation_are_pinned(start: Start) -> None:
    client = start(FakeAssistant())
    first = ask(client, "What?", ("image", ("cat.jpg", b"one")), ("image", ("dog.jpg", b"two")))
    url = f"/v1/conversations/{first['conversation_id']}"

    def pinned(path: str = url) -> list[list[bool]]:
        turns = client.get(path, params={"all_versions": True}).json()["turns"]
        return [[one["pinned"] for one in turn["media"]] for turn in turns]

    cat, dog = (one["id"] for one in client.get(url).json()["turns"][0]["media"])
    assert client.patch(url, json={"pinned_media": {dog: True}}).status_code == 200
    # Another version of the question shows the same media.
    again = {"conversation_id": first["conversation_id"], "after": "0"}
    client.post("/v1/chat", data={"message": "Who?", "image": f"media:{dog}", **again})
    assert pinned() == [[False, True], [True]]
    wrong = f"media-{7:024x}"
    assert (
        wrong
        in error_of(client.patch(url, json={"pinned_media": {dog: False, wrong: True}}))["message"]
    )
    assert pinned() == [[False, True], [True]], "all or nothing"
    for bad in ({}, {dog: "perhaps"}, [dog], {"": True}):
        assert client.patch(url, json={"pinned_media": bad}).status_code in (400, 404)
    exported = client.get(url, params={"all_versions": True}).json()
    copied = client.post("/v1/conversations", json=exported).json()["id"]
    assert pinned(f"/v1/conversations/{copied}") == pinned()
    assert client.patch(url, json={"pinned_media": {dog: False, cat: True}}).status_code == 200
    assert pinned() == [[True, False], [False]]


def test_what_a_stored_answer_rests_on(start: Start) -> None:
    assistant = FakeAssistant()
    client = start(assistant)
    first = ask(client, "One?", ("image", ("a.png", b"x")))
    id_ = first["conversation_id"]
    second = ask(client, "Two?", ("audio", ("b.wav", b"y")), conversation_id=id_)
    url = f"/v1/conversations/{id_}/turns"
    for turn, kinds, said in ((1, ["image"], first), (2, ["image", "audio"], second)):
        response = client.post(f"{url}/{turn}/explanation")
        assert (response.status_code, response.json()) == (200, EXPLAINED.model_dump(mode="json"))
        messages, answer, tenant = assistant.explained[-1]
        assert [m.kind for message in messages for m in message.media] == kinds
        assert messages[-1].text == ("One?", "Two?")[turn - 1]
        assert (answer, tenant) == (said["answer"], assistant.tenants[0])
    for turn in (0, 3):
        response = client.post(f"{url}/{turn}/explanation")
        assert response.status_code == 404
        assert f"no turn {turn}" in error_of(response)["message"]
    plain = ask(client, "Hi")["conversation_id"]
    response = client.post(f"/v1/conversations/{plain}/turns/1/explanation")
    assert (response.status_code, error_of(response)["message"]) == (400, "explain: no medium")


def test_a_conversation_begins_with_an_id_of_the_clients_own(start: Start, tmp_path: Path) -> None:
    client = start(FakeAssistant())
    id_ = f"conv-{7:024x}"
    assert client.post("/v1/chat", data={"message": "x", "conversation_id": id_}).status_code == 404
    for turn in (1, 2):
        answer = ask(client, "Hi", conversation_id=id_, create="true")
        assert (answer["conversation_id"], answer["turn"]) == (id_, turn)
    for form, status in (
        ({"conversation_id": "mine", "create": "true"}, 404),
        ({"create": "true"}, 400),
        ({"conversation_id": id_, "create": "true", "store": "false"}, 400),
    ):
        assert client.post("/v1/chat", data={"message": "x", **form}).status_code == status
    # Another tenant does not get into it, and does not hear of it.
    client.headers["authorization"] = f"Bearer {new_key(tmp_path / 'data', 'bob', tenant='bob')}"
    form = {"message": "x", "conversation_id": id_, "create": "true"}
    refused = client.post("/v1/chat", data=form)
    assert (refused.status_code, error_of(refused)["code"]) == (404, "not_found_error")


def test_a_question_that_is_refused_leaves_nothing_but_its_uploads(start: Start) -> None:
    client = start(FakeAssistant())
    kept = client.post("/v1/media", files={"image": ("kept.png", b"kept")}).json()["id"]
    id_ = f"conv-{7:024x}"
    for message, data, stream, status in (
        ("refuse", b"x", "true", 400),
        ("refuse", b"x", "false", 400),
        ("Hi", b"broken", "true", 422),
        ("crash", b"x", "true", 500),
        ("crash", b"x", "false", 500),
    ):
        form = {"message": message, "conversation_id": id_, "create": "true", "stream": stream}
        files: list[Any] = [("image", ("new.png", data)), ("image", (None, f"media:{kept}"))]
        response = client.post("/v1/chat", data=form, files=files)
        assert response.status_code == status
        assert "secret" not in error_of(response)["message"]
        assert client.get("/v1/conversations").json()["data"] == []
        assert [m["id"] for m in client.get("/v1/media").json()["data"]] == [kept]


def test_a_question_is_seen_while_it_is_answered(start: Start) -> None:
    assistant = FakeAssistant(gate := threading.Event())
    client = start(assistant)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, client, "one", ("image", ("a.png", b"xx")))
        assert assistant.started.acquire(timeout=PATIENCE_S)
        (info,) = client.get("/v1/conversations").json()["data"]
        url = f"/v1/conversations/{info['id']}"
        (turn,) = client.get(url).json()["turns"]
        assert (turn["message"], turn["answer"], turn["reports"]) == ("one", "", [])
        assert turn["finish_reason"] == "unanswered"
        # Nobody else may ask in it, though its id is the server's.
        form = {"message": "two", "conversation_id": info["id"]}
        assert client.post("/v1/chat", data=form).status_code == 409
        gate.set()
        answer = asked.result()
    (turn,) = client.get(url).json()["turns"]
    assert (turn["answer"], turn["finish_reason"]) == (answer["answer"], "stop")
    (medium,) = turn["media"]
    assert client.get(f"/v1/media/{medium['id']}").json()["report"] == answer["media"][0]


def test_a_conversation_is_imported_as_it_was_exported(start: Start) -> None:
    client = start(FakeAssistant())
    first = ask(client, "One?", ("image", ("a.png", b"x")))
    id_ = first["conversation_id"]
    for message, after in (("Two?", 1), ("Gone?", 2), ("Zwei?", 1)):
        ask(client, message, conversation_id=id_, after=str(after))
    url = f"/v1/conversations/{id_}"
    assert client.delete(f"{url}/turns/3").status_code == 200
    order = {"title": "Mine", "system": "Rhyme.", "pinned": True, "archived": True}
    client.patch(url, json=order)
    exported = client.get(url, params={"all_versions": True}).json()
    tree = [(turn["turn"], turn["parent"]) for turn in exported["turns"]]
    assert tree == [(1, 0), (2, 1), (4, 1)]
    copy = client.post("/v1/conversations", json=exported)
    assert copy.status_code == 201, copy.text
    assert order.items() <= copy.json().items()
    there = f"/v1/conversations/{copy.json()['id']}"
    found = client.get(there, params={"all_versions": True}).json()["turns"]
    assert [(turn["turn"], turn["parent"]) for turn in found] == [(1, 0), (2, 1), (3, 1)]
    for old, new in zip(exported["turns"], found, strict=True):
        changed = {name for name in old if new[name] != old[name]}
        assert changed <= {"turn", "versions"}, changed
    client.delete(url)
    last = ask(client, "And?", conversation_id=copy.json()["id"])
    assert last["answer"].startswith("[image a.png]")
    listed = client.get("/v1/conversations").json()["data"]
    wrong: list[tuple[dict[str, Any], int, str]] = [
        ({"turns": []}, 400, "turns"),
        ({"turns": [exported["turns"][1]]}, 400, r"turns\[0\]: turn 2 behind 1"),
        ({"turns": exported["turns"][:1] * 2}, 400, r"turns\[1\]: turn 1 behind 0"),
        ({"title": ""}, 400, "title"),
        ({"pinned": "perhaps"}, 400, "pinned"),
        (
            {"turns": [{**exported["turns"][0], "created_at": 2**60}]},
            400,
            r"turns\[0\].*created_at",
        ),
    ]
    other = {**exported["turns"][0], "media": [{"kind": "image", "id": "media-0", "name": "a"}]}
    wrong.append(({"turns": [other]}, 404, "no medium"))
    for changes, status, said in wrong:
        response = client.post("/v1/conversations", json={**exported, **changes})
        assert response.status_code == status, changes
        assert re.search(said, error_of(response)["message"]), changes
    assert client.get("/v1/conversations").json()["data"] == listed, "nothing is left of them"

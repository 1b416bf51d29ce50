"""Two users with two tabs each do what comes to their mind, and the service is killed in between.

A model of the store predicts each answer, and what is stored after it. A tab acts on what it saw
last. Nothing that was acknowledged is lost but by a tab that had seen it.
"""

import io
import itertools
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import httpx
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test
from PIL import Image

from benchmarks.http_client import address_of, form_request, request
from mico_server.store.conversations import UNTITLED
from tests.support.waiting import PATIENCE_S, until
from tests.ui.live import FakeServer

WORDS = ("cat", "dog", "sun")
PICTURES = [io.BytesIO() for _ in range(3)]  # few, so that chats share their files
for shade, file in enumerate(PICTURES):
    Image.new("L", (8, 8), 50 * shade).save(file, "png")
NUMBERS = itertools.count(1)
ACTIONS = ["ask"] * 3 + ["edit"] * 4 + ["delete_turn", "see"] * 2 + ["refused", "stop", "meanwhile"]
ACTIONS += ["choose", "rename", "export_and_import", "search", "delete_chat"]
ACTIONS += ["kill_answer", "kill_amid", "kill"]


class Drawn(NamedTuple):
    """What an action is about: the tab, a chat and a turn of it, and how it goes."""

    at: int
    which: int
    turn: int
    one: int
    two: int
    yes: bool


PICK, FEW = st.integers(0, 999), st.integers(0, 2)
DRAWN = st.builds(Drawn, st.integers(0, 3), PICK, PICK, FEW, FEW, st.booleans())


@dataclass(frozen=True)
class Medium:
    id: str
    name: str
    picture: int


@dataclass
class Said:
    """A turn; ``mark`` distinguishes it from another turn of the same number."""

    parent: int
    message: str
    media: tuple[Medium, ...]
    answer: str = ""
    finish: str = "unanswered"
    mark: int = field(default_factory=NUMBERS.__next__)


@dataclass
class Chat:
    title: str = UNTITLED
    turns: dict[int, Said] = field(default_factory=dict)
    head: int = 0
    last: int = 0  # a number is never given twice

    def path(self, number: int) -> list[int]:
        return [*self.path(self.turns[number].parent), number] if number else []

    def behind(self, number: int) -> set[int]:
        children = [n for n, said in self.turns.items() if said.parent == number]
        return {number}.union(*map(self.behind, children))

    def leaf(self, number: int) -> int:
        """The end of the newest path through a turn."""
        known = self.behind(number) - {said.parent for said in self.turns.values()}
        return max(known, default=0)

    def firsts(self) -> list[str]:
        return [said.message for said in self.turns.values() if said.parent == 0]

    def add(self, said: Said) -> int:
        if said.parent == 0 and self.title in (UNTITLED, *self.firsts()):
            self.title = said.message
        same = [
            n
            for n, one in self.turns.items()
            if (one.parent, one.message, one.media) == (said.parent, said.message, said.media)
            and (one.finish, one.answer) == ("unanswered", "")
            and self.behind(n) == {n}
        ]
        self.last = self.head = self.last + 1
        self.turns[self.head] = said
        for n in same:
            del self.turns[n]
        return self.head

    def drop(self, number: int) -> None:
        parent, gone = self.turns[number].parent, self.behind(number)
        left = {n: said for n, said in self.turns.items() if n not in gone}
        first, self.turns = self.turns[number].message, left
        if parent == 0 and self.title == first:
            self.title = next(reversed(self.firsts()), UNTITLED)
        if self.head not in left:
            self.head = self.leaf(parent)

    def renumbered(self, ids: dict[str, str]) -> "Chat":
        """The chat as it is imported, its media with new ids."""
        numbers = {0: 0} | {n: new for new, n in enumerate(sorted(self.turns), 1)}
        chat = Chat(self.title, {}, numbers[self.head], len(self.turns))
        for n, said in sorted(self.turns.items()):
            media = tuple(replace(one, id=ids[one.id]) for one in said.media)
            copied = replace(said, parent=numbers[said.parent], media=media, mark=next(NUMBERS))
            chat.turns[numbers[n]] = copied
        return chat


@dataclass
class Tab:
    """``seen`` has the chats that the tab shows, and ``state`` is the state that it knows."""

    user: str
    seen: dict[str, Chat] = field(default_factory=dict)
    state: str = ""


class Store(RuleBasedStateMachine):
    server: ClassVar[FakeServer]
    actions: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        users = [f"user-{next(NUMBERS)}" for _ in range(2)]
        self.chats: dict[str, dict[str, Chat]] = {user: {} for user in users}
        self.tabs = [Tab(user) for user in users for _ in range(2)]
        self.http = httpx.Client(base_url=self.server.url, trust_env=False, timeout=PATIENCE_S)

    def teardown(self) -> None:
        self.server.allow()
        for tab in self.tabs:
            self._look(tab)
        for user in self.chats:
            self._check(user, *self.chats[user])
        self.http.close()

    # --- what tabs do ---

    @rule(do=st.sampled_from(ACTIONS), how=DRAWN)
    def act(self, do: str, how: Drawn) -> None:
        type(self).actions += 1
        tab = self.tabs[how.at]
        if not tab.seen:
            self._look(tab)
        ids = sorted(tab.seen)
        if not ids and do not in ("see", "kill", "search"):
            do = "ask"
        id_ = ids[how.which % len(ids)] if ids else ""
        getattr(self, f"_{do}")(tab, id_, tab.seen.get(id_, Chat()), how)

    def _ask(self, tab: Tab, id_: str, chat: Chat, how: Drawn) -> None:
        """At the end, or in a new chat."""
        form = self._form(id_, chat.head, how.one)
        if not id_ or not how.turn % 4:
            form = {
                name: one for name, one in form.items() if name not in ("conversation_id", "after")
            }
        self._answered(tab, form, stream=how.yes)

    def _edit(self, tab: Tab, id_: str, chat: Chat, how: Drawn) -> None:
        """A turn asked again, or changed: its words, and some of its media."""
        if form := self._edited(id_, chat, how, same=how.yes):
            self._answered(tab, form, stream=False)

    def _refused(self, tab: Tab, id_: str, chat: Chat, how: Drawn) -> None:
        if form := self._edited(id_, chat, how):
            form["message"] = f"refuse {form['message']}"
            expected = 404 if self._place(tab, form) is None else 400
            assert self._send(tab, form).status_code == expected
            self._check(tab.user, id_)

    def _stop(self, tab: Tab, id_: str, chat: Chat, how: Drawn) -> None:
        """An answer is stopped after its first word."""
        form = self._edited(id_, chat, how, same=how.yes)
        if not form or self._place(tab, form) is None:
            return
        with self._held(tab, form) as (found, number, words, _):
            said, word = found.turns[number], words.split(" ")[0] + " "
        until(lambda: self._turn(tab, id_, number)["finish_reason"] != "unanswered")
        stored = self._turn(tab, id_, number)
        said.answer, said.finish = stored["answer"], stored["finish_reason"]
        assert said.answer.startswith(word)
        assert said.finish == "cancelled" or (said.finish, said.answer) == ("stop", words)
        self._check(tab.user, id_)

    def _kill_answer(self, tab: Tab, id_: str, chat: Chat, how: Drawn) -> None:
        """The service is killed after the first word, perhaps when it has been kept."""
        form = self._edited(id_, chat, how)
        if not form or self._place(tab, form) is None:
            return
        with self._held(tab, form) as (found, number, words, _):
            word = words.split(" ")[0] + " "
            if how.yes:  # what has been shown for a second or so is kept
                until(lambda: self._turn(tab, id_, number)["answer"] == word)
            self._restart()
        found.turns[number].answer = self._turn(tab, id_, number)["answer"]
        assert found.turns[number].answer in ((word,) if how.yes else (word, ""))
        self._check(tab.user, id_)

    def _meanwhile(self, tab: Tab, id_: str, chat: Chat, how: Drawn) -> None:
        """The other tab changes a chat while an answer grows in it."""
        form, other = self._edited(id_, chat, how), self.tabs[how.at ^ 1]
        if not form or self._place(tab, form) is None:
            return
        with self._held(tab, form) as (found, number, words, events):
            self._look(other)
            busy = {"message": "busy", "conversation_id": id_}
            assert self._send(other, busy).status_code == 409
            changes = (self._delete_turn, self._delete_chat, self._choose, self._rename)
            changes[how.turn % 4](other, id_, other.seen[id_], how)
            self.server.allow()
            end, told = list(events)[-1]
            if number in self.chats[tab.user].get(id_, Chat()).turns:
                assert (end, told["answer"]) == ("done", words)
                found.turns[number].answer, found.turns[number].finish = words, "stop"
            else:
                assert end == "error"
        self._check(tab.user, id_)

    def _choose(self, tab: Tab, id_: str, chat: Chat, how: Drawn) -> None:
        number = self._picked(chat, how)
        answer = self._call(tab, "PATCH", f"/{id_}", json={"turn": number})
        found = self.chats[tab.user].get(id_, Chat())
        assert answer.status_code == (200 if number in found.turns else 404)
        if number in found.turns:
            found.head = found.leaf(number)
        self._check(tab.user, id_)

    def _delete_turn(self, tab: Tab, id_: str, chat: Chat, how: Drawn) -> None:
        number = self._picked(chat, how)
        if not number:
            return
        seen = {chat.turns[n].mark for n in chat.behind(number)}
        path = f"/{id_}/turns/{number}?turns={len(seen)}"
        status = self._call(tab, "DELETE", path).status_code
        found = self.chats[tab.user].get(id_, Chat())
        if number not in found.turns:
            assert status == 404
        elif len(found.behind(number)) != len(seen):
            assert status == 409
        else:
            assert status == 200
            gone = {found.turns[n].mark for n in found.behind(number)}
            assert gone == seen, "it deleted what it did not see"
            found.drop(number)
        self._check(tab.user, id_)

    def _delete_chat(self, tab: Tab, id_: str, chat: Chat, how: Drawn) -> None:
        known = self.chats[tab.user].pop(id_, None)
        assert self._call(tab, "DELETE", f"/{id_}").status_code == (200 if known else 404)
        self._check(tab.user, id_)

    def _rename(self, tab: Tab, id_: str, chat: Chat, how: Drawn) -> None:
        title = f"about {WORDS[how.one]} {next(NUMBERS)}"
        answer = self._call(tab, "PATCH", f"/{id_}", json={"title": title})
        known = self.chats[tab.user].get(id_)
        assert answer.status_code == (200 if known else 404)
        if known:
            known.title = title
        self._check(tab.user, id_)

    def _export_and_import(self, tab: Tab, id_: str, chat: Chat, how: Drawn) -> None:
        """An import that is killed has stored the whole chat, or nothing of it."""
        chats = self.chats[tab.user]
        if id_ not in chats or not chats[id_].turns:
            return
        exported = self._call(tab, "GET", f"/{id_}?all_versions=true").json()
        ids: dict[str, str] = {}
        for medium in (one for said in exported["turns"] for one in said["media"]):
            if medium["id"] not in ids:
                path = f"/v1/media/{medium['id']}/content"
                file = (medium["name"], self.http.get(path, headers=_user(tab)).content)
                new = self.http.post("/v1/media", files={"image": file}, headers=_user(tab))
                ids[medium["id"]] = new.json()["id"]
            medium["id"] = ids[medium["id"]]
        if how.turn % 4:
            new = self._call(tab, "POST", "", json=exported)
            assert new.status_code == 201, new.text
        else:
            sent = request("POST", "/v1/conversations", json=exported, headers=_user(tab))
            self._killed_amid(sent, how.one + how.two)
        listed, more = list[Any](), True
        while more:
            after = f"&after={listed[-1]['id']}" if listed else ""
            page = self._call(tab, "GET", f"?limit=100{after}").json()
            listed, more = listed + page["data"], page["has_more"]
        for new_id in {one["id"] for one in listed} - set(chats):
            chats[new_id] = chats[id_].renumbered(ids)
            self._check(tab.user, new_id)

    def _kill_amid(self, tab: Tab, id_: str, chat: Chat, how: Drawn) -> None:
        """The service is killed while it does something: it has done all of it, or nothing."""
        before = self.chats[tab.user].get(id_, Chat())
        if not before.turns:
            return
        path, after, last = f"/v1/conversations/{id_}", deepcopy(before), max(before.turns)
        if how.one == 0:
            sent = request("DELETE", path, headers=_user(tab))
        elif how.one == 1:
            after.drop(last)
            sent = request("DELETE", f"{path}/turns/{last}", headers=_user(tab))
        else:
            form = self._form(id_, before.head, 1)
            files = form.pop("files")
            del form["image"]
            sent = form_request("/v1/chat", form, files, _user(tab))
            number = after.add(Said(form["after"], form["message"], ()))
        self._killed_amid(sent, how.two + how.which % 5)
        answer = self._call(tab, "GET", f"/{id_}?all_versions=true")
        if answer.status_code == 404:
            assert how.one == 0
            del self.chats[tab.user][id_]
        elif how.one and {one["turn"] for one in answer.json()["turns"]} == set(after.turns):
            self.chats[tab.user][id_] = after
            if how.one == 2:
                told, said = self._turn(tab, id_, number), after.turns[number]
                said.media, said.answer = _media(told), told["answer"]
                said.finish = told["finish_reason"]
        self._check(tab.user, id_)

    def _kill(self, tab: Tab, id_: str, chat: Chat, how: Drawn) -> None:
        self._restart()
        for user in self.chats:
            self._check(user, *self.chats[user])

    def _search(self, tab: Tab, id_: str, chat: Chat, how: Drawn) -> None:
        wanted = [*(["about"] if how.yes else []), WORDS[how.one]]
        query = {"limit": 100, "query": " ".join(wanted)}
        data = self._call(tab, "GET", "", params=query).json()["data"]
        for one, found in self.chats[tab.user].items():
            text = " ".join([found.title, *(said.message for said in found.turns.values())])
            known = one in {shown["id"] for shown in data}
            assert known == all(word in text.split() for word in wanted), (text, wanted)

    def _see(self, tab: Tab, id_: str, chat: Chat, how: Drawn) -> None:
        self._look(tab)

    # --- how ---

    def _picked(self, chat: Chat, how: Drawn) -> int:
        return sorted(chat.turns)[how.turn % len(chat.turns)] if chat.turns else 0

    def _form(self, id_: str, after: int, new: int) -> dict[str, Any]:
        n = next(NUMBERS)
        pictures = ((f"p{n}-{i}.png", PICTURES[(n + i) % 3].getvalue()) for i in range(new))
        form = {"message": f"{WORDS[n % 3]} q{n}", "conversation_id": id_, "after": after}
        return {**form, "image": [], "files": [("image", one) for one in pictures]}

    def _edited(
        self, id_: str, chat: Chat, how: Drawn, *, same: bool = False
    ) -> dict[str, Any] | None:
        if not chat.turns:
            return None
        old = chat.turns[self._picked(chat, how)]
        form = self._form(id_, old.parent, 0 if same else how.two)
        if same:
            form["message"] = old.message
        shown = old.media if same else old.media[: how.one]
        return {**form, "image": [f"media:{one.id}" for one in shown], "kept": shown}

    def _place(self, tab: Tab, form: dict[str, Any]) -> Chat | None:
        """The chat that a question goes on with, None if the place is not there any more."""
        if "conversation_id" not in form:
            return Chat()
        chat = self.chats[tab.user].get(form["conversation_id"])
        there = chat is not None and form["after"] in (0, *chat.turns)
        return chat if there else None

    def _send(self, tab: Tab, form: dict[str, Any], **more: Any) -> httpx.Response:
        return self.http.send(self._request(tab, {**form, **more}), stream="stream" in more)

    def _request(self, tab: Tab, form: dict[str, Any]) -> httpx.Request:
        data = {name: value for name, value in form.items() if name not in ("files", "kept")}
        files = form.get("files") or None
        return self.http.build_request(
            "POST", "/v1/chat", data=data, files=files, headers=_user(tab)
        )

    def _call(self, tab: Tab, method: str, path: str, **more: Any) -> httpx.Response:
        return self.http.request(method, f"/v1/conversations{path}", headers=_user(tab), **more)

    def _turn(self, tab: Tab, id_: str, number: int) -> Any:
        path = f"/{id_}?all_versions=true"
        turns = self._call(tab, "GET", path).json()["turns"]
        return next(turn for turn in turns if turn["turn"] == number)

    def _answer(self, chat: Chat, number: int) -> str:
        """What the fake assistant says: the names of all media on the path, and the question."""
        path = [chat.turns[n] for n in chat.path(number)]
        *before, said = path
        text = said.message
        for one in reversed(before):  # questions without a word of an answer stand before it
            if (one.finish, one.answer) != ("unanswered", ""):
                break
            text = f"{one.message}\n{text}"
        names = [f"image {medium.name}" for one in path for medium in one.media]
        return f"[{', '.join(names)}] {text}"

    def _add(self, tab: Tab, form: dict[str, Any], told: dict[str, Any]) -> tuple[Chat, int]:
        """The question in the model, as its answer tells of its place."""
        id_ = form.setdefault("conversation_id", told["conversation_id"])
        chat = self.chats[tab.user].setdefault(id_, Chat())
        media, kept = _media(self._turn(tab, id_, told["turn"])), form.get("kept", ())
        said = Said(form.get("after", 0), form["message"], media)
        assert media[: len(kept)] == kept
        assert [one.name for one in media[len(kept) :]] == [file[0] for _, file in form["files"]]
        number = chat.add(said)
        assert (told["conversation_id"], told["turn"]) == (id_, number)
        return chat, number

    def _answered(self, tab: Tab, form: dict[str, Any], *, stream: bool) -> None:
        there = self._place(tab, form) is not None
        answer = self._send(tab, form, **({"stream": "true"} if stream else {}))
        assert answer.status_code == (200 if there else 404), answer.read()
        if there:
            told = list(_events(answer))[-1][1] if stream else answer.json()
            chat, number = self._add(tab, form, told)
            chat.turns[number].answer, chat.turns[number].finish = told["answer"], "stop"
            assert told["answer"] == self._answer(chat, number)
            self._check(tab.user, form["conversation_id"])
        answer.close()

    @contextmanager
    def _held(self, tab: Tab, form: dict[str, Any]) -> Iterator[tuple[Chat, int, str, Any]]:
        """A question whose answer is held at its first word: where it is, and its answer."""
        self.server.allow(1)
        answer = self._send(tab, form, stream="true")
        assert answer.status_code == 200
        events = _events(answer)
        name, told = next(events)
        assert name == "media"
        next(event for event in events if event[0] == "delta")
        chat, number = self._add(tab, form, told)
        try:
            yield chat, number, self._answer(chat, number), events
        finally:
            answer.close()
            self.server.allow()

    def _restart(self) -> None:
        self.server.kill()
        self.server.start()

    def _killed_amid(self, sent: bytes, waits: int) -> None:
        with socket.create_connection(address_of(self.server.url)) as connection:
            connection.sendall(sent)
            for _ in range(waits):
                self.http.get("/health/live")
            self.server.kill()
        self.server.start()

    def _look(self, tab: Tab) -> None:
        """What a tab shows is what is stored, unless the state says that it has changed."""
        state = self._call(tab, "GET", "/state?wait_s=0").json()["state"]
        chats = self.chats[tab.user]
        if state == tab.state:
            assert tab.seen == chats
        tab.state, tab.seen = state, deepcopy(chats)

    def _check(self, user: str, *ids: str) -> None:
        """What is stored of these chats, and which there are, is what the model says."""
        tab = Tab(user)
        listed, more = list[Any](), True
        while more:
            after = f"&after={listed[-1]['id']}" if listed else ""
            page = self._call(tab, "GET", f"?limit=100{after}").json()
            listed, more = listed + page["data"], page["has_more"]
        chats = self.chats[user]
        assert {one["id"]: one["title"] for one in listed} == {
            id_: chat.title for id_, chat in chats.items()
        }
        stranger = Tab(next(one for one in self.chats if one != user))
        for id_ in ids:
            assert self._call(stranger, "GET", f"/{id_}").status_code == 404
            exported = self._call(tab, "GET", f"/{id_}?all_versions=true")
            chat = chats.get(id_)
            assert exported.status_code == (404 if chat is None else 200)
            if chat is None:
                continue
            path = self._call(tab, "GET", f"/{id_}").json()["turns"]
            assert [turn["turn"] for turn in path] == chat.path(chat.head)
            turns = exported.json()["turns"]
            assert [turn["turn"] for turn in turns] == sorted(chat.turns)
            for turn in turns:
                said = chat.turns[turn["turn"]]
                told = (turn["parent"], turn["message"], turn["answer"], turn["finish_reason"])
                assert told == (said.parent, said.message, said.answer, said.finish)
                assert turn["later"] == len(chat.behind(turn["turn"])) - 1
                assert [one["id"] for one in turn["media"]] == [one.id for one in said.media]
                for one in said.media:
                    content = self.http.get(f"/v1/media/{one.id}/content", headers=_user(tab))
                    assert content.content == PICTURES[one.picture].getvalue()


def _media(turn: dict[str, Any]) -> tuple[Medium, ...]:
    """The media of a stored turn; the name of a picture says which one it is."""
    pictures = [sum(map(int, one["name"][1:-4].split("-"))) % 3 for one in turn["media"]]
    shown = zip(turn["media"], pictures, strict=True)
    return tuple(Medium(one["id"], one["name"], picture) for one, picture in shown)


def _user(tab: Tab) -> dict[str, str]:
    return {"x-mico-user": tab.user}


def _events(answer: httpx.Response) -> Iterator[tuple[str, Any]]:
    name = ""
    for line in answer.iter_lines():
        field_, _, value = line.partition(": ")
        if field_ == "event":
            name = value
        elif field_ == "data":
            yield name, json.loads(value)


def run(folder: Path, **how: Any) -> None:
    Store.server, Store.actions = FakeServer(folder), 0
    slow = list(HealthCheck)
    try:
        chosen = settings(
            deadline=None,
            suppress_health_check=slow,
            database=None,
            phases=[Phase.generate],  # a shorter sequence would take minutes to find
            **how,
        )
        run_state_machine_as_test(Store, settings=chosen)
    finally:
        Store.server.kill()


@pytest.mark.slow
def test_what_tabs_do_is_what_is_stored(tmp_path: Path) -> None:
    run(tmp_path, max_examples=2, stateful_step_count=20, derandomize=True)


@pytest.mark.soak
def test_what_tabs_do_in_many_actions(tmp_path: Path) -> None:
    run(tmp_path, max_examples=7, stateful_step_count=60)
    assert Store.actions >= 400

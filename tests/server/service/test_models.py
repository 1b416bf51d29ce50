"""Several models in one service: loaded when asked for, let go by least use, within a bound."""

import itertools
import json
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import httpx
import numpy as np
import psutil
import pytest

from mico_chat.assistant import Assistant
from mico_chat.errors import ConfigError, ModelError
from mico_chat.system import LIBC
from mico_server.app import create_app, distinct
from mico_server.host import ModelSource
from mico_server.settings import ServerSettings, read_settings
from tests.server.service.test_metrics import samples
from tests.server.support.running import error_of, events_of, live, wait_until_ready
from tests.support.fakes import FakeAssistant
from tests.support.waiting import PATIENCE_S, until

MB = 1_000_000


@dataclass
class Shelf:
    """Fake models by name, of 100 MB each; ``events`` has each load and each end of one.

    With a gate of a name, that model is loaded once the gate is set. ``broken`` cannot be loaded.
    """

    needs: dict[str, int] = field(default_factory=dict)
    gates: dict[str, threading.Event] = field(default_factory=dict)
    broken: dict[str, Exception] = field(default_factory=dict)
    events: list[str] = field(default_factory=list)
    made: dict[str, FakeAssistant] = field(default_factory=dict)
    make: Callable[[str], FakeAssistant] = lambda name: FakeAssistant()
    loading: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def source(self, name: str) -> ModelSource:
        def load() -> Assistant:
            self.loading.release()
            if name in self.gates:
                assert self.gates[name].wait(PATIENCE_S)
            if name in self.broken:
                raise self.broken[name]
            self.events.append(f"+{name}")
            made = self.made[name] = self.make(name)
            made.name = name
            made.close = lambda: self.events.append(f"-{name}")  # type: ignore[method-assign]
            return made

        return ModelSource(name, load, needs=lambda: self.needs.get(name, 100 * MB))

    @contextmanager
    def served(self, folder: Path, names: str, **settings: Any) -> Iterator[httpx.Client]:
        sources = [self.source(name) for name in names]
        asked = ServerSettings(data_dir=folder, **settings)
        with live(create_app(sources, asked), lifespan="on") as client:
            wait_until_ready(client)
            yield client


@pytest.fixture(autouse=True)
def _few_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of fakes leaves nothing to collect; all objects of this process take a second."""
    monkeypatch.setattr("mico_server.models.gc.collect", lambda: 0)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as threads:
        yield threads


def ask(client: httpx.Client, model: str, text: str = "Hello", **more: Any) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": text}], **more}
    return client.post("/v1/chat/completions", json=body)


def said(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    answer = response.json()
    return f"{answer['model']}: {answer['choices'][0]['message']['content']}"


def states(client: httpx.Client) -> dict[str, str]:
    return {one["id"]: one["status"]["value"] for one in client.get("/v1/models").json()["data"]}


def requests(client: httpx.Client, name: str) -> int:
    return int(client.get(f"/v1/models/{name}").json()["status"]["requests"])


def test_the_first_is_there_at_once_and_the_others_when_they_are_asked(tmp_path: Path) -> None:
    shelf = Shelf()
    with shelf.served(tmp_path, "abc") as client:
        assert states(client) == {"a": "loaded", "b": "unloaded", "c": "unloaded"}
        assert said(ask(client, "b")) == "b: [] Hello"
        assert states(client) == {"a": "loaded", "b": "loaded", "c": "unloaded"}
        assert said(ask(client, "a")) == "a: [] Hello"
        assert client.get("/health/ready").json()["model"] == "a"
        found = samples(client.get("/metrics").text)
        assert [found[f"mico_model_loaded{{model={name}}}"] for name in "abc"] == [1, 1, 0]
        assert found["mico_model_loads_total{model=b}"] == 1
        assert found["mico_engine_slots"] == 0
    assert shelf.events == ["+a", "+b", "-a", "-b"]


def test_what_each_reads_is_known_before_it_is_loaded(tmp_path: Path) -> None:
    shelf = Shelf()
    ear = replace(shelf.source("b"), reads=lambda: ("audio",))
    broken = replace(shelf.source("c"), reads=lambda: raised(ModelError("c: no config.json there")))
    app = create_app([shelf.source("a"), ear, broken], ServerSettings(data_dir=tmp_path))
    with live(app, lifespan="on") as client:
        wait_until_ready(client)
        a, b, c = client.get("/v1/models").json()["data"]
        assert a["architecture"] == {
            "input_modalities": ["text", "image", "audio", "video", "depth", "normal", "document"],
            "output_modalities": ["text"],
        }
        assert b["architecture"]["input_modalities"] == ["text", "audio"]
        assert b["modalities"] == ["audio"]
        assert b["status"]["value"] == "unloaded"
        assert (a["context_length"], b["context_length"]) == (1000, None)
        assert (c["status"]["value"], c["status"]["reason"]) == (
            "failed",
            "c: no config.json there",
        )
    assert shelf.events == ["+a", "-a"]


def raised(error: Exception) -> Any:
    raise error


def test_a_name_that_is_not_served_lists_those_that_are(tmp_path: Path) -> None:
    with Shelf().served(tmp_path, "ab") as client:
        refused = [
            ask(client, "c"),
            client.post("/v1/chat", data={"message": "Hello", "model": "c"}),
            client.post("/v1/embeddings", json={"model": "c", "input": "Hello"}),
            client.post("/v1/media", data={"model": "c"}, files={"image": b"x"}),
            client.get("/v1/models/c"),
        ]
        for response in refused:
            assert response.status_code == 404
            error = error_of(response)
            assert error["code"] == "model_not_found"
            assert error["message"] == "no model 'c' here; this server has 'a', 'b'"
        assert client.get("/v1/conversations").json()["data"] == []


def test_others_answer_while_a_model_is_loaded(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    shelf = Shelf(gates={"b": threading.Event()})
    with shelf.served(tmp_path, "ab") as client:
        waiting = [pool.submit(ask, client, "b") for _ in range(3)]
        assert shelf.loading.acquire(timeout=PATIENCE_S)  # a
        assert shelf.loading.acquire(timeout=PATIENCE_S)
        assert states(client) == {"a": "loaded", "b": "loading"}
        assert said(ask(client, "a")) == "a: [] Hello"
        shelf.gates["b"].set()
        assert {said(one.result()) for one in waiting} == {"b: [] Hello"}
    assert shelf.events.count("+b") == 1


def test_a_stream_tells_that_its_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mico_server.service.PROGRESS_AFTER_S", 0)
    sizes = itertools.count(0, MB)
    monkeypatch.setattr("mico_server.models._used", lambda: next(sizes))
    shelf = Shelf(gates={"b": threading.Event()})
    form = {"message": "Hello", "model": "b", "stream": "true"}
    with shelf.served(tmp_path, "ab", max_models_bytes=900 * MB) as client:
        with client.stream("POST", "/v1/chat?progress=true", data=form) as response:
            lines = response.iter_lines()
            said = (json.loads(line[6:]) for line in lines if line.startswith("data: "))
            known = (one for one in said if one["total"])  # its size is not known at once
            first, second = next(known), next(known)
            shelf.gates["b"].set()
            *_, done = said
        assert (first["what"], first["total"]) == ("model", 100 * MB)
        assert 0 < first["done"] < second["done"] <= 100 * MB
        assert done["answer"] == "[] Hello"
        assert "progress" not in client.post("/v1/chat?progress=true", data=form).text


def test_the_one_that_was_used_longest_ago_goes(tmp_path: Path) -> None:
    shelf = Shelf()
    with shelf.served(tmp_path, "abc", max_models_bytes=200 * MB) as client:
        for name in "bac":
            said(ask(client, name))
        assert shelf.events == ["+a", "+b", "-b", "+c"]
        shelf.events.clear()
        said(ask(client, "b"))
        assert shelf.events == ["-a", "+b"]
        assert states(client) == {"a": "unloaded", "b": "loaded", "c": "loaded"}


def test_a_model_in_use_stays_and_the_others_wait_their_turn(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    gate = threading.Event()
    shelf = Shelf(make=lambda name: FakeAssistant(gate if name == "a" else None))
    with shelf.served(tmp_path, "ab", max_models_bytes=150 * MB) as client:
        first = pool.submit(ask, client, "a", "first")
        assert shelf.made["a"].started.acquire(timeout=PATIENCE_S)
        second = pool.submit(ask, client, "b", "second")
        until(lambda: states(client)["b"] == "loading")
        third = pool.submit(ask, client, "a", "third")  # after the one that was there before
        until(lambda: requests(client, "a") == 2)
        assert not second.done()
        assert shelf.events == ["+a"]
        gate.set()
        answers = [said(one.result()) for one in (first, second, third)]
        assert answers == ["a: [] first", "b: [] second", "a: [] third"]
    assert shelf.events[:-1] == ["+a", "-a", "+b", "-b", "+a"]


def test_who_gives_up_waiting_costs_nothing(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    gate = threading.Event()
    shelf = Shelf(make=lambda name: FakeAssistant(gate))
    with ExitStack() as stack:
        settings = {"max_models_bytes": 150 * MB, "request_timeout_s": 300.0}
        client = stack.enter_context(shelf.served(tmp_path, "ab", **settings))
        first = pool.submit(ask, client, "a", "first")
        assert shelf.made["a"].started.acquire(timeout=PATIENCE_S)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                client.base_url.join("/v1/chat/completions"),
                json={"model": "b", "messages": [{"role": "user", "content": "Hello"}]},
                timeout=httpx.Timeout(PATIENCE_S, read=0.2),
                trust_env=False,
            )
        until(lambda: states(client)["b"] == "unloaded")
        second = pool.submit(ask, client, "a", "second")
        assert shelf.made["a"].started.acquire(timeout=PATIENCE_S)  # takes new requests again
        gate.set()
        assert [said(one.result()) for one in (first, second)] == ["a: [] first", "a: [] second"]
        assert shelf.events == ["+a"]


def test_a_model_that_never_fits_is_refused_with_both_numbers(tmp_path: Path) -> None:
    shelf = Shelf(needs={"b": 300 * MB})
    with shelf.served(tmp_path, "ab", max_models_bytes=250 * MB) as client:
        response = ask(client, "b")
        assert response.status_code == 507
        message = error_of(response)["message"]
        assert message.startswith("b needs 300 MB, but the models of this service may take 250 MB")
        assert states(client) == {"a": "loaded", "b": "failed"}
        said(ask(client, "a"))
    assert shelf.events == ["+a", "-a"]


def test_what_a_model_takes_beyond_its_estimate_counts(tmp_path: Path) -> None:
    """Others make room for it once it is measured; one beyond the bound does not stay."""

    def make(name: str) -> FakeAssistant:
        made: Any = FakeAssistant()
        made.weights = np.ones((200 if name == "c" else 100) * MB, np.uint8)
        return cast(FakeAssistant, made)

    shelf = Shelf(needs=dict.fromkeys("abc", 20 * MB), make=make)
    with shelf.served(tmp_path, "abc", max_models_bytes=150 * MB) as client:
        said(ask(client, "b"))
        assert shelf.events == ["+a", "+b", "-a"]
        shelf.events.clear()
        response = ask(client, "c")
        assert response.status_code == 507
        refusal = re.match(r"c needs (\d+) MB, but .* 150 MB", error_of(response)["message"])
        assert refusal
        assert 150 < int(refusal[1]) < 300
        assert shelf.events[-1] == "-c"
        assert states(client)["c"] == "failed"
        said(ask(client, "b"))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModelError("b: config.json: no such file"), "b: config.json: no such file"),
        (ZeroDivisionError("secret"), "a defect; the server's log has the details"),
    ],
)
def test_one_that_cannot_be_loaded_does_not_end_the_service(
    tmp_path: Path, error: Exception, reason: str
) -> None:
    shelf = Shelf(broken={"b": error})
    with shelf.served(tmp_path, "ab") as client:
        response = ask(client, "b")
        assert response.status_code == 500
        assert error_of(response)["message"] == f"b: the model could not be loaded: {reason}"
        status = client.get("/v1/models/b").json()["status"]
        assert (status["value"], status["reason"]) == ("failed", reason)
        said(ask(client, "a"))
        del shelf.broken["b"]
        said(ask(client, "b"))  # is tried again
        assert client.get("/v1/models/b").json()["status"]["reason"] is None


def test_waiting_for_a_model_ends_with_the_requests_time(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    shelf = Shelf(gates={"b": threading.Event()})
    with shelf.served(tmp_path, "ab", request_timeout_s=0.2) as client:
        response = ask(client, "b")
        shelf.gates["b"].set()
        assert response.status_code == 504
        assert "b: the model was not loaded within 0.2 s" in error_of(response)["message"]
        until(lambda: states(client)["b"] == "loaded")


def test_those_who_wait_count_as_requests(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    shelf = Shelf(gates={"b": threading.Event()})
    with shelf.served(tmp_path, "ab", max_requests=1) as client:
        waiting = pool.submit(ask, client, "b")
        until(lambda: states(client)["b"] == "loading")
        assert ask(client, "a").status_code == 429
        shelf.gates["b"].set()
        said(waiting.result())


def test_an_idle_model_is_unloaded_after_its_time(tmp_path: Path) -> None:
    shelf = Shelf()
    with shelf.served(tmp_path, "a", keep_alive_s=0) as client:
        for number in range(2):
            until(lambda: states(client)["a"] == "unloaded")
            assert shelf.events == ["+a", "-a"] * (number + 1)
            said(ask(client, "a"))
        assert client.get("/health/ready").status_code == 200
        info = client.get("/v1/models/a").json()
        assert info["context_length"] == 1000
        assert info["status"]["last_used"]


def test_a_conversation_keeps_its_model(tmp_path: Path) -> None:
    shelf = Shelf()
    with shelf.served(tmp_path, "ab") as client:

        def chat(**form: str) -> dict[str, Any]:
            response = client.post("/v1/chat", data={"message": "Hello", **form})
            assert response.status_code == 200, response.text
            answer: dict[str, Any] = response.json()
            return answer

        assert chat()["model"] == "a"
        first = chat(model="b")
        assert first["model"] == "b"
        id_ = first["conversation_id"]
        assert chat(conversation_id=id_)["model"] == "b"
        assert client.get("/v1/conversations").json()["data"][0]["model"] == "b"
        assert chat(conversation_id=id_, model="a")["model"] == "a"
        assert chat(conversation_id=id_)["model"] == "a"
        streamed = client.post("/v1/chat", data={"message": "x", "model": "b", "stream": "true"})
        assert events_of(streamed.text)[-1][1]["model"] == "b"
        cost = client.post("/v1/estimate", data={"message": "x", "model": "b"})
        assert cost.json()["context_length"] == 1000
    with shelf.served(tmp_path, "a") as client:  # its model is served no more
        assert chat(conversation_id=first["conversation_id"])["model"] == "a"


def test_uploads_are_read_by_the_named_model(tmp_path: Path) -> None:
    shelf = Shelf()
    with shelf.served(tmp_path, "ab") as client:
        stored = client.post("/v1/media", data={"model": "b"}, files={"image": b"x"})
        assert stored.status_code == 201
        assert shelf.made["b"].decoder.decoded
        assert not shelf.made["a"].decoder.decoded


def test_many_at_once_under_a_bound_are_all_answered(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    shelf = Shelf()
    with shelf.served(tmp_path, "abc", max_models_bytes=100 * MB, max_requests=100) as client:
        names = [name for _ in range(8) for name in "abcb"]
        asked: list[Future[httpx.Response]] = [
            pool.submit(ask, client, name, str(number)) for number, name in enumerate(names)
        ]
        answers = [said(one.result()) for one in asked]
        assert answers == [f"{name}: [] {number}" for number, name in enumerate(names)]
    loaded = 0
    for event in shelf.events:
        loaded += 1 if event[0] == "+" else -1
        assert loaded <= 1


def test_the_models_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_settings(["--model", "mini"]).model == ("mini",)
    assert read_settings(["--model", "mini", "--model", "./b"]).model == ("mini", "./b")
    assert read_settings(["--model", "mini,./b"]).model == ("mini", "./b")
    monkeypatch.setenv("MICO_SERVER_MODEL", "mini,b")
    assert read_settings([]).model == ("mini", "b")
    file = tmp_path / "settings.toml"
    for text, expected in (('model = "mini"', ("mini",)), ('model = ["a", "b"]', ("a", "b"))):
        monkeypatch.delenv("MICO_SERVER_MODEL", raising=False)
        file.write_text(text)
        assert read_settings(["--config", str(file)]).model == expected


def test_two_of_one_name_are_refused(tmp_path: Path) -> None:
    for place in ("one", "other"):
        (tmp_path / place / "tiny").mkdir(parents=True)
    names = [str(tmp_path / place / "tiny") for place in ("one", "other")]
    with pytest.raises(ConfigError, match="two would be served as 'tiny'"):
        distinct(names)


@pytest.mark.skipif(not hasattr(LIBC, "malloc_trim"), reason="glibc gives memory back")
def test_what_is_free_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mico_server.app.GIVE_BACK_S", 0.05)
    used = psutil.Process().memory_info
    with Shelf().served(tmp_path, "a"):
        blocks = [b"x" * 60_000 for _ in range(3000)]
        full = used().rss
        del blocks[:-1]  # the last one keeps all those before it from the system
        until(lambda: used().rss < full - (100 << 20))

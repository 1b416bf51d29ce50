"""Long and hostile texts: refused before they cost anything, folded in linear work."""

import random
import unicodedata
from typing import Any

import httpx
import pytest

from mico_chat.fields import BYTES_PER_TOKEN
from mico_server.store import conversations
from mico_server.store.tables import MOST_MARKS, folded
from tests.server.support.running import error_of, running
from tests.support.fakes import FakeAssistant

HOSTILE = {
    "sorted the wrong way": "a" + "\u0315" * 64_000 + "\u0300" * 64_000,
    "marks of two widths": ("\u0315" * 30 + "\uff9e") * 4_000,
    "no class of their own": "\u0f73\u0315" * 64_000,
    "one that is two": "\u0344\u0315\u0300" * 40_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_run_of_marks_is_cut_before_it_is_sorted(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sorting a run takes the square of its length: so count the longest run that is sorted."""
    longest = 0

    def normalize(form: Any, text: str) -> str:
        nonlocal longest
        run = 0
        for character in real("NFKD", text[:5000]):
            run = run + 1 if unicodedata.combining(character) else 0
            longest = max(longest, run)
        return real(form, text)

    real = unicodedata.normalize
    folded("ä")  # the table of marks
    monkeypatch.setattr("mico_server.store.tables.unicodedata.normalize", normalize)
    folded(HOSTILE[name][:5000])
    assert 0 < longest <= 2 * MOST_MARKS


def test_other_texts_are_folded_as_before() -> None:
    drawn = random.Random(1)
    pool = [chr(drawn.randrange(0x20, 0x2FFFF)) for _ in range(3000)]
    pool = [c for c in pool if not "\ud800" <= c <= "\udfff"] + [*"\u0300\u0315eAß "] * 300
    for _ in range(500):
        text = "".join(drawn.choices(pool, k=60))
        once = unicodedata.normalize("NFKC", text).casefold()
        assert folded(text) == unicodedata.normalize("NFKC", once)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> object:
    from mico_server.settings import ServerSettings

    settings = ServerSettings(data_dir=tmp_path_factory.mktemp("data"))
    with running(lambda: FakeAssistant(), settings) as client:
        yield client


def test_text_that_cannot_fit_is_refused_before_it_is_stored_or_folded(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(text: str) -> str:
        raise AssertionError("folded")

    monkeypatch.setattr(conversations, "folded", never)
    most = BYTES_PER_TOKEN * 1000
    for given in (
        {"message": "x" * most + "y"},
        {"message": "x", "system": "é" * most},
        {"message": "x", "prefix": "z" * most},
        {"message": HOSTILE["sorted the wrong way"]},
    ):
        refused = client.post("/v1/chat", json=given)
        assert refused.status_code == 400, given.keys()
        assert error_of(refused)["code"] == "context_length_exceeded"
        assert f"more than {most} (16 for each token)" in error_of(refused)["message"]
    assert client.get("/v1/conversations").json()["data"] == []


@pytest.mark.parametrize("stop", [["x" * 1001], ["x"] * 17])
def test_stop_texts_are_bounded(client: httpx.Client, stop: list[str]) -> None:
    asked = {"message": "hi", "stop": stop}
    chat = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "stop": stop}
    for path, body in (("/v1/chat", asked), ("/v1/chat/completions", chat)):
        refused = client.post(path, json=body)
        assert refused.status_code == 400
        assert "stop" in error_of(refused)["param"]
        assert len(refused.content) < 500, "the text is not sent back"

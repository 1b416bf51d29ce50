"""The client against a real server, whose assistant is a stand-in."""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from starlette.responses import Response

from mico_chat.wire import ChatEvent, ChatResponse, DeltaEvent, MediaEvent
from mico_ui import routes
from mico_ui.client import ApiError, AsyncClient, Client, read_events
from mico_ui.routes import MediumId, Question, Upload
from tests.server.support.running import live
from tests.support.fakes import FakeAssistant
from tests.ui.conftest import served


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with served(tmp_path_factory.mktemp("client"), FakeAssistant()) as client:
        yield client


def ask(client: Client, question: Question) -> ChatResponse:
    with client.stream(question) as events:
        *_, last = events
    assert isinstance(last, ChatResponse)
    return last


def test_media_keep_their_order_whether_sent_or_stored(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "with space ä.wav"
    path.write_bytes(b"sound")
    stored = client.send(routes.upload(Upload("audio", path)))
    assert (stored.kind, stored.name, stored.bytes) == ("audio", path.name, 5)
    clip, depth = Upload("video", b"v", 'a"b.mp4'), Upload("depth", b"d")
    media: list[Upload | MediumId] = [clip, MediumId("audio", stored.id), depth]
    answer = ask(client, Question("Hi", media))
    assert (answer.turn, answer.usage.media_tokens) == (1, 3)
    assert [report.kind for report in answer.media] == ["video", "audio", "depth"]
    assert answer.media[2].name == "depth"  # a name of its own it had not
    assert client.send(routes.medium_content(stored.id)) == b"sound"


@pytest.mark.parametrize(
    ("question", "status", "said"),
    [
        (Question("refuse"), 400, r"^refused$"),
        (Question("x", options={"top_p": 7}), 400, r"^top_p: .* got '7'$"),
        (Question("x", [Upload("image", b"broken", "a.png")]), 422, r"^a\.png: not a image$"),
        (Question("x", [MediumId("image", "media-no/thing")]), 404, "no medium"),
        (Question("x", [Upload("image", Path("/nothing.png"))]), None, r"/nothing\.png: No such"),
        (Question("x", [Upload("image", Path("/tmp"))]), None, "/tmp: Is a directory"),
    ],
)
def test_errors_are_the_servers_own(
    client: Client, question: Question, status: int | None, said: str
) -> None:
    with pytest.raises(ApiError, match=said) as caught, client.stream(question):
        pass
    assert caught.value.status == status


def test_a_key_is_sent_and_half_surrogates_do_not_crash(client: Client) -> None:
    with Client(client.api, key="made-up", user="alice") as other:
        assert ask(other, Question("a\ud800b")).answer == "[] a?b"
    # An error of the caller's own stays one.
    with pytest.raises(OSError, match="full disk"), client.stream(Question("Hi")):
        raise OSError("full disk")


@pytest.mark.parametrize(
    "written", ["{host}", "http://{host}/", "http://{host}/v1", " {host}/v1/ "]
)
def test_addresses_as_users_write_them(client: Client, written: str) -> None:
    host = client.api.removeprefix("http://")
    with Client(written.format(host=host)) as other:
        assert other.send(routes.ready()).model == "fake"


@pytest.mark.parametrize("wrong", ["", "ftp://host", "http://", "http://[::1", "http://host:port"])
def test_a_wrong_address_is_an_error(wrong: str) -> None:
    with pytest.raises(ApiError, match="is no address of a server"):
        Client(wrong)


@pytest.mark.parametrize(
    ("status", "said"), [(200, "not as a server"), (502, "at 127.0.0.1 answers 502 Bad Gateway")]
)
def test_no_server_and_another_service(status: int, said: str) -> None:
    with live(Response("<html>", status)) as http:
        other = Client(str(http.base_url))
        with pytest.raises(ApiError, match=said):
            other.send(routes.ready())
    with other, pytest.raises(ApiError, match="no server answers"):
        other.send(routes.ready())


def test_ctrl_c_is_one_also_where_a_library_stops_the_task_too(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def stopped(*args: object) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        signal.raise_signal(signal.SIGINT)
        await asyncio.sleep(30)

    monkeypatch.setattr(AsyncClient, "send", stopped)
    with pytest.raises(KeyboardInterrupt):
        client.send(routes.ready())
    monkeypatch.undo()
    assert client.send(routes.ready()).model == "fake"


STREAM = (
    'event: media\ndata: {"conversation_id":null,"turn":null,"media":[]}\n\n: still here\n\n'
    'event: delta\r\ndata: {"index":0,"text":"a\u2028b\\n"}\r\n\r\n'
    'event: news\ndata: {}\n\nevent: delta\ndata: {"index":0,"text":"ö"}\n\n'
)
FAILURE = 'event: error\ndata: {"error":{"message":"no memory","type":"","param":null,"code":null}}'


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_events_cut_anywhere(size: int) -> None:
    found: list[ChatEvent] = []

    async def read(text: str) -> None:
        async def pieces() -> AsyncIterator[bytes]:
            stream = text.encode()
            for at in range(0, len(stream), size):
                yield stream[at : at + size]

        async for event in read_events(pieces()):
            found.append(event)

    with pytest.raises(ApiError, match="broke off"):
        asyncio.run(read(STREAM))
    first, *deltas = found
    assert first == MediaEvent(conversation_id=None, turn=None, media=())
    assert [d.text for d in deltas if isinstance(d, DeltaEvent)] == ["a\u2028b\n", "ö"]
    with pytest.raises(ApiError, match=r"^no memory$"):
        asyncio.run(read(f"{FAILURE}\n\n"))

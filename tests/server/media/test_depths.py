"""Depth maps that the service estimates: where they are asked for, and stored like any medium."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import httpx
import PIL.Image
import pytest

from mico_chat.media import Depth, MediaDecoder, MediaFile, MediaLimits, decode
from mico_chat.reading.depths import depth_estimator
from mico_server.settings import ServerSettings
from tests.server.conftest import Start
from tests.server.support import sent
from tests.server.support.echo import decoding_assistant
from tests.server.support.running import events_of, running
from tests.support.fakes import WALL, FakeAssistant

PHOTO = sent.png(sent.square())
IMAGE = ("photo.png", PHOTO)
ASKED = {"message": "Far?", "estimate_depth": "true"}
BOTH = "[image photo.png, depth depth of photo.png.png] Far?"


@pytest.fixture
def assistant() -> FakeAssistant:
    assistant = FakeAssistant()
    assistant.encoder.depths = WALL
    return assistant


@pytest.fixture
def client(start: Start, assistant: FakeAssistant) -> httpx.Client:
    return start(assistant, max_media=5)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A service that decodes, estimates and encodes for real; only its words mean nothing."""

    def load() -> Any:
        assistant = decoding_assistant(decoder)
        assistant.encoder.depths = depth_estimator("mini")
        return assistant

    settings = ServerSettings(data_dir=tmp_path_factory.mktemp("real"))
    with MediaDecoder(MediaLimits(), workers=1) as decoder, running(load, settings) as client:
        yield client


def told(response: httpx.Response) -> Any:
    assert response.status_code < 300, response.text
    return response.json()


def test_a_map_belongs_to_the_message(client: httpx.Client, assistant: FakeAssistant) -> None:
    first = told(client.post("/v1/chat", data=ASKED, files={"image": IMAGE}))
    assert first["answer"] == BOTH
    follow = {"message": "And now?", "conversation_id": first["conversation_id"]}
    answer = told(client.post("/v1/chat", data=follow))["answer"]
    assert "depth of photo.png.png] And now?" in answer
    (turn, _) = told(client.get(f"/v1/conversations/{first['conversation_id']}"))["turns"]
    assert [(one["kind"], one["name"]) for one in turn["media"]] == [
        ("image", "photo.png"),
        ("depth", "depth of photo.png.png"),
    ]
    assert len(turn["reports"]) == 2
    data = client.get(f"/v1/media/{turn['media'][1]['id']}/content").content
    depth = decode(MediaFile("depth", data))
    assert isinstance(depth, Depth)
    assert (depth.estimated, depth.metric, float(depth.values.max())) == ("fake-depth", True, 2.0)
    streamed = client.post("/v1/chat", data={**ASKED, "stream": "true"}, files={"image": IMAGE})
    assert events_of(streamed.text)[-1][1]["answer"] == BOTH
    plain = told(client.post("/v1/chat", data={"message": "Far?"}, files={"image": IMAGE}))
    assert plain["answer"] == "[image photo.png] Far?"


def test_what_gets_no_map(client: httpx.Client) -> None:
    measured = {"image": IMAGE, "depth": ("wall.png", sent.depth())}
    answer = told(client.post("/v1/chat", data=ASKED, files=measured))["answer"]
    assert answer == "[image photo.png, depth wall.png] Far?"
    video = {"video": ("clip.mp4", sent.mp4())}
    answer = told(client.post("/v1/chat", data=ASKED, files=video))["answer"]
    assert answer == "[video clip.mp4] Far?"
    broken = {"image": ("broken.png", b"broken")}
    response = client.post("/v1/chat", data=ASKED, files=broken)
    assert (response.status_code, response.json()["error"]["message"][:11]) == (422, "broken.png:")
    three = [("image", IMAGE)] * 3
    response = client.post("/v1/chat", data=ASKED, files=three)
    assert response.status_code == 413
    assert "estimate_depth: 6 media" in response.json()["error"]["message"]
    assert told(client.get("/v1/conversations"))["data"][0]["title"] == "Far?"
    assert len(told(client.get("/v1/conversations"))["data"]) == 2, "refused ones are not stored"


def test_openai_s_formats_have_it_too(client: httpx.Client) -> None:
    url = sent.data_uri("image/png", PHOTO)
    body = sent.completion("Far?", sent.part("image", url))
    deep = {**body, "estimate_depth": True}
    for sent_body, kinds in ((body, ["image"]), (deep, ["image", "depth"])):
        found = told(client.post("/v1/chat/completions", json=sent_body))
        assert [one["kind"] for one in found["media"]] == kinds
    given = [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": "Far?"}]
    item = {"role": "user", "content": given}
    asked = {"model": "fake", "input": [item], "estimate_depth": True}
    assert len(told(client.post("/v1/responses", json=asked))["media"]) == 2


def test_a_service_without_an_estimator_says_so(start: Start) -> None:
    client = start(FakeAssistant())
    assert told(client.get("/v1/models"))["data"][0]["depth_model"] is None
    stored = told(client.post("/v1/media", files={"image": IMAGE}))["id"]
    for response in (
        client.post("/v1/chat", data=ASKED, files={"image": IMAGE}),
        client.post("/v1/chat", data=ASKED),
        client.post("/v1/estimate", data=ASKED),
        client.post(f"/v1/media/{stored}/depth"),
    ):
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, "estimate_depth")
        assert "set MICO_DEPTH_MODEL to mini" in error["message"]


def test_a_stored_picture_gets_a_stored_map(real: httpx.Client) -> None:
    assert told(real.get("/v1/models"))["data"][0]["depth_model"] == "mini-depth"
    picture = told(real.post("/v1/media", files={"image": IMAGE}))
    depth = told(real.post(f"/v1/media/{picture['id']}/depth"))
    assert (depth["kind"], depth["name"]) == ("depth", "depth of photo.png.png")
    assert depth["report"]["estimated"] == "mini-depth"
    assert depth["report"]["metric"] is False
    content = real.get(f"/v1/media/{depth['id']}/content")
    assert content.headers["content-type"] == "image/png"
    assert PIL.Image.open(io.BytesIO(content.content)).size == (518, 518)
    asked = {"message": "Far?", "image": f"media:{picture['id']}", "depth": f"media:{depth['id']}"}
    answer = told(real.post("/v1/chat", data=asked))
    assert [one["estimated"] for one in answer["media"]] == [None, "mini-depth"]
    sound = told(real.post("/v1/media", files={"audio": ("a.wav", sent.wav())}))
    assert real.post(f"/v1/media/{sound['id']}/depth").status_code == 400
    assert real.post("/v1/media/media-nothing/depth").status_code == 404


def test_it_is_counted_before_and_cached_after(real: httpx.Client) -> None:
    files = {"image": ("square.png", sent.png(sent.square(sent.BLUE)))}
    plain = told(real.post("/v1/estimate", data={"message": "Far?"}, files=files))
    deep = told(real.post("/v1/estimate", data=ASKED, files=files))
    assert deep["media_tokens"] == 2 * plain["media_tokens"]
    first = told(real.post("/v1/chat", data=ASKED, files=files))
    again = {"message": "And now?", "conversation_id": first["conversation_id"]}
    assert first["usage"]["prompt_tokens"] == deep["prompt_tokens"]
    for later in (
        real.post("/v1/chat", data=again),
        real.post("/v1/chat", data=ASKED, files=files),
    ):
        assert [one["cached"] for one in told(later)["media"]] == [True, True]

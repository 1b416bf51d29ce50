"""``file://`` URLs: one folder's files and nothing else, and nothing at all unless it is named."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from mico_chat.errors import RequestError
from mico_server.fetch.media_reader import file_of
from tests.server.conftest import Start
from tests.server.support import sent
from tests.support.fakes import FakeAssistant


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "clips"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "a clip.mp4").write_bytes(b"clip")
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    (folder / "out.mp4").symlink_to(tmp_path / "secret.mp4")
    (folder / "in.mp4").symlink_to(folder / "deep" / "a clip.mp4")
    (folder / "circle.mp4").symlink_to(folder / "circle.mp4")
    return folder


def shown(client: httpx.Client, url: str, **fields: Any) -> httpx.Response:
    request = sent.completion("What moves?", sent.part("video", url))
    return client.post("/v1/chat/completions", json={**request, **fields})


def test_a_clip_as_evaluations_name_it(start: Start, folder: Path) -> None:
    assistant = FakeAssistant()
    client = start(assistant, allow_files=folder)
    response = shown(
        client,
        f"file://{folder}/deep/a%20clip.mp4",
        media_io_kwargs={"video": {"num_frames": 10}},
    )
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["message"]["content"] == "[video a clip.mp4] What moves?"
    (message,) = assistant.asked[0]
    assert message.media[0].report.bytes == len(b"clip")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "url",
    [
        "file://{root}/clips/../secret.mp4",
        "file://{root}/clips/%2e%2e/secret.mp4",
        "file://{root}/clips/out.mp4",
        "file://{root}/clips/circle.mp4",
        "file://{root}/clips/missing.mp4",
        "file://{root}/clips/deep",
        "file://elsewhere{root}/clips/in.mp4",
        "file://{root}/clips/%00",
        "file://{root}/clips/" + "x" * 5000,
        "file:///etc/passwd",
    ],
)
def test_anything_else_is_refused_in_the_same_words(folder: Path, url: str) -> None:
    with pytest.raises(RequestError) as caught:
        file_of(url.replace("{root}", str(folder.parent)), folder, "video_url")
    assert str(caught.value) == (
        "video_url: does not name a file in the folder that this service may read "
        "(MICO_SERVER_ALLOW_FILES)"
    )


def test_a_link_within_the_folder_is_followed(folder: Path) -> None:
    assert file_of(f"file://localhost{folder}/in.mp4", folder, "x") == folder / "deep/a clip.mp4"


def test_unless_allowed_no_file_is_read(start: Start, folder: Path) -> None:
    response = shown(start(FakeAssistant()), f"file://{folder}/in.mp4")
    assert response.status_code == 400
    assert "send the medium as a data URI" in response.json()["error"]["message"]

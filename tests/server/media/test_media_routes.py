"""/v1/media over HTTP: upload once, list, fetch, delete, and nothing of it for other tenants."""

import hashlib
import re
from typing import Any

import httpx
import pytest

from tests.server.conftest import Start
from tests.server.support.running import error_of
from tests.support.fakes import FakeAssistant


def upload(
    client: httpx.Client, kind: str, name: str, data: bytes, **fields: str
) -> dict[str, Any]:
    response = client.post("/v1/media", files={kind: (name, data)}, data=fields)
    assert response.status_code == 201, response.text
    medium: dict[str, Any] = response.json()
    return medium


def test_what_was_uploaded_comes_back_byte_for_byte(client: httpx.Client) -> None:
    data = bytes(range(256)) * 5000
    medium = upload(client, "audio", "../../a\u202eb/purr.ogg", data)
    assert (medium["kind"], medium["name"], medium["bytes"]) == ("audio", "purr.ogg", len(data))
    assert medium["sha256"] == hashlib.sha256(data).hexdigest()
    assert medium["report"]["bytes"] == len(data)
    assert medium["expires_at"] - medium["created_at"] == 7 * 86400
    url = f"/v1/media/{medium['id']}"
    assert client.get(url).json() == medium
    response = client.get(f"{url}/content")
    assert response.content == data
    part = client.get(f"{url}/content", headers={"range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, data[10:20])


def test_an_upload_is_read_at_once_or_when_it_is_asked_about(start: Start) -> None:
    assistant = FakeAssistant()
    client = start(assistant)
    upload(client, "image", "a.png", b"a")
    media = f"media:{upload(client, 'image', 'b.png', b'b', read='false')['id']}"
    client.post("/v1/estimate", data={"message": "?", "image": media}).raise_for_status()
    assert assistant.read == [True, False, True]


@pytest.mark.parametrize(
    ("data", "mime"),
    [
        (b"<script>alert(1)</script>", "text/plain; charset=utf-8"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "text/plain; charset=utf-8"),
        (b"\x00\x01<script>", "application/octet-stream"),
        (b"\x89PNG\r\n\x1a\n<script>", "image/png"),
    ],
)
def test_no_browser_runs_what_was_uploaded(client: httpx.Client, data: bytes, mime: str) -> None:
    id_ = upload(client, "image", 'a".html\r\nx: y', data)["id"]
    headers = client.get(f"/v1/media/{id_}/content").headers
    assert headers["content-type"] == mime
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-security-policy"] == "sandbox"
    assert headers["content-disposition"].startswith("attachment;")
    assert "x" not in headers


@pytest.mark.parametrize(
    ("files", "fields", "status", "said"),
    [
        ([], {"ttl_s": "5"}, 400, "exactly one file"),
        ([("image", b"a"), ("image", b"b")], {}, 400, "exactly one file"),
        ([("image", b"a")], {"audio": "media:x"}, 400, "exactly one file"),
        ([("image", b"a")], {"ttl_s": "0"}, 400, "ttl_s: .*got '0'"),
        ([("image", b"a")], {"ttl_s": "60323968491780685824"}, 400, "ttl_s: .*less than"),
        ([("image", b"a")], {"ttl_s": "soon"}, 400, "ttl_s: "),
        ([("image", b"a")], {"read": "later"}, 400, "read: "),
        ([("image", b"a")], {"depth_scale": "nan"}, 400, "depth_scale: "),
        ([("image", b"a")], {"colour": "red"}, 400, "unknown field 'colour'"),
        ([("ttl_s", b"5")], {}, 400, "ttl_s: expected text, got a file"),
        ([("image", b"broken")], {}, 422, "a.png: not a image"),
        ([("image", b"")], {}, 422, "the upload is empty"),
    ],
)
def test_uploads_that_are_refused(
    client: httpx.Client,
    files: list[tuple[str, bytes]],
    fields: dict[str, str],
    status: int,
    said: str,
) -> None:
    sent = [(kind, ("a.png", data)) for kind, data in files] or None
    response = client.post("/v1/media", files=sent, data=fields)
    assert response.status_code == status
    assert re.search(said, error_of(response)["message"])
    assert client.get("/v1/media").json()["data"] == []

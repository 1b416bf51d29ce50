"""/v1/media over HTTP: upload once, list, fetch, delete, and nothing of it for other tenants."""

import hashlib
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.support.running import error_of, new_key


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


@pytest.mark.parametrize(
    ("data", "mime"),
    [
        (b"<script>alert(1)</script>", "application/octet-stream"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "application/octet-stream"),
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


def test_a_medium_is_deleted_unless_it_is_shown(client: httpx.Client) -> None:
    id_ = upload(client, "image", "cat.jpg", b"meow")["id"]
    form = {"message": "What?", "image": f"media:{id_}"}
    conversation = client.post("/v1/chat", data=form).json()["conversation_id"]
    refused = client.delete(f"/v1/media/{id_}")
    assert (refused.status_code, error_of(refused)["code"]) == (409, "conflict_error")
    assert conversation in error_of(refused)["message"]
    assert client.delete(f"/v1/conversations/{conversation}").status_code == 200
    assert client.delete(f"/v1/media/{id_}").json() == {"id": id_, "deleted": True}
    for request in (client.get, client.delete):
        assert request(f"/v1/media/{id_}").status_code == 404
    assert client.get(f"/v1/media/{id_}/content").status_code == 404


def test_a_file_that_has_vanished_is_said(client: httpx.Client, tmp_path: Path) -> None:
    id_ = upload(client, "image", "cat.jpg", b"meow")["id"]
    (file,) = (path for path in (tmp_path / "data" / "media").rglob("*") if path.is_file())
    file.unlink()
    shown = client.post("/v1/chat", data={"message": "?", "image": f"media:{id_}"})
    for response in (client.get(f"/v1/media/{id_}/content"), shown):
        assert response.status_code == 410
        assert "upload it again" in error_of(response)["message"]
        assert str(tmp_path) not in response.text


def test_other_tenants_see_nothing_of_a_medium(client: httpx.Client, tmp_path: Path) -> None:
    secrets = [new_key(tmp_path / "data", name, tenant=name) for name in ("alice", "bob")]
    client.headers["authorization"] = f"Bearer {secrets[0]}"
    url = f"/v1/media/{upload(client, 'image', 'cat.jpg', b'meow')['id']}"
    id_ = url.rpartition("/")[2]
    part = {"type": "image_url", "image_url": {"url": f"media:{id_}"}}
    asked = {"model": "fake", "messages": [{"role": "user", "content": [part]}]}
    with httpx.Client(base_url=client.base_url, trust_env=False) as bob:
        bob.headers["authorization"] = f"Bearer {secrets[1]}"
        upload(bob, "image", "dog.jpg", b"meow")  # the same content is no way in
        assert [m["name"] for m in bob.get("/v1/media").json()["data"]] == ["dog.jpg"]
        responses = [
            bob.get(url),
            bob.get(f"{url}/content"),
            bob.delete(url),
            bob.get("/v1/media", params={"after": id_}),
            bob.post("/v1/chat", data={"message": "?", "image": f"media:{id_}"}),
            bob.post("/v1/estimate", data={"message": "?", "image": f"media:{id_}"}),
            bob.post("/v1/chat/completions", json=asked),
        ]
    for response in responses:
        assert (response.status_code, error_of(response)["code"]) == (404, "not_found_error")
    assert client.post("/v1/chat/completions", json=asked).status_code == 200
    assert client.get(f"{url}/content").content == b"meow"

"""A model hub on this machine, as far as Hugging Face's library asks it, and its moods."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_secret"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """Repositories by name, each with its files' bytes by name.

    ``gated`` names are shown, but their files are not given. The next download of a file that is in
    ``broken`` ends in the middle; a file that is ``lost`` is never sent. ``sent`` has each file
    that was sent, with the byte at which it began.

    ``created`` has what was asked for each new repository. Large files that come lie in ``large``
    by their digest; it takes ``room`` more of them. A commit makes them files of a repository.
    """

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)
    lost: set[str] = field(default_factory=set)
    sent: list[tuple[str, int]] = field(default_factory=list)
    created: dict[str, dict[str, Any]] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    room: int = 100
    url: str = ""

    def add_folder(self, name: str, folder: Path) -> None:
        files = [file for file in folder.rglob("*") if file.is_file()]
        self.repos[name] = {str(f.relative_to(folder)): f.read_bytes() for f in files}

    def names(self) -> list[str]:
        """The files that were sent, each once."""
        return sorted({file for file, _ in self.sent})


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    hub = FakeHub()

    class Handler(_Handler):
        served = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    served: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        hub, path = self.served, urlsplit(self.path).path
        data = self.rfile.read(int(self.headers["Content-Length"]))
        lines = list(map(json.loads, data.splitlines()))
        repo = re.sub(r"^/(api/models/)?([^/]+/[^/.]+)[/.].*", r"\2", path)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._refuse(401, "")
        elif path == "/api/repos/create":
            repo = f"{lines[0]['organization']}/{lines[0]['name']}"
            hub.created[repo] = lines[0]
            hub.repos.setdefault(repo, {})
            self._json({"url": f"{hub.url}/{repo}"})
        elif path.endswith("/preupload/main"):
            for one in lines[0]["files"]:
                large = one["path"].endswith(".safetensors")
                one |= {"uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            self._json(lines[0])
        elif path.endswith("/objects/batch"):
            for one in lines[0]["objects"]:
                if one["oid"] not in hub.large:
                    one["actions"] = {"upload": {"href": f"{hub.url}/large/{one['oid']}"}}
            self._json({"transfer": "basic", "objects": lines[0]["objects"]})
        elif path.endswith("/commit/main"):
            for key, value in (line.values() for line in lines):
                if key in ("file", "lfsFile"):
                    content = base64.b64decode(value.get("content", ""))
                    hub.repos[repo][value["path"]] = hub.large.get(value.get("oid"), content)
            self._json({"commitUrl": f"{hub.url}/{repo}/commit/{COMMIT}", "commitOid": COMMIT})
        else:  # the check of a card's first lines
            self._json({})

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.served.room -= 1
        if self.served.room >= 0:
            self.served.large[_digest(data)] = data
        self._send(200 if self.served.room >= 0 else 403, b"", {})

    def log_message(self, format: str, *args: Any) -> None:
        """Tests need no log."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(tree|revision)/[^/]+)?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        found = api or file
        if found is None or found[1] not in self.served.repos:
            self._refuse(401, "RepoNotFound")  # as the hub does for a name that nobody has
        elif api is not None:
            files = self.served.repos[api[1]]
            self._json(_tree(files) if api[2] == "tree" else _info(api[1], files))
        elif file is not None and file[1] in self.served.gated:
            self._refuse(403, "GatedRepo")
        elif file is not None and file[2] in self.served.repos[file[1]]:
            self._file(file[2], self.served.repos[file[1]][file[2]])
        else:
            self._refuse(404, "EntryNotFound")

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def _json(self, content: Any) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _file(self, name: str, data: bytes) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(asked[1]) if asked else 0
        headers = {"ETag": f'"{_digest(data)}"', "X-Repo-Commit": COMMIT}
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if self.command == "GET":
            self.served.sent.append((name, start))
        part = data[start:]
        most = 0 if name in self.served.lost else None
        if self.command == "GET" and name in self.served.broken:
            self.served.broken.remove(name)
            most = len(part) // 2
        self._send(206 if asked else 200, part, headers, most)

    def _send(
        self, status: int, body: bytes, headers: dict[str, str], most: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command in ("GET", "POST"):
            self.wfile.write(body[:most])
        if most is not None:
            self.close_connection = True


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _info(name: str, files: dict[str, bytes]) -> dict[str, Any]:
    siblings = [{"rfilename": file, "size": len(data)} for file, data in files.items()]
    config = json.loads(files.get("config.json", b"{}"))
    kept = {key: config[key] for key in ("model_type", "architectures") if key in config}
    return {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "config": kept}


def _tree(files: dict[str, bytes]) -> list[dict[str, Any]]:
    return [
        {"type": "file", "path": file, "size": len(data), "oid": _digest(data)[:40]}
        for file, data in files.items()
    ]

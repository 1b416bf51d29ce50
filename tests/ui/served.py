"""A service with a fake assistant, and a client of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mico_chat.wire import MediaList, MediaObject
from mico_server.settings import ServerSettings
from mico_ui.client import Client
from mico_ui.routes import Call, read_as
from tests.fakes import FakeAssistant
from tests.server.running import running, wait_until_ready


def stored_media(client: Client) -> list[MediaObject]:
    """The media that the service stores, the newest first."""
    return client.send(Call("GET", "/v1/media", read_as(MediaList))).data


@contextmanager
def served(folder: Path, assistant: FakeAssistant, **settings: Any) -> Iterator[Client]:
    """A client of a service whose data are in ``folder``, while the block runs."""
    asked = ServerSettings(data_dir=folder / "data", **settings)
    with running(lambda: assistant, asked) as http:
        wait_until_ready(http)
        with Client(str(http.base_url)) as client:
            yield client

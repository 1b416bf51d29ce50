"""The service with a fake assistant as a process, which a test can kill.

``python -m tests.ui.fake_server --port PORT --data-dir FOLDER --words FILE``: no answer has more
words than the number in the file, which may change while the service runs. Media are decoded by the
real decoder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import uvicorn

from mico_chat.media import MediaDecoder
from mico_server.app import create_app
from mico_server.settings import ServerSettings
from tests.fakes import FakeAssistant


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--words", type=Path, required=True)
    options = parser.parse_args()
    with MediaDecoder() as decoder:
        assistant = FakeAssistant(allowed=lambda: float(options.words.read_text()), decoder=decoder)
        app = create_app(lambda: assistant, ServerSettings(data_dir=options.data_dir))
        uvicorn.run(app, port=options.port, log_level="warning", timeout_graceful_shutdown=1)


if __name__ == "__main__":
    main()

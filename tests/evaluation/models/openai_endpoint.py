"""A small OpenAI-compatible server in a thread; a test decides its answers."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[dict[str, Any]], tuple[int, str | bytes]]
"""From a request to a status and a text (an answer or a reason), or a whole body as bytes."""


@contextmanager
def answering(answer: Answer) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server that gives ``answer(request)``; yields its URL and the requests it gets.

    A status of 0 closes the connection without a word.
    """
    requests: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append({**request, "key": self.headers["Authorization"], "path": self.path})
            status, said = answer(request)
            if not status:
                self.close_connection = True
                return
            data = said if isinstance(said, bytes) else json.dumps(body(status, said)).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Retry-After-Ms", "10")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *arguments: object) -> None:
            """Nothing: requests are not logged."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1", requests
        finally:
            server.shutdown()
            thread.join()


def body(status: int, said: str, finish_reason: str = "stop") -> dict[str, Any]:
    if status != 200:
        return {"error": {"message": said, "type": "error"}}
    message = {"role": "assistant", "content": said}
    choice = {"index": 0, "finish_reason": finish_reason, "message": message}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}


def parts(request: dict[str, Any]) -> list[dict[str, Any]]:
    content = request["messages"][-1]["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def text(request: dict[str, Any]) -> str:
    return "".join(part["text"] for part in parts(request) if part["type"] == "text")

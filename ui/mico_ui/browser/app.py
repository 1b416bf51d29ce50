"""The application: the page, and Gradio mounted behind it, with a strict policy.

The page is a component of our own (``gr.HTML``): ``gr.Chatbot`` and ``gr.MultimodalTextbox`` have
no place for a medium's report, a file's kind or the camera. Gradio does the calls to Python. Its
queue is not used: an answer would end with the browser's connection. Its uploads are not used: the
door takes them. Its scripts are not used: they are ten times the page, and a slow connection would
show nothing before it has them all.
"""

import gzip
import hashlib
import inspect
import json
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mico_chat.media import MediaLimits
from mico_chat.media.kinds import listed
from mico_ui.browser.cards import MediaDesk, Previewer
from mico_ui.browser.door import Door, Uploads, places
from mico_ui.browser.page import Page, PageFunction
from mico_ui.browser.visitor import NO_ACCESS, Access
from mico_ui.client import AsyncClient

_find = inspect.getfile


def _getfile(searched: Any) -> str:
    if isinstance(searched, type):  # Gradio writes it a stub for editors, at each import
        raise OSError(f"{searched}: its source is not looked for")
    return _find(searched)


vars(inspect)["getfile"] = _getfile
try:
    import gradio as gr
    from gradio.utils import get_upload_folder
finally:
    vars(inspect)["getfile"] = _find

WEB = Path(__file__).parent / "web"

# In the order in which they build on each other; `start` is last.
SCRIPTS = (
    *("core", "models", "cards", "attachments", "why", "teach", "aloud", "turns", "prompt"),
    *("composer", "library", "compare", "talk", "start"),
)

# The first paint has the system's colours; the user may have chosen others.
_DRESS = """document.currentScript.parentNode.dataset.theme =
matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";"""

# Nothing is loaded from another site, and no other site may frame the page.
POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "media-src 'self' blob:",
        "font-src 'self' data:",
        "connect-src 'self'",
        "frame-ancestors 'self'",
        "base-uri 'self'",
        "object-src 'none'",
    )
)


def create_app(
    api: str, access: Access = NO_ACCESS, *, loopback: bool = True, origins: Collection[str] = ()
) -> FastAPI:
    """The page's application, for the server at ``api``; ``access`` is its visitors'.

    ``loopback`` and ``origins`` are :class:`~mico_ui.browser.door.Door`'s.
    """
    AsyncClient(api)  # raises for a wrong address
    previewer = Previewer()
    uploads, written = Uploads(Path(get_upload_folder())), set[str]()
    desk = MediaDesk(api, previewer, uploads.folder, uploads.drop)
    blocks, component = _blocks(desk, written, access)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            previewer.close()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Door, api, access, uploads, written, loopback, places(origins))
    app.add_middleware(Policy)  # the outermost: its headers are on refusals, too
    _serve_page(app, component)
    mounted: FastAPI = gr.mount_gradio_app(
        app,
        blocks,
        "/",
        footer_links=[],
        run_history=False,
        show_error=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
    )
    return mounted


def _blocks(desk: MediaDesk, written: set[str], access: Access) -> tuple[gr.Blocks, int]:
    """Gradio's application, and the id of its component, whose functions the page calls."""
    blocks: gr.Blocks
    with gr.Blocks(
        title="MiCo-Chat",
        analytics_enabled=False,
        delete_cache=(300, 1800),  # seconds between two clean-ups, and seconds that a file stays
    ) as blocks:
        blocks.temp_file_sets.append(written)
        page = Page(desk, written.add)

        def for_visitors(function: PageFunction) -> Callable[..., Any]:
            async def called(sent: dict[str, Any], request: gr.Request) -> dict[str, Any]:
                return await function(sent, access.for_visitor(request.headers))

            called.__name__ = function.__name__
            return called

        functions = [for_visitors(function) for function in page.functions()]
        component = gr.HTML(server_functions=functions)
    return blocks, int(component._id)


def _serve_page(app: FastAPI, component: int) -> None:
    """Answer ``GET /`` with the whole page in one piece: its words, its style and its scripts."""
    style, html, *scripts = (
        (WEB / name).read_text(encoding="utf-8")
        for name in ("style.css", "page.html", *(f"{name}.js" for name in SCRIPTS))
    )
    known = json.dumps({"largest": MediaLimits().max_bytes, "kinds": listed()})
    start = (
        f"mico.start(document.querySelector('#mico-page'), mico.serverOf({component}), {known});"
    )
    text = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>MiCo-Chat</title>
<style>{style}</style>
</head>
<body>
<div id="mico-page" class="mico">
<script>{_DRESS}</script>
{html}</div>
<script>{"".join(scripts)}{start}</script>
</body>
</html>
"""
    whole = text.encode()
    packed, tag = gzip.compress(whole), f'"{hashlib.sha256(whole).hexdigest()}"'
    headers = {"etag": tag, "cache-control": "no-cache", "vary": "accept-encoding"}

    @app.api_route("/ear.js", methods=["GET", "HEAD"])
    async def ear() -> Response:  # the policy lets a page load no worklet but from a file
        return FileResponse(WEB / "ear.js", media_type="text/javascript")

    @app.api_route("/", methods=["GET", "HEAD"])
    async def page(request: Request) -> Response:
        if request.headers.get("if-none-match") in (tag, f"W/{tag}"):
            return Response(status_code=304, headers=headers)
        if "gzip" in request.headers.get("accept-encoding", ""):
            more = {**headers, "content-encoding": "gzip"}
            return Response(packed, headers=more, media_type="text/html")
        return Response(whole, headers=headers, media_type="text/html")


class Policy:
    """ASGI middleware: adds the headers that limit a page of ours in the browser."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["content-security-policy"] = POLICY
                headers["x-content-type-options"] = "nosniff"
                headers["referrer-policy"] = "same-origin"
            await send(message)

        await self.app(scope, receive, with_headers if scope["type"] == "http" else send)

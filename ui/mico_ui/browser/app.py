"""The application: one Gradio page, mounted in an application of its own with a strict policy.

The page is a component of our own (``gr.HTML``): ``gr.Chatbot`` and ``gr.MultimodalTextbox`` have
no place for a medium's report, a file's kind or the camera. Gradio does the calls to Python. Its
queue is not used: an answer would end with the browser's connection. Its uploads are not used: the
door takes them.
"""

import inspect
import json
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
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
    from gradio.themes import Base
    from gradio.utils import get_upload_folder
finally:
    vars(inspect)["getfile"] = _find

WEB = Path(__file__).parent / "web"

# In the order in which they build on each other; `start` is last.
SCRIPTS = (
    *("core", "models", "cards", "attachments", "why", "teach", "turns", "composer", "library"),
    *("compare", "start"),
)

# Nothing is loaded from another site, and no other site may frame the page. Gradio's templates and
# scripts are compiled in the browser, hence 'unsafe-eval'.
POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
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
    blocks = _blocks(desk, written, access)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            previewer.close()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Door, api, access, uploads, written, loopback, places(origins))
    app.add_middleware(Policy)  # the outermost: its headers are on refusals, too
    mounted: FastAPI = gr.mount_gradio_app(
        app,
        blocks,
        "/",
        # Gradio's own parts, its toasts, use the machine's fonts: none comes from another site.
        theme=Base(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")),
        css_paths=WEB / "style.css",
        footer_links=[],
        run_history=False,
        show_error=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
    )
    return mounted


def _blocks(desk: MediaDesk, written: set[str], access: Access) -> gr.Blocks:
    scripts = "\n".join((WEB / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)
    blocks: gr.Blocks
    with gr.Blocks(
        title="MiCo-Chat",
        analytics_enabled=False,
        fill_width=True,
        delete_cache=(300, 1800),  # seconds between two clean-ups, and seconds that a file stays
    ) as blocks:
        blocks.temp_file_sets.append(written)
        page = Page(desk, written.add)

        def for_visitors(function: PageFunction) -> Callable[..., Any]:
            async def called(sent: dict[str, Any], request: gr.Request) -> dict[str, Any]:
                return await function(sent, access.for_visitor(request.headers))

            called.__name__ = function.__name__
            return called

        start = {"largest": MediaLimits().max_bytes, "kinds": listed()}
        gr.HTML(
            html_template=(WEB / "page.html").read_text(encoding="utf-8"),
            head=f"<script>{scripts}</script>",
            js_on_load=f"mico.start(element, server, {json.dumps(start)});",
            apply_default_css=False,
            server_functions=[for_visitors(function) for function in page.functions()],
            elem_id="mico-page",
        )
    return blocks


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

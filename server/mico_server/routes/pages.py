"""Pages for a browser: where to go from here, and the API's description.

FastAPI's own pages take their scripts from the web. The package fastapi-offline brings the same
files, so that these pages work without a network.
"""

from __future__ import annotations

from importlib.resources import as_file, files
from typing import Literal

from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse

router = APIRouter(include_in_schema=False)

# The pages start by a script of their own lines; nothing else comes from elsewhere.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; worker-src blob:"
)

_WELCOME = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark">
<title>MiCo-Chat API</title>
<body style="font-family: system-ui, sans-serif; max-width: 40rem; margin: 3rem auto">
<h1>MiCo-Chat API</h1>
<p>This address is for programs. To chat in the browser, run <code>mico-chat ui</code> and open the
address that it prints.</p>
<ul>
<li><a href="docs">The API, to read and to try</a></li>
<li><a href="openapi.json">The API's description for programs (OpenAPI)</a></li>
<li><a href="v1/models">The model that is served</a></li>
<li><a href="health/ready">Whether the model is ready</a></li>
</ul>
"""


def _page(page: HTMLResponse) -> HTMLResponse:
    page.headers["content-security-policy"] = _POLICY
    return page


@router.get("/")
async def welcome() -> HTMLResponse:
    """Where to go from here."""
    return _page(HTMLResponse(_WELCOME))


def _under(request: Request) -> str:
    return str(request.scope.get("root_path", "")).rstrip("/")


@router.get("/docs")
async def docs(request: Request) -> HTMLResponse:
    """The API, to read and to try."""
    root = _under(request)
    page = get_swagger_ui_html(
        openapi_url=f"{root}/openapi.json",
        title="MiCo-Chat API",
        swagger_js_url=f"{root}/docs/swagger-ui-bundle.js",
        swagger_css_url=f"{root}/docs/swagger-ui.css",
        swagger_favicon_url=f"{root}/docs/favicon.png",
    )
    return _page(page)


@router.get("/redoc")
async def redoc(request: Request) -> HTMLResponse:
    """The API, to read."""
    root = _under(request)
    page = get_redoc_html(
        openapi_url=f"{root}/openapi.json",
        title="MiCo-Chat API",
        redoc_js_url=f"{root}/docs/redoc.standalone.js",
        redoc_favicon_url=f"{root}/docs/favicon.png",
        with_google_fonts=False,
    )
    return _page(page)


_Name = Literal["swagger-ui-bundle.js", "swagger-ui.css", "redoc.standalone.js", "favicon.png"]


@router.get("/docs/{name}")
async def file(name: _Name) -> FileResponse:
    """A file of the two pages above."""
    with as_file(files("fastapi_offline") / "static" / name) as path:
        return FileResponse(path, headers={"cache-control": "max-age=3600"})

"""Every error as one JSON object, ``{"error": {"message", "type", "code"}}``, as OpenAI has it."""

from __future__ import annotations

import logging
import re
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from mico_chat.errors import MicoError

logger = logging.getLogger(__name__)


class NotReadyError(MicoError):
    """The model is still loading, or could not be loaded."""

    status = 503


class BusyError(MicoError):
    """As many requests are being answered as the service takes."""

    status = 429


class NotFoundError(MicoError):
    """No such thing, or another tenant's: the two cannot be told apart."""

    status = 404


class ConflictError(MicoError):
    """The request does not fit the state that another one has left behind."""

    status = 409


class GoneError(MicoError):
    """It was there, and cannot be had again."""

    status = 410


class UnavailableError(MicoError):
    """The database cannot be reached at the moment."""

    status = 503


def error_response(status: int, message: str, code: str) -> JSONResponse:
    """The envelope; ``type`` says whose fault it is, ``code`` what happened."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "code": code}}, status)


def mico_error_response(error: MicoError) -> JSONResponse:
    """A MicoError with its own status; its code is the class's name in snake case."""
    code = re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__).lower()
    return error_response(error.status, str(error), code)


def add_error_handlers(app: FastAPI) -> None:
    """Answer every exception, those of the framework too, with the envelope."""

    async def on_mico_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, MicoError)
        if error.status >= 500:
            logger.error("%s: %s", request.url.path, error)
        return mico_error_response(error)

    async def on_http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
        response = error_response(error.status_code, str(error.detail), code)
        response.headers.update(error.headers or {})
        return response

    async def on_disconnect(request: Request, error: Exception) -> JSONResponse:
        logger.info("%s: the client went away", request.url.path)
        return error_response(499, "the client went away", "client_disconnect")  # nobody reads it

    async def on_crash(request: Request, error: Exception) -> JSONResponse:
        logger.exception("%s failed", request.url.path, exc_info=error)
        return error_response(500, "internal error; the server's log has the details", "internal")

    app.add_exception_handler(MicoError, on_mico_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(ClientDisconnect, on_disconnect)
    app.add_exception_handler(Exception, on_crash)

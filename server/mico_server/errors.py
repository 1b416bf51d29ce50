"""Every error as one JSON object in OpenAI's shape, ``{"error": {message, type, param, code}}``."""

from __future__ import annotations

import logging
import re
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from mico_chat.engine.base import request_error
from mico_chat.errors import ContextLengthError, MicoError, RequestError
from mico_chat.wire import ErrorBody
from mico_server.place import FetchError

logger = logging.getLogger(__name__)


class NotReadyError(MicoError):
    """The model is still loading, or could not be loaded."""

    status = 503


class BusyError(MicoError):
    """The service answers as many requests as it can; ``retry_after_s`` says when to ask again."""

    status = 429

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RequestTimeoutError(MicoError):
    """A request took longer than the service allows."""

    status = 504


class NotFoundError(MicoError):
    """The thing does not exist, or belongs to another tenant."""

    status = 404


class ModelNotFoundError(NotFoundError):
    """A request asks for a model that is not the served one."""


class ConflictError(MicoError):
    """The request does not fit the present state of the thing that it names."""

    status = 409


class GoneError(MicoError):
    """The thing existed once and is gone."""

    status = 410


class UnavailableError(MicoError):
    """The database cannot be reached at the moment."""

    status = 503


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors of a route, for the description of the API."""
    return {status: {"model": ErrorBody} for status in statuses}


def error_body(status: int, message: str, code: str, param: str | None = None) -> dict[str, Any]:
    """The envelope."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        kind = "rate_limit_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(status: int, message: str, code: str, param: str | None = None) -> JSONResponse:
    """The envelope as a response."""
    return JSONResponse(error_body(status, message, code, param), status)


# Codes that OpenAI's clients know by another name than the class's.
_CODES: dict[type[MicoError], str] = {
    ContextLengthError: "context_length_exceeded",
    ModelNotFoundError: "model_not_found",
}


def mico_error_body(error: MicoError) -> dict[str, Any]:
    """The envelope of a MicoError; its code is the class's name in snake case."""
    code = re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__).lower()
    param = None
    if isinstance(error, RequestError):
        param = error.param
    elif isinstance(error, FetchError):
        param = error.name
    return error_body(error.status, str(error), _CODES.get(type(error), code), param)


def mico_error_response(error: MicoError) -> JSONResponse:
    """A MicoError with its own status."""
    response = JSONResponse(mico_error_body(error), error.status)
    if isinstance(error, BusyError):
        response.headers["retry-after"] = str(error.retry_after_s)
    return response


def add_error_handlers(app: FastAPI) -> None:
    """Answer every exception, those of the framework too, with the envelope."""

    async def on_mico_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, MicoError)
        if error.status >= 500 and not isinstance(error, NotReadyError):
            logger.error("%s: %s", request.url.path, error)
        return mico_error_response(error)

    async def on_invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        # Where it stands ("body", "query") is not part of the client's own spelling.
        return mico_error_response(request_error(error.errors()[0], outer=1))

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
        response = error_response(
            500, "internal error; the server's log has the details", "internal"
        )
        response.headers["connection"] = "close"  # as the server will
        return response

    app.add_exception_handler(MicoError, on_mico_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(ClientDisconnect, on_disconnect)
    app.add_exception_handler(Exception, on_crash)

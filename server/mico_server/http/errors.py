"""Every error as one JSON object in OpenAI's shape, ``{"error": {message, type, param, code}}``."""

import logging
import re
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any, TypeAlias

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from mico_chat.errors import ContextLengthError, MicoError, RequestError
from mico_chat.options import request_error
from mico_chat.wire import ErrorBody
from mico_server.errors import BusyError, FetchError, ModelNotFoundError, NotReadyError

logger = logging.getLogger(__name__)

# The codes under which OpenAI's clients know these errors.
_CODES: dict[type[MicoError], str] = {
    ContextLengthError: "context_length_exceeded",
    ModelNotFoundError: "model_not_found",
}


ErrorForm: TypeAlias = Callable[[int, dict[str, Any]], dict[str, Any]]
"""It makes a dialect's own form of an error, of the status and the body in OpenAI's form."""


class ErrorResponse(JSONResponse):
    """An error in the form of the path that was asked (``app.state.error_forms``)."""

    def __init__(
        self, body: dict[str, Any], status: int, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(body, status, headers)
        self._error = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = scope.get("app")  # a guard may stand in front of another application
        form: ErrorForm | None = app and app.state.error_forms.get(scope["path"])
        if form is not None:
            self.body = self.render(form(self.status_code, self._error))
            self.headers["content-length"] = str(len(self.body))
        await super().__call__(scope, receive, send)


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody} for status in statuses}


def error_body(status: int, message: str, code: str, param: str | None = None) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        kind = "rate_limit_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(
    status: int,
    message: str,
    code: str,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    return ErrorResponse(error_body(status, message, code, param), status, headers)


def mico_error_body(error: MicoError) -> dict[str, Any]:
    """The JSON of a MicoError; its code is the class's name in snake case."""
    code = re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__).lower()
    param = None
    if isinstance(error, RequestError):
        param = error.param
    elif isinstance(error, FetchError):
        param = error.name
    return error_body(error.status, str(error), _CODES.get(type(error), code), param)


def mico_error_response(error: MicoError) -> JSONResponse:
    wait = {"retry-after": str(error.retry_after_s)} if isinstance(error, BusyError) else None
    return ErrorResponse(mico_error_body(error), error.status, wait)


def add_error_handlers(app: FastAPI, forms: Mapping[str, ErrorForm] | None = None) -> None:
    """``forms`` are those of the paths whose errors have a form of their own."""
    app.state.error_forms = forms or {}

    @app.exception_handler(MicoError)
    async def on_mico_error(request: Request, error: MicoError) -> JSONResponse:
        if error.status >= 500 and not isinstance(error, NotReadyError):
            logger.error("%s: %s", request.url.path, error)
        return mico_error_response(error)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        # The first part of the place ("body", "query") is FastAPI's, not the client's.
        return mico_error_response(request_error(error.errors()[0], outer=1))

    @app.exception_handler(StarletteHTTPException)
    async def on_http_error(request: Request, error: StarletteHTTPException) -> JSONResponse:
        if isinstance(error.detail, dict):  # of BodyLimit
            return ErrorResponse(error.detail, error.status_code, error.headers)
        code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
        return error_response(error.status_code, str(error.detail), code, headers=error.headers)

    @app.exception_handler(ClientDisconnect)
    async def on_disconnect(request: Request, error: ClientDisconnect) -> JSONResponse:
        logger.info("%s: the client went away", request.url.path)
        return error_response(499, "the client went away", "client_disconnect")  # nobody reads it

    @app.exception_handler(Exception)
    async def on_crash(request: Request, error: Exception) -> JSONResponse:
        logger.exception("%s failed", request.url.path, exc_info=error)
        message = "internal error; the server's log has the details"
        # The server closes the connection in any case.
        return error_response(500, message, "internal", headers={"connection": "close"})

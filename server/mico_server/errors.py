"""Errors of the service, below its doors, its stores and its routes.

::

    MicoError
    |-- NotReadyError        503  the model is still loading, or could not be loaded
    |-- UnavailableError     503  the database or Redis cannot be reached at the moment
    |-- BusyError            429  as many requests are running or waiting as the service takes
    |-- BodyTimeoutError     408  the body of a request stopped arriving
    |-- RequestTimeoutError  504  a request took longer than the service allows
    |-- NotFoundError        404  the thing does not exist, or belongs to another tenant
    |   `-- ModelNotFoundError    the request names a model that is not served
    |-- ConflictError        409  the request does not fit the present state of the thing
    |-- GoneError            410  the thing existed once
    |-- UnsupportedError     501  the served model cannot do this
    |-- NoRoomError          507  the model needs more memory than the service may use
    `-- MediaError
        `-- FetchError            a URL gives no medium
"""

from mico_chat.errors import MediaError, MicoError


class NotReadyError(MicoError):
    status = 503


class UnavailableError(MicoError):
    status = 503


class BusyError(MicoError):
    """The client may send its request again after ``retry_after_s`` seconds."""

    status = 429

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class BodyTimeoutError(MicoError):
    status = 408


class RequestTimeoutError(MicoError):
    status = 504


class NotFoundError(MicoError):
    status = 404


class ModelNotFoundError(NotFoundError):
    pass


class ConflictError(MicoError):
    status = 409


class GoneError(MicoError):
    status = 410


class UnsupportedError(MicoError):
    status = 501


class NoRoomError(MicoError):
    status = 507


class FetchError(MediaError):
    """``name`` is the field of the request that has the URL."""

    usual_fault = "url"

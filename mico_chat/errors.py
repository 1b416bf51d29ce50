"""Every error a user can meet, in one tree.

Each class has the HTTP status of the server's answer; the command line prints ``error: {message}``
and exits with 2. A message is one line: it names the thing, what was expected and what was found,
and what the user can do.

* MicoError (500)
    * MediaError (422): a medium that cannot be decoded
        * LimitError (413): a medium beyond a limit; names the setting that changes it
        * MissingFileError (404): no such file
    * RequestError (400): a request that cannot be answered as it stands
        * ContextLengthError (400): more tokens than the model's context holds
    * ConfigError (400): a setting or recipe that makes no sense
    * DataError (422): a manifest or shard with a bad record
    * MissingExtraError (501): an optional dependency that is not installed
        * MissingProtocolError (501): the package that reads an address (``s3://...``)
    * ModelError (500): the model failed, through no fault of the request
    * TrainingError (500): a run that ended early; the same command goes on with it
"""

from pathlib import Path
from typing import ClassVar, Self


class MicoError(Exception):
    """Root of the project's errors; ``status`` is the HTTP status of the server's answer."""

    status: ClassVar[int] = 500


class MediaError(MicoError):
    """A medium that cannot be decoded. ``str(error)`` is ``"cat.jpg: reason"``.

    ``reason`` is this project's text, never a decoder's, which could reveal addresses and paths.
    ``fault`` is a word for statistics: "damaged", "empty", "unsupported", "killed", "unusable", or
    the name of a limit.
    """

    status = 422
    usual_fault: ClassVar[str] = "unusable"

    def __init__(self, name: str, reason: str, fault: str | None = None) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason
        self.fault = fault or self.usual_fault

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"

    def named(self, name: str) -> Self:
        return type(self)(name, self.reason, self.fault)


class LimitError(MediaError):
    status = 413
    usual_fault = "limit"


class MissingFileError(MediaError):
    status = 404
    usual_fault = "missing"

    def __init__(self, name: str, reason: str = "no such file", fault: str | None = None) -> None:
        super().__init__(name, reason, fault)


class RequestError(MicoError):
    """A request that cannot be answered as it stands.

    ``param`` is the field at fault, written like ``messages[0].content[1].image_url.url``; None if
    no single field is at fault.
    """

    status = 400

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param

    @classmethod
    def at(cls, param: str, reason: str) -> Self:
        return cls(f"{param}: {reason}", param)


class ContextLengthError(RequestError):
    def __init__(self, message: str, param: str | None = "messages") -> None:
        super().__init__(message, param)


class ConfigError(MicoError):
    status = 400


class DataError(MicoError):
    """A bad record in a manifest or shard. ``str(error)`` is ``"train.jsonl:17: reason"``."""

    status = 422

    def __init__(self, file: str | Path, line: int | None, reason: str) -> None:
        super().__init__(str(file), line, reason)

    def __str__(self) -> str:
        file, line, reason = self.args
        return f"{file}: {reason}" if line is None else f"{file}:{line}: {reason}"


class MissingExtraError(MicoError):
    status = 501

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(feature, extra)

    def __str__(self) -> str:
        feature, extra = self.args
        install = f"pip install 'mico-chat[{extra}]'"
        return f"{feature} needs the extra '{extra}', which is not installed: {install}"


class MissingProtocolError(MissingExtraError):
    """``package`` reads addresses like this one, and is not installed."""

    def __str__(self) -> str:
        address, package = self.args
        return (
            f"{address} needs the package {package}, which is not installed: pip install {package}"
        )


class ModelError(MicoError):
    """The model or engine failed, through no fault of the request."""


class MissingLoraError(ModelError):
    """There is no adapter in a folder or under a name of the hub."""

    status = 404


class TrainingError(MicoError):
    """A run that ended early. ``code`` is the exit status, 128 and the number of a signal."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code

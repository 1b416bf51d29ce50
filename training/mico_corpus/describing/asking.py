"""Models that answer about media or texts: our own engines, or any OpenAI-compatible URL."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from pydantic import Field, ValidationError

from mico_chat.adapters.mico import MicoAdapter
from mico_chat.checkpoints.folders import model_name
from mico_chat.engines.table import choose
from mico_chat.errors import ConfigError
from mico_chat.evaluation.chat import reply_of, weights_fingerprint
from mico_chat.evaluation.endpoint import Endpoint, key_of
from mico_chat.evaluation.task import Reply
from mico_chat.load import EngineOptions, load_assistant
from mico_chat.media import MediaDecoder
from mico_chat.media.kinds import KINDS
from mico_chat.messages import Message
from mico_chat.options import GenerationOptions, request_error
from mico_corpus.describing.naming import version_of
from mico_training.recipe import Section


class Asking(Section):
    """Which model is asked, and how.

    ``url`` ends in ``/v1``; without one, ``engine`` loads ``model`` in this process, with the
    options of the command line. ``api_key_env`` names the variable that holds the URL's key,
    ``revision`` the weights behind the URL, which nobody else knows. ``at_once``: requests at the
    same time; by default 8 for a URL and 1 for an engine of our own, whose answers then do not
    depend on who else is asked (the last bits of a batch do, and with them one of two near words).
    """

    model: str = "mini"
    url: str | None = None
    api_key_env: str | None = None
    revision: str = ""
    max_tokens: int = Field(default=96, ge=1)
    at_once: int | None = Field(default=None, ge=1)
    engine: str = "auto"
    quantization: str | None = None
    dtype: str | None = None
    device: str | None = None
    engine_args: dict[str, Any] = Field(default_factory=dict)
    trust_remote_code: bool = False

    @classmethod
    def of(cls, annotator: str, given: dict[str, Any]) -> Asking:
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            raise ConfigError(f"{annotator}: {request_error(error.errors()[0])}") from error

    @property
    def answers_with(self) -> dict[str, Any]:
        """The settings on which answers depend."""
        return self.model_dump(exclude={"model", "url", "api_key_env", "revision", "at_once"})


class OwnModel:
    """A model in this process, without the system prompt and options of its folder.

    ``is_mini``: a model of this project, with its questions. Versions lack the prompt.
    """

    def __init__(self, how: Asking) -> None:
        self._how = how
        self._asked = 0
        self._at_once = how.at_once or 1
        options = EngineOptions(
            engine=how.engine,
            quantization=how.quantization,
            dtype=how.dtype,
            device=how.device,
            max_running=self._at_once,
            context_cache_bytes=0,  # what was encoded in another batch has other last bits
            arguments=self._arguments(),
            chat_defaults=False,
            trust_remote_code=how.trust_remote_code,
        )
        with ExitStack() as opened:
            decoder = opened.enter_context(MediaDecoder())
            self._assistant = load_assistant(how.model, decoder, options, similarity=False)
            self._assistant.encoder.reader = None  # other annotators read and listen
            opened.callback(self._assistant.close)
            self._open = opened.pop_all()
        self.is_mini = isinstance(self._assistant.adapter, MicoAdapter)
        self.reads = self._assistant.input_modalities

    def _arguments(self) -> dict[str, Any]:
        """With one slot, no keys of an earlier prompt lie beside a prompt's own."""
        how = self._how
        engine, _ = choose(EngineOptions(how.engine, how.quantization, device=how.device))
        has_slots = "n_slots" in (engine.sizes or ())
        one = {"n_slots": 1} if self._at_once == 1 and has_slots else {}
        return one | how.engine_args

    def version(self, **settings: Any) -> str:
        weights = weights_fingerprint(self._how.model, self._assistant.adapter)
        engine = {"engine": self._assistant.engine.name}
        said = self._how.answers_with | engine | settings
        return version_of(model_name(self._how.model), weights, **said)

    def ask(self, conversations: Sequence[Sequence[Message]]) -> list[Reply]:
        """The replies in order; a ModelError if the model does not answer."""
        options = GenerationOptions(max_tokens=self._how.max_tokens)
        replies: list[Reply] = []
        for start in range(0, len(conversations), self._at_once):
            asked = conversations[start : start + self._at_once]
            self._asked += 1
            # A tenant of its own: a prompt that goes on from another's start has other last bits.
            found = self._assistant.try_all(asked, options, tenant=str(self._asked))
            replies += [reply_of(one, self._how.max_tokens) for one in found]
        return replies

    def close(self) -> None:
        self._open.close()


class ModelAtUrl:
    is_mini = False
    reads = KINDS

    def __init__(self, how: Asking) -> None:
        self._how = how
        key = key_of(how.api_key_env, "api_key_env")
        self._endpoint = Endpoint(how.model, how.url, key, concurrency=how.at_once or 8)

    def version(self, **settings: Any) -> str:
        said = {"max_tokens": self._how.max_tokens} | settings
        return version_of(self._how.model, self._how.revision or "url", **said)

    def ask(self, conversations: Sequence[Sequence[Message]]) -> list[Reply]:
        return self._endpoint.ask_all(conversations, self._how.max_tokens)

    def close(self) -> None:
        self._endpoint.close()


def asker(how: Asking) -> OwnModel | ModelAtUrl:
    return OwnModel(how) if how.url is None else ModelAtUrl(how)

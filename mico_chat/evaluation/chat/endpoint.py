"""Any chat model behind an OpenAI-compatible URL: vLLM, ``mico-chat serve``, a service.

A status that says no to the request itself (400, 413, 415, 422, ..) makes the item *refused*: it is
counted and named, and is no wrong answer. What passes (408, 409, 429, 5xx, no connection) is tried
again by OpenAI's client, with waiting times that grow; then the run ends, and can go on later.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from mico_chat.errors import ConfigError, MediaError, MissingExtraError, ModelError
from mico_chat.evaluation.at_once import at_once
from mico_chat.evaluation.chat.model import (
    Conversation,
    Refused,
    Reply,
    Unreadable,
    reply_of,
)
from mico_chat.evaluation.chat.wire import Sending, Wire
from mico_chat.evaluation.tasks.store import Record

DEFAULT_KEY = "OPENAI_API_KEY"
TIMEOUT_S = 600.0
"""A long video on a busy server takes minutes."""
RETRIES = 6
"""Waits of 0.5, 1, 2, 4, 8, 8 s, or what the server asks for."""
PASSING = (408, 409, 429)
NOT_USABLE = (401, 403, 404)
"""A wrong key, no right to the model, no such model: no item would be answered."""


def key_of(variable: str | None, flag: str = "--api-key-env") -> str:
    """The key in an environment variable; a placeholder where none is named and none is set.

    Raises:
        ConfigError: the variable that ``flag`` names is not set.
    """
    if variable is not None and not os.environ.get(variable):
        raise ConfigError(f"{flag} names {variable}, which is not set")
    return os.environ.get(variable or DEFAULT_KEY) or "none"


class Endpoint:
    """A model at an address.

    Args:
        name: the model's at the server.
        base_url: the address up to ``/v1``.
        api_key: its key.
        concurrency: requests at a time.
        sending: how media are sent.
        workers: processes that decode what is not sent as it is.
        retries: of what passes.

    Raises:
        MissingExtraError: the extra ``eval`` is not installed.
    """

    controls: tuple[str, ...] = ("full", "withheld", "swapped")
    together = 1

    def __init__(
        self,
        name: str,
        base_url: str,
        api_key: str = "none",
        *,
        concurrency: int = 8,
        sending: Sending | None = None,
        workers: int = 1,
        retries: int = RETRIES,
    ) -> None:
        try:
            import openai
        except ImportError as error:
            raise MissingExtraError("evaluating an endpoint", "eval") from error
        self.name = name
        self.base_url = base_url
        self.concurrency = concurrency
        self._sending = sending or Sending()
        self._wire = Wire(self._sending, workers)
        self._client = openai.OpenAI(
            api_key=api_key, base_url=base_url, timeout=TIMEOUT_S, max_retries=retries
        )

    def header(self) -> Record:
        """See :class:`~mico_chat.evaluation.chat.model.ChatModel`."""
        said = str(self._sending)
        how = f"over {self.base_url}" + (f", {said}" if said else "")
        return {"model": self.name, "weights": None, "how": how}

    def use(self, control: str) -> None:
        """There is nothing to switch: an endpoint has the controls of what is shown alone."""
        assert control in self.controls

    def answers(
        self, conversations: Sequence[Conversation], max_tokens: int
    ) -> Iterator[tuple[int, Reply]]:
        """See :class:`~mico_chat.evaluation.chat.model.ChatModel`."""

        def answer(conversation: Conversation) -> Reply:
            return self._answer(conversation, max_tokens)

        return at_once(answer, enumerate(conversations), self.concurrency)

    def _answer(self, conversation: Conversation, max_tokens: int) -> Reply:
        import openai
        from openai.types.chat import ChatCompletion

        try:
            messages = self._wire.messages(conversation)
        except MediaError as error:
            return Unreadable(str(error))
        try:
            done = self._client.chat.completions.create(
                model=self.name,
                messages=messages,  # type: ignore[arg-type]  # more kinds than OpenAI's own
                max_tokens=max_tokens,
                temperature=0,
            )
        except openai.APIStatusError as error:
            status = error.status_code
            if status < 500 and status not in (*PASSING, *NOT_USABLE):
                return Refused(_one_line(error.message))
            raise self._failed(error.message) from error
        except (openai.OpenAIError, ValueError) as error:  # the latter: a body that is no JSON
            raise self._failed(str(error)) from error
        if not isinstance(done, ChatCompletion) or not done.choices:
            raise self._failed(f"its answer has no choices: {str(done)[:80]!r}")
        choice = done.choices[0]
        return reply_of(choice.message.content or "", choice.finish_reason, max_tokens)

    def _failed(self, reason: str) -> ModelError:
        return ModelError(
            f"{self.name!r} at {self.base_url} does not answer: {_one_line(reason)}; run "
            "the same command again to continue from here"
        )

    def close(self) -> None:
        """End connections and decoders."""
        self._client.close()
        self._wire.close()


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]

"""The processor of a MiCo-Chat model as transformers' pipeline "any-to-any" takes it.

The class apart costs what its base class does: 1,700 modules and 130 MB that nothing else needs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import BatchFeature, ProcessorMixin

from mico_chat import chats
from mico_chat.errors import RequestError
from mico_chat.media.decoder import MediaDecoder
from mico_chat.messages import with_system
from mico_chat.model import processing
from mico_chat.options import GREEDY, GenerationOptions

MEDIA = {"images": "image", "videos": "video", "audio": "audio"}
"""Arguments of a pipeline that is not given a chat, and the kinds of their media."""

FIXED = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
"""Options of transformers' chat templates that have one value here."""

ONE = "give one; a pipeline takes a list of chats, and answers one after the other"


class MicoChatProcessor(processing.MicoChatProcessor, ProcessorMixin):  # type: ignore[misc]
    """It takes a chat as transformers writes them too, and decodes its media."""

    def __call__(self, conversations: Any = None, **given: Any) -> BatchFeature:
        """Conversations as in the base class, or a ``text`` with ``images``, ``videos``, ``audio``.

        The text is a question of a user, whose media stand before it: one of a kind, or a list.
        """
        if conversations is not None:
            return super().__call__(conversations, **given)
        text = given.pop("text", None) or ""
        if not isinstance(text, str):
            raise RequestError.at("text", f"{len(text)} texts: {ONE}")
        parts: list[dict[str, Any]] = []
        for name, kind in MEDIA.items():
            media = given.pop(name, None)
            several = media if isinstance(media, list | tuple) else [media]
            parts += [{"type": kind, kind: one} for one in several if one is not None]
        parts.append({"type": "text", "text": text})
        return self.apply_chat_template([{"role": "user", "content": parts}], **given)

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """The tensors of one chat, B = 1, behind the model's own system prompt.

        With ``continue_final_message`` the answer goes on where the last message ends.

        Raises:
            RequestError, MediaError: an argument, a message or a medium that cannot be read.
        """
        for name, value in {**kwargs, **(processor_kwargs or {})}.items():
            if value is not None and value != FIXED.get(name):
                reason = f"{value!r} is not possible here: leave it out, or give"
                raise RequestError.at(name, f"{reason} {FIXED.get(name)!r}")
        if not conversation or not isinstance(conversation[0], Mapping):
            raise RequestError.at("conversation", f"{len(conversation)} chats: {ONE}")
        with MediaDecoder() as decoder:
            read = chats.conversation(conversation, decoder.limits)
            messages = [message.with_files(decoder.decode) for message in read]
        options = GREEDY
        if continue_final_message:
            *messages, last = messages
            if last.role != "assistant" or last.media:
                reason = "the last message must be the assistant's, without media"
                raise RequestError.at("continue_final_message", reason)
            options = GenerationOptions(prefix=last.text)
        return super().__call__(
            [with_system(messages, self.system_prompt)],
            add_generation_prompt=add_generation_prompt or continue_final_message,
            options=options,
        )

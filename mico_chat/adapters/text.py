"""Another project's model that reads text alone: its tokenizer and its chat template."""

from collections.abc import Hashable, Sequence
from copy import deepcopy
from typing import Any, cast

import torch

from mico_chat.adapters.base import PromptLayout
from mico_chat.chat_template import ChatTemplate
from mico_chat.engine.base import Prompt
from mico_chat.errors import RequestError
from mico_chat.media.file import MediaFile
from mico_chat.media.kinds import Kind
from mico_chat.media.medium import ContextBlock, MeasuredMedium, Medium
from mico_chat.media.view import View
from mico_chat.messages import Message
from mico_chat.options import GREEDY, GenerationOptions
from mico_chat.prompt_parts import PromptPart, PromptText, string_tokenizer


class TextAdapter:
    """See :class:`mico_chat.adapters.base.ModelAdapter`."""

    encodes = True

    def __init__(self, llm: Any, tokenizer: Any) -> None:
        self.tokenizer = deepcopy(tokenizer)  # it has switches, which each call turns
        self.template = ChatTemplate(self.tokenizer)
        self.input_modalities: tuple[Kind, ...] = ()
        self._tokens, self._device = string_tokenizer(self.tokenizer), llm.device

    def setting(self, shown: Sequence[Kind]) -> Hashable:
        return "text"

    def viewed(self, kind: Kind, view: View) -> View:
        return view

    def prepare(self, medium: Medium, shown: Sequence[Kind]) -> MeasuredMedium:
        raise RequestError(f"{medium.name}: this model reads text alone", medium.kind)

    def encode(self, batch: Sequence[MeasuredMedium]) -> list[ContextBlock]:
        return []  # there are no media

    def layout(
        self,
        messages: Sequence[Message],
        media: Sequence[MeasuredMedium],
        options: GenerationOptions = GREEDY,
    ) -> PromptLayout:
        texts = (["".join(map(str, medium.pieces))] for medium in media)

        def show(_: MediaFile | Medium) -> list[PromptPart]:
            return [PromptText(text) for text in next(texts)]

        parts = cast("list[PromptText]", self.template.parts(messages, show, options))
        return [tuple(token for token, _ in self._tokens(parts))]

    def whole_inputs(self, prompt: Prompt) -> dict[str, Any]:
        """The model's own inputs of a whole prompt, of a model that runs alone."""
        ids = torch.tensor([prompt.tokens(0, len(prompt))[0]], device=self._device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

"""The tokenizer and the chat template of a GGUF file, in llama.cpp."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from mico_chat.engine.llamacpp import Weights
from mico_chat.errors import ModelError, RequestError
from mico_chat.model.processing import PromptText


class Vocabulary:
    """The tokens of a model that llama.cpp has loaded.

    It is used like a fast tokenizer of Hugging Face by :class:`mico_chat.engine.request.Request`.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._vocab = vocab = llama_cpp.llama_model_get_vocab(weights.pointer)
        template = llama_cpp.llama_model_chat_template(weights.pointer, None)
        self._template = None if template is None else template.decode()
        self._bos = llama_cpp.llama_vocab_bos(vocab)
        self._adds_bos = bool(llama_cpp.llama_vocab_get_add_bos(vocab))
        names = {"bos_token": self._bos, "eos_token": llama_cpp.llama_vocab_eos(vocab)}
        self._named = {n: self.id_to_token(token) for n, token in names.items() if token >= 0}

    @property
    def backend_tokenizer(self) -> Vocabulary:
        return self

    def id_to_token(self, token: int) -> str:
        text: bytes = llama_cpp.llama_vocab_get_text(self._vocab, token)
        return text.decode(errors="replace")

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        tokens = np.asarray(ids, np.int32)
        room = 64 + 32 * len(tokens)
        while True:
            text = ctypes.create_string_buffer(room)
            given = tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
            n = llama_cpp.llama_detokenize(
                self._vocab, given, len(tokens), text, room, False, not skip_special_tokens
            )
            if n >= 0:
                return text.raw[:n].decode(errors="replace")
            room = -n

    def tokens(self, text: str, *, markup: bool) -> list[int]:
        """The tokens of a text, in which special tokens are recognised if it is ``markup``."""
        raw = text.encode()
        ids = (ctypes.c_int32 * (len(raw) + 2))()
        n = llama_cpp.llama_tokenize(self._vocab, raw, len(raw), ids, len(ids), False, markup)
        if n < 0:
            raise ModelError(f"llama.cpp could not tokenize {len(raw)} bytes of text")
        return list(ids[:n])

    def joined(self, parts: Sequence[PromptText]) -> list[int]:
        """Tokens of text that is tokenized as a whole, as llama.cpp does, if that is safe.

        If a part that is not markup would add a special token, parts are tokenized one by one.
        """
        whole = self.tokens("".join(part.text for part in parts), markup=True)
        apart = [self.tokens(part.text, markup=part.markup) for part in parts]
        of_markup = [ids for part, ids in zip(parts, apart, strict=True) if part.markup]
        special = [token for ids in of_markup for token in ids if self._is_special(token)]
        if [token for token in whole if self._is_special(token)] == special:
            return whole
        return [token for ids in apart for token in ids]

    def with_bos(self, ids: Sequence[int]) -> tuple[int, ...]:
        """The start of a prompt, with the beginning-of-text token if the model was trained so."""
        add = self._adds_bos and self._bos >= 0 and tuple(ids[:1]) != (self._bos,)
        return (self._bos, *ids) if add else tuple(ids)

    def rendered(self, messages: Sequence[dict[str, Any]]) -> str:
        """Messages in the model's chat template, up to where the assistant's answer begins."""
        if self._template is None:
            raise ModelError(
                "this GGUF file lacks a chat template: choose one that is made to chat"
            )
        try:
            render: Any = render_jinja_template  # which takes any names for the template
            texts, _ = render(
                [list(messages)],
                chat_template=self._template,
                add_generation_prompt=True,
                **self._named,
            )
        except (TemplateError, TypeError, KeyError) as error:
            raise RequestError(f"the model's chat template: {error}", "messages") from error
        return str(texts[0])

    def _is_special(self, token: int) -> bool:
        return bool(llama_cpp.llama_vocab_is_control(self._vocab, token))

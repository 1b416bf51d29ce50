"""The tokenizer and the chat template of a GGUF file, in llama.cpp."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from tokenizers import AddedToken

from mico_chat.engine import llamacpp_library as llama_cpp
from mico_chat.engine.llamacpp import Weights
from mico_chat.errors import ModelError
from mico_chat.prompt_parts import PromptText, control_tokens


class Vocabulary:
    """The tokens of a model that llama.cpp has loaded, with those methods of Hugging Face's
    tokenizers that the chat template and the engine call.
    """

    response_template = None  # a GGUF file has none

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._vocab = vocab = llama_cpp.llama_model_get_vocab(weights.pointer)
        self._bos = llama_cpp.llama_vocab_bos(vocab)
        self.eos_token_id = llama_cpp.llama_vocab_eos(vocab)
        self.bos_token_id = self._bos if self._bos >= 0 else None
        names = {"bos_token": self._bos, "eos_token": self.eos_token_id}
        self.special_tokens_map = {
            n: self.id_to_token(token) for n, token in names.items() if token >= 0
        }

    @property
    def backend_tokenizer(self) -> Vocabulary:
        return self

    def id_to_token(self, token: int) -> str:
        text: bytes = llama_cpp.llama_vocab_get_text(self._vocab, token)
        return text.decode(errors="replace")

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        tokens = np.asarray(ids, np.int32)
        room = 64 + 16 * len(tokens)
        while True:
            text = ctypes.create_string_buffer(room)
            n = llama_cpp.llama_detokenize(
                self._vocab,
                tokens.ctypes.data,
                len(tokens),
                text,
                room,
                False,
                not skip_special_tokens,
            )
            if n >= 0:
                return text.raw[:n].decode(errors="replace")
            room = -n

    @cached_property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """Control tokens, and those that the file's author added."""
        found = {}
        for token in range(llama_cpp.llama_vocab_n_tokens(self._vocab)):
            kind = llama_cpp.llama_vocab_get_attr(self._vocab, token)
            control = bool(kind & llama_cpp.LLAMA_TOKEN_ATTR_CONTROL)
            if control or kind & llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED:
                found[token] = AddedToken(self.id_to_token(token), special=control)
        return found

    # llguidance takes these three, and the two ids above (``TokenizerWrapper``).

    @cached_property
    def tokens(self) -> list[bytes]:
        """The bytes that each token adds to a text."""
        piece = ctypes.create_string_buffer(1 << 14)  # llama.cpp's longest tokens have 256 bytes
        found = []
        for token in range(llama_cpp.llama_vocab_n_tokens(self._vocab)):
            n = llama_cpp.llama_token_to_piece(self._vocab, token, piece, len(piece), 0, True)
            found.append(piece.raw[: max(0, n)])
        return found

    @property
    def special_token_ids(self) -> list[int]:
        return [number for number, token in self.added_tokens_decoder.items() if token.special]

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenized(text, markup=False)

    def get_chat_template(self, source: str | None, tools: Any) -> str:
        template = llama_cpp.llama_model_chat_template(self._weights.pointer, None)
        if template is None:
            raise ModelError("the GGUF file lacks a chat template: choose one that is made to chat")
        return str(template.decode())

    def joined(self, parts: Sequence[PromptText]) -> list[int]:
        """Tokens of text as a whole, as llama.cpp tokenizes it; part by part if text that is not
        markup would add a control token.
        """
        whole = self._tokens("".join(part.text for part in parts), markup=True)
        apart = [self._tokens(part.text, markup=part.markup) for part in parts]
        of_markup = [ids for part, ids in zip(parts, apart, strict=True) if part.markup]
        if self._control_of(whole) == [t for ids in of_markup for t in self._control_of(ids)]:
            return whole
        return [token for ids in apart for token in ids]

    def whole(self, text: str) -> tuple[int, ...]:
        return self.with_bos(self.inner(text))

    def inner(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokens(text, markup=True))

    def __len__(self) -> int:
        return int(llama_cpp.llama_vocab_n_tokens(self._vocab))

    def with_bos(self, ids: Sequence[int]) -> tuple[int, ...]:
        """The start of a prompt, with the beginning-of-text token if the model was trained so."""
        adds = llama_cpp.llama_vocab_get_add_bos(self._vocab) and self._bos >= 0
        return (self._bos, *ids) if adds and tuple(ids[:1]) != (self._bos,) else tuple(ids)

    def _tokens(self, text: str, *, markup: bool) -> list[int]:
        # llama.cpp finds added tokens that are not control tokens in all text: a cut hides them.
        cuts = [] if markup else [found.start() + 1 for found in self._control_text.finditer(text)]
        ends = [*cuts, len(text)]
        pieces = (text[start:end].encode() for start, end in zip([0, *cuts], ends, strict=True))
        return [token for piece in pieces for token in self._tokenized(piece, markup)]

    def _tokenized(self, text: bytes, markup: bool) -> list[int]:
        ids = (ctypes.c_int32 * (len(text) + 2))()
        n = llama_cpp.llama_tokenize(self._vocab, text, len(text), ids, len(ids), False, markup)
        if n < 0:
            raise ModelError(f"llama.cpp could not tokenize {len(text)} bytes of text")
        return list(ids[:n])

    @cached_property
    def _control(self) -> dict[int, str]:
        kept: Any = self
        return control_tokens(kept)

    @cached_property
    def _control_text(self) -> re.Pattern[str]:
        """Where the text of a control token begins; at no place without such tokens."""
        texts = "|".join(re.escape(text) for text in self._control.values() if len(text) > 1)
        return re.compile(f"(?={texts})" if texts else "(?!)")

    def _control_of(self, ids: Sequence[int]) -> list[int]:
        return [token for token in ids if token in self._control]

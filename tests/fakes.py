"""Stand-ins with the interfaces of the real decoder, engine, model and processor."""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mico_chat.engine import Answer, GenerationOptions, Usage, decode_media, media_reports
from mico_chat.errors import MediaError, MissingFileError, RequestError
from mico_chat.media.kinds import KINDS, Kind
from mico_chat.media.medium import Audio, Depth, Image, MediaReport, Medium, Normal, Video
from mico_chat.messages import Message, TextPart


class FakeDecoder:
    """Decodes anything but missing files, empty ones, and the text ``broken``."""

    def __init__(self) -> None:
        self.decoded: list[tuple[Kind, str]] = []
        self.depth_scales: list[float] = []

    def decode(
        self, kind: Kind, source: str | Path | bytes, *, name: str = "", depth_scale: float = 0.001
    ) -> Medium:
        if isinstance(source, str | Path):
            if not Path(source).exists():
                raise MissingFileError(name)
            source = Path(source).read_bytes()
        if source == b"broken":
            raise MediaError(name, f"not a {kind}")
        self.decoded.append((kind, name))
        self.depth_scales.append(depth_scale)
        return medium(kind, name, len(source))


def medium(kind: Kind, name: str = "x", size: int = 1) -> Medium:
    """A blank medium of any kind."""
    report = MediaReport(name=name, kind=kind, bytes=size)
    pixels = np.zeros((2, 3, 3), np.uint8)
    if kind == "audio":
        return Audio(np.zeros(16, np.float32), report=report)
    if kind == "video":
        return Video(pixels[None], np.zeros(1), report=report)
    if kind == "depth":
        return Depth(np.ones((2, 3), np.float32), report=report)
    return (Image if kind == "image" else Normal)(pixels, report=report)


class FakeEngine:
    """Answers with what it was shown and asked; refuses a question with ``refuse`` in it."""

    name = "fake"

    def __init__(self, gate: threading.Event | None = None) -> None:
        self.decoder = FakeDecoder()
        self.batches: list[int] = []
        self.options: list[GenerationOptions] = []
        self.closed = False
        self.gate = gate

    def decode(self, messages: Sequence[Message]) -> list[Message]:
        return decode_media(messages, self.decoder)

    def answer(
        self, batch: Sequence[Sequence[Message]], options: GenerationOptions
    ) -> list[Answer]:
        if self.gate is not None:
            assert self.gate.wait(timeout=30)
        self.batches.append(len(batch))
        self.options.append(options)
        return [self._answer(self.decode(messages)) for messages in batch]

    def stream(
        self, messages: Sequence[Message], options: GenerationOptions
    ) -> Generator[str, None, Answer]:
        answer = self._answer(self.decode(messages))
        for word in answer.text.split(" "):
            yield word + " "
        return answer

    def close(self) -> None:
        self.closed = True

    def _answer(self, messages: list[Message]) -> Answer:
        question = messages[-1].text
        if "refuse" in question:
            raise RequestError("refused")
        if "crash" in question:
            raise ZeroDivisionError("secret")
        reports = media_reports(messages)
        shown = ", ".join(f"{report.kind} {Path(report.name).name}" for report in reports)
        usage = Usage(prompt_tokens=10, completion_tokens=2, media_tokens=len(reports))
        return Answer(
            text=f"[{shown}] {question}", finish_reason="stop", usage=usage, media=reports
        )


VOCABULARY = 256
EOS = 0
CONTEXT_TOKEN = VOCABULARY


class CharacterTokenizer:
    """One token a character, up to U+00FF; token 0 ends an answer."""

    eos_token_id = EOS
    pad_token_id = EOS

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        kept = [token for token in token_ids if token != EOS or not skip_special_tokens]
        return "".join(map(chr, kept))


class CharacterProcessor:
    """Text as characters, a medium as four context tokens; left padding."""

    tokenizer = CharacterTokenizer()

    def __call__(
        self, batch: Sequence[Sequence[Message]], *, add_generation_prompt: bool
    ) -> dict[str, Any]:
        assert add_generation_prompt
        rows = [[token for message in row for token in self._tokens(message)] for row in batch]
        longest = max(map(len, rows))
        kinds = [part.kind for row in batch for message in row for part in message.media]
        inputs = {
            "input_ids": torch.tensor([[EOS] * (longest - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor(
                [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
            ),
        }
        if kinds:
            inputs["pixel_values"] = torch.zeros(len(kinds), 3, 2, 2)
            inputs["media_kind"] = torch.tensor([KINDS.index(kind) for kind in kinds])
        return inputs

    def _tokens(self, message: Message) -> list[int]:
        return [
            token
            for part in message.content
            for token in (
                map(ord, part.text) if isinstance(part, TextPart) else [CONTEXT_TOKEN] * 4
            )
        ]


class TinyChatModel:
    """A random two-layer LLM behind the chat model's interface; media become ones."""

    def __init__(self, max_position: int = 256) -> None:
        torch.manual_seed(0)
        llm = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=max_position,
            bos_token_id=None,
            eos_token_id=EOS,
            pad_token_id=EOS,
            # Wide enough that greedy choices are no near ties.
            initializer_range=0.5,
        )
        self.llm = LlamaForCausalLM(llm).eval()
        self.config = SimpleNamespace(llm_config=llm, context_token_id=CONTEXT_TOKEN)
        self.device, self.dtype = self.llm.device, self.llm.dtype
        self.steps = 0

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        media_kind: torch.Tensor | None = None,
        **options: Any,
    ) -> Any:
        media = input_ids == CONTEXT_TOKEN
        embeds = self.llm.get_input_embeddings()(input_ids.masked_fill(media, 0))
        embeds = embeds.masked_fill(media[..., None], 1.0)
        output = self.llm.generate(inputs_embeds=embeds, attention_mask=attention_mask, **options)
        self.steps += output.shape[1]
        return output

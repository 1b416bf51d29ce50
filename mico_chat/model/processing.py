"""MicoChatProcessor: conversations with decoded media to the tensors of the model.

Text never becomes markup: :mod:`mico_chat.chat_template` tells apart what the template and what
others wrote, and :mod:`mico_chat.prompt_parts` recognises special tokens in the template's parts
alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor
from transformers import BatchFeature, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import cached_file

from mico_chat.chat_template import ChatTemplate
from mico_chat.errors import RequestError
from mico_chat.media.file import MediaFile
from mico_chat.media.kinds import KINDS, TABLE
from mico_chat.media.medium import MeasuredMedium, Medium, Words, parts_of
from mico_chat.messages import Message
from mico_chat.model.auto import AutoTokenizer
from mico_chat.model.config import MicoChatConfig
from mico_chat.model.preprocessing import Preprocessing
from mico_chat.options import GREEDY, GenerationOptions
from mico_chat.prompt_parts import Placeholders, PromptPart, PromptText, part_tokenizer

IGNORED = -100
NOTHING = "\ufffc"
"""It stands for an empty answer in a template, which has no place for one."""

ESTIMATED = "Estimated depth map: "
"""It stands in place of "Depth map: ", if a model made the map of a picture."""
SOUND_TRACK = "Sound track: "

_FILE = "processor_config.json"


class _AnyChatConfig(PreTrainedConfig):
    """Enough for ``AutoTokenizer``, which would read a chat model's whole config otherwise."""

    model_type = MicoChatConfig.model_type


class MicoChatProcessor:
    """Tokenizer, chat template and preprocessing of one MiCo-Chat checkpoint.

    It reads and writes the same files as Hugging Face's processors. It does without their base
    class, which imports transformers' code for all models. ``still_tokens`` is the number of
    context tokens of a still, ``sound_tokens`` that of a sound. A video has ``frame_tokens`` for
    each frame and ``clip_tokens`` for the whole. The ``chat_template`` is Jinja, by default the
    tokenizer's. The ``system_prompt`` begins each chat that lacks a system message, in training as
    in the assistant (:func:`mico_chat.messages.with_system`).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        preprocessing: Preprocessing | dict[str, Any] | None = None,
        context_token_id: int = 0,
        still_tokens: int = 32,
        frame_tokens: int = 1,
        sound_tokens: int = 32,
        clip_tokens: int = 0,
        chat_template: str | None = None,
        system_prompt: str | None = None,
    ) -> None:
        self.preprocessing = Preprocessing.model_validate(preprocessing or {})
        self.context_token_id = context_token_id
        self.still_tokens, self.sound_tokens = still_tokens, sound_tokens
        self.frame_tokens, self.clip_tokens = frame_tokens, clip_tokens
        self.system_prompt = system_prompt
        self._tokens = part_tokenizer(tokenizer)
        self.tokenizer: Any = tokenizer
        self.chat_template = chat_template or tokenizer.chat_template
        if "legacy" in vars(tokenizer):
            # Otherwise transformers does not write it, and reads the folder with fewer spaces.
            tokenizer.init_kwargs["legacy"] = vars(tokenizer)["legacy"]

    @classmethod
    def from_pretrained(cls, name_or_dir: str | Path, **kwargs: Any) -> Self:
        """The processor of a folder or hub name; ``kwargs``: ``revision``, ``cache_dir``,
        ``token``."""
        hub = {k: kwargs[k] for k in ("revision", "cache_dir", "token") if k in kwargs}
        file = cached_file(name_or_dir, _FILE, **hub)
        values = json.loads(Path(cast(str, file)).read_text(encoding="utf-8"))
        values = {n: v for n, v in values.items() if n not in ("processor_class", "auto_map")}
        tokenizer = AutoTokenizer.from_pretrained(name_or_dir, config=_AnyChatConfig(), **hub)
        return cls(tokenizer, **values)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoProcessor") -> None:
        """A folder that is saved needs no copy of this code."""

    def save_pretrained(self, folder: str | Path) -> None:
        folder = Path(folder)
        self.tokenizer._set_processor_class(type(self).__name__)
        self.tokenizer.save_pretrained(folder)
        if self.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True, ensure_ascii=False)
        (folder / _FILE).write_text(text + "\n", encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        return {
            "processor_class": type(self).__name__,
            "preprocessing": self.preprocessing.model_dump(mode="json"),
            "context_token_id": self.context_token_id,
            "still_tokens": self.still_tokens,
            "frame_tokens": self.frame_tokens,
            "sound_tokens": self.sound_tokens,
            "clip_tokens": self.clip_tokens,
            **({} if self.system_prompt is None else {"system_prompt": self.system_prompt}),
        }

    @classmethod
    def for_config(
        cls,
        config: MicoChatConfig,
        tokenizer: PreTrainedTokenizerBase,
        preprocessing: Preprocessing,
        chat_template: str | None = None,
    ) -> MicoChatProcessor:
        return cls(
            tokenizer,
            preprocessing=preprocessing,
            context_token_id=config.context_token_id,
            still_tokens=config.context_length("image", 1),
            frame_tokens=config.bridge_config.frame_grid**2,
            sound_tokens=config.context_length("audio", 1),
            clip_tokens=config.context_length("video", 0),
            chat_template=chat_template,
        )

    def units(self, medium: Medium) -> Tensor:
        """Units (n, 3, H, W) of a medium; of a video its frames, not its sound track."""
        return self.preprocessing.units(medium)

    def measured(self, medium: Medium) -> MeasuredMedium:
        """A decoded medium with the number of its units, and of its sound track's.

        Its words are those that its report has: a sample of training data may bring some.
        """
        return self._measured(medium)[0]

    def _measured(self, medium: Medium) -> tuple[MeasuredMedium, list[Tensor]]:
        parts = parts_of(medium)
        units = [self.units(part) for part in parts]
        known = zip(parts, units, strict=True)
        own = tuple(MeasuredMedium(part.kind, len(u), report=part.report) for part, u in known)
        report = medium.report
        words = Words(report.written, report.spoken)
        if TABLE[medium.kind].made_of:
            return MeasuredMedium(medium.kind, 0, own, report, words), units
        return replace(own[0], inner=own[1:], report=report, words=words), units

    def counted(self, medium: MeasuredMedium) -> MeasuredMedium:
        """The medium with the number of its context tokens, without those of its sound track."""
        return replace(medium, n_tokens=self._own_length(medium))

    def context_length(self, medium: MeasuredMedium) -> int:
        """Context tokens a medium takes, its sound track included, before it is encoded."""
        return sum(self._own_length(part) for part in medium.parts)

    def _own_length(self, medium: MeasuredMedium) -> int:
        layout = TABLE[medium.kind].layout
        if layout == "frames":
            return medium.units * self.frame_tokens + self.clip_tokens
        return self.sound_tokens if layout == "slices" else self.still_tokens

    def _shown(self, medium: MeasuredMedium) -> list[PromptPart]:
        """The parts of a prompt that stand in place of a medium."""
        label = ESTIMATED if medium.report.estimated else TABLE[medium.kind].label
        written, spoken = medium.words.written_line(medium.kind), medium.words.spoken_line
        inner = [part for one in medium.inner for part in (f"\n{SOUND_TRACK}", one)]
        said = f"\n{spoken}" * bool(spoken)
        shown = [label, medium, f"\n{written}" * bool(written), *inner, said, "\n"]
        # Text that was read is text that anybody may have written: never markup.
        return [
            PromptText(one)
            if isinstance(one, str)
            else Placeholders(self.context_token_id, self._own_length(one))
            for one in (medium.pieces if TABLE[medium.kind].made_of else shown)
            if one != ""
        ]

    def words(self, text: str) -> tuple[int, ...]:
        """The tokens of a text that somebody wrote, in which nothing is markup."""
        return tuple(token for token, _ in self._tokens([PromptText(text)]))

    @cached_property
    def template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer, self.chat_template)

    def _opening(self) -> str:
        """The end of the template's prompts, which the assistant continues."""
        texts = []
        for opens in (False, True):
            parts = self.template.parts([Message.user("")], add_generation_prompt=opens)
            texts.append("".join(part.text for part in parts if isinstance(part, PromptText)))
        bare, opened = texts
        return opened[len(bare) :] if opened.startswith(bare) else ""

    def tokenize(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        media: Sequence[MeasuredMedium] = (),
        options: GenerationOptions = GREEDY,
    ) -> tuple[list[int], list[int]]:
        """One conversation, whose ``media`` are in order, to token ids and labels.

        A prompt ends with the ``prefix`` of the ``options``. Labels are the ids of the tokens that
        the model itself writes, and -100 elsewhere: the assistant's words, the template's space
        before them where a prompt ends without it, and the end-of-turn token.
        """
        if (shown := sum(len(message.media) for message in messages)) != len(media):
            raise ValueError(f"{shown} media in the messages but {len(media)} measured")
        waiting = iter(media)
        parts: list[PromptPart] = []
        said: set[int] = set()
        ended: set[int] = set()  # the template's parts that come after what the assistant says
        spoke = False
        opening = self._opening()
        if not add_generation_prompt:  # an empty answer has an end that is learnt too
            empty = Message.assistant("")
            messages = [Message.assistant(NOTHING) if m == empty else m for m in messages]
        pieces = self.template.render(
            messages,
            lambda _: self._shown(next(waiting)),
            options,
            add_generation_prompt=add_generation_prompt,
        )
        for speaks, content in pieces:
            content = [part for part in content if part != PromptText(NOTHING)]
            if spoke and not speaks:
                ended.add(len(parts))
            spoke = speaks
            if spoke:
                before = parts[-1]
                if opening and isinstance(before, PromptText):
                    head, found, space = before.text.rpartition(opening)
                    if found and space:
                        parts[-1] = PromptText(head + found, markup=True)
                        content = [PromptText(space, markup=True), *content]
                said.update(range(len(parts), len(parts) + len(content)))
            parts += content
        tokens = self._tokens(parts)
        ends: dict[int, int] = {}  # the first end-of-turn token of a part
        for at, (token, part) in enumerate(tokens):
            if part in ended and token == self.tokenizer.eos_token_id:
                ends.setdefault(part, at)
        labels = [
            token if part in said or at <= ends.get(part, -1) else IGNORED
            for at, (token, part) in enumerate(tokens)
        ]
        return [token for token, _ in tokens], labels

    def __call__(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        add_generation_prompt: bool = True,
        train: bool = False,
        options: GenerationOptions = GREEDY,
    ) -> BatchFeature:
        """B conversations, whose media are decoded, to ``input_ids``, ``attention_mask`` (B, S).

        With media also ``pixel_values`` (U, 3, H, W), ``media_kind``, ``media_units``,
        ``media_row`` (M,). ``train`` adds ``labels``, pads on the right and opens no turn of the
        assistant. Each prompt ends with the ``prefix`` of the ``options``.
        """
        rows = []
        pixels: list[Tensor] = []
        shown: list[tuple[int, int, int]] = []
        for row, messages in enumerate(conversations):
            media = []
            for medium in (medium for message in messages for medium in message.media):
                if isinstance(medium, MediaFile):
                    raise RequestError(f"{medium.name}: decode the medium before the processor")
                measured, units = self._measured(medium)
                media.append(measured)
                shown += [(KINDS.index(part.kind), part.units, row) for part in measured.parts]
                pixels += units
            opens = add_generation_prompt and not train
            rows.append(self.tokenize(messages, opens, media, options))
        data: dict[str, Tensor] = self.pad(rows, train=train)
        if shown:
            names = ("media_kind", "media_units", "media_row")
            data |= dict(zip(names, torch.tensor(shown).unbind(1), strict=True))
            data["pixel_values"] = torch.cat(pixels)
        return BatchFeature(data)

    def pad(
        self, rows: Sequence[tuple[list[int], list[int]]], train: bool, multiple: int = 1
    ) -> dict[str, Tensor]:
        """Ids and labels of B conversations to (B, S) tensors, S a multiple of ``multiple``."""
        longest = max(len(ids) for ids, _ in rows)
        longest = -(-longest // multiple) * multiple
        fill = self.tokenizer.pad_token_id
        fill = self.tokenizer.eos_token_id if fill is None else fill

        def padded(row: list[int], value: int) -> list[int]:
            padding = [value] * (longest - len(row))
            return row + padding if train else padding + row

        data = {
            "input_ids": [padded(ids, fill) for ids, _ in rows],
            "attention_mask": [padded([1] * len(ids), 0) for ids, _ in rows],
        }
        if train:
            data["labels"] = [padded(labels, IGNORED) for _, labels in rows]
        return {name: torch.tensor(values) for name, values in data.items()}

    def decode_answer(self, ids: Tensor | Sequence[int]) -> str:
        return cast(str, self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

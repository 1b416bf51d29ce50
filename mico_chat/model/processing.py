"""MicoChatProcessor: conversations with decoded media to the tensors of the model.

Text never becomes markup: the chat template is rendered with a marker for each message's content,
the rendered text is cut at the markers, and special tokens are recognised only in the template's
own parts (``prompt_tokens``). Text that a user types, ``<|im_end|>`` included, stays plain text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self, cast

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import AutoTokenizer, BatchFeature, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import cached_file

from mico_chat.errors import RequestError
from mico_chat.media.file import MediaFile
from mico_chat.media.kinds import KINDS, Kind
from mico_chat.media.medium import MeasuredMedium, Medium, with_track
from mico_chat.messages import Message, TextPart
from mico_chat.model.config import MicoChatConfig
from mico_chat.model.preprocessing import Preprocessing
from mico_chat.model.prompt_tokens import Placeholders, PromptPart, PromptText, part_tokenizer

IGNORED = -100
MARKER = "\ue000"
"""A private-use character: templates do not contain it, and contents are put in after the cut."""

SHOWN_AS: dict[Kind, str] = {
    "image": "Picture: ",
    "audio": "Sound: ",
    "video": "Video: ",
    "depth": "Depth map: ",
    "normal": "Normal map: ",
}
SOUND_TRACK = "Sound track: "

_FILE = "processor_config.json"


class _AnyChatConfig(PreTrainedConfig):
    """Enough for ``AutoTokenizer``, which would read a chat model's whole config otherwise."""

    model_type = MicoChatConfig.model_type


class MicoChatProcessor:
    """Tokenizer, chat template and preprocessing of one MiCo-Chat checkpoint.

    Read and written as Hugging Face's processors are, to the same files. Their base class is not
    used because it imports transformers' code for all models.

    Args:
        tokenizer: the LLM's.
        preprocessing: fields of :class:`~mico_chat.model.preprocessing.Preprocessing`.
        context_token_id: the placeholder's id, outside the tokenizer's vocabulary.
        still_tokens: context tokens of a still or a sound.
        frame_tokens: context tokens of a video frame.
        chat_template: Jinja; the tokenizer's own if not given.
        system_prompt: for a chat without a system message of its own. The processor stores it;
            :class:`~mico_chat.assistant.Assistant` adds it to the chat.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        preprocessing: dict[str, Any] | None = None,
        context_token_id: int = 0,
        still_tokens: int = 32,
        frame_tokens: int = 1,
        chat_template: str | None = None,
        system_prompt: str | None = None,
    ) -> None:
        self.preprocessing = dict(preprocessing or {})
        self.context_token_id = context_token_id
        self.still_tokens = still_tokens
        self.frame_tokens = frame_tokens
        self.system_prompt = system_prompt
        self._preprocess = Preprocessing(**self.preprocessing)
        self._tokens = part_tokenizer(tokenizer)
        self.tokenizer: Any = tokenizer
        self.chat_template = chat_template or tokenizer.chat_template
        if "legacy" in vars(tokenizer):
            # Otherwise transformers does not write it, and reads the folder with fewer spaces.
            tokenizer.init_kwargs["legacy"] = vars(tokenizer)["legacy"]

    @classmethod
    def from_pretrained(cls, name_or_dir: str | Path, **kwargs: Any) -> Self:
        """The processor of a folder or hub name; ``revision``, ``cache_dir``, ``token`` as there.

        Raises:
            OSError: for files that are missing.
        """
        hub = {k: kwargs[k] for k in ("revision", "cache_dir", "token") if k in kwargs}
        file = cached_file(name_or_dir, _FILE, **hub)
        values = json.loads(Path(cast(str, file)).read_text(encoding="utf-8"))
        values.pop("processor_class", None)
        tokenizer = AutoTokenizer.from_pretrained(name_or_dir, config=_AnyChatConfig(), **hub)
        return cls(tokenizer, **values)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the processor's own values, the tokenizer and the chat template."""
        folder = Path(folder)
        self.tokenizer._set_processor_class(type(self).__name__)
        self.tokenizer.save_pretrained(folder)
        if self.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True, ensure_ascii=False)
        (folder / _FILE).write_text(text + "\n", encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """The processor's own values, as its file has them."""
        return {
            "processor_class": type(self).__name__,
            "preprocessing": self.preprocessing,
            "context_token_id": self.context_token_id,
            "still_tokens": self.still_tokens,
            "frame_tokens": self.frame_tokens,
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
        """The processor that agrees with a model's config."""
        return cls(
            tokenizer,
            preprocessing=preprocessing.model_dump(mode="json"),
            context_token_id=config.context_token_id,
            still_tokens=config.context_length("image", 1),
            frame_tokens=config.context_length("video", 1),
            chat_template=chat_template,
        )

    # --- media --------------------------------------------------------------------------------

    def units(self, medium: Medium) -> Tensor:
        """Units (n, 3, H, W) of a medium; of a video its frames, not its sound track."""
        return self._preprocess.units(medium)

    def measured(self, medium: Medium) -> MeasuredMedium:
        """A decoded medium with the number of its units, and of its sound track's.

        Raises:
            MediaError: for a medium that has none, such as a sound without samples.
        """
        return self._measured(medium)[0]

    def _measured(self, medium: Medium) -> tuple[MeasuredMedium, list[Tensor]]:
        units = [self.units(part) for part in with_track(medium)]
        audio = MeasuredMedium("audio", len(units[1])) if len(units) > 1 else None
        return MeasuredMedium(medium.kind, len(units[0]), audio, medium.report), units

    def context_length(self, medium: MeasuredMedium) -> int:
        """Context tokens a medium takes, its sound track included, before it is encoded."""
        return sum(self._own_length(part) for part in medium.with_track)

    def _own_length(self, medium: MeasuredMedium) -> int:
        return medium.units * self.frame_tokens if medium.kind == "video" else self.still_tokens

    # --- text ---------------------------------------------------------------------------------

    def _content(self, message: Message, media: Iterator[MeasuredMedium]) -> Iterator[PromptPart]:
        for part in message.content:
            if isinstance(part, TextPart):
                yield PromptText(part.text)
                continue
            medium = next(media)
            yield PromptText(SHOWN_AS[medium.kind])
            yield Placeholders(self.context_token_id, self._own_length(medium))
            if medium.audio is not None:
                yield PromptText(f"\n{SOUND_TRACK}")
                yield Placeholders(self.context_token_id, self.still_tokens)
            yield PromptText("\n")

    def _rendered(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[str]:
        """The template's parts, and between them the messages' numbers."""
        marked = [
            {"role": m.role, "content": f"{MARKER}{i}{MARKER}"} for i, m in enumerate(messages)
        ]
        try:
            rendered = self.tokenizer.apply_chat_template(
                marked,
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except TemplateError as error:
            raise RequestError(f"the model's chat template: {error}", "messages") from error
        return cast(str, rendered).split(MARKER)

    def _opening(self) -> str:
        """The end of the template's prompts, which the assistant continues."""
        empty = [Message.user("")]
        bare, opened = ("".join(self._rendered(empty, opens)) for opens in (False, True))
        return opened[len(bare) :] if opened.startswith(bare) else ""

    def tokenize(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        media: Sequence[MeasuredMedium] = (),
        *,
        prefix: str = "",
    ) -> tuple[list[int], list[int]]:
        """One conversation to token ids and labels.

        ``media`` are those of the messages, in order. ``prefix`` is the beginning of the answer,
        which follows the generation prompt.

        Labels are the ids of the tokens that the model itself writes, and -100 elsewhere: the
        assistant's words, the template's space before them where a prompt ends without it, and
        the end-of-turn token.

        Raises:
            RequestError: for a conversation that the chat template does not take.
            ValueError: where messages and ``media`` disagree.
        """
        shown = sum(len(message.media) for message in messages)
        if shown != len(media):
            raise ValueError(f"{shown} media in the messages but {len(media)} measured")
        waiting = iter(media)
        parts: list[PromptPart] = []
        said: set[int] = set()
        ended: set[int] = set()  # the template's parts that come after what the assistant says
        spoke = False
        opening = self._opening()
        for position, rendered in enumerate(self._rendered(messages, add_generation_prompt)):
            if position % 2 == 0:
                if spoke:
                    ended.add(len(parts))
                parts.append(PromptText(rendered, markup=True))
                continue
            message = messages[int(rendered)]
            spoke = message.role == "assistant"
            content = list(self._content(message, waiting))
            before = parts[-1]
            if spoke and opening and isinstance(before, PromptText):
                head, found, space = before.text.rpartition(opening)
                if found and space:
                    parts[-1] = PromptText(head + found, markup=True)
                    content = [PromptText(space, markup=True), *content]
            if spoke:
                said.update(range(len(parts), len(parts) + len(content)))
            parts += content
        if prefix:
            parts.append(PromptText(prefix))
        ids, labels = [], []
        tokens = self._tokens(parts)
        ends = {
            part: at
            for at, (token, part) in reversed(list(enumerate(tokens)))
            if part in ended and token == self.tokenizer.eos_token_id
        }
        for at, (token, part) in enumerate(tokens):
            ids.append(token)
            learnt = part in said or at <= ends.get(part, -1)
            labels.append(token if learnt else IGNORED)
        return ids, labels

    def __call__(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        add_generation_prompt: bool = True,
        train: bool = False,
    ) -> BatchFeature:
        """A batch of conversations to tensors.

        Args:
            conversations: B conversations whose media are decoded.
            add_generation_prompt: end with the opening of the assistant's turn.
            train: also give ``labels``, and pad on the right (on the left otherwise).

        Returns:
            ``input_ids``, ``attention_mask`` (B, S), ``labels`` when training, and with media
            ``pixel_values`` (U, 3, H, W), ``media_kind``, ``media_units``, ``media_row`` (M,).

        Raises:
            RequestError: for a medium that is not decoded.
        """
        rows = []
        pixels: list[Tensor] = []
        shown: list[tuple[int, MeasuredMedium]] = []
        for row, messages in enumerate(conversations):
            media = []
            for medium in (_decoded(medium) for m in messages for medium in m.media):
                measured, units = self._measured(medium)
                media.append(measured)
                shown += [(row, part) for part in measured.with_track]
                pixels += units
            rows.append(self.tokenize(messages, add_generation_prompt and not train, media))
        data: dict[str, Tensor] = self.pad(rows, train=train)
        if shown:
            data["pixel_values"] = torch.cat(pixels)
            data["media_units"] = torch.tensor([part.units for _, part in shown])
            data["media_kind"] = torch.tensor([KINDS.index(part.kind) for _, part in shown])
            data["media_row"] = torch.tensor([row for row, _ in shown])
        return BatchFeature(data)

    def pad(
        self, rows: Sequence[tuple[list[int], list[int]]], train: bool, multiple: int = 1
    ) -> dict[str, Tensor]:
        """Ids and labels of B conversations to (B, S) tensors, S a multiple of ``multiple``."""
        longest = max(len(ids) for ids, _ in rows)
        longest = -(-longest // multiple) * multiple
        fill = self.tokenizer.pad_token_id
        fill = self.tokenizer.eos_token_id if fill is None else fill
        shape = (len(rows), longest)
        input_ids = torch.full(shape, fill)
        labels = torch.full(shape, IGNORED)
        mask = torch.zeros(shape, dtype=torch.long)
        for i, (ids, spoken) in enumerate(rows):
            at = slice(0, len(ids)) if train else slice(longest - len(ids), longest)
            input_ids[i, at] = torch.tensor(ids)
            labels[i, at] = torch.tensor(spoken)
            mask[i, at] = 1
        data = {"input_ids": input_ids, "attention_mask": mask}
        return {**data, "labels": labels} if train else data

    def decode_answer(self, ids: Tensor | Sequence[int]) -> str:
        """The answer's text without special tokens and surrounding space."""
        return cast(str, self.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def _decoded(medium: MediaFile | Medium) -> Medium:
    if isinstance(medium, MediaFile):
        raise RequestError(f"{medium.name}: decode the medium before the processor")
    return medium

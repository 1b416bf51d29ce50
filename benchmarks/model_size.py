"""The sizes of MiCo-Chat-7B, counted on torch's meta device: no weights are read."""

from dataclasses import dataclass
from typing import Any, Self

import torch

from benchmarks.traffic import Medium
from mico_chat.checkpoints.assemble import read_template
from mico_chat.checkpoints.footprint import LiveMemory, Serving, fake, meta_chat
from mico_chat.media.file import MediaLimits
from mico_chat.media.kinds import KINDS, Kind
from mico_chat.model.config import MicoChatConfig
from mico_chat.model.preprocessing import Preprocessing

SOUND: dict[Kind, int] = {"audio": Preprocessing().max_slices}
PARTS: dict[Kind, dict[Kind, int]] = {
    "image": {"image": 1},
    "audio": SOUND,
    "video": {"video": MediaLimits().max_frames, **SOUND},
}
"""The stills, frames and slices that a medium is encoded as; a clip has its sound track."""


@dataclass(frozen=True)
class Model:
    """The model's sizes; ``media``: what a medium of each kind costs on the card."""

    serving: Serving
    media: dict[Kind, Medium]
    system: int

    @classmethod
    def counted(cls, name: str, tokenizer: Any) -> Self:
        config = MicoChatConfig.named(name)
        serving = Serving.of(meta_chat(config), torch.bfloat16)
        chat: Any = meta_chat(config)
        chat.eval()
        fake(chat)
        side, media = config.encoder_config.image_size, {}
        for kind, parts in PARTS.items():
            flops = tokens = 0
            for part, units in parts.items():
                with torch.no_grad(), LiveMemory() as live:
                    kinds, counts = torch.tensor([KINDS.index(part)]), torch.tensor([units])
                    chat.context_tokens(kinds, counts, torch.empty(units, 3, side, side))
                flops += live.flops
                tokens += config.context_length(part, units)
            media[kind] = Medium(tokens, flops, tokens * config.llm_width * 4)
        empty = [{"role": "user", "content": ""}]
        template = read_template("vicuna_v1.1")
        written = tokenizer.apply_chat_template(
            empty, chat_template=template, add_generation_prompt=True, tokenize=False
        )
        return cls(serving, media, len(tokenizer(written).input_ids))

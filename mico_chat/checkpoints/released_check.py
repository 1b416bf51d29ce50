"""The numbers of a converted model beside those that the original code computed."""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mico_chat.errors import ModelError
from mico_chat.media.kinds import KINDS, Kind
from mico_chat.model.pretraining import EncodedContexts, MicoForPretraining
from mico_chat.model.released import Subtitles
from mico_chat.model.text_branch import backwards

WITHIN = 1e-4

_MEDIA: dict[str, Kind] = {"v": "video", "a": "audio", "d": "depth"}

_PARTS = {
    "encoder": "vision_tokens audio_tokens depth_tokens",
    "contrastive head": "feat_v feat_a feat_d feat_t feat_va feat_vs feat_vas",
    "condition": "cond_v cond_a cond_d cond_vs cond_vas",
    "text branch": "text_hidden fused_va causal_hidden_v",
    "matching head": "itm_va",
    "prediction head": "logits_v causal_logits_v",
}
OUTPUTS = {name: part for part, names in _PARTS.items() for name in names.split()}
"""The part of each output; v is vision, a audio, d depth, t text, s subtitles."""
NEEDED = "it needs inputs (in.NAME) and outputs (out.NAME) of the original code: docs/training.md"


@torch.inference_mode()
def differences(folder: Path, expected: Path) -> Iterator[tuple[str, tuple[float, float]]]:
    """Each output's name, its largest value, and the largest absolute difference of ours.

    The numbers of the original (``expected``) are safetensors: inputs of a batch of B under
    ``in.``, outputs under ``out.``, in evaluation mode and float32. Tokens may be every n-th one.
    Any output may be left out, and any input that the other outputs do not need::

        in.video (B, n, 3, H, W)   in.audio (B, n, time, mel)   in.depth (B, n, 3, H, W), normalised
        in.input_ids, in.attention_mask (B, S)   in.subtitle_ids, in.subtitle_mask (B, S')
        out.{vision,audio,depth}_tokens (B, n, T, D)    out.feat_{v,a,d,t} (B, P)
        out.feat_{va,vs,vas} (B, P)
        out.cond_{v,a,d,vs,vas} (B, n T, d)             out.text_hidden (B, S, d)
        out.fused_va (B, S, d), out.itm_va (B,)         text over [video; audio]
        out.logits_v, out.causal_logits_v (B, S, V), out.causal_hidden_v (B, S, d)   over the video
    """
    try:
        numbers = load_file(expected)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{expected}: it is no safetensors file; {NEEDED}") from error
    model = MicoForPretraining.from_pretrained(folder, dtype=torch.float32)
    model.train(False)
    inputs = {name[3:]: value for name, value in numbers.items() if name.startswith("in.")}
    side = model.config.encoder_config.image_size
    for kind in _MEDIA.values():
        if kind in inputs and (shape := tuple(inputs[kind].shape))[-2:] != (side, side):
            said = f"in.{kind} has the shape {shape}, expected {side} x {side} pixels"
            raise ModelError(f"{expected}: {said}, the model's")
    batch = _Batch(model, inputs)
    outputs = {name[4:]: value for name, value in numbers.items() if name.startswith("out.")}
    if not outputs:
        raise ModelError(f"{expected}: it lacks tensors with names such as 'out.NAME'; {NEEDED}")
    for name, theirs in outputs.items():
        try:
            ours = batch.output(name)
        except KeyError as error:
            raise ModelError(f"{expected}: out.{name}: {error} is unknown or missing") from error
        ours = _thinned(ours, theirs)
        if ours.shape != theirs.shape:
            raise ModelError(
                f"{expected}: out.{name} has the shape {tuple(theirs.shape)}, but the model's "
                f"has {tuple(ours.shape)}"
            )
        yield name, (float(theirs.abs().max()), float((ours - theirs.float()).abs().max()))


class _Batch:
    """The outputs of a model for a file's inputs, each computed when it is asked for."""

    def __init__(self, model: MicoForPretraining, inputs: dict[str, Tensor]) -> None:
        self.model = model
        self.inputs = inputs
        self.encode = lru_cache(self._encode)

    def output(self, name: str) -> Tensor:
        """The original's ``out.NAME``; KeyError for an unknown name or a missing input."""
        text, kinds = self.model.text, name.rpartition("_")[2]
        match name:
            case "vision_tokens" | "audio_tokens" | "depth_tokens":
                units = self.units(_MEDIA[name[0]])
                tokens = self.model.encoder(units.flatten(0, 1))
                return cast(Tensor, tokens.unflatten(0, tuple(units.shape[:2])))
            case "feat_v" | "feat_a" | "feat_d" | "feat_va" | "feat_vs" | "feat_vas":
                return self.encode(kinds).pooled
            case "cond_v" | "cond_a" | "cond_d" | "cond_vs" | "cond_vas":
                return self.encode(kinds).context
            case "feat_t":
                return self.model.encode_text(*self.caption())
            case "text_hidden":
                return cast(Tensor, text(*self.caption()))
            case "itm_va":
                seen = self.encode(kinds)
                return self.model.match(*self.caption(), seen.context, seen.mask).sigmoid()
            case "fused_va" | "causal_hidden_v":
                return self.hidden(kinds, causal=name.startswith("causal"))
            case "logits_v" | "causal_logits_v":
                return text.logits(self.hidden(kinds, causal=name.startswith("causal")))
        raise KeyError(name)

    def units(self, kind: str) -> Tensor:
        """(B, n, 3, H, W)."""
        units = self.inputs[kind].float()
        return units.unsqueeze(2).expand(-1, -1, 3, -1, -1) if units.ndim == 4 else units

    def _encode(self, letters: str) -> EncodedContexts:
        said = None
        if letters.endswith("s"):
            said = Subtitles(self.inputs["subtitle_ids"], self.inputs["subtitle_mask"])
            letters = letters[:-1]
        shown = [self.units(_MEDIA[letter]) for letter in letters]
        b = len(shown[0])
        kinds = torch.tensor([KINDS.index(_MEDIA[letter]) for letter in letters] * b)
        units = torch.tensor([x.shape[1] for x in shown] * b)
        rows = torch.arange(b).repeat_interleave(len(letters))
        pixels = torch.cat([x[row] for row in range(b) for x in shown])
        return self.model.encode(kinds, units, rows, b, pixels, subtitles=said)

    def caption(self) -> tuple[Tensor, Tensor]:
        return self.inputs["input_ids"], self.inputs["attention_mask"]

    def hidden(self, letters: str, causal: bool) -> Tensor:
        seen = self.encode(letters)
        ids, mask = self.caption()
        if causal:
            mask = mask.bool().unsqueeze(1) & backwards(mask[:, :0], mask.shape[1])
        return cast(Tensor, self.model.text(ids, mask, seen.context, seen.mask))


def _thinned(ours: Tensor, theirs: Tensor) -> Tensor:
    """Our tokens, thinned to every n-th one where the file holds fewer."""
    if ours.shape == theirs.shape or ours.ndim != theirs.ndim or ours.ndim < 3:
        return ours
    n, m = ours.shape[-2], theirs.shape[-2]
    step = next((step for step in range(1, n + 1) if -(-n // step) == m), 1)
    return ours[..., ::step, :]

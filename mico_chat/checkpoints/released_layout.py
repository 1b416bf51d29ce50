"""How the released MiCo checkpoint names and lays out its tensors, beside our names.

Read from the repository invictus717/MiCo. What the release has not, our model has as zeros
(:data:`ZEROS`): embeddings in the encoder's width (E_M, E_C, E_Sam), which it adds behind its
projections instead (:mod:`mico_chat.model.branches`).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mico_chat.model.branches import BRANCHES

SOURCE_FILE = "released.json"
"""What the folder was made of: the release's names in their order, and its settings."""
UNUSED_FILE = "released.safetensors"
"""Tensors of the release that this project does not compute with."""

VIT, BERT = "vision_encoder.visual.", "multimodal_encoder.bert."
PREDICTIONS = "multimodal_encoder.cls.predictions."
WORDS = f"{BERT}embeddings.word_embeddings.weight"

# Beginnings of our names and of the release's.
NAMES: dict[str, str] = {
    "encoder.vit.": VIT,
    "text.bert.": BERT,
    "text.head.0.": f"{PREDICTIONS}transform.dense.",
    "text.head.2.": f"{PREDICTIONS}transform.LayerNorm.",
    "text.head_bias": f"{PREDICTIONS}bias",
    "text_projection.": "contra_head_t.linear.",
    "media_projection.one.vision.": "contra_head_v.linear.",
    "media_projection.one.audio.": "contra_head_a.linear.",
    "media_projection.one.depth.": "contra_head_d.linear.",
    "media_projection.both.va.": "contra_head_va.",
    "media_projection.both.id.": "contra_head_id.",
    "matching_head.0.": "itm_head.linear1.",
    "matching_head.2.": "itm_head.layernorm.",
    "matching_head.3.": "itm_head.linear2.",
    "temperature": "contra_temp",
    **{f"text.context_proj.{b}.proj.": f"hidden_trans_{b}_multimodal." for b in BRANCHES},
    **{f"text.context_proj.{b}.frame": f"{b}_frame_embedding" for b in BRANCHES},
    **{f"text.context_proj.{b}.modality": f"{b}_type_embeddings" for b in BRANCHES},
}

# The release ties them: each holds what the other one does.
TIED = {
    f"{PREDICTIONS}decoder.weight": WORDS,
    f"{PREDICTIONS}decoder.bias": f"{PREDICTIONS}bias",
}

# Ours alone; nothing in a model that only does what the release does.
ZEROS = ("context.", "text.sampling.")

# Older spellings, of which the first one found in a name is replaced, as the release's code does.
SPELLINGS = (
    ("video", "vision"),
    ("evaclip_model", "vision_encoder"),
    ("clip_model", "vision_encoder"),
)

CLIP_TEXT = "vision_encoder.text."  # CLIP's own text tower, which is not used any more
POSITIONS = f"{BERT}embeddings.position_ids"  # 0, 1, 2, ..., which newer files leave out


def todays_name(key: str) -> str:
    """A tensor's name as it is spelt today."""
    name = key.removeprefix("module.")
    for old, new in SPELLINGS:
        if old in name:
            return name.replace(old, new)
    return name


def released_name(own: str) -> str | None:
    """The release's name of a tensor of ours; None for one that it has not."""
    for ours, theirs in NAMES.items():
        if own.startswith(ours):
            return theirs + own[len(ours) :]
    return None


def unused_shapes(ours: Mapping[str, Tensor]) -> dict[str, tuple[int | None, ...]]:
    """Tensors of the release that this project does not compute with; None is any size."""
    wide, hidden = ours["media_projection.one.vision.weight"], ours["text_projection.weight"]
    p, d = hidden.shape
    v = wide.shape[1]
    trans = "hidden_trans_subtitle_multimodal."
    return {
        "contra_head_s.linear.weight": (p, d),
        "contra_head_vs.weight": (p, v + d),
        "contra_head_vs.bias": (p,),
        "contra_head_vas.weight": (p, 2 * v + d),
        "contra_head_vas.bias": (p,),
        "subtitle_type_embeddings": (1, 1, d),
        f"{trans}0.weight": (d, d),
        f"{trans}0.bias": (d,),
        f"{trans}1.weight": (d,),
        f"{trans}1.bias": (d,),
        "vision_encoder.logit_scale": (),
        f"{VIT}head.weight": (None, v),
        f"{VIT}head.bias": (None,),
    }


def their_shape(own: str, blank: Tensor) -> tuple[int | None, ...]:
    """The release's tables have a batch dimension; how many rows they have is their own."""
    shape = tuple(blank.shape)
    if own.endswith(".frame"):
        return (1, None, shape[1])
    if own == "encoder.vit.pos_embed":
        return (1, None, shape[2])
    return (1, 1, *shape) if own.endswith(".modality") else shape


def as_ours(own: str, tensor: Tensor) -> Tensor:
    """A tensor of the release in our shape."""
    if own.endswith(".frame"):
        return tensor[0]
    return tensor[0, 0] if own.endswith(".modality") else tensor


def as_theirs(own: str, tensor: Tensor) -> Tensor:
    """A tensor of ours in the release's shape."""
    if own.endswith(".frame"):
        return tensor[None]
    return tensor[None, None] if own.endswith(".modality") else tensor

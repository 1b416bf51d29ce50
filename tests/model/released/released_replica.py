"""A miniature of the released MiCo checkpoint, and what it computes, put together from its parts.

Written against timm's and Hugging Face's own modules, by the release's names alone, so that it
shares nothing with the converter or the model that it is compared with.
"""

from dataclasses import dataclass
from typing import Any

import torch
from timm.models.eva import Eva
from torch import Tensor
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM

WIDTH, HEADS, DIM, TEXT_HEADS, SPACE, VOCAB, SIDE, PATCH = 88, 1, 32, 4, 16, 120, 28, 14
FRAMES = {"vision": 4, "audio": 2, "depth": 1}
CLS, SEP, PAD, MASK = 101, 102, 0, 103


def vision() -> Eva:
    """The encoder, as timm has it."""
    return Eva(
        img_size=SIDE, patch_size=PATCH, embed_dim=WIDTH, depth=2, num_heads=HEADS,
        mlp_ratio=2.0, qkv_fused=True, global_pool="token", num_classes=24,
    )  # fmt: skip


def text() -> BertForMaskedLM:
    """The text branch, as Hugging Face has it."""
    attention: dict[str, Any] = {"attn_implementation": "eager"}
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=DIM, num_hidden_layers=2, num_attention_heads=TEXT_HEADS,
        intermediate_size=48, max_position_embeddings=40, is_decoder=True,
        add_cross_attention=True, **attention,
    )  # fmt: skip
    model: BertForMaskedLM = BertForMaskedLM(config).train(False)
    return model


def checkpoint(seed: int = 0, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """A state dict of random values with the release's names, in the order it was saved in."""
    random = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=random) * 0.2).to(dtype)

    d, v, p = DIM, WIDTH, SPACE
    state = {"contra_temp": torch.tensor(0.07, dtype=dtype)}
    state |= {f"{name}_frame_embedding": values(1, rows, d) for name, rows in FRAMES.items()}
    for name in (*FRAMES, "subtitle"):
        state[f"{name}_type_embeddings"] = values(1, 1, d)
    state["vision_encoder.logit_scale"] = values()
    for name, tensor in vision().state_dict().items():
        state[f"vision_encoder.visual.{name}"] = values(*tensor.shape)
    bert = text()
    for name, tensor in bert.state_dict().items():
        state[f"multimodal_encoder.{name}"] = values(*tensor.shape)
    position_ids = "multimodal_encoder.bert.embeddings.position_ids"
    state[position_ids] = torch.arange(40).expand(1, -1)
    head = "multimodal_encoder.cls.predictions."
    state[f"{head}decoder.weight"] = state[
        "multimodal_encoder.bert.embeddings.word_embeddings.weight"
    ]
    state[f"{head}decoder.bias"] = state[f"{head}bias"]
    for name, width in (("t", d), ("s", d), ("v", v), ("a", v), ("d", v)):
        state[f"contra_head_{name}.linear.weight"] = values(p, width)
    for name, width in (("va", 2 * v), ("id", 2 * v), ("vs", v + d), ("vas", 2 * v + d)):
        state[f"contra_head_{name}.weight"] = values(p, width)
        state[f"contra_head_{name}.bias"] = values(p)
    for name, shape in (("linear1", (d, d)), ("layernorm", (d,)), ("linear2", (2, d))):
        state[f"itm_head.{name}.weight"] = values(*shape)
        state[f"itm_head.{name}.bias"] = values(shape[0])
    for name in (*FRAMES, "subtitle"):
        trans, width = f"hidden_trans_{name}_multimodal.", d if name == "subtitle" else v
        state |= {f"{trans}0.weight": values(d, width), f"{trans}0.bias": values(d)}
        state |= {f"{trans}1.weight": values(d), f"{trans}1.bias": values(d)}
    return state


@dataclass(frozen=True)
class Original:
    """What the released code does with a checkpoint, in float32."""

    state: dict[str, Tensor]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Tensors below a prefix."""
        return {
            name.removeprefix(prefix): tensor.float()
            for name, tensor in self.state.items()
            if name.startswith(prefix)
        }

    def tokens(self, pixels: Tensor) -> Tensor:
        """(b, n, 3, S, S) -> (b, n, T, D)."""
        encoder = vision()
        encoder.load_state_dict(self.part("vision_encoder.visual."))
        encoder.eval()
        out: Tensor = encoder.forward_features(pixels.flatten(0, 1))
        return out.reshape(*pixels.shape[:2], *out.shape[1:])

    def pooled(self, tokens: Tensor) -> Tensor:
        """(b, n, T, D) -> (b, D)."""
        return tokens[:, :, 0].mean(1)

    def head(self, name: str, pooled: Tensor) -> Tensor:
        """A contrastive head's unit vectors (b, P)."""
        part = self.part(f"contra_head_{name}.")
        weight = part.get("linear.weight", part.get("weight"))
        assert weight is not None
        return F.normalize(F.linear(pooled, weight, part.get("bias")), dim=-1)

    def condition(self, name: str, tokens: Tensor) -> Tensor:
        """What captions look at, (b, n T, d)."""
        part = self.part(f"hidden_trans_{name}_multimodal.")
        x = F.linear(tokens, part["0.weight"], part["0.bias"])
        x = F.layer_norm(x, (DIM,), part["1.weight"], part["1.bias"], 1e-12)
        table = self.state[f"{name}_frame_embedding"].float()
        n = tokens.shape[1]
        if n != table.shape[1]:
            table = F.interpolate(table.permute(0, 2, 1), n, mode="nearest").permute(0, 2, 1)
        x = (x + table.unsqueeze(-2)).flatten(1, 2)
        return x + self.state[f"{name}_type_embeddings"].float()

    def bert(
        self, ids: Tensor, mask: Tensor, condition: Tensor | None = None, causal: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Hidden states (b, S, d) and vocabulary logits (b, S, V)."""
        model = text()
        position_ids = {"bert.embeddings.position_ids"}
        part = {k: t for k, t in self.part("multimodal_encoder.").items() if k not in position_ids}
        model.load_state_dict(part)
        s = ids.shape[1]
        seen = mask[:, None, None, :].bool().expand(-1, 1, s, s)
        if causal:
            seen = seen & torch.ones(s, s, dtype=torch.bool).tril()
        hidden: Tensor = model.bert(
            ids,
            attention_mask=torch.zeros(seen.shape).masked_fill(~seen, torch.finfo().min),
            encoder_hidden_states=condition,
        ).last_hidden_state
        return hidden, model.cls(hidden)

    def said(self, hidden: Tensor) -> Tensor:
        """A subtitle's part of what captions look at, (b, S, d)."""
        part = self.part("hidden_trans_subtitle_multimodal.")
        x = F.linear(hidden, part["0.weight"], part["0.bias"])
        x = F.layer_norm(x, (DIM,), part["1.weight"], part["1.bias"], 1e-12)
        return x + self.state["subtitle_type_embeddings"].float()

    def matching(self, hidden: Tensor) -> Tensor:
        """Probability (b,) that caption and media belong together."""
        part = self.part("itm_head.")
        x = F.gelu(F.linear(hidden[:, 0], part["linear1.weight"], part["linear1.bias"]))
        x = F.layer_norm(x, (DIM,), part["layernorm.weight"], part["layernorm.bias"], 1e-12)
        x = F.linear(x, part["linear2.weight"], part["linear2.bias"])
        return x.softmax(1)[:, 1]

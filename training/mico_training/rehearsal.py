"""One step of a recipe with shapes alone: what it holds at its peak, and how much it computes.

The modules are the real ones, frozen, adapted and checkpointed by the code that trains; autograd
and the optimizer are PyTorch's. Only what depends on numbers is stood in for: which positions have
a loss, where the placeholders are, which negatives are drawn.

Legend: B samples, U units of all media, T tokens a unit, S text length, N context tokens a sample,
D encoder width, L LLM width.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from mico_chat.checkpoints.footprint import meta_chat, meta_llm
from mico_chat.checkpoints.pretrained import MicoChatForConditionalGeneration
from mico_chat.model.captioning import QUESTION_LENGTH
from mico_chat.model.config import MicoTextConfig
from mico_chat.model.context import AlikeMedia
from mico_chat.model.encoder import OmniEncoder
from mico_chat.model.pretraining import MicoForPretraining
from mico_chat.model.text_branch import backwards
from mico_training.build_model import (
    DTYPES,
    add_lora,
    chat_config,
    hold_encoder,
    pretraining_config,
)
from mico_training.live_memory import LiveMemory, fake_weights
from mico_training.modes import Modes, checkpoint_activations
from mico_training.packed import more_than_packed, pack
from mico_training.parallel import layer_classes
from mico_training.recipe import ModelRecipe, Recipe, Stage1Run, Stage2Run, Stage3Run
from mico_training.trainer import freeze, parameter_groups, train_only
from mico_training.word_alignment import spoken_for

GRADIENTS, OPTIMIZER, INPUTS = "gradients", "optimizer states", "inputs"
ACTIVATIONS, LOGITS = "activations kept for backward", "logits and loss"


@dataclass(frozen=True)
class Weights:
    """One part of the model: parameters and bytes, and how many of the parameters train."""

    parameters: int
    bytes: int
    trainable: int


@dataclass(frozen=True)
class Rehearsed:
    """What a step of one process comes to.

    ``weights`` by part; ``peak`` bytes by use at the fullest moment, each part under its name;
    ``kept`` bytes for the backward pass, and ``flops`` forward and backward, of one batch,
    accumulated ones not counted. ``layer_bytes`` are the largest layer's that is spread as one,
    ``other_bytes`` those outside all layers.
    """

    weights: dict[str, Weights]
    peak: dict[str, int]
    kept: int
    flops: int
    tokens: int
    units: int
    layer_bytes: int
    other_bytes: int


def rehearse(recipe: Recipe) -> Rehearsed:
    """Run a step of a recipe under fake tensors; reads configurations, and no weights or data.

    Raises:
        ConfigError: what is wrong with the recipe.
    """
    step: Any = _Pretraining(recipe) if isinstance(recipe, Stage1Run) else _Chat(recipe)
    if recipe.train.gradient_checkpointing:
        checkpoint_activations(step.model)
    step.model.train()
    Modes(step.model).set()
    with FakeTensorMode():
        fake_weights(step.model)
        return _run(step, recipe)


def _run(step: Any, recipe: Recipe) -> Rehearsed:
    train, model = recipe.train, step.model
    optimizer = torch.optim.AdamW(parameter_groups(model, train), lr=train.lr, fused=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    precision: Any = contextlib.nullcontext
    if train.bf16:
        precision = _half
    live = LiveMemory()
    with live:
        for name, part in step.parts():
            live.name(name, part.tensors())
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()  # its states are there from the second step on
        optimizer.zero_grad()
        for state in optimizer.state.values():
            live.name(OPTIMIZER, (value for value in state.values() if isinstance(value, Tensor)))
        live.forget_the_past()
        flops = size = 0
        for batch in range(min(train.accumulation, 2)):
            inputs = step.inputs()
            live.name(INPUTS, inputs)
            before = live.alive()
            with precision():
                spoken = step.hidden(*inputs)
                kept = live.alive() - before
                loss = step.loss(spoken)
            kept &= live.alive()
            live.name_unnamed(ACTIVATIONS, kept)
            live.name_unnamed(LOGITS, live.alive() - before - kept)
            del spoken, inputs
            loss.backward()
            del loss
            if batch == 0:
                flops, size = live.flops, live.size(kept)
        live.name(GRADIENTS, (p.grad for p in trained if p.grad is not None))
        torch.nn.utils.clip_grad_norm_(trained, 1.0, foreach=False)
        optimizer.step()
    weights = {name: part.weigh() for name, part in step.parts()}
    layers = _layer_bytes(model)
    other = sum(part.bytes for part in weights.values()) - sum(layers)
    return Rehearsed(
        weights, live.peak(), size, flops, step.tokens, step.units, max(layers, default=0), other
    )


def _half() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


def _layer_bytes(model: nn.Module) -> list[int]:
    classes = set(layer_classes(model))
    return [
        sum(parameter.untyped_storage().nbytes() for parameter in module.parameters())
        for module in model.modules()
        if type(module).__name__ in classes
    ]


class _Part:
    """Some of a model's parameters and buffers: a module's, its adapter's or those without."""

    def __init__(self, module: nn.Module, adapter: bool = False) -> None:
        self._module, self._adapter = module, adapter

    def tensors(self) -> list[Tensor]:
        """Parameters and buffers."""
        buffers = [] if self._adapter else list(self._module.buffers())
        return [*self._parameters(), *buffers]

    def weigh(self) -> Weights:
        """Counts; a packed layer's weights count as what they stand for."""
        parameters = self._parameters()
        packed = 0 if self._adapter else more_than_packed(self._module)
        return Weights(
            sum(parameter.numel() for parameter in parameters) + packed,
            sum(tensor.untyped_storage().nbytes() for tensor in self.tensors()),
            sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        )

    def _parameters(self) -> list[nn.Parameter]:
        named = self._module.named_parameters()
        return [value for name, value in named if ("lora_" in name) == self._adapter]


class _Chat:
    """Stages 2 and 3."""

    def __init__(self, recipe: Recipe) -> None:
        assert isinstance(recipe, Stage2Run | Stage3Run)
        config = chat_config(_expected(recipe))
        self.recipe = recipe
        model, llm = meta_chat(config), meta_llm(config.llm_config)
        if config.base_llm is not None:
            for parameter in llm.parameters():  # buffers keep theirs
                parameter.data = parameter.data.to(DTYPES[recipe.model.llm_dtype])
        if recipe.model.llm_quantization is not None:
            pack(llm, recipe.model.llm_quantization)
        model.attach_llm(llm)
        self.model: Any = model
        if isinstance(recipe, Stage2Run):
            train_only(model, recipe.stage2.trainable)
        else:
            full, lora = recipe.stage3.full, recipe.stage3.lora
            train_only(model, [*recipe.stage3.trainable, *(["llm"] if full else [])])
            if not full and lora is not None:
                with torch.device("meta"):
                    add_lora(model, lora)
        self.by_words = isinstance(recipe, Stage2Run) and recipe.stage2.objective == "words"
        freeze(model, recipe.train.freeze)
        hold_encoder(model, recipe.model)
        self.n_samples = recipe.train.batch_size
        self.per_sample = recipe.expect.units or 8
        self.units = self.n_samples * self.per_sample
        self.length = recipe.expect.length or recipe.train.max_length
        self.tokens = self.n_samples * self.length
        self.learnt = max(1, int(self.tokens * recipe.expect.learnt))

    def parts(self) -> list[tuple[str, _Part]]:
        """Parts of the model by name; the adapter is one of its own."""
        found = [(name, _Part(part)) for name, part in self.model.named_children()]
        if any("lora_" in name for name, _ in self.model.llm.named_parameters()):
            found.append(("lora", _Part(self.model.llm, adapter=True)))
        return found

    def inputs(self) -> list[Tensor]:
        """Features or pixels (U, ..), ids (B, S), attention mask (B, S), placeholders (B, S)."""
        shape = (self.n_samples, self.length)
        ids, mask = torch.zeros(shape, dtype=torch.long), torch.ones(shape, dtype=torch.long)
        return [
            _units(self.model.encoder, self.units, self.recipe.features is not None),
            ids,
            mask,
            torch.zeros(shape, dtype=torch.bool),
        ]

    def hidden(self, units: Tensor, ids: Tensor, mask: Tensor, placeholders: Tensor) -> Tensor:
        """The learnt positions' hidden states (n, L); by words, the context tokens."""
        model: MicoChatForConditionalGeneration = self.model
        tokens, features = _encode(self.model, units)
        held = model.bridge.norm_in.weight.dtype
        tokens, features = tokens.to(held), features.to(held)
        kind = torch.zeros(self.n_samples, dtype=torch.long)
        layout: Any = "still" if self.per_sample == 1 else "frames"
        media = AlikeMedia(list(range(len(kind))), kind, kind, layout, self.per_sample)
        context = model.alike_tokens(tokens, features, media)
        if self.by_words:
            return context.flatten(0, 1)
        embeds = model.get_input_embeddings()(ids)
        context = context.flatten(0, 1).to(embeds.dtype)
        embeds = embeds.masked_scatter(placeholders.unsqueeze(-1), context)
        decoder = model.llm.get_decoder()
        hidden = decoder(
            inputs_embeds=embeds, attention_mask=mask, use_cache=False
        ).last_hidden_state
        rows = torch.zeros(self.learnt, dtype=torch.long)
        return cast(Tensor, hidden.flatten(0, 1)[rows])

    def loss(self, hidden: Tensor) -> Tensor:
        """Over the vocabulary, or over the words of a batch."""
        target = torch.zeros(len(hidden), dtype=torch.long)
        if self.by_words:
            table = self.model.get_input_embeddings().weight
            words = torch.zeros(min(len(table), self.learnt), dtype=torch.long)
            return F.cross_entropy(spoken_for(hidden, words, table, torch.ones(())), target)
        return F.cross_entropy(self.model.llm.get_output_embeddings()(hidden).float(), target)


class _Pretraining:
    """Stage 1: the paper's three objectives and tagging; regions and names are left out."""

    def __init__(self, recipe: Stage1Run) -> None:
        text = MicoTextConfig()
        if recipe.stage1.tokenizer is None:
            text.vocab_size = recipe.stage1.vocabulary
        with torch.device("meta"):
            model = MicoForPretraining(pretraining_config(_expected(recipe), text))
        freeze(model, recipe.train.freeze)
        if recipe.features is not None and model.encoder.stem is not None:
            model.encoder.stem.requires_grad_(False)
        self.model: Any = model
        self.recipe = recipe
        self.weights = {k for k, v in recipe.stage1.weights.model_dump().items() if v > 0}
        self.n_samples = recipe.train.batch_size
        self.per_sample = recipe.expect.units or recipe.stage1.most_units
        self.units = self.n_samples * self.per_sample
        self.length = recipe.stage1.caption_length
        if recipe.stage1.questions:
            self.length += QUESTION_LENGTH
        self.tokens = self.n_samples * self.length

    def parts(self) -> list[tuple[str, _Part]]:
        """Parts of the model by name."""
        return [(name, _Part(part)) for name, part in self.model.named_children()]

    def inputs(self) -> list[Tensor]:
        """Features or pixels (U, ..), captions (B, S) and their mask (B, S)."""
        shape = (self.n_samples, self.length)
        return [
            _units(self.model.encoder, self.units, self.recipe.features is not None),
            torch.zeros(shape, dtype=torch.long),
            torch.ones(shape, dtype=torch.long),
        ]

    def hidden(self, units: Tensor, ids: Tensor, mask: Tensor) -> list[Tensor]:
        """What the objectives are computed from."""
        model: MicoForPretraining = self.model
        tokens, _ = _encode(self.model, units)
        pair = torch.zeros(self.n_samples, dtype=torch.long)
        pooled = F.normalize(model.media_projection(tokens[:: self.per_sample, 0]).float(), dim=-1)
        context = model.text.context_proj(tokens).unflatten(0, (self.n_samples, -1)).flatten(1, 2)
        seen = torch.ones(context.shape[:2], dtype=torch.bool)
        found = [context.mean(1)]
        if {"contrastive", "matching"} & self.weights:
            found += [pooled, model.encode_text(ids, mask, pair)]
        if "matching" in self.weights:
            rows = torch.zeros(3 * self.n_samples, dtype=torch.long)
            pairs = (ids[rows], mask[rows], pair[rows], context[rows], seen[rows])
            found.append(model.match(*pairs))
        if "caption" in self.weights:
            by_whom = backwards(mask[:, :0], self.length)
            hidden = model.text(ids, by_whom, pair, context, seen)
            masked = torch.zeros(int(0.6 * self.tokens), dtype=torch.long)
            found.append(hidden.flatten(0, 1)[masked])
        return found

    def loss(self, found: list[Tensor]) -> Tensor:
        """The sum of the objectives."""
        model: MicoForPretraining = self.model
        mean, *rest = found
        total = torch.zeros(())
        if "tagging" in self.weights:
            total = total - model.text.logits(mean).float().log_softmax(-1).mean()
        if {"contrastive", "matching"} & self.weights:
            media, text, *rest = rest
            target = torch.zeros(self.n_samples, dtype=torch.long)
            total = total + F.cross_entropy(media @ text.T / model.temperature, target)
        if "matching" in self.weights:
            logits, *rest = rest
            total = total + F.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits))
        if "caption" in self.weights:
            (hidden,) = rest
            target = torch.zeros(len(hidden), dtype=torch.long)
            total = total + F.cross_entropy(model.text.logits(hidden).float(), target)
        return total


def _expected(recipe: Recipe) -> ModelRecipe:
    """The recipe's model, or what its folder will be where that is still to be made."""
    name = recipe.expect.model
    if name is None or Path(recipe.model.name).is_dir():
        return recipe.model
    return recipe.model.model_copy(update={"name": name})


def _units(encoder: OmniEncoder, n: int, cached: bool) -> Tensor:
    if cached and encoder.stem is not None:
        return torch.empty(n, encoder.stem.out_dim, encoder.grid, encoder.grid)
    side = encoder.grid * (32 if encoder.stem is not None else _patch(encoder))
    return torch.empty(n, 3, side, side)


def _patch(encoder: OmniEncoder) -> int:
    return int(cast(Any, encoder.vit).patch_embed.patch_size[0])


def _encode(model: Any, units: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (U, T, D) with the context's embeddings added, and the units' features."""
    encoder: OmniEncoder = model.encoder
    features = units
    if encoder.stem is None or units.shape[1] == 3:
        features = encoder.features(units.to(next(encoder.parameters()).dtype))
    tokens = encoder(features.to(next(encoder.vit.parameters()).dtype))
    added = model.context.context.weight[:1] + model.context.modality.weight[:1]
    return tokens + added.to(tokens.dtype), features

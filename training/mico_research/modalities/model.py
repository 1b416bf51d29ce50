"""MicoForModality: a tokenizer, the shared encoder's blocks, a head; one folder, as any model.

Legend: B samples, N tokens, U pictures, T tokens a picture, D encoder width, H steps and C channels
of a forecast.

    z = tokenizer(x) + E_M                 eq. (1), a modality embedding of its own
    y = head(blocks([CLS], z))
"""

import csv
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, ClassVar, cast

import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from pydantic import Field, TypeAdapter
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from mico_chat.errors import DataError, ModelError
from mico_chat.model.config import MicoEncoderConfig
from mico_chat.model.encoder import OmniEncoder, init_buffers
from mico_chat.model.text_branch import additive_mask
from mico_research.modalities import families
from mico_research.modalities.media import MediaInput, UnitOrder
from mico_research.modalities.readers import read_samples, read_series
from mico_research.modalities.samples import BY_CLASS, Array, Modality, Sample, Target, stacked
from mico_research.modalities.table import TableInput, TableTokenizer

Input = (
    families.SequenceInput
    | families.TextInput
    | TableInput
    | families.GraphInput
    | families.PictureInput
    | MediaInput
)
_INPUT: TypeAdapter[Input] = TypeAdapter(Annotated[Input, Field(discriminator="kind")])


@strict
class MicoModalityConfig(PreTrainedConfig):
    """Encoder, modality, and the training data's statistics.

    ``layers``: how many of the encoder's first blocks are kept. ``input_spec`` and ``target_spec``
    are an :data:`Input` and a :class:`Target` as JSON. ``trained_on``: as in the encoder's folder.
    """

    model_type = "mico_modality"
    sub_configs: ClassVar[dict[str, Any]] = {"encoder_config": MicoEncoderConfig}

    if TYPE_CHECKING:
        encoder_config: MicoEncoderConfig = MicoEncoderConfig()
    else:  # given as a dict or not at all, it is made by __post_init__
        encoder_config: dict[str, Any] | PreTrainedConfig | None = None
    modality: str = "tabular"
    layers: int | None = None
    dropout: float = 0.1
    input_spec: dict[str, Any] | None = None
    target_spec: dict[str, Any] | None = None
    trained_on: list[dict[str, Any]] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.encoder_config, PreTrainedConfig):
            self.encoder_config = MicoEncoderConfig(**(self.encoder_config or {}))
        cast(Any, super()).__post_init__(**kwargs)

    @property
    def input(self) -> Input:
        return _INPUT.validate_python(self.input_spec)

    @property
    def target(self) -> Target:
        return Target.model_validate(self.target_spec)


# --- the encoder's blocks on other sequences ------------------------------------------------------


def keep_blocks(encoder: OmniEncoder, layers: int | None, pictures: bool) -> None:
    """Keep the first ``layers`` blocks (None: all) and, for ``pictures``, the patch embedding."""
    vit = cast(Any, encoder.vit)
    if layers is not None and not 0 < layers <= len(vit.blocks):
        raise ModelError(f"layers {layers}: this encoder has 1 to {len(vit.blocks)}")
    vit.blocks = vit.blocks[:layers]
    if encoder.stem is not None:
        encoder.stem.ear_blocks = 0  # no block sees what the ear hears
    if not pictures:
        encoder.stem = None
        vit.patch_embed = nn.Identity()


def embed_pictures(encoder: OmniEncoder, features: Tensor) -> tuple[Tensor, Tensor | None]:
    """Features to the tokens that enter the blocks, (U, T, D) with E_Pos, and rotary positions."""
    vit = cast(Any, encoder.vit)
    embedded = vit._pos_embed(vit.patch_embed(features))
    if isinstance(embedded, tuple):  # timm's Eva
        return embedded[0], embedded[1]
    return embedded, None


def prefix_tokens(encoder: OmniEncoder, batch: int) -> Tensor:
    """The [CLS] and register tokens that stand before a sequence, (batch, prefix, D)."""
    vit = cast(Any, encoder.vit)
    tokens = torch.cat([t for t in (vit.cls_token, vit.reg_token) if t is not None], dim=1)
    positions = vit.pos_embed
    if positions is not None:
        own = positions.shape[1] - encoder.grid**2  # rows of E_Pos for the prefix
        tokens = tokens + F.pad(positions[:, :own], (0, 0, 0, tokens.shape[1] - own))
    return tokens.expand(batch, -1, -1)


def run_blocks(
    encoder: OmniEncoder, tokens: Tensor, mask: Tensor | None = None, rotary: Tensor | None = None
) -> Tensor:
    """Tokens (B, N, D), prefix first, through the blocks and the final norm.

    No token attends to those where ``mask`` (B, N) is false. ``rotary`` holds the positions that
    :func:`embed_pictures` gave; None for a sequence.
    """
    vit = cast(Any, encoder.vit)
    # Additive: some of timm's attentions take no boolean mask.
    bias = None
    if mask is not None and not bool(mask.all()):
        bias = additive_mask(mask[:, None, None], tokens.dtype)
    options = {"attn_mask": bias} | ({} if rotary is None else {"rope": rotary})
    x = vit.norm_pre(tokens)
    for block in vit.blocks:
        if vit.grad_checkpointing and torch.is_grad_enabled():
            x = checkpoint(partial(block, **options), x, use_reentrant=False)
        else:
            x = block(x, **options)
    return cast(Tensor, vit.norm(x))


# --- the model -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """The prediction of one sample: a class with all probabilities, a number, or steps (H, C).

    A person's value is a vector (2 D,), with the probabilities of the persons in training. Where
    several classes may hold, the value is their probabilities (classes,).
    """

    value: str | float | Array
    probabilities: dict[str, float] | None = None


class MicoForModality(PreTrainedModel):
    config_class = MicoModalityConfig
    main_input_name = "values"
    accepts_loss_kwargs = False

    def __init__(self, config: MicoModalityConfig) -> None:
        super().__init__(config)
        self.spec, self.target = config.input, config.target
        self.encoder = OmniEncoder(config.encoder_config)
        seen = isinstance(self.spec, families.PictureInput | MediaInput)
        keep_blocks(self.encoder, config.layers, pictures=seen)
        d = self.encoder.embed_dim
        self.order = (
            UnitOrder(self.spec.units, 2 * d) if isinstance(self.spec, MediaInput) else None
        )
        self.forecasts = self.target.task == "forecasting"
        self.tokenizer: nn.Module | None = None
        match self.spec:
            case families.SequenceInput():
                # A forecast takes each channel as a series of its own, as PatchTST does.
                channels = 1 if self.forecasts else self.spec.channels
                self.tokenizer = families.SequenceTokenizer(self.spec, d, channels)
            case families.TextInput():
                self.tokenizer = families.TextTokenizer(self.spec, d)
            case TableInput():
                self.tokenizer = TableTokenizer(self.spec, d)
            case families.GraphInput():
                self.tokenizer = families.GraphTokenizer(self.spec, d)
        self.modality_embed = nn.Parameter(torch.empty(d))  # E_M
        nn.init.trunc_normal_(self.modality_embed, std=0.02)
        head: list[nn.Module] = [nn.Dropout(config.dropout)]
        if self.forecasts:
            assert isinstance(self.spec, families.SequenceInput)
            head += [nn.Linear(self.spec.n_tokens * d, self.target.outputs)]
        else:
            head += [nn.LayerNorm(2 * d), nn.Linear(2 * d, self.target.outputs)]
        self.head = nn.Sequential(*head)
        PreTrainedModel.post_init(self)

    def _init_weights(self, module: nn.Module) -> None:
        init_buffers(module)

    # --- samples to tensors -------------------------------------------------------------------

    def arrays(self, sample: Sample, labelled: bool = False) -> dict[str, Array]:
        """A sample's arrays, with ``labels`` if asked; a DataError says what does not fit."""
        arrays: dict[str, Array] = self.spec.arrays(sample)
        if isinstance(self.spec, families.SequenceInput) and self.forecasts:
            steps, needed = len(arrays["values"]), self.spec.max_length
            if steps != needed:
                forecasts = f"this model forecasts from exactly {needed} steps"
                raise sample.error(f"the series has {steps} steps, but {forecasts}")
        return arrays | ({"labels": self.target.label(sample, self.spec)} if labelled else {})

    def batch(self, arrays: Sequence[dict[str, Array]]) -> dict[str, Tensor]:
        batch = self.spec.batch(arrays)
        return batch | ({"labels": stacked(arrays, "labels")} if "labels" in arrays[0] else {})

    # --- the model ----------------------------------------------------------------------------

    def encode(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Tokens behind the blocks (B, prefix + N, D) and the mask of the N; see :meth:`batch`."""
        if self.tokenizer is None:
            features = inputs.get("features")  # the stem's, which training computes once
            if features is None:
                features = self.encoder.features(inputs["pixel_values"])
            features = features.to(self.modality_embed.dtype)
            tokens, rotary = embed_pictures(self.encoder, features)
            return run_blocks(self.encoder, tokens + self.modality_embed, rotary=rotary), None
        tokens, mask = self.tokenizer(**inputs)
        prefix = prefix_tokens(self.encoder, len(tokens))
        tokens = torch.cat([prefix, tokens + self.modality_embed], dim=1)
        whole = None if mask is None else F.pad(mask, (prefix.shape[1], 0), value=True)
        return run_blocks(self.encoder, tokens, whole), mask

    def forward(self, labels: Tensor | None = None, **inputs: Tensor) -> ModelOutput:
        """Logits (B, classes), standardised numbers (B,) or steps (B, H, C); a loss with labels."""
        features = None if self.forecasts else self._read(inputs)
        logits = self.forecast(**inputs) if features is None else self.head(features).float()
        if self.target.task == "regression":
            logits = logits[:, 0]
        loss = None if labels is None else self.target.loss(logits, labels)
        if features is not None and self.target.task == "re-identification":  # behind the norm
            features = self.head[:-1](features).float()
        return ModelOutput(loss=loss, logits=logits, features=features)

    def _read(self, inputs: dict[str, Tensor]) -> Tensor:
        """What the head reads, (B, 2 D): [CLS] and the mean of the tokens."""
        units = inputs.pop("units", None)
        encoded, mask = self.encode(inputs)
        tokens = encoded[:, self.encoder.n_prefix :]
        weight = torch.ones_like(tokens[..., :1]) if mask is None else mask[..., None]
        mean = (tokens * weight).sum(1) / weight.sum(1)
        summary = torch.cat([encoded[:, 0], mean], dim=-1)
        if self.order is not None and units is not None:
            summary = self.order(summary, units)
        return summary

    def forecast(self, values: Tensor, mask: Tensor) -> Tensor:
        """Values (B, L, C) -> the next steps (B, H, C), on the same scale.

        Each window is scaled to mean 0 and deviation 1, and its forecast is scaled back (RevIN),
        because levels drift between training years and test years.
        """
        b, _, c = values.shape
        mean = values.mean(1, keepdim=True)
        scale = (values.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
        one = ((values - mean) / scale).transpose(1, 2).flatten(0, 1)[..., None]  # (B * C, L, 1)
        encoded, _ = self.encode({"values": one, "mask": mask.repeat_interleave(c, 0)})
        steps = self.head(encoded[:, self.encoder.n_prefix :].flatten(1)).float()
        return cast(Tensor, steps.unflatten(0, (b, c)).transpose(1, 2) * scale + mean)

    # --- predictions --------------------------------------------------------------------------

    @torch.no_grad()  # FSDP does not take part in the inference mode
    def predict(self, samples: Sequence[Sample], batch_size: int = 64) -> Iterator[Prediction]:
        """The prediction of each sample, in the units of the training data."""
        self.train(False)
        for start in range(0, len(samples), batch_size):
            chosen = samples[start : start + batch_size]
            inputs = self.batch([self.arrays(sample) for sample in chosen])
            found = self(**{name: value.to(self.device) for name, value in inputs.items()})
            made: Iterable[Prediction] = map(self._prediction, found.logits.cpu())
            if self.target.task == "re-identification":
                vectors = found.features.cpu().numpy()
                made = (replace(one, value=v) for one, v in zip(made, vectors, strict=True))
            yield from made

    def _prediction(self, logits: Tensor) -> Prediction:
        target = self.target
        if target.task in BY_CLASS:
            chances = dict(zip(target.classes, logits.softmax(-1).tolist(), strict=True))
            return Prediction(max(chances, key=lambda name: chances[name]), chances)
        if target.task == "multi-label":
            found = dict(zip(target.classes, logits.sigmoid().tolist(), strict=True))
            return Prediction(logits.sigmoid().numpy(), found)
        if target.task == "regression":
            return Prediction(float(logits) * target.std + target.mean)
        assert isinstance(self.spec, families.SequenceInput)
        mean, std = torch.tensor(self.spec.mean), torch.tensor(self.spec.std)
        return Prediction((logits * std + mean).numpy())


AutoConfig.register("mico_modality", MicoModalityConfig)
AutoModel.register(MicoModalityConfig, MicoForModality)


def load_modality(folder: str | Path, device: str | None = None) -> MicoForModality:
    """The model in a folder that ``mico-chat finetune`` wrote; else a ModelError."""
    written = "use a folder that `mico-chat finetune` wrote"
    if not (Path(folder) / "config.json").is_file():
        raise ModelError(f"{folder}: config.json is missing; {written}")
    try:
        kind = PreTrainedConfig.get_config_dict(folder)[0].get("model_type")
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"{folder}: the configuration cannot be read: {reason}") from error
    own = MicoModalityConfig.model_type
    if kind != own:
        raise ModelError(f"{folder}: the model type is {kind!r}, expected {own!r}; {written}")
    model = MicoForModality.from_pretrained(folder, dtype=torch.float32)
    nn.Module.to(model, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model.train(False)
    return model


def predict(folder: str | Path, path: Path, out: IO[str], device: str | None = None) -> None:
    """``mico-chat predict``: write the model's predictions of a file as CSV.

    A line holds a sample's class and all probabilities, or its number. For a series, a line holds
    one step after its end.

    Raises:
        ModelError, ConfigError, DataError: folder or file do not fit, in one line.
    """
    model = load_modality(folder, device)
    target, spec = model.target, model.spec
    lines = csv.writer(out, lineterminator="\n")
    if target.task == "forecasting":
        assert isinstance(spec, families.SequenceInput)
        series = read_series(path, target.channels)
        if len(series.values) < spec.max_length:
            needed = f"this model needs {spec.max_length} steps to forecast"
            reason = f"the series has {len(series.values)} steps, but {needed}"
            raise DataError(path, None, reason)
        sample = Sample(series.values[-spec.max_length :], file=str(path))
        (only,) = model.predict([sample])
        lines.writerow(["step", *target.channels])
        lines.writerows([n, *map(_number, row)] for n, row in enumerate(np.array(only.value), 1))
        return
    config = model.config
    assert isinstance(config, MicoModalityConfig)
    side = math.isqrt(spec.channels) if isinstance(spec, families.SequenceInput) else 1
    samples = read_samples(cast(Modality, config.modality), path, patch_size=side)
    lines.writerow(["sample", "prediction", *target.classes])
    for number, (sample, found) in enumerate(zip(samples, model.predict(samples), strict=True), 1):
        name = sample.line or number
        if found.probabilities is None:
            lines.writerow([name, _number(found.value)])
        else:
            value = found.value
            if target.task == "re-identification":
                value = max(found.probabilities.items(), key=lambda one: one[1])[0]
            if target.task == "multi-label":
                value = ";".join(one for one, p in found.probabilities.items() if p >= 0.5)
            lines.writerow([name, value, *map(_number, found.probabilities.values())])


def _number(value: object) -> str:
    return f"{value:.6g}"

"""MediaPath: media to context tokens, through encoder, context, concepts and bridge.

The part of a chat model that every engine shares. :class:`MediaModel` is this part alone, for
engines that run the language model themselves. It needs none of transformers' models, whose import
takes as long as all else that an answer from cold waits for.

Legend: B samples, M media, U units of all media (stills, frames, mel slices), T tokens a unit,
D encoder width, L LLM width. A batch's media lie flat: ``media_kind``, ``media_units`` (M,) say
what each is and how many units it has; ``pixel_values`` (U, 3, H, W) or the stem's
``stem_features`` (U, C, G, G) hold their units in the same order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from mico_chat.checkpoints.folders import llm_source
from mico_chat.errors import ModelError
from mico_chat.media.kinds import KINDS
from mico_chat.model.bridge import PerceiverBridge
from mico_chat.model.concepts import ConceptAttention, build_concepts
from mico_chat.model.config import ChatParts, MediaLayout, layout_of
from mico_chat.model.context import MultimodalContext
from mico_chat.model.encoder import OmniEncoder, init_buffers

WEIGHTS = "model.safetensors"


class MediaPath(nn.Module):
    """Methods of a model that has these parts; :meth:`build` makes them.

    ``use_concepts`` and ``use_grid`` switch a path off (ablation); ``path_dropout`` switches
    each off at random while training, so that the model can do without. ``name_dropout`` hides
    the learned names of a medium at random, which know the training pictures too well.
    ``keeps_step`` is for processes that share weights or gradients (FSDP, DeepSpeed): a batch then
    uses all of the bridge whatever media it has. ``generation`` is what ``generation_config.json``
    says. It is for chats alone (:meth:`mico_chat.engine.base.GenerationOptions.of_checkpoint`):
    ``generate`` does not look at it.
    """

    device: torch.device
    dtype: torch.dtype

    def build(self, parts: ChatParts) -> None:
        """Make the modules, with random weights, and no language model."""
        self.encoder = OmniEncoder(parts.encoder)
        d = self.encoder.embed_dim
        self.context = MultimodalContext(parts.context, d)
        self.concepts = build_concepts(parts.concepts, self.encoder)
        self.bridge = PerceiverBridge(
            parts.bridge, d, self.encoder.grid, self.encoder.n_prefix, parts.llm_width
        )
        self.llm: Any = None
        self.use_concepts = True
        self.use_grid = True
        self.path_dropout = 0.0
        self.name_dropout = 0.0
        self.keeps_step = False
        self.generation: dict[str, Any] | None = None

    def train(self, mode: bool = True) -> Self:
        """Encoder and concepts keep the statistics of pretraining (batch norm, dropout off)."""
        super().train(mode)
        self.encoder.eval()
        if self.concepts is not None:
            self.concepts.eval()
        return self

    def get_input_embeddings(self) -> nn.Module:
        """The LLM's token table."""
        return cast(nn.Module, self._llm().get_input_embeddings())

    def _llm(self) -> Any:
        if self.llm is None:
            raise ModelError(
                "this model has no language model yet: load it with from_pretrained, "
                "or give it one with attach_llm"
            )
        return self.llm

    def context_tokens(
        self,
        media_kind: Tensor,
        media_units: Tensor,
        pixel_values: Tensor | None = None,
        stem_features: Tensor | None = None,
        simulated_names: Tensor | None = None,
    ) -> list[Tensor]:
        """Context tokens of each medium, (n_i, L), in the media's order.

        ``simulated_names`` (M,), for training: where not -1, the concept path sees this name
        instead of the picture (:meth:`ConceptAttention.simulate`).
        """
        features = self.encoder.unit_features(pixel_values, stem_features, media_units)
        tokens = self.context(self.encoder(features), media_kind, media_units)
        held = self.bridge.norm_in.weight.dtype  # a frozen encoder may be held in another
        tokens, features = tokens.to(held), features.to(held)
        starts = (torch.cumsum(media_units, 0) - media_units).tolist()
        kinds, units = media_kind.tolist(), media_units.tolist()
        groups: dict[tuple[MediaLayout, int], list[int]] = {}
        for m, (kind, n) in enumerate(zip(kinds, units, strict=True)):
            groups.setdefault((layout_of(KINDS[kind]), n), []).append(m)
        out: list[Tensor] = [tokens] * len(kinds)
        for (layout, n), members in groups.items():
            rows = torch.tensor([starts[m] + i for m in members for i in range(n)])
            rows = rows.to(tokens.device)
            names = None if simulated_names is None else simulated_names[members]
            kind = media_kind[members]
            group = self.alike_tokens(tokens[rows], features[rows], kind, layout, n, names)
            for m, context in zip(members, group, strict=True):
                out[m] = context
        if self.keeps_step:
            out[0] = out[0] + touch(self.context, self.concepts, self.bridge).to(out[0].dtype)
        return out

    def alike_tokens(
        self,
        tokens: Tensor,
        features: Tensor,
        kind: Tensor,
        layout: MediaLayout,
        units: int,
        names: Tensor | None = None,
    ) -> Tensor:
        """Media of one layout and unit count: tokens (B·U, T, D) -> context tokens (B, N, L)."""
        b = len(kind)
        keep_concepts, keep_grid = self._paths(b)
        concepts, values, named = self.concepts, None, None
        if concepts is not None:
            table = cast(nn.Embedding, self.get_input_embeddings())
            if layout == "slices":
                per_sound = torch.full((b,), units, device=kind.device)
                named = concepts.sound_tokens(concepts.sound_logits(features, per_sound), table)
            else:
                cells = self._cell_logits(concepts, features, units, names)
                values = concepts.cell_values(cells, table).to(tokens.dtype)
                values = F.pad(values, (0, 0, self.encoder.n_prefix, 0)).unflatten(0, (b, units))
                values = values * keep_concepts.view(-1, 1, 1, 1).to(values.dtype)
                if layout == "still":
                    named = concepts.visual_tokens(cells, table)
        context = self.bridge(tokens.unflatten(0, (b, units)), kind, layout, values)
        context = context * keep_grid.view(-1, 1, 1).to(context.dtype)
        if named is not None:
            named = named * keep_concepts.view(-1, 1, 1).to(named.dtype)
            context = torch.cat([named.to(context.dtype), context], dim=1)
        return cast(Tensor, context)

    def _cell_logits(
        self, concepts: ConceptAttention, features: Tensor, units: int, names: Tensor | None
    ) -> Tensor:
        """What each cell shows, (B·U, G², n_visual); simulated or thinned out while training."""
        cells = concepts.cell_logits(features)
        if not self.training:
            return cells
        if self.name_dropout > 0:
            hidden = torch.rand(len(cells) // units, device=cells.device) < self.name_dropout
            hidden = hidden.repeat_interleave(units).view(-1, 1, 1)
            learned = torch.arange(cells.shape[-1], device=cells.device) >= concepts.n_pretrained
            cells = cells.masked_fill(hidden & learned, -30.0)
        if names is not None and units == 1 and bool((names >= 0).any()):
            chosen = names >= 0
            cells = cells.clone()
            cells[chosen] = concepts.simulate(names[chosen], cells.shape[1]).to(cells.dtype)
        return cells

    def _paths(self, b: int) -> tuple[Tensor, Tensor]:
        """Which of ``b`` media keep the concept path and the grid path, as 0 or 1."""
        concepts = torch.full((b,), float(self.use_concepts), device=self.device)
        grid = torch.full((b,), float(self.use_grid), device=self.device)
        if self.training and self.path_dropout > 0:
            u = torch.rand(b, device=self.device)
            concepts = concepts * (u >= self.path_dropout)
            grid = grid * ((u < self.path_dropout) | (u >= 2 * self.path_dropout))
        return concepts, grid


class MediaModel(MediaPath):
    """A chat model without its language model, of which it has the token vectors."""

    def __init__(self, parts: ChatParts) -> None:
        super().__init__()
        self.build(parts)
        self.train(False)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where the encoder is."""
        return next(self.encoder.parameters()).device

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """The encoder's."""
        return next(self.encoder.parameters()).dtype

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype) -> Self | None:
        """The model of a folder, on the CPU; None where its weights lie otherwise.

        Weights in several files, or with the language model's among them, are read by
        :meth:`MicoChatForConditionalGeneration.from_pretrained`.

        Raises:
            ModelError: for weights that are not those of the config.
        """
        parts = ChatParts.read(folder)
        if parts is None or parts.base_llm is None or not (folder / WEIGHTS).is_file():
            return None
        # As Hugging Face loads a model: without memory first, then with the file's tensors.
        with torch.device("meta"), _Unfilled(), _default_dtype(dtype):
            model = cls(parts)
        own = model.state_dict()
        state = load_file(folder / WEIGHTS)
        wrong = [name for name in own if name not in state or own[name].shape != state[name].shape]
        if wrong := [*wrong, *(name for name in state if name not in own)]:
            raise ModelError(f"{folder / WEIGHTS}: not the weights of its config: {wrong[0]}")
        state = {name: tensor.to(own[name].dtype) for name, tensor in state.items()}
        model.load_state_dict(state, assign=True)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_meta:
                    setattr(module, name, torch.empty_like(buffer, device="cpu"))
            init_buffers(module)
        model.generation = generation_of(folder)
        model.llm = TokenTable.of(llm_source(folder, parts), dtype)
        width = model.llm.embed_tokens.embedding_dim
        if width != parts.llm_width:
            raise ModelError(
                f"the language model is {width} wide but the bridge gives {parts.llm_width}"
            )
        return model


class _Unfilled(TorchFunctionMode):
    """On the meta device, leaves out what fills tensors and what says how: there is no memory, and
    torch would import its compiler for it."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        name = getattr(func, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        if in_place:
            return args[0] if args else named["tensor"]
        if name in ("rand", "randn"):
            return torch.empty(*args, **named)
        if name == "linspace" and "device" not in named:
            return torch.empty(args[2] if len(args) > 2 else named["steps"])
        return func(*args, **named)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def touch(*modules: nn.Module | None) -> Tensor:
    """Zero, with a gradient of zero to every weight of the modules that trains."""
    weights = [p for m in modules if m is not None for p in m.parameters() if p.requires_grad]
    total = torch.zeros((), device=weights[0].device if weights else None)
    return sum((weight.sum() * 0 for weight in weights), start=total)


_IF_THERE: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False}
_TABLE = "model.embed_tokens.weight"


def _read_safetensors(file: str) -> Tensor | None:
    with safe_open(file, framework="pt") as tensors:
        if _TABLE not in tensors.keys():  # noqa: SIM118  # not a mapping
            return None
        weight: Tensor = tensors.get_tensor(_TABLE)
        return weight


def _read_pickled(file: str) -> Tensor | None:
    """From a file of ``torch.save``, which Vicuna's weights are; the other tensors stay on disk."""
    weight: Tensor | None = torch.load(file, "cpu", weights_only=True, mmap=True).get(_TABLE)
    return weight


class TokenTable(nn.Module):
    """A language model's token vectors (V, L) and config, without the rest of it.

    ``config`` may be where it lies; it is then read when it is first asked for.
    """

    def __init__(self, weight: Tensor, config: PreTrainedConfig | str | Path) -> None:
        super().__init__()
        self._config = config
        self.embed_tokens: nn.Embedding = nn.Embedding.from_pretrained(weight)

    @property
    def config(self) -> PreTrainedConfig:
        """The language model's."""
        if not isinstance(self._config, PreTrainedConfig):
            self._config = cast(PreTrainedConfig, AutoConfig.from_pretrained(self._config))
        return self._config

    @classmethod
    def of(cls, name_or_dir: str | Path, dtype: torch.dtype) -> TokenTable:
        """The token vectors of a folder's or hub name's language model, read alone.

        Raises:
            ModelError: for weights without a token table where Llama's kind has it.
        """
        for file, read in (
            ("model.safetensors", _read_safetensors),
            ("pytorch_model.bin", _read_pickled),
        ):
            index = cached_file(name_or_dir, f"{file}.index.json", **_IF_THERE)
            if index is not None:
                shards = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
                file = shards.get(_TABLE, file)
            found = cached_file(name_or_dir, file, **_IF_THERE)
            if found is None:
                continue
            weight = read(found)
            if weight is None:
                raise ModelError(f"{name_or_dir}: no {_TABLE} in {file}")
            return cls(weight.to(dtype), name_or_dir)
        raise ModelError(
            f"{name_or_dir}: no model.safetensors or pytorch_model.bin with the token table"
        )

    def get_input_embeddings(self) -> nn.Module:
        """The table, as a Hugging Face model has it."""
        return self.embed_tokens


def generation_of(
    folder: str | Path, hub: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """What a checkpoint's ``generation_config.json`` says, if there is one.

    Raises:
        ModelError: if it is not JSON.
    """
    file = cached_file(folder, GENERATION_CONFIG_NAME, **_IF_THERE, **(hub or {}))
    if file is None:
        return None
    try:
        said: dict[str, Any] = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{folder}: {GENERATION_CONFIG_NAME} is not JSON: {error}") from error
    return said

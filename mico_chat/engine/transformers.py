"""The reference engine's model: any causal language model of Hugging Face, in torch.

It runs wherever torch does, takes bitsandbytes and PEFT models as they are, and is what the
other engines are compared with.

Keys and values of all slots lie in one pool of cells a layer, so that memory is taken for the
tokens that are held and not for the longest in every slot. A forward writes its new tokens into
free cells and gathers what its rows see.

Legend: R rows (chunks), Q new tokens of the longest, N new tokens of all, W tokens that the
longest row sees, C cells, H key-value heads, D head width, L LLM width, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from mico_chat.engine.base import GenerationOptions
from mico_chat.engine.cores import free_cores
from mico_chat.engine.scheduler import Chunk
from mico_chat.engine.torch_sampler import TorchSampler
from mico_chat.model.text_branch import additive_mask

MAX_BYTES_CPU = 2 * 2**30
"""Memory for keys and values on the CPU: 52,000 tokens of a language model of 360M parameters."""

FIRST_CELLS = 256
"""Cells of a new pool; it doubles when it is full."""


class TransformersModel:
    """A :class:`mico_chat.engine.scheduler.Model` of a causal LM of full attention.

    ``llm`` is a ``LlamaForCausalLM`` or one of its kind in evaluation mode, on any device, as
    PEFT or bitsandbytes may have changed it. ``max_bytes`` bounds the memory for keys and values
    (which is taken as it is needed); where not given it is :data:`MAX_BYTES_CPU`, and on a GPU
    half of what is free. ``max_position`` can lower what the LLM's config says.
    """

    def __init__(
        self,
        llm: nn.Module,
        *,
        n_slots: int = 32,
        max_batch: int = 512,
        max_position: int | None = None,
        max_bytes: int | None = None,
    ) -> None:
        # What PEFT wraps is reached through the wrapper, which no static type says.
        wrapped: Any = llm
        config = wrapped.config.get_text_config()
        most = int(config.max_position_embeddings)
        self.n_slots = n_slots
        self.max_batch = max_batch
        self.max_position = most if max_position is None else min(max_position, most)
        self._table: Any = wrapped.get_input_embeddings()
        self._head: Any = wrapped.get_output_embeddings()
        self._decoder: Any = wrapped.get_decoder()
        # transformers renamed the argument within its major release 5.
        parameters = inspect.signature(self._decoder.forward).parameters
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"
        self._device: torch.device = self._table.weight.device
        self._threads = torch.get_num_threads()
        self._cells = _Cells(n_slots, self.max_position, self._device)
        self._layers = [_Layer(self._cells) for _ in range(config.num_hidden_layers)]
        self._cache = Cache(layers=list(self._layers))
        # What a token takes is measured: configs differ in how they say it.
        self.run([Chunk(0, 0, 1, [[0]], False)])
        self.truncate(0, 0)
        token_bytes = sum(layer.cell_bytes for layer in self._layers)
        budget = _max_bytes(self._device) if max_bytes is None else max_bytes
        self.n_cells = min(n_slots * self.max_position, budget // token_bytes)
        self.max_idle_cells = self.n_cells  # only what a row sees is looked at
        self._cells.most = self.n_cells

    @property
    def capacity(self) -> int:
        """Cells that have memory; more get some when these are full, up to ``n_cells``."""
        return self._cells.capacity

    def run(self, batch: Sequence[Chunk]) -> list[Tensor]:
        """Compute chunks of different slots.

        Chunks of like length share a forward, so that less than half of it is padding; those of
        one token, which decode, have their own. What a slot holds past a chunk's start, as after
        a step that failed, is forgotten.

        Returns:
            float32 logits (V,) after each chunk that wants them, in the batch's order.
        """
        groups: dict[int, list[int]] = {}
        for place, chunk in enumerate(batch):
            groups.setdefault(chunk.length.bit_length(), []).append(place)
        logits: dict[int, Tensor] = {}
        if self._device.type == "cpu":
            torch.set_num_threads(min(free_cores()(), self._threads))
        with torch.inference_mode():
            for group in groups.values():
                wanting = [place for place in group if batch[place].wants_logits]
                logits.update(zip(wanting, self._forward([batch[p] for p in group]), strict=True))
        return [logits[place] for place in sorted(logits)]

    def copy(self, source: int, target: int, length: int) -> None:
        """Give slot ``target`` the first ``length`` tokens of ``source`` and nothing else."""
        self._cells.truncate(target, 0)
        old, new = self._cells.copy(source, target, length)
        with torch.inference_mode():
            for layer in self._layers:
                layer.copy(old, new)

    def truncate(self, slot: int, length: int) -> None:
        """Forget all but the first ``length`` tokens of a slot."""
        self._cells.truncate(slot, length)

    def sampler(self, options: GenerationOptions, index: int) -> TorchSampler:
        """A sampler for answer ``index`` of a request.

        Raises:
            RequestError: for a ``json_schema``.
        """
        return TorchSampler(options, index, self._head.weight.device)

    def close(self) -> None:
        """Give back keys and values; the LLM stays its maker's."""
        self._layers.clear()
        self._cache.layers.clear()

    def _forward(self, chunks: Sequence[Chunk]) -> Sequence[Tensor]:
        """One forward of rows padded on the right; logits (V,) of rows that want them."""
        positions, mask = self._cells.place(chunks)
        embeds = self._embed(chunks)
        hidden = self._decoder(
            inputs_embeds=embeds,
            attention_mask=additive_mask(mask[:, None], embeds.dtype),
            position_ids=positions,
            use_cache=True,
            **{self._cache_name: self._cache},
        ).last_hidden_state
        rows = [row for row, chunk in enumerate(chunks) if chunk.wants_logits]
        if not rows:
            return []
        last = hidden[rows, [chunks[row].length - 1 for row in rows]]
        return list(self._head(last).float())

    def _embed(self, chunks: Sequence[Chunk]) -> Tensor:
        """Embeddings (R, Q, L): the table's of ids, context tokens as they are; padding is any."""
        ids = [[0] * max(chunk.length for chunk in chunks) for _ in chunks]
        context: list[tuple[int, int, Tensor]] = []
        for row, chunk in enumerate(chunks):
            at = 0
            for piece in chunk.pieces:
                if isinstance(piece, Tensor):
                    context.append((row, at, piece))
                else:
                    ids[row][at : at + len(piece)] = piece
                at += len(piece)
            assert at == chunk.length, f"{at} tokens in a chunk of {chunk.length}"
        embeds: Tensor = self._table(torch.tensor(ids, device=self._device))
        for row, at, piece in context:
            embeds[row, at : at + len(piece)] = piece.to(embeds.device, embeds.dtype)
        return embeds


# --- keys and values ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Places:
    """Where a forward's N new tokens are, and where to; the cells (R, W) that its rows see."""

    rows: Tensor
    columns: Tensor
    written: Tensor
    seen: Tensor


class _Cells:
    """Which cells of the pool hold the tokens of which slot."""

    def __init__(self, n_slots: int, max_position: int, device: torch.device) -> None:
        self.most = n_slots * max_position
        self.capacity = 0
        self.lengths = [0] * n_slots
        self.places: _Places | None = None
        self._table = torch.zeros(n_slots, max_position, dtype=torch.long, device=device)
        self._free: list[int] = []

    def place(self, chunks: Sequence[Chunk]) -> tuple[Tensor, Tensor]:
        """Take cells for new tokens; their positions (R, Q) and mask (R, Q, W) of what they see.

        Padding repeats its row's last position, and cells that a row does not see are its first
        one: a number that is none in one row's cells cannot reach another row.
        """
        for chunk in chunks:
            self.truncate(chunk.slot, chunk.start)
        device = self._table.device
        slots, starts, lengths = torch.tensor([[c.slot, c.start, c.length] for c in chunks]).T
        columns = torch.arange(int(lengths.max()))
        rows, columns = (columns < lengths[:, None]).nonzero(as_tuple=True)
        ends = starts + lengths
        positions = starts[:, None] + torch.arange(int(lengths.max()))
        positions = positions.minimum(ends[:, None] - 1)
        written = torch.tensor(self._take(len(rows)), device=device)
        self._table[slots[rows].to(device), positions[rows, columns].to(device)] = written
        for chunk in chunks:
            self.lengths[chunk.slot] = chunk.start + chunk.length
        keys = torch.arange(int(ends.max()), device=device)
        seen = self._table[slots.to(device), : len(keys)]
        seen = torch.where(keys < ends[:, None].to(device), seen, seen[:, :1])
        self.places = _Places(rows.to(device), columns.to(device), written, seen)
        positions = positions.to(device)
        return positions, keys <= positions[..., None]

    def copy(self, source: int, target: int, length: int) -> tuple[Tensor, Tensor]:
        """Take cells for the tokens of another slot; the cells they are in, and the new ones."""
        assert length <= self.lengths[source], f"{length} tokens of {self.lengths[source]}"
        old = self._table[source, :length]
        new = torch.tensor(self._take(length), dtype=torch.long, device=old.device)
        self._table[target, :length] = new
        self.lengths[target] = length
        return old, new

    def truncate(self, slot: int, length: int) -> None:
        """Free the cells of all but the first ``length`` tokens."""
        held = self.lengths[slot]
        assert length <= held, f"{length} tokens of {held} in slot {slot}"
        if length < held:
            self._free += self._table[slot, length:held].tolist()
            self.lengths[slot] = length

    def _take(self, n: int) -> list[int]:
        """Free cells; the pool's capacity grows where there are too few."""
        missing = n - len(self._free)
        if missing > 0:
            wanted = max(self.capacity + missing, 2 * self.capacity, FIRST_CELLS)
            grown = min(wanted, self.most)
            self._free += reversed(range(self.capacity, grown))
            self.capacity = max(self.capacity, grown)
            assert n <= len(self._free), f"{n} cells wanted but {len(self._free)} free"
        return [self._free.pop() for _ in range(n)]


class _Layer(CacheLayerMixin):
    """Keys and values of one layer, (C, H, D) each."""

    keys: Tensor
    values: Tensor

    def __init__(self, cells: _Cells) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cells = cells

    @property
    def cell_bytes(self) -> int:
        """What a token takes here."""
        return int(self.keys[0].nbytes + self.values[0].nbytes)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Empty pools for states (R, H, Q, D), on their device and in their dtype."""
        self.keys, self.values = (
            states.new_zeros(0, states.shape[1], states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep new states (R, H, Q, D); all that the rows see, (R, H, W, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._grow()
        places = self._cells.places
        assert places is not None
        return _keep(self.keys, key_states, places), _keep(self.values, value_states, places)

    def copy(self, old: Tensor, new: Tensor) -> None:
        """Copy cells."""
        self._grow()
        for pool in (self.keys, self.values):
            pool.index_copy_(0, new.to(pool.device), pool.index_select(0, old.to(pool.device)))

    def _grow(self) -> None:
        more = self._cells.capacity - len(self.keys)
        if more > 0:
            # Zeros: a cell that a row does not see counts nothing times what is in it, and that
            # is nothing only for a number.
            self.keys, self.values = (
                torch.cat([pool, pool.new_zeros(more, *pool.shape[1:])])
                for pool in (self.keys, self.values)
            )

    # The decoder asks for none of these, as it is given positions and a mask.

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        raise NotImplementedError

    def get_seq_length(self) -> int:
        raise NotImplementedError

    def get_max_length(self) -> int:
        raise NotImplementedError


def _keep(pool: Tensor, states: Tensor, places: _Places) -> Tensor:
    """Write new states (R, H, Q, D) into a pool (C, H, D); what the rows see, (R, H, W, D)."""
    device = pool.device
    new = states[places.rows.to(device), :, places.columns.to(device)]  # (N, H, D)
    pool.index_copy_(0, places.written.to(device), new)
    seen = pool.index_select(0, places.seen.flatten().to(device))  # (R·W, H, D)
    return seen.view(*places.seen.shape, *pool.shape[1:]).transpose(1, 2)


def _max_bytes(device: torch.device) -> int:
    """Memory for keys and values where nobody said how much."""
    if device.type != "cuda":
        return MAX_BYTES_CPU
    free, _ = torch.cuda.mem_get_info(device)
    return free // 2

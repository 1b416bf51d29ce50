"""The model of the reference engine: any causal language model of Hugging Face, in torch.

It may be the language model inside another project's multimodal model: context tokens may be wider
than its token vectors, and positions may have several axes (:mod:`mico_chat.engine.decoder`).

Each layer keeps the keys and values of all slots in one pool of cells, so that memory grows with
the tokens that are held. A forward writes its new tokens into free cells and gathers the cells that
its rows attend to. A layer with a recurrent state has a row for each slot, and a forward of such a
model has chunks of one length: padding would change states.

Legend: R rows (chunks), Q new tokens of the longest row, N new tokens of all rows, W tokens that
the longest row attends to, C cells, H key-value heads, D head width, L LLM width, V vocabulary,
A axes of the rotary embedding.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionLayer
from transformers.generation import logits_process as hf

from mico_chat.checkpoints.lora import Wardrobe, wearing
from mico_chat.engine.base import GenerationOptions
from mico_chat.engine.cpu import free_cores
from mico_chat.engine.decoder import Decoder, positions_of
from mico_chat.engine.scheduler import Chunk, Sampled, Sequence
from mico_chat.errors import ModelError

MAX_BYTES_CPU = 2 * 2**30
"""Keys and values take this memory on the CPU: 52,000 tokens of a language model of 360M
parameters."""

LEAST_SLOTS, MOST_SLOTS = 8, 32
"""Recurrent states take at most half of the memory, unless fewer than 8 slots had one then."""

FIRST_CELLS = 256  # cells of a new pool; it doubles when it is full
LEAST_TEMPERATURE = 1e-5  # lower is greedy: logits divided by it would leave float32's range


class TransformersModel:
    """A :class:`mico_chat.engine.scheduler.Model` of a causal LM of full or sliding attention, also
    of one with layers that keep a recurrent state.

    ``llm`` is a ``LlamaForCausalLM`` or similar, or a multimodal model with one inside, in
    evaluation mode, possibly wrapped by PEFT or quantized by bitsandbytes. ``max_bytes`` limits the
    memory for keys and values: by default :data:`MAX_BYTES_CPU`, on a GPU half of the free memory.
    ``max_position`` can only lower the limit of the LLM's config. With ``counts_prompt`` a
    repetition penalty counts the prompt's tokens too, as Hugging Face's ``generate`` does.
    """

    reuses_starts = True
    decodes_apart = True
    scores = True

    def __init__(
        self,
        llm: nn.Module,
        *,
        n_slots: int | None = None,
        max_batch: int = 512,
        max_position: int | None = None,
        max_bytes: int | None = None,
        counts_prompt: bool = False,
    ) -> None:
        self._counts_prompt = counts_prompt
        self._decoder = Decoder(llm)
        self._decoder.check_layers()
        self.loras = Wardrobe(llm)
        self._device = self._decoder.device
        config = self._decoder.config
        most = int(config.max_position_embeddings)
        self.n_slots, self.max_batch, self.state_bytes = n_slots or MOST_SLOTS, max_batch, 0
        self.max_position = most if max_position is None else min(max_position, most)
        self._threads = torch.get_num_threads()
        self._cells = _Cells(self.n_slots, self.max_position, self._device)
        recurrent = self._decoder.recurrent
        layers = [_States() if has_state else _Layer(self._cells) for has_state in recurrent]
        self._layers = [layer for layer in layers if isinstance(layer, _Layer)]
        self._states = [layer for layer in layers if isinstance(layer, _States)]
        self._cache = Cache(layers=list(layers))
        # Configs describe the bytes of a token in different ways, so they are measured.
        self.run([Chunk(0, 0, [0], 0)])
        self.truncate(0, 0)
        # A layer that reuses another layer's keys and values has none.
        token_bytes = sum(layer.cell_bytes for layer in self._layers if layer.is_initialized)
        budget = max_bytes or MAX_BYTES_CPU
        if max_bytes is None and self._device.type == "cuda":
            budget = torch.cuda.mem_get_info(self._device)[0] // 2
        self.state_bytes = sum(layer.slot_bytes for layer in self._states)
        if self.state_bytes and n_slots is None:
            room = budget // 2 // self.state_bytes
            self.n_slots = min(MOST_SLOTS, max(LEAST_SLOTS, room))
        for layer in self._states:
            layer.grow(self.n_slots)
        budget = max(budget // 2, budget - self.n_slots * self.state_bytes)
        self.n_cells = min(self.n_slots * self.max_position, budget // token_bytes)
        self.max_idle_cells = self.n_cells  # idle cells cost no time: attention skips them
        self._cells.limit = self.n_cells

    def run(self, batch: Many[Chunk]) -> list[Tensor]:
        """Compute chunks of different slots; float32 logits (V,) after each token that wants them.

        Chunks of similar length share a forward: less than half of it is padding. A failed step may
        have left tokens in a slot after a chunk's start: they are dropped.
        """
        groups: dict[int, list[int]] = {}
        for place, chunk in enumerate(batch):
            alike = chunk.length if self._states else chunk.length.bit_length()
            groups.setdefault(alike, []).append(place)
        logits: dict[int, Many[Tensor]] = {}
        if self._device.type == "cpu":
            torch.set_num_threads(min(free_cores()(), self._threads))
        with torch.inference_mode():
            for group in groups.values():
                logits.update(zip(group, self._forward([batch[p] for p in group]), strict=True))
        return [row for place in sorted(logits) for row in logits[place]]

    def copy(self, source: int, target: int, length: int) -> None:
        self._cells.truncate(target, 0)
        old, new = self._cells.copy(source, target, length)
        with torch.inference_mode():
            for layer in self._layers:
                if layer.is_initialized:
                    layer.copy(old, new)
            for state in self._states:
                state.copy(source, target)

    def truncate(self, slot: int, length: int) -> None:
        if self._states and 0 < length < self._cells.lengths[slot]:
            raise ModelError(
                f"the recurrent state of slot {slot} cannot go back to {length} tokens"
            )
        self._cells.truncate(slot, length)

    def sampler(self, sequence: Sequence) -> TorchSampler:
        return TorchSampler(sequence, self._decoder.logits_device, self._counts_prompt)

    def close(self) -> None:
        """Free the keys and values. The caller owns the LLM."""
        self._layers.clear()
        self._states.clear()
        self._cache.layers.clear()

    def _forward(self, chunks: Many[Chunk]) -> list[Many[Tensor]]:
        """One forward of rows padded on the right; of each row the logits (V,) that it wants."""
        places, mask = self._cells.place(chunks)
        slots = torch.tensor([chunk.slot for chunk in chunks])
        fresh = torch.tensor([chunk.start == 0 for chunk in chunks])
        for layer in self._states:
            layer.load(slots, fresh)
        with wearing(*(chunk.lora for chunk in chunks)):
            hidden = self._decoder.hidden(
                self._decoder.embedded(chunks), positions_of(chunks, places), mask, self._cache
            )
        for layer in self._states:
            layer.save(slots)
        wanted = [chunk.wanted for chunk in chunks]
        if not any(wanted):
            return [() for _ in chunks]
        rows = [row for row, n in enumerate(wanted) for _ in range(n)]
        columns = [
            at for chunk in chunks for at in range(chunk.length)[chunk.length - chunk.wanted :]
        ]
        with wearing(*(chunks[row].lora for row in rows)):
            logits = self._decoder.logits(hidden[rows, columns]).float()
        return list(logits.split(wanted))


class _Cells:
    """Which cells hold the tokens of each slot; ``rows``, ``columns`` and cells ``written`` (N,) of
    the new tokens of the forward that is running, and the cells ``seen`` (R, W) by it.
    """

    rows: Tensor
    columns: Tensor
    written: Tensor
    seen: Tensor

    def __init__(self, n_slots: int, max_position: int, device: torch.device) -> None:
        self.limit = n_slots * max_position
        self.capacity = 0
        self.lengths = [0] * n_slots
        self._table = torch.zeros(n_slots, max_position, dtype=torch.long, device=device)
        self._free: list[int] = []

    def place(self, chunks: Many[Chunk]) -> tuple[Tensor, Tensor]:
        """Take cells for new tokens; returns positions (R, Q) and attention mask (R, Q, W).

        Padding repeats its row's last position. Places past a row's end read the row's own first
        cell, so that NaN in the cells of one row cannot reach another row.
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
        self.written = torch.tensor(self._take(len(rows)), device=device)
        self._table[slots[rows].to(device), positions[rows, columns].to(device)] = self.written
        for chunk in chunks:
            self.lengths[chunk.slot] = chunk.start + chunk.length
        keys = torch.arange(int(ends.max()), device=device)
        seen = self._table[slots.to(device), : len(keys)]
        self.seen = torch.where(keys < ends[:, None].to(device), seen, seen[:, :1])
        self.rows, self.columns = rows.to(device), columns.to(device)
        positions = positions.to(device)
        return positions, keys <= positions[..., None]

    def copy(self, source: int, target: int, length: int) -> tuple[Tensor, Tensor]:
        """Take new cells for the tokens of slot ``source``; returns the old and the new cells."""
        old = self._table[source, :length]
        new = torch.tensor(self._take(length), dtype=torch.long, device=old.device)
        self._table[target, :length] = new
        self.lengths[target] = length
        return old, new

    def truncate(self, slot: int, length: int) -> None:
        held = self.lengths[slot]
        if length > held:
            raise ValueError(f"slot {slot} holds {held} tokens, but {length} are expected")
        if length < held:
            self._free += self._table[slot, length:held].tolist()
            self.lengths[slot] = length

    def _take(self, n: int) -> list[int]:
        missing = n - len(self._free)
        if missing > 0:
            wanted = max(self.capacity + missing, 2 * self.capacity, FIRST_CELLS)
            grown = min(wanted, self.limit)
            self._free += reversed(range(self.capacity, grown))
            self.capacity = max(self.capacity, grown)
            if n > len(self._free):
                raise MemoryError(f"{n} cells are needed but {len(self._free)} are free")
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
        return int(self.keys[0].nbytes + self.values[0].nbytes)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Empty pools for states (R, H, Q, D)."""
        self.keys, self.values = (
            states.new_zeros(0, states.shape[1], states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new states (R, H, Q, D); returns those that the rows attend to, (R, H, W, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._grow()
        cells = self._cells
        return _keep(self.keys, key_states, cells), _keep(self.values, value_states, cells)

    def copy(self, old: Tensor, new: Tensor) -> None:
        self._grow()
        for pool in (self.keys, self.values):
            pool.index_copy_(0, new.to(pool.device), pool.index_select(0, old.to(pool.device)))

    def _grow(self) -> None:
        more = self._cells.capacity - len(self.keys)
        if more > 0:
            # Zeros, not NaN: a masked cell has weight 0, and 0 times NaN is NaN.
            self.keys, self.values = (
                torch.cat([pool, pool.new_zeros(more, *pool.shape[1:])])
                for pool in (self.keys, self.values)
            )

    def _never_called(self, *_: Any) -> Any:
        raise NotImplementedError("the decoder receives positions and a mask")

    def get_seq_length(self, *_: Any) -> int:
        return 0  # some decoders read it beside the positions, and do not use it then

    get_mask_sizes = get_max_length = cast(Any, _never_called)


class _States(LinearAttentionLayer):
    """The states of one layer: those of a forward's rows, as transformers has them, and in pools
    those of all slots, (S, ...) each.
    """

    def __init__(self) -> None:
        super().__init__()
        self._pools: dict[str, dict[int, Tensor]] = {"conv_states": {}, "recurrent_states": {}}

    @property
    def slot_bytes(self) -> int:
        return sum(int(pool[0].nbytes) for pools in self._pools.values() for pool in pools.values())

    def load(self, slots: Tensor, fresh: Tensor) -> None:
        """Take the states of slots (R,); those that are ``fresh`` (R,) begin with zeros."""
        for name, pools in self._pools.items():
            for number, pool in pools.items():
                state = pool.index_select(0, slots.to(pool.device))
                state[fresh.to(pool.device)] = 0
                getattr(self, name)[number] = state

    def save(self, slots: Tensor) -> None:
        for name, pools in self._pools.items():
            for number, state in getattr(self, name).items():
                if state is not None:  # the first forward is that of slot 0
                    pool = pools.setdefault(number, torch.zeros_like(state))
                    pool.index_copy_(0, slots.to(pool.device), state)

    def grow(self, n_slots: int) -> None:
        for pools in self._pools.values():
            for number, pool in pools.items():
                pools[number] = pool.new_zeros(n_slots, *pool.shape[1:])

    def copy(self, source: int, target: int) -> None:
        for pools in self._pools.values():
            for pool in pools.values():
                pool[target] = pool[source]


def _keep(pool: Tensor, states: Tensor, cells: _Cells) -> Tensor:
    """Write states (R, H, Q, D) into a pool (C, H, D); returns those attended to (R, H, W, D)."""
    device = pool.device
    new = states[cells.rows.to(device), :, cells.columns.to(device)]  # (N, H, D)
    pool.index_copy_(0, cells.written.to(device), new)
    seen = pool.index_select(0, cells.seen.flatten().to(device))  # (R·W, H, D)
    return seen.view(*cells.seen.shape, *pool.shape[1:]).transpose(1, 2)


class TorchSampler:
    """Samples from logits (V,) with Hugging Face's logits processors and its own generator."""

    def __init__(
        self, sequence: Sequence, device: torch.device, counts_prompt: bool = False
    ) -> None:
        options, self._grammar = sequence.options, sequence.grammar
        self._bias = sequence.bias
        self._n_likeliest = options.logprobs or 0
        self._greedy = options.temperature < LEAST_TEMPERATURE
        prompt = sequence.prompt
        said = prompt.tokens(0, len(prompt))[0] if counts_prompt else []
        before = torch.tensor([token for token in said if token >= 0], dtype=torch.long)
        found = _processors(options, before.to(device)[None], greedy=self._greedy)
        self._processors = hf.LogitsProcessorList(found)
        self._generator = torch.Generator(device)
        if options.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(options.seed + sequence.index)
        self._ids: Any = torch.zeros(1, 0, dtype=torch.long, device=device)

    def sample(self, logits: Tensor) -> Sampled:
        with torch.inference_mode():
            row: Any = logits[None]  # transformers annotates tensor types of its own
            if self._grammar is not None:
                allowed = torch.from_numpy(self._grammar.allowed(len(logits))).to(logits.device)
                row = row.masked_fill(~allowed, -torch.inf)
            if bias := self._bias(len(logits)):
                ids = torch.tensor([list(bias)], device=row.device)
                more = torch.tensor([list(bias.values())], dtype=row.dtype, device=row.device)
                row = row.scatter_add(1, ids, more)
            scores: Tensor = self._processors(self._ids, row)
            if self._greedy:
                token = scores.argmax(dim=-1, keepdim=True)
            else:
                token = torch.multinomial(scores.softmax(-1), 1, generator=self._generator)
            self._ids = torch.cat([self._ids, token], dim=1)
            if self._grammar is not None:
                self._grammar.accept(int(token))
            return self._sampled(int(token), logits)

    def score(self, logits: Tensor, token: int) -> Sampled:
        with torch.inference_mode():
            return self._sampled(token, logits)

    def close(self) -> None: ...

    def _sampled(self, token: int, logits: Tensor) -> Sampled:
        logprobs = logits.log_softmax(-1)
        values, ids = logprobs.topk(min(self._n_likeliest, len(logprobs)))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        return Sampled(token, float(logprobs[token]), top)


class _CountPenalty(hf.LogitsProcessor):
    def __init__(self, presence: float, frequency: float) -> None:
        self._presence, self._frequency = presence, frequency

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        once = torch.ones_like(input_ids, dtype=scores.dtype)
        times = torch.zeros_like(scores).scatter_add_(1, input_ids, once)
        return scores - self._presence * (times > 0) - self._frequency * times


class _Repetition(hf.RepetitionPenaltyLogitsProcessor):
    """Counts the tokens (1, n) ``before`` the answer too."""

    def __init__(self, penalty: float, before: Tensor) -> None:
        super().__init__(penalty)
        self._before = before

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return super().__call__(torch.cat([self._before, input_ids], 1), scores)


def _processors(
    options: GenerationOptions, before: Tensor, *, greedy: bool
) -> list[hf.LogitsProcessor]:
    """Penalties, then limits in the order of Hugging Face's ``generate``."""
    found: list[hf.LogitsProcessor] = []
    if options.repetition_penalty != 1.0:
        found.append(_Repetition(options.repetition_penalty, before))
    if options.presence_penalty or options.frequency_penalty:
        found.append(_CountPenalty(options.presence_penalty, options.frequency_penalty))
    if greedy:
        return found
    # A low temperature after a strong penalty may give infinite scores.
    found += [hf.TemperatureLogitsWarper(options.temperature), hf.InfNanRemoveLogitsProcessor()]
    if options.top_k > 0:
        found.append(hf.TopKLogitsWarper(options.top_k))
    if options.top_p < 1.0:
        found.append(hf.TopPLogitsWarper(options.top_p))
    if options.min_p > 0.0:
        found.append(hf.MinPLogitsWarper(options.min_p))
    return found

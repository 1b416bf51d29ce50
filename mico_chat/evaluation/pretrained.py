"""Stage 1's model under evaluation: it captions, answers, and gives vectors and matches.

Encoder and context run in the dtype that is asked for. The text branch runs in float32: bfloat16
cannot tell similar candidates apart.

Legend: B items, U units, T tokens of a unit, D encoder width, N context tokens, d text width.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mico_chat.checkpoints.assemble import read_preprocessing
from mico_chat.checkpoints.folders import PRETRAINING, local_folder, model_folder
from mico_chat.checkpoints.load import load_pretraining
from mico_chat.errors import MediaError
from mico_chat.evaluation.store import Record
from mico_chat.evaluation.task import Item, Model, Reply, Task, chunks, fingerprint
from mico_chat.media import MediaDecoder, MediaFile, MediaLimits, Video
from mico_chat.media.kinds import KINDS, Kind
from mico_chat.model.context import Units
from mico_chat.model.contrastive import ContrastiveSpace, MediaContext
from mico_chat.model.processing import MicoChatProcessor
from mico_chat.model.text_branch import answers, captions

UNITS_AT_ONCE = 64
AHEAD = 2
"""Batches that are decoded while the model encodes another; they stay in memory until then."""


class MediumUnits(NamedTuple):
    """The kinds and the units (n, 3, H, W) of a medium and of its sound track, if it has one.

    ``subtitle`` is what is said in it, or "".
    """

    kinds: tuple[Kind, ...]
    units: tuple[Tensor, ...]
    subtitle: str = ""


class PretrainedModel(Model):
    """The model of a stage 1 folder, or the text branch of a chat model's folder."""

    def __init__(
        self,
        name: str,
        dtype: str = "float32",
        device: str | None = None,
        *,
        batch_size: int = 32,
        workers: int = 1,
    ) -> None:
        self.model, self.tokenizer = load_pretraining(name)
        nn.Module.to(self.model, device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model.encoder.to(getattr(torch, dtype))
        self.name = name
        self.space = ContrastiveSpace(self.model, self.tokenizer)
        folder = local_folder(model_folder(name))
        if (folder / PRETRAINING).is_dir():
            processor = MicoChatProcessor.from_pretrained(folder)
            self.preprocessing = processor.preprocessing
        else:
            self.preprocessing = read_preprocessing(folder, self.model.config)
        self.batch_size = batch_size
        self.workers = workers
        self._device = next(self.model.text.parameters()).device
        self._dtype = next(self.model.encoder.vit.parameters()).dtype

    def header(self) -> Record:
        encoder = self.model.config.encoder_config
        return {
            "model": self.name,
            "weights": fingerprint(self.model, self.preprocessing.model_dump_json()),
            "dtype": str(self._dtype).removeprefix("torch."),
            "resolution": encoder.image_size,
            "trained_on": self.model.config.trained_on,
        }

    def batches(self, items: Sequence[Item]) -> list[list[int]]:
        """Batches of ``batch_size`` media with all of their items: each medium is encoded once."""
        places: dict[MediaFile, list[int]] = {}
        for place, item in enumerate(items):
            places.setdefault(item.media[0], []).append(place)
        groups = list(places.values())
        batches = chunks(len(groups), self.batch_size)
        return [[place for number in batch for place in groups[number]] for batch in batches]

    def answers(
        self, task: Task, items: Sequence[Item], max_tokens: int
    ) -> Iterator[tuple[int, Reply]]:
        """Captions or answers by beam search, eq. (6), as long as the text branch allows."""
        batches = self.batches(items)
        media = [{items[place].media[0]: items[place] for place in batch} for batch in batches]
        encoded_media = self.encoded(task, [[*shown.values()] for shown in media])
        for batch, shown, found in zip(batches, media, encoded_media, strict=True):
            of = dict(zip(shown, found, strict=True))
            good: list[tuple[int, MediaContext]] = []
            for place in batch:
                encoded = of[items[place].media[0]]
                if isinstance(encoded, MediaError):
                    yield place, Reply("broken", str(encoded))
                else:
                    good.append((place, encoded))
            for part in chunks(len(good), self.batch_size):
                places, contexts = zip(*(good[number] for number in part), strict=True)
                if task.family == "captioning":
                    said = self.caption(contexts)
                elif not items[places[0]].question:
                    said = self.named(task, contexts, items[places[0]].choices)
                else:
                    said = self.answer(contexts, [items[place].question for place in places])
                yield from zip(places, (Reply("answer", text) for text in said), strict=True)

    def caption(self, items: Sequence[MediaContext]) -> list[str]:
        return captions(self.model, *padded(items), self.tokenizer, num_beams=3)

    def named(self, task: Task, items: Sequence[MediaContext], names: Sequence[str]) -> list[str]:
        """The name with the highest contrastive score for each item."""
        texts = self.space.of_texts(self.space.truncated(names, task.text_length))
        best = (torch.stack([item.vector for item in items]) @ texts.T).argmax(1)
        return [names[place] for place in best.tolist()]

    def answer(self, items: Sequence[MediaContext], questions: Sequence[str]) -> list[str]:
        return answers(self.model, *padded(items), questions, self.tokenizer, num_beams=3)

    def encoded(
        self, task: Task, batches: Sequence[Sequence[Item]]
    ) -> Iterator[list[MediaContext | MediaError]]:
        """The context of each item's medium, by batch; an error replaces a broken medium."""
        for batch in self.decoded(task, batches):
            good = [units for units in batch if not isinstance(units, MediaError)]
            contexts = iter(self.encode(good) if good else [])
            yield [one if isinstance(one, MediaError) else next(contexts) for one in batch]

    def decoded(
        self, task: Task, batches: Sequence[Sequence[Item]]
    ) -> Iterator[list[MediumUnits | MediaError]]:
        """The units of each item's medium that the task uses, by batch.

        The next batches are decoded while the caller uses one. An error replaces a broken medium.
        """
        preprocessing = self.preprocessing.model_copy(update={"max_slices": max(1, task.slices)})
        limits = MediaLimits().model_copy(update={"max_frames": task.frames})
        threads = ThreadPoolExecutor(self.workers, "mico-load")
        coming: deque[list[Future[MediumUnits | MediaError]]] = deque()
        with closing(MediaDecoder(limits, workers=self.workers)) as decoder:

            def load(item: Item) -> MediumUnits | MediaError:
                try:
                    file = replace(item.media[0], sampling=preprocessing.sampling)
                    medium = decoder.decode(file)
                    own = preprocessing.units(medium)
                    if not task.slices or not isinstance(medium, Video) or medium.audio is None:
                        return MediumUnits((medium.kind,), (own,), item.subtitle)
                    track = preprocessing.units(medium.audio)
                    return MediumUnits((medium.kind, "audio"), (own, track), item.subtitle)
                except MediaError as error:
                    return error

            try:
                for number in range(len(batches) + AHEAD):
                    if number < len(batches):
                        coming.append([threads.submit(load, one) for one in batches[number]])
                    if number >= AHEAD:
                        yield [future.result() for future in coming.popleft()]
            finally:
                threads.shutdown(wait=False, cancel_futures=True)

    @torch.inference_mode()
    def encode(self, items: Sequence[MediumUnits]) -> list[MediaContext]:
        """The contexts and vectors of B items, eq. (1) and (4)."""
        kinds = torch.tensor([KINDS.index(kind) for item in items for kind in item.kinds])
        counts = torch.tensor([len(units) for item in items for units in item.units])
        owner = torch.tensor([row for row, item in enumerate(items) for _ in item.units])
        pixels = torch.cat([units for item in items for units in item.units])
        of_unit = torch.repeat_interleave(kinds, counts)
        parts = zip(pixels.split(UNITS_AT_ONCE), of_unit.split(UNITS_AT_ONCE), strict=True)
        encoded = [self._encoded(*part) for part in parts]
        tokens, features = (torch.cat(part) for part in zip(*encoded, strict=True))
        kinds, counts, owner = (x.to(self._device) for x in (kinds, counts, owner))
        tokens = self.model.in_context(tokens, features, kinds, counts)
        row = torch.repeat_interleave(owner, counts)
        subtitles = [item.subtitle for item in items]
        return self.space.of_tokens(tokens, Units.of(kinds, counts), row, len(items), subtitles)

    def _encoded(self, pixels: Tensor, kind: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's tokens (U, T, D) and features, in float32, of pixels (U, 3, H, W) and
        kinds (U,)."""
        encoder = self.model.encoder
        features = encoder.features(pixels.to(self._device, self._dtype), kind.to(self._device))
        return encoder(features).float(), features.float()


def padded(items: Sequence[MediaContext]) -> tuple[Tensor, Tensor]:
    """Contexts (B, N, d) padded with zeros, and a mask (B, N) of the tokens that are no padding."""
    contexts = pad_sequence([item.context for item in items], batch_first=True)
    lengths = torch.tensor([len(item.context) for item in items], device=contexts.device)
    places = torch.arange(contexts.shape[1], device=contexts.device)
    return contexts, places < lengths.unsqueeze(1)

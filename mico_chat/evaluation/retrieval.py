"""Retrieval with stage 1's model: vectors of media and texts, and matching logits of near pairs.

The kinds of record in the store are ``medium`` and ``text`` (each has a vector of the contrastive
space), ``matches`` (the logits of a medium with texts, by the numbers of the texts) and ``seconds``
(the time of a batch). A resumed run makes the same batches, and so computes the same.
"""

from __future__ import annotations

import base64
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from mico_chat.errors import ConfigError, MediaError
from mico_chat.evaluation.metrics.recall import contrasted
from mico_chat.evaluation.model import chunks
from mico_chat.evaluation.pretrained import PretrainedModel
from mico_chat.evaluation.store import Record, Store, broken
from mico_chat.evaluation.task import Contents, Task

MATCH_TOKENS = 1 << 16
"""A step of the matching head has so many context tokens: each text reads those of the medium."""
CONTEXTS = "contexts"


def rank(
    task: Task, contents: Contents, model: PretrainedModel, store: Store, folder: Path
) -> None:
    """Store the vectors and matches that are not in the store yet."""
    contexts = folder / CONTEXTS
    contexts.mkdir(exist_ok=True)
    files = {item.id: contexts / f"{n:07d}.npy" for n, item in enumerate(contents.items)}
    retrieval = _Retrieval(task, contents, model, store, files)
    retrieval.encode_media()
    vectors = {r["id"]: vector_of(r) for r in store.records if r["kind"] == "medium"}
    vectors = {id: vectors[id] for id in files if id in vectors}
    if vectors:
        retrieval.encode_texts(set(vectors))
        retrieval.match(vectors)
    shutil.rmtree(contexts)


@dataclass(frozen=True)
class _Retrieval:
    """``files`` are temporary: the context of each medium in float16, by the medium's id."""

    task: Task
    contents: Contents
    model: PretrainedModel
    store: Store
    files: dict[str, Path]

    @contextmanager
    def batch(self) -> Iterator[list[Record]]:
        """Yields a list for the records of a batch, then stores them and the time of the batch."""
        started = time.perf_counter()
        records: list[Record] = []
        yield records
        took = round(time.perf_counter() - started, 3)
        self.store.add([*records, {"kind": "seconds", "seconds": took}])

    def ids(self, kind: str) -> set[str]:
        return {record["id"] for record in self.store.records if record["kind"] == kind}

    def encode_media(self) -> None:
        """Store the vectors, and write the contexts: the file of a medium before its record."""
        items, files = self.contents.items, self.files
        known, matched = self.ids("medium"), self.ids("matches")
        done = {id for id in known if id in matched or files[id].is_file()} | self.ids("broken")
        batches = [
            [items[place] for place in batch]
            for batch in self.model.batches(items)
            if any(items[place].id not in done for place in batch)
        ]
        left = sum(map(len, batches))
        found = self.model.encoded(self.task, [[i.media[0] for i in batch] for batch in batches])
        for batch in tqdm(batches, desc=f"{self.task.name}: media", unit="batch"):
            with self.batch() as records:
                for item, encoded in zip(batch, next(found), strict=True):
                    if isinstance(encoded, MediaError):
                        records.append(broken(item.id, str(encoded)))
                        continue
                    if left:
                        _check_room(files[item.id].parent, encoded.context.numel() * 2 * left)
                        left = 0  # one look is enough
                    partial = files[item.id].with_suffix(".partial")
                    with partial.open("wb") as file:
                        np.save(file, encoded.context.cpu().numpy().astype(np.float16))
                    partial.replace(files[item.id])
                    if item.id not in known:
                        number = int(files[item.id].stem)
                        record = {"kind": "medium", "id": item.id, "number": number}
                        records.append({**record, "vector": _packed(encoded.vector)})

    def encode_texts(self, there: set[str]) -> None:
        known = {r["text"] for r in self.store.records if r["kind"] == "text"}
        texts = _texts_of(self.contents, there)
        space, length = self.model.space, self.task.text_length
        batches = chunks(len(texts), self.model.batch_size)
        for numbers in tqdm(batches, desc=f"{self.task.name}: texts", unit="batch"):
            if known.issuperset(numbers):
                continue
            with self.batch() as records:
                rows = space.truncated([texts[number][0] for number in numbers], length)
                for number, vector in zip(numbers, space.of_texts(rows), strict=True):
                    if number not in known:
                        text, media = texts[number]
                        record: Record = {"kind": "text", "text": number, "words": text}
                        records.append({**record, "media": media, "vector": _packed(vector)})

    def match(self, media: dict[str, NDArray[np.float32]]) -> None:
        """Store the matching logits of each medium with its near texts."""
        found = sorted(
            (r for r in self.store.records if r["kind"] == "text"), key=lambda r: int(r["text"])
        )
        rows = self.model.space.truncated([r["words"] for r in found], self.task.text_length)
        texts = torch.from_numpy(np.stack([vector_of(record) for record in found]))
        near = nearest(texts, torch.from_numpy(np.stack(list(media.values()))))
        done = self.ids("matches")
        for number, id in enumerate(tqdm(media, desc=f"{self.task.name}: matches", unit="medium")):
            if id in done:
                continue
            with self.batch() as records:
                context = torch.from_numpy(np.load(self.files[id])).float()
                logits: list[float] = []
                for part in chunks(len(near[number]), max(1, MATCH_TOKENS // len(context))):
                    read = [rows[near[number][place]] for place in part]
                    logits += self.model.space.match_logits(read, context).tolist()
                record = {"kind": "matches", "id": id, "texts": near[number], "logits": logits}
                records.append(record)


def _check_room(folder: Path, needed: int) -> None:
    """Refuse a run whose contexts do not fit on the disk: contexts of long videos are large."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"{folder}: the contexts need about {needed / 1e9:.1f} GB until the run ends, "
            f"but only {free / 1e9:.1f} GB are free there: give an --output on another disk"
        )


def _texts_of(contents: Contents, there: set[str]) -> list[tuple[str, list[str]]]:
    """Every caption of the usable media, with the ids of the media that it is right for."""
    pairs = [(c, item.id) for item in contents.items if item.id in there for c in item.captions]
    if not contents.same_words:
        return [(text, [id]) for text, id in pairs]
    merged: dict[str, list[str]] = {}
    for text, id in pairs:
        if id not in merged.setdefault(text, []):
            merged[text].append(id)
    return list(merged.items())


def nearest(texts: Tensor, media: Tensor) -> list[list[int]]:
    """The near texts of each medium, for vectors of media (M, P) and texts (Q, P).

    A text is near if it is among a medium's best texts, or if the medium is among its best media.
    """
    found: list[set[int]] = [set() for _ in media]
    for start, _, top in contrasted(texts, media):
        for text, row in enumerate(top.tolist(), start):
            for medium in row:
                found[medium].add(text)
    for start, _, top in contrasted(media, texts):
        for medium, row in enumerate(top.tolist(), start):
            found[medium].update(row)
    return [sorted(numbers) for numbers in found]


def _packed(vector: Tensor) -> str:
    """Base64 of a vector's float32 bytes, little-endian."""
    return base64.b64encode(vector.cpu().numpy().astype("<f4").tobytes()).decode()


def vector_of(record: Record) -> NDArray[np.float32]:
    """The vector (P,) of a ``medium`` or ``text`` record."""
    return np.frombuffer(base64.b64decode(record["vector"]), "<f4").astype(np.float32)

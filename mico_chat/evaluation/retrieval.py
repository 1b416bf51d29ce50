"""Retrieval with stage 1's model: vectors of media and texts, and the matches of near pairs.

The records of the store are ``medium`` and ``text`` (a vector of the contrastive space),
``matches`` (matching logits of a medium and texts by their number) and ``seconds`` (of a batch).
Batches are the same whatever is stored already, so that a resumed run computes the same as an
uninterrupted one, to the bit.
"""

from __future__ import annotations

import base64
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from mico_chat.errors import ConfigError, MediaError
from mico_chat.evaluation.metrics.recall import contrasted
from mico_chat.evaluation.pretrained import PretrainedModel
from mico_chat.evaluation.store import Record, Store, broken
from mico_chat.evaluation.task import Contents, Item, Task

MATCH_TOKENS = 1 << 16
"""Context tokens that texts are read over in one step."""
CONTEXTS = "contexts"


def rank(
    task: Task, contents: Contents, model: PretrainedModel, store: Store, folder: Path
) -> None:
    contexts = folder / CONTEXTS
    contexts.mkdir(exist_ok=True)
    files = {item.id: contexts / f"{n:07d}.npy" for n, item in enumerate(contents.items)}
    _media(task, contents.items, model, store, files)
    vectors = {r["id"]: vector_of(r) for r in store.records if r["kind"] == "medium"}
    there = [id for id in files if id in vectors]
    if there:
        _texts(task, contents, set(there), model, store)
        _matches(task, np.stack([vectors[id] for id in there]), there, files, model, store)
    shutil.rmtree(contexts)


@contextmanager
def _batch(store: Store) -> Iterator[list[Record]]:
    started = time.perf_counter()
    records: list[Record] = []
    yield records
    took = round(time.perf_counter() - started, 3)
    store.add([*records, {"kind": "seconds", "seconds": took}])


def _ids(store: Store, kind: str) -> set[str]:
    return {str(record["id"]) for record in store.records if record["kind"] == kind}


def _media(
    task: Task,
    items: Sequence[Item],
    model: PretrainedModel,
    store: Store,
    files: dict[str, Path],
) -> None:
    """Vectors to the store, contexts to files: a medium's file is written before its record."""
    known, matched, lost = (_ids(store, kind) for kind in ("medium", "matches", "broken"))
    done = {id for id in known if id in matched or files[id].is_file()} | lost
    batches = [
        [items[place] for place in batch]
        for batch in model.batches(items)
        if any(items[place].id not in done for place in batch)
    ]
    left = sum(map(len, batches))
    found = model.encoded(task, [[item.media[0] for item in batch] for batch in batches])
    for batch in tqdm(batches, desc=f"{task.name}: media", unit="batch"):
        with _batch(store) as records:
            for item, encoded in zip(batch, next(found), strict=True):
                if isinstance(encoded, MediaError):
                    records.append(broken(item.id, str(encoded)))
                    continue
                if left:
                    _check_room(files[item.id].parent, encoded.context.numel() * 2 * left)
                    left = 0  # one look is enough
                _keep(files[item.id], encoded.context)
                if item.id not in known:
                    number, vector = int(files[item.id].stem), _packed(encoded.vector)
                    records.append(
                        {"kind": "medium", "id": item.id, "number": number, "vector": vector}
                    )


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"{folder}: the contexts need about {needed / 1e9:.1f} GB until the run ends, "
            f"but only {free / 1e9:.1f} GB are free there: give an --output on another disk"
        )


def _keep(path: Path, context: Tensor) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.save(file, context.cpu().numpy().astype(np.float16))
    partial.replace(path)


def _texts(
    task: Task, contents: Contents, there: set[str], model: PretrainedModel, store: Store
) -> None:
    known = {r["text"] for r in store.records if r["kind"] == "text"}
    texts = _texts_of(contents, there)
    starts = range(0, len(texts), model.batch_size)
    for start in tqdm(starts, desc=f"{task.name}: texts", unit="batch"):
        numbers = range(start, min(start + model.batch_size, len(texts)))
        if known.issuperset(numbers):
            continue
        with _batch(store) as records:
            rows = model.space.truncated([texts[number][0] for number in numbers], task.text_length)
            for number, vector in zip(numbers, model.space.of_texts(rows), strict=True):
                if number not in known:
                    text, media = texts[number]
                    record: Record = {"kind": "text", "text": number, "words": text}
                    records.append({**record, "media": media, "vector": _packed(vector)})


def _texts_of(contents: Contents, there: set[str]) -> list[tuple[str, list[str]]]:
    pairs = [(c, item.id) for item in contents.items if item.id in there for c in item.captions]
    if not contents.same_words:
        return [(text, [id]) for text, id in pairs]
    merged: dict[str, list[str]] = {}
    for text, id in pairs:
        if id not in merged.setdefault(text, []):
            merged[text].append(id)
    return list(merged.items())


def _matches(
    task: Task,
    media: NDArray[np.float32],
    ids: Sequence[str],
    files: dict[str, Path],
    model: PretrainedModel,
    store: Store,
) -> None:
    """The matching head over each medium and the texts among the nearest of either direction."""
    found = sorted((r for r in store.records if r["kind"] == "text"), key=lambda r: int(r["text"]))
    rows = model.space.truncated([str(record["words"]) for record in found], task.text_length)
    texts = torch.from_numpy(np.stack([vector_of(record) for record in found]))
    near = nearest(texts, torch.from_numpy(media))
    done = _ids(store, "matches")
    for number, id in enumerate(tqdm(ids, desc=f"{task.name}: matches", unit="medium")):
        if id in done:
            continue
        with _batch(store) as records:
            context = torch.from_numpy(np.load(files[id])).float()
            at_once = max(1, MATCH_TOKENS // len(context))
            logits: list[float] = []
            for start in range(0, len(near[number]), at_once):
                part = [rows[text] for text in near[number][start : start + at_once]]
                logits += model.space.match_logits(part, context).tolist()
            records.append({"kind": "matches", "id": id, "texts": near[number], "logits": logits})


def nearest(texts: Tensor, media: Tensor) -> list[list[int]]:
    """For each medium the texts that the matching head reads over it.

    The top candidates of every text (Q, P) and of every medium (M, P) are ranked again.
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

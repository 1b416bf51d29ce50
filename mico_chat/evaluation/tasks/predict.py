"""What the model says of a task's items, family by family, each batch stored as it is done.

Batches are the same whatever is stored already, so that a resumed run computes what an
uninterrupted one would have, to the bit. The kinds of record:

* ``broken``: an item that could not be used, and why
* ``caption``: an item's caption and those people wrote
* ``answer``: an answer, its question and people's answers
* ``medium``, ``text``: a vector of the contrastive space
* ``matches``: matching logits of a medium and texts by their number
* ``seconds``: what a batch took;  ``done``: there are no more
"""

from __future__ import annotations

import base64
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from mico_chat.errors import ConfigError, MediaError
from mico_chat.evaluation.tasks.loading import MediaPool
from mico_chat.evaluation.tasks.model import EncodedItem, EvaluatedModel, ItemUnits
from mico_chat.evaluation.tasks.store import Record, Store
from mico_chat.evaluation.tasks.task import Contents, Entry, ItemMedia, Task

RERANKED = 50
"""Candidates of each query that the matching head ranks anew (appendix B)."""

MATCH_TOKENS = 1 << 16
"""Context tokens that texts are read over in one step."""

QUERIES_AT_ONCE = 1024

CONTEXTS = "contexts"
"""Folder for contexts while a retrieval runs: a file a medium, float16."""


@dataclass
class Run:
    """A task under way: the model, the store, what decodes, media a batch."""

    task: Task
    model: EvaluatedModel
    store: Store
    pool: MediaPool
    batch_size: int

    def done(self, kind: str) -> set[str]:
        """Ids of the items that have a record of a kind, or are known to be broken."""
        return {str(r["id"]) for r in self.store.records if r["kind"] in (kind, "broken")}

    @contextmanager
    def batch(self) -> Iterator[list[Record]]:
        """Collects a batch's records, and stores them with the time it took."""
        started = time.perf_counter()
        records: list[Record] = []
        yield records
        took = round(time.perf_counter() - started, 3)
        self.store.add([*records, {"kind": "seconds", "seconds": took}])

    def encoded(
        self, batches: Sequence[Sequence[Group]], what: str
    ) -> Iterator[tuple[list[tuple[Group, EncodedItem]], list[Record]]]:
        """Batch after batch its groups with their contexts, and the records to fill.

        Groups whose medium cannot be decoded are recorded as broken.
        """
        media = [[group.media for group in batch] for batch in batches]
        loaded = self.pool.batches(media)
        for batch in tqdm(batches, desc=f"{self.task.name}: {what}", unit="batch"):
            with self.batch() as records:
                good: list[tuple[Group, ItemUnits]] = []
                for group, found in zip(batch, next(loaded), strict=True):
                    if isinstance(found, MediaError):
                        records += [broken(entry.id, str(found)) for entry in group.entries]
                    else:
                        good.append((group, found))
                contexts = self.model.encode([units for _, units in good]) if good else []
                yield [(g, c) for (g, _), c in zip(good, contexts, strict=True)], records


@dataclass(frozen=True)
class Group:
    """Entries of one medium, which is decoded and encoded once for all of them."""

    media: ItemMedia
    entries: tuple[Entry, ...]


def broken(id: str, reason: str) -> Record:
    """The record of an item that cannot be used."""
    return {"kind": "broken", "id": id, "reason": reason}


def predict(run: Run, contents: Contents, folder: Path) -> None:
    """Do what is not done yet."""
    if any(record["kind"] == "done" for record in run.store.records):
        return
    if not run.store.records:
        run.store.add([broken(lost.id, lost.reason) for lost in contents.broken])
    if run.task.family == "captioning":
        _captions(run, contents)
    elif run.task.family == "qa":
        _answers(run, contents)
    else:
        _rankings(run, contents, folder / CONTEXTS)
    run.store.add([{"kind": "done"}])


def _batches(entries: Sequence[Entry], size: int) -> list[list[Group]]:
    """Groups in the order in which their media first occur, ``size`` a batch."""
    media: dict[ItemMedia, list[Entry]] = {}
    for entry in entries:
        media.setdefault(entry.media, []).append(entry)
    groups = [Group(medium, tuple(of_it)) for medium, of_it in media.items()]
    return [groups[start : start + size] for start in range(0, len(groups), size)]


def _pending(batches: Sequence[list[Group]], done: set[str]) -> list[list[Group]]:
    return [
        batch
        for batch in batches
        if any(entry.id not in done for group in batch for entry in group.entries)
    ]


# --- captioning and questions -------------------------------------------------------------------


def _captions(run: Run, contents: Contents) -> None:
    done = run.done("caption")
    batches = _pending(_batches(contents.entries, run.batch_size), done)
    for batch, records in run.encoded(batches, "captions"):
        if not batch:
            continue
        said = run.model.caption([context for _, context in batch])
        records += [
            {
                "kind": "caption",
                "id": entry.id,
                "caption": caption,
                "references": entry.captions,
            }
            for (group, _), caption in zip(batch, said, strict=True)
            for entry in group.entries
        ]


def _answers(run: Run, contents: Contents) -> None:
    done = run.done("answer")
    batches = _pending(_batches(contents.entries, run.batch_size), done)
    for batch, records in run.encoded(batches, "answers"):
        asked = [(entry, context) for group, context in batch for entry in group.entries]
        for start in range(0, len(asked), run.batch_size):
            part = asked[start : start + run.batch_size]
            said = run.model.answer(
                [context for _, context in part], [entry.question for entry, _ in part]
            )
            records += [
                {
                    "kind": "answer",
                    "id": entry.id,
                    "question": entry.question,
                    "answer": answer,
                    "references": entry.answers,
                }
                for (entry, _), answer in zip(part, said, strict=True)
            ]


# --- retrieval ----------------------------------------------------------------------------------


def _rankings(run: Run, contents: Contents, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    ids = [entry.id for entry in contents.entries]
    places = {id: folder / f"{number:07d}.npy" for number, id in enumerate(ids)}
    _media(run, contents, places)
    vectors = {r["id"]: vector_of(r) for r in run.store.records if r["kind"] == "medium"}
    there = [id for id in ids if id in vectors]
    if there:
        _texts(run, contents, set(there))
        _matches(run, np.stack([vectors[id] for id in there]), there, places)
    shutil.rmtree(folder)


def _media(run: Run, contents: Contents, places: dict[str, Path]) -> None:
    """Vectors to the store, contexts to files: a medium's is written before its record."""
    known, matched = run.done("medium"), run.done("matches")
    done = {id for id in known if id in matched or id not in places or places[id].is_file()}
    done |= {str(r["id"]) for r in run.store.records if r["kind"] == "broken"}
    batches = _pending(_batches(contents.entries, run.batch_size), done)
    left = sum(len(group.entries) for batch in batches for group in batch)
    for batch, records in run.encoded(batches, "media"):
        if left and batch:
            size = max(context.context.numel() for _, context in batch) * 2
            _check_room(next(iter(places.values())).parent, size * left)
            left = 0  # one look is enough
        for group, context in batch:
            for entry in group.entries:
                place = places[entry.id]
                _keep(place, context.context)
                if entry.id not in known:
                    record: Record = {"kind": "medium", "id": entry.id, "number": int(place.stem)}
                    records.append({**record, "vector": _packed(context.vector)})


def _check_room(folder: Path, needed: int) -> None:
    """Refuse to begin what the disk cannot hold: the contexts of long videos are large.

    Raises:
        ConfigError: naming both sizes.
    """
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


def _texts(run: Run, contents: Contents, there: set[str]) -> None:
    known = {r["text"] for r in run.store.records if r["kind"] == "text"}
    texts = _texts_of(contents, there)
    starts = range(0, len(texts), run.batch_size)
    for start in tqdm(starts, desc=f"{run.task.name}: texts", unit="batch"):
        numbers = range(start, min(start + run.batch_size, len(texts)))
        if known.issuperset(numbers):
            continue
        with run.batch() as records:
            words_of = [texts[number][0] for number in numbers]
            rows = run.model.tokenize(words_of, run.task.text_length)
            for number, vector in zip(numbers, run.model.text_vectors(rows), strict=True):
                if number not in known:
                    words, media = texts[number]
                    record: Record = {"kind": "text", "text": number, "words": words}
                    records.append({**record, "media": media, "vector": _packed(vector)})


def _texts_of(contents: Contents, there: set[str]) -> list[tuple[str, list[str]]]:
    """Every caption and the media that it is right for, of those that could be used."""
    pairs = [(c, e.id) for e in contents.entries if e.id in there for c in e.captions]
    if not contents.same_words:
        return [(words, [id]) for words, id in pairs]
    merged: dict[str, list[str]] = {}
    for words, id in pairs:
        if id not in merged.setdefault(words, []):
            merged[words].append(id)
    return list(merged.items())


def _matches(
    run: Run, media: NDArray[np.float32], ids: Sequence[str], places: dict[str, Path]
) -> None:
    """The matching head over each medium and the texts that are near it, or that it is near."""
    found = sorted(
        (r for r in run.store.records if r["kind"] == "text"), key=lambda r: int(r["text"])
    )
    rows = run.model.tokenize([str(record["words"]) for record in found], run.task.text_length)
    texts = torch.from_numpy(np.stack([vector_of(record) for record in found]))
    near = nearest(texts, torch.from_numpy(media))
    done = {str(r["id"]) for r in run.store.records if r["kind"] == "matches"}
    for number, id in enumerate(tqdm(ids, desc=f"{run.task.name}: matches", unit="medium")):
        if id in done:
            continue
        with run.batch() as records:
            context = torch.from_numpy(np.load(places[id]))
            at_once = max(1, MATCH_TOKENS // len(context))
            chosen = near[number]
            logits: list[float] = []
            for start in range(0, len(chosen), at_once):
                part = [rows[text] for text in chosen[start : start + at_once]]
                logits += run.model.match(part, context).tolist()
            records.append({"kind": "matches", "id": id, "texts": chosen, "logits": logits})


def nearest(texts: Tensor, media: Tensor) -> list[list[int]]:
    """For each medium the texts that the matching head must read over it.

    A text's top candidates are re-ranked, and a medium's; texts (Q, P), media (M, P).
    """
    found: list[set[int]] = [set() for _ in media]
    for start, _, top in contrasted(texts, media):
        for text, row in enumerate(top.tolist(), start):
            for medium in row:
                found[medium].add(text)
    for start, _, top in contrasted(media, texts):
        for medium, row in enumerate(top.tolist(), start):
            found[medium].update(row)
    return [sorted(of_it) for of_it in found]


def contrasted(queries: Tensor, candidates: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Queries (Q, P) in parts of q, so that no whole matrix is in memory: where a part starts, its
    cosines (q, D) with the candidates (D, P), and the top of these (q, at most 50)."""
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        part = queries[start : start + QUERIES_AT_ONCE].double()
        cosines = part @ candidates.double().T
        yield start, cosines, cosines.topk(min(RERANKED, len(candidates)), 1).indices


def _packed(vector: Tensor) -> str:
    """A vector as text: base64 of its float32 bytes, little-endian."""
    return base64.b64encode(vector.cpu().numpy().astype("<f4").tobytes()).decode()


def vector_of(record: Record) -> NDArray[np.float32]:
    """The vector (P,) of a ``medium`` or ``text`` record."""
    return np.frombuffer(base64.b64decode(record["vector"]), "<f4").astype(np.float32)

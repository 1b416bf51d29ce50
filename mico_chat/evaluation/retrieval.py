"""Retrieval with stage 1's model: vectors, matching logits of near pairs, recall at k.

The kinds of record in the store are ``medium`` and ``text`` (each has a vector of the contrastive
space), ``matches`` (the logits of a medium with texts, by the numbers of the texts) and ``seconds``
(the time of a batch). A resumed run makes the same batches, and so computes the same.

Recall at k is the share of queries with a relevant candidate among the k best. Ties count against
the model: a relevant candidate ranks behind all others of the same score.

Legend: Q queries, q of them in a part, D candidates, P width of the contrastive space.
"""

import base64
import shutil
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import hypergeom
from torch import Tensor
from tqdm import tqdm

from mico_chat.errors import ConfigError, DataError, MediaError
from mico_chat.evaluation.pretrained import PretrainedModel
from mico_chat.evaluation.store import Record, Store
from mico_chat.evaluation.task import Contents, Task, chunks

MATCH_TOKENS = 1 << 16
"""A step of the matching head has at most these context tokens, counted again for each text."""
RERANKED = 50
"""The matching head ranks so many candidates of each query again (appendix B)."""
QUERIES_AT_ONCE = 1024
KS = (1, 5, 10)
ABOVE = 3.0
"""This score is above any cosine."""
CONTEXTS = "contexts"


def rank(task: Task, contents: Contents, model: PretrainedModel, store: Store) -> None:
    """Store the vectors and matches that are not in the store yet."""
    contexts = store.path.with_name(CONTEXTS)
    contexts.mkdir(exist_ok=True)
    files = {item.id: contexts / f"{n:07d}.npy" for n, item in enumerate(contents.items)}
    retrieval = _Retrieval(task, contents, model, store, files)
    retrieval.encode_media()
    if media := _sorted(store.records, "medium", "number"):
        retrieval.encode_texts({record["id"] for record in media})
        retrieval.match(media)
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
        found = self.model.encoded(self.task, batches)
        for batch in tqdm(batches, desc=f"{self.task.name}: media", unit="batch"):
            with self.batch() as records:
                for item, encoded in zip(batch, next(found), strict=True):
                    if isinstance(encoded, MediaError):
                        lost = {"kind": "broken", "id": item.id, "reason": str(encoded)}
                        records.append(lost)
                        continue
                    if left:
                        _check_room(files[item.id].parent, encoded.context.numel() * 2 * left)
                        left = 0  # the disk is checked once
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

    def match(self, media: Sequence[Record]) -> None:
        """Store the matching logits of each medium with its near texts."""
        texts = _sorted(self.store.records, "text", "text")
        rows = self.model.space.truncated([r["words"] for r in texts], self.task.text_length)
        near = _nearest(_vectors(texts), _vectors(media))
        done = self.ids("matches")
        shown = tqdm(media, desc=f"{self.task.name}: matches", unit="medium")
        for id, numbers in zip((record["id"] for record in shown), near, strict=True):
            if id in done:
                continue
            with self.batch() as records:
                context = torch.from_numpy(np.load(self.files[id])).float()
                logits: list[float] = []
                for part in chunks(len(numbers), max(1, MATCH_TOKENS // len(context))):
                    read = [rows[numbers[place]] for place in part]
                    logits += self.model.space.match_logits(read, context).tolist()
                records.append({"kind": "matches", "id": id, "texts": numbers, "logits": logits})


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


def _nearest(texts: Tensor, media: Tensor) -> list[list[int]]:
    """The near texts of each medium, for vectors of media (M, P) and texts (Q, P).

    A text is near if it is among a medium's best texts, or if the medium is among its best media.
    """
    found: list[set[int]] = [set() for _ in media]
    for start, _, top in _contrasted(texts, media):
        for text, row in enumerate(top.tolist(), start):
            for medium in row:
                found[medium].add(text)
    for start, _, top in _contrasted(media, texts):
        for medium, row in enumerate(top.tolist(), start):
            found[medium].update(row)
    return [sorted(numbers) for numbers in found]


def _packed(vector: Tensor) -> str:
    """Base64 of a vector's float32 bytes, little-endian."""
    return base64.b64encode(vector.cpu().numpy().astype("<f4").tobytes()).decode()


def vector_of(record: Record) -> NDArray[np.float32]:
    """The vector (P,) of a ``medium`` or ``text`` record."""
    return np.frombuffer(base64.b64decode(record["vector"]), "<f4").astype(np.float32)


def _sorted(records: Sequence[Record], kind: str, key: str) -> list[Record]:
    """The records of a kind, in the order of the numbers at a key."""
    return sorted((r for r in records if r["kind"] == kind), key=lambda r: int(r[key]))


def _vectors(records: Sequence[Record]) -> Tensor:
    return torch.from_numpy(np.stack([vector_of(record) for record in records]))


# --- recall ---------------------------------------------------------------------------------------


def swapped(n: int) -> list[int]:
    """Another place for each of ``n``, the same at every call; a single one keeps its own."""
    order = np.random.default_rng(0).permutation(n)
    return cast(list[int], np.roll(order, 1)[np.argsort(order)].tolist())


def recalls(records: Sequence[Record], swap: bool = False) -> dict[str, NDArray[np.float64]]:
    """The hits of R@k, from text to medium and back, with and without the matching head.

    Each is (3, M): the hits of each medium's queries, the number of these queries, and the hits
    that a random order would have. A text is a query of its first medium. With ``swap``, each text
    seeks the medium of another one.
    """
    media, texts = _sorted(records, "medium", "number"), _sorted(records, "text", "text")
    number = {record["id"]: place for place, record in enumerate(media)}
    right = dict(zip(number, swapped(len(media)), strict=True)) if swap else number
    m, t = _vectors(media), _vectors(texts)
    media_of_text = [{right[id] for id in record["media"]} for record in texts]
    texts_of_medium: list[set[int]] = [set() for _ in media]
    for text, own in enumerate(media_of_text):
        for medium in own:
            texts_of_medium[medium].add(text)
    by_medium: dict[int, dict[int, float]] = {
        number[r["id"]]: dict(zip(r["texts"], r["logits"], strict=True))
        for r in records
        if r["kind"] == "matches"
    }
    by_text: dict[int, dict[int, float]] = defaultdict(dict)
    for medium, logits in by_medium.items():
        for text, logit in logits.items():
            by_text[text][medium] = logit
    hits: dict[str, list[bool]] = defaultdict(list)
    found: dict[str, NDArray[np.float64]] = {}
    for direction, queries, candidates, relevant, of_query in (
        ("", t, m, media_of_text, by_text),
        (" to text", m, t, texts_of_medium, by_medium),
    ):
        for start, rows, top in _contrasted(queries, candidates):
            for scores in (" contrastive", ""):
                if not scores:
                    rerank(rows, top, [of_query.get(start + row, {}) for row in range(len(rows))])
                before = _before(rows, relevant[start : start + len(rows)])
                for k in KS:
                    hits[f"R@{k}{direction}{scores}"] += [n < k for n in before]
        owner = range(len(media)) if direction else list(map(min, media_of_text))
        for k in KS:
            n = len(candidates)
            chance = hypergeom.sf(0, n, list(map(len, relevant)), min(k, n))
            for name in (f"R@{k}{direction}{scores}" for scores in (" contrastive", "")):
                each = (hits[name], np.ones(len(queries)), chance)
                found[name] = np.stack([np.bincount(owner, one, len(media)) for one in each])
    return found


def recall_at_k(
    scores: Tensor, relevant: Sequence[Collection[int]], ks: Sequence[int] = KS
) -> dict[int, float]:
    """Recall at each k of scores (Q, D); ``relevant`` has the relevant columns of each query."""
    before = _before(scores, relevant)
    return {k: sum(n < k for n in before) / len(before) for k in ks}


def _before(scores: Tensor, relevant: Sequence[Collection[int]]) -> list[int]:
    """The irrelevant candidates before the best relevant candidate of each query."""
    if bool(torch.isnan(scores).any()):
        row = int(torch.isnan(scores).any(dim=1).nonzero()[0])
        raise DataError("recall", None, f"a score of query {row} is not a number")
    before = []
    for query, (row, right) in enumerate(zip(scores, relevant, strict=True)):
        columns = sorted(right)
        if not columns or columns[0] < 0 or columns[-1] >= len(row):
            why = f"query {query}: relevant candidates {columns[:3]} of {len(row)} candidates"
            raise DataError("recall", None, why)
        of_right = row[columns]
        best = of_right.max()
        before.append(int((row >= best).sum()) - int((of_right >= best).sum()))
    return before


def _contrasted(queries: Tensor, candidates: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Cosines of queries (Q, P) and candidates (D, P), in parts that fit into memory.

    Yields the number of a part's first query, the cosines (q, D), and the columns of each query's
    best candidates (q, at most 50).
    """
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        part = queries[start : start + QUERIES_AT_ONCE].double()
        cosines = part @ candidates.double().T
        yield start, cosines, cosines.topk(min(RERANKED, len(candidates)), 1).indices


def rerank(rows: Tensor, top: Tensor, logits: Sequence[Mapping[int, float]]) -> None:
    """Order the top candidates (q, k) of scores (q, D) by their logits, above all others.

    The scores are changed in place.
    """
    for row, best in enumerate(top.tolist()):
        known = [candidate for candidate in best if candidate in logits[row]]
        if known:
            values = torch.tensor([logits[row][c] for c in known], dtype=rows.dtype)
            rows[row, known] = ABOVE + values - values.min()

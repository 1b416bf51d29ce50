"""The filters of the page that shows clips, as conditions on the rows of a build's tables."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mico_corpus.packing.tables import elements, texts

KEPT, LEFT_OUT = "kept", "left out"


@dataclass(frozen=True)
class ClipFilter:
    """Filters. ``reason``: :data:`KEPT`, :data:`LEFT_OUT`, or one reason. One and the same
    statement about a clip must come from the ``annotator``, score from ``least`` to ``most``, and
    have all ``words``. ``medium``: a kind that is described."""

    reason: str = KEPT
    source: str = ""
    annotator: str = ""
    least: float | None = None
    most: float | None = None
    words: str = ""
    medium: str = ""


def passing_rows(asked: ClipFilter, batch: pa.RecordBatch) -> pa.Array:
    reason = texts(batch, "reason")
    if asked.reason in (KEPT, LEFT_OUT):
        passing = pc.equal(pc.equal(reason, ""), asked.reason == KEPT)
    else:
        passing = pc.equal(reason, asked.reason)
    if asked.source:
        passing = pc.and_(passing, pc.equal(texts(batch, "source"), asked.source))
    scored = asked.least is not None or asked.most is not None
    words = asked.words.split()
    if asked.annotator or scored or words:
        said = np.zeros(len(batch), bool)
        if "annotations" in batch.schema.names:
            rows, fields = elements(batch, "annotations")
            fits = _having(fields["text"], words)
            if asked.annotator:
                fits = pc.and_(fits, pc.equal(fields["annotator"], asked.annotator))
            if asked.least is not None:
                fits = pc.and_(fits, pc.greater_equal(fields["score"], asked.least))
            if asked.most is not None:
                fits = pc.and_(fits, pc.less_equal(fields["score"], asked.most))
            said[rows[pc.fill_null(fits, False).to_numpy(zero_copy_only=False)]] = True
        if words and not asked.annotator and not scored:
            said |= _having(texts(batch, "text"), words).to_numpy(zero_copy_only=False)
        passing = pc.and_(passing, pa.array(said))
    return passing


def _having(column: pa.Array, words: Sequence[str]) -> pa.Array:
    column = pc.fill_null(column, "")
    having = pa.array(np.ones(len(column), bool))
    for word in words:
        having = pc.and_(having, pc.match_substring(column, word, ignore_case=True))
    return having

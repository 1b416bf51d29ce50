"""CIDEr, SPICE and SPIDEr of captions against several references an item.

* CIDEr (Vedantam et al. 2015): n-grams (n = 1 .. 4) that a caption shares with its references,
  weighted by how few of the *other items'* references hold them. What every paper reports under
  this name is CIDEr-D, which clips counts and punishes other lengths; so does this, by
  ``pycocoevalcap``'s scorer. It lies in 0 .. 10. It belongs to the set of items: scored on a part
  of a test split it is another figure, and on a single item it is 0.
* SPICE (Anderson et al. 2016): F1 of the objects, attributes and relations that both name.
* SPIDEr (Liu et al. 2017): the mean of CIDEr and SPICE, the figure of audio captioning.

All three see the captions as the COCO evaluation tokenizes them (``ptb``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mico_chat.errors import DataError, MissingExtraError
from mico_chat.evaluation.metrics.ptb import tokenize
from mico_chat.evaluation.metrics.score import Score
from mico_chat.evaluation.metrics.spice import spice_of_tokens

Tokens = tuple[dict[str, str], dict[str, list[str]]]
"""Candidates and references by item, tokenized."""


def cider(candidates: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> Score:
    """CIDEr-D of one caption an item.

    Args:
        candidates: item -> the caption to score; an empty one scores 0.
        references: the same items -> one or more captions by people.

    Raises:
        DataError: the two do not name the same items, or an item has no reference.
        MissingExtraError: the extra ``eval`` is not installed.
    """
    return _cider(_tokens(candidates, references, "CIDEr"))


def spice(candidates: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> Score:
    """SPICE of one caption an item; takes minutes for thousands, as it parses all of them.

    Raises:
        ConfigError: Stanford CoreNLP 3.6.0 is not there; says the command that fetches it.
        DataError, MissingExtraError: as ``cider``.
    """
    return _spice(_tokens(candidates, references, "SPICE"))


def spider(candidates: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> Score:
    """SPIDEr of one caption an item. Raises as ``spice``."""
    tokens = _tokens(candidates, references, "SPIDEr")
    semantic, consensus = _spice(tokens), _cider(tokens)
    return Score.over(
        {item: (value + semantic.each[item]) / 2 for item, value in consensus.each.items()},
        "SPIDEr",
    )


def _tokens(
    candidates: Mapping[str, str], references: Mapping[str, Sequence[str]], metric: str
) -> Tokens:
    if not candidates:
        raise DataError(metric, None, "there are no captions to score")
    if candidates.keys() != references.keys():
        alone = sorted(candidates.keys() ^ references.keys())
        raise DataError(
            metric,
            None,
            f"{len(candidates)} items have a caption and {len(references)} have references; "
            f"{len(alone)} have only one of the two, such as {alone[0]!r}",
        )
    if without := [item for item, captions in references.items() if not captions]:
        raise DataError(
            metric, None, f"{len(without)} items lack references, such as {without[0]!r}"
        )
    if strings := [item for item, captions in references.items() if isinstance(captions, str)]:
        raise DataError(
            metric, None, f"the references of {strings[0]!r} are one text, not a list of texts"
        )
    owners = [item for item in candidates for _ in references[item]]
    found = tokenize(
        [*candidates.values(), *(text for item in candidates for text in references[item])], metric
    )
    answers = dict(zip(candidates, found[: len(candidates)], strict=True))
    truths: dict[str, list[str]] = {item: [] for item in candidates}
    for item, text in zip(owners, found[len(candidates) :], strict=True):
        truths[item].append(text)
    return answers, truths


def _cider(tokens: Tokens) -> Score:
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError as error:
        raise MissingExtraError("CIDEr", "eval") from error
    candidates, references = tokens
    _, each = Cider().compute_score(references, {item: [c] for item, c in candidates.items()})
    return Score.over(dict(zip(candidates, map(float, each), strict=True)), "CIDEr")


def _spice(tokens: Tokens) -> Score:
    return Score.over(spice_of_tokens(*tokens), "SPICE")

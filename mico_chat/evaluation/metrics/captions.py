"""CIDEr, SPICE and SPIDEr of captions against several references an item.

* CIDEr (Vedantam et al. 2015): n-grams (n = 1 .. 4) that a caption shares with its references,
  weighted by how few of the *other items'* references hold them. Every paper that says CIDEr
  reports CIDEr-D, which clips counts and punishes other lengths; so does this, by
  ``pycocoevalcap``'s scorer. It lies in 0 .. 10. It belongs to the set of items: scored on a part
  of a test split it is another figure, and on a single item it is 0.
* SPICE (Anderson et al. 2016): F1 of the objects, attributes and relations that both name.
* SPIDEr (Liu et al. 2017): the mean of CIDEr and SPICE, the figure of audio captioning.

All three take captions as the COCO evaluation tokenizes them. CIDEr counts words, so its value
depends on what a word is: "can't" is two, "black-and-white" is one, "..." is none. The evaluation's
tokenizer is that of Stanford CoreNLP 3.4.1, a Java program of dozens of rules under the GPL; the
program itself is run here instead of a likeness of it. One run takes any number of captions (half a
second to start, then more than 10,000 captions a second).
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence

from mico_chat.errors import MicoError, MissingExtraError
from mico_chat.evaluation.metrics import Score
from mico_chat.evaluation.metrics.spice import jars, java, spice_of_tokens

Tokens = tuple[dict[str, str], dict[str, list[str]]]


def cider(candidates: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> Score:
    """CIDEr-D of one caption for each item; an empty caption scores 0."""
    return _cider(_tokens(candidates, references, "CIDEr"))


def spice(candidates: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> Score:
    """SPICE of one caption for each item. Thousands of captions take minutes."""
    return Score.over(spice_of_tokens(*_tokens(candidates, references, "SPICE")), "SPICE")


def spider(candidates: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> Score:
    tokens = _tokens(candidates, references, "SPIDEr")
    semantic, consensus = spice_of_tokens(*tokens), _cider(tokens)
    return Score.over(
        {item: (value + semantic[item]) / 2 for item, value in consensus.each.items()}, "SPIDEr"
    )


def _tokens(
    candidates: Mapping[str, str], references: Mapping[str, Sequence[str]], metric: str
) -> Tokens:
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


# --- the tokenizer of the COCO evaluation ---------------------------------------------------------

JAR = "stanford-corenlp-3.4.1.jar"
PUNCTUATION = frozenset(
    ("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", *".?!,:-;", "--", "...")
)
"""The tokens that the COCO caption evaluation leaves out, as it spells them.

The tokenizer lower-cases its brackets ("-lrb-"), so these four names never match and brackets stay
words. Every published figure was computed so.
"""


def tokenize(captions: Sequence[str], metric: str) -> list[str]:
    """Each caption's tokens, lower-case and without punctuation, joined by spaces.

    A line break inside a caption is a space. ``metric`` is the caller's name for errors.
    """
    lines = [" ".join(caption.splitlines()) for caption in captions]
    command = [
        str(java(metric)),
        "-cp",
        str(jars(metric, "tokenizer") / JAR),
        "edu.stanford.nlp.process.PTBTokenizer",
        "-preserveLines",
        "-lowerCase",
        "-encoding",
        "utf-8",
    ]
    text = "".join(f"{line}\n" for line in lines)
    # A lone surrogate, which a model can make of broken bytes, has no UTF-8: it becomes "?".
    done = subprocess.run(command, input=text.encode("utf-8", "replace"), capture_output=True)
    found = done.stdout.decode("utf-8").split("\n")[:-1] if not done.returncode else []
    if len(found) != len(lines):
        said = done.stderr.decode("utf-8", "replace").strip().rsplit("\n", 1)[-1]
        raise MicoError(
            f"{metric}: the Java tokenizer gave {len(found)} lines for {len(lines)} captions "
            f"and ended with {done.returncode}: {said}"
        )
    return [_without_punctuation(line) for line in found]


def _without_punctuation(line: str) -> str:
    return " ".join(token for token in line.rstrip().split(" ") if token not in PUNCTUATION)

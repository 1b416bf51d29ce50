"""CIDEr, SPICE and SPIDEr of captions against several references for each item.

* CIDEr (Vedantam et al. 2015): n-grams (n = 1 .. 4) that a caption shares with its references,
  weighted by how few of the *other items'* references hold them. It is CIDEr-D, which clips counts
  and punishes other lengths, by ``pycocoevalcap``'s scorer, and lies in 0 .. 10. It belongs to the
  set of items: scored on a part of a test split it is another figure, and on one item it is 0.
* SPICE (Anderson et al. 2016): F1 of the objects, attributes and relations that both name.
* SPIDEr (Liu et al. 2017): the mean of CIDEr and SPICE, the figure of audio captioning.

All three take captions as the COCO evaluation tokenizes them. CIDEr counts words, so its value
depends on what a word is: "can't" is two, "black-and-white" is one, "..." is none. The evaluation's
tokenizer is that of Stanford CoreNLP 3.4.1, a Java program of dozens of rules under the GPL; the
program itself is run here (half a second to start, then more than 10,000 captions a second).
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence

from mico_chat.errors import MicoError, MissingExtraError
from mico_chat.evaluation.metrics import Score
from mico_chat.evaluation.metrics.spice import jars, java, spice_of_tokens

Captions = Mapping[str, str]
References = Mapping[str, Sequence[str]]


def cider(candidates: Captions, references: References) -> Score:
    """CIDEr-D of one caption for each item; an empty caption scores 0."""
    return _cider(*_tokens(candidates, references, "CIDEr"))


def spice(candidates: Captions, references: References) -> Score:
    """SPICE of one caption for each item. Thousands of captions take minutes."""
    return Score.over(spice_of_tokens(*_tokens(candidates, references, "SPICE")), "SPICE")


def spider(candidates: Captions, references: References) -> Score:
    tokens = _tokens(candidates, references, "SPIDEr")
    semantic, consensus = spice_of_tokens(*tokens), _cider(*tokens).each
    return Score.over({id: (consensus[id] + semantic[id]) / 2 for id in consensus}, "SPIDEr")


def _tokens(
    candidates: Captions, references: References, metric: str
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Candidates and references by item, tokenized in one run."""
    texts = [*candidates.values(), *(text for item in candidates for text in references[item])]
    found = iter(tokenize(texts, metric))
    said = {item: next(found) for item in candidates}
    return said, {item: [next(found) for _ in references[item]] for item in candidates}


def _cider(candidates: Captions, references: References) -> Score:
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError as error:
        raise MissingExtraError("CIDEr", "eval") from error
    _, each = Cider().compute_score(references, {item: [c] for item, c in candidates.items()})
    return Score.over(dict(zip(candidates, map(float, each), strict=True)), "CIDEr")


# --- the tokenizer of the COCO evaluation ---------------------------------------------------------

JAR = "stanford-corenlp-3.4.1.jar"
OPTIONS = ("-preserveLines", "-lowerCase", "-encoding", "utf-8")
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
    text = "".join(" ".join(caption.splitlines()) + "\n" for caption in captions)
    classpath = str(jars(metric, "tokenizer") / JAR)
    command = [str(java(metric)), "-cp", classpath, "edu.stanford.nlp.process.PTBTokenizer"]
    # A lone surrogate, which a model can make of broken bytes, has no UTF-8: it becomes "?".
    data = text.encode("utf-8", "replace")
    done = subprocess.run([*command, *OPTIONS], input=data, capture_output=True)
    found = done.stdout.decode("utf-8").split("\n")[:-1] if not done.returncode else []
    if len(found) != len(captions):
        said = done.stderr.decode("utf-8", "replace").strip().rsplit("\n", 1)[-1]
        raise MicoError(
            f"{metric}: the Java tokenizer gave {len(found)} lines for {len(captions)} captions "
            f"and ended with {done.returncode}: {said}"
        )
    return [
        " ".join(token for token in line.rstrip().split(" ") if token not in PUNCTUATION)
        for line in found
    ]

"""Penn Treebank tokens of captions, as the COCO caption evaluation takes them.

CIDEr counts words, so its value depends on what a word is: "can't" is two, "black-and-white" is
one, "..." is none. The evaluation's answer is Stanford CoreNLP 3.4.1's tokenizer, a Java program of
dozens of rules under the GPL; the very program is run here instead of a likeness of it. One run
takes any number of captions (half a second to start, then more than 10,000 captions a second).
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from mico_chat.errors import MicoError
from mico_chat.evaluation.metrics.java import jars, java

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

    A line break of any kind inside a caption is a space. ``metric`` names what asks, for errors.

    Raises:
        MissingExtraError: the extra ``eval`` is not installed.
        MicoError: the Java program failed.
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
    return [_words(line) for line in found]


def _words(line: str) -> str:
    return " ".join(token for token in line.rstrip().split(" ") if token not in PUNCTUATION)

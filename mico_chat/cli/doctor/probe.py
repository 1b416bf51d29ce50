"""The doctor's other process: tries what may crash, hang or take long to import.

Started as a fresh interpreter with the names of probes, it runs one after another and writes a line
of JSON at the start and at the end of each. When it dies, the parent knows in which.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, TextIO

PROBES: Mapping[str, str] = {
    "torch": "mico_chat.cli.doctor.engines:probe_torch",
    "transformers": "mico_chat.cli.doctor.engines:probe_transformers",
    "bitsandbytes": "mico_chat.cli.doctor.engines:probe_bitsandbytes",
    "llamacpp": "mico_chat.cli.doctor.engines:probe_llamacpp",
    "vllm": "mico_chat.cli.doctor.engines:probe_vllm",
    "codecs": "mico_chat.cli.doctor.media:probe_codecs",
    "decoder": "mico_chat.cli.doctor.media:probe_decoder",
    "model": "mico_chat.cli.doctor.model:probe_model",
}
"""Each takes what the parent asks for, and gives facts that JSON holds."""


def main(names: list[str], asked: dict[str, Any]) -> None:
    """Run probes and report each on the real standard output."""
    answers = _private_stdout()
    for name in names:
        _say(answers, {"begin": name})
        try:
            module, function = PROBES[name].split(":")
            probe: Callable[[dict[str, Any]], dict[str, Any]]
            probe = getattr(import_module(module), function)
            _say(answers, {"end": name, "facts": probe(asked)})
        except Exception as error:  # a library may raise anything: that is what is looked for
            lines = str(error).strip().splitlines() or [""]
            said = f"{type(error).__name__}: {lines[0]}".removesuffix(": ")
            _say(answers, {"end": name, "error": said})


def _private_stdout() -> TextIO:
    """The parent's pipe, moved where no library can print into it."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def _say(answers: TextIO, line: dict[str, Any]) -> None:
    print(json.dumps(line), file=answers, flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[2]), json.loads(sys.argv[3]))

"""The doctor's probes: checks that may crash or hang run in a process of their own.

A library that was compiled for another processor ends its process, and vLLM takes seconds to
import.
"""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from mico_chat import system
from mico_chat.engines.base import EngineOptions
from mico_chat.engines.table import ENGINES
from mico_chat.errors import ModelError
from mico_chat.late import late
from mico_chat.media import MediaDecoder, MediaFile, MediaLimits
from mico_chat.reading import pictures, speech, why_not_listening
from mico_chat.settings import Settings

with late():
    from mico_chat.cli import model_check

PROBE_S = 180.0
"""Seconds that a probe may take. vLLM is slow to import from a cold disk on a busy machine."""

_QUIET = {
    **{"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},  # probes fetch nothing
    **{"TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"},
}
_COMMAND = ("-m", "mico_chat.cli.probes")


def run_probe(
    name: str,
    model: str = "",
    options: Mapping[str, Any] | None = None,
    *,
    seconds: float = PROBE_S,
) -> dict[str, Any]:
    """The facts that a probe found, or why the probe failed as ``error``.

    The probe's process ends after ``seconds`` with all that it started.
    """
    path = os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)
    command = [sys.executable, *_COMMAND, json.dumps([name, model, options or {}])]
    pipes: dict[str, Any] = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    pipes |= {"stdin": subprocess.DEVNULL, "encoding": "utf-8", "errors": "replace"}
    environment = os.environ | _QUIET | {"PYTHONPATH": path}
    with subprocess.Popen(command, env=environment, **system.APART, **pipes) as process:
        try:
            answer, complaints = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            return {"error": f"no answer within {seconds:.0f} s"}
        finally:
            if process.poll() is None:  # out of time, or the user interrupts
                system.kill(process)
    if process.returncode < 0:
        return {"error": f"killed by {signal.Signals(-process.returncode).name}"}
    if process.returncode:
        last = complaints.strip().splitlines()[-1:] or [f"ended with status {process.returncode}"]
        return {"error": last[0]}
    found: dict[str, Any] = json.loads(answer)
    return found


def main(name: str, model: str, options: dict[str, Any]) -> None:
    """Run a probe and write its facts to the parent's pipe, where no library can print into it."""
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        if name in PROBES:
            facts = PROBES[name](model, options) if name == "model" else PROBES[name]()
        elif name in ENGINES:
            facts = {"text": ENGINES[name].probe()}
        else:
            facts = {"text": f"{import_module(name).__version__} can be imported"}
    except Exception as error:  # a library may raise anything: the parent reports it
        first = str(error).strip().partition("\n")[0]
        sys.exit(f"{type(error).__name__}: {first}".removesuffix(": "))
    json.dump(facts, answer)
    answer.close()


def _torch() -> dict[str, Any]:
    """The devices that torch was built for and finds; each card computes once."""
    import torch

    gpus: list[dict[str, Any]] = []
    for number in range(torch.cuda.device_count()):
        gpus.append({"name": torch.cuda.get_device_name(number), "error": None})
        try:
            gpus[-1]["free"], gpus[-1]["total"] = torch.cuda.mem_get_info(number)
            torch.ones(8, device=f"cuda:{number}").sum().item()
        except RuntimeError as error:
            gpus[-1]["error"] = str(error).splitlines()[0]
    return {
        "text": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "build": f"CUDA {torch.version.cuda}" if torch.version.cuda else None,
        "mps": torch.backends.mps.is_available(),
        "gpus": gpus,
    }


def _decoder() -> dict[str, Any]:
    from PIL import Image

    picture = io.BytesIO()
    Image.new("RGB", (32, 32)).save(picture, "png")
    with MediaDecoder(MediaLimits()) as decoder:
        decoder.decode(MediaFile("image", picture.getvalue(), "made.png"))
        exposed = decoder.exposed()
    isolation = "and is isolated" if exposed is None else f"but is NOT isolated: {exposed}"
    return {"text": f"its process decodes a picture {isolation}", "exposed": exposed}


def _reading() -> dict[str, Any]:
    import numpy as np
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (320, 96), "white")
    ImageDraw.Draw(picture).text((16, 24), "OPEN DAILY", "black", font_size=40)
    (line,) = pictures.PictureReader().read(np.asarray(picture))
    return {"text": f"text in pictures is read: {line.text}{_off()}"}


def _listening() -> dict[str, Any]:
    if not speech.folder().is_dir():
        raise ModelError(why_not_listening())
    languages = speech.Listener().languages
    return {"text": f"speech is written down, in {len(languages)} languages{_off()}"}


def _off() -> str:
    return "; but MICO_READS turns it off" if Settings().reads is False else ""


def _model(model: str, options: dict[str, Any]) -> dict[str, Any]:
    findings = model_check.model_findings(model, EngineOptions(**options))
    return {"findings": [asdict(finding) for finding in findings]}


PROBES: dict[str, Callable[..., dict[str, Any]]] = {
    **{"torch": _torch, "decoder": _decoder, "reading": _reading, "listening": _listening},
    "model": _model,
}
"""Each probe returns its facts; ``text`` is for people. For another name, the package of that name
is imported."""

if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))

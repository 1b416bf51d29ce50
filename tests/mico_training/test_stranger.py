"""The way of ``docs/training.md``, word for word, on sixty media of one's own.

Each training run is killed at a random moment, and goes on with the same command.
"""

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.mico_training.scenes import COLOURS, tone
from tests.support.made import write_clip
from tests.support.vicuna import vicuna_folder
from tests.support.waiting import PATIENCE_S, until

PAGE = Path(__file__).parents[2] / "docs/training.md"
WAYS = {
    "mini": "### The mini learns them",
    "assembled": "### An encoder and a language model of your own",
}
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | {
    "MICO_SERVER_PORT": "0"
}
SHOWN = (*("red", "green", "blue"), *("bell", "horn"), "light")


def blocks(title: str) -> list[list[list[str]]]:
    """The words of each command, block by block, below a title of the page."""
    section = PAGE.read_text(encoding="utf-8").partition(f"{title}\n")[2]
    section = re.split(r"^##+ ", section, flags=re.MULTILINE)[0]
    found = re.findall(r"^```bash\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return [[shlex.split(line, comments=True) for line in block.splitlines()] for block in found]


def medium(folder: Path, name: str, number: int) -> tuple[str, str]:
    """Write a medium; the kind's key and a caption. Pictures are of colours, sounds of pitches."""
    what, size = SHOWN[number % len(SHOWN)], 40 + number
    if what in COLOURS:
        file, said = folder / f"{name}.jpg", f"A {what} picture."
        Image.new("RGB", (size, 48), COLOURS[what]).save(file)
    elif what == "light":
        file, said = folder / f"{name}.mp4", "It grows lighter."
        write_clip(str(file), "mpeg4", n=12)
    else:
        file, said = folder / f"{name}.wav", f"A {what} sounds."
        file.write_bytes(tone({"bell": 900, "horn": 150}[what] + number))
    kind = {".jpg": "image", ".wav": "audio", ".mp4": "video"}[file.suffix]
    return json.dumps({kind: f"{folder.name}/{file.name}"})[1:-1], said


def write_media(place: Path) -> None:
    """Sixty media as the page lays them out: 48 to learn from and 12 held out."""
    lines: dict[str, list[str]] = {"mine": [], "held-out": []}
    for number in range(60):
        folder = place / ("mine" if number < 48 else "held-out")
        folder.mkdir(exist_ok=True)
        name = "dog" if not number else f"medium{number}"
        path, said = medium(folder, name, number)
        if folder.name == "mine":
            (folder / f"{name}.txt").write_text(said)
        asked = {"question": "What is it?", "answer": said}
        about = json.dumps(asked if folder.name == "mine" else asked | {"caption": said})[1:-1]
        lines[folder.name].append(f"{{{path}, {about}}}\n")
    (place / "talk.jsonl").write_text("".join(lines["mine"]))
    (place / "test.jsonl").write_text("".join(lines["held-out"]))


def started(place: Path, words: list[str], **how: Any) -> subprocess.Popen[str]:
    assert words[0] == "mico-chat"
    command = [sys.executable, "-m", "mico_chat.cli", *words[1:]]
    return subprocess.Popen(command, cwd=place, env=ENVIRONMENT, text=True, **how)


def ran(place: Path, words: list[str]) -> str:
    with started(place, words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        said = process.communicate()[0]
    assert process.returncode == 0, f"{shlex.join(words)}\n{said[-5000:]}"
    return said


def trained(place: Path, words: list[str], moment: random.Random) -> None:
    """Run a stage, kill it behind a random line of its log, and run it again to its end."""
    stage = words[1].removeprefix("train-")
    log = place / "runs" / stage / "log.jsonl"
    with (place / f"{stage}.err").open("w+") as errors:
        killed = started(place, words, stdout=errors, stderr=errors, start_new_session=True)
        lines = moment.randint(1, 8)
        until(
            lambda: log.is_file() and len(log.read_text().splitlines()) >= lines,
            lambda: killed.poll() is None,
        )
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait(PATIENCE_S)
    checkpoints = [*log.parent.glob("checkpoint-*/trainer_state.json")]
    said = ran(place, words)
    assert ("resuming from checkpoint-" in said) == bool(checkpoints)
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    expected = list(range(steps[0], steps[-1] + 1, steps[0]))
    assert steps == expected, "no step is lost or logged twice"
    assert (log.parent / "loss.png").is_file()


def served(place: Path, words: list[str]) -> None:
    with started(place, words, stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            (address,) = re.findall(r"http://\S+", server.stdout.readline())
            picture = {"image": ("dog.jpg", (place / "mine/dog.jpg").read_bytes())}
            data = {"message": "What is it?", "max_tokens": "8"}
            answer = httpx.post(f"{address}/v1/chat", data=data, files=picture, timeout=PATIENCE_S)
            assert answer.status_code == 200, answer.text
        finally:
            server.terminate()
            server.wait(PATIENCE_S)


@pytest.mark.soak
@pytest.mark.parametrize("way", WAYS)
def test_a_stranger_follows_the_page(way: str, tmp_path: Path) -> None:
    write_media(tmp_path)
    vicuna_folder(tmp_path / "my-llm")
    moment = random.Random(way)
    asking = blocks(WAYS["mini"])[1]
    for words in [*blocks(WAYS[way])[0], *asking]:
        if words[1].startswith("train-stage") and "--dry-run" not in words:
            trained(tmp_path, words, moment)
        elif words[1] == "serve":
            served(tmp_path, words)
        else:
            said = ran(tmp_path, words)
            assert words[1] != "evaluate" or "swapped" in said, "each figure has its control"
    assert (tmp_path / "my-model.gguf").read_bytes()[:4] == b"GGUF"
    assert "A red picture." in (tmp_path / "look.html").read_text()

"""From cold: what a command imports, what it shows while it works, and what it says at once."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mico_chat.cli.ask import Asking, Waiting
from mico_chat.engine.base import GenerationOptions
from mico_chat.errors import MediaError
from mico_chat.media.kinds import Kind
from tests.support.fakes import FakeAssistant, FakeDecoder
from tests.support.tiny import beside, llm_folder

HEAVY = ("torch._dynamo", "transformers.modeling_utils", "accelerate", "sympy", "scipy", "sklearn")
"""What takes longer to import than the mini takes to load."""


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        check=False,
    )


def test_an_encoder_alone_needs_none_of_transformers_models(tmp_path: Path) -> None:
    folder = beside(tmp_path / "model", llm_folder(tmp_path / "llm"))
    done = run(
        "-c",
        "import sys\n"
        "import mico_chat.engine.batching, mico_chat.engine.llamacpp_export, mico_chat.encode\n"
        "from mico_chat.checkpoints.load import load_encoder\n"
        f"load_encoder({str(folder)!r})\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])",
    )
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_the_compiler_can_still_be_imported() -> None:
    done = run(
        "-c",
        "import mico_chat.model.encoder, sys, torch._dynamo\n"
        "roi_align = sys.modules['torchvision.ops.roi_align']\n"
        "print(callable(torch._dynamo.optimize), roi_align.is_compile_supported('cpu'))",
    )
    assert (done.stdout, done.returncode) == ("True True\n", 0), done.stderr


def test_the_list_of_tasks_needs_no_torch() -> None:
    done = run(
        "-c",
        "import sys\nfrom mico_chat.cli.evaluate import main\nmain(['--list'])\n"
        "print('torch' in sys.modules, 'scipy' in sys.modules)",
    )
    assert done.stdout.endswith("False False\n"), done.stderr


def test_a_model_of_the_hub_without_a_network_is_one_line() -> None:
    # A proxy at a port where nothing listens is no network.
    done = run(
        *("-m", "mico_chat.cli", "ask", "--model", "nosuch/model", "--engine", "auto", "Hi"),
        HF_ENDPOINT="http://127.0.0.1:9",
        TRANSFORMERS_OFFLINE="0",
        HF_HUB_OFFLINE="0",
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: nosuch/model: there is no such folder, and the hub (Hugging Face) cannot be "
        "reached: is there a network?\n"
    )


class Screen(io.StringIO):
    """A terminal that is only written to."""

    def isatty(self) -> bool:
        return True


def shown(screen: Screen) -> list[str]:
    """The steps that were on the line, one after the other."""
    said = re.findall("[\u2800-\u28ff] ([^\n\r\x1b]+)", screen.getvalue())
    return [step for at, step in enumerate(said) if at == 0 or step != said[at - 1]]


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")


def asked(media: list[tuple[Kind, Path]], waiting: Waiting, out: io.StringIO) -> None:
    asking = Asking(FakeDecoder(), FakeAssistant, GenerationOptions(), False, out)
    asking.one("What?", media, waiting)


def test_a_terminal_shows_what_is_done(tmp_path: Path) -> None:
    file = tmp_path / "cat.jpg"
    file.write_bytes(b"bytes")
    screen, out = Screen(), io.StringIO()
    asked([("image", file)], Waiting(screen), out)
    assert shown(screen) == ["looking at cat.jpg", "loading the model", "answering"]
    assert "\x1b[2K" in screen.getvalue().rpartition("answering")[2]  # the line is clear again
    assert out.getvalue() == "[image cat.jpg] What?\n"


def test_an_error_comes_on_a_clear_line(tmp_path: Path) -> None:
    (tmp_path / "broken.wav").write_bytes(b"broken")
    screen = Screen()
    with pytest.raises(MediaError):
        asked([("audio", tmp_path / "broken.wav")], Waiting(screen), io.StringIO())
    assert shown(screen) == ["listening to broken.wav"]
    assert screen.getvalue().endswith("\x1b[2K")


def test_a_pipe_gets_nothing_of_it() -> None:
    pipe = io.StringIO()
    with Waiting(pipe) as waiting:
        waiting.say("loading the model")
    assert pipe.getvalue() == ""


def test_a_file_name_cannot_command_the_terminal() -> None:
    screen = Screen()
    with Waiting(screen) as waiting:
        waiting.say("looking at \x1b[31mred\n.png")
    assert shown(screen)[0] == "looking at ?[31mred?.png"

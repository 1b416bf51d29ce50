"""From cold: what a command imports, what it shows while it works, and what it says at once."""

import importlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from mico_chat.cli.ask import Asking, Waiting
from mico_chat.engine.base import GenerationOptions
from mico_chat.errors import MediaError
from mico_chat.late import unrun
from mico_chat.media import Image, MediaFile, Medium
from mico_chat.media.kinds import Kind
from mico_chat.model.mini.stem import timm_model
from tests.support.fakes import FakeAssistant, FakeDecoder
from tests.support.tiny import beside, llm_folder

HEAVY = (
    *("torch._dynamo", "transformers.modeling_utils", "accelerate", "sympy", "scipy", "sklearn"),
    *("torch.onnx", "torchvision.datasets", "timm.models.beit", "mico_chat.model.text_branch"),
)
"""What takes longer to import than the mini takes to load."""
DECODERS = ("av", "PIL.PngImagePlugin", "pypdfium2")
"""Media are decoded in a process of its own."""


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        check=False,
    )


def imported(code: str, names: Sequence[str]) -> str:
    """Those of the modules that a new process has imported after ``code``, as a list is printed."""
    done = run(
        "-c", f"import sys\n{code}\nprint([name for name in {names!r} if name in sys.modules])"
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


ENCODER = """
import mico_chat.engine.batching, mico_chat.engine.llamacpp_export, mico_chat.encode
from mico_chat.checkpoints import load
load.load_encoder({0!r})
from mico_chat.checkpoints.folders import MODELS
load.read_media_model(MODELS / "mini", load.torch.bfloat16)  # with all that a media path can have
"""


def test_an_encoder_alone_needs_none_of_transformers_models(tmp_path: Path) -> None:
    folder = beside(tmp_path / "model", llm_folder(tmp_path / "llm"))
    assert imported(ENCODER.format(str(folder)), HEAVY) == "[]\n"


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("import mico_chat.cli.main", (*HEAVY, *DECODERS, "torch", "transformers", "uvicorn")),
        ("import mico_server.app", HEAVY),
        ("import mico_ui.browser.serve", ("torch", "gradio", "transformers")),
    ],
)
def test_a_command_imports_little(code: str, names: Sequence[str]) -> None:
    assert imported(code, names) == "[]\n"


def test_the_names_of_transformers_models_are_searched_once() -> None:
    searched, structures = [], set()
    newer = "transformers; transformers.__version__ = '99'; import mico_chat.checkpoints.load"
    ours = ("mico_chat.checkpoints.load", "mico_chat.engine.llamacpp_export")
    for first in (*ours, "json", newer):
        done = run(
            "-c",
            "import os, sys\nopened = []\n"
            "keep = lambda event, given: event == 'os.scandir' and opened.append(given[0])\n"
            "sys.addaudithook(keep)\n"
            f"import torch, {first}\nimport transformers.models as models\n"
            "folder = os.path.dirname(models.__file__)\n"
            "print(sum(os.fspath(one) == folder for one in opened))\n"
            "print({name: sorted(found) for name, found in models._import_structure.items()})\n"
            "print(sorted(map(str, models._class_to_module.items())), sorted(models.__all__))",
        )
        assert done.returncode == 0, done.stderr
        times, structure = done.stdout.split("\n", 1)
        searched.append(int(times))
        structures.add(structure)
    assert searched == [1, 1, 2, 2], "without ours, transformers searches twice"
    assert len(structures) == 1, "it finds the same names"


def test_the_page_writes_no_stubs_for_editors() -> None:
    done = run(
        "-c",
        "import inspect, sys\nopened, find = [], inspect.getfile\n"
        "sys.addaudithook(lambda event, given: event == 'open' and opened.append(str(given[0])))\n"
        "import mico_ui.browser.app\n"
        "print([path for path in opened if path.endswith('.pyi')], inspect.getfile is find)",
        GRADIO_ANALYTICS_ENABLED="False",
    )
    assert (done.stdout, done.returncode) == ("[] True\n", 0), done.stderr


def test_what_was_not_imported_is_there_for_others() -> None:
    done = run(
        "-c",
        "from mico_chat.model.encoder import timm as ours\n"
        "import timm.data, timm, torch._dynamo, torchvision\n"
        "from torchvision.ops.misc import FrozenBatchNorm2d\n"
        "from timm.layers import norm_act\n"
        "print(timm is ours, timm.is_model('resnet18'), callable(timm.data.create_transform))\n"
        "print(timm.models.VisionTransformer is timm.models.vision_transformer.VisionTransformer)\n"
        "print(norm_act.FrozenBatchNorm2d is FrozenBatchNorm2d, torchvision.ops.nms.__name__)\n"
        "print(callable(torch._dynamo.optimize), timm.__version__ and torchvision.__version__)\n"
        "timm.nothing",
    )
    first, second, third, fourth = done.stdout.splitlines()
    assert (first, second, third) == ("True True True", "True", "True nms")
    assert fourth.startswith("True ")
    assert "AttributeError: module 'timm' has no attribute 'nothing'" in done.stderr


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0.in1k"])
def test_a_model_of_another_family_is_found(name: str) -> None:
    cnn = timm_model(name, features_only=True, out_indices=(3, 4))
    assert len(cnn.feature_info.channels()) == 2
    with pytest.raises(RuntimeError, match="Unknown model"):
        timm_model("no_such_model")


def test_a_package_runs_when_a_name_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "unrun_a/b").mkdir(parents=True)
    (tmp_path / "unrun_a/__init__.py").write_text("from .b import c\nd = c + 1\n")
    (tmp_path / "unrun_a/b/__init__.py").write_text("c = 1\n")
    (tmp_path / "unrun_a/e.py").write_text("f = 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    package = unrun("unrun_a")
    inner = unrun("unrun_a.b")
    assert importlib.import_module("unrun_a.e").f == 2
    assert package.b is inner
    assert not {"c", "d"} & {*vars(package), *vars(inner)}
    assert (package.d, inner.c, unrun("unrun_a")) == (2, 1, package)
    with pytest.raises(AttributeError, match="'unrun_a' has no attribute 'g'"):
        _ = package.g
    with pytest.raises(ModuleNotFoundError, match=r"unrun_a\.h"):
        unrun("unrun_a.h")


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
    def load(decoded: Sequence[MediaFile | Medium]) -> FakeAssistant:
        assert all(isinstance(one, Image) for one in decoded), (
            "it can be read while the model loads"
        )
        out.write(f"[{len(decoded)} given] ")
        return FakeAssistant()

    asking = Asking(FakeDecoder(), load, GenerationOptions(), False, out)
    asking.one("What?", media, waiting)


def test_a_terminal_shows_what_is_done(tmp_path: Path) -> None:
    file = tmp_path / "cat.jpg"
    file.write_bytes(b"bytes")
    screen, out = Screen(), io.StringIO()
    asked([("image", file)], Waiting(screen), out)
    assert shown(screen) == ["looking at cat.jpg", "loading the model", "answering"]
    assert "\x1b[2K" in screen.getvalue().rpartition("answering")[2]  # the line is clear again
    assert out.getvalue() == "[1 given] [image cat.jpg] What?\n"


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

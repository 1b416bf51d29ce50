"""Windows and macOS, as far as Linux can show them: without what they lack."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.project.test_imports import imports, modules

LACKING = {
    "win32": {"fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty"},
    "darwin": set[str](),
}
CALLS = {
    "darwin": {"sched_getaffinity"},
    "win32": {
        *("fork", "forkpty", "getloadavg", "getpgid", "getpriority", "killpg", "mkfifo", "nice"),
        *("pread", "pwrite", "sched_getaffinity", "setpriority", "setsid", "statvfs", "sysconf"),
        *("O_DIRECTORY", "O_NOFOLLOW", "SIGALRM", "SIGHUP", "SIGPIPE", "SIGUSR1", "setitimer"),
    },
}
NOWHERE = CALLS["win32"] | {"AF_UNIX", "SIGKILL", "add_signal_handler", "getuid", "pthread_kill"}
ARGUMENTS = {"start_new_session", "preexec_fn"}
"""No other module has any of these, nor the C library of ``CDLL(None)``."""


def test_one_module_has_what_systems_lack() -> None:
    found = []
    for name, file in modules().items():
        if name == "mico_chat.system" or name.startswith("benchmarks"):
            continue
        text = file.read_text(encoding="utf-8")
        tree = ast.parse(text)
        nodes = list(ast.walk(tree))
        used = {one.attr for one in nodes if isinstance(one, ast.Attribute)} & NOWHERE
        used |= {one.arg or "" for one in nodes if isinstance(one, ast.keyword)} & ARGUMENTS
        used |= set(imports(tree, strings=False)) & (LACKING["win32"] | {"msvcrt"})
        used |= {"CDLL(None)"} if "CDLL(None" in text else set()
        found += [f"{name} has {one}: use mico_chat.system" for one in sorted(used)]
    assert not found, "\n".join(found)


SIMULATED = """
import asyncio, importlib, os, signal, sys, tempfile
from pathlib import Path
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor

lacking, calls, names = {lacking!r}, {calls!r}, {names!r}

def load():
    for name in names:
        importlib.import_module(name)

def simulate(system):
    for name in [name for name in sys.modules if name.split(".")[0].startswith(("mico_", "tests"))]:
        del sys.modules[name]
    sys.modules.update(dict.fromkeys(lacking[system]))
    for module in (os, signal):
        for name in calls[system]:
            if hasattr(module, name):
                delattr(module, name)
    sys.platform = system
    load()
    from mico_chat.cli.main import main
    try:
        main(["--help"])
    except SystemExit as end:
        assert not end.code
    from mico_chat.ask import Ask
    from mico_chat.engine.cpu import free_cores, processor
    from mico_chat.media import MediaDecoder, MediaFile
    from mico_chat.media.file import MediaLimits
    from mico_chat.media.worker import _time_limit
    from mico_chat.messages import Message
    from mico_chat.options import GenerationOptions
    from mico_chat.system import HANDS_FILES, allow_open_files, sync, unechoed
    from mico_server.settings import ServerSettings
    from tests.server.support.echo import decoding_assistant
    from tests.server.support.running import running
    assert HANDS_FILES == (system != "win32")
    assert processor() and free_cores()() and allow_open_files(8) == 8
    picture = MediaFile("image", Path("tests/support/media/sheep.jpg"))
    asked = Ask([Message.user(picture, "What?")], GenerationOptions(max_tokens=4))
    limit = _time_limit(MediaLimits(), "x")
    with unechoed(), limit, tempfile.TemporaryDirectory() as folder, MediaDecoder() as decoder:
        sync(Path(folder))
        assistant = decoding_assistant(decoder)
        assert asyncio.run(assistant.answer(asked)).usage.completion_tokens
        with running(lambda: assistant, ServerSettings(data_dir=Path(folder) / "data")) as client:
            files = [("image", ("sheep.jpg", picture.read()))]
            form = {{"message": "What?", "max_tokens": "4"}}
            assert client.post("/v1/chat", data=form, files=files).status_code == 200

load()  # all other libraries, as this system has them
import tests.server.support.running
for kind in (AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor):
    kind.register = lambda *given, **more: None  # once is enough
for system in calls:
    simulate(system)
"""


@pytest.mark.slow
def test_the_product_works_without_what_systems_lack(root: Path) -> None:
    products, left_out = ("mico_chat", "mico_server", "mico_ui"), ("vllm", "lmms", "migrations")
    names = [n for n in modules() if n.split(".")[0] in products and "__main__" not in n]
    names = [n for n in names if not any(part in n for part in left_out)]
    script = SIMULATED.format(lacking=LACKING, calls=CALLS, names=names)
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("system", "limited"), [("win32", "its time"), ("darwin", "its time and what it writes")]
)
def test_a_decoder_says_what_is_limited(system: str, limited: str) -> None:
    script = f"import sys; sys.modules.update(dict.fromkeys({LACKING[system]}));"
    script += f"from mico_chat.media import sandbox; sys.platform = {system!r};"
    done = subprocess.run(
        [sys.executable, "-c", f"{script} print(sandbox.isolate())"], capture_output=True, text=True
    )
    told = f"{system} lacks seccomp: {limited} is limited, not memory, files and sockets\n"
    assert done.stdout == told, done.stderr

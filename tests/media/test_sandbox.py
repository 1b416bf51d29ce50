"""What the worker process may do: hostile code in a real worker tries all the rest."""

import errno
import json
import os
import platform
import select
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from mico_chat import system
from mico_chat.cli.doctor import engine_finding
from mico_chat.errors import MediaError
from mico_chat.media import MediaDecoder, MediaFile, decode
from mico_chat.media import decoder as parent
from mico_chat.media.maps import encode_depth
from tests.server.support.hostile_seeds import good_files, raster

MACHINES = ["x86_64", "aarch64"]
PNG = MediaFile("image", raster("RGB", "PNG"), "a.png")

PREPARED = """
import json, os
from mico_chat.errors import MediaError
from mico_chat.media import worker
{code}
def reporting(file, limits):
    raise MediaError(file.name, json.dumps(report()))
if "report" in globals():
    worker._decoder = lambda kind: reporting
"""
Patch = Callable[[str], None]


@pytest.fixture
def patch(monkeypatch: pytest.MonkeyPatch) -> Patch:
    """Runs code in each new worker before its main function; ``report`` takes the decoder's place.

    What ``report`` returns becomes the reason of an error.
    """
    head, name, tail = parent._MAIN.rpartition("main(")
    return lambda code: monkeypatch.setattr(
        parent, "_MAIN", head + PREPARED.replace("{code}", code) + name + tail
    )


def reported(decoder: MediaDecoder) -> dict[str, Any]:
    with pytest.raises(MediaError) as caught:
        decoder.decode(PNG)
    found: dict[str, Any] = json.loads(caught.value.reason)
    return found


HOSTILE = """
import ctypes, fcntl, pathlib, socket
libc, (folder, calls), ours = ctypes.CDLL(None, use_errno=True), GIVEN, os.getppid()
db, new = pathlib.Path(folder) / "db", pathlib.Path(folder) / "new"
made = socket.socket(socket.AF_UNIX)
files = "/etc/passwd", "/dev/null", "/proc/self/mem", f"/proc/{ours}/environ", db
tries = {f"read {path}": (open, path) for path in files} | {
    "write": (open, new, "w"), "append": (open, db, "a"), "stat": (os.stat, db),
    "list": (os.listdir, folder), "unlink": (os.unlink, db), "mkdir": (os.mkdir, new),
    "rename": (os.rename, db, new), "link": (os.link, db, new), "chmod": (os.chmod, db, 0o777),
    "chdir": (os.chdir, "/"), "memory file": (os.memfd_create, "a"), "pipe": (os.pipe,),
    "socket": (socket.socket,), "pair": (socket.socketpair,), "bind": (made.bind, str(new)),
    "connect": (made.connect, "/a"), "send": (made.sendto, b"a", "/a"), "listen": (made.listen,),
    "fork": (os.fork,), "spawn": (os.posix_spawn, "/bin/true", ["a"], {}),
    "exec": (os.execv, "/bin/true", ["a"]), "kill": (os.kill, ours, 0),
    "signals": (fcntl.fcntl, 0, fcntl.F_SETOWN, ours)}
def report():
    found = {}
    for name, (call, *arguments) in tries.items():
        try:
            found[name] = call(*arguments) and 0
        except OSError as error:
            found[name] = error.errno
    for name, number in calls.items():
        found[name] = ctypes.get_errno() if libc.syscall(number, 0, 0, 0, 0, 0) < 0 else 0
    return found | {"variables": [*os.environ]}
"""
CALLS = """ptrace 101 117, process_vm_readv 310 270, pidfd_open 434 434, execveat 322 281,
clone3 435 435, unshare 272 97, setns 308 268, mount 165 40, openat2 437 437, bpf 321 280,
io_uring_setup 425 425, keyctl 250 219, perf_event_open 298 241, userfaultfd 323 282,
init_module 175 105, seccomp 317 277, prctl 157 167"""


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in MACHINES, reason="no filter is written"
)
def test_hostile_code_reaches_nothing(
    patch: Patch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MICO_SERVER_DATABASE", "postgresql://mico:password@db/mico")
    (tmp_path / "db").write_text("secret")
    machine = MACHINES.index(platform.machine())
    calls = {name: int(rest[machine]) for name, *rest in map(str.split, CALLS.split(","))}
    patch(HOSTILE.replace("GIVEN", repr((str(tmp_path), calls))))
    with MediaDecoder() as decoder:
        found = reported(decoder)
        assert decoder.exposed() is None
    threads = {"OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MALLOC_ARENA_MAX"}
    # Python sets LC_CTYPE itself.
    assert {*found.pop("variables")} <= {*system.ENVIRONMENT, *threads, "LC_CTYPE"}
    assert len(found) == 28 + len(calls)
    no = {errno.EACCES, errno.EPERM, errno.ENOSYS}
    assert {name for name, code in found.items() if code not in no} == set()
    assert {name for name in calls if found[name] != errno.ENOSYS} == set()
    assert [path.name for path in tmp_path.iterdir()] == ["db"]


def test_every_format_is_decoded_as_before(decoder: MediaDecoder, tmp_path: Path) -> None:
    guessed = encode_depth(np.ones((2, 3), np.float32), "inverse", "dpt")
    files = [(good.kind, good.extension, good.data) for good in good_files()]
    for number, (kind, extension, data) in enumerate([*files, ("depth", "png", guessed)]):
        path = tmp_path / f"{number}.{extension}"
        path.write_bytes(data)
        here = decode(MediaFile(kind, path, "x"))
        for source in (path, data):
            there = decoder.decode(MediaFile(kind, source, "x"))
            for mine, its in zip(here.all_arrays, there.all_arrays, strict=True):
                np.testing.assert_array_equal(its, mine)
            assert getattr(here, "metric", None) == getattr(there, "metric", None)
            reports = [one.report.model_copy(update={"decode_ms": 0}) for one in (here, there)]
            assert reports[0] == reports[1]


@pytest.mark.skipif(sys.platform == "win32", reason="groups of processes")
def test_a_worker_ends_with_all_that_it_has_started(patch: Patch, tmp_path: Path) -> None:
    held = tmp_path / "held"
    os.mkfifo(held)
    patch(f"if os.fork() == 0: opened = open({str(held)!r}, 'w'); __import__('time').sleep(600)")
    with MediaDecoder() as decoder:
        decoder.decode(PNG)
        reader = os.open(held, os.O_RDONLY)  # waits for the child
    assert select.select([reader], [], [], 60)[0]  # its end: no process holds the other one
    os.close(reader)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc_trim")
def test_an_idle_worker_keeps_little_memory(patch: Patch) -> None:
    # Freed blocks of 1500 bytes stay with the process, as a last one lies above them.
    patch("def report(): global last; last = [bytes(1500) for _ in range(150_000)][-1]; return {}")
    with MediaDecoder() as decoder:
        reported(decoder)
        kept = [psutil.Process(pid).memory_info().rss for pid in decoder.pids()]
        assert 0 < sum(kept) < 200e6
    patch("last = []\ndef report(): last.append(bytearray(os.urandom(1)) * 150_000_000); return {}")
    with MediaDecoder() as decoder:
        for _ in range(2):
            reported(decoder)
            assert decoder.pids() == []  # the next medium gets a new process


def test_a_worker_that_is_not_isolated_is_reported_once(
    patch: Patch, caplog: pytest.LogCaptureFixture
) -> None:
    parent._warn_once.cache_clear()
    patch("worker.isolate = lambda: 'this test has no filter'")
    for _ in range(2):
        with MediaDecoder() as decoder:
            decoder.decode(PNG)
            assert decoder.exposed() == "this test has no filter"
    (said,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert said.getMessage().endswith("not isolated: this test has no filter")
    for exposed, mark in ((None, "ok"), ("no filter", "warning")):
        assert engine_finding("decoder", {"text": "", "exposed": exposed}, False).mark == mark

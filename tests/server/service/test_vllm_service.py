"""``mico-chat serve --engine vllm``: conversations, many at once, and what is said of its end.

The tests of OpenAI's clients run on it too: ``MICO_TEST_ENGINE=vllm``, see ``make test-vllm``.
"""

import os
import re
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.server.support import sent
from tests.server.support.running import events_of
from tests.server.support.served import Served, served
from tests.support.vllm_here import FLAGS, needs_vllm

pytestmark = [*needs_vllm, pytest.mark.base_llm]

CORE = "VLLM::EngineCor"  # the kernel keeps 15 letters of a process's name

RED = {"image": ("red.png", sent.png(sent.square(sent.RED)))}
BLUE = {"image": ("blue.png", sent.png(sent.square(sent.BLUE)))}


@pytest.fixture(scope="module")
def on_vllm(base_llm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("served"), *FLAGS) as one:
        yield one


@pytest.fixture(scope="module")
def http(on_vllm: Served) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {on_vllm.key}"}
    with httpx.Client(
        base_url=on_vllm.url, headers=headers, timeout=120, trust_env=False
    ) as client:
        yield client


def chat(http: httpx.Client, message: str, **fields: Any) -> Any:
    files = fields.pop("files", None)
    response = http.post("/v1/chat", data={"message": message, **fields}, files=files)
    assert response.status_code == 200, response.text
    return response.json()


def metric(http: httpx.Client, name: str) -> float:
    found = re.search(rf"^{name} (\S+)$", http.get("/metrics").text, re.MULTILINE)
    assert found, name
    return float(found[1])


def engine_in(below: Iterable[psutil.Process]) -> psutil.Process:
    """vLLM's own process."""
    (core,) = (process for process in below if process.name().startswith(CORE))
    return core


def test_sixteen_at_once_are_each_others_strangers(http: httpx.Client) -> None:
    def one(number: int) -> tuple[int, str]:
        files = (RED, BLUE)[number % 2]
        return number, chat(http, "What colour is it?", files=files, store="false")["answer"]

    with ThreadPoolExecutor(16) as pool:
        for number, answer in pool.map(one, range(16)):
            assert ("red", "blue")[number % 2] in answer.lower()
    assert metric(http, "mico_engine_running_requests") == 0


def test_who_leaves_ends_the_work(http: httpx.Client) -> None:
    form = {"message": "Tell me a long story.", "max_tokens": "1500", "stream": "true"}
    with http.stream("POST", "/v1/chat", data={**form, "temperature": "1"}) as response:
        lines = response.iter_lines()
        while "delta" not in next(lines):
            pass
        assert metric(http, "mico_engine_running_requests") == 1
    deadline = time.monotonic() + 10
    while metric(http, "mico_engine_running_requests") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert metric(http, "mico_engine_running_requests") == 0


def test_a_killed_engine(on_vllm: Served, http: httpx.Client) -> None:
    assert http.get("/health/ready").status_code == http.get("/health/live").status_code == 200
    core = engine_in(psutil.Process(on_vllm.pid).children(recursive=True))
    form = {"message": "Tell me a long story.", "max_tokens": "1900", "stream": "true"}
    begun = threading.Event()

    def asked() -> str:
        text = ""
        with http.stream("POST", "/v1/chat", data={**form, "temperature": "1"}) as response:
            for piece in response.iter_text():
                text += piece
                if "event: delta" in text:
                    begun.set()
        return text

    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(asked)
        assert begun.wait(60)
        core.kill()
        name, data = events_of(answer.result(timeout=60))[-1]
    assert name == "error"
    assert "vLLM has ended" in data["error"]["message"]
    for path in ("/health/ready", "/health/live"):
        response = http.get(path)
        assert response.status_code == 503
        assert "vLLM has ended" in response.json()["error"]["message"]
    refused = http.post("/v1/chat", data={"message": "Hello"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_ready_error")


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_of_it(base_llm_folder: Path, tmp_path: Path, end: signal.Signals) -> None:
    with served(tmp_path, *FLAGS) as service:
        below = psutil.Process(service.pid).children(recursive=True)
        assert engine_in(below).is_running()
        os.kill(service.pid, end)
        _, left = psutil.wait_procs(below, timeout=30)
        assert left == []

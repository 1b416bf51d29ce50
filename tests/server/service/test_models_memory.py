"""A model of ours and another project's under a bound that holds one: all questions are answered,
and memory stays flat.
"""

import ctypes
import gc
import random
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path

import httpx
import pytest

from mico_chat.load import EngineOptions, load_assistant, needed_bytes
from mico_chat.media import MediaDecoder
from mico_server.app import create_app
from mico_server.host import ModelSource
from mico_server.settings import ServerSettings
from tests.server.service.test_metrics import samples
from tests.server.support.running import live, wait_until_ready
from tests.server.support.sent import completion, data_uri, part, png, square, wav
from tests.support import replicas
from tests.support.tiny import saved

PARTS, EACH, AT_ONCE = 4, 24, 8
KEPT = 1_500_000
"""Bytes that a load may leave allocated in at least one part of the time; a model of test size has
5 MB. Each thread's first work leaves 18 MB once, in whichever part it comes."""


class _MallInfo(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = tuple((name, ctypes.c_size_t) for name in _names.split())


def allocated() -> int:
    """Bytes that are allocated. The size of the process also has holes: 1.1 to 1.3 GB here."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        pytest.skip("needs glibc 2.33, whose allocator can be asked")
    mallinfo.restype = _MallInfo
    found = mallinfo()
    return int(found.uordblks + found.hblkhd)


def ask(client: httpx.Client, number: int, model: str, medium: int) -> str:
    media = [
        part("image", data_uri("image/png", png(square()))),
        part("audio", data_uri("audio/wav", wav())),
    ]
    body = completion(f"Number {number}?", *media[medium - 1 : medium], model=model)
    response = client.post("/v1/chat/completions", json={**body, "max_tokens": 4})
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["usage"]["completion_tokens"] >= 1
    return str(answer["model"])


@pytest.mark.soak
def test_memory_stays_flat(tmp_path: Path) -> None:
    options = EngineOptions("transformers", dtype="float32", context_cache_bytes=1 << 20)
    omni = replicas.build("qwen2_5_omni", tmp_path / "two")
    folders = {"one": saved(tmp_path / "one"), "two": omni}
    needed = 90_000_000  # more than either takes, by its files or as measured when it is loaded
    assert needed > max(needed_bytes(folder, options) for folder in folders.values())
    drawn = random.Random(0)
    order = [(drawn.choice(["one", "two"]), drawn.randrange(3)) for _ in range(PARTS * EACH)]
    with MediaDecoder(workers=1) as decoder:
        sources = [
            ModelSource(
                name,
                partial(load_assistant, folder, decoder, options),
                needs=lambda: needed,
            )
            for name, folder in folders.items()
        ]
        settings = ServerSettings(data_dir=tmp_path / "data", max_models_bytes=int(1.5 * needed))
        with (
            live(create_app(sources, settings), lifespan="on") as client,
            ThreadPoolExecutor(AT_ONCE) as pool,
        ):
            wait_until_ready(client)

            def answered(start: int, end: int) -> int:
                asked = [
                    pool.submit(ask, client, number, *order[number]) for number in range(start, end)
                ]
                for number, one in enumerate(asked, start):
                    assert one.result() == order[number][0]
                for name in folders:  # both are loaded, and the same one last: one's cache is 1 GB
                    ask(client, end, name, 0)
                gc.collect()
                return allocated()

            def loads() -> float:
                found = samples(client.get("/metrics").text)
                return sum(found[f"mico_model_loads_total{{model={name}}}"] for name in folders)

            parts = [(answered(EACH * part, EACH * (part + 1)), loads()) for part in range(PARTS)]
            found = samples(client.get("/metrics").text)
            assert sum(found[f"mico_model_loaded{{model={name}}}"] for name in folders) == 1
            changes = [(b - a, then - before) for (a, before), (b, then) in pairwise(parts)]
            told = "; ".join(f"{more / 1e6:.1f} MB in {n:.0f} loads" for more, n in changes)
            assert min(more / n for more, n in changes) < KEPT, told

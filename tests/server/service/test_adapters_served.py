"""Adapters as models of a service: beside their base, with pictures, in turns, coming and going."""

import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from mico_chat.errors import ConfigError, ModelError
from mico_chat.load import EngineOptions, load_assistant, lora_of
from mico_chat.media import MediaDecoder
from mico_server.app import create_app
from mico_server.host import ModelSource
from mico_server.settings import ServerSettings, read_settings
from tests.server.support import sent
from tests.server.support.running import error_of, live, new_key, wait_until_ready
from tests.support import replicas
from tests.support.fakes import FakeAssistant
from tests.support.made_lora import lora_folder, merged
from tests.support.waiting import until

IN_FLOAT32 = EngineOptions(dtype="float32")
PICTURE = sent.part("image", sent.data_uri("image/png", sent.png(sent.square())))
SETTINGS: tuple[dict[str, Any], ...] = (
    {"target_modules": r".*text_model.*\.(q_proj|down_proj)"},
    {},  # the tower of pictures has layers of these names too
    {"r": 2, "use_rslora": True},
    {"target_modules": "all-linear", "exclude_modules": "lm_head"},
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, four adapters of it, and copies of the model that have one merged."""
    folder = replicas.build("smolvlm", tmp_path_factory.mktemp("adapters") / "base")
    llm, processor = replicas.load(folder)
    for n, given in enumerate(SETTINGS, 1):
        own = lora_folder(llm, folder.parent / f"a{n}", n, "org/base", **given)
        merged(llm, own).save_pretrained(folder.parent / f"m{n}")
        processor.save_pretrained(folder.parent / f"m{n}")
    return folder


@contextmanager
def served(*folders: Path, **settings: Any) -> Iterator[httpx.Client]:
    with MediaDecoder(workers=1) as decoder:
        sources = [
            ModelSource(
                folder.name,
                partial(load_assistant, folder, decoder, IN_FLOAT32),
                lora=partial(lora_of, folder, None),
            )
            for folder in folders
        ]
        key = new_key(settings["data_dir"], "root", scopes=["chat", "admin"])
        with live(create_app(sources, ServerSettings(**settings)), lifespan="on") as client:
            client.headers["authorization"] = f"Bearer {key}"
            wait_until_ready(client)
            yield client


def ask(client: httpx.Client, model: str, *turns: Any, **options: Any) -> httpx.Response:
    roles = ("user", "assistant", "user", "assistant", "user")
    messages = [{"role": r, "content": c} for r, c in zip(roles, turns, strict=False)]
    body = {"model": model, "messages": messages, "max_tokens": 8, "temperature": 0, **options}
    return client.post("/v1/chat/completions", json=body)


def said(client: httpx.Client, model: str, *turns: Any) -> tuple[str, int]:
    answer = ask(client, model, *turns).raise_for_status().json()
    cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return answer["choices"][0]["message"]["content"], cached


def load(client: httpx.Client, name: str, path: Path, **more: Any) -> httpx.Response:
    body = {"lora_name": name, "lora_path": str(path), **more}
    return client.post("/v1/load_lora_adapter", json=body)


def unload(client: httpx.Client, name: str) -> httpx.Response:
    return client.post("/v1/unload_lora_adapter", json={"lora_name": name})


def names(client: httpx.Client) -> list[str]:
    return [one["id"] for one in client.get("/v1/models").json()["data"]]


def test_each_request_wears_its_own_at_once_and_alone(base: Path, tmp_path: Path) -> None:
    folder, turns = base.parent, ([{"type": "text", "text": "What?"}, PICTURE],)
    plain = ("a text " * 12,)
    with served(*(folder / f"m{n}" for n in (1, 2, 3, 4)), data_dir=tmp_path / "m") as client:
        right = [[said(client, f"m{n}", *one)[0] for one in (turns, plain)] for n in (1, 2, 3, 4)]
    given = (f"a1={folder / 'a1'}", f"a2={folder / 'a2'}")
    with served(base, data_dir=tmp_path / "a", adapter=given) as client:
        for n in (3, 4):
            path = folder / f"a{n}"
            assert load(client, f"a{n}", path).text == (
                f"Success: LoRA adapter 'a{n}' added successfully."
            )
        listed = client.get("/v1/models").json()["data"]
        assert [(one["id"], one["parent"], one["root"]) for one in listed] == [
            ("base", None, "base"),
            *((f"a{n}", "base", str(folder / f"a{n}")) for n in (1, 2, 3, 4)),
        ]
        assert client.get("/v1/models/a2").json()["context_length"] is not None
        with ThreadPoolExecutor(10) as pool:
            models = [*(f"a{n}" for n in (1, 2, 3, 4)), "base"]
            asked = [pool.submit(said, client, m, *t) for m in models for t in (turns, plain)]
            found = [one.result()[0] for one in asked]
        assert found[:8] == [text for own in right for text in own]
        assert len({*found[::2]}) == 5, "each adapter sees another picture"
        assert [said(client, "base", *one)[0] for one in (turns, plain)] == found[8:]
        # A second turn finds the first one's tokens, those of its own adapter alone.
        for n, model in enumerate(models):
            _, cached = said(client, model, *turns, found[2 * n], "And now?")
            assert cached > 10
        assert said(client, "a1", *plain)[0] == right[0][1]


def test_loading_is_for_admins_and_what_does_not_fit_is_refused(base: Path, tmp_path: Path) -> None:
    folder = base.parent
    with served(base, data_dir=tmp_path / "data", max_models_bytes=4 << 30) as client:
        assert load(client, "x", tmp_path / "none").status_code == 404
        assert load(client, "x", base).status_code == 404
        assert load(client, "base", folder / "a1").status_code == 400
        assert load(client, "", folder / "a1").status_code == 400
        assert load(client, "x", folder / "a1").status_code == 200
        assert "already been loaded" in error_of(load(client, "x", folder / "a1"))["message"]
        before = said(client, "x", "Hi")[0]
        assert load(client, "x", folder / "a3", load_inplace=True).status_code == 200
        assert said(client, "x", "Hi")[0] != before
        strange = tmp_path / "strange"
        shutil.copytree(folder / "a1", strange)
        file = strange / "adapter_config.json"
        config = json.loads(file.read_text()) | {"base_model_name_or_path": "org/Other-7B"}
        file.write_text(json.dumps(config))
        refused = load(client, "y", strange)
        assert refused.status_code == 400
        assert "made for org/Other-7B): served is base" in error_of(refused)["message"]
        assert unload(client, "y").status_code == 404
        assert unload(client, "x").text == "Success: LoRA adapter 'x' removed successfully."
        assert ask(client, "x", "Hi").status_code == 404
        assert names(client) == ["base"]
        assert load(client, "x", folder / "a1").status_code == 200
        assert said(client, "x", "Hi")[0] == before
        mine = f"Bearer {new_key(tmp_path / 'data', 'me')}"
        client.headers["authorization"] = mine
        assert load(client, "z", folder / "a1").status_code == 403
        assert unload(client, "x").status_code == 403
        assert said(client, "x", "Hi")[0] == before
    for wrong in ("x", "=a", "base=a", f"x={strange}"):
        with pytest.raises((ConfigError, ModelError), match=r"NAME=FOLDER|made for org"):
            create_app(
                [ModelSource("base", FakeAssistant, lora=partial(lora_of, base, None))],
                ServerSettings(data_dir=tmp_path / "c", adapter=(wrong,)),
            )
    assert read_settings(["--adapter", "a=b", "--adapter", "c=d"]).adapter == ("a=b", "c=d")


def test_an_adapter_that_goes_meanwhile_ends_its_answers_first(base: Path, tmp_path: Path) -> None:
    path, long = base.parent / "a1", {"max_tokens": 300, "ignore_eos": True}
    with served(base, data_dir=tmp_path, adapter=(f"x={path}",)) as client:
        whole = ask(client, "x", "Hi", **long).json()["choices"]
        first = threading.Event()
        pieces: list[str] = []

        def stream() -> None:
            body = {"model": "x", "stream": True, "temperature": 0, **long}
            body["messages"] = [{"role": "user", "content": "Hi"}]
            with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                for line in answer.iter_lines():
                    if line.startswith("data: {") and (found := json.loads(line[6:])["choices"]):
                        pieces.append(found[0]["delta"].get("content") or "")
                        first.set()

        thread = threading.Thread(target=stream)
        thread.start()
        until(first.is_set, thread.is_alive)
        assert unload(client, "x").status_code == 200
        assert ask(client, "x", "Hi").status_code == 404
        assert load(client, "x", base.parent / "a3").status_code == 200
        thread.join()
        assert "".join(pieces) == whole[0]["message"]["content"]


def test_a_model_that_is_unloaded_comes_back_with_its_adapters(base: Path, tmp_path: Path) -> None:
    adapter = (f"x={base.parent / 'a2'}",)
    with served(base, data_dir=tmp_path, adapter=adapter, keep_alive_s=0) as client:

        def states() -> list[str]:
            return [one["status"]["value"] for one in client.get("/v1/models").json()["data"]]

        found = []
        for _ in range(2):
            until(lambda: states() == ["unloaded"] * 2)
            found.append(said(client, "x", [{"type": "text", "text": "What?"}, PICTURE]))
        assert found[0] == found[1]

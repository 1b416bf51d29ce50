"""``mico-chat mcp``, called by the MCP library's own client: real media, and hostile input."""

import base64
import json
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from mcp import Client, StdioServerParameters
from mcp_types import TextContent

from mico_chat.cli.main import main
from mico_server.fetch.fetcher import Fetcher
from mico_ui.agent_tools import Tools, server_of
from tests.conftest import ROOT, TALK
from tests.server.conftest import Start
from tests.server.media.test_fetch import Answer, ok, site
from tests.server.support.served import environment
from tests.support.fakes import FakeAssistant, FakeListener
from tests.ui.live import free_port, wait_for

pytestmark = pytest.mark.anyio

EXAMPLES = ROOT / "tests/support/media"
COMMAND = ["-m", "mico_chat.cli", "mcp"]


@pytest.fixture
def api(start: Start) -> str:
    return str(start(FakeAssistant(listener=FakeListener("Good", "morning."))).base_url)


def tools(api: str, *roots: Path, **fetching: Any) -> Client:
    """A client of tools in this process, in front of a service."""
    service: Future[tuple[str, str | None]] = Future()
    service.set_result((api, None))
    fetcher = Fetcher(timeout_s=5, max_bytes=1000, max_redirects=1, **fetching)
    return Client(server_of(Tools(service, fetcher.fetch, roots)))


async def said(client: Client, tool: str, fails: Any = False, **arguments: Any) -> str:
    result = await client.call_tool(tool, arguments)
    texts = [part.text for part in result.content if isinstance(part, TextContent)]
    assert result.is_error == fails, texts
    return "".join(texts)


@pytest.mark.slow
async def test_each_tool_on_real_media(base_llm_folder: Path, talk: Path, tmp_path: Path) -> None:
    words = [*COMMAND, "--root", str(EXAMPLES), f"--root={talk.parent}", f"--data-dir={tmp_path}"]
    server = StdioServerParameters(command=sys.executable, args=words, env=environment())
    async with Client(server) as client:
        names = {tool.name for tool in (await client.list_tools()).tools}
        assert names == {"look", "listen", "watch", "read", "transcribe", "embed", "compare"}
        data = base64.b64encode((EXAMPLES / "coffee.jpg").read_bytes()).decode()
        for picture in ("coffee.jpg", f"data:;base64,{data}"):
            asked = {"question": "What is in this photograph?", "picture": picture}
            assert "cup" in await said(client, "look", **asked)
        assert "drum" in await said(client, "listen", sound=str(EXAMPLES / "snare-drum.flac"))
        asked = {"question": "Which way is it going?", "video": (EXAMPLES / "dragon.mp4").as_uri()}
        assert "right" in await said(client, "watch", **asked)
        assert await said(client, "read", picture="sheep.jpg") == ""
        heard = await said(client, "transcribe", recording="talk.wav")
        assert heard.strip(".").lower() == TALK.strip(".").lower()
        items = [{"text": "a sheep"}, {"image": "sheep.jpg"}, {"audio": "sheep.flac"}]
        vectors = json.loads(await said(client, "embed", items=items))["vectors"]
        assert [sum(x * x for x in one) for one in vectors] == pytest.approx([1] * 3, abs=1e-3)
        pair = {"queries": items[:1], "documents": [{"image": "coffee.jpg"}, items[1]]}
        coffee, sheep = json.loads(await said(client, "compare", **pair))["scores"]
        assert (coffee["similarity"], coffee["match"]) < (sheep["similarity"], sheep["match"])


async def test_what_a_source_may_not_name(
    api: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, secret = tmp_path / "root", tmp_path / "secret.png"
    root.mkdir()
    secret.write_bytes(b"secret")
    (root / "link.png").symlink_to(secret)
    (root / "loop.png").symlink_to(root / "loop.png")
    for name, content in (("a.png", b"one"), ("broken.png", b"broken"), ("large", b"x" * 300)):
        (root / name).write_bytes(content)
    monkeypatch.setenv("MICO_MEDIA_MAX_BYTES", "200")
    elsewhere = [str(secret), "../secret.png", "link.png", "loop.png", "none.png", secret.as_uri()]
    elsewhere += ["a\0.png", "x" * 5000, ".", ""]
    local = [api, "http://169.254.169.254/latest/meta-data", "http://[::1]/a.png"]
    early: dict[str, str] = {
        **dict.fromkeys(elsewhere, f"no file in the folders that may be read ({root})"),
        **dict.fromkeys(local, "it leads to a host without a public address"),
        "large": "large: 300 bytes, more than the limit of 200",
    }
    data = "data:image/png;base64"
    wrong = {data: "image: a data URI without a comma", f"{data},%": "image: not valid base64"}
    wrong |= early | {"broken.png": "broken.png: not a image", "data:,broken": "image: not a image"}
    async with tools(api, root) as client:
        for source, reason in wrong.items():
            error = await said(client, "look", fails=True, picture=source)
            assert reason in error
            assert source[:20] in error or source.startswith("data:")
        for source, reason in early.items():  # before the service hears of it
            items = [{"text": "x"}, {"image": source}]
            assert reason in await said(client, "embed", fails=True, items=items)
        for item in ({"text": "x", "image": "a.png"}, {}, {"smell": "a"}, 7):
            assert "items" in await said(client, "embed", fails=True, items=[item])
        assert "no embeddings" in await said(client, "embed", fails=True, items=[{"text": "x"}])
        assert await said(client, "look", picture="a.png", question="Hm?") == "[image a.png] Hm?"
        assert (await said(client, "watch", video="data:,%41")).startswith("[video video] What")
        assert await said(client, "transcribe", recording="a.png") == "Good morning."
    async with tools("http://127.0.0.1:9", root) as client:
        assert "no server answers" in await said(client, "look", fails=True, picture="a.png")


async def test_an_address_is_fetched(api: str) -> None:
    answers: dict[str, Answer] = {"/a%20b.wav?x=1": ok(b"sound"), "/large": ok(b"x" * 2000)}
    async with site(answers) as other, tools(api, allowed=lambda address: True) as client:
        url = f"http://127.0.0.1:{other.port}"
        heard = await said(client, "listen", sound=f"{url}/a%20b.wav?x=1", question="?")
        assert heard == "[audio a b.wav] ?"
        assert "2000 bytes" in await said(client, "listen", fails=True, sound=f"{url}/large")


async def test_tools_over_http(api: str) -> None:
    url = f"127.0.0.1:{(port := free_port())}"
    words = [sys.executable, *COMMAND, "--api", api, "--http", str(port)]
    with subprocess.Popen(words, env=environment(), stderr=subprocess.DEVNULL) as process:
        try:
            wait_for(f"http://{url}/", lambda: process.poll() is None, 404)
            async with Client(f"http://{url}/mcp") as client:
                large = f"data:;base64,{base64.b64encode(bytes(5_000_000)).decode()}"
                assert "[image image]" in await said(client, "look", picture=large)
                assert "--root FOLDER" in await said(client, "look", fails=True, picture="a.png")
        finally:
            process.terminate()


def test_what_the_command_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    for words, reason in (
        ("--http 8765 --root .", "--root is for stdio"),
        ("--api http://127.0.0.1:9 --dtype float16", "but --dtype is for one of our own"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["mcp", *words.split()])
        assert reason in capsys.readouterr().err
    code = "import sys; sys.modules['mcp'] = None; import mico_chat.cli.main as c; c.main(['mcp'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, "needs the extra 'mcp'" in done.stderr) == (2, True)

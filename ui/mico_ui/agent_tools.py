"""``mico-chat mcp``: a service's eyes and ears, as tools of the Model Context Protocol (MCP).

Each tool is a request to a service: it decodes the media, keeps the limits and answers. Here it is
decided alone what a medium's name may reach: a public address, or a file in one of the roots.
"""

import asyncio
import base64
import tempfile
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import unquote, urlsplit

from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import ToolAnnotations
from pydantic import Field

from mico_chat.errors import MicoError, MissingFileError
from mico_chat.media.file import MediaLimits
from mico_chat.media.kinds import Kind
from mico_chat.messages import data_of, is_data_uri
from mico_chat.wire import ChatResponse
from mico_ui import routes
from mico_ui.client import ApiError, AsyncClient
from mico_ui.local_server import local_server
from mico_ui.routes import Call, Question, Upload, read_as

T = TypeVar("T")

Source = Annotated[str, Field(description="a file's path, an http(s) address or a data: URI")]
Item = Annotated[
    dict[Literal["text", "image", "audio", "video"], str],
    Field(min_length=1, max_length=1, description="a text, or one medium as the tools name it"),
]


@dataclass(frozen=True)
class Tools:
    """What an agent may call. ``service`` gets the address of a service, and the key for it.

    ``fetch`` writes what an address gives to a file; its errors call that by the third argument.
    ``roots`` are the folders whose files an agent may name.
    """

    service: Future[tuple[str, str | None]]
    fetch: Callable[[str, Path, str], Awaitable[None]]
    roots: Sequence[Path] = ()

    async def look(self, picture: Source, question: str = "What is in the picture?") -> str:
        """Look at a picture and answer a question about it."""
        return (await self._asked("image", picture, question)).answer

    async def listen(self, sound: Source, question: str = "What do you hear?") -> str:
        """Listen to a sound, or to a video's sound track, and answer a question about it."""
        return (await self._asked("audio", sound, question)).answer

    async def watch(self, video: Source, question: str = "What happens in the video?") -> str:
        """Watch a video clip and answer a question about it."""
        return (await self._asked("video", video, question)).answer

    async def read(self, picture: Source) -> str:
        """Read the text in a picture: its lines, empty where it has none."""
        found = await self._asked("image", picture, "Write down the text in this picture.")
        # Without a recogniser (the extra "reads") the model's own answer is all there is.
        lines = found.media[0].written
        return found.answer if lines is None else "\n".join(line.text for line in lines)

    async def transcribe(self, recording: Source) -> str:
        """Write down what is said in a recording, or in a video's sound track."""
        return await self._send(routes.transcription(await self._upload("audio", recording)))

    async def embed(self, items: list[Item]) -> dict[str, Any]:
        """Vectors of unit length of texts and media, one for each item, comparable by cosine."""
        found = await self._posted("/v1/embeddings", input=items)
        return {"model": found["model"], "vectors": [one["embedding"] for one in found["data"]]}

    async def compare(self, queries: list[Item], documents: list[Item]) -> dict[str, Any]:
        """Compare each query with each document.

        A score names them by their index from 0. Its `similarity` is the cosine of their vectors;
        its `match` is the probability that the text describes the medium, and is null unless one
        is a text and the other a medium.
        """
        found = await self._posted("/v1/score", queries=queries, documents=documents)
        return {"model": found["model"], "scores": found["data"]}

    async def _asked(self, kind: Kind, source: str, question: str) -> ChatResponse:
        media = [await self._upload(kind, source)]
        form = Question(question, media, options={"store": False}).form()
        return await self._send(Call("POST", "/v1/chat", read_as(ChatResponse), form=form))

    async def _posted(self, path: str, **items: Sequence[dict[Any, str]]) -> dict[str, Any]:
        body: dict[str, Any] = {
            name: [await self._part(kind, source) for one in given for kind, source in one.items()]
            for name, given in items.items()
        }
        body["model"] = (await self._send(routes.models()))[0].id
        return await self._send(Call("POST", path, lambda answer: dict(answer.json()), body=body))

    async def _part(self, kind: Kind | Literal["text"], source: str) -> Any:
        if kind == "text":
            return source
        if not is_data_uri(source):
            found = (await self._upload(kind, source)).source
            data = found if isinstance(found, bytes) else await asyncio.to_thread(found.read_bytes)
            source = f"data:;base64,{base64.b64encode(data).decode()}"
        return {"type": f"{kind}_url", f"{kind}_url": {"url": source}}

    async def _send(self, call: Call[T]) -> T:
        api, key = await asyncio.wrap_future(self.service)
        async with AsyncClient(api, key) as client:
            return await client.send(call)

    async def _upload(self, kind: Kind, source: str) -> Upload:
        if is_data_uri(source):
            return Upload(kind, await asyncio.to_thread(data_of, source, kind))
        if "://" not in source or source.startswith("file://"):
            return Upload(kind, self._file(source))
        with tempfile.TemporaryDirectory(prefix="mico-mcp-") as folder:
            path = Path(folder, "fetched")
            await self.fetch(source, path, source[:200])
            content = await asyncio.to_thread(path.read_bytes)
        return Upload(kind, content, Path(unquote(urlsplit(source).path)).name)

    def _file(self, source: str) -> Path:
        """The file of a path, absolute or within a root, symbolic links followed.

        A file elsewhere and a missing one get the same message, which tells of no other files.
        """
        named = unquote(urlsplit(source).path) if source.startswith("file://") else source
        where = ", ".join(map(str, self.roots)) or "none: start the tools with --root FOLDER"
        missing = MissingFileError(source, f"no file in the folders that may be read ({where})")
        try:
            for root in self.roots:
                path = (root / Path(named).expanduser()).resolve()
                if path.is_relative_to(root) and path.is_file():
                    limits, size = MediaLimits(), path.stat().st_size
                    if size > limits.max_bytes:
                        raise limits.exceeded(source, "max_bytes", f"{size} bytes")
                    return path
        except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, links in a circle
            raise missing from error
        raise missing


def server_of(tools: Tools) -> MCPServer:
    server = MCPServer("mico-chat", log_level="WARNING")
    calls = (tools.look, tools.listen, tools.watch, tools.read, tools.transcribe)
    for call in (*calls, tools.embed, tools.compare):
        server.add_tool(_in_words(call), annotations=ToolAnnotations(read_only_hint=True))
    return server


def _in_words(call: Callable[..., Coroutine[Any, Any, T]]) -> Callable[..., Coroutine[Any, Any, T]]:
    """A tool whose expected errors reach the agent with their own words."""

    @wraps(call)
    async def tool(**given: Any) -> T:
        try:
            return await call(**given)
        except (ApiError, MicoError, OSError) as error:
            raise ToolError(str(error)) from error

    return tool


def run(
    api: tuple[str, str | None] | None,
    arguments: Sequence[str],
    fetch: Callable[[str, Path, str], Awaitable[None]],
    roots: Sequence[Path] = (),
    port: int | None = None,
) -> None:
    """Serve the tools over standard input and output, or over HTTP at a port of this machine.

    ``api`` is a service's address and key. Without it one starts, with these ``arguments`` of
    ``mico-chat serve``. It starts beside the tools, because an agent does not wait for a model
    before it asks which tools there are.
    """
    start: Any = local_server(arguments) if api is None else nullcontext(api)
    with ExitStack() as stack, ThreadPoolExecutor(1, "mico-service") as starting:
        service = starting.submit(stack.enter_context, start)
        server = server_of(Tools(service, fetch, [root.resolve() for root in roots]))
        if port is None:
            server.run("stdio")
        else:
            most = MediaLimits().max_bytes
            server.run("streamable-http", port=port, max_request_body_size=most)

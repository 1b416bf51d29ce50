"""``mico-chat teach``: names of one's own things, taught to a server."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mico_chat.errors import RequestError
from mico_chat.media.file import HEAD_BYTES, format_of
from mico_chat.media.kinds import kinds_of_format
from mico_chat.wire import TaughtList, TaughtObject
from mico_ui import routes
from mico_ui.client import ApiError, Client
from mico_ui.local_server import local_server


def run(api: str | None, key: str | None, **asked: Any) -> list[str]:
    """What was done, in lines; without ``api`` a server is started for it.

    At most one of the arguments of :func:`_done` is given; without any the names are listed.
    """
    if sum(map(bool, asked.values())) - bool(asked["files"]) > 1:
        raise RequestError("give a NAME with its FILES, or one option: see mico-chat teach --help")
    try:
        with ExitStack() as stack:
            if api is None:
                api, key = stack.enter_context(local_server())
            return list(_done(stack.enter_context(Client(api, key)), **asked))
    except (ApiError, OSError, ValueError) as error:
        raise RequestError(" ".join(str(error).split())) from error


def _done(
    client: Client,
    name: str | None,
    files: Sequence[Path],
    rename: tuple[str, str] | None,
    forget: str | None,
    export: Path | None,
    import_: Path | None,
    listed: bool,
) -> Iterator[str]:
    names = client.send(routes.taught(features=export is not None))
    changed: Sequence[TaughtObject] = names.data
    if name is not None:
        # The kind is that of the content; the server refuses what is neither a picture nor a sound.
        kinds = [kinds_of_format(format_of(path.read_bytes()[:HEAD_BYTES])) for path in files]
        given = [
            routes.Upload("audio" if "audio" in found else "image", path)
            for found, path in zip(kinds, files, strict=True)
        ]
        changed = [client.send(routes.teach(name, given))]
    elif rename is not None:
        changed = [client.send(routes.rename_taught(_id(names, rename[0]), rename[1]))]
    elif forget is not None:
        client.send(routes.forget_taught(_id(names, forget)))
        changed = [one for one in names.data if one.name != forget]
    elif export is not None:
        export.write_text(names.model_dump_json(indent=1), "utf-8")
    elif import_ is not None:
        try:
            read = TaughtList.model_validate_json(import_.read_text("utf-8"))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            said = f"{where}: {first['msg']}".removeprefix(": ")
            raise RequestError(f"{import_}: no file of --export: {said}") from error
        changed = client.send(routes.import_taught(read)).data
    for one in changed:
        what = "picture" if one.kind == "image" else "sound"
        yield f"{one.name}: {one.examples} {what}{'s' * (one.examples > 1)}, for {one.model}"


def _id(names: TaughtList, name: str) -> str:
    for one in names.data:
        if one.name == name:
            return one.id
    known = ", ".join(one.name for one in names.data) or "none"
    raise RequestError(f"no name {name!r} is taught; taught are: {known}")

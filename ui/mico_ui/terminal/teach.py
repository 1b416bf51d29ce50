"""``mico-chat teach``: names of one's own things, taught to a server."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from http import HTTPStatus
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

CORRECTIONS = "corrections.jsonl"


def run(api: str | None, key: str | None, **asked: Any) -> list[str]:
    """What was done, in lines; without ``api`` a server is started for it.

    At most one of the arguments of :func:`_done` is given; without any the names are listed.
    """
    if sum(map(bool, asked.values())) - bool(asked.get("files")) > 1:
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
    name: str | None = None,
    files: Sequence[Path] = (),
    rename: tuple[str, str] | None = None,
    forget: str | None = None,
    export: Path | None = None,
    import_: Path | None = None,
    corrections: tuple[Path, Callable[[str], str]] | None = None,
    listed: bool = False,
) -> Iterator[str]:
    names = client.send(routes.taught(features=export is not None))
    if corrections is not None:
        yield from _corrections(client, names, *corrections)
        return
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


def _corrections(
    client: Client, names: TaughtList, folder: Path, answer_of: Callable[[str], str]
) -> Iterator[str]:
    """Write the answers that names correct as JSON Lines, and their media beside these.

    The turn may have asked anything; a name answers what its medium shows, so that this is asked.
    """
    lines = []
    folder.mkdir(parents=True, exist_ok=True)
    for one in names.data:
        asked = "What do you hear?" if one.kind == "audio" else "What is this?"
        for number, wrong in enumerate(one.corrections):
            file, id_, last = f"{one.id}-{number}", wrong["conversation_id"], wrong["turn"]
            try:
                turns = client.send(routes.conversation(id_)).turns[:last]
                own = [[m for m in turn.media if m.kind == one.kind] for turn in turns]
                media = next(filter(None, reversed(own)), [])  # the turn's, or those before it
                if len(turns) < last or len(media) != 1:
                    there = (
                        f"turn {last} of {len(turns)}, {len(media)} media of the kind {one.kind}"
                    )
                    raise ApiError(there, HTTPStatus.NOT_FOUND)
                (folder / file).write_bytes(client.send(routes.medium_content(media[0].id)))
            except ApiError as error:
                if error.status != HTTPStatus.NOT_FOUND:
                    raise
                yield f"{one.name}: left out, because of {id_}: {error}"
                continue
            line = {one.kind: file, "question": asked, "answer": answer_of(one.name)}
            lines.append(json.dumps(line) + "\n")
    (folder / CORRECTIONS).write_text("".join(lines), "utf-8")
    yield f"{folder / CORRECTIONS}: {len(lines)} corrections"


def _id(names: TaughtList, name: str) -> str:
    for one in names.data:
        if one.name == name:
            return one.id
    known = ", ".join(one.name for one in names.data) or "none"
    raise RequestError(f"no name {name!r} is taught; taught are: {known}")

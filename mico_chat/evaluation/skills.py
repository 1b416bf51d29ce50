"""Accuracy per skill of a set of items, with controls that say whence it comes.

The same questions are asked with their media (``full``), without (``withheld``), with another
item's media of the same kinds (``swapped``), and with one of the encoder's paths switched off
(``without-concepts``, ``without-grid``). A model that looks and listens falls to chance in the
second and the third. ``base-llm`` asks the language model as it was before tuning: what is said
without media should not be worse than that. A question without media is the same under all controls
but the first and the last, and is asked under these alone.

Answers are kept in a folder as they come, so that a run goes on where it was ended and figures are
computed anew without the model (:mod:`mico_chat.evaluation.skill_scores`).
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from mico_chat.errors import DataError
from mico_chat.evaluation.chat.model import CONTROLS, Answered, ChatModel, outcome, replies
from mico_chat.evaluation.items import Item, read_items
from mico_chat.evaluation.tasks.store import Record, Store
from mico_chat.media import MediaFile
from mico_chat.messages import Message

SHOWN_ANYWAY = ("full", "base-llm")
"""The controls that mean something for a question without media."""
MAX_TOKENS = 24
MAX_TOKENS_OF_TEXT = 48
"""Of an answer about media, and to a plain question."""


def chosen_items(
    files: Sequence[Path],
    skills: Sequence[str] | None = None,
    limit: int = 0,
    *,
    of: Sequence[str] = (),
) -> list[Item]:
    """The items of files: of these skills alone, the first ``limit`` of each; 0 is all.

    Args:
        of: the skills that there are to choose from; empty is all in the files.

    Raises:
        DataError: there are none, or a file is damaged.
    """
    items = [item for path in files for item in read_items(path) if not of or item.skill in of]
    if skills:
        if unknown := set(skills) - {item.skill for item in items}:
            known = ", ".join(sorted({item.skill for item in items}))
            raise DataError(
                files[0], None, f"unknown skill {min(unknown)!r}; the skills are {known}"
            )
        items = [item for item in items if item.skill in skills]
    if not items:
        raise DataError(files[0], None, "the files hold no items")
    taken: dict[str, int] = defaultdict(int)
    kept = []
    for item in items:
        taken[item.skill] += 1
        if not limit or taken[item.skill] <= limit:
            kept.append(item)
    return kept


def run(
    name: str,
    items: Sequence[Item],
    model: ChatModel,
    folder: Path,
    controls: Sequence[str],
    *,
    max_tokens: int | None = None,
    limit: int = 0,
) -> None:
    """Ask what is not answered yet in ``folder``.

    Args:
        name: of the set of items.
        controls: which of the model's.
        max_tokens: of an answer; None is 24, and 48 where an item has no media.
        limit: what the items were cut to, for the record.

    Raises:
        ConfigError: the folder holds the answers of another model or to other items.
        MicoError: the model failed.
    """
    header = {
        "task": name,
        **model.header(),
        "max_tokens": max_tokens,
        "limit": limit,
        "digest": digest(items),
        "skills": {
            skill: {"n": len(of_it), "digest": digest(of_it)}
            for skill, of_it in sorted(_by_skill(items).items())
        },
    }
    with Store(folder, header) as store:
        # The untuned LLM comes last, for it replaces the tuned one.
        for control in sorted(controls, key=CONTROLS.index):
            if not any(r["kind"] == "done" and r["control"] == control for r in store.records):
                _ask(name, items, model, store, control, max_tokens)
                store.add([{"kind": "done", "control": control}])


def _ask(
    name: str,
    items: Sequence[Item],
    model: ChatModel,
    store: Store,
    control: str,
    max_tokens: int | None,
) -> None:
    model.use(control)
    shown = media_shown(items, control)
    known = {r["number"] for r in store.records if r.get("control") == control and "number" in r}
    asked = [i for i, item in enumerate(items) if item.media or control in SHOWN_ANYWAY]
    for about_media in (True, False):
        places = [i for i in asked if bool(items[i].media) is about_media]
        most = max_tokens or (MAX_TOKENS if about_media else MAX_TOKENS_OF_TEXT)
        conversations = [[_message(items[i], shown[i])] for i in places]
        done = {n for n, i in enumerate(places) if i in known}
        if len(done) == len(places):
            continue
        for place, reply, seconds in replies(
            model, conversations, done, most, f"{name}: {control}"
        ):
            item = items[places[place]]
            record: Record = {"number": places[place], "control": control, "skill": item.skill}
            record |= {"seconds": seconds, **outcome(reply, item.id)}
            if isinstance(reply, Answered):
                record |= {"kind": "answer", "message": item.message}
                record |= {"accept": item.accept, "choices": item.choices}
            store.add([record])


def _message(item: Item, shown: Item) -> Message:
    parts = [MediaFile(medium.kind, medium.path) for medium in shown.media]
    return Message.user(*parts, item.message)


def _by_skill(items: Sequence[Item]) -> dict[str, list[Item]]:
    found: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        found[item.skill].append(item)
    return found


def media_shown(items: Sequence[Item], control: str) -> list[Item]:
    """For each item, the item whose media are shown with its question."""
    if control == "withheld":
        return [item.model_copy(update={"media": ()}) for item in items]
    if control != "swapped":
        return list(items)
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for i, item in enumerate(items):
        groups[(item.skill, *(m.kind for m in item.media))].append(i)
    shown = list(items)
    for members in groups.values():
        for place, i in enumerate(members):
            others = members[place + 1 :] + members[:place]
            different = [j for j in others if items[j].accept != items[i].accept]
            # Any other medium where answers are closed: its truth must not be told by the swap.
            pool = others if items[i].choices else different
            if pool:
                shown[i] = items[pool[(7 * place) % len(pool)]]
    return shown


def digest(items: Sequence[Item]) -> str:
    """Names what is asked: words and the very bytes of the media, not where these lie."""
    whole = hashlib.sha256()
    for item in items:
        whole.update(item.model_dump_json(exclude={"media"}).encode())
        for medium in item.media:
            try:
                data = medium.path.read_bytes()
            except OSError:  # it is named as broken when it is shown
                data = b""
            whole.update(f"{medium.kind} {hashlib.sha256(data).hexdigest()}".encode())
    return whole.hexdigest()[:16]

"""Tasks that ask a chat model: each item a conversation of one turn, each answer kept as it comes.

The records are those of :mod:`mico_chat.evaluation.tasks.predict`, and ``refused``: an item that
the model does not take, and why.
"""

from __future__ import annotations

from pathlib import Path

from mico_chat.evaluation.chat.model import Answered, ChatModel, outcome, replies
from mico_chat.evaluation.tasks.datasets import DATASETS
from mico_chat.evaluation.tasks.predict import broken
from mico_chat.evaluation.tasks.run import data_digest
from mico_chat.evaluation.tasks.store import Record, Store
from mico_chat.evaluation.tasks.task import Contents, Entry, ItemMedia, Task
from mico_chat.media import MediaFile
from mico_chat.messages import Message


def run_chat_task(
    task: Task,
    data: Path,
    model: ChatModel,
    output: Path,
    *,
    limit: int = 0,
    max_tokens: int | None = None,
) -> None:
    """Ask what is not answered yet in ``output``.

    Args:
        limit: the first items alone; 0 is all.
        max_tokens: of an answer; None is the task's.

    Raises:
        DataError: the data set is missing or cannot be used.
        ConfigError: ``output`` holds the predictions of another model, task or setting.
        MicoError: the model failed.
    """
    contents = DATASETS[task.dataset].read(data).first(limit)
    entries = _by_medium(contents)
    most = max_tokens or task.max_tokens
    header = {
        "task": task.name,
        **model.header(),
        "prompt": task.prompt,
        "max_tokens": most,
        "limit": limit,
        "items": len(entries),
        "data": data_digest(contents),
    }
    with Store(output, header) as store:
        if any(record["kind"] == "done" for record in store.records):
            return
        if not store.records:
            store.add([broken(lost.id, lost.reason) for lost in contents.broken])
        known = {str(record["id"]) for record in store.records}
        done = {place for place, entry in enumerate(entries) if entry.id in known}
        conversations = [[_message(task, entry)] for entry in entries]
        for place, reply, seconds in replies(model, conversations, done, most, task.name):
            entry = entries[place]
            record: Record = {"seconds": seconds, **outcome(reply, entry.id)}
            if isinstance(reply, Answered) and task.family == "captioning":
                record["caption"] = record.pop("answer")
                record |= {"kind": "caption", "references": entry.captions}
            elif isinstance(reply, Answered):
                record |= {"kind": "answer", "question": entry.question}
                record["references"] = entry.answers
            store.add([record])
        store.add([{"kind": "done"}])


def _by_medium(contents: Contents) -> list[Entry]:
    """Entries of one medium beside each other, so that it is encoded once for those of a batch."""
    media: dict[ItemMedia, list[Entry]] = {}
    for entry in contents.entries:
        media.setdefault(entry.media, []).append(entry)
    return [entry for of_it in media.values() for entry in of_it]


def _message(task: Task, entry: Entry) -> Message:
    media = entry.media
    text = task.prompt.replace("{question}", entry.question)
    return Message.user(MediaFile(media.kind, media.source, media.name), text)

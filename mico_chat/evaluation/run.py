"""Asks a model about the items of a task, and stores each answer at once.

A task of skills is asked under controls, which show where its figures come from: with the media of
each item (``full``), without media (``withheld``), with the media of another item of the same kinds
(``swapped``), and with one path of the encoder switched off (``without-concepts``,
``without-grid``). ``base-llm`` asks the language model before its tuning. A question without media
is asked under ``full`` and ``base-llm`` only, because the others change nothing for it. All other
tasks have the control ``full``, and public benchmarks ``withheld`` too.

The kinds of record in the store are ``broken`` and ``refused`` (an item with the reason),
``caption``, ``answer``, ``done`` (the end of the run or of a control) and those of
``retrieval.py``.
"""

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from mico_chat.errors import MediaError
from mico_chat.evaluation.pretrained import PretrainedModel
from mico_chat.evaluation.retrieval import RERANKED, rank
from mico_chat.evaluation.store import Record, Store
from mico_chat.evaluation.task import CONTROLS, Contents, Item, Model, Reply, Task

MAX_TOKENS = 24
MAX_TOKENS_OF_TEXT = 48


def run(
    task: Task,
    contents: Contents,
    model: Model,
    folder: Path,
    controls: Sequence[str] = ("full",),
    *,
    limit: int = 0,
    max_tokens: int | None = None,
) -> None:
    """Ask about all items of ``contents`` that have no answer yet in ``folder``.

    ``limit`` is the number of items to which the caller has cut ``contents``.
    """
    skills = task.family == "skills"
    # A header says what is known alone: that of an earlier run stays the same.
    of_model = {key: value for key, value in model.header().items() if value is not None}
    header = {"task": task.name, **of_model, "limit": limit}
    with Store(folder, header | _settings(task, contents.items, max_tokens)) as store:
        if not skills and not store.records:
            store.add([{"kind": "broken", "id": id, "reason": why} for id, why in contents.broken])
        # The untuned language model comes last, because it replaces the tuned one.
        for control in sorted(controls, key=CONTROLS.index):
            done = {"kind": "done", **({"control": control} if skills or control != "full" else {})}
            if done in store.records:
                continue
            model.use(control)
            if task.family == "retrieval":
                assert isinstance(model, PretrainedModel)
                rank(task, contents, model, store)
            else:
                _ask(task, contents.items, model, store, control, max_tokens)
            store.add([done])


def _settings(task: Task, items: Sequence[Item], max_tokens: int | None) -> Record:
    """The items and settings that the figures depend on."""
    if task.family == "skills":
        rows = {}
        for skill in sorted({item.skill for item in items}):
            of_skill = [item for item in items if item.skill == skill]
            rows[skill] = {"n": len(of_skill), "digest": bytes_digest(of_skill)}
        found = {"max_tokens": max_tokens, "digest": bytes_digest(items), "skills": rows}
        of_stage_1 = f"{task.how}; {task.frames} frames, {task.slices} slices"
        return found if task.prompt else {**found, "how": of_stage_1}
    found = {"items": len(items), "data": words_digest(items)}
    if task.prompt:
        return {**found, "prompt": task.prompt, "max_tokens": max_tokens or task.max_tokens}
    settings = {"frames": task.frames, "slices": task.slices, "text_length": task.text_length}
    return {**found, **settings, "reranked": RERANKED}


def _ask(
    task: Task,
    items: Sequence[Item],
    model: Model,
    store: Store,
    control: str,
    max_tokens: int | None,
) -> None:
    skills = task.family == "skills"
    shown = media_shown(items, control)
    known = {
        record.get("number", record["id"])
        for record in store.records
        if "id" in record and record.get("control", "full") == control
    }
    if task.prompt:
        words = [task.prompt.replace("{question}", item.question) for item in items]
        shown = [replace(item, question=text) for item, text in zip(shown, words, strict=True)]
    for places, most in _parts(task, items, control):
        asked = [shown[i] for i in places]
        done = {n for n, i in enumerate(places) if (i if skills else items[i].id) in known}
        # A batch with an open item is asked as a whole, so that a resumed run computes the same.
        open_ = [n for batch in model.batches(asked) if not done.issuperset(batch) for n in batch]
        if not open_:
            continue
        found = model.answers(task, [asked[n] for n in open_], max_tokens or most)
        description = task.name if control == "full" and not skills else f"{task.name}: {control}"
        before = time.perf_counter()
        for number, reply in tqdm(found, desc=description, unit="answer", total=len(open_)):
            if (n := open_[number]) in done:
                continue
            now = time.perf_counter()
            record = _record(task, items[places[n]], reply) | {"seconds": round(now - before, 3)}
            before = now
            record |= {"control": control} if skills or control != "full" else {}
            record |= {"number": places[n]} if skills else {}
            store.add([record])


def _parts(task: Task, items: Sequence[Item], control: str) -> Iterator[tuple[list[int], int]]:
    """Groups of items by their places, each with the most tokens of an answer."""
    if task.family == "skills":
        yield [i for i, item in enumerate(items) if item.media], MAX_TOKENS
        if control in ("full", "base-llm"):
            yield [i for i, item in enumerate(items) if not item.media], MAX_TOKENS_OF_TEXT
        return
    # The items of a medium follow each other, so that a batch of them encodes it once.
    places: dict[object, list[int]] = defaultdict(list)
    for i, item in enumerate(items):
        places[item.media].append(i)
    yield [i for of_medium in places.values() for i in of_medium], task.max_tokens


def _record(task: Task, item: Item, reply: Reply) -> Record:
    record: Record = {"kind": reply.kind, "id": item.id}
    if task.family == "skills":
        record["skill"] = item.skill
    if reply.kind != "answer":
        return {**record, "reason": reply.text}
    if reply.confidence is not None:
        record["confidence"] = reply.confidence
    if task.family == "captioning":
        return {**record, "kind": "caption", "caption": reply.text, "references": item.captions}
    record["answer"] = reply.text
    if task.family == "qa":
        more = {"choices": item.choices, "skill": item.skill} if item.skill or item.choices else {}
        return {**record, "question": item.question, "references": item.answers, **more}
    return record | item.asked()


def media_shown(items: Sequence[Item], control: str) -> list[Item]:
    """The items with the media that the model sees under a control."""
    if control == "withheld":
        return [replace(item, media=()) for item in items]
    shown = list(items)
    if control != "swapped":
        return shown
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for i, item in enumerate(items):
        groups[(item.skill, *(m.kind for m in item.media))].append(i)
    for members in groups.values():
        for place, i in enumerate(members):
            pool = members[place + 1 :] + members[:place]
            pool = [j for j in pool if items[j].media != items[i].media]
            # With choices, the other medium may have the same answer: if a swap always changed the
            # true answer, the new medium would rule one choice out.
            if not items[i].choices:
                pool = [j for j in pool if set(items[i].answers).isdisjoint(items[j].answers)]
            if pool:
                shown[i] = replace(items[i], media=items[pool[(7 * place) % len(pool)]].media)
    return shown


def words_digest(items: Sequence[Item]) -> str:
    """A digest of the ids and words of a data set's items; their media make no difference."""
    digest = hashlib.sha256()
    for item in items:
        words = (item.id, item.captions, item.question, item.answers)
        digest.update(repr((*words, *filter(None, [item.subtitle]))).encode())
    return digest.hexdigest()[:16]


def bytes_digest(items: Sequence[Item]) -> str:
    """A digest of the words and the media's bytes of items; the places of files do not matter."""
    digest = hashlib.sha256()
    for item in items:
        words = {"id": item.id, "skill": item.skill, **item.asked()}
        digest.update(json.dumps(words, ensure_ascii=False, separators=(",", ":")).encode())
        for file in item.media:
            try:
                data = file.read()
            except MediaError:  # the run reports this medium as broken
                data = b""
            digest.update(f"{file.kind} {hashlib.sha256(data).hexdigest()}".encode())
    return digest.hexdigest()[:16]

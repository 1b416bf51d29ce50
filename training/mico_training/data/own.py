"""One's own held-out data, in every format that training reads, as items of an evaluation."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from mico_chat.errors import ConfigError, DataError
from mico_chat.evaluation.metrics.answers import position
from mico_chat.evaluation.task import Contents, Item, Task
from mico_training.data.mixture import open_source
from mico_training.data.sources.sample import TrainingSample
from mico_training.recipe import DataRecipe


def own_items(task: Task, path: str, given: str = "") -> Contents:
    """The items of a task over the data at a path; broken ones are named with the reason.

    ``given`` are the names of a classification, separated by commas, or a file with a name a line;
    by default they are the data's concepts. What a medium shows is its concept, or else the only
    name that its captions say.

    Raises:
        DataError: a record is wrong, or no sample has what the task asks about.
        ConfigError: a classification has fewer than two names.
    """
    asks = "questions" in task.name
    recipe = DataRecipe(path=path, bad="stop")
    source = open_source(recipe, "conversation" if asks else "caption")
    samples = [source[index] for index in range(len(source))]
    contents = Contents(same_words=True)
    if asks:
        contents.items = [item for sample in samples for item in _asked(sample)]
    elif task.family == "skills":
        file = Path(given).is_file()
        words = Path(given).read_text(encoding="utf-8").split("\n") if file else given.split(",")
        names = list(dict.fromkeys(name.strip() for name in words if name.strip()))
        names = names or sorted({name for one in samples for name in one.concepts.values()})
        if len(names) < 2:
            raise ConfigError(f"{path}: a classification needs two names or more: give --names A,B")
        asked = f"Which of these is it: {', '.join(names)}? Answer with one of them."
        _named(samples, names, asked if task.prompt else "", contents)
    else:
        for sample in samples:
            for key, captions in sample.captions.items():
                contents.caption(f"{sample.id}.{key}", sample.media[key], captions)
    if not task.prompt:  # stage 1's model reads one medium
        whole, contents.items = contents.items, [i for i in contents.items if len(i.media) == 1]
        lost = [(i.id, f"it is about {len(i.media)} media") for i in whole if len(i.media) != 1]
        contents.broken += lost
    if not contents.items:
        first = ": ".join(contents.broken[0]) if contents.broken else "it asks nothing"
        raise DataError(path, None, f"no sample is of use for {task.name}; the first: {first}")
    return contents


def _asked(sample: TrainingSample) -> Iterator[Item]:
    """Each question with all its answers, or the first one of a conversation."""
    turns = defaultdict(list)
    for turn in sample.turns:
        turns[turn.question, turn.media, turn.skill, turn.choices].append(turn)
    for n, ((question, media, skill, choices), own) in enumerate(turns.items(), start=1):
        right = tuple(dict.fromkeys(w for turn in own for w in turn.accept or (turn.answer,)))
        shown = tuple(sample.media[key] for key in media)
        id = sample.id if len(turns) == 1 else f"{sample.id}#{n}"
        yield Item(id, shown, question, (), right, choices, skill or "questions")
    said = [message for message in sample.conversation if message.role != "system"]
    if said:
        text = said[0].text.strip()
        yield Item(sample.id, said[0].files, text, (), (said[1].text,), (), "questions")


def _named(
    samples: Sequence[TrainingSample], names: Sequence[str], question: str, contents: Contents
) -> None:
    for sample in samples:
        for key, medium in sample.media.items():
            id, texts = f"{sample.id}.{key}", sample.captions.get(key, ())
            said = [n for n in names if any(position(text, n) is not None for text in texts)]
            right = [n for n in names if n == sample.concepts.get(key)] or said
            if len(right) == 1:
                words = (tuple(right), tuple(names), "names")
                contents.items.append(Item(id, (medium,), question, (), *words))
            elif texts:
                why = f"its concept is none of the names, and its captions say {len(said)} of them"
                contents.broken.append((id, why))

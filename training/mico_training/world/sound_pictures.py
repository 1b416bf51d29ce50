"""Pictures with sounds: do they belong together?

The picture shows one large thing of the catalogue. A thing belongs to a sound when its
name is the class or one of the class's other names; a wrong sound is one that nobody could
say the thing makes, of another kind mostly, of the same kind now and then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

from mico_training.world import compose, nouns, synth
from mico_training.world.sample import Sample, Split, Turn
from mico_training.world.sound_turns import AUDIO, Rng, captions, name_turn, pick, render
from mico_training.world.soundbank import SoundBank, sound_bank
from mico_training.world.soundnames import confusable, sound_names
from mico_training.world.things import Catalogue, Thing, catalogue

Pictures = Mapping[str, tuple[Thing, ...]]  # class -> the things that make it
IMAGE = "image.jpg"
_SAME_KIND = 0.3
_ANIMAL_QUESTIONS = ("Could this animal make this sound?", "Does this animal sound like this?")
_QUESTIONS = (
    "Do the picture and the sound belong together?",
    "Does this sound belong to this picture?",
    "Could the thing in the picture make this sound?",
    "Does the sound match the picture?",
    "Is this the sound of what the picture shows?",
    "Do the image and the audio fit together?",
    "Is what you hear also what you see?",
    "Can what is shown make this noise?",
)
# Names that are right for a sound but whose pictures show something else.
_NOT_PICTURED = {
    *("alert", "bass", "beach", "blast", "block", "bomb", "bow", "chime", "choir", "collision"),
    *(
        "crowd",
        "drill",
        "engine",
        "flame",
        "flames",
        "fly",
        "game",
        "heart",
        "horn",
        "insect",
        "keyboard",
    ),
    *("keys", "man", "message", "money", "motor", "noise", "ocean", "person", "rattle"),
    *("ring", "sea", "shot", "singer", "steps", "storm", "surf", "tick", "tone", "voice", "watch"),
    "woman",
}
# A drawn drum may stand for any drum; a drawn keyboard is a computer's.
_FAMILY = {
    "bongos": "drum",
    "snare drum": "drum",
    "timpani": "drum",
    "electric guitar": "guitar",
    "marimba": "xylophone",
    "typing": "keyboard",
}
_SOUND_ONLY = frozenset({"beep", "static", "crash", "notification", "speech", "heartbeat", "coin"})


def picture_words(name: str) -> frozenset[str]:
    """The names of things whose picture surely shows what makes the sound ``name``."""
    names = sound_names()
    family = _FAMILY.get(name)
    return frozenset(
        word
        for word in names[name].accept
        if word in (name, family) or (word not in names and word not in _NOT_PICTURED)
    )


def pictures_of(things: Catalogue, split: Split) -> dict[str, tuple[Thing, ...]]:
    """Which things of ``split`` make which sound, by their first name."""
    found: dict[str, tuple[Thing, ...]] = {}
    for name in sound_names():
        words = sorted(picture_words(name)) if name not in _SOUND_ONLY else []
        able = [t for w in words for t in things.of_name(split, w) if t.category != "shape"]
        if able:
            found[name] = tuple(able)
    return found


def might_make(thing: Thing, name: str) -> bool:
    """Whether somebody could say that ``thing`` makes the sound ``name``.

    Wider than ``picture_words``: a penguin is a bird, a teddy bear growls like a bear.
    """
    words = {word.lower() for word in thing.accept}
    words |= {word.split()[-1] for word in words}
    makes = [sound for sound in sound_names().values() if words & {*sound.accept}]
    return any(confusable(sound.name, name) for sound in makes)


@lru_cache(maxsize=2)
def _pictures(split: Split) -> dict[str, tuple[Thing, ...]]:
    return pictures_of(catalogue(), split)


def picture(rng: Rng, thing: Thing) -> bytes:
    """One large thing on a simple background, 256 x 256 JPEG."""
    _, rgba = compose.dress(rng, thing, None, 0.0)
    size = float(rng.uniform(0.6, 0.92))
    x, y = rng.uniform(0.42, 0.58, 2).tolist()
    scene = compose.render(rng, [compose.Item(thing, None, rgba, x, y, size)])
    return compose.jpeg(rng, scene.pixels)


def make_pair(
    rng: Rng, split: Split, bank: SoundBank | None = None, pictures: Pictures | None = None
) -> Sample:
    """A picture and a sound that belong together half of the time.

    The source packages' clips and cut-outs are the default. Raises ValueError where no thing
    of the split makes a sound of the split.
    """
    bank = sound_bank() if bank is None else bank
    pictures = _pictures(split) if pictures is None else pictures
    heard = bank.names(split)
    both = [name for name in heard if name in pictures]
    if not both:
        raise ValueError(f"no picture belongs to any of the {len(heard)} sounds of {split!r}")
    belong = bool(rng.random() < 0.5)
    seen = bank.draw_name(rng, split, both)
    candidates = pictures[seen]
    thing = candidates[int(rng.integers(len(candidates)))]
    name = seen if belong else _wrong(rng, bank, split, seen, thing, both)
    signal = render(rng, bank, split, name, float(rng.uniform(1.5, 4.0)))
    sound = sound_names()[name]
    media = (IMAGE, AUDIO) if rng.random() < 0.5 else (AUDIO, IMAGE)
    shown = nouns.article(thing.name)
    animal = sound_names()[seen].kind == "animal"
    turns = [_belong_turn(rng, belong, animal, media, shown, sound.phrase)]
    if rng.random() < 0.5:
        turns.append(name_turn(rng, name))
    if rng.random() < 0.4:
        answer = nouns.sentence(shown)
        turns.append(Turn("What is in the picture?", answer, "name", (IMAGE,), (), thing.accept))
    if rng.random() < 0.3:
        answer = f"The picture shows {shown}, and the sound is {sound.phrase}."
        question = "What do you see and what do you hear?"
        turns.append(Turn(question, answer, "see_and_hear", media, (), (thing.name, name)))
    return Sample(
        id=f"pair-{int(rng.integers(2**48)):012x}",
        split=split,
        files={IMAGE: picture(rng, thing), AUDIO: synth.flac(synth.record(rng, signal))},
        captions={
            IMAGE: (f"A picture of {shown}.", nouns.sentence(shown)),
            AUDIO: captions(rng, name),
        },
        turns=tuple(turns),
        concepts={IMAGE: thing.name, AUDIO: name},
        truth={"belong": belong, "thing": thing.name, "sound": name},
    )


def _wrong(
    rng: Rng, bank: SoundBank, split: Split, seen: str, thing: Thing, pictured: Sequence[str]
) -> str:
    """A sound that ``thing``, taken for a ``seen``, cannot make.

    One that has pictures as well, where possible: the sound alone must not tell the answer.
    """
    names = sound_names()

    def wrong(name: str) -> bool:
        return not confusable(seen, name) and not might_make(thing, name)

    pool = [name for name in pictured if wrong(name)]
    pool = pool or [name for name in bank.names(split) if wrong(name)]
    if not pool:
        raise ValueError(f"every sound of {split!r} could be made by a {thing.name}")
    alike = [name for name in pool if names[name].kind == names[seen].kind]
    unlike = [name for name in pool if names[name].kind != names[seen].kind]
    first, second = (alike, unlike) if rng.random() < _SAME_KIND else (unlike, alike)
    return bank.draw_name(rng, split, first or second)


def _belong_turn(
    rng: Rng, belong: bool, animal: bool, media: tuple[str, ...], shown: str, heard: str
) -> Turn:
    """First what is seen and heard, then the verdict: a small model compares what it has said."""
    word = "yes" if belong else "no"
    answer = f"The picture shows {shown} and the sound is {heard}, so {word}."
    questions = _ANIMAL_QUESTIONS if animal and rng.random() < 0.3 else _QUESTIONS
    return Turn(pick(rng, questions), answer, "belong", media, ("yes", "no"), (word,))

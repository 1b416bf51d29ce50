"""A clip of a class, and the sentences and questions about it that are true."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mico_training.world import synth
from mico_training.world.sample import Split, Turn
from mico_training.world.soundbank import SoundBank
from mico_training.world.soundnames import article, confusable, sound_names
from mico_training.world.synth import Signal

Rng = np.random.Generator
AUDIO = "audio.flac"
KINDS = ("an animal", "an instrument", "something else")
_ANY = (
    "What do you hear?",
    "What makes this sound?",
    "What is this sound?",
    "What can be heard?",
    "Name the sound.",
    "What is making this noise?",
    "Listen: what is it?",
    "Which sound is this?",
)
_INSTRUMENT = (
    "Which instrument is this?",
    "Which instrument is playing?",
    "What instrument do you hear?",
    "Name the instrument.",
)
_ANIMAL = (
    "Which animal is this?",
    "Which animal makes this sound?",
    "What animal do you hear?",
    "Name the animal that you hear.",
)
DESCRIBE = ("Describe the sound.", "Describe what you hear.", "What happens in this recording?")


def pick(rng: Rng, options: Sequence[str]) -> str:
    """One of ``options``, evenly."""
    return options[int(rng.integers(len(options)))]


def sentence(text: str) -> str:
    """``text`` with a capital and a full stop."""
    return f"{text[0].upper()}{text[1:]}."


def yes_no(question: str, yes: bool, skill: str, media: tuple[str, ...], why: str = "") -> Turn:
    """A turn answered by yes or no, perhaps with a reason."""
    word = "Yes" if yes else "No"
    answer = f"{word}, {why}." if why else f"{word}."
    return Turn(question, answer, skill, media, ("yes", "no"), (word.lower(),))


def it_is(name: str) -> str:
    """``"dog"`` -> ``"it is a dog"``."""
    return f"it is {article(name)}"


def render(rng: Rng, bank: SoundBank, split: Split, name: str, seconds: float) -> Signal:
    """A clip of ``name`` of about ``seconds``, played at some speed, not yet recorded."""
    _, signal = bank.draw(rng, split, name)
    if rng.random() < 0.6:
        signal = synth.speed(signal, float(rng.uniform(-2.0, 2.0)))
    return synth.extend(rng, signal, seconds, sound_names()[name].steady)


def captions(rng: Rng, name: str) -> tuple[str, ...]:
    """Sentences about a clip of ``name``."""
    sound = sound_names()[name]
    options = (
        sentence(sound.sentence),
        sentence(sound.phrase),
        f"The sound of {sound.phrase}.",
        f"A recording of {sound.phrase}.",
        f"One can hear {sound.phrase}.",
        f"In this recording, {sound.sentence}.",
    )
    order = rng.permutation(len(options))[:3]
    return tuple(options[int(i)] for i in order)


def name_turn(rng: Rng, name: str, media: tuple[str, ...] = (AUDIO,)) -> Turn:
    """What is it? Every answer contains the class."""
    sound = sound_names()[name]
    questions: tuple[str, ...] = _ANY
    if sound.kind == "instrument" and rng.random() < 0.4:
        questions = _INSTRUMENT
    elif sound.kind == "animal" and rng.random() < 0.3:
        questions = _ANIMAL
    answer = sentence(sound.phrase)
    chance = rng.random()
    if chance < 0.25:
        answer = f"This is the sound of {sound.phrase}."
    elif chance < 0.45 and sound.kind in ("animal", "instrument"):
        answer = sentence(it_is(name))
    elif chance < 0.6:
        answer = f"I hear {sound.phrase}."
    return Turn(pick(rng, questions), answer, "sound", media, (), sound.accept)


def kind_turn(name: str) -> Turn:
    """An animal, an instrument or something else?"""
    kind = sound_names()[name].kind
    answer = {"animal": KINDS[0], "instrument": KINDS[1]}.get(kind, KINDS[2])
    question = "Is this an animal, an instrument or something else?"
    accept = (answer.split()[-1],)
    return Turn(question, sentence(answer), "sound_kind", (AUDIO,), KINDS, accept)


def other_name(rng: Rng, name: str, *, same_kind: float) -> str:
    """A class that nobody would take for ``name``; of the same kind with that chance."""
    sounds = sound_names()
    others = [other for other in sounds if not confusable(name, other)]
    alike = [o for o in others if sounds[o].kind == sounds[name].kind]
    return pick(rng, alike if alike and rng.random() < same_kind else others)


def is_it_turn(rng: Rng, name: str) -> Turn:
    """Is this a NAME? Yes half of the time."""
    yes = bool(rng.random() < 0.5)
    asked = name if yes else other_name(rng, name, same_kind=0.5)
    questions = (
        f"Is this {article(asked)}?",
        f"Is this the sound of {sound_names()[asked].phrase}?",
    )
    why = "" if yes or rng.random() < 0.5 else it_is(name)
    return yes_no(pick(rng, questions), yes, "sound", (AUDIO,), why)

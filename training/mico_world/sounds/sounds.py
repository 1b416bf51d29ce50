"""Samples of everyday sounds, alone or with a picture.

A picture belongs to a sound if the thing's name is a name of the sound's class. A sound that does
not belong to a picture is one that nobody could say the thing makes, mostly of another kind. "Yes"
is right for half of the yes/no questions.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from mico_training.data.language.english import (
    Rng,
    article,
    counts,
    number_word,
    pick,
    sentence,
    shuffled,
)
from mico_training.data.sources.written import Sample, Split, Turn
from mico_world import language as en
from mico_world.pictures import compose
from mico_world.sounds import synth
from mico_world.sounds.bank import SoundBank, confusable, sound_bank, sound_names, sounds
from mico_world.sounds.synth import Signal
from mico_world.things.catalogue import Thing, catalogue

AUDIO = "audio.flac"
MEDIA = (AUDIO,)
KINDS = ("an animal", "an instrument", "something else")
Pictures = Mapping[str, tuple[Thing, ...]]  # class -> the things that make it
IMAGE = "image.jpg"
_SAME_KIND = 0.3  # how often a sound that does not belong to the picture is of the same kind


def render(rng: Rng, bank: SoundBank, split: Split, name: str, seconds: float) -> Signal:
    _, signal = bank.draw(rng, split, name)
    if rng.random() < 0.6:
        signal = synth.speed(signal, float(rng.uniform(-2.0, 2.0)))
    return synth.extend(rng, signal, seconds, sound_names()[name].steady)


def captions(rng: Rng, name: str) -> tuple[str, ...]:
    sound = sound_names()[name]
    facts = {"phrase": sound.phrase, "sentence": sound.sentence}
    templates = en.phrases().words["sound captions"]
    return shuffled(rng, *(en.fill(template, **facts) for template in templates))[:3]


def yes_no(rng: Rng, turn: str, name: str, yes: bool, **facts: str) -> Turn:
    """A question about a clip of ``name``; half of the answers "no" say why."""
    why = "" if yes or rng.random() < 0.5 else f", it is {sound_names()[name].one}"
    word = "yes" if yes else "no"
    question = en.ask(rng, turn, **facts)
    return Turn(question, f"{word.title()}{why}.", "sound", MEDIA, ("yes", "no"), (word,))


def name_turn(rng: Rng, name: str) -> Turn:
    sound = sound_names()[name]
    turn = "sound"
    if sound.kind == "instrument" and rng.random() < 0.4:
        turn = "sound of an instrument"
    elif sound.kind == "animal" and rng.random() < 0.3:
        turn = "sound of an animal"
    answer = sentence(sound.phrase)
    chance = rng.random()
    if chance < 0.25:
        answer = f"This is the sound of {sound.phrase}."
    elif chance < 0.45 and sound.kind in ("animal", "instrument"):
        answer = f"It is {sound.one}."
    elif chance < 0.6:
        answer = f"I hear {sound.phrase}."
    return Turn(en.ask(rng, turn), answer, "sound", MEDIA, (), sound.accept)


def is_it_turn(rng: Rng, name: str) -> Turn:
    """Is this a NAME? Half of the time the question is about a class that no clip of NAME fits."""
    classes = sound_names()
    yes = bool(rng.random() < 0.5)
    asked = name
    if not yes:
        others = [other for other in classes if not confusable(name, other)]
        alike = [o for o in others if classes[o].kind == classes[name].kind]
        asked = pick(rng, alike if alike and rng.random() < 0.5 else others)
    one, phrase = classes[asked].one, classes[asked].phrase
    return yes_no(rng, "is it the sound", name, yes, one=one, phrase=phrase)


def _sample(
    split: Split,
    signal: Signal,
    said: Sequence[str],
    turns: Sequence[Turn],
    concept: str | None = None,
    **truth: Any,
) -> Sample:
    files, concepts = {AUDIO: synth.flac(signal)}, {AUDIO: concept} if concept else {}
    return Sample("", split, files, {AUDIO: tuple(said)}, tuple(turns), concepts, truth)


def make_single(rng: Rng, split: Split, bank: SoundBank) -> Sample:
    name = bank.draw_name(rng, split)
    signal = synth.record(rng, render(rng, bank, split, name, float(rng.uniform(1.5, 5.0))))
    said = captions(rng, name)
    turns = [name_turn(rng, name), is_it_turn(rng, name)]
    if rng.random() < 0.5:
        kinds = {"animal": KINDS[0], "instrument": KINDS[1]}
        kind = kinds.get(sound_names()[name].kind, KINDS[2])
        texts = (en.ask(rng, "sound kind"), sentence(kind))
        turns.append(Turn(*texts, "sound_kind", MEDIA, KINDS, (kind.split()[-1],)))
    if rng.random() < 0.3:
        accept = sound_names()[name].accept
        turns.append(Turn(en.ask(rng, "describe a sound"), said[0], "sound", MEDIA, (), accept))
    return _sample(split, signal, said, turns, name, sound=name)


def make_speaking(rng: Rng, split: Split, bank: SoundBank) -> Sample:
    others = [n for n in bank.names(split) if not confusable(n, "speech") and n != "laughter"]
    yes = bool(rng.random() < 0.5) and "speech" in bank.names(split)
    name = "speech" if yes else bank.draw_name(rng, split, others)
    signal = synth.record(rng, render(rng, bank, split, name, float(rng.uniform(1.5, 4.0))))
    turns = [yes_no(rng, "speech", name, yes), name_turn(rng, name)]
    return _sample(split, signal, captions(rng, name), turns, name, sound=name)


def make_two(rng: Rng, split: Split, bank: SoundBank) -> Sample:
    first = bank.draw_name(rng, split)
    rest = [n for n in bank.names(split) if not confusable(first, n)]
    second = bank.draw_name(rng, split, rest)
    one, two = sound_names()[first], sound_names()[second]
    apart = bool(rng.random() < 0.5)
    seconds = float(rng.uniform(1.5, 2.8)) if apart else float(rng.uniform(2.5, 5.0))
    a, b = (synth.peak(render(rng, bank, split, n, seconds)) for n in (first, second))
    both = f"{one.phrase} and {two.phrase}"
    if apart:
        signal = np.concatenate([a, b])
        said = (f"first {one.sentence}, then {two.sentence}", f"{one.phrase}, then {two.phrase}")
    else:
        signal = a + b * np.float32(rng.uniform(0.6, 1.0))
        said = (both, f"{one.sentence} while {two.sentence}")
    question = en.ask(rng, "two sounds")
    turns = [Turn(question, sentence(both), "two_sounds", MEDIA, (), (first, second))]
    if apart:
        end, which = ("last", two) if rng.random() < 0.5 else ("first", one)
        asked = f"What do you hear {end}?"
        turns.append(Turn(asked, sentence(which.phrase), "sound_order", MEDIA, (), which.accept))
    texts = tuple(map(sentence, said))
    signal = synth.record(rng, signal)
    return _sample(split, signal, texts, turns, sounds=[first, second], apart=apart)


def make_count(rng: Rng, split: Split, bank: SoundBank) -> Sample:
    n = int(rng.integers(1, 5))
    sounds: dict[str, Callable[[], Signal]] = {
        "knock": lambda: synth.knock(rng, float(rng.uniform(110, 320))),
        "beep": lambda: synth.beep(float(rng.uniform(400, 2500)), float(rng.uniform(0.08, 0.3))),
        "tick": lambda: synth.tick(rng, float(rng.uniform(1500, 4500))),
    }
    noun = pick(rng, tuple(sounds))
    signal = synth.record(rng, synth.events(rng, sounds[noun](), n))
    word = number_word(n)
    said = f"{word} {noun}{'' if n == 1 else 's'}"
    answer = sentence(word if rng.random() < 0.3 else said)
    question = en.ask(rng, "sound count", sound=noun)
    turns = [Turn(question, answer, "sound_count", MEDIA, counts(4), (word, str(n)))]
    concept = "beep" if noun == "beep" else None
    texts = (sentence(said), f"One can hear {said}.")
    return _sample(split, signal, texts, turns, concept, count=n, event=noun)


def make_change(rng: Rng, split: Split, bank: SoundBank) -> Sample:
    """A pitch that rises or falls, or a sound that gets louder or quieter."""
    up = bool(rng.random() < 0.5)
    seconds = float(rng.uniform(1.0, 3.0))
    if rng.random() < 0.6:
        low = float(rng.uniform(150, 900))
        high = low * 2 ** float(rng.uniform(0.7, 2.2))
        harmonics = (1.0, *rng.uniform(0, 0.6, int(rng.integers(0, 5))).tolist())
        ends = (low, high) if up else (high, low)
        if rng.random() < 0.5:
            signal = synth.sweep(*ends, seconds, harmonics)
        else:
            steps = np.geomspace(*ends, int(rng.integers(3, 7)))
            length = seconds / len(steps)
            signal = np.concatenate([synth.beep(float(f), length, harmonics) for f in steps])
        pairs = (("rising", "falling"), ("up", "down"), ("higher", "lower"))
        skill, question = "pitch", en.ask(rng, "pitch")
        choices = next(pair for pair in pairs if " or ".join(pair) in question)
        accept = (*(pair[0 if up else 1] for pair in pairs), "rises" if up else "falls")
        said = f"a tone with a {accept[0]} pitch"
    else:
        name = bank.draw_name(rng, split)
        signal = render(rng, bank, split, name, seconds + 1.0)
        ramp = np.geomspace(0.03, 1.0, len(signal)).astype(np.float32)
        signal = signal * (ramp if up else ramp[::-1])
        skill, question, choices = "loudness", en.ask(rng, "loudness"), ("louder", "quieter")
        accept = en.accepted(choices[0 if up else 1])
        said = f"{sound_names()[name].phrase}, getting {choices[0 if up else 1]}"
    signal = synth.record(rng, signal)
    answer = sentence(choices[0 if up else 1])
    turns = [Turn(question, answer, skill, MEDIA, choices, accept)]
    return _sample(split, signal, (sentence(said),), turns, None, up=up)


_MAKERS = (make_single, make_speaking, make_two, make_count, make_change)
_SHARES = np.array((0.66, 0.08, 0.1, 0.08, 0.08))


def make(rng: Rng, split: Split, bank: SoundBank | None = None) -> Sample:
    maker = _MAKERS[int(rng.choice(len(_MAKERS), p=_SHARES / _SHARES.sum()))]
    return maker(rng, split, sound_bank() if bank is None else bank)


def picture_words(name: str) -> frozenset[str]:
    """The names of things whose picture certainly shows a maker of the sound ``name``."""
    shown_as = {name, sounds().pictured_as.get(name)}
    elsewhere = sounds().not_pictured | sound_names().keys()
    return frozenset(w for w in sound_names()[name].accept if w in shown_as or w not in elsewhere)


@cache
def pictures_of(split: Split) -> dict[str, tuple[Thing, ...]]:
    things = catalogue()
    found: dict[str, tuple[Thing, ...]] = {}
    for name in sound_names():
        words = sorted(picture_words(name)) if name not in sounds().sound_only else []
        able = [t for w in words for t in things.of_name(split, w) if not t.shape]
        if able:
            found[name] = tuple(able)
    return found


def might_make(thing: Thing, name: str) -> bool:
    """Whether somebody could say that ``thing`` makes the sound ``name``. More things can than have
    the ``picture_words``: a penguin is a bird, and a teddy bear growls like a bear."""
    words = {word.lower() for word in thing.accept}
    words |= {word.split()[-1] for word in words}
    makes = [sound.name for sound in sound_names().values() if words & {*sound.accept}]
    return any(confusable(sound, name) for sound in makes)


def make_pair(
    rng: Rng, split: Split, bank: SoundBank | None = None, pictures: Pictures | None = None
) -> Sample:
    """A picture and a sound that belong together half of the time. The defaults of ``bank`` and
    ``pictures`` are those of the source packages."""
    bank = sound_bank() if bank is None else bank
    pictures = pictures_of(split) if pictures is None else pictures
    both = [name for name in bank.names(split) if name in pictures]
    if not both:
        raise ValueError(f"no picture belongs to any sound of {split!r}")
    belong = bool(rng.random() < 0.5)
    seen = bank.draw_name(rng, split, both)
    thing = pick(rng, pictures[seen])
    name = seen if belong else _wrong(rng, bank, split, seen, thing, both)
    signal = render(rng, bank, split, name, float(rng.uniform(1.5, 4.0)))
    shown, heard_is = article(thing.name), sound_names()[name].phrase
    media = (IMAGE, AUDIO) if rng.random() < 0.5 else (AUDIO, IMAGE)
    # The answer names the thing and the sound before "yes" or "no", so that a small model can
    # compare the two names that it has just written.
    yes = "yes" if belong else "no"
    animal = sound_names()[seen].kind == "animal" and rng.random() < 0.3
    question = en.ask(rng, "belong to an animal" if animal else "belong")
    answer = f"The picture shows {shown} and the sound is {heard_is}, so {yes}."
    turns = [Turn(question, answer, "belong", media, ("yes", "no"), (yes,))]
    if rng.random() < 0.5:
        turns.append(name_turn(rng, name))
    if rng.random() < 0.4:
        question = "What is in the picture?"
        turns.append(Turn(question, sentence(shown), "name", (IMAGE,), (), thing.accept))
    if rng.random() < 0.3:
        answer = f"The picture shows {shown}, and the sound is {heard_is}."
        question = "What do you see and what do you hear?"
        turns.append(Turn(question, answer, "see_and_hear", media, (), (thing.name, name)))
    _, rgba = compose.dress(rng, thing, None, 0.0)  # one large thing on a simple background
    size = float(rng.uniform(0.6, 0.92))
    x, y = rng.uniform(0.42, 0.58, 2).tolist()
    scene = compose.render(rng, [compose.Item(thing, None, rgba, x, y, size)])
    picture = compose.jpeg(rng, scene.pixels)
    files = {IMAGE: picture, AUDIO: synth.flac(synth.record(rng, signal))}
    said = {IMAGE: (f"A picture of {shown}.", sentence(shown)), AUDIO: captions(rng, name)}
    concepts = {IMAGE: thing.name, AUDIO: name}
    truth = {"belong": belong, "thing": thing.name, "sound": name}
    return Sample("", split, files, said, tuple(turns), concepts, truth)


def _wrong(
    rng: Rng, bank: SoundBank, split: Split, seen: str, thing: Thing, pictured: Sequence[str]
) -> str:
    """A sound that ``thing``, which shows a ``seen``, cannot make. If possible it is pictured too:
    otherwise the sound alone would give the answer "no" away."""

    def wrong(name: str) -> bool:
        return not confusable(seen, name) and not might_make(thing, name)

    pool = list(filter(wrong, pictured)) or list(filter(wrong, bank.names(split)))
    if not pool:
        raise ValueError(f"every sound of {split!r} could be made by a {thing.name}")
    kinds = {name: sound_names()[name].kind for name in (seen, *pool)}
    same = rng.random() < _SAME_KIND
    preferred = [name for name in pool if (kinds[name] == kinds[seen]) == same]
    return bank.draw_name(rng, split, preferred or pool)

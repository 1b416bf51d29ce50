"""Samples of everyday sounds: what one hears, who makes it, how often, how it changes.

``make`` gives a sound alone, ``make_pair`` a picture with a sound. Answers are true by
construction; "yes" is right for half of the yes/no questions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mico_training.world import synth
from mico_training.world.sample import Sample, Split, Turn
from mico_training.world.sound_pictures import make_pair
from mico_training.world.sound_turns import (
    AUDIO,
    DESCRIBE,
    Rng,
    captions,
    is_it_turn,
    it_is,
    kind_turn,
    name_turn,
    pick,
    render,
    sentence,
    yes_no,
)
from mico_training.world.soundbank import SoundBank, sound_bank
from mico_training.world.soundnames import class_names, confusable, sound_names
from mico_training.world.synth import Signal

__all__ = ["class_names", "make", "make_pair"]

NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}


def _sample(
    rng: Rng,
    split: Split,
    signal: Signal,
    said: tuple[str, ...],
    turns: Sequence[Turn],
    concept: str | None = None,
    **truth: Any,
) -> Sample:
    return Sample(
        id=f"sound-{int(rng.integers(2**48)):012x}",
        split=split,
        files={AUDIO: synth.flac(signal)},
        captions={AUDIO: said},
        turns=tuple(turns),
        concepts={} if concept is None else {AUDIO: concept},
        truth=truth,
    )


def make_single(rng: Rng, split: Split, bank: SoundBank) -> Sample:
    """One sound: its name, kind and a yes/no question."""
    name = bank.draw_name(rng, split)
    signal = synth.record(rng, render(rng, bank, split, name, float(rng.uniform(1.5, 5.0))))
    said = captions(rng, name)
    turns = [name_turn(rng, name), is_it_turn(rng, name)]
    if rng.random() < 0.5:
        turns.append(kind_turn(name))
    if rng.random() < 0.3:
        accept = sound_names()[name].accept
        turns.append(Turn(pick(rng, DESCRIBE), said[0], "sound", (AUDIO,), (), accept))
    return _sample(rng, split, signal, said, turns, name, sound=name)


def make_speaking(rng: Rng, split: Split, bank: SoundBank) -> Sample:
    """Is somebody speaking? Yes half of the time."""
    others = [n for n in bank.names(split) if not confusable(n, "speech") and n != "laughter"]
    yes = bool(rng.random() < 0.5) and "speech" in bank.names(split)
    name = "speech" if yes else bank.draw_name(rng, split, others)
    signal = synth.record(rng, render(rng, bank, split, name, float(rng.uniform(1.5, 4.0))))
    questions = ("Is somebody speaking?", "Do you hear speech?", "Does anybody talk here?")
    why = "" if yes or rng.random() < 0.5 else it_is(name)
    turns = [yes_no(pick(rng, questions), yes, "sound", (AUDIO,), why), name_turn(rng, name)]
    return _sample(rng, split, signal, captions(rng, name), turns, name, sound=name)


def make_two(rng: Rng, split: Split, bank: SoundBank) -> Sample:
    """Two sounds, at once or one after the other."""
    first = bank.draw_name(rng, split)
    rest = [n for n in bank.names(split) if not confusable(first, n)]
    second = bank.draw_name(rng, split, rest)
    names = sound_names()
    one, two = names[first], names[second]
    apart = bool(rng.random() < 0.5)
    seconds = float(rng.uniform(1.5, 2.8)) if apart else float(rng.uniform(2.5, 5.0))
    a, b = (synth.peak(render(rng, bank, split, n, seconds)) for n in (first, second))
    if apart:
        signal = np.concatenate([a, b])
        said = (
            sentence(f"first {one.sentence}, then {two.sentence}"),
            sentence(f"{one.phrase}, then {two.phrase}"),
        )
    else:
        signal = a + b * np.float32(rng.uniform(0.6, 1.0))
        said = (
            sentence(f"{one.phrase} and {two.phrase}"),
            sentence(f"{one.sentence} while {two.sentence}"),
        )
    media = (AUDIO,)
    both = f"{one.phrase} and {two.phrase}"
    question = pick(rng, ("Which two sounds are these?", "Which two sounds do you hear?"))
    turns = [Turn(question, sentence(both), "two_sounds", media, (), (first, second))]
    if apart:
        last = bool(rng.random() < 0.5)
        which = two if last else one
        asked = f"What do you hear {'last' if last else 'first'}?"
        turns.append(Turn(asked, sentence(which.phrase), "sound_order", media, (), which.accept))
    truth = {"sounds": [first, second], "apart": apart}
    return _sample(rng, split, synth.record(rng, signal), said, turns, None, **truth)


def make_count(rng: Rng, split: Split, bank: SoundBank) -> Sample:
    """One to four knocks, beeps, drum beats or barks, exactly."""
    n = int(rng.integers(1, 5))
    sounds: dict[str, Callable[[], Signal]] = {
        "knock": lambda: synth.knock(rng, float(rng.uniform(110, 320))),
        "beep": lambda: synth.beep(float(rng.uniform(400, 2500)), float(rng.uniform(0.08, 0.3))),
        "tick": lambda: synth.tick(rng, float(rng.uniform(1500, 4500))),
    }
    noun = pick(rng, tuple(sounds))
    signal = synth.record(rng, synth.events(rng, sounds[noun](), n))
    many = f"{noun}s"
    said = f"{NUMBERS[n]} {noun if n == 1 else many}"
    questions = (
        f"How many {many} do you hear?",
        f"How often do you hear a {noun}?",
        f"Count the {many}.",
    )
    answer = sentence(NUMBERS[n] if rng.random() < 0.3 else said)
    question = pick(rng, questions)
    choices = tuple(NUMBERS.values())
    turns = [Turn(question, answer, "sound_count", (AUDIO,), choices, (NUMBERS[n], str(n)))]
    concept = "beep" if noun == "beep" else None
    captions_ = (sentence(said), f"One can hear {said}.")
    return _sample(rng, split, signal, captions_, turns, concept, count=n, event=noun)


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
            tones = [synth.beep(float(f), seconds / len(steps), harmonics) for f in steps]
            signal = np.concatenate(tones)
        word = "rising" if up else "falling"
        questions = (
            "Is the pitch rising or falling?",
            "Does the tone go up or down?",
            "Does the sound get higher or lower?",
        )
        pairs = (("rising", "falling"), ("up", "down"), ("higher", "lower"))
        i = int(rng.integers(len(questions)))
        skill, said = "pitch", f"a tone with a {word} pitch"
        question, choices = questions[i], pairs[i]
        answer = choices[0] if up else choices[1]
        accept = tuple(pair[0 if up else 1] for pair in pairs) + (("rises",) if up else ("falls",))
    else:
        name = bank.draw_name(rng, split)
        signal = render(rng, bank, split, name, seconds + 1.0)
        ramp = np.geomspace(0.03, 1.0, len(signal)).astype(np.float32)
        signal = signal * (ramp if up else ramp[::-1])
        choices = ("louder", "quieter")
        answer = choices[0] if up else choices[1]
        skill, question = "loudness", "Does the sound get louder or quieter?"
        accept = (answer,) if up else (answer, "softer")
        said = f"{sound_names()[name].phrase}, getting {answer}"
    signal = synth.record(rng, signal, quiet_ok=False)
    turns = [Turn(question, sentence(answer), skill, (AUDIO,), choices, accept)]
    return _sample(rng, split, signal, (sentence(said),), turns, None, up=up)


_MAKERS: tuple[tuple[float, Callable[[Rng, Split, SoundBank], Sample]], ...] = (
    (0.66, make_single),
    (0.08, make_speaking),
    (0.1, make_two),
    (0.08, make_count),
    (0.08, make_change),
)


def make(rng: Rng, split: Split, bank: SoundBank | None = None) -> Sample:
    """A sample with one sound; ``bank`` defaults to that of the source packages."""
    bank = sound_bank() if bank is None else bank
    shares = np.array([share for share, _ in _MAKERS])
    maker = _MAKERS[int(rng.choice(len(_MAKERS), p=shares / shares.sum()))][1]
    return maker(rng, split, bank)

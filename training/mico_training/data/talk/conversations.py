"""Stage 3's conversations: finished ones, a sample's questions, and those of a kind of question.

Those of a kind may have media of several samples. A question refers to one of several media only
where it is clear which one is meant, and its answer is what that medium's sample says.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple, TypeVar

from mico_chat.errors import DataError
from mico_chat.media import MediaFile
from mico_chat.media.kinds import Kind
from mico_chat.media.medium import MeasuredMedium, Words
from mico_chat.messages import Message
from mico_chat.model.processing import IGNORED, MicoChatProcessor
from mico_training.data.examples import ChatDataset, ChatExample, Place
from mico_training.data.language import english
from mico_training.data.language.english import Rng, article, pick, sentence
from mico_training.data.mixture import DrawnDataset
from mico_training.data.sources.sample import TrainingSample
from mico_training.data.sources.written import Turn
from mico_training.data.talk.kinds import SMALL_TALK, Fitting, table
from mico_training.data.talk.words import CASES, SHARES, WAYS, drawn_words, words_turn
from mico_training.recipe import QuestionKind

T = TypeVar("T")
Asked = tuple[TrainingSample, Turn]

TRIES = 256  # samples that are looked at for one that fits, about 0.1 ms each
NAMING, BACK, TEXT, LATER, ALIKE = 0.7, 0.4, 0.25, 0.3, 0.8
"""How often a new medium is to be named, a turn is about an older medium or about none, words are
asked for a turn later, and two pictures of the same thing are looked for, which are rare."""
MANY = re.compile(r"\b(things|objects|items)\b")


@dataclass
class Talk:
    """A conversation that grows by turns; ``near`` draws samples for further media.

    ``named``: whether the last question was what is in a medium.
    """

    rng: Rng
    near: Callable[[], TrainingSample]
    most: int
    messages: list[Message] = field(default_factory=list)
    shown: list[Place] = field(default_factory=list)
    words: list[Words] = field(default_factory=list)
    named: bool = False

    def __len__(self) -> int:
        return len(self.messages) // 2

    @property
    def media(self) -> list[MediaFile]:
        return [sample.media[key] for sample, key in self.shown]

    def say(self, question: str, answer: str, *new: Place, words: Words | None = None) -> None:
        """A turn that shows new media, with these words in them."""
        self.shown += new
        self.words += [words or Words()] * len(new)
        media = (sample.media[key] for sample, key in new)
        self.messages += [Message.user(*media, question), Message.assistant(answer)]

    def ask(self, sample: TrainingSample, turn: Turn, question: str = "") -> None:
        """A question of a sample, perhaps in other words; its media are shown if they are new."""
        new = [(sample, key) for key in turn.media if sample.media[key] not in self.media]
        self.say(question or turn.question, turn.answer, *new)
        self.named = names_a_medium(turn)

    def ask_some(self, sample: TrainingSample, turns: Sequence[Turn], most: int) -> None:
        """At most so many turns of a sample, in random order, without those that are unclear."""
        for place in self.rng.permutation(len(turns)):
            turn = turns[int(place)]
            if len(self) < most and self._clear([sample.media[key] for key in turn.media]):
                self.ask(sample, turn)

    def _clear(self, media: Sequence[MediaFile]) -> bool:
        """Whether a question about ``media`` is unambiguous, given the media already shown."""
        old = [medium for medium in media if medium in self.media]
        kinds = {medium.kind for medium in media}
        related = [medium for medium in self.media if medium.kind in kinds]
        return not old or (related == old and list(media[: len(old)]) == old)

    def find(self, fits: Callable[[TrainingSample], T | None]) -> T | None:
        """What ``fits`` returns for the first of the samples nearby for which it returns some."""
        known = {sample.place for sample, _ in self.shown}
        others = (other for _ in range(TRIES) if (other := self.near()).place not in known)
        return next((one for one in map(fits, others) if one is not None), None)

    def turn_of(
        self, fitting: Fitting, fits: Callable[[Turn], bool] | None, sample: TrainingSample
    ) -> Asked | None:
        """One of a sample's questions of a kind that ``fits``."""
        turns = [*filter(fits or bool, fitting.turns(sample))]
        return (sample, pick(self.rng, turns)) if turns else None

    def chat(self) -> None:
        """A finished conversation without media from another sample, if there is one nearby."""
        self.messages += (
            self.find(lambda one: None if one.media else one.conversation or None) or ()
        )
        self.named = False

    def phrase(self, texts: Sequence[str], **gaps: str) -> str:
        return sentence(pick(self.rng, texts).format(**gaps))

    def coin(self, chance: float = 0.5) -> bool:
        return bool(self.rng.random() < chance)

    def noun(self, kind: Kind) -> str:
        return pick(self.rng, table().nouns[kind])


def names_a_medium(turn: Turn) -> bool:
    return turn.skill in table().naming and len(turn.media) == 1 and not turn.choices


def name_in(sample: TrainingSample, key: str) -> str:
    """What is in a medium, as an answer that stays right when another one is there; "": unknown."""
    concept = sample.concepts.get(key, "").strip()
    if concept and sample.media[key].kind != "audio":  # "dog" is no sound
        return sentence(article(concept))
    own = (t.answer for t in sample.turns if names_a_medium(t) and t.media == (key,))
    return next((answer for answer in own if not answer.startswith(("This", "These"))), "")


# --- what each kind asks --------------------------------------------------------------------------


def _of_skills(talk: Talk, sample: TrainingSample, fitting: Fitting) -> None:
    talk.ask_some(sample, fitting.turns(sample), int(talk.rng.integers(1, talk.most + 1)))


def _present(talk: Talk, sample: TrainingSample, fitting: Fitting) -> None:
    """One question whose answer is yes as often as no."""
    yes = talk.coin()
    fits = partial(talk.turn_of, fitting, lambda t: t.answer.lower().startswith("yes") == yes)
    if found := fits(sample) or talk.find(fits):
        talk.ask(*found)


def _words(talk: Talk, sample: TrainingSample, fitting: Fitting) -> None:
    """Words in a medium, which the answers repeat exactly, also later; or there are none."""
    key = pick(talk.rng, fitting.turns(sample)).media[0]
    own = [turn for turn in fitting.turns(sample) if turn.media == (key,)]
    kind, which = sample.media[key].kind, ""
    way, case = WAYS[kind], str(talk.rng.choice(CASES, p=SHARES))
    words = Words() if case == "nothing" else drawn_words(talk.rng, way, kind)
    if case == "own":
        talk.ask_some(sample, own, talk.most)
        talk.words = [words]
        return
    sort = case if case == "heard" and way == "spoken" else way
    asked = words_turn(talk.rng, sort, kind, words)
    if way == "written" and talk.coin(LATER):  # first something else, then the words
        talk.ask(sample, pick(talk.rng, own))
        talk.words = [words]
        talk.say(*asked)
    else:
        talk.say(*asked, (sample, key), words=words)
    if case == "nothing" or len(talk) + 2 > talk.most or talk.coin():
        return
    found = talk.find(partial(talk.turn_of, fitting, None)) if talk.coin() else None
    # What speaks is not what the data tell of a sound.
    if way == "spoken" and found is None:
        talk.chat()
    elif found is None:
        known = {message.text for message in talk.messages}
        own = [turn for turn in own if turn.question not in known]
        talk.ask_some(sample, own, talk.most - 1)
    alone = found is None or talk.coin()
    if found is not None:
        other, turn = found
        second = other.media[turn.media[0]].kind
        which = "first " if second == kind else ""
        more = None if alone else drawn_words(talk.rng, WAYS[second], second)
        said = words_turn(talk.rng, WAYS[second], second, more) if more else None
        talk.say(*said or (turn.question, turn.answer), (other, turn.media[0]), words=more)
    sort = f"{way} alone" if alone and talk.coin() else f"{way} before"
    talk.say(*words_turn(talk.rng, sort, kind, words, which))


def _follow_up(talk: Talk, sample: TrainingSample, fitting: Fitting) -> None:
    """Two or more questions about media that are shown once, perhaps with one about none."""
    wanted = int(talk.rng.integers(2, max(talk.most, 2) + 1))
    talk.ask_some(sample, fitting.turns(sample), wanted)
    if len(talk) < 2 or (len(talk) < talk.most and talk.coin(TEXT)):
        talk.chat()


def _new_medium(talk: Talk, sample: TrainingSample, fitting: Fitting) -> None:
    """A medium after another one, with a question about the new one, or about an old one."""
    wanted = int(talk.rng.integers(2, max(talk.most, 2) + 1))
    found = talk.turn_of(fitting, None, sample)
    while found and len(talk) < wanted:
        other, turn = found
        kind, question = other.media[turn.media[0]].kind, ""
        if talk.named and names_a_medium(turn) and talk.coin():
            texts = table().new["same" if kind == talk.media[-1].kind else kind]
            question = pick(talk.rng, texts).format(noun=talk.noun(kind))
        talk.ask(other, turn, question)
        if len(talk) < wanted and talk.coin(BACK):
            _back(talk)
        found = talk.find(
            partial(talk.turn_of, fitting, names_a_medium if talk.coin(NAMING) else None)
        )


def _back(talk: Talk) -> None:
    """A question what was in a medium that is not the last one: the only, or the nth of a kind."""
    ordinals = table().ordinals
    old = [n for n, place in enumerate(talk.shown[:-1][: len(ordinals)]) if name_in(*place)]
    if old:
        number = pick(talk.rng, old)
        kind = talk.media[number].kind
        alike = [n for n, medium in enumerate(talk.media) if medium.kind == kind]
        which = f"{ordinals[alike.index(number)]} " if len(alike) > 1 else ""
        texts = table().old["heard" if kind == "audio" else "seen"]
        texts += table().old["begun"] if number == 0 else ()
        question = pick(talk.rng, texts).format(noun=which + talk.noun(kind))
        talk.say(question, name_in(*talk.shown[number]))
        talk.named = True


def _absent_medium(talk: Talk, sample: TrainingSample, fitting: Fitting) -> None:
    """A question about a kind of medium that is not there, which may come after it."""
    turn = pick(talk.rng, fitting.turns(sample))
    kind = sample.media[turn.media[0]].kind
    alike = {kind, *table().looks_like[kind]}

    def apart(other: TrainingSample) -> Asked | None:
        turns = [t for t in fitting.turns(other) if other.media[t.media[0]].kind not in alike]
        return (other, pick(talk.rng, turns)) if turns else None

    found, new = talk.find(apart) if talk.coin() else None, list[Place]()
    if found and talk.coin():
        talk.ask(*found)
    elif found:  # it is shown with the question about what is not there
        new = [(found[0], found[1].media[0])]
    elif talk.coin(TEXT):
        talk.chat()
    own = not talk.messages and not new and talk.coin()
    question = pick(talk.rng, table().absent[kind]).format(noun=talk.noun(kind))
    question = turn.question if own else question
    hints = table().hints.items()
    meant = [one for one, words in hints if any(word in question.lower() for word in words)]
    sort = "nothing" if meant != [kind] else "audio answers" if kind == "audio" else "answers"
    nouns = table().nouns[kind]
    noun = next((noun for noun in nouns if noun in question.lower()), nouns[0])
    talk.say(question, talk.phrase(table().absent[sort], noun=noun, a=article(noun)), *new)
    if len(talk) < talk.most and talk.coin():
        talk.ask(sample, turn, pick(talk.rng, table().absent["shown"]) if own else "")


class Seen(NamedTuple):
    """What a sample tells of its only picture: "" and 0 are unknown. ``words``: those of all names
    in it; ``whole``: whether all its things are known."""

    place: Place
    name: str
    words: frozenset[str]
    whole: bool
    colour: str
    things: int

    @classmethod
    def of(cls, sample: TrainingSample) -> "Seen | None":
        keys = [key for key, medium in sample.media.items() if medium.kind == "image"]
        if len(keys) != 1:
            return None
        own = [turn for turn in sample.turns if turn.media == (keys[0],)]
        name = sample.concepts.get(keys[0], "").strip()
        named = [region for region in sample.regions.get(keys[0], ()) if region.name]
        names = [name, *(region.name for region in named)]
        names += [word for turn in own if names_a_medium(turn) for word in turn.accept]
        said = named[0].words if len(named) == 1 else ()
        colour = next((word for word in said if word in english.nouns().colours), "")
        many = next((t.accept for t in own if t.skill == "count" and MANY.search(t.question)), ())
        things = sum(n for n, word in enumerate(english.nouns().numbers) if word in many)
        words = frozenset(" ".join(names).lower().split())
        return cls((sample, keys[0]), name, words, bool(named), colour, things)

    def allows(self, sort: str, yes: bool, other: "Seen") -> bool:
        """Whether the answer to a comparison with another picture is yes, or the first one."""
        differ = bool(self.name and other.name) and not self.words & other.words
        if sort == "which":  # the other one certainly does not show it
            return differ and (other if yes else self).whole
        if sort == "same":
            return bool(self.name) and self.name == other.name if yes else differ
        if sort == "colour":
            return bool(self.colour and other.colour) and (self.colour == other.colour) is yes
        return 0 not in (self.things, other.things, self.things - other.things) and (
            (self.things > other.things) is yes
        )


def _compare(talk: Talk, sample: TrainingSample, fitting: Fitting) -> None:
    """Two media in one question: whether they belong together, or what two pictures show."""
    belong = [turn for turn in sample.turns if turn.skill in ("belong", "see_and_hear")]
    talk.ask_some(sample, belong, 2)
    for sort in () if belong else (pick(talk.rng, ("same", "which", "colour", "more")), "which"):
        yes = talk.coin(ALIKE if sort == "same" else 0.5)
        if two := _pair(talk, sample, sort, yes):
            own, key = two[0].place
            naming = [t for t in own.turns if names_a_medium(t) and t.media == (key,)]
            if naming and talk.coin():
                talk.ask(own, pick(talk.rng, naming))
            new = [one.place for one in two][len(talk) :]
            talk.say(*_compared(talk, sort, yes, *two), *new)
            yes = talk.coin()
            if sort != "which" and len(talk) < talk.most and two[0].allows("which", yes, two[1]):
                talk.say(*_compared(talk, "which", yes, *two))
            break


def _pair(talk: Talk, sample: TrainingSample, sort: str, yes: bool) -> tuple[Seen, Seen] | None:
    """Two pictures with which the answer to a sort of comparison is yes, or the first one."""

    def able(one: TrainingSample) -> Seen | None:
        seen = Seen.of(one)
        known = seen and {"colour": seen.colour, "more": seen.things}.get(sort, seen.name)
        return seen if known else None

    def fits(one: TrainingSample) -> Seen | None:
        seen = Seen.of(one) if first and one.place != first.place[0].place else None
        return seen if seen and first and first.allows(sort, yes, seen) else None

    first = able(sample) or talk.find(able)
    second = talk.find(fits) if first else None
    return (first, second) if first and second else None


def _compared(talk: Talk, sort: str, yes: bool, first: Seen, second: Seen) -> tuple[str, str]:
    said = names = [article(one.name) if one.name else "" for one in (first, second)]
    if sort == "colour":
        said = [first.colour, second.colour]
    elif sort == "more":
        numbers = [english.number_word(one.things) for one in (first, second)]
        said = [f"{number} thing{'s' * (number != 'one')}" for number in numbers]
    end = "one" if sort in ("which", "more") else "yes" if yes else "no"
    gaps = {"noun": talk.noun("image"), "ordinal": table().ordinals[not yes], "x": names[not yes]}
    gaps |= {"a": said[0], "b": said[1]}
    texts = table().compare
    return talk.phrase(texts[sort], **gaps), talk.phrase(texts[f"{sort} {end}"], **gaps)


MAKERS: dict[QuestionKind, Callable[[Talk, TrainingSample, Fitting], None]] = {
    **{"present": _present, "words": _words, "compare": _compare},
    **{"follow_up": _follow_up, "new_medium": _new_medium, "absent_medium": _absent_medium},
}


@dataclass(frozen=True)
class ConversationDataset(DrawnDataset):
    """Stage 3: a finished conversation, or one of questions; where the draw has a kind, of that.

    ``given``: the probability, at the first draw, that things are given; it falls to 0 until the
    last one.
    """

    max_turns: int
    given: float = 0.0

    def __getitem__(self, draw: int) -> ChatExample:
        return replace(self._drawn(draw), seed=self.mixture.seed_of(draw))

    def _drawn(self, draw: int) -> ChatExample:
        sample, kind = self.mixture.sample(draw), self.mixture.kind(draw)
        if sample.conversation and kind in (None, SMALL_TALK):
            said = sample.conversation
            return ChatExample(sample.id, said, rejected=sample.rejected, kind=kind)
        rng = self.mixture.generator(draw)
        talk = Talk(rng, partial(self.mixture.near, draw, rng), self.max_turns)
        if kind is not None:
            MAKERS.get(kind, _of_skills)(talk, sample, table().kinds[kind])
        if not talk.messages:
            talk.ask_some(sample, sample.turns, int(rng.integers(1, self.max_turns + 1)))
        example = ChatExample(
            sample.id,
            tuple(talk.messages),
            words=tuple(talk.words),
            places=tuple(one.place for one, _ in talk.shown),
            kind=kind,
        )
        regions = tuple(one.regions.get(key, ()) for one, key in talk.shown)
        share = self.given * (1 - draw / self.draws)
        known = bool(regions) and all(regions)
        if not known or self.mixture.generator(draw, purpose=6).random() >= share:
            return example
        return replace(example, regions=regions, given=True)


def shares(examples: ChatDataset, processor: MicoChatProcessor, n: int) -> list[str]:
    """A line for each kind: its share of ``n`` conversations, and of the tokens with a loss."""
    talks, tokens = Counter[str](), Counter[str]()
    for draw in range(min(n, len(examples))):
        try:
            example = examples[draw]
        except (DataError, OSError):  # another one replaces it when it is taken
            continue
        media = [MeasuredMedium(medium.kind, 1) for medium in example.media]
        labels = processor.tokenize(example.messages, False, media)[1]
        talks[example.kind or "others"] += 1
        tokens[example.kind or "others"] += len(labels) - labels.count(IGNORED)
    return [
        f"{kind}: {100 * talks[kind] / talks.total():.1f} % of the conversations, "
        f"{100 * tokens[kind] / tokens.total():.1f} % of the tokens with a loss"
        for kind in sorted(talks)
    ]

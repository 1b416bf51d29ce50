"""The example of each draw: a context with a caption (stage 1), a conversation (stages 2 and 3).

Draw ``i`` depends on the seed and ``i`` alone, so that a run resumes at the exact sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import yaml

from mico_chat.errors import DataError
from mico_chat.media import KINDS, MediaFile
from mico_chat.media.kinds import TABLE
from mico_chat.media.medium import Words
from mico_chat.messages import Message
from mico_training.data.language.english import article
from mico_training.data.mixture import DrawnDataset, Mixture
from mico_training.data.order import Integers
from mico_training.data.sources.sample import Region, TrainingSample
from mico_training.recipe import QuestionKind

CORPORA = {kind: row for row, kind in enumerate(KINDS, start=1)}
"""The row of E_Sam for the corpus of texts and media of a kind, as in the paper: E_Sam^T-I is that
of texts and images. So a checkpoint means the same under every recipe."""

PARTNER_TRIES = 8


@dataclass(frozen=True)
class ContextExample:
    """The media of a row, the main thing in each ("" = unknown), and their captions.

    ``joint``: each medium is of a corpus of its own, and has the caption of the same place. With a
    ``question``, the caption is the answer. ``simulated``: the number of the concept name that the
    one picture is taken for, or -1. ``seed``: of the random frames and slices of its media; None
    takes the middle ones. ``subtitle``: that of the sample, or "".
    ``references``: all captions of the media. ``places``: where the sample of each medium is
    (:class:`TrainingSample`). ``fused``: captions that tell of several media.
    """

    media: tuple[MediaFile, ...]
    concepts: tuple[str, ...]
    captions: tuple[str, ...]
    joint: bool = False
    regions: tuple[tuple[Region, ...], ...] = ()
    question: str = ""
    simulated: int = -1
    seed: int | None = None
    subtitle: str = ""
    references: tuple[str, ...] = ()
    places: tuple[tuple[int, int], ...] = ()
    fused: frozenset[str] = frozenset()


@dataclass(frozen=True)
class ContextDataset(DrawnDataset):
    """Contexts by draw: a random subset of a sample's media, or media of several corpora.

    ``drop`` is the probability to leave out each medium but one, and the subtitle, which media of
    several corpora never have; ``cross_corpus`` the probability
    to join a medium with other kinds of media, each of another sample; at most ``most_corpora``.
    """

    drop: float
    cross_corpus: float
    most_corpora: int = 3

    def __getitem__(self, draw: int) -> ContextExample:
        return replace(self._drawn(draw), seed=self.mixture.seed_of(draw))

    def _drawn(self, draw: int) -> ContextExample:
        generator = self.mixture.generator(draw)
        sample = self.mixture.sample(draw)
        if generator.random() < self.cross_corpus:
            joint = self._cross(sample, draw, generator)
            if joint is not None:
                return joint
        captioned = [key for key in sample.media if sample.captions.get(key)]
        anchor = captioned[int(generator.integers(len(captioned)))]
        kept = [key for key in sample.media if key == anchor or generator.random() >= self.drop]
        places = [(sample, key) for key in kept]
        example = _context(places, _captions(places, generator))  # eq. (2)
        if sample.subtitle and generator.random() >= self.drop:
            return replace(example, subtitle=sample.subtitle)
        return example

    def _cross(
        self, sample: TrainingSample, draw: int, generator: np.random.Generator
    ) -> ContextExample | None:
        """A medium of each of several corpora in one context (eq. 3), or None without a partner.

        Their number is drawn from 2 to ``most_corpora``; it is less where partners lack.
        """
        wanted = int(generator.integers(2, self.most_corpora + 1))
        places: list[Place] = []
        for _ in range(1 + PARTNER_TRIES * (wanted - 1)):
            kinds = {other.media[key].kind for other, key in places}
            keys = [
                key
                for key, medium in sample.media.items()
                if medium.kind not in kinds and sample.captions.get(key)
            ]
            if keys and sample.id not in {other.id for other, _ in places}:
                places.append((sample, keys[int(generator.integers(len(keys)))]))
            if len(places) == wanted:
                break
            sample = self.mixture.near(draw, generator)
        captions = tuple(" ".join(_captions([place], generator)) for place in places)
        return _context(places, captions, joint=True) if len(places) > 1 else None


class QuestionDataset(DrawnDataset):
    """Questions about media with one of their answers, by draw (appendix B.2)."""

    def __getitem__(self, draw: int) -> ContextExample:
        sample = self.mixture.sample(draw)
        turns = [turn for turn in sample.turns if turn.media]
        if not turns:
            raise DataError(sample.id, None, "none of its questions is about a medium")
        turn = turns[int(self.mixture.generator(draw).integers(len(turns)))]
        return ContextExample(
            media=tuple(sample.media[key] for key in turn.media),
            concepts=tuple(sample.concepts.get(key, "") for key in turn.media),
            captions=(turn.answer,),
            regions=((),) * len(turn.media),
            question=turn.question,
            seed=self.mixture.seed_of(draw),
            subtitle=sample.subtitle,
        )


Place = tuple[TrainingSample, str]


def _context(
    places: Sequence[Place], captions: tuple[str, ...], joint: bool = False
) -> ContextExample:
    return ContextExample(
        media=tuple(sample.media[key] for sample, key in places),
        concepts=tuple(sample.concepts.get(key, "") for sample, key in places),
        captions=captions,
        joint=joint,
        regions=tuple(sample.regions.get(key, ()) for sample, key in places),
        references=tuple(c for sample, key in places for c in sample.captions.get(key, ())),
        places=tuple(sample.place for sample, _ in places),
        fused=frozenset().union(*(sample.fused for sample, _ in places)),
    )


def _captions(places: Sequence[Place], generator: np.random.Generator) -> tuple[str, ...]:
    known = [captions for sample, key in places if (captions := sample.captions.get(key))]
    drawn = [captions[int(generator.integers(len(captions)))].strip() for captions in known]
    return tuple(dict.fromkeys(filter(None, drawn)))


_PROMPTS = yaml.safe_load(Path(__file__).with_name("prompts.yaml").read_text(encoding="utf-8"))
INSTRUCTIONS: dict[str, list[str]] = _PROMPTS["describe"]
NAMING: dict[str, list[str]] = _PROMPTS["name"]
ASKED_EXACTLY, UNSURE = 0.5, 0.35
"""How often a simulated name is also asked for exactly, and how often it is unsure."""


@dataclass(frozen=True)
class ChatExample:
    """A conversation whose media are files.

    ``simulated``: the number of the concept name that its one medium is taken for, or -1;
    ``unsure``: that of the name that it may be as well, or -1. ``regions``: those of each medium,
    where the stage asks for them; ``given``: they are said to the language model instead of what
    the encoder sees. ``words``: what is recognised in each medium; the media behind the end have no
    words. ``seed``, ``places``: see :class:`ContextExample`. ``rejected``: the conversation with an
    answer that is worse than that of ``messages``. ``kind``: the kind of question that it was drawn
    for, if it was for one.
    """

    id: str
    messages: tuple[Message, ...]
    simulated: int = -1
    unsure: int = -1
    regions: tuple[tuple[Region, ...], ...] = ()
    given: bool = False
    words: tuple[Words, ...] = ()
    seed: int | None = None
    rejected: tuple[Message, ...] = ()
    places: tuple[tuple[int, int], ...] = ()
    kind: QuestionKind | None = None

    @property
    def media(self) -> tuple[MediaFile, ...]:
        return tuple(file for message in self.messages for file in message.files)


@dataclass(frozen=True)
class CaptionDataset(DrawnDataset):
    """Stage 2: a medium (now and then several) and its caption as the answer to an instruction.

    ``join``: the probability of all captioned media. ``regions``: whether the examples bring them.
    """

    join: float
    regions: bool = False

    def __getitem__(self, draw: int) -> ChatExample:
        generator = self.mixture.generator(draw)
        sample = self.mixture.sample(draw)
        captioned = [key for key in sample.media if sample.captions.get(key)]
        keys = [captioned[int(generator.integers(len(captioned)))]]
        if generator.random() < self.join:
            keys = captioned
        kind = sample.media[keys[0]].kind
        usual = [f"Describe the {TABLE[kind].noun}."]
        choices = INSTRUCTIONS.get(kind if len(keys) == 1 else "several", usual)
        instruction = choices[int(generator.integers(len(choices)))]
        caption = " ".join(_captions([(sample, key) for key in keys], generator))
        return ChatExample(
            id=sample.id,
            messages=(
                Message.user(*(sample.media[key] for key in keys), instruction),
                Message.assistant(caption),
            ),
            regions=tuple(sample.regions.get(key, ()) for key in keys) if self.regions else (),
            # The boxes of a clip are those of its middle frame, which must then be taken.
            seed=None if self.regions else self.mixture.seed_of(draw),
        )


class ChatDataset(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, draw: int) -> ChatExample: ...


@dataclass(frozen=True)
class SimulatedNames:
    """A data set where some examples name a thing or a sound that no training medium has.

    The stem knows 1,000 classes, more than the data engine has pictures of, and a head is surer of
    the sounds that it was fitted on than of others. The language model learns to put the concept
    attention's mix of word vectors into words, for which a posterior is enough: the example shows
    its medium, but its concept tokens get the posterior of a drawn name, visual ones first among
    the ``names``. The answer is the name's ``plain`` one; a second question may ask for the exact
    ``name``. With ``alike``, the names that each one is mistaken for, some answers say two names,
    and that they are not sure. An example for another kind of question stays as it is.
    """

    examples: ChatDataset
    mixture: Mixture
    names: Sequence[str]
    plain: Sequence[str]
    n_visual: int
    probability: float
    alike: Sequence[Sequence[int]] = ()

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, draw: int) -> ChatExample:
        example = self.examples[draw]
        generator = self.mixture.generator(draw, purpose=3)
        shown = [medium for medium in example.media if medium.kind in ("image", "audio")]
        shown.sort(key=lambda medium: (medium.kind == "audio") != (example.kind == "hear"))
        asked = example.kind in (None, "name", "hear")
        if not shown or not asked or generator.random() >= self.probability:
            return example
        medium = shown[0]
        heard = medium.kind == "audio"
        first, end = (self.n_visual, len(self.names)) if heard else (0, self.n_visual)
        if first == end:
            return example
        number = int(generator.integers(first, end))
        said = article if heard else with_article
        name, plain = self.names[number], self.plain[number]

        def drawn(sort: str, **gaps: str) -> str:
            texts = NAMING[sort]
            text = texts[int(generator.integers(len(texts)))].format(**gaps)
            return text[0].upper() + text[1:]

        question = drawn("heard" if heard else "questions")
        unsure = -1
        if len(self.alike) and generator.random() < UNSURE:
            others = [n for n in self.alike[number] if self.plain[n] != plain]
            unsure = others[int(generator.integers(len(others)))] if others else -1
        if unsure >= 0:
            two = {"a": said(plain), "b": said(self.plain[unsure])}
            messages = [Message.user(medium, question), Message.assistant(drawn("unsure", **two))]
        else:
            answer = drawn("sounds" if heard else "answers", name=said(plain))
            messages = [Message.user(medium, question), Message.assistant(answer)]
        if unsure < 0 and plain != name and generator.random() < ASKED_EXACTLY and not heard:
            answer = drawn("exactly", name=said(name))
            messages += [Message.user(drawn("exact", plain=plain)), Message.assistant(answer)]
        changed: dict[str, Any] = {"regions": (), "given": False, "places": (), "words": ()}
        return replace(
            example, messages=tuple(messages), simulated=number, unsure=unsure, **changed
        )


@dataclass(frozen=True)
class SimulatedCaptions:
    """The same for stage 1: some pictures have the caption of a drawn name, and its posterior.

    So the text branch learns all names, and that names count where the grid says nothing.
    """

    examples: ContextDataset
    names: Sequence[str]
    probability: float

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, draw: int) -> ContextExample:
        example = self.examples[draw]
        generator = self.examples.mixture.generator(draw, purpose=3)
        picture = len(example.media) == 1 and example.media[0].kind == "image"
        if not picture or generator.random() >= self.probability:
            return example
        number = int(generator.integers(len(self.names)))
        captions = NAMING["captions"]
        caption = captions[int(generator.integers(len(captions)))]
        said = caption.format(name=with_article(self.names[number]))
        return replace(example, concepts=("",), captions=(said,), regions=((),), simulated=number)


def with_article(name: str) -> str:
    """``"otter"`` -> ``"an otter"``; plurals stay bare."""
    if name.endswith("s") and not name.endswith("ss"):
        return name
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


WINDOW = 8
"""Batches whose conversations are sorted together. With 8 batches of 32, the mini's conversations
are padded to 132 tokens on average; unsorted ones to 190."""

MEDIUM_TOKENS = 36
CHARACTERS = 4  # a token


@dataclass
class GroupedByLength:
    """A data set whose batches hold examples of similar length.

    Each window of draws is sorted by length, and its batches are shuffled by the seed.
    ``batch_size`` counts the examples of a step over all ranks. ``taken``: the data set of the same
    draws that its items come from, if it is not ``examples``.
    """

    examples: ChatDataset
    batch_size: int
    seed: int
    taken: Any = None
    _window: int = -1
    _order: Integers = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, draw: int) -> Any:
        window, place = divmod(draw, WINDOW * self.batch_size)
        if window != self._window:
            self._order = self._sorted(window)
            self._window = window
        return (self.examples if self.taken is None else self.taken)[int(self._order[place])]

    def _sorted(self, window: int) -> Integers:
        first = window * WINDOW * self.batch_size
        last = min(first + WINDOW * self.batch_size, len(self))
        lengths = [self._length(draw) for draw in range(first, last)]
        order = first + np.argsort(lengths, kind="stable")
        batches = np.split(order, range(self.batch_size, len(order), self.batch_size))
        generator = np.random.default_rng((self.seed, 4, window))
        # A last, smaller batch stays last.
        whole = [batch for batch in batches if len(batch) == self.batch_size]
        rest = batches[len(whole) :]
        return np.concatenate([*(whole[i] for i in generator.permutation(len(whole))), *rest])

    def _length(self, draw: int) -> int:
        try:
            return about_tokens(self.examples[draw])
        except (DataError, OSError):  # the draw is replaced when it is taken
            return 0


def about_tokens(example: ChatExample) -> int:
    """A conversation's length, estimated to sort by."""
    text = sum(len(message.text) for message in example.messages)
    text += sum(
        len(one.text)
        for words in example.words
        for one in (words.written or ()) + (words.spoken or ())
    )
    return text // CHARACTERS + MEDIUM_TOKENS * len(example.media)

"""Bad samples: a draw that cannot be read is replaced, and the sample is named and counted.

The draw that stands in for a bad one is a function of the seed, the draw and the attempt alone, so
that all ranks, any number of workers and a resumed run have the same batches. What a worker meets
comes to the main process with the batch, and counts when a step takes it. So an interrupted run
lists in the end what an uninterrupted one does.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from accelerate.utils import gather_object

from mico_chat.errors import DataError, MediaError
from mico_training.data.mixture import Mixture, near
from mico_training.data.sources.sample import Source, bad_of
from mico_training.recipe import DataRecipe

logger = logging.getLogger(__name__)

FILE = "bad-samples.jsonl"
BAD = "bad"  # the key of a batch with what was bad
TRIES = 16  # draws in a row, of which one has to be good
ALWAYS = 5
"""So many samples of a source may be bad, whatever share they are: one of 60 ends no run."""


class BadSample(NamedTuple):
    """The number of its source and its own number there (-1: left out before the run), its id, and
    what is wrong with it."""

    data: int
    number: int
    sample: str
    cause: str


Ready = tuple[Any, list[BadSample]]
"""What a collator prepared of a draw, and what was bad before; None if no draw could be read."""


@dataclass(frozen=True)
class GoodExamples:
    """Examples by draw, which the collator prepares; a bad one is replaced by another.

    ``batch`` is the loader's function for its items.
    """

    examples: Any
    mixture: Mixture
    collator: Any

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, draw: int) -> Ready:
        bad: list[BadSample] = []
        place = draw
        while len(bad) < TRIES:
            found = self._prepared(place)
            if not isinstance(found, BadSample):
                return found, bad
            bad.append(found)
            place = near(draw, self.mixture.generator(draw, 100 + len(bad)))
        return None, bad

    def _prepared(self, draw: int) -> Any:
        example: Any = None
        try:
            example = self.examples[draw]
            return self.collator.prepare(example)
        except (DataError, MediaError, OSError) as error:
            data, _, number = self.mixture.locate(draw)
            if example is None:
                return BadSample(data, number, f"number {number}", str(error))
            for medium, place in zip(example.media, getattr(example, "places", ()), strict=False):
                if medium.name == error.args[0]:  # the context has several samples
                    data, number = place
            return BadSample(data, number, self.mixture.sources[data][number].id, str(error))

    def batch(self, rows: Sequence[Ready]) -> dict[str, Any]:
        bad = [one for _, found in rows for one in found]
        given = [prepared for prepared, _ in rows if prepared is not None]
        batch = self.collator.batch(given) if len(given) == len(rows) else {}
        return {**batch, BAD: bad} if bad else batch


class BadSamples:
    """The bad samples of a run: counted, listed in ``bad-samples.jsonl``, and limited.

    A damaged stretch of a tar counts as one, like each sample that is left out beside it.
    """

    def __init__(
        self, recipes: Sequence[DataRecipe], sources: Sequence[Source], output: Path
    ) -> None:
        self.recipes, self.path, self.writes = recipes, output / FILE, False
        self.skipped = [bad_of(source) for source in sources]
        self.counts = [one.n for one in self.skipped]
        self.sizes = [len(source) + n for source, n in zip(sources, self.counts, strict=True)]
        self.known: set[tuple[int, int]] = set()
        self.first: dict[int, str] = {}
        self._lines: list[str] = []
        self._waiting: list[tuple[int, BadSample]] = []

    def begin(self, step: int, writes: bool) -> None:
        """Begin the file, or forget what it has behind ``step``, where the run goes on.

        One rank ``writes`` it. Raises a DataError as :meth:`settle`.
        """
        for data, skipped in enumerate(self.skipped):
            for file, line, reason in (error.args for error in skipped.errors):
                where = file if line is None else f"{file}:{line}"
                self._add(BadSample(data, -1, where, reason), 0)
            if more := skipped.n - len(skipped.errors):
                self._add(BadSample(data, -1, f"{more} more", "not listed one by one"), 0)
        text = self.path.read_text(encoding="utf-8") if step and self.path.is_file() else ""
        for line in text[: text.rfind("\n") + 1].splitlines():  # the last one may be cut off
            before = json.loads(line)
            if 0 < before["step"] <= step:
                self._add(BadSample(*(before[key] for key in BadSample._fields)), before["step"])
        self.writes = writes
        if writes:
            partial = self.path.with_suffix(".part")  # another rank may be about to read the file
            partial.write_text("".join(self._lines), encoding="utf-8")
            partial.replace(self.path)
            if n := sum(self.counts):
                logger.warning("%d samples are bad; %s lists them", n, self.path)
        self._check()

    def take(self, batches: Sequence[dict[str, Any]], step: int) -> None:
        """Note what was bad in the batches of a step, and remove it from them.

        Raises:
            DataError: the data are to stop at a bad sample, or no draw could be read.
        """
        for batch in batches:
            found: list[BadSample] = batch.pop(BAD, [])
            self._waiting += [(step, bad) for bad in found]
            for bad in found:
                recipe = self.recipes[bad.data]
                if recipe.bad == "stop" or not batch:
                    reason = "" if batch else f"{TRIES} samples in a row are bad, the first: "
                    raise DataError(recipe.path, None, f"{reason}{bad.sample}: {bad.cause}")

    def settle(self) -> int:
        """Count and list what all ranks have noted; returns how many samples have been bad.

        All ranks call this at the same steps. More than ``most_bad`` allows are a DataError.
        """
        found, self._waiting, self._lines = self._waiting, [], []
        for step, bad in sorted(gather_object(found)):
            self._add(bad, step)
        if self.writes and self._lines:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(self._lines)
        self._check()
        return sum(self.counts)

    def _add(self, bad: BadSample, step: int) -> None:
        if bad[:2] in self.known:
            return
        if bad.number >= 0:  # the others are counted
            self.known.add(bad[:2])
            self.counts[bad.data] += 1
        line = {"path": self.recipes[bad.data].path, **bad._asdict(), "step": step}
        self._lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        self.first.setdefault(bad.data, f"{bad.sample}: {bad.cause}")

    def _check(self) -> None:
        for data, (n, size) in enumerate(zip(self.counts, self.sizes, strict=True)):
            recipe, key = self.recipes[data], f"data.{data}.most_bad"
            if n > max(ALWAYS, recipe.most_bad * size):
                reason = (
                    f"{n} of its {size} samples are bad, more than {ALWAYS} and more than the "
                    f"share {key} {recipe.most_bad:g}; {self.path} lists them, the first: "
                    f"{self.first[data]}. Mend or remove them, or set {key} higher"
                )
                raise DataError(recipe.path, None, reason)

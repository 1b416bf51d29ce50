"""An annotator at work on rows: a batch in, the same rows with its annotations out."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict

from mico_chat.errors import MediaError, ModelError
from mico_corpus.describing.base import Annotation, Annotator, Clip, annotator_class
from mico_corpus.places import batched
from mico_corpus.recipe import AnnotatorRecipe
from mico_corpus.rows import Row


class Annotating:
    """Makes the annotator that a recipe names. Rows that have a reason pass by.

    A batch with a clip that cannot be decoded is asked again, clip by clip; the clip itself is
    left out as damaged. Clips that score more than ``unsafe`` are left out too.
    """

    def __init__(self, recipe: AnnotatorRecipe, unsafe: float, images: int = 1) -> None:
        self.recipe = recipe
        self.unsafe = unsafe
        self.images = images
        self.annotator: Annotator = annotator_class(recipe.use)(**recipe.options)

    def __call__(self, rows: Iterable[Row]) -> Iterator[Row]:
        for batch in batched(rows, self.recipe.batch_size):
            kept = [row for row in batch if not row["reason"]]
            start = time.perf_counter()
            clips = [Clip(row, annotations_of(row), images=self.images) for row in kept]
            said = self._ask(clips) if kept else []
            took = (time.perf_counter() - start) / max(1, len(kept))
            for row, found in zip(kept, said, strict=True):
                row["stages"] = [
                    *(row.get("stages") or ()),
                    {"stage": self.recipe.use, "seconds": took},
                ]
                if isinstance(found, MediaError):
                    row["reason"] = "damaged"
                    row["detail"] = f"{self.annotator.name}: {found.reason}"
                    continue
                row["annotations"] = [*(row.get("annotations") or ()), *map(asdict, found)]
                worst = max((a.score for a in found if a.role == "safety"), default=0.0)
                if worst > self.unsafe:
                    row["reason"] = "unsafe"
                    row["detail"] = f"{self.annotator.name} scored {worst:.2f} > {self.unsafe:g}"
            yield from batch

    def close(self) -> None:
        if close := getattr(self.annotator, "close", None):
            close()

    def _ask(self, clips: Sequence[Clip]) -> list[Sequence[Annotation] | MediaError]:
        try:
            said = self.annotator(clips)
        except MediaError as error:
            if len(clips) == 1:
                return [error]
            return [answer for clip in clips for answer in self._ask([clip])]
        if len(said) != len(clips):
            raise ModelError(
                f"the annotator {self.annotator.name} answered {len(said)} times "
                f"for {len(clips)} clips"
            )
        return list(said)


def annotations_of(row: Row) -> tuple[Annotation, ...]:
    """What earlier annotators said of a clip. A clip straight from the manifest has nothing."""
    return tuple(Annotation(**said) for said in row.get("annotations") or ())

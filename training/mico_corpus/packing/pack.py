"""Annotated clips to a shard: the tar that training reads, and a row about each clip.

Equal clips give equal bytes, in any run and beside any others: nothing carries a time, and each
encoder has one thread. ``docs/data.md`` has the record.
"""

import json
import math
import re
import tarfile
import time
from collections.abc import Iterable, Iterator
from typing import Any

from mico_chat.errors import MediaError
from mico_corpus.describing.annotating import annotations_of
from mico_corpus.describing.base import Annotation, Clip, Role
from mico_corpus.packing.encoding import flac, jpeg, mp4
from mico_corpus.places import Place, name_of
from mico_corpus.recipe import ShardsRecipe
from mico_corpus.rows import Row
from mico_training.data.sources.written import FUSED, add_sample

SHARD = re.compile(r"[0-9a-f]{32}\.tar")
"""A shard's name is a hash of its clips' ids."""
STAGE = "pack"
ENDINGS = {"video": "mp4", "image": "jpg", "audio": "flac"}
MAPS: tuple[Role, ...] = ("depth", "normal")
FIELDS = ("annotator", "version", "role", "medium", "text", "score", "start", "end")


class Packer:
    """Writes one shard of the rows of a call, in one step, and returns its rows of the index.

    A row with a reason stays as it is. So does the folder if no clip is left for the shard.
    """

    def __init__(self, recipe: ShardsRecipe, output: str) -> None:
        self.recipe = recipe
        self.place = Place(output)

    def __call__(self, rows: Iterable[Row]) -> list[Row]:
        packed: list[Row] = []
        with self.place.scratch() as path:
            with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
                for row in rows:
                    start = time.perf_counter()
                    files = () if row["reason"] else self._add(tar, row)
                    took = {"stage": STAGE, "seconds": time.perf_counter() - start}
                    stages = [*(row.get("stages") or ()), took]
                    said = [a | {"data": None} for a in row.get("annotations") or ()]
                    packed.append(
                        row | {"files": list(files), "annotations": said, "stages": stages}
                    )
            kept = [row["id"] for row in packed if not row["reason"]]
            shard = f"{name_of(kept)}.tar" if kept else ""
            if kept:
                self.place.put(path, shard)
        return [row | {"shard": "" if row["reason"] else shard} for row in packed]

    def _add(self, tar: tarfile.TarFile, row: Row) -> Iterable[str]:
        clip = Clip(row, annotations_of(row), images=self.recipe.images)
        captions = captions_of(clip)
        if self.recipe.need_caption and not captions:
            row["reason"], row["detail"] = "no caption", ""
            return ()
        try:
            files = self._files(clip)
        except MediaError as error:
            row["reason"], row["detail"] = "damaged", error.reason
            return ()
        add_sample(
            tar, clip.id, json.dumps(record(clip, files, captions), ensure_ascii=False), files
        )
        return files

    def _files(self, clip: Clip) -> dict[str, bytes]:
        recipe = self.recipe
        sound = clip.sound
        rate = min(recipe.fps, clip.row.get("fps") or recipe.fps)
        n = max(1, round(clip.seconds * rate))
        video = clip.frames(n, longest(clip.row, recipe.side))
        files = {member_of("video"): mp4(video.frames, clip.seconds, sound)}
        if recipe.image:
            pictures = clip.stills(longest(clip.row, recipe.side))
            files |= {member_of(name): jpeg(pixels) for name, pixels in pictures.items()}
        if recipe.audio and sound is not None:
            files[member_of("audio")] = flac(sound)
        for role in MAPS:
            found = sorted(clip.maps(role).items())
            files |= {f"{role}{name.removeprefix('image')}.png": one.data for name, one in found}
        return files


def member_of(medium: str) -> str:
    """The member of a medium by its name: "image2" -> "image2.jpg"."""
    return f"{medium}.{ENDINGS[medium.rstrip('0123456789')]}"


def longest(row: Row, side: int) -> int:
    """The longer side of a clip whose shorter one is ``side``; no clip is made larger."""
    sides: tuple[int, int] = (row["width"], row["height"])
    shorter, longer = sorted(sides)
    return min(longer, round(longer * side / shorter))


def captions_of(clip: Clip) -> dict[str, list[str]]:
    """The sentences about each member; about the video, those fused of several come first."""
    found: dict[str, list[str]] = {}
    for caption in sorted(clip.said("caption"), key=lambda said: said.annotator != FUSED):
        found.setdefault(member_of(caption.medium), []).append(caption.text)
    if text := clip.row.get("text"):
        found.setdefault(member_of("video"), []).append(text)
    return {member: list(dict.fromkeys(texts)) for member, texts in found.items()}


def record(clip: Clip, files: Iterable[str], captions: dict[str, list[str]]) -> dict[str, Any]:
    """``KEY.json``: what training reads, and where all of it comes from."""
    tags: dict[str, Annotation] = {}
    for tag in clip.said("tag"):
        member = member_of(tag.medium)
        if member not in tags or tag.score > tags[member].score:
            tags[member] = tag
    spoken = sorted(clip.said("speech"), key=lambda said: said.start)
    about = {key: clip.row[key] for key in ("source", "licence", "address", "member")}
    about |= {"category": category} if (category := clip.row.get("category")) else {}
    return {
        "files": list(files),
        "captions": captions,
        "concepts": {member: tag.text for member, tag in tags.items()},
        "subtitle": " ".join(said.text.strip() for said in spoken),
        **about,
        "start": clip.row["start"],
        "end": clip.row["end"],
        "seconds": clip.seconds,
        "annotations": [dict(_said(annotation)) for annotation in clip.annotations],
    }


def _said(annotation: Annotation) -> Iterator[tuple[str, str | float]]:
    """The fields that say something; NaN is no JSON."""
    for key in FIELDS:
        value = getattr(annotation, key)
        if not isinstance(value, float) or math.isfinite(value):
            yield key, value

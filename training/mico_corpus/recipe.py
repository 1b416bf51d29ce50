"""The recipe of a build: one YAML file; an unknown key is an error."""

from typing import Any, Literal

from pydantic import Field, model_validator

from mico_chat.errors import ConfigError
from mico_training.recipe import Section


class ClipsRecipe(Section):
    """What becomes a clip. Seconds; the paper's clips have 5 to 30 (section 4.1).

    A file is cut at the spans that its list gives, else at its scenes; a longer scene into equal
    parts, while a longer span is left out. ``threshold``: how much a frame
    must differ from those around it to begin a scene (PySceneDetect's AdaptiveDetector).
    ``darkest``, ``least_motion`` (0 to 1) and ``quietest`` (dB of full scale; None: silence is
    fine): clips below are left out. ``near``: two clips are duplicates if at most so many of the 64
    bits of their perceptual hashes differ; -1 keeps them all. ``longest_file``: seconds.
    """

    shortest: float = Field(default=5.0, gt=0)
    longest: float = Field(default=30.0, gt=0)
    threshold: float = Field(default=3.0, gt=0)
    darkest: float = Field(default=0.02, ge=0, le=1)
    least_motion: float = Field(default=0.002, ge=0, le=1)
    quietest: float | None = None
    near: int = Field(default=4, ge=-1, le=16)
    longest_file: float = Field(default=4 * 3600.0, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> "ClipsRecipe":
        if self.longest < 2 * self.shortest:
            raise ConfigError(
                f"clips: longest is {self.longest:g} s and shortest {self.shortest:g} s; a scene "
                "is cut into equal parts, so longest must be at least twice shortest"
            )
        return self


NEEDS = {"normal": "depth", "fuse": "caption"}
"""These annotators read what another says; normals by a model of their own do not."""


class AnnotatorRecipe(Section):
    """One annotator: ``use`` is one of ours or ``package.module:Class``, ``options`` its arguments.

    ``batch_size``: clips at once. With workers, ``actors`` processes (least and most) hold it, each
    with ``cpus`` and ``gpus``.
    """

    use: str
    options: dict[str, Any] = Field(default_factory=dict)
    batch_size: int = Field(default=8, ge=1)
    actors: int | tuple[int, int] = 1
    cpus: float = Field(default=1.0, ge=0)
    gpus: float = Field(default=0.0, ge=0)


class ShardsRecipe(Section):
    """How a clip is written. ``samples``: clips a shard. ``side``: the shorter side of the video.

    ``image``: the middle frame beside the video; ``images`` of them: the middles of so many equal
    parts, each with captions and maps of its own. ``audio``: the sound beside the video, as FLAC;
    the video has its sound too. ``unsafe``: clips that score higher are left out.
    ``need_caption``: so are clips that nobody described.
    """

    samples: int = Field(default=1000, ge=1)
    side: int = Field(default=256, ge=32)
    fps: float = Field(default=12.0, gt=0)
    image: bool = True
    images: int = Field(default=1, ge=1, le=16)
    audio: bool = True
    unsafe: float = Field(default=0.5, ge=0, le=1)
    need_caption: bool = True


class BuildRecipe(Section):
    """``kind``: "hdvila" reads lists as HD-VILA-100M's, with the spans of their clips. ``source``
    and ``licence``: of files whose list does not say. ``workers``: processes of Ray for work on
    CPUs; 0: this process alone, without Ray. ``seed`` orders the subsets."""

    kind: Literal["", "hdvila"] = ""
    source: str = ""
    licence: str = ""
    clips: ClipsRecipe = ClipsRecipe()
    annotators: tuple[AnnotatorRecipe, ...] = ()
    shards: ShardsRecipe = ShardsRecipe()
    workers: int = Field(default=0, ge=0)
    seed: int = 0

    @model_validator(mode="after")
    def _in_order(self) -> "BuildRecipe":
        before: set[str] = set()
        for one in self.annotators:
            needed = NEEDS.get(one.use)
            if one.options.get("model") and one.use == "normal":
                needed = None
            # Anybody's own annotator may say anything.
            if needed and needed not in before and not any(":" in use for use in before):
                raise ConfigError(
                    f"annotators: {one.use!r} goes on from what {needed!r} says: put a {needed!r} "
                    "before it"
                )
            before.add(one.use)
        return self

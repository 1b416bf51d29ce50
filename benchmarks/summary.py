"""Every ratio in one table, with its goal, its machine, and the reason where it falls short.

``python -m benchmarks.summary --output benchmarks/results`` writes ``README.md`` there, from the
JSON files in its folder ``ratios``. Each benchmark writes a file of its own, by :func:`keep`.
"""

import sys
from collections.abc import Sequence
from datetime import UTC, date, datetime
from pathlib import Path

import typer
from pydantic import BaseModel, ConfigDict, ValidationError

from benchmarks.systems import machine, table
from mico_chat.errors import ConfigError

FOLDER = "ratios"

_EIGHT_BITS = (
    "Ours is resized in float32. torchvision resizes in 8 bit, which is faster and rounds: the "
    "model would see other pixels than in training."
)
_SCALED = (
    "A large picture is first scaled to 1,024 pixels by Pillow's bicubic filter, for closer looks, "
    "for the reader of texts and for the page; the others go to the model's 448 pixels at once."
)
_FRAMES = (
    "Decoding takes five sixths of the time on both sides. Ours also checks the file, and puts the "
    "frames into one array."
)

_LOADED = (
    "Beside a load of media and long prompts the neighbour waits 0.2 to 0.6 s instead of 0.04: for "
    "the step that runs, then for its own beside the load's, on two cores that the encoder and the "
    "readers use too. One request of 16 to 32 pictures takes up to 600 MB: its pictures are "
    "decoded before they are encoded, 16 at a time."
)

REASONS: dict[str, str] = {
    "attacks beside which the goals hold, with keys": _LOADED,
    "attacks beside which the goals hold, without keys": _LOADED,
    "64 frames of a clip of 640 x 360": _FRAMES,
    "64 frames of a clip of 1920 x 1080": _FRAMES,
    "JPEG of 640 x 480": _EIGHT_BITS,
    "JPEG of 1920 x 1080": _SCALED,
    "JPEG of 4000 x 3000": _SCALED,
    "tokens/s beside 1 busy, nice 19, 2 cores": (
        "A program of low priority gets a turn now and then, and a step on two cores waits for the "
        "thread that lost its core."
    ),
    "16 pictures at once": (
        "Encoding takes most of the time, and the engines share it. Then transformers computes a "
        "prompt of 300 tokens faster than llama.cpp (`--only decoding`)."
    ),
    "resident memory over the time of a load: rise at most": (
        "The line rises by 3.8 %, and two standard errors reach above 5 %. Pictures that come at "
        "the same moment are encoded together. The first time that many came, after 10 minutes, "
        "took 150 MB, which the allocator keeps. Memory did not rise after that."
    ),
    "first text over HTTP, later than in process": (
        "The slowest way stores the question on the disk before it is answered. Medians scatter by "
        "some milliseconds: two ways that store nothing lie 6 ms apart."
    ),
    "first text about a picture over HTTP, later than in process": (
        "The slowest way stores the picture and the question on the disk before the answer. The "
        "others are 3 to 4 ms later than in process."
    ),
    "16 answers over HTTP": (
        "A stream has an event for each token. The service's and the client's work on it takes "
        "the cores on which the threads of a step wait for each other; whole answers lose less."
    ),
    "decode of one stream": (
        "A token takes 0.1 ms longer than in the loop: its log-probability, its text, and the way "
        "to the request."
    ),
    "cutting, 360p.mp4, 640 x 360": (
        "Cutting also decodes the sound, seeks scenes and measures motion; a small frame costs "
        "little to decode."
    ),
    "8 streams of 64 + 64 tokens": (
        "llama.cpp multiplies 8-bit weights slowly with few columns: a step for 2 answers takes "
        "twice as long as for one (`--only steps`), and almost half of it waits for weights (`perf "
        "record`). vLLM multiplies in bfloat16. Guessed tokens would be such columns too."
    ),
    "prompt of 300 tokens": (
        "llama.cpp multiplies 8-bit weights slower than vLLM's oneDNN multiplies bfloat16. The "
        "model as BF16 (`--quantization BF16`) is nearer, and slower for one answer."
    ),
    "longest pause beside a prompt of 1,500 tokens": (
        "Such a step must compute some of the prompt, and llama.cpp's attention takes fewer than "
        "64 tokens one by one, so that each costs more the longer the prompt is (`--only steps`)."
    ),
    "first token of a prompt of 1,500 tokens beside 4 answers": (
        "In chunks of 8 tokens a prompt takes longer than in chunks of 512 (`--only steps`); "
        "larger chunks would make the pauses of the answers longer."
    ),
}
"""Why a measure falls short, where it is known."""


class Ratio(BaseModel):
    """A figure of ours, alone or beside another system's; the goal is of the ratio if it has one.

    ``at_most``: the goal is an upper bound.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    measure: str
    value: float
    unit: str
    beside: str = ""
    ratio: float | None = None
    goal: float | None = None
    at_most: bool = False

    @classmethod
    def beside_of(
        cls,
        measure: str,
        value: float,
        unit: str,
        beside: str,
        other: float,
        goal: float | None = None,
        *,
        at_most: bool = False,
    ) -> "Ratio":
        """Our ``value`` over the ``other``, which is that of ``beside``."""
        return cls(
            measure=measure,
            value=value,
            unit=unit,
            beside=beside,
            ratio=value / other,
            goal=goal,
            at_most=at_most,
        )

    @property
    def figure(self) -> float:
        return self.value if self.ratio is None else self.ratio

    @property
    def holds(self) -> bool | None:
        """Whether the goal is reached, to two places; None: it has no goal."""
        if self.goal is None:
            return None
        figure = round(self.figure, 2)
        return figure <= self.goal if self.at_most else figure >= self.goal

    @property
    def wanted(self) -> str:
        return "" if self.goal is None else f"{'≤' if self.at_most else '≥'} {self.goal:g}"


class Kept(BaseModel):
    """The ratios of one run of a benchmark; ``report`` is its Markdown file in the results."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    report: str
    date: date
    machine: str
    ratios: list[Ratio]


def keep(
    name: str,
    ratios: Sequence[Ratio],
    folder: Path | None,
    report: str,
    packages: Sequence[str] = ("torch",),
) -> None:
    """Write ``ratios/NAME.json`` into the folder of results, if there is one."""
    if folder is None:
        return
    today = datetime.now(UTC).date()
    kept = Kept(report=report, date=today, machine=machine(*packages), ratios=list(ratios))
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    (folder / FOLDER / f"{name}.json").write_text(
        f"{kept.model_dump_json(indent=1, exclude_defaults=True)}\n", encoding="utf-8"
    )


def read(folder: Path) -> list[Kept]:
    """What all benchmarks kept, by the names of their files.

    Raises:
        ConfigError: there is none, or one cannot be read.
    """
    found = []
    for file in sorted((folder / FOLDER).glob("*.json")):
        try:
            found.append(Kept.model_validate_json(file.read_bytes()))
        except ValidationError as error:
            (first, *_) = error.errors()
            where = ".".join(map(str, first["loc"]))
            said = ": ".join(filter(None, (where, first["msg"])))
            raise ConfigError(f"{file}: {said}; run its benchmark again") from error
    if not found:
        raise ConfigError(f"{folder / FOLDER}: no *.json is there; run a benchmark first")
    return found


def text(found: Sequence[Kept], reasons: dict[str, str]) -> str:
    machines = list(dict.fromkeys(kept.machine for kept in found))
    marks = {True: "holds", False: "**falls short**", None: "-"}
    rows, short = [], []
    for kept in found:
        for one in kept.ratios:
            ratio = "" if one.ratio is None else f"{one.ratio:.2f}"
            cells = [one.measure, f"{one.value:.4g} {one.unit}", one.beside, ratio, one.wanted]
            link = f"[{kept.date}]({kept.report})"
            rows.append([*cells, marks[one.holds], link, str(machines.index(kept.machine) + 1)])
            if one.holds is False:
                why = reasons.get(one.measure, "The reason is not known yet.")
                short.append(f"* **{one.measure}**: {one.figure:.3g}, not {one.wanted}. {why}")
    goals = [one for kept in found for one in kept.ratios if one.goal is not None]
    head = ["measure", "measured", "beside", "ratio", "goal", "", "run", "machine"]
    numbered = "\n".join(f"{number}. {name}" for number, name in enumerate(machines, 1))
    return (
        "# Every ratio\n\n"
        "Made by `python -m benchmarks.summary`, from what each benchmark measured last. "
        f"{len(goals) - len(short)} of {len(goals)} goals hold. A ratio is ours over that of what "
        f"stands beside it; without one, the goal is of the figure itself.\n\n{table(head, rows)}"
        f"\n\n## Machines\n\n{numbered}\n\n## What falls short\n\n"
        + ("\n".join(short) if short else "Nothing.")
        + "\n"
    )


def main(output: Path = Path("benchmarks/results")) -> None:
    try:
        written = text(read(output), REASONS)
    except ConfigError as error:
        sys.exit(str(error))
    (output / "README.md").write_text(written, encoding="utf-8")
    print(written, end="")


if __name__ == "__main__":
    typer.run(main)

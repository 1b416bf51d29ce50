"""Speed before and after a change, in one run, and how far each figure is from the machine's limit.

The parts run here and in the checkout ``before``, in turns and each with its own code. A limit is
what this machine's memory, or its multiplications, allow: weights are read once for each step, and
multiplied in bfloat16 with each token. Nothing else may run meanwhile. One part, as small as it
goes:

    python -m benchmarks speed ../before --times 1 --repeats 1 --only preprocessing
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated

from benchmarks.harness import RACE, Ratio, Report, in_checkout
from mico_chat.errors import ConfigError

HERE = Path(__file__).parents[2]
AFTER, BEFORE = "after", "before"
RACED = ("decoding", "stalls", "serving", "overhead")
PARTS = (*RACED, "preprocessing")
VLLM = HERE / ".venv-vllm/bin/python"
"""Both checkouts race against the same vLLM, if it is there."""


def measure(
    before: Annotated[Path, "another checkout, such as a worktree of the last release"],
    times: Annotated[int, "how often each part runs in both checkouts"] = 3,
    repeats: Annotated[int, "how often a part measures each time"] = 3,
    only: Annotated[list[str] | None, f"some of {', '.join(PARTS)}"] = None,
) -> Report:
    """Race the parts in two checkouts, in turns."""
    parts = only or list(PARTS)
    if unknown := set(parts) - set(PARTS):
        raise ConfigError(f"--only {' '.join(sorted(unknown))}: the parts are {', '.join(PARTS)}")
    if not (before / "benchmarks").is_dir():
        raise ConfigError(f"{before}: no checkout of this project is there (git worktree add)")
    places = {BEFORE: before.resolve(), AFTER: HERE}
    found: dict[str, dict[str, list[Ratio]]] = defaultdict(lambda: defaultdict(list))
    for part in parts:
        words = ["--only", part, "--vllm-python", str(VLLM)] if part in RACED else []
        for number in range(times):
            for place in list(places)[:: -1 if number % 2 else 1]:
                name = RACE if part in RACED else part
                arguments = [*words, "--repeats", str(repeats)]
                for one in in_checkout(places[place], name, arguments):
                    found[one.measure][place].append(one)
    return Report({"rows": [row(by_place) for by_place in found.values()], "before": before})


def row(found: Mapping[str, Sequence[Ratio]]) -> list[str]:
    """A measure before and after, beside its goal and the machine's limit.

    A measure that only one of the two checkouts has stands alone.
    """
    values = {place: median(one.value for one in ratios) for place, ratios in found.items()}
    place = AFTER if AFTER in found else BEFORE
    last, value = found[place][-1], values[place]
    known = [one.ratio for one in found[place] if one.ratio is not None]
    now = last.model_copy(update={"value": value, "ratio": median(known) if known else None})
    gain = values[AFTER] / values[BEFORE] if len(values) == len((BEFORE, AFTER)) else None
    lower = last.unit in ("s", "ms")
    share = None if last.limit is None else (last.limit / value if lower else value / last.limit)
    holds = {True: "holds", False: "**falls short**", None: ""}
    return [
        last.measure,
        last.unit,
        *(f"{values[one]:.4g}" if one in values else "" for one in (BEFORE, AFTER)),
        "" if gain is None else f"{gain:.2f}",
        "" if now.ratio is None else f"{now.ratio:.2f} of {now.beside}",
        f"{now.wanted} {holds[now.holds]}".strip(),
        "" if last.limit is None else f"{last.limit:.4g}",
        "" if share is None else f"{share:.0%}",
    ]

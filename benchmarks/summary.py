"""Every ratio in one table, with its goal, its machine, and the reason where it falls short.

``python -m benchmarks summary --output benchmarks/results`` writes ``README.md`` there, from the
JSON files in its folder ``ratios``, which the other benchmarks write.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from benchmarks.harness import Kept, read, table

REASONS: dict[str, str] = {
    measure: one["reason"]
    for one in yaml.safe_load(Path(__file__).with_name("reasons.yaml").read_text("utf-8"))
    for measure in one["measures"]
}


def text(found: Sequence[Kept], reasons: Mapping[str, str]) -> str:
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
        "Made by `python -m benchmarks summary`, from what each benchmark measured last. "
        f"{len(goals) - len(short)} of {len(goals)} goals hold. A ratio is ours over that of what "
        f"stands beside it; without one, the goal is of the figure itself.\n\n{table(head, rows)}"
        f"\n\n## Machines\n\n{numbered}\n\n## What falls short\n\n"
        + ("\n".join(short) if short else "Nothing.")
        + "\n"
    )


def write(output: Path) -> tuple[()]:
    """Write every ratio into one table, with its goal, its machine, and why it falls short."""
    written = text(read(output), REASONS)
    (output / "README.md").write_text(written, encoding="utf-8")
    print(written, end="")
    return ()

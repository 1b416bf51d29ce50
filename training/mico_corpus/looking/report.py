"""The report of a build: how much went in and came out, and why not all; as Markdown and HTML."""

import base64
import html
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader
from matplotlib.axes import Axes

from mico_chat.late import late
from mico_corpus.looking.summary import Amount, Reason, Spread, Summary, summarize
from mico_corpus.places import Place
from mico_corpus.rows import REASONS

with late():  # it brings torch
    from mico_training import records

FAILED = ("missing", "empty", "broken", "encrypted", "damaged")
"""These reasons are faults of files; the others are choices of the recipe."""
MOST = 50
"""The table of sources has so many rows; the other sources are added up."""
UNITS = {"length": "seconds", "brightness": "mean luma, 0 to 1", "loudness": "dB of full scale"}
PANELS = 12


@dataclass
class Section:
    """A title, paragraphs, and a table whose first ``texts`` columns are texts."""

    title: str
    words: Sequence[str]
    titles: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    texts: int = 1


def pages() -> Environment:
    """The templates of this package. Everything that they show is escaped."""
    return Environment(
        loader=PackageLoader("mico_corpus.looking", "pages"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def write_report(output: str | Path) -> None:
    """Write ``report.md`` and ``report.html`` into the build's folder, from its tables."""
    place = Place(str(output))
    found = summarize(place)
    sections = list(sections_of(found))
    title = f"Report of {output}"
    with place.scratch() as file:
        alt = draw(found, file)
        picture = file.read_bytes()
        place.put(file, "build/report.png")
    page = pages().get_template("report.html")
    data = base64.b64encode(picture).decode()
    shown = page.render(title=title, sections=sections, picture=data, alt=alt)
    for name, text in (("md", markdown(title, sections, alt)), ("html", shown)):
        with place.scratch() as file:
            file.write_text(text, encoding="utf-8")
            place.put(file, f"build/report.{name}")


def markdown(title: str, sections: Sequence[Section], alt: str) -> str:
    parts = [f"# {plain(title)}"]
    for section in sections:
        parts += [f"## {section.title}", *map(plain, section.words)]
        if section.rows:
            rows = [[plain(cell) for cell in row] for row in section.rows]
            parts.append(records.markdown_table(section.titles, rows, section.texts))
    return "\n\n".join([*parts, f"![{alt}](report.png)"]) + "\n"


def plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    escaped = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", escaped)


# --- what it says ---------------------------------------------------------------------------------


def sections_of(found: Summary) -> Iterator[Section]:
    yield _overview(found)
    yield _left_out(
        found, "file", "Files without clips", sum(a.count for a in found.files.values())
    )
    yield _left_out(found, "clip", "Clips left out", found.cut.count)
    yield _failed(found)
    yield _sources(found)
    yield _annotators(found)
    yield _stages(found)


def _overview(found: Summary) -> Section:
    read, written = total(found.files.values()), total(found.written.values())
    words = [
        f"{found.sources:,} files were given; {read.count:,} have been looked at, with "
        f"{hours(read)} of video. {found.cut.count:,} clips were cut from them; "
        f"{found.chosen.count:,} of these were chosen. {written.count:,} clips are in "
        f"{len(found.shards):,} shards: {hours(written)}."
    ]
    if left := found.sources - read.count:
        words.append(f"Not finished: {left:,} files have not been looked at yet.")
    if left := found.chosen.count - found.annotated:
        words.append(
            f"Not finished: {left:,} chosen clips have not been annotated yet. The same command "
            "goes on with them."
        )
    return Section("What went in and came out", words)


def _left_out(found: Summary, what: str, title: str, of: int) -> Section:
    reasons = sorted(found.lost[what].items(), key=lambda item: -item[1].count)
    count = sum(reason.count for _, reason in reasons)
    rows = [
        [name, f"{reason.count:,}", REASONS.get(name, ""), *_examples(reason)]
        for name, reason in reasons
    ]
    titles = ["reason", what + "s", "meaning", "the first ones"]
    return Section(title, [f"{count:,} of {of:,} {what}s."], titles, rows, texts=4)


def _examples(reason: Reason) -> list[str]:
    named = [f"{name}: {detail}" if detail else name for name, detail in reason.examples]
    more = reason.count - len(named)
    return ["; ".join(named) + (f"; and {more:,} more" if more else "")]


def _failed(found: Summary) -> Section:
    rows = [
        [what, name, example, detail]
        for what, reasons in found.lost.items()
        for name in FAILED
        if name in reasons
        for example, detail in reasons[name].examples
    ]
    count = sum(r.count for rs in found.lost.values() for name, r in rs.items() if name in FAILED)
    words = (
        "Nothing failed."
        if not count
        else (
            f"{count:,} files and clips could not be read; the run went on without them. "
            "build/files/ and build/clips.parquet name all of them."
        )
    )
    return Section("What failed", [words], ["what", "reason", "name", "detail"], rows, texts=4)


def _sources(found: Summary) -> Section:
    keys = sorted({*found.files, *found.written}, key=lambda key: -found.files[key].seconds)
    rows = [(*key, found.files[key], found.written[key]) for key in keys[:MOST]]
    if others := keys[MOST:]:
        name = f"{len(others):,} others"
        summed = [total(amounts[key] for key in others) for amounts in (found.files, found.written)]
        rows.append((name, "", summed[0], summed[1]))
    titles = ["source", "licence", "files", "hours", "clips written", "hours written"]
    cells = []
    for source, licence, given, written in rows:
        amounts = (f"{given.count:,}", _hours(given), f"{written.count:,}", _hours(written))
        cells.append([source or "not said", licence or "not said", *amounts])
    return Section("By source and licence", [], titles, cells, texts=2)


def _annotators(found: Summary) -> Section:
    rows = []
    for (name, version, role, medium), said in sorted(found.annotators.items()):
        mean = f"{said.scores.mean:.2f}" if said.scores.count else "-"
        cells = [name, version, role, medium, " / ".join(map(_short, said.examples)) or "-"]
        rows.append([*cells, f"{said.clips:,}", f"{said.count:,}", mean])
    titles = ["annotator", "version", "role", "of", "examples", "clips", "statements", "mean score"]
    words = [] if rows else ["No clip has an annotation."]
    return Section("Annotators", words, titles, rows, texts=5)


def _short(text: str, most: int = 120) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def _stages(found: Summary) -> Section:
    rows = []
    for name, amount in found.stages.items():
        if amount.count:
            each = amount.seconds / amount.count
            rate = f"{1 / each:,.2f}" if each else "-"
            rows.append([name, f"{amount.count:,}", f"{amount.seconds:,.1f}", f"{each:.3f}", rate])
    words = [
        "Seconds of work, those of all processes added up. The first stage counts files, the "
        "others count clips."
    ]
    titles = ["stage", "count", "seconds", "seconds for each", "each second, one process"]
    return Section("How long it took", words, titles, rows)


def total(amounts: Iterable[Amount]) -> Amount:
    summed = Amount()
    for amount in amounts:
        summed.add(amount.count, amount.seconds)
    return summed


def _hours(amount: Amount) -> str:
    return f"{amount.seconds / 3600:,.2f}"


def hours(amount: Amount) -> str:
    if amount.seconds < 3600:
        return f"{amount.seconds / 60:,.1f} minutes"
    return f"{amount.seconds / 3600:,.1f} hours"


# --- what it shows --------------------------------------------------------------------------------


def draw(found: Summary, path: Path) -> str:
    """Histograms of the clips' measures and of each annotator's scores; the words for them."""
    scored = [
        (f"{name}: {role} of {medium}", said.scores)
        for (name, _, role, medium), said in sorted(found.annotators.items())
        if said.scores.count
    ][:PANELS]
    with records.panels(path, len(UNITS) + len(scored), columns=3, size=(4.2, 3.0)) as drawn:
        for axes, (name, unit) in zip(drawn, UNITS.items(), strict=False):
            kept, left = found.measures[name][True], found.measures[name][False]
            _histogram(axes, {"chosen": kept, "left out": left})
            axes.set(title=name, xlabel=unit, ylabel="clips")
        for axes, (name, spread) in zip(drawn[len(UNITS) :], scored, strict=True):
            _histogram(axes, {"": spread})
            axes.set_title(name.replace("$", r"\$"), fontsize=9)
            axes.set(xlabel="score", ylabel="statements")
    names = ", ".join([*UNITS, *(["score"] if scored else [])])
    return f"Histograms of the clips' {names}"


def _histogram(axes: Axes, spreads: Mapping[str, Spread]) -> None:
    shown = {name: spread for name, spread in spreads.items() if spread.count}
    if not shown:
        return
    edges = np.histogram_bin_edges(np.concatenate([s.values for s in shown.values()]), 40)
    below = np.zeros(40)
    for name, spread in shown.items():
        counts, _ = np.histogram(spread.values, edges)
        above = below + counts * (spread.count / len(spread.values))
        axes.stairs(above, edges, baseline=below, fill=True, label=name)
        below = above

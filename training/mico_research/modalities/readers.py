"""A user's own files to samples, one format a family.

* tabular: CSV with a header; the target is a column.
* text: the same; the other columns, one under the other, are the text.
* time_series to forecast: CSV, a row a step in the order of time, a column a channel.
* time_series, imu to classify or regress: NPZ with ``x`` (N, L, C) or (N, L), ``y`` (N,), and
  ``lengths`` (N,) where some are shorter than L.
* hyperspectral: NPZ with ``x`` (N, bands) or patches (N, P, P, bands) and ``y`` (N,); or a scene,
  ``cube`` (H, W, bands) and ``labels`` (H, W), 0 where there is none, cut into patches. Without
  labels, every pixel is to be predicted.
* graph: JSONL, a graph a line: ``{"nodes": [[..], ..], "edges": [[0, 1], ..], "edge_features":
  [[..], ..], "y": ..}``, the last two optional.
* thermal, xray, image, depth, normal: NPZ with ``x`` (N, H, W) or (N, H, W, 3) and ``y`` (N,); or a
  folder with a folder of pictures for each class.
* video, audio: a folder with a folder of files for each class. For several labels of each file, as
  for pictures: CSV with the columns ``file`` (beside the table) and ``labels`` (``dog;bark``).

``y`` may be missing where the samples are to be predicted.
"""

import csv
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np

from mico_chat.errors import ConfigError, DataError
from mico_chat.evaluation.datasets.files import SUFFIXES as ENDINGS
from mico_research.modalities.samples import (
    MEDIA,
    PICTURES,
    Array,
    Graph,
    Modality,
    Sample,
    number,
    open_picture,
)

SUFFIXES = {str(kind): frozenset(endings) for kind, endings in ENDINGS.items()}

PICTURE_FILES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"})


def read_samples(
    modality: Modality,
    path: Path,
    target: str | None = None,
    columns: Sequence[str] = (),
    patch_size: int = 1,
) -> list[Sample]:
    """The samples of a file or folder.

    The modality decides the format. ``target`` and ``columns`` name columns of a table: the target
    and the inputs (default: all others). ``patch_size`` is the odd side of the patches into which
    a hyperspectral scene is cut.

    Raises:
        ConfigError: the file is missing, or its format is not the modality's.
        DataError: the content is wrong; it names the line.
    """
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder")
    if modality in PICTURES | MEDIA and path.is_dir():
        samples = _folder(path, modality)
    elif modality in MEDIA or (modality in PICTURES and path.suffix.lower() == ".csv"):
        samples = _listed(_suffix(path, ".csv", modality))
    elif modality == "tabular":
        samples = _table(_suffix(path, ".csv", modality), target, columns)
    elif modality == "text":
        rows = _table(_suffix(path, ".csv", modality), target, columns)
        texts = ["\n".join(cast(Mapping[str, str], row.values).values()) for row in rows]
        samples = [replace(row, values=text) for row, text in zip(rows, texts, strict=True)]
    elif modality == "graph":
        samples = _graphs(_suffix(path, ".jsonl", modality))
    else:
        samples = _arrays(_suffix(path, ".npz", modality), modality, patch_size)
    _check(bool(samples), path, "no samples")
    return samples


def _check(fits: bool, path: Path, reason: str, line: int | None = None) -> None:
    if not fits:
        raise DataError(path, line, reason)


# --- tables -------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file by its header; a DataError names a wrong header or row."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file)
            header = [name.strip() for name in next(lines, [])]
            reason = "the header is missing; the first line must name the columns"
            _check(any(header), path, reason, 1)
            twice = [name for name in header if header.count(name) > 1]
            _check(not twice, path, f"two columns have the name {min(twice, default='')!r}", 1)
            rows = []
            for cells in filter(None, lines):
                reason = f"the line has {len(cells)} cells, but the header has {len(header)}"
                _check(len(cells) == len(header), path, reason, lines.line_num)
                rows.append(dict(zip(header, cells, strict=True)))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(path, None, f"not a CSV file in UTF-8: {error}") from error
    return rows


def _table(path: Path, target: str | None, columns: Sequence[str]) -> list[Sample]:
    rows = read_rows(path)
    if not rows:
        return []
    _find_columns(path, rows[0], (*columns, *([target] if target else [])))
    used = [name for name in (columns or rows[0]) if name != target]
    reason = f"the target {target!r} is the only column; the model needs others to predict it"
    _check(bool(used), path, reason, 1)
    return [
        Sample({name: row[name] for name in used}, row[target] if target else None, str(path), line)
        for line, row in enumerate(rows, 2)
    ]


def _find_columns(path: Path, row: Mapping[str, str], names: Sequence[str]) -> None:
    missing = next((name for name in names if name not in row), None)
    reason = f"the column {missing!r} is missing; the columns are {', '.join(row)}"
    _check(missing is None, path, reason, 1)


@dataclass(frozen=True)
class Series:
    values: Array
    channels: tuple[str, ...]
    file: str

    def windows(self, start: int, end: int, lookback: int, horizon: int) -> list[Sample]:
        """Windows whose steps to forecast lie within [start, end); their past may lie before it."""
        first = max(start, lookback)
        return [
            Sample(self.values[t - lookback : t], self.values[t : t + horizon], self.file, None)
            for t in range(first, end - horizon + 1)
        ]


def read_series(path: Path, columns: Sequence[str] = ()) -> Series:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    rows = read_rows(path)
    _check(bool(rows), path, "no rows")
    _find_columns(path, rows[0], columns)

    def finite(cell: str) -> bool:
        value = number(cell)
        return value is not None and bool(np.isfinite(value))

    names = tuple(columns) or tuple(name for name in rows[0] if finite(rows[0][name]))
    _check(bool(names), path, f"no column holds numbers; the columns are {', '.join(rows[0])}", 2)
    for line, row in enumerate(rows, 2):
        for name in names:
            reason = f"column {name!r}: {row[name]!r} is not a number"
            _check(finite(row[name]), path, reason, line)
    values = np.array([[float(row[name]) for name in names] for row in rows], dtype=np.float32)
    return Series(values, names, str(path))


# --- arrays -------------------------------------------------------------------------------------


def _arrays(path: Path, modality: Modality, patch_size: int) -> list[Sample]:
    try:
        with path.open("rb") as raw:
            loaded = np.load(raw, allow_pickle=False)
            reason = "the file holds one array without a name; write it with np.savez"
            _check(isinstance(loaded, np.lib.npyio.NpzFile), path, reason)
            arrays = {name: loaded[name] for name in loaded.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(path, None, f"not an NPZ file of plain arrays: {error}") from error
    if modality == "hyperspectral" and "cube" in arrays:
        return scene(path, arrays, patch_size)
    reason = f"the array 'x' is missing; the arrays are {', '.join(arrays) or 'none'}"
    _check("x" in arrays, path, reason)
    x, y, lengths = arrays["x"], arrays.get("y"), arrays.get("lengths")
    for name, array in (("y", y), ("lengths", lengths)):
        shape = (len(x),) if array is None else array.shape
        reason = f"the array {name!r} has the shape {shape}, expected ({len(x)},)"
        _check(shape == (len(x),), path, reason)
    samples = []
    for n, values in enumerate(x):
        if lengths is not None:
            values = values[: int(lengths[n])]
        if modality == "hyperspectral":
            values = values.reshape(-1, values.shape[-1]).T if values.ndim > 1 else values[:, None]
        elif modality not in PICTURES and values.ndim == 1:
            values = values[:, None]
        # An integer is a class; a regression reads it as a number again.
        own = None if y is None else y[n].item()
        target = own if own is None or isinstance(own, float) else str(own)
        samples.append(Sample(values, target, f"{path}: x[{n}]"))
    return samples


def scene(path: Path, arrays: dict[str, Array], patch_size: int) -> list[Sample]:
    """The labelled pixels of a scene (or all pixels), each with its neighbours; borders mirror."""
    cube, labels = arrays["cube"], arrays.get("labels")
    shape = None if labels is None else labels.shape
    fits = cube.ndim == 3 and shape in (None, cube.shape[:2])
    shapes = f"the cube has the shape {cube.shape} and the labels {shape}"
    _check(fits, path, f"{shapes}; expected (H, W, bands) and (H, W)")
    if patch_size % 2 == 0:
        raise ConfigError(
            f"patch_size {patch_size} is even; use an odd number, so that a patch has a middle"
        )
    half = patch_size // 2
    padded = np.pad(cube, ((half, half), (half, half), (0, 0)), mode="reflect" if half else "edge")
    return [
        Sample(
            padded[r : r + patch_size, c : c + patch_size].reshape(-1, cube.shape[2]).T,
            None if labels is None else str(labels[r, c].item()),
            f"{path}: pixel ({r}, {c})",
        )
        for r, c in np.argwhere(np.ones(cube.shape[:2]) if labels is None else labels).tolist()
    ]


# --- graphs and pictures ------------------------------------------------------------------------


def _graphs(path: Path) -> list[Sample]:
    samples = []
    with path.open(encoding="utf-8") as file:
        for place, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                content = json.loads(line)
                nodes = np.array(content["nodes"], dtype=np.float32)
                edges = np.array(content["edges"], dtype=np.int64).reshape(-1, 2)
                features = np.array(content.get("edge_features", []), dtype=np.float32)
            except KeyError as error:
                reason = f"the key {error} is missing; a graph needs nodes and edges"
                raise DataError(path, place, reason) from None
            except (ValueError, TypeError, UnicodeDecodeError) as error:
                raise DataError(path, place, f"not a graph: {error}") from error
            target = content.get("y")
            known = target is None or isinstance(target, int | float | str)
            _check(known, path, f"y is {target!r}, expected a class or a number", place)
            target = str(target) if isinstance(target, int) else target
            samples.append(Sample(Graph(nodes, edges, features), target, str(path), place))
    return samples


def _listed(path: Path) -> list[Sample]:
    """The files that a table names, with their labels, divided by ";"."""
    rows = read_rows(path)
    _find_columns(path, rows[0] if rows else {}, ("file", "labels"))
    samples = []
    for line, row in enumerate(rows, 2):
        file = path.parent / row["file"]
        _check(file.is_file(), path, f"no file {row['file']} in {path.parent}", line)
        labels = tuple(filter(None, map(str.strip, row["labels"].split(";"))))
        samples.append(Sample(file, labels, str(path), line))
    return samples


def files_by_class(path: Path, modality: Modality) -> list[Sample]:
    """Files of a modality; the subfolder is the class; files directly in the folder lack one."""
    endings = SUFFIXES[modality] if modality in MEDIA else PICTURE_FILES
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in endings)
    return [
        Sample(file, None if file.parent == path else file.relative_to(path).parts[0], str(file))
        for file in files
    ]


def _folder(path: Path, modality: Modality) -> list[Sample]:
    """The same, with small collections of pictures opened."""
    samples = files_by_class(path, modality)
    if modality in MEDIA:
        return samples
    return [replace(one, values=open_picture(Path(one.file))) for one in samples]


def _suffix(path: Path, suffix: str, modality: str) -> Path:
    if path.suffix.lower() != suffix or not path.is_file():
        raise ConfigError(f"{path}: the modality {modality} is read from a {suffix} file")
    return path

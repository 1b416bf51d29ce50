"""Public data sets with a fixed layout (``layouts.yaml``): where their samples and classes stand.

One function reads one form of layout. A picture, clip or sound in a file of its own is opened only
when it is used.
"""

import csv
import gzip
import io
import json
import logging
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mico_chat.errors import ConfigError, DataError, MissingExtraError
from mico_chat.evaluation.datasets import Layout
from mico_chat.evaluation.datasets.files import read_table, read_text
from mico_research.finetune.packaged import Packaged, molecule
from mico_research.modalities.readers import files_by_class, read_samples, scene
from mico_research.modalities.samples import Modality, Sample, Task, open_picture

logger = logging.getLogger(__name__)


class PublicData(Layout, extra="forbid", frozen=True):
    """A row of ``layouts.yaml``, which explains the fields."""

    of: tuple[Modality, Task]
    note: str
    read: dict[str, dict[str, dict[str, Any]]]
    channels: tuple[str, ...] = ()
    trials: int = 0


PUBLIC = {
    name: PublicData(name=name, **row)
    for name, row in yaml.safe_load(
        Path(__file__).with_name("layouts.yaml").read_text(encoding="utf-8")
    ).items()
}


def open_dataset(
    name: str, root: Path, modality: Modality, task: Task, options: dict[str, Any]
) -> Packaged:
    """The samples of a public data set in a folder; a DataError prints the layout that it needs.

    At most ``limit`` samples of each split are taken, evenly spread, but those of persons whole.
    """
    if name not in PUBLIC:
        known = ", ".join(PUBLIC)
        raise ConfigError(f"data.dataset: unknown data set {name!r}; the data sets are {known}")
    public = PUBLIC[name]
    if public.of != (modality, task):
        own = " ".join(map(str, public.of))
        raise ConfigError(f"data.dataset {name}: it is for {own}, not for {modality} {task}")
    if missing := public.missing(root):
        raise DataError(
            root, None, f"{name} lacks {', '.join(missing)}; it needs\n{public.layout(root)}"
        )
    ((form, splits),) = public.read.items()
    options, limit = {**options, "modality": modality}, options["limit"]
    found: dict[str, Any] = {}
    for split, arguments in splits.items():
        samples = _FORMS[form](root, options, **arguments)
        samples = samples if task == "re-identification" else _thinned(samples, limit)
        if not samples:
            raise DataError(root, None, f"{name} has no samples to {split}")
        found[split] = samples
    found |= {"note": public.note, "channels": public.channels, "trials": public.trials}
    return Packaged(**found)


def _thinned(samples: list[Sample], limit: int | None) -> list[Sample]:
    if limit is None or len(samples) <= limit:
        return samples
    return [samples[int(place)] for place in np.linspace(0, len(samples) - 1, limit)]


def _folders(root: Path, options: dict[str, Any], at: str) -> list[Sample]:
    return [s for s in files_by_class(root / at, options["modality"]) if s.target is not None]


def _list(root: Path, _: dict[str, Any], file: str, at: str) -> list[Sample]:
    samples = []
    for number, line in enumerate(read_text(root / file).splitlines(), 1):
        path, gap, name = line.strip().rpartition(" ")
        if line.strip() and not gap:
            raise DataError(root / file, number, f"expected a path and a class, got {line!r}")
        if path:
            where = root / at / path.lstrip("/")
            samples.append(Sample(where, name, f"{root / file}: {path}", number))
    return samples


def _persons(
    root: Path, _: dict[str, Any], ids: Any, at: Any, query: Any = (), same_place: Any = ()
) -> list[Sample]:
    """Pictures of persons by the cameras ``at``; cameras of the same place count as one."""
    lists = [ids] if isinstance(ids, str) else ids
    numbers = [int(one) for name in lists for one in re.findall(r"\d+", read_text(root / name))]
    return [
        Sample(path, f"{number:04d}", str(path), camera=place, query=camera in query)
        for camera in at
        for place in (same_place[0] if camera in same_place else camera,)
        for number in numbers
        for path in sorted((root / camera / f"{number:04d}").glob("*.jpg"))
    ]


def _cameras(root: Path, _: dict[str, Any], files: Any, query: str = "") -> list[Sample]:
    """The pictures of a list for each camera."""
    return [
        replace(sample, camera=camera, query=camera == query)
        for camera, file in files.items()
        for sample in _list(root, _, file, ".")
    ]


def _choices(root: Path, _: dict[str, Any], at: Sequence[str]) -> list[Sample]:
    """Questions with four answers, of tables without a header; the target is a letter."""
    samples = []
    for file in (one for folder in at for one in sorted((root / folder).glob("*.csv"))):
        for number, row in enumerate(csv.reader(io.StringIO(read_text(file))), 1):
            if len(row) != 6 or row[5] not in tuple("ABCD"):
                said = f"expected a question, four answers and a letter, got {row}"
                raise DataError(file, number, said)
            answers = [f"{letter}. {text}" for letter, text in zip("ABCD", row[1:5], strict=True)]
            text = "\n".join([row[0], *answers, "Answer:"])
            samples.append(Sample(text, row[5], str(file), number))
    return samples


def _stations(root: Path, options: dict[str, Any], file: str, scale: float) -> list[Sample]:
    """Windows of each station of an array (hours, stations, features); the first feature counts.

    Of all windows at most ``limit`` are made, evenly spread over hours and stations.
    """
    try:
        hours: Any = np.load(root / file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(root / file, None, f"not an array of numbers: {error}") from error
    past, long = options["lookback"], options["lookback"] + options["horizon"]
    if hours.ndim != 3 or len(hours) < long:
        expected = f"expected (hours, stations, features) of at least {long} hours"
        raise DataError(root / file, None, f"the array has the shape {hours.shape}, {expected}")
    n = (len(hours) - long + 1) * hours.shape[1]
    samples = []
    for place in np.linspace(0, n - 1, min(n, options["limit"] or n)).astype(int).tolist():
        start, station = divmod(place, hours.shape[1])
        window = np.array(hours[start : start + long, station, :1], np.float32) * scale
        samples.append(Sample(window[:past], window[past:], f"{root / file}: hour {start}"))
    return samples


def _chestxray(root: Path, _: dict[str, Any], file: str) -> list[Sample]:
    """Pictures that a list names, with all findings; "No Finding" is none."""
    table = root / "Data_Entry_2017.csv"
    rows = read_table(table, ["Image Index", "Finding Labels"])
    found = {r["Image Index"]: tuple(r["Finding Labels"].split("|")) for r in rows}
    files = {path.name: path for path in sorted(root.glob("images*/**/*.png"))}
    samples = []
    for number, name in enumerate(read_text(root / file).split(), 1):
        if name not in found.keys() & files.keys():
            raise DataError(root / file, number, f"{name} is not in {table.name} and images*/")
        labels = tuple(one for one in found[name] if one != "No Finding")
        samples.append(Sample(files[name], labels, str(table)))
    return samples


def _audioset(root: Path, _: dict[str, Any], part: str) -> list[Sample]:
    """Segments with the names of all their classes; sounds that are gone are counted."""
    classes = root / "class_labels_indices.csv"
    name_of = {r["mid"]: r["display_name"] for r in read_table(classes, ["mid", "display_name"])}
    files = {path.stem: path for path in sorted((root / part).iterdir())}
    table, gone = root / f"{part}.csv", 0
    samples = []
    lines = csv.reader(io.StringIO(read_text(table)), skipinitialspace=True)
    for number, row in enumerate(lines, 1):
        if not row or row[0].startswith("#"):
            continue
        labels = row[3].split(",") if len(row) == 4 else []
        if not labels or not name_of.keys() >= set(labels):
            raise DataError(table, number, f"expected an id, two times and classes, got {row}")
        stems = (row[0], f"Y{row[0]}", f"{row[0]}_{row[1]}", f"{row[0]}_{float(row[1]):.0f}")
        path = next((files[stem] for stem in stems if stem in files), None)
        gone += path is None
        if path is not None:
            names = tuple(name_of[label] for label in labels)
            samples.append(Sample(path, names, str(table), number))
    logger.info("%s: %d sounds, %d more have no file", table, len(samples), gone)
    return samples


NYU_SCENES = frozenset(
    (
        *("bedroom", "kitchen", "living_room", "bathroom", "dining_room"),
        *("office", "home_office", "classroom", "bookstore"),
    )
)


def _nyu(root: Path, _: dict[str, Any], part: str) -> list[Sample]:
    """Depth in metres, every second pixel; the scene, "other" for all but nine."""
    try:
        import h5py
    except ImportError as error:
        raise MissingExtraError("nyu-d (h5py)", "modalities") from error
    path = root / "nyu_depth_v2_labeled.mat"
    rows = _matlab(root / "splits.mat", part).ravel().astype(int) - 1
    samples = []
    try:
        opened = h5py.File(path)
    except OSError as error:
        raise DataError(path, None, "not an HDF5 file that can be read") from error
    with opened as file:
        scenes = np.asarray(file["sceneTypes"]).ravel()
        for row in sorted(rows.tolist()):
            scene_name = "".join(map(chr, np.asarray(file[scenes[row]]).ravel()))
            depth = np.asarray(file["depths"][row, ::2, ::2]).T  # MATLAB's order of axes
            target = scene_name if scene_name in NYU_SCENES else "other"
            samples.append(Sample(depth, target, f"{path}: frame {row + 1}"))
    return samples


SUN_LEAST = 80
"""Scenes with more frames than these are classes, as in the data set's own benchmark."""


def _sunrgbd(root: Path, _: dict[str, Any], part: str) -> list[Sample]:
    """Depth, every second pixel, of the scenes that have enough frames."""
    split = root / "SUNRGBDtoolbox/traintestSUNRGBD/allsplit.mat"

    def folders(name: str) -> Iterator[tuple[Path, str]]:
        for one in _matlab(split, name).ravel():
            folder = root / "SUNRGBD" / str(np.squeeze(one)).partition("SUNRGBD/")[2]
            yield folder, read_text(folder / "scene.txt").strip()

    counts = Counter(
        name for split_name in ("alltrain", "alltest") for _, name in folders(split_name)
    )
    kept = {name for name, count in counts.items() if count > SUN_LEAST} or set(counts)
    return [
        Sample(_sun_depth(folder), name, str(folder))
        for folder, name in folders(part)
        if name in kept
    ]


def _sun_depth(folder: Path) -> Any:
    """Millimetres: the files hold them with their bits rotated by three."""
    files = sorted((folder / "depth_bfx").glob("*.png"))
    if not files:
        raise DataError(folder, None, "depth_bfx/ has no picture")
    raw = open_picture(files[0])[::2, ::2].astype(np.uint16)
    return (raw >> 3) | (raw << 13)


HERTZ, STEPS, MOST_WINDOWS = 50, 250, 32
"""Windows last 5 s; a video gives at most so many, evenly spread."""
_AXES = [f"{sensor}_{axis}" for sensor in ("accl", "gyro") for axis in "xyz"]


def _ego4d(root: Path, _: dict[str, Any], part: str) -> list[Sample]:
    """Windows of videos with one scenario. A fifth of the videos, by their ids, is the test."""
    samples: list[Sample] = []
    for video in json.loads(read_text(root / "ego4d.json")).get("videos", ()):
        uid, scenarios = video["video_uid"], video.get("scenarios") or []
        path = root / "imu" / f"{uid}.csv"
        tested = zlib.crc32(uid.encode()) % 5 == 0
        if len(scenarios) == 1 and path.is_file() and tested == (part == "test"):
            windows = [Sample(one, str(scenarios[0]), str(path)) for one in _windows(path)]
            samples += _thinned(windows, MOST_WINDOWS)
    return samples


def _windows(path: Path) -> Any:
    """(windows, STEPS, 6) at even times."""
    table: Any = np.genfromtxt(path, delimiter=",", names=True)
    missing = {"canonical_timestamp_ms", *_AXES} - set(table.dtype.names or ())
    if missing:
        raise DataError(path, 1, f"missing columns: {', '.join(sorted(missing))}")
    rows: Any = np.stack([np.atleast_1d(table[n]) for n in ("canonical_timestamp_ms", *_AXES)], 1)
    rows = rows[np.isfinite(rows).all(1)]
    rows = rows[rows[:, 0].argsort(kind="stable")]
    if len(rows) < 2:
        return np.zeros((0, STEPS, 6), np.float32)
    times = np.arange(rows[0, 0], rows[-1, 0], 1000 / HERTZ)
    even = np.stack(
        [np.interp(times, rows[:, 0], column) for column in np.asarray(rows)[:, 1:].T], 1
    )
    whole = len(even) // STEPS
    return even[: whole * STEPS].reshape(whole, STEPS, 6).astype(np.float32)


def _scene(root: Path, options: dict[str, Any], file: str, labels: str) -> list[Sample]:
    arrays = {"cube": _matlab(root / file, "input"), "labels": _matlab(root / file, labels)}
    return scene(root / file, arrays, options["patch_size"])


def _table(root: Path, options: dict[str, Any], file: str, target: str) -> list[Sample]:
    return read_samples(options["modality"], root / file, target)


def _molecules(
    root: Path, options: dict[str, Any], file: str, smiles: str, target: str
) -> list[Sample]:
    """Molecules with a known target; only those that are used become graphs."""
    path = root / file
    try:
        from rdkit import Chem
    except ImportError as error:
        raise MissingExtraError("pcqm4m (rdkit)", "modalities") from error
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [(n, row) for n, row in enumerate(csv.DictReader(lines), 2) if row.get(target)]
    named = _thinned(
        [Sample({"s": row[smiles]}, float(row[target]), "", n) for n, row in rows], options["limit"]
    )
    samples = []
    for one in named:
        assert isinstance(one.values, dict)
        parsed = Chem.MolFromSmiles(one.values["s"])
        if parsed is None:
            raise DataError(path, one.line, f"{one.values['s']!r} is no molecule")
        samples.append(Sample(molecule(parsed), one.target, str(path), one.line))
    return samples


def _matlab(path: Path, name: str) -> Any:
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        found = loadmat(path)
    except (OSError, ValueError, NotImplementedError, TypeError, MatReadError) as error:
        raise DataError(path, None, f"not a MATLAB file that can be read: {error}") from error
    if name not in found:
        known = ", ".join(key for key in found if not key.startswith("__"))
        raise DataError(path, None, f"the array {name!r} is missing; the arrays are {known}")
    return found[name]


_FORMS: dict[str, Callable[..., list[Sample]]] = {
    "folders": _folders,
    "list": _list,
    "persons": _persons,
    "cameras": _cameras,
    "choices": _choices,
    "stations": _stations,
    "chestxray": _chestxray,
    "audioset": _audioset,
    "nyu": _nyu,
    "sunrgbd": _sunrgbd,
    "ego4d": _ego4d,
    "scene": _scene,
    "table": _table,
    "molecules": _molecules,
}

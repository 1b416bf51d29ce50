"""Where the samples of files lie: 16 bytes a sample, on disk, mapped into memory by all processes.

Each file of samples has an index of its own: ``train-000000.tar.index.npz`` beside it, or in the
cache folder (``MICO_CACHE_DIR``) if nothing can be written there. It holds three arrays, one entry
a sample: ``start`` and ``size``, the sample's bytes in the file, and ``profile``, the number of
what it offers (:class:`Profile`). So a recipe's filters read 4 bytes a sample, and no file. An
index of another state of its file is made again. Of bad samples, it has the number, and what is
wrong with the first ``MOST_ERRORS``.

Processes that start together share the files out that have no index yet. Then the indexes of a
source's files are joined. Up to ``IN_MEMORY`` samples, the arrays are in memory. A larger source
has one joined index in the cache folder, made by the first process while the others wait. All
processes map it, so that the operating system holds its pages once.
"""

import hashlib
import json
import logging
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from mico_chat.errors import DataError
from mico_chat.media.addresses import Location, opened
from mico_chat.media.kinds import MODALITIES, Kind
from mico_chat.settings import cache_dir
from mico_training.data.sources.sample import Need, Skipped, TrainingSample

logger = logging.getLogger(__name__)

FORMAT = 2
SUFFIX = ".index.npz"
COLUMNS: dict[str, np.dtype[Any]] = {
    "start": np.dtype("<u8"),
    "size": np.dtype("<u4"),
    "profile": np.dtype("<u4"),
}
IN_MEMORY = 1_000_000
"""A process holds the arrays of so many samples itself (16 MB)."""
MOST_ERRORS = 1000  # that an index names

Columns = dict[str, npt.NDArray[Any]]
Kinds = frozenset[Kind]


@dataclass(frozen=True)
class Profile:
    """What a sample offers: the kinds of its captioned media; a skill and the kinds of the media of
    each question; the kinds of media in its conversation, None without one; whether there are two
    conversations, of which one is preferred."""

    captioned: Kinds = frozenset()
    asked: frozenset[tuple[str, Kinds]] = frozenset()
    conversation: Kinds | None = None
    paired: bool = False

    @classmethod
    def of(cls, sample: TrainingSample) -> "Profile":
        def kinds(names: Iterable[str]) -> Kinds:
            return frozenset(sample.media[name].kind for name in names)

        return cls(
            kinds(name for name, texts in sample.captions.items() if texts),
            frozenset((turn.skill, kinds(turn.media)) for turn in sample.turns),
            kinds(sample.media) if sample.conversation else None,
            bool(sample.rejected),
        )

    def offers(
        self,
        need: Need,
        skills: frozenset[str] = frozenset(),
        wanted: Kinds = frozenset(MODALITIES),
    ) -> bool:
        """Whether it has a stage's texts, about media of the ``wanted`` kinds, of these skills."""
        asked = [kinds for skill, kinds in self.asked if not skills or skill in skills]
        if skills and not asked:
            return False
        if need == "caption":
            return bool(self.captioned & wanted)
        talks = self.conversation is not None and self.conversation <= wanted
        if need == "preference":
            return talks and self.paired
        return (talks and need == "conversation") or any(kinds <= wanted for kinds in asked)

    def json(self) -> list[Any]:
        asked = sorted([skill, sorted(kinds)] for skill, kinds in self.asked)
        return [
            sorted(self.captioned),
            asked,
            None if self.conversation is None else sorted(self.conversation),
            *([True] if self.paired else []),
        ]

    @classmethod
    def from_json(cls, content: list[Any]) -> "Profile":
        captioned, asked, conversation, *paired = content
        questions = frozenset((skill, frozenset(kinds)) for skill, kinds in asked)
        return cls(
            frozenset(captioned),
            questions,
            None if conversation is None else frozenset(conversation),
            bool(paired),
        )


Found = tuple[int, int, Profile] | DataError
"""A sample's start and size in its file, and what it offers; or what is wrong with a bad one."""


class Index:
    """The samples of some files, in order, without the ``bad`` ones; ``ends``: their number to each
    file's end."""

    def __init__(
        self,
        files: Sequence[Location],
        ends: npt.NDArray[np.int64],
        profiles: Sequence[Profile],
        columns: Columns | Path,
        bad: Skipped,
    ) -> None:
        self.files = tuple(files)
        self.ends = ends
        self.profiles = tuple(profiles)
        self.bad = bad
        self._columns = columns
        self._open()

    def _open(self) -> None:
        held = self._columns
        if isinstance(held, Path):
            held = {name: np.load(held / f"{name}.npy", mmap_mode="r") for name in COLUMNS}
        self.start, self.size, self.profile = (held[name] for name in COLUMNS)

    def __getstate__(self) -> dict[str, Any]:
        lost = ("start", "size", "profile")
        return {name: value for name, value in self.__dict__.items() if name not in lost}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def place(self, number: int) -> tuple[Location, int, int]:
        file = self.files[int(self.ends.searchsorted(number, side="right"))]
        return file, int(self.start[number]), int(self.size[number])

    def offering(self, offers: Callable[[Profile], bool]) -> Iterator[npt.NDArray[np.bool_]]:
        """For runs of samples in order: whether each offers something."""
        known = np.array([offers(profile) for profile in self.profiles], dtype=bool)
        for first in range(0, len(self), IN_MEMORY):
            yield known[self.profile[first : first + IN_MEMORY]]


def open_index(
    files: Mapping[Location, str], scan: Callable[[Location], Iterator[Found]], form: str
) -> Index:
    """The index of files with their fingerprints.

    ``scan`` reads a file that has no index; ``form`` names its way to read, and that way's version.
    """
    name = _digest(form, *(f"{file} {state}" for file, state in files.items()))
    joined = cache_dir() / "index" / name
    about = joined / "about.json"
    if not about.is_file():
        stored = _index_all(files, scan, form)
        abouts = [_about(place) for place in stored]
        counts = [one["count"] for one in abouts]
        own = zip(files, abouts, strict=True)
        errors = [(str(file), *error) for file, one in own for error in one["errors"]]
        bad = {"bad": sum(one["bad"] for one in abouts), "errors": errors[:MOST_ERRORS]}
        if sum(counts) <= IN_MEMORY:
            numbers: dict[Profile, int] = {}
            parts = [_renumbered(place, numbers) for place in stored]
            columns = {name: np.concatenate([part[name] for part in parts]) for name in COLUMNS}
            return Index(tuple(files), np.cumsum(counts), tuple(numbers), columns, _skipped(bad))
        with _alone(joined):
            if not about.is_file():
                _join(joined, stored, counts, bad)
    found = json.loads(about.read_text(encoding="utf-8"))
    profiles = tuple(map(Profile.from_json, found["profiles"]))
    ends = np.array(found["ends"], dtype=np.int64)
    return Index(tuple(files), ends, profiles, joined, _skipped(found))


def _skipped(about: Mapping[str, Any]) -> Skipped:
    return Skipped(about["bad"], tuple(DataError(*error) for error in about["errors"]))


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join((str(FORMAT), *texts)).encode()).hexdigest()[:24]


@contextmanager
def _alone(path: Path, timeout: float = -1) -> Iterator[None]:
    lock = path.with_name(f"{path.name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock, timeout=timeout):
        yield
    lock.unlink(missing_ok=True)


# --- the index of one file ------------------------------------------------------------------------


def _index_all(
    files: Mapping[Location, str], scan: Callable[[Location], Iterator[Found]], form: str
) -> list[Location]:
    """Where the index of each file is; those that are missing are made."""
    found = {file: _stored(file, state, form) for file, state in files.items()}
    for timeout in (0, -1):  # first those at which no other process is, then wait for the others
        for file in [file for file, place in found.items() if place is None]:
            with suppress(Timeout), _alone(_cached(file, files[file]), timeout):
                found[file] = _stored(file, files[file], form) or _store(
                    file, files[file], form, scan(file)
                )
    return [place for place in found.values() if place is not None]


def _beside(file: Location) -> Location:
    return file.with_name(file.name + SUFFIX) if isinstance(file, Path) else file + SUFFIX


def _cached(file: Location, state: str) -> Path:
    return cache_dir() / "index" / (_digest(str(file), state) + SUFFIX)


def _stored(file: Location, state: str, form: str) -> Location | None:
    """Where a file's index is, if it is up to date.

    At an address it was copied there together with the file, so that only the size can tell.
    """
    for place in (_cached(file, state), _beside(file)):
        with suppress(OSError, EOFError, ValueError, KeyError, BadZipFile):
            about = _about(place)
            now, then = (
                text if isinstance(place, Path) else text.partition("-")[0]
                for text in (state, about["state"])
            )
            if (about["format"], about["form"], then) == (FORMAT, form, now):
                return place
    return None


def _about(place: Location) -> dict[str, Any]:
    with opened(place) as stream, np.load(stream, allow_pickle=False) as arrays:
        about: dict[str, Any] = json.loads(arrays["about"].tobytes())
    return about


def _store(file: Location, state: str, form: str, found: Iterable[Found]) -> Path:
    logger.info("%s: making its index", file)
    numbers: dict[Profile, int] = {}
    rows = array("Q")  # 24 bytes a sample
    bad: list[tuple[int | None, str]] = []
    n_bad = 0
    for one in found:
        if isinstance(one, DataError):
            n_bad += 1
            bad += [one.args[1:]][: MOST_ERRORS - len(bad)]
            continue
        start, size, profile = one
        if size >= 2**32:
            raise DataError(file, None, f"the sample at byte {start} has 4 GiB or more")
        rows.extend((start, size, numbers.setdefault(profile, len(numbers))))
    table = np.array(rows, dtype=np.uint64).reshape(-1, len(COLUMNS))
    columns = {name: table[:, n].astype(kind) for n, (name, kind) in enumerate(COLUMNS.items())}
    about = {"format": FORMAT, "form": form, "state": state, "count": len(table)}
    about |= {"bad": n_bad, "errors": bad, "profiles": [p.json() for p in numbers]}
    return write_index(file, state, about, columns)


def write_index(file: Location, state: str, about: Mapping[str, Any], columns: Columns) -> Path:
    arrays: Any = {"about": np.frombuffer(json.dumps(about).encode(), dtype=np.uint8), **columns}
    cached, beside = _cached(file, state), _beside(file)
    for place in (beside, cached):
        if isinstance(place, Path):
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.NamedTemporaryFile(dir=place.parent, delete=False) as partial:
                    np.savez(partial, **arrays)
                Path(partial.name).chmod(0o644)
                Path(partial.name).replace(place)
                return place
            except OSError as error:
                reason = f"{place.parent} ({error.strerror}); set MICO_CACHE_DIR"
    raise DataError(file, None, f"its index cannot be written to {reason}")


# --- many files -----------------------------------------------------------------------------------


def _renumbered(place: Location, numbers: dict[Profile, int]) -> Columns:
    """A file's columns; ``numbers`` are those of the profiles of all files, and get more."""
    with opened(place) as stream, np.load(stream, allow_pickle=False) as arrays:
        columns = {name: arrays[name] for name in COLUMNS}
        profiles = json.loads(arrays["about"].tobytes())["profiles"]
    own = [numbers.setdefault(Profile.from_json(p), len(numbers)) for p in profiles]
    columns["profile"] = np.array(own, dtype=COLUMNS["profile"])[columns["profile"]]
    return columns


def _join(
    folder: Path, stored: Sequence[Location], counts: Sequence[int], bad: Mapping[str, Any]
) -> None:
    logger.info("%s: joining the indexes of %d files", folder, len(stored))
    partial = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        whole = {
            name: np.lib.format.open_memmap(partial / f"{name}.npy", "w+", kind, (sum(counts),))
            for name, kind in COLUMNS.items()
        }
        numbers: dict[Profile, int] = {}
        first = 0
        for place, count in zip(stored, counts, strict=True):
            for name, column in _renumbered(place, numbers).items():
                whole[name][first : first + count] = column
            first += count
        for array in whole.values():
            array.flush()
        ends = np.cumsum(counts).tolist()
        about = {"ends": ends, "profiles": [profile.json() for profile in numbers], **bad}
        (partial / "about.json").write_text(json.dumps(about), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)

"""Weight files: are they there and whole? Their headers are read, no weight is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open

_LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class Weights:
    """The weights of a folder: bytes on disk, each tensor's shape, and what is wrong with them.

    ``pickled``: there are none in safetensors, but ``.bin`` files, whose headers cannot be read.
    """

    size: int = 0
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    faults: tuple[str, ...] = ()
    pickled: bool = False


class _Index(BaseModel):
    """Which file has which tensor."""

    weight_map: dict[str, str]


def read_weights(folder: Path, stem: str = "model") -> Weights:
    """The weights that Hugging Face would load from a folder.

    ``stem``: ``model``, or ``adapter_model`` of an adapter.
    """
    index = folder / f"{stem}.safetensors.index.json"
    single = folder / f"{stem}.safetensors"
    if index.is_file():
        return _sharded(index)
    if single.exists() or single.is_symlink():
        return _read(folder, [single.name])
    patterns = ("pytorch_model*.bin", f"{stem}.bin")
    pickled = [file for pattern in patterns for file in folder.glob(pattern)]
    if pickled:
        return Weights(sum(file.stat().st_size for file in pickled), pickled=True)
    return Weights(faults=(f"no {single.name} in {folder}",))


def _sharded(index: Path) -> Weights:
    try:
        named = _Index.model_validate_json(index.read_bytes()).weight_map
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        return Weights(faults=(f"{index.name} is no index of shards ({reason})",))
    found = _read(index.parent, sorted(set(named.values())))
    lost = sorted(named.keys() - found.shapes.keys()) if not found.faults else []
    if lost:
        fault = f"{named[lost[0]]} lacks {lost[0]}, which {index.name} says it has"
        return Weights(found.size, found.shapes, (fault,))
    return found


def _read(folder: Path, names: list[str]) -> Weights:
    size, faults = 0, []
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        file = folder / name
        if not file.is_file():
            what = "leads to a file that is not there" if file.is_symlink() else "is missing"
            faults.append(f"{name} {what}")
            continue
        size += file.stat().st_size
        try:
            with safe_open(file, framework="np") as tensors:
                for tensor in tensors.keys():  # noqa: SIM118  # not a mapping
                    shapes[tensor] = tuple(tensors.get_slice(tensor).get_shape())
        except (SafetensorError, OSError) as error:
            faults.append(f"{name} {_fault(file, error)}")
    return Weights(size, shapes, tuple(faults))


def _fault(file: Path, error: Exception) -> str:
    with file.open("rb") as opened:
        if opened.read(len(_LFS)) == _LFS:
            return "is a Git LFS pointer instead of the weights (git lfs pull)"
    return f"is not whole: {file.stat().st_size} bytes, {str(error).splitlines()[0]}"


def disagreements(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> str | None:
    """What the first disagreement of a checkpoint's tensors with its config is, in words."""
    both = sorted(expected.keys() & found.keys())
    wrong = [name for name in both if found[name] != expected[name]]
    if wrong:
        first = wrong[0]
        return (
            f"{first} is {list(found[first])} in the file but {list(expected[first])} by the "
            f"config ({len(wrong)} such)"
        )
    lost, more = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if lost:
        return f"{lost[0]} is in no file ({len(lost)} such)"
    return f"{more[0]} is in a file but not in the model ({len(more)} such)" if more else None

"""Models of the hub (Hugging Face) in the cache that other tools share: pulled, listed, removed.

Of a model's files those are fetched that it needs to run: one format of its weights, not the same
weights again for other programs. The hub's own library downloads, resumes and checks them.
"""

from __future__ import annotations

import errno
import glob
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mico_chat.errors import ConfigError, ModelError

FOREIGN = (
    *("onnx/*", "openvino/*", "original/*", "coreml/*", "gguf/*", "*.onnx*", "*.tflite"),
    *("*.mlmodel", "*.msgpack", "*.h5", "*.ot", "*.ckpt", "*.nemo"),
    *("flax_model*", "tf_model*", "rust_model*"),
    *("training_args.bin", "optimizer.*", "scheduler.*", "rng_state*", ".git*"),
)
"""Files of a model's repository that are for other programs."""

PICKLED = ("*.bin", "*.pt", "*.pth")
"""Weights in Python's pickle format; safetensors have the same ones."""

AGAIN = ("consolidated*.safetensors", "*.fp16.safetensors", "*.fp16-*.safetensors")
"""These files have the weights of ``model*.safetensors`` again, in another order or precision."""

DEFAULT_QUANTIZATION = "Q4_K_M"
PROJECTORS = ("bf16", "f16", "f32", "")
"""Precisions of a GGUF model's media encoder (mmproj), the preferred one first: Gemma 4's needs
bfloat16."""

_QUANTIZATION = re.compile(
    r"(?i)(?<![a-z0-9])((?:ud-)?i?q\d+_\w+|bf16|f16|f32|fp16|fp32)(?![a-z0-9])"
)
_NAME = re.compile(r"[\w.-]+/[\w.-]+|[\w.-]+")


@dataclass(frozen=True)
class HubName:
    """``owner/model``, or ``owner/model:Q4_K_M`` for one quantization of a GGUF repository."""

    repo: str
    quantization: str | None = None

    @classmethod
    def of(cls, text: str) -> HubName:
        repo, colon, quantization = text.partition(":")
        if not _NAME.fullmatch(repo) or (colon and not quantization):
            raise ConfigError(
                f"{text!r} is no name of a model on the hub; it looks like Qwen/Qwen2.5-Omni-3B "
                "or ggml-org/Qwen2.5-Omni-3B-GGUF:Q4_K_M"
            )
        return cls(repo, quantization or None)


def quantization_of(file: str) -> str | None:
    """``"Q4_K_M"`` of ``"model-Q4_K_M-00001-of-00002.gguf"``."""
    found = _QUANTIZATION.findall(re.sub(r"-\d{5}-of-\d{5}", "", Path(file).stem))
    return found[-1].upper() if found else None


def needed_files(name: HubName, files: Iterable[str]) -> list[str]:
    """The files of a repository that a model needs to run."""
    kept = [file for file in files if not _matches(file, FOREIGN)]
    ggufs = [file for file in kept if file.endswith(".gguf")]
    tensors = [file for file in kept if file.endswith(".safetensors")]
    if name.quantization is not None or (ggufs and not tensors):
        return _gguf_files(name, ggufs)
    kept = [file for file in kept if file not in ggufs]
    if tensors:
        kept = [file for file in kept if not _matches(file, PICKLED)]
    if any(fnmatch(file, "model*.safetensors") for file in tensors):
        kept = [file for file in kept if not _matches(file, AGAIN)]
    if not any(_matches(file, ("*.safetensors", *PICKLED)) for file in kept):
        raise ModelError(f"{name.repo}: the hub has no weights of this model that can be run here")
    return kept


def _matches(file: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(file, pattern) for pattern in patterns)


def _gguf_files(name: HubName, ggufs: Sequence[str]) -> list[str]:
    projectors = [file for file in ggufs if "mmproj" in file.lower()]
    models = {file: quantization_of(file) for file in ggufs if file not in projectors}
    known = sorted({one for one in models.values() if one is not None})
    usual = [DEFAULT_QUANTIZATION] if DEFAULT_QUANTIZATION in known else known
    wanted = name.quantization or (usual[0] if len(usual) == 1 else None)
    found = [file for file, one in models.items() if one == (wanted or "").upper()]
    if not found and len(models) == 1 and name.quantization is None:
        found = list(models)
    if not found:
        listed = ", ".join(known) or "no GGUF files"
        problem = f"no quantization {wanted!r}" if wanted else "several quantizations"
        example = f": mico-chat pull {name.repo}:{known[0]}" if known else ""
        raise ModelError(f"{name.repo}: {problem} there; it has {listed}{example}")
    for precision in PROJECTORS:
        if of := [file for file in projectors if precision in Path(file).stem.lower().split("-")]:
            return [*found, of[0]]
    return [*found, *projectors[:1]]


def cached_folder(repo: str, **options: Any) -> Path | None:
    """A repository's folder in the hub's cache; None if not all files of the options are there.

    The options are those of ``snapshot_download``.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, **{**options, "local_files_only": True}))
    except (OSError, ValueError):
        return None


@contextmanager
def hub_errors(repo: str, cache: Path | None = None, behind: str = "") -> Iterator[None]:
    """A ModelError in place of what the hub's library raises: each release has other errors."""
    try:
        yield
    except Exception as error:
        reason = hub_reason(error)
        if cache is not None and isinstance(error, OSError) and error.errno == errno.ENOSPC:
            reason = f"the disk of {cache} is full: make room, or set HF_HOME"
        raise ModelError(f"{repo}: {reason}{behind}") from error


def hub_reason(error: Exception) -> str:
    """Why the hub's library raised an error, and what the user can do."""
    from huggingface_hub import errors

    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        return f"{error} {hub_reason(error.__cause__)}"  # one of the files that are uploaded
    causes: list[BaseException] = [error]
    while (before := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(before)
    if any(isinstance(cause, errors.OfflineModeIsEnabled) for cause in causes):
        return "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE keeps the hub from being asked"
    if isinstance(error, errors.GatedRepoError):
        return "the hub gives this model only to those who accepted its terms (hf auth login)"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub has no such model, or a private one (hf auth login)"
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code == 401:
        return "the hub does not know the token of this machine (hf auth login, HF_TOKEN)"
    transport = {"TransportError", "ConnectionError"}  # of httpx and of requests
    names = {base.__name__ for cause in causes for base in type(cause).__mro__}
    if isinstance(error, errors.LocalEntryNotFoundError) or names & transport:
        return "the hub (Hugging Face) cannot be reached: is there a network?"
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"the hub refuses it: {first}"


# --- pulling --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What is to be fetched: the files' bytes by name, and those that are here already."""

    name: HubName
    files: Mapping[str, int]
    here: frozenset[str]
    cache: Path
    model_type: str | None

    @property
    def total(self) -> int:
        return sum(self.files.values())

    @property
    def missing(self) -> int:
        """Bytes to download."""
        return sum(size for file, size in self.files.items() if file not in self.here)

    @property
    def weights(self) -> int:
        kinds = (".safetensors", ".gguf", ".bin", ".pt", ".pth")
        return sum(size for file, size in self.files.items() if file.endswith(kinds))


def plan(text: str) -> Plan:
    """Ask the hub which files a model has, and how large they are."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    name = HubName.of(text)
    with hub_errors(name.repo):
        info = HfApi().model_info(name.repo, files_metadata=True)
    sizes = {one.rfilename: one.size or 0 for one in info.siblings or ()}
    files = {file: sizes[file] for file in needed_files(name, sizes)}
    found = {file: try_to_load_from_cache(name.repo, file, revision=info.sha) for file in files}
    here = frozenset(file for file, place in found.items() if isinstance(place, str))
    model_type = (info.config or {}).get("model_type")
    return Plan(name, files, here, Path(constants.HF_HUB_CACHE), model_type)


def fetch(planned: Plan, bars: type[Any]) -> Path:
    """Download what is missing; returns the folder. ``bars`` is the class of progress bars.

    Files that are whole are kept if another one fails, and a connection that breaks is taken up
    again where it broke.
    """
    from huggingface_hub import snapshot_download

    repo = planned.name.repo
    patterns = [glob.escape(file) for file in planned.files]
    kept = "; the files that are whole are kept: pull again to go on"
    with hub_errors(repo, planned.cache, kept):
        return Path(snapshot_download(repo, allow_patterns=patterns, tqdm_class=bars))


def fetch_config(name: HubName) -> None:
    """Download the ``config.json`` of a model, which is small."""
    from huggingface_hub import hf_hub_download

    with hub_errors(name.repo):
        hf_hub_download(name.repo, "config.json")


# --- what is here ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class CachedModel:
    """A model in the hub's cache; ``folder`` is None if no file of it is whole.

    ``last_used`` is in seconds since 1970. ``partial``: files with weights are missing.
    """

    name: str
    repo_folder: Path
    folder: Path | None
    bytes: int
    last_used: float
    partial: bool


def cached_models() -> list[CachedModel]:
    """All models in the hub's cache, those of other tools too, in the order of their names."""
    from huggingface_hub import constants, scan_cache_dir

    cache = Path(constants.HF_HUB_CACHE)
    if not cache.is_dir():
        return []
    found: dict[Path, CachedModel] = {}
    for repo in scan_cache_dir(cache).repos:
        if repo.repo_type == "model":
            newest = max(repo.revisions, key=lambda one: one.last_modified, default=None)
            folder = None if newest is None else newest.snapshot_path
            unfinished = _unfinished(repo.repo_path)
            found[repo.repo_path] = CachedModel(
                repo.repo_id,
                repo.repo_path,
                folder,
                repo.size_on_disk + sum(file.stat().st_size for file in unfinished),
                repo.last_accessed,
                bool(unfinished) or folder is None or not is_whole(folder),
            )
    for path in cache.glob("models--*"):  # the scan leaves out those without a whole file
        if path not in found:
            size = sum(file.stat().st_size for file in _unfinished(path))
            name = path.name.removeprefix("models--").replace("--", "/")
            found[path] = CachedModel(name, path, None, size, path.stat().st_mtime, True)
    return sorted(found.values(), key=lambda one: one.name.lower())


def _unfinished(repo_folder: Path) -> list[Path]:
    return list((repo_folder / "blobs").glob("*.incomplete"))


def is_whole(folder: Path) -> bool:
    """Whether a folder has weights, and all files that their index names."""
    for index in folder.glob("*.index.json"):
        try:
            named = set(json.loads(index.read_bytes())["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False
        if index.name.endswith(".safetensors.index.json") or not any(folder.glob("*.safetensors")):
            return all((folder / file).is_file() for file in named)
    return any(any(folder.rglob(f"*{ending}")) for ending in (".safetensors", ".gguf", ".bin"))


def remove(name: str) -> CachedModel:
    """Delete a model from the hub's cache; returns what it was."""
    from huggingface_hub import scan_cache_dir

    models = {model.name: model for model in cached_models()}
    if name not in models:
        there = ", ".join(models) or "no model"
        raise ModelError(f"{name}: it is not in the hub's cache, which has {there}")
    model = models[name]
    try:
        cache = scan_cache_dir(model.repo_folder.parent)
        for repo in cache.repos:
            if repo.repo_path == model.repo_folder:
                hashes = [revision.commit_hash for revision in repo.revisions]
                cache.delete_revisions(*hashes).execute()
        if model.repo_folder.is_dir():  # a download of which no file is whole
            shutil.rmtree(model.repo_folder)
    except OSError as error:
        raise ModelError(f"{name}: cannot be deleted: {error.strerror or error}") from error
    return model

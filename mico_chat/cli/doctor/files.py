"""A checkpoint's files: whole, and of one model?"""

from __future__ import annotations

import textwrap
from pathlib import Path

from mico_chat.checkpoints.base_llm import PACKAGED
from mico_chat.checkpoints.folders import PRETRAINING
from mico_chat.checkpoints.pretrained import MicoChatForConditionalGeneration
from mico_chat.cli.doctor.finding import Finding, gigabytes
from mico_chat.cli.doctor.weights import Weights, disagreements, read_weights
from mico_chat.errors import MicoError
from mico_chat.model.processing import MicoChatProcessor


def own_weights_finding(
    place: Path, chat: MicoChatForConditionalGeneration, *, elsewhere: bool
) -> Finding:
    """The checkpoint's own weights against its config: every tensor there, of the right shape.

    ``chat``: the model by the config, on the meta device, without its language model, whose
    weights lie ``elsewhere`` or in the same files.
    """
    weights = read_weights(place)
    if weights.faults or weights.pickled:
        return _not_whole("checkpoint", weights, place)
    expected = {name: tuple(tensor.shape) for name, tensor in chat.state_dict().items()}
    found = {name: s for name, s in weights.shapes.items() if not name.startswith("llm.")}
    wrong = disagreements(found, expected)
    if wrong is None and not elsewhere and len(found) == len(weights.shapes):
        wrong = "the config names no base LLM, and the files hold none"
    facts = {"bytes": weights.size, "tensors": len(weights.shapes)}
    if wrong is not None:
        mend = "fetch or write the checkpoint again: weights and config.json are not of one model"
        return Finding("checkpoint", "problem", wrong, mend, facts)
    text = f"{len(weights.shapes)} tensors, {gigabytes(weights.size)}, as the config has them"
    beside = place / PRETRAINING
    if beside.is_dir():
        branch = read_weights(beside)
        if branch.faults:
            return _not_whole("checkpoint", branch, beside)
        text += f"; a text branch of {gigabytes(branch.size)}"
    return Finding("checkpoint", "ok", text, facts=facts)


def llm_finding(name: str, place: Path) -> Finding:
    """A language model's folder: its weights, whether in a form that every engine reads."""
    weights = read_weights(place)
    if weights.faults:
        mend = "mico-chat setup" if name in PACKAGED else f"hf download {name}"
        if name in PACKAGED:
            mend = f"rm -r {place} && {mend}"
        return _not_whole("language model", weights, place, mend)
    facts = {"folder": str(place), "bytes": weights.size}
    text = f"{name}, {gigabytes(weights.size)} in {place}"
    if weights.pickled:
        text += ": .bin files, of which only the transformers engine can take the token table"
        mend = "write it again as safetensors (save_pretrained)"
        return Finding("language model", "warning", text, mend, facts)
    return Finding("language model", "ok", text, facts=facts)


def adapter_finding(adapter: Path) -> Finding:
    """The checkpoint's adapter, which is merged into the language model when it is loaded."""
    weights = read_weights(adapter, "adapter_model")
    if weights.faults:
        return _not_whole("adapter", weights, adapter)
    if not (adapter / "adapter_config.json").is_file():
        text = f"no adapter_config.json in {adapter}"
        return Finding("adapter", "problem", text, "fetch or write the checkpoint again")
    text = f"{gigabytes(weights.size)} in {adapter}"
    return Finding("adapter", "ok", text, facts={"bytes": weights.size})


def _not_whole(what: str, weights: Weights, place: Path, mend: str | None = None) -> Finding:
    if weights.pickled:
        text = f"{place} has .bin files alone: a checkpoint's weights are safetensors"
        return Finding(what, "problem", text, "write the checkpoint again (save_pretrained)")
    text = "; ".join(weights.faults)
    if str(place) not in text:
        text += f" (in {place})"
    return Finding(what, "problem", text, mend or "fetch or write the checkpoint again")


def processor_finding(place: Path) -> Finding:
    """Tokenizer, chat template and preprocessing, by loading them."""
    try:
        processor = MicoChatProcessor.from_pretrained(place)
    except (OSError, ValueError, TypeError, KeyError, ImportError, MicoError) as error:
        text = textwrap.shorten(f"cannot be loaded: {error}", 200, placeholder=" ...")
        return Finding("processor", "problem", text, "fetch or write the checkpoint again")
    if processor.chat_template is None:
        return Finding("processor", "problem", f"no chat template in {place}")
    text = f"tokenizer of {len(processor.tokenizer)} tokens, chat template, preprocessing"
    return Finding("processor", "ok", text)

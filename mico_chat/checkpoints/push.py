"""A model's folder goes to the hub: its files, a model card, and code that finds this package.

transformers knows a model of another project by code in its repository. Here that is an import.
"""

import json
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from transformers import AutoConfig

from mico_chat.checkpoints.configs import read_part
from mico_chat.checkpoints.folders import DEFAULT, LLM, model_folder
from mico_chat.checkpoints.hub import FOREIGN, HubName, hub_errors, is_whole
from mico_chat.errors import ConfigError, ModelError
from mico_chat.model.config import MicoChatConfig, MicoConfig

LEFT_OUT = (*FOREIGN, "checkpoint-*", "runs/*", "log.jsonl", ".*", "*/.*")

CODE = b"""\
from mico_chat.checkpoints.pretrained import MicoChatConfig, MicoChatProcessor
from mico_chat.model.pretraining import MicoConfig
"""

CARD = """\
---\n{about}\n---\n# {name}\n
`pip install mico-chat`, then `AutoModel.from_pretrained("{name}", trust_remote_code=True)`, or
`mico-chat serve --model {name}` for a chat model.\n\n| stage of training | data |\n|---|---|
"""


def push(model: str, name: str, licence: str, parts: Sequence[Path], private: bool) -> str:
    """Upload a model's folder to ``name`` in one commit; gives its address.

    The card shows the files ``parts``; a README.md in the folder stands in its place. A push that
    broke off goes on when it is made again, because the hub keeps each large file that is whole.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, ModelCardData, get_token

    repo, folder = HubName.of(name).repo, Path(model_folder(model))
    config = read_part(AutoConfig, folder, "configuration") if folder.is_dir() else None
    if not isinstance(config, MicoConfig | MicoChatConfig) or not is_whole(folder):
        raise ModelError(f"{model}: this is no folder with a MiCo or MiCo-Chat model's weights")
    task, base = "feature-extraction", None
    if isinstance(config, MicoChatConfig):
        task, base = "any-to-any", None if config.base_llm == LLM else config.base_llm
        if base is not None and Path(base).expanduser().is_dir():
            where = f"its language model is in {base}, where nobody else finds it"
            raise ModelError(f"{model}: {where}: `mico-chat merge` puts it into the folder")
        base = "HuggingFaceTB/SmolLM2-135M-Instruct" if base == DEFAULT else base
    if get_token() is None:
        raise ConfigError("there is no token of the hub here: hf auth login, or set HF_TOKEN")
    about = ModelCardData(
        license=licence, library_name="mico-chat", pipeline_tag=task, base_model=base
    )
    card = CARD.format(about=about, name=repo)
    for one in config.trained_on or [{"stage": "unknown", "data": None}]:
        card += f"| {one['stage']} | {', '.join(one['data'] or ['unknown'])} |\n"
    for part in parts:
        text = part.read_text(encoding="utf-8").strip()
        shown = text if part.suffix == ".md" else f"```{part.suffix[1:]}\n{text}\n```"
        card += f"\n## {part.stem}\n\n{shown}\n"
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    kept = {f: path for f, path in found.items() if not any(fnmatch(f, one) for one in LEFT_OUT)}
    files: dict[str, Path | bytes] = {"README.md": card.encode(), "mico_chat_code.py": CODE, **kept}
    names = {"AutoConfig": type(config).__name__, "AutoProcessor": "MicoChatProcessor"}
    auto_map = {auto: f"mico_chat_code.{name}" for auto, name in names.items()}
    for file in {"config.json", "processor_config.json"} & kept.keys():
        content = json.loads(kept[file].read_text(encoding="utf-8")) | {"auto_map": auto_map}
        files[file] = json.dumps(content, indent=2).encode()
    with hub_errors(repo, behind="; large files that arrived are kept: push again to go on"):
        url = HfApi().create_repo(repo, private=private or None, exist_ok=True)
        added = [CommitOperationAdd(file, content) for file, content in files.items()]
        HfApi().create_commit(url.repo_id, added, commit_message="Upload by mico-chat push")
    return str(url)

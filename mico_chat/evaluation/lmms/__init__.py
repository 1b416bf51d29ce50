"""The plugin of lmms-eval: the model ``mico_chat``, which answers through our engines.

lmms-eval finds it by an entry point in ``pyproject.toml``. ``docs/lmms-eval.md`` has the commands.
"""

from typing import Any


def manifest() -> Any:
    from lmms_eval.models.registry_v2 import ModelManifest

    module = "mico_chat.evaluation.lmms.model"
    return ModelManifest(
        "mico_chat",
        chat_class_path=f"{module}.MicoChat",
        simple_class_path=f"{module}.MicoChatSimple",
    )

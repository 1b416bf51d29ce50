"""Versions of annotators: model, weights, settings. Their answers change only with them."""

import hashlib
import json
from typing import Any


def version_of(model: str, weights: str, **settings: Any) -> str:
    """``model@weights+settings``, the settings as a digest of 8 hexadecimal digits."""
    said = json.dumps(settings, sort_keys=True, ensure_ascii=False, default=str)
    return f"{model}@{weights}+{hashlib.sha256(said.encode()).hexdigest()[:8]}"

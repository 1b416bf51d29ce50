"""Tiny random depth estimators of transformers, saved into folders."""

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTImageProcessor,
)

LAYERS: dict[str, Any] = {"out_indices": [1, 2, 3, 4]}


def depth_model(folder: Path, kind: str, max_depth: int = 1, flat: bool = False) -> str:
    """A random Depth Anything; a ``flat`` one sees a plane at half its ``max_depth``."""
    torch.manual_seed(0)
    backbone = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=28,
        reshape_hidden_states=False,
        **LAYERS,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=16,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        head_hidden_size=4,
        depth_estimation_type=kind,
        max_depth=max_depth,
    )
    model = DepthAnythingForDepthEstimation(config)
    with torch.no_grad():
        for weight in model.head.parameters():
            weight.normal_(std=0.0 if flat else 0.5)
        if kind == "relative":
            nn.init.constant_(cast(Tensor, model.head.conv3.bias), 3.0)
    model.save_pretrained(folder)
    DPTImageProcessor(size={"height": 28, "width": 28}).save_pretrained(folder)
    return str(folder)

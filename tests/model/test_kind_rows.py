"""A checkpoint knows the kinds of media by name: a new kind leaves it as it is."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from mico_chat.adapters.mico import MicoAdapter
from mico_chat.checkpoints.pretrained import MicoChatForConditionalGeneration
from mico_chat.errors import ConfigError, ModelError
from mico_chat.media.kinds import KINDS, MODALITIES, TABLE
from mico_chat.model import context
from mico_chat.model.config import KIND_ROWS, MicoChatConfig, MicoConfig
from mico_chat.model.context import KindRows
from mico_chat.model.pretraining import MicoForPretraining
from tests.support.tiny import SIDE, chat_model, processor_for

THERMAL = len(KINDS)


def seen(model: MicoChatForConditionalGeneration, kind: int) -> Tensor:
    pixels = torch.ones(1, 3, SIDE, SIDE) / 2
    with torch.inference_mode():
        return model.context_tokens(torch.tensor([kind]), torch.tensor([1]), pixels)[0]


@pytest.fixture
def old(tmp_path: Path) -> MicoChatForConditionalGeneration:
    model = chat_model(MicoChatConfig.tiny())
    model.save_pretrained(tmp_path)
    return model


@pytest.fixture
def new_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cast(Any, TABLE), "thermal", TABLE["image"])
    monkeypatch.setattr(context, "KINDS", tuple(TABLE))


def test_an_old_checkpoint_is_read_beside_a_new_kind_and_refuses_it(
    tmp_path: Path, old: MicoChatForConditionalGeneration, new_kind: None
) -> None:
    before = [seen(old, kind) for kind in range(len(MODALITIES))]
    model = MicoChatForConditionalGeneration.from_pretrained(tmp_path)
    for kind, tokens in enumerate(before):
        torch.testing.assert_close(seen(model, kind), tokens)
    with pytest.raises(ModelError, match=r"kind 'thermal', only image, audio.*kind_rows"):
        seen(model, THERMAL)
    config = MicoChatConfig.from_pretrained(tmp_path)
    config.context_config.kind_rows["thermal"] = config.context_config.kind_rows["image"]
    lent = MicoChatForConditionalGeneration.from_pretrained(tmp_path, config=config)
    torch.testing.assert_close(seen(lent, THERMAL), before[0])


def test_tables_have_the_rows_that_the_config_names(tmp_path: Path, new_kind: None) -> None:
    config = MicoChatConfig.tiny()
    config.context_config.kind_rows = {"thermal": 0, "video": 1, "image": 0}
    model = chat_model(config)
    assert len(model.context.modality.weight) == len(model.bridge.queries) == 2
    assert len(model.context.context.weight) == 2 * config.context_config.max_units
    model.save_pretrained(tmp_path)
    again = MicoChatForConditionalGeneration.from_pretrained(tmp_path)
    assert again.rows.by_name == {"thermal": 0, "video": 1, "image": 0}
    assert again.rows.names == model.rows.names == ["image", "video"]
    torch.testing.assert_close(seen(again, 0), seen(again, THERMAL))
    assert MicoAdapter(again, processor_for(config)).input_modalities == ("image", "video")
    with pytest.raises(ModelError, match="'depth', only image, thermal, video"):
        seen(again, KINDS.index("depth"))


def test_stage_1_draws_corpora_and_names_by_row() -> None:
    config = MicoConfig.tiny()
    config.text_config.name_tokens = 8
    config.context_config.kind_rows = {"audio": 0, "image": 1}
    model = MicoForPretraining(config)
    assert model.names is not None
    assert len(model.names.gate) == len(model.context.modality.weight) == 2
    image, audio = 1 + KINDS.index("image"), 1 + KINDS.index("audio")
    assert model.rows.corpora(torch.tensor([0, image, audio])).tolist() == [0, 2, 1]


@pytest.mark.parametrize("rows", [{}, {"image": 1}, {"image": 0, "audio": 2}, {"image": -1}])
def test_rows_with_gaps_are_refused(rows: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="kind_rows: expected rows from 0 on"):
        KindRows(rows)


def test_what_checkpoints_held_before_they_named_kinds_stays() -> None:
    assert KIND_ROWS == {"image": 0, "audio": 1, "video": 2, "depth": 3, "normal": 4}
    old = MicoChatConfig.from_dict({"context_config": {"max_units": 4}})
    assert old.context_config.kind_rows == KIND_ROWS

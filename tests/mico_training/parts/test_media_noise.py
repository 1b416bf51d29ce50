"""What training changes of a chat model's media."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mico_chat.checkpoints.pretrained import MicoChatForConditionalGeneration
from mico_chat.media.kinds import KINDS
from mico_chat.model.config import MicoChatConfig, MicoConceptConfig, MicoConfig
from mico_chat.model.context import AlikeMedia
from mico_chat.model.mini.concepts import ConceptAttention
from mico_chat.model.mini.stem import Stem
from mico_chat.model.pretraining import MicoForPretraining
from mico_training.parallel import keep_step
from mico_training.parts.media_noise import MediaNoise, changed_cells
from mico_training.parts.simulated import Names, settle, simulate
from mico_training.recipe import DropRecipe
from tests.mico_training.parts.test_set_prediction import with_things
from tests.support.tiny import SIDE, captions, chat_model

NAMED = 2
"""Concept tokens of a still."""


class Trained(nn.Module):
    """Takes batches as stages 2 and 3 do, and gives the context tokens of their media."""

    def __init__(self, chat: MicoChatForConditionalGeneration, **drop: float) -> None:
        super().__init__()
        self.chat, self.noise = chat, MediaNoise(chat, DropRecipe(**drop))

    def forward(self, **media: Tensor) -> list[Tensor]:
        inputs = self.noise(media)
        tokens: list[Tensor] = inputs.pop("see")(**inputs)
        return tokens


def attributes(model: nn.Module) -> dict[str, object]:
    """What the modules of a model hold, hooks too: the contents of dicts, and which objects."""
    found: dict[str, object] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            parts = {k: id(v) for k, v in value.items()} if isinstance(value, dict) else id(value)
            found[f"{name}.{key}"] = parts
    return found


@pytest.mark.parametrize("things", [True, False])
def test_training_gives_other_parts_and_patches_nothing(things: bool) -> None:
    chat = chat_model(with_things() if things else MicoChatConfig.tiny()).train()
    before, own = attributes(chat), chat.context_tokens(**pictures(2))
    trained = Trained(chat, path=0.4, names=0.5)
    found = trained(**pictures(2), simulated_names=torch.tensor([-1, 2]))
    assert not torch.equal(torch.cat(found), torch.cat(own))
    assert attributes(chat) == before
    for tokens, same in zip(chat.context_tokens(**pictures(2)), own, strict=True):
        assert torch.equal(tokens, same)


def pictures(n: int) -> dict[str, Any]:
    return {
        "media_kind": torch.zeros(n, dtype=torch.long),
        "media_units": torch.ones(n, dtype=torch.long),
        "pixel_values": torch.zeros(n, 3, SIDE, SIDE),
    }


@pytest.mark.parametrize("concepts", [True, False])
def test_path_dropout_is_for_training(concepts: bool) -> None:
    trained = Trained(chat_model(MicoChatConfig.tiny(concepts)), path=0.5).train(False)
    torch.testing.assert_close(*trained(**pictures(2)))
    trained.train()
    torch.manual_seed(0)
    dropped = 0
    for _ in range(10):
        for tokens in trained(**pictures(2)):
            grid, named = tokens.split([len(tokens) - NAMED * concepts, NAMED * concepts])
            gone = (bool((named == 0).all()) and concepts, bool((grid == 0).all()))
            assert gone != (True, True), "one path stays"
            dropped += any(gone)
    assert dropped == 20 if concepts else 0 < dropped < 20


def test_a_simulated_name_replaces_the_pictures_own() -> None:
    trained = Trained(chat_model()).train()
    plain = trained(**pictures(2))
    simulated = trained(**pictures(2), simulated_names=torch.tensor([-1, 2]))
    torch.testing.assert_close(simulated[0], plain[0])
    assert not torch.allclose(simulated[1][-NAMED:], plain[1][-NAMED:])
    for before, after in zip(plain, trained(**pictures(2)), strict=True):
        torch.testing.assert_close(after, before)


def test_a_sound_takes_a_simulated_name_too() -> None:
    torch.manual_seed(0)
    sounds = [f"sound {i}" for i in range(20)]
    names: dict[str, Any] = {"visual_names": ["thing", "other"], "sound_names": sounds}
    config = MicoConceptConfig(**names, n_pretrained=1, tokens_per_name=1, sound_hidden=64)
    concepts = ConceptAttention(config, Stem("test_efficientnet", 64))
    chosen = torch.arange(2, 22).repeat(10)
    own, logits = chosen[::2].fill_(-1), torch.randn(200, 1, 20)
    assert len(own) == 100
    kinds = torch.full((200,), KINDS.index("audio"))
    (media,) = AlikeMedia.groups(kinds, torch.full((200,), 3))
    drawn = torch.stack([chosen, torch.full_like(chosen, -1)], 1)
    found = changed_cells(concepts, 0.5, drawn, logits, media)
    assert found.shape == logits.shape
    assert torch.equal(found[::2], logits[::2])
    assert (found[1::2, 0].argmax(-1) == chosen[1::2] - 2).float().mean() > 0.9


def test_media_of_their_own_are_shown_as_sure_in_training_alone() -> None:
    config = MicoChatConfig.tiny()
    assert config.concept_config is not None
    config.concept_config.sure_above = [1.1, 1.1]  # nothing is ever sure
    trained = Trained(chat_model(config)).train()
    second = trained(**pictures(2), simulated_names=torch.tensor([-1, 2]))
    shown = [bool(tokens[-NAMED:].any()) for tokens in second]
    assert shown == [False, True]
    assert all(tokens[-NAMED:].any() for tokens in trained.eval()(**pictures(2)))


def test_name_dropout_hides_learned_names_in_training_alone() -> None:
    chat = chat_model()
    assert chat.concepts is not None
    with torch.no_grad():
        chat.concepts.learned.bias.fill_(20.0)  # the one learned name is sure to be seen
    trained = Trained(chat, names=1.0)
    table = chat.llm.get_input_embeddings().weight

    def mass() -> float:
        """How much of the learned name's second word (token 13) is in the concept tokens."""
        tokens = trained(**pictures(1))[0]
        return float((tokens[-1] @ table[13] / table[13].norm() ** 2).detach())

    assert mass() == pytest.approx(1.0, abs=0.01)
    trained.train()
    assert mass() == pytest.approx(0.0, abs=0.01)


def test_simulated_things_are_what_they_are_called() -> None:
    torch.manual_seed(0)
    config = MicoConceptConfig(
        visual_names=[f"thing {i}" for i in range(40)],
        sound_names=["bell"],
        n_pretrained=20,
        tokens_per_name=1,
        sound_hidden=4,
    )
    concepts = ConceptAttention(config, Stem("test_efficientnet", 64))
    names = torch.arange(40).repeat(20)
    cells = simulate(Names.of(concepts), names, n_cells=49)
    assert cells.shape == (800, 49, 40)
    pooled = cells.mean(1)
    assert (pooled.argmax(-1) == names).float().mean() > 0.9
    margin = pooled[torch.arange(800), names] - pooled.mean(-1)
    assert margin.mean() > 4
    assert not cells.requires_grad


def test_a_simulated_name_is_plainly_sure_or_plainly_between_two() -> None:
    """Of 20 plain names with two finer ones each."""
    torch.manual_seed(0)
    config = MicoConceptConfig(
        visual_names=[f"thing {i}" for i in range(40)],
        sound_names=["bell"],
        plain_names=[f"thing {i // 2}" for i in range(40)] + ["bell"],
        n_pretrained=20,
        tokens_per_name=1,
        sound_hidden=4,
        sure_above=[0.6, 0.6],
    )
    concepts = ConceptAttention(config, Stem("test_efficientnet", 64))
    concepts.name_ids[:40, 0] = torch.arange(40) // 2
    names = torch.arange(40).repeat(20)
    seconds = torch.where(torch.arange(800) % 3 > 0, (names + 6) % 40, -1)
    known = Names.of(concepts)
    cells = settle(known, simulate(known, names, n_cells=49), names, seconds)
    share, best = concepts.plain_posterior(cells).topk(2, 1)
    assert torch.equal(best[:, 0], names // 2)
    alone = seconds < 0
    assert share[alone, 0].min() >= 0.6 - 1e-4
    assert share[~alone, 0].max() < 0.6
    assert torch.equal(best[~alone, 1], seconds[~alone] // 2)
    table = nn.Embedding(20, 8)
    said = concepts.still_names(cells, table)[:, -1]
    torch.testing.assert_close(said, table.weight[best[:, 1]] * ~alone.unsqueeze(1))


def test_stage_1_takes_a_picture_for_the_simulated_name() -> None:
    torch.manual_seed(0)
    config = MicoConfig.tiny()
    config.text_config.name_tokens = 8
    model = MicoForPretraining(config).train()
    ids, mask = captions(2, 6)
    batch = {**pictures(2), "media_row": torch.arange(2), "input_ids": ids, "attention_mask": mask}
    inputs = MediaNoise(model, DropRecipe())({**batch, "simulated_names": torch.tensor([2, -1])})
    change, seen = inputs["change"], list[tuple[Tensor, Tensor]]()

    def record(cells: Tensor, media: AlikeMedia) -> Tensor:
        seen.append((cells, change(cells, media)))
        return seen[-1][1]

    model(**inputs | {"change": record})
    ((stem, used),) = seen
    assert int(used[0].mean(0).argmax()) == 2
    assert torch.equal(used[1], stem[1])


@pytest.mark.parametrize("media", [{}, pictures(1)], ids=["text", "picture"])
def test_every_batch_gives_all_of_the_bridge_a_gradient(media: dict[str, Any]) -> None:
    chat = chat_model().train()
    ids = torch.tensor([[5, 6, 7, 8] + [chat.config.context_token_id] * 7 * bool(media)])
    media = media | ({"media_row": torch.zeros(1, dtype=torch.long)} if media else {})
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clamp(max=9)}
    alone = chat(**batch, **media).loss
    ran: list[int] = []
    chat.encoder.register_forward_hook(lambda *_: ran.append(1))
    keep_step(chat)
    loss = chat(**batch, **media).loss
    torch.testing.assert_close(loss, alone)
    loss.backward()
    assert ran == [1]
    for name in ("bridge.change.weight", "bridge.frame_queries", "context.context.weight"):
        assert chat.get_parameter(name).grad is not None, name
    assert all(p.grad is not None for p in chat.bridge.parameters())

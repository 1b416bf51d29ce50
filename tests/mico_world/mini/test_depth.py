"""The training of the small depth network: its loss, its figures, and that it learns."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mico_chat.model.mini.depth import DepthNet, load_stem, pixels_of
from mico_world.mini import depth as depth_training
from mico_world.mini.depth import guesses, loss_of, measures

rng = np.random.default_rng(0)
ROOMS = rng.uniform(1, 9, (3, 16, 16))


def test_a_right_guess_has_no_loss_and_another_scale_little() -> None:
    depth = torch.from_numpy(ROOMS).float()
    depth[:, :4] = 0  # unknown
    guess = depth.clamp_min(1e-3).log()
    assert loss_of(guess, depth) < 1e-3
    assert loss_of(guess + 1, depth).item() == pytest.approx(0.15**0.5, abs=0.01)
    wrong = guess.flip(2)
    assert loss_of(wrong, depth) > 1
    guess[:, :4] = 7  # nobody knows whether this is wrong
    assert loss_of(guess, depth) < 1e-3


def test_figures() -> None:
    right = measures(ROOMS, ROOMS)
    assert right == {"rel": 0, "d1": 1, "rel scaled": 0, "d1 scaled": 1, "nearer": 1}
    doubled = measures(2 * ROOMS, ROOMS)
    assert (doubled["rel"], doubled["d1"]) == (1, 0)
    assert (doubled["rel scaled"], doubled["d1 scaled"], doubled["nearer"]) == (0, 1, 1)
    plane = measures(np.ones_like(ROOMS), ROOMS)
    assert plane["nearer"] == 0.5
    assert measures(1 / ROOMS, ROOMS)["nearer"] == 0


def test_it_learns_and_goes_on(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bright is near: after some steps it knows, and a second run goes on where the first ended."""
    monkeypatch.setattr(depth_training, "BATCH", 4)
    monkeypatch.setattr(depth_training, "augmented", lambda x, depth, generator: (x, depth))
    blocks = rng.integers(40, 216, (8, 2, 2))
    small = blocks.repeat(8, 1).repeat(8, 2)
    pictures = blocks.repeat(32, 1).repeat(32, 2)[..., None].repeat(3, -1).astype(np.uint8)
    data = pictures, (400 / small).astype(np.float16)
    torch.manual_seed(0)
    net = DepthNet()
    load_stem(net, root / "mico_chat/models/mini")
    before = measures(guesses(net, pictures), data[1])["nearer"]
    depth_training.train(net, data, 12, tmp_path)
    after = measures(guesses(net, pictures), data[1])["nearer"]
    assert after > 0.9 > before
    stored = torch.load(tmp_path / "state.pt")
    assert stored["epoch"] == 12
    fresh = DepthNet()
    load_stem(fresh, root / "mico_chat/models/mini")
    depth_training.train(fresh, data, 12, tmp_path)  # it has ended: nothing is left to do
    np.testing.assert_array_equal(guesses(fresh, pictures), guesses(net, pictures))


def test_a_picture_of_any_shape_has_a_map_of_its_shape(root: Path) -> None:
    net = DepthNet()
    load_stem(net, root / "mico_chat/models/mini")
    net.eval()
    for height, width in ((37, 300), (224, 224), (500, 20)):
        near = net.nearness(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        assert near.shape == (height, width)
        assert np.isfinite(near).all()
        assert (near > 0).all()
    assert pixels_of(np.zeros((2, 32, 64, 3), np.uint8)).shape == (2, 3, 32, 64)

"""Two ranks train, and their contrastive loss is the whole batch's."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mico_chat.model.pretraining import MicoForPretraining
from tests.training.test_parallel import two_ranks
from tests.training.test_runs import write_recipe

WORKER = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from mico_chat.model.pretraining import MicoForPretraining
from mico_training.stages import train_stage1

recipe, model_folder, batch_file, answer = map(Path, sys.argv[1:])
train_stage1(recipe)  # brings up the process group
assert dist.get_world_size() == 2
rank = dist.get_rank()
model = MicoForPretraining.from_pretrained(model_folder).eval()
batch = torch.load(batch_file)
half = slice(2 * rank, 2 * rank + 2)
loss = model(**{name: value[half] for name, value in batch.items()} | {
    "media_row": torch.arange(2)}).contrastive_loss
loss.backward()
found = {"loss": loss.detach()}
found |= {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
for value in found.values():
    dist.all_reduce(value)
    value /= 2
if rank == 0:
    torch.save(found, answer)
dist.barrier()
dist.destroy_process_group()
"""


def batch() -> dict[str, Tensor]:
    """Four pictures with different captions, one each."""
    generator = torch.Generator().manual_seed(0)
    return {
        "pixel_values": torch.randn(4, 3, 64, 64, generator=generator),
        "media_kind": torch.zeros(4, dtype=torch.long),
        "media_units": torch.ones(4, dtype=torch.long),
        "media_row": torch.arange(4),
        "input_ids": torch.randint(5, 40, (4, 6), generator=generator),
        "attention_mask": torch.ones(4, 6, dtype=torch.long),
    }


def test_the_loss_of_two_ranks_is_that_of_the_whole_batch(
    tmp_path: Path, shards: Path, tiny_pretraining: Path
) -> None:
    train = {"steps": 2, "batch_size": 2}
    recipe = write_recipe(tmp_path, shards, tiny_pretraining, train=train)
    torch.save(batch(), tmp_path / "batch.pt")
    files = (tmp_path / "batch.pt", tmp_path / "answer.pt")
    two_ranks(tmp_path / "worker.py", WORKER, recipe, tiny_pretraining, *files)
    assert (tmp_path / "out/log.jsonl").read_text().count("contrastive_loss") == 2

    model = MicoForPretraining.from_pretrained(tiny_pretraining)
    model.train(False)
    loss = model(**batch()).contrastive_loss
    loss.backward()
    expected = {"loss": loss.detach()}
    expected |= {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    found = torch.load(tmp_path / "answer.pt")
    assert set(found) == set(expected)
    # Sums in another order: a single gradient may be off by some 1e-6.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

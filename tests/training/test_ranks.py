"""Two ranks train, and their contrastive loss is the whole batch's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from torch import Tensor

from mico_chat.model.chat import MicoForPretraining

WORKER = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from mico_chat.model.chat import MicoForPretraining
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
    recipe = tmp_path / "recipe.yaml"
    arguments = {"use_cpu": True, "disable_tqdm": True}
    train = {"lr": 1e-3, "steps": 2, "batch_size": 2, "save_steps": 2, "log_steps": 1}
    content = {
        "model": str(tiny_pretraining),
        "output": str(tmp_path / "out"),
        "data": [{"path": str(shards / "train-*.tar")}],
        "train": train | {"arguments": arguments},
    }
    recipe.write_text(yaml.safe_dump(content))
    torch.save(batch(), tmp_path / "batch.pt")
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-addr", "127.0.0.1", "--master-port", "0", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "127.0.0.1:0", str(worker), str(recipe)]
    command += [str(tiny_pretraining), str(tmp_path / "batch.pt"), str(tmp_path / "answer.pt")]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
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

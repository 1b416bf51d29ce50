"""The 7B path's recipes run, on replicas, from one stage to the next."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from mico_chat.checkpoints.load import load_pretraining
from mico_training.stages import train_stage1, train_stage2, train_stage3
from mico_training.vocabulary import learn_vocabulary

RECIPES = Path(__file__).parents[2] / "training/recipes"


@pytest.mark.slow
def test_the_recipes_follow_each_other(tmp_path: Path, shards: Path, llama: Path) -> None:
    words = tmp_path / "words"
    learn_vocabulary(["a red square", "a tone"], size=128).save_pretrained(words)
    data = f"data=[{{path: '{shards}/train-*.tar'}}]"
    small = [data, "train.steps=2", "train.batch_size=2", "train.warmup_steps=1"]
    small += ["train.accumulation=1", "train.save_steps=2", "train.log_steps=1"]
    small += ["train.workers=0", "train.parallel=ddp", "train.max_length=512"]
    small += ["train.arguments={use_cpu: true, disable_tqdm: true}"]
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))

    options = "{context_config.n_corpus_pairs: 16, text_config.hidden_size: 32,"
    options += " text_config.num_hidden_layers: 1,"
    options += " text_config.num_attention_heads: 2, text_config.intermediate_size: 64}"
    train_stage1(
        RECIPES / "mico-g-stage1.yaml",
        [
            *small,
            f"output={one}",
            f"model={{name: tiny, options: {options}}}",
            f"stage1.tokenizer={words}",
        ],
    )
    load_pretraining(one)
    train_stage2(
        RECIPES / "vicuna7b-stage2.yaml",
        [*small, f"output={two}", "model.name=tiny", f"model.encoder={one}", f"model.llm={llama}"],
    )
    train_stage3(RECIPES / "vicuna7b-stage3.yaml", [*small, f"output={three}", f"model.name={two}"])
    names = {name.split(".")[-3] for name in load_file(three / "lora/adapter_model.safetensors")}
    assert names == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }
    assert not any(n.startswith("llm.") for n in load_file(three / "model.safetensors"))

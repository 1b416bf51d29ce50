"""Replicas of families with one vision tower: first those that batch, then those that do not."""

from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

from tests.support.replicas import templates
from tests.support.replicas.tokens import tokenizer

Made = tuple[PreTrainedModel, ProcessorMixin]

_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
_TOWER |= {"num_attention_heads": 2, "image_size": 56, "patch_size": 14}
_SIZE = {"height": 56, "width": 56}


def words_of(
    named: dict[str, str], *more: str
) -> tuple[PreTrainedTokenizerFast, dict[str, int], dict[str, Any]]:
    """A tokenizer, its tokens' ids, and the config of a language model for it."""
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *named.values(), *more]
    roles = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    words = tokenizer(control, [], named=named, **roles)
    text: dict[str, Any] = {f"{role}_id": getattr(words, f"{role}_id") for role in roles}
    text |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": len(words)}
    return words, words.get_vocab(), text


def llava_onevision(n_heads: int = 2) -> Made:
    """SigLIP's tower, Qwen2's language model. A single picture is cut into up to 2 x 2 tiles."""
    words, ids, text = words_of({"image_token": "<image>", "video_token": "<video>"})
    text |= {"model_type": "qwen2", "num_attention_heads": n_heads}
    grids = [[56 * rows, 56 * columns] for rows in (1, 2) for columns in (1, 2)]
    config = hf.LlavaOnevisionConfig(
        text_config=text,
        vision_config={**_TOWER, "model_type": "siglip_vision_model", "vision_use_head": False},
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        image_grid_pinpoints=grids,
    )
    processor = hf.LlavaOnevisionProcessor(
        hf.LlavaOnevisionImageProcessor(size=_SIZE, image_grid_pinpoints=grids),
        words,
        hf.LlavaOnevisionVideoProcessor(size=_SIZE),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=templates.LLAVA_ONEVISION,
    )
    return hf.LlavaOnevisionForConditionalGeneration(config), processor


def lfm2_vl() -> Made:
    """SigLIP 2's tower; a language model with short convolutions."""
    named = {"image_token": "<image>", "image_thumbnail_token": "<|img_thumbnail|>"}
    named |= {f"image_{end}_token": f"<|image_{end}|>" for end in ("start", "end")}
    words, ids, text = words_of(named)
    text |= {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2}
    tower = {**_TOWER, "model_type": "siglip2_vision_model", "num_patches": 16}
    config = hf.Lfm2VlConfig(
        vision_config={name: value for name, value in tower.items() if name != "image_size"},
        text_config={"model_type": "lfm2", **text},
        image_token_id=ids["<image>"],
        projector_hidden_size=64,
        tie_word_embeddings=False,
    )
    sizes: Any = {"encoder_patch_size": 14, "min_image_tokens": 4, "max_image_tokens": 16}
    pictures = hf.Lfm2VlImageProcessor(**sizes, do_image_splitting=False)
    template = templates.qwen({"image": "<image>"})
    processor = hf.Lfm2VlProcessor(pictures, words, chat_template=template)
    return hf.Lfm2VlForConditionalGeneration(config), processor


def gemma3() -> Made:
    """The tokens of a picture attend to each other; the template's mark is the first of them."""
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    words, ids, text = words_of({**named, "image_token": "<image_soft_token>"})
    text |= {"hidden_size": 64, "head_dim": 32, "num_hidden_layers": 4, "sliding_window": 8}
    text |= {"layer_types": ["sliding_attention", "full_attention"] * 2}
    config = hf.Gemma3Config(
        text_config={**text, "tie_word_embeddings": False},  # or it would repeat its last word
        vision_config=_TOWER,
        mm_tokens_per_image=16,
        image_token_index=ids["<image_soft_token>"],
        boi_token_index=ids["<start_of_image>"],
        eoi_token_index=ids["<end_of_image>"],
        tie_word_embeddings=False,
    )
    pictures = hf.Gemma3ImageProcessor(size=_SIZE)
    template = templates.qwen({"image": "<start_of_image>"})
    processor = hf.Gemma3Processor(pictures, words, chat_template=template, image_seq_length=16)
    return hf.Gemma3ForConditionalGeneration(config), processor


def phi4_multimodal() -> Made:
    """Its pictures have masks and tiles of different numbers; its sounds an ``audio_processor``."""
    marks = {kind: f"<|{kind}|>" for kind in ("image", "audio")}
    words, ids, text = words_of({f"{kind}_token": mark for kind, mark in marks.items()})
    audio = {"hidden_size": 32, "intermediate_size": 64, "num_blocks": 2, "num_attention_heads": 2}
    wide = ("ext_pw_out_channel", "depthwise_separable_out_channel", "nemo_conv_channels")
    config = hf.Phi4MultimodalConfig(
        **text,
        # 448 is written into its processor's code.
        vision_config={**_TOWER, "image_size": 448, "image_token_id": ids["<|image|>"]},
        audio_config={**audio, **dict.fromkeys(wide, 32), "audio_token_id": ids["<|audio|>"]},
    )
    pictures = hf.Phi4MultimodalImageProcessor(dynamic_hd=2)
    words.chat_template = templates.qwen(marks)
    hears = hf.Phi4MultimodalFeatureExtractor()
    processor = hf.Phi4MultimodalProcessor(pictures, hears, words)
    return hf.Phi4MultimodalForCausalLM(config), processor


def mllama() -> Made:
    """Llama 3.2 Vision: one token for a picture, which layers of cross-attention see."""
    words, ids, text = words_of({"image_token": "<|image|>"}, "<|python_tag|>")
    text |= {"num_hidden_layers": 4, "cross_attention_layers": [1]}
    tower = {**_TOWER, "attention_heads": 2, "num_global_layers": 1, "vision_output_dim": 64}
    del tower["num_attention_heads"]
    config = hf.MllamaConfig(
        vision_config={**tower, "intermediate_layers_indices": [0]},
        text_config={**text, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        image_token_index=ids["<|image|>"],
    )
    model = hf.MllamaForConditionalGeneration(config)
    for name, weight in model.named_parameters():
        if "gate" in name and weight.ndim == 1:  # they begin at 0, where no picture is seen
            torch.nn.init.ones_(weight)
    pictures = hf.MllamaImageProcessor(size=_SIZE, max_image_tiles=4)
    template = templates.qwen({"image": "<|image|>"})
    return model, hf.MllamaProcessor(pictures, words, chat_template=template)


def instructblip() -> Made:
    """A second tokenizer shows the question to its Q-Former; image tokens come before the text."""
    words, ids, text = words_of({}, "<image>")
    former = {name: text[name] for name in ("vocab_size", "hidden_size", "intermediate_size")}
    former |= {"num_hidden_layers": 2, "num_attention_heads": 2, "encoder_hidden_size": 32}
    config = hf.InstructBlipConfig(
        vision_config=_TOWER,
        qformer_config={**former, "pad_token_id": 0},
        text_config={"model_type": "llama", **text},
        num_query_tokens=4,
        image_token_index=ids["<image>"],
    )
    words.chat_template = templates.qwen({"image": ""})
    pictures = hf.BlipImageProcessor(size=_SIZE)
    processor = hf.InstructBlipProcessor(pictures, words, words, num_query_tokens=4)
    return hf.InstructBlipForConditionalGeneration(config), processor


def ovis2() -> Made:
    """The template writes ``<image>``, of which the processor makes ``<IMG_ATOM>`` and others."""
    marks = [f"<IMG_{name}>" for name in ("START", "GRID", "COL", "ROW", "END")]
    words, ids, text = words_of({"image_token": "<image>"}, "<IMG_ATOM>", *marks)
    config = hf.Ovis2Config(
        vision_config={**_TOWER, "vocab_size": 64},
        text_config={"model_type": "qwen2", **text},
        image_token_id=ids["<IMG_ATOM>"],
        visual_indicator_token_ids=[ids[mark] for mark in marks],
        vocab_size=len(words),
        hidden_size=32,
        tie_word_embeddings=False,
    )
    pictures = hf.Ovis2ImageProcessor(size=_SIZE)
    template = templates.qwen({"image": "<image>"})
    processor = hf.Ovis2Processor(pictures, words, chat_template=template, image_seq_length=16)
    return hf.Ovis2ForConditionalGeneration(config), processor


def gemma4() -> Made:
    """Gemma 4 of the larger sizes: the tokens of a picture attend to each other."""
    names = ("image", "boi", "eoi", "audio", "boa", "eoa")
    words, ids, text = words_of({f"{name}_token": f"<|{name}|>" for name in names}, "<|video|>")
    text |= {"head_dim": 32, "global_head_dim": 32, "sliding_window": 8}
    text |= {"layer_types": ["sliding_attention", "full_attention"]}
    text |= {"hidden_size_per_layer_input": 0, "use_bidirectional_attention": "vision"}
    tower = {**_TOWER, "num_key_value_heads": 2, "head_dim": 16, "pooling_kernel_size": 2}
    config = hf.Gemma4Config(
        text_config={**text, "tie_word_embeddings": False},
        vision_config={**tower, "position_embedding_size": 64},
        audio_token_id=None,
        tie_word_embeddings=False,
        image_token_id=ids["<|image|>"],
        video_token_id=ids["<|video|>"],
    )
    sizes: Any = {"patch_size": 14, "max_soft_tokens": 70, "pooling_kernel_size": 2}
    processor = hf.Gemma4Processor(
        hf.Gemma4AudioFeatureExtractor(),
        hf.Gemma4ImageProcessor(**sizes),
        words,
        hf.Gemma4VideoProcessor(**sizes),
        chat_template=templates.qwen({"image": "<|image|>", "video": "<|video|>"}),
    )
    return hf.Gemma4ForConditionalGeneration(config), processor


def paligemma() -> Made:
    """Its processor puts ``<bos>`` behind the pictures by itself."""
    words, ids, text = words_of({"image_token": "<image>"})
    config = hf.PaliGemmaConfig(
        vision_config={**_TOWER, "model_type": "siglip_vision_model", "vision_use_head": False},
        text_config={"model_type": "gemma", **text, "head_dim": 16},
        image_token_index=ids["<image>"],
        projection_dim=32,
        vocab_size=len(words),
        hidden_size=32,
        tie_word_embeddings=False,
    )
    pictures: Any = hf.SiglipImageProcessor(size=_SIZE)
    pictures.image_seq_length = 16
    parts = "{% for m in messages %}{% for p in m['content'] %}{% if p['type'] == 'KIND' %}"
    ends = "{% endif %}{% endfor %}{% endfor %}"
    template = f"{parts.replace('KIND', 'image')}<image>{ends}"
    template += f"{parts.replace('KIND', 'text')}{{{{ p['text'] }}}}{ends}"
    processor = hf.PaliGemmaProcessor(pictures, words, chat_template=template)
    return hf.PaliGemmaForConditionalGeneration(config), processor

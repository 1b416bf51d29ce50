"""Tiny GGUF models with random weights: a language model and the file that gives it media.

They have the real architectures of llama.cpp (``src/models``, ``tools/mtmd/clip.cpp``), in sizes
that load in milliseconds. :func:`qwen_omni` has positions of several axes (M-RoPE), and sees and
hears. :func:`smolvlm` cuts a picture into tiles with text between them. A picture of
:func:`gemma3` is attended to in both directions, so it must be computed as a whole. In
:func:`qwen3_vl` a token of a picture has more numbers than a token of text (deepstack). The first
layer of :func:`qwen35` and :func:`lfm2_vl` has a recurrent state.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from tokenizers import AddedToken

from mico_chat.engine import llamacpp_library as llama_cpp
from mico_chat.engine.llamacpp_tokenizer import add_tokenizer
from mico_chat.errors import MicoError
from tests.support.replicas import templates
from tests.support.tiny import byte_level

WIDTH = 32  # of the language model; the heads of all models have 16 numbers
VISION = 32
LAYERS = 2

Shapes = dict[str, tuple[int, ...]]


def _shapes(listed: str) -> Shapes:
    """The shapes of a layer's tensors, for a width of 32."""
    words = (one.split() for one in listed.split(","))
    return {name: tuple(map(int, sizes)) for name, *sizes in words}


_ATTENTION = _shapes("attn_q 32 32, attn_k 16 32, attn_v 16 32, attn_output 32 32")
_QK_NORM = _shapes("attn_q_norm 16, attn_k_norm 16")
_FEED_FORWARD = _shapes("attn_norm 32, ffn_gate 64 32, ffn_up 64 32, ffn_down 32 64")
_LAYER = _ATTENTION | _FEED_FORWARD | _shapes("ffn_norm 32")
_SSM = {"ssm.conv_kernel": 4, "ssm.state_size": 16, "ssm.time_step_rank": 2, "ssm.group_count": 1}

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}"
    "\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def built() -> bool:
    """Whether llama.cpp is installed, with libmtmd."""
    try:
        llama_cpp.mtmd_context_params_default()
    except MicoError:
        return False
    return True


class Pair(NamedTuple):
    model: Path
    mmproj: Path


def qwen_omni(folder: Path) -> Pair:
    markup = ("<|vision_start|>", "<|vision_end|>", "<|audio_bos|>", "<|audio_eos|>")
    words = _chatml(markup, templates.qwen({}))
    model = _model(folder, "qwen2vl", words, {"rope.dimension_sections": [2, 3, 3, 0]})
    weights = _Weights(1)
    gates = ("ffn_gate",)
    weights.layers("v", ("attn_q", "attn_k", "attn_v"), gates, without_bias=("ln1", "ln2"))
    _qwen_vision(weights)
    mel, frames = 16, 1500
    weights.layers("a", ("attn_q", "attn_k", "attn_v"), without_bias=("attn_k",))
    weights["a.conv1d.1.weight"] = (VISION, mel, 3)
    weights["a.conv1d.2.weight"] = (VISION, VISION, 3)
    weights["a.conv1d.1.bias"] = weights["a.conv1d.2.bias"] = (VISION, 1)
    weights["a.position_embd.weight"] = (frames, VISION)
    weights.linear("a.post_ln", VISION)
    weights.linear("mm.a.fc", WIDTH, VISION)
    values = _vision(image_size=56, patch_size=14, n_wa_pattern=2, silu=True) | _sizes("audio")
    values |= {"clip.has_audio_encoder": True, "clip.audio.num_mel_bins": mel}
    return Pair(model, _mmproj(folder, "qwen2.5o", values, weights))


def qwen3_vl(folder: Path) -> Pair:
    markup = ("<|vision_start|>", "<|vision_end|>")
    rope = {"rope.dimension_sections": [3, 3, 2, 0], "n_deepstack_layers": 1}
    model = _model(folder, "qwen3vl", _chatml(markup), rope, [_LAYER | _QK_NORM] * LAYERS)
    weights = _Weights(2)
    _qwen3_vision(weights)
    for name, shape in (("norm", (4 * VISION,)), ("fc1", (64, 4 * VISION)), ("fc2", (WIDTH, 64))):
        weights.linear(f"v.deepstack.0.{name}", *shape)
    values = _vision(image_size=56, patch_size=14)
    values["clip.vision.is_deepstack_layers"] = [True, False]
    return Pair(model, _mmproj(folder, "qwen3vl_merger", values, weights))


def smolvlm(folder: Path) -> Pair:
    tiles = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    markup = ("<fake_token_around_image>", "<global-img>", *tiles)
    model = _model(folder, "llama", _chatml(markup))
    weights = _Weights(3)
    _siglip(weights, patches=16, patch=8)
    weights["mm.model.fc.weight"] = (WIDTH, 4 * VISION)
    values = _vision(image_size=32, patch_size=8)
    values |= {"clip.vision.projector.scale_factor": 2, "clip.vision.preproc_image_size": 64}
    return Pair(model, _mmproj(folder, "idefics3", values, weights))


def gemma3(folder: Path) -> Pair:
    markup = ("<start_of_turn>", "<start_of_image>", "<end_of_image>")
    tokenizer = _tokenizer(("<end_of_turn>", *markup), GEMMA)
    window = {"attention.sliding_window": 64, "rope.freq_base_swa": 10_000.0}
    layers = [_LAYER | _QK_NORM | _shapes("post_attention_norm 32, post_ffw_norm 32")] * LAYERS
    model = _model(folder, "gemma3", tokenizer, window, layers)
    weights = _Weights(4)
    _siglip(weights, patches=64, patch=8)
    weights["mm.input_projection.weight"] = (VISION, WIDTH)
    weights["mm.soft_emb_norm.weight"] = (VISION,)
    values = _vision(image_size=64, patch_size=8) | {"clip.vision.projector.scale_factor": 2}
    return Pair(model, _mmproj(folder, "gemma3", values, weights))


def qwen35(folder: Path) -> Pair:
    """Gated delta nets; positions of several axes."""
    net = _shapes(
        "attn_qkv 64 32, attn_gate 32 32, ssm_conv1d 64 4, ssm_dt.bias 2, ssm_a 2, ssm_beta 2 32,"
        "ssm_alpha 2 32, ssm_norm 16, ssm_out 32 32"
    )
    own = _FEED_FORWARD | _shapes("post_attention_norm 32")
    attention = _ATTENTION | _QK_NORM | _shapes("attn_q 64 32")  # half of it is a gate
    values: dict[str, Any] = {**_SSM, "ssm.inner_size": 32, "full_attention_interval": 2}
    values["rope.dimension_sections"] = [3, 3, 2, 0]
    words = _chatml(("<|vision_start|>", "<|vision_end|>"))
    model = _model(folder, "qwen35", words, values, [own | net, own | attention])
    weights = _Weights(5)
    _qwen3_vision(weights)
    sizes = _vision(image_size=56, patch_size=14)
    return Pair(model, _mmproj(folder, "qwen3vl_merger", sizes, weights))


def lfm2_vl(folder: Path) -> Pair:
    """Short convolutions."""
    own = _FEED_FORWARD | _shapes("ffn_norm 32")
    net = _shapes("shortconv.conv 32 3, shortconv.in_proj 96 32, shortconv.out_proj 32 32")
    values = {"shortconv.l_cache": 3, "attention.head_count_kv": [0, 1]}
    words = _chatml(("<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"))
    model = _model(folder, "lfm2", words, values, [own | net, own | _ATTENTION | _QK_NORM])
    weights = _Weights(10)
    _siglip(weights, patches=64, patch=8)
    weights["mm.input_norm.weight"] = weights["mm.input_norm.bias"] = (4 * VISION,)
    weights.linear("mm.1", 64, 4 * VISION)
    weights.linear("mm.2", WIDTH, 64)
    sizes = _vision(image_size=64, patch_size=8) | {"clip.vision.projector.scale_factor": 2}
    return Pair(model, _mmproj(folder, "lfm2", sizes, weights))


def granite_hybrid(folder: Path) -> Path:
    """Mamba 2's layer, then one of attention; it reads text alone."""
    net = _shapes(
        "ssm_in 162 32, ssm_conv1d 96 4, ssm_conv1d.bias 96, ssm_dt.bias 2, ssm_a 2 1, ssm_d 2 1,"
        "ssm_norm 1 64, ssm_out 32 64, ffn_norm 32"
    )
    scales = dict.fromkeys(("logit_scale", "residual_scale", "embedding_scale"), 1.0)
    values = {**_SSM, "ssm.inner_size": 64, "attention.head_count_kv": [0, 1], **scales}
    return _model(folder, "granitehybrid", _chatml(()), values, [_FEED_FORWARD | net, _LAYER])


def mamba(folder: Path) -> Path:
    """Nothing but recurrent states; it reads text alone."""
    net = _shapes(
        "attn_norm 32, ssm_in 128 32, ssm_conv1d 64 4, ssm_conv1d.bias 64, ssm_x 34 64,"
        "ssm_dt 64 2, ssm_dt.bias 64, ssm_a 64 16, ssm_d 64, ssm_out 32 64"
    )
    return _model(folder, "mamba", _chatml(()), {**_SSM, "ssm.inner_size": 64}, [net] * LAYERS)


REPLICAS: Mapping[str, Callable[[Path], Pair]] = {
    made.__name__: made for made in (qwen_omni, qwen3_vl, smolvlm, gemma3, qwen35, lfm2_vl)
}


class _Weights(dict[str, tuple[int, ...]]):
    """Shapes by name, which :meth:`write` fills with random numbers."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._random = np.random.default_rng(seed)

    def linear(self, name: str, *shape: int, bias: bool = True) -> None:
        self[f"{name}.weight"] = shape
        if bias:
            self[f"{name}.bias"] = shape[:1]

    def layers(
        self,
        prefix: str,
        attention: Sequence[str],
        gates: Sequence[str] = (),
        without_bias: Sequence[str] = (),
    ) -> None:
        inner = 2 * VISION
        shapes = dict.fromkeys((*attention, "attn_out"), (VISION, VISION))
        shapes |= {"ffn_up": (inner, VISION), "ffn_down": (VISION, inner)}
        shapes |= dict.fromkeys(gates, (inner, VISION))
        if "attn_qkv" in shapes:
            shapes["attn_qkv"] = (3 * VISION, VISION)
        for layer in range(LAYERS):
            for name, shape in {**shapes, "ln1": (VISION,), "ln2": (VISION,)}.items():
                bias = name not in without_bias
                self.linear(f"{prefix}.blk.{layer}.{name}", *shape, bias=bias)

    def write(self, writer: gguf.GGUFWriter) -> None:
        for name, shape in self.items():
            deviation = 0.1 if len(shape) == 1 else int(np.prod(shape[1:])) ** -0.5
            if name in ("token_embd.weight", "output.weight"):
                deviation = 1.0
            numbers = self._random.normal(0, deviation, shape)
            if len(shape) == 1 and name.endswith("weight"):  # of a norm
                numbers += 1
            if name.endswith("ssm_a"):  # a decay
                numbers = -np.abs(numbers) - 0.1
            # llama.cpp convolves sounds in half precision alone.
            half = ".conv1d" in name and name.endswith("weight")
            writer.add_tensor(name, numbers.astype(np.float16 if half else np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _tokenizer(markup: Sequence[str], template: str) -> Any:
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": [*markup]})
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("\n\n", "<tool_call>")])
    tokenizer.chat_template = template
    if "<end_of_turn>" in markup:
        tokenizer.eos_token = "<end_of_turn>"
    return tokenizer


def _chatml(markup: Sequence[str], template: str = CHATML) -> Any:
    return _tokenizer(("<|im_start|>", *markup), template)


def _model(
    folder: Path,
    architecture: str,
    tokenizer: Any,
    values: Mapping[str, Any] | None = None,
    layers: Sequence[Shapes] = (_LAYER,) * LAYERS,
) -> Path:
    """A language model of two layers and a tokenizer of bytes."""
    file = folder / f"{architecture}.gguf"
    writer = gguf.GGUFWriter(file, architecture)
    sizes = {
        "context_length": 4096,
        "embedding_length": WIDTH,
        "block_count": LAYERS,
        "feed_forward_length": 2 * WIDTH,
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "attention.key_length": 16,
        "attention.value_length": 16,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.dimension_count": 16,
        "rope.freq_base": 10_000.0,
    }
    _put(writer, {f"{architecture}.{name}": v for name, v in {**sizes, **(values or {})}.items()})
    add_tokenizer(writer, tokenizer, len(tokenizer))
    weights = _Weights(0)
    weights["token_embd.weight"] = weights["output.weight"] = (len(tokenizer), WIDTH)
    norm = "token_embd_norm" if architecture == "lfm2" else "output_norm"
    weights[f"{norm}.weight"] = (WIDTH,)
    for number, layer in enumerate(layers):
        for name, shape in layer.items():
            bare = name in ("ssm_a", "ssm_d") or name.endswith(".bias")
            whole = name if bare else f"{name}.weight"
            weights[f"blk.{number}.{whole}"] = shape
    weights.write(writer)
    return file


def _mmproj(folder: Path, projector: str, values: dict[str, Any], weights: _Weights) -> Path:
    file = folder / f"mmproj-{projector}.gguf"
    writer = gguf.GGUFWriter(file, "clip")
    _put(writer, {"clip.projector_type": projector} | values)
    weights.write(writer)
    return file


def _sizes(part: str) -> dict[str, Any]:
    sizes = {
        "embedding_length": VISION,
        "feed_forward_length": 2 * VISION,
        "block_count": LAYERS,
        "projection_dim": WIDTH,
        "attention.head_count": 2,
        "attention.layer_norm_epsilon": 1e-6,
    }
    return {f"clip.{part}.{name}": value for name, value in sizes.items()}


def _vision(silu: bool = False, **values: int) -> dict[str, Any]:
    return {
        "clip.has_vision_encoder": True,
        "clip.use_silu" if silu else "clip.use_gelu": True,
        "clip.vision.image_mean": [0.5, 0.5, 0.5],
        "clip.vision.image_std": [0.5, 0.5, 0.5],
        **_sizes("vision"),
        **{f"clip.vision.{name}": value for name, value in values.items()},
    }


def _qwen_vision(weights: _Weights) -> None:
    weights["v.patch_embd.weight"] = weights["v.patch_embd.weight.1"] = (VISION, 3, 14, 14)
    weights["v.post_ln.weight"] = (VISION,)
    weights.linear("mm.0", 4 * VISION, 4 * VISION)
    weights.linear("mm.2", WIDTH, 4 * VISION)


def _qwen3_vision(weights: _Weights) -> None:
    weights.layers("v", ("attn_qkv",))
    _qwen_vision(weights)
    weights["v.patch_embd.bias"] = (VISION,)
    weights["v.position_embd.weight"] = (16, VISION)


def _siglip(weights: _Weights, patches: int, patch: int) -> None:
    weights.layers("v", ("attn_q", "attn_k", "attn_v"))
    weights.linear("v.patch_embd", VISION, 3, patch, patch)
    weights["v.position_embd.weight"] = (patches, VISION)
    weights.linear("v.post_ln", VISION)


def _put(writer: gguf.GGUFWriter, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        match value:
            case bool():
                writer.add_bool(name, value)
            case int():
                writer.add_uint32(name, value)
            case float():
                writer.add_float32(name, value)
            case str():
                writer.add_string(name, value)
            case list():
                writer.add_array(name, value)

"""A run is one YAML file, a recipe: its types, its overrides, and errors that name the wrong key.

Every stage's recipe has the keys ``model``, ``output``, ``data``, ``train``, ``features`` and
``expect``, and one key of its own: ``stage1``, ``stage2`` or ``stage3``. An unknown key is an
error: a misspelt ``learning_rate`` must not train with the default. ``--set train.lr=1e-4`` changes
one value; the value is YAML. Relative paths start at the working directory.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from mico_chat.errors import ConfigError
from mico_chat.media.kinds import Kind

Dtype = Literal["float32", "bfloat16"]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]

END_SCHEDULES = ("linear", "cosine")
"""These schedules can end above zero."""


class Section(BaseModel):
    """A part of a recipe: immutable; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelRecipe(Section):
    """The model that trains. ``model: mini`` is short for ``model: {name: mini}``.

    ``name``: a named configuration ("mini", "tiny", "mico-g-vicuna-7b") or a checkpoint folder.
    ``encoder``: the output folder of stage 1 from which stage 2 takes encoder and context; or the
    output folder of stage 2, whose encoder stage 1's text branch learns to read.
    ``encoder_weights``, ``text_weights``: what a new model's ViT and text branch start from in
    stage 1 (:mod:`mico_training.starts`). The ViT's are a timm name ("eva_giant_patch14_clip_224.
    laion400m"), a hub name, a folder that timm saved, or a file; the text branch's a BERT's hub
    name or folder.
    ``llm``: a folder or hub name that replaces the configuration's language model.
    ``llm_dtype``: the precision of the language model.
    ``llm_quantization``: hold its frozen linear layers in 4 or 8 bit (bitsandbytes); with LoRA in
    stage 3 this is QLoRA.
    ``encoder_dtype``: the precision of a frozen encoder.
    ``llm_attention``: an attention implementation of Hugging Face ("eager" is fastest on a CPU).
    ``llm_compile``: run each layer through ``torch.compile``; it needs a C++ compiler, and makes a
    CPU twice as fast.
    ``options``: fields of the configuration to replace ("text_config.hidden_size": 256).
    """

    name: str
    encoder: Path | None = None
    encoder_weights: str | None = None
    text_weights: str | None = None
    llm: str | None = None
    llm_dtype: Dtype = "float32"
    llm_quantization: Literal["nf4", "int8"] | None = None
    encoder_dtype: Dtype = "float32"
    llm_attention: str | None = None
    llm_compile: bool = False
    options: dict[str, Any] = {}


class DataRecipe(Section):
    """One source of samples and its share of the draws.

    ``path``: a file, or a pattern with ``*``; in a folder or at an address that fsspec opens
    (``s3://bucket/train-*.tar``). ``ratio``: the share, relative to the other sources.
    ``kind``: the format. ``skills``: keep only questions of these skills (only shards have skills).
    ``root``: where relative media paths start; default: the manifest's folder. ``modalities``: keep
    only media of these kinds, and the texts about them. ``fraction``: keep this share of the
    samples; a smaller share lies within a larger one.
    """

    path: str
    ratio: float = Field(default=1.0, ge=0.0)
    kind: Literal["shards", "jsonl", "llava"] = "shards"
    skills: tuple[str, ...] = ()
    root: Path | str | None = None
    modalities: tuple[Kind, ...] = ()
    fraction: float = Field(default=1.0, gt=0.0, le=1.0)


class DropRecipe(Section):
    """The probability to leave a part of the input out, so that the model relies on no single part.

    ``modality``: each medium of a joint context but one (stage 1). ``names``: a medium's learned
    concept names (stages 2 and 3). ``path``: a medium's concept tokens; with the same probability,
    its grid tokens (stages 2 and 3).
    """

    modality: Probability = 0.5
    names: Probability = 0.0
    path: Annotated[float, Field(ge=0.0, le=0.5)] = 0.0


class TrainRecipe(Section):
    """Optimisation. ``batch_size`` counts samples in one process and forward pass.

    ``accumulation``: passes before an update. ``end_lr``: where the schedule ("linear" or "cosine")
    ends, instead of zero. ``gradient_checkpointing``: transformer layers run again in the backward
    pass, which saves the memory of their activations. ``parallel``: what processes share: nothing
    (``ddp``: each has the whole model), all weights (``fsdp``, PyTorch's; ``zero3``, DeepSpeed's),
    or gradients and optimizer states (``zero2``, DeepSpeed's). ``group_by_length``: batches of
    conversations of similar length (stages 2 and 3). ``lr_multipliers``: beginning of a parameter's
    name -> factor on ``lr``. ``freeze``: beginnings of names of parameters that do not train.
    ``arguments``: further fields of Hugging Face's ``TrainingArguments``.
    """

    lr: float = Field(gt=0.0)
    steps: int = Field(gt=0)
    batch_size: int = Field(default=16, gt=0)
    accumulation: int = Field(default=1, gt=0)
    warmup_steps: int = Field(default=0, ge=0)
    schedule: str = "linear"
    schedule_options: dict[str, Any] = {}
    end_lr: float | None = Field(default=None, gt=0.0)
    weight_decay: float = Field(default=0.01, ge=0.0)
    max_grad_norm: float = Field(default=1.0, ge=0.0)
    betas: tuple[float, float] = (0.9, 0.98)
    save_steps: int = Field(default=500, gt=0)
    log_steps: int = Field(default=10, gt=0)
    keep_checkpoints: int = Field(default=2, gt=0)
    bf16: bool = False
    gradient_checkpointing: bool = False
    parallel: Literal["ddp", "fsdp", "zero2", "zero3"] = "ddp"
    seed: int = 0
    workers: int = Field(default=0, ge=0)
    max_length: int = Field(default=512, gt=1)
    group_by_length: bool = False
    drop: DropRecipe = DropRecipe()
    lr_multipliers: dict[str, float] = {}
    freeze: tuple[str, ...] = ()
    arguments: dict[str, Any] = {}

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.end_lr is not None and self.schedule not in END_SCHEDULES:
            known = " or ".join(END_SCHEDULES)
            raise ValueError(
                f"end_lr works only with the schedule {known}, not with {self.schedule!r}"
            )
        if self.end_lr is not None and self.end_lr >= self.lr:
            raise ValueError(f"end_lr {self.end_lr} is not below lr {self.lr}")
        # The mean loss of an interval lives in memory. A checkpoint in the middle of an interval
        # would lose its first half, and a resumed run would log another loss.
        if self.save_steps % self.log_steps:
            raise ValueError(
                f"save_steps {self.save_steps} is not a multiple of log_steps {self.log_steps}; "
                "a run that is resumed could not log the same losses"
            )
        return self


class FeatureRecipe(Section):
    """The cache of the frozen stem's features, and the number of units in a pass of the stem.

    ``compile``: run the stem in bfloat16 through ``torch.compile``; it needs a C++ compiler, and
    makes a CPU with AMX four times as fast.
    """

    cache: Path
    batch_size: int = Field(default=32, gt=0)
    compile: bool = False


class ExpectRecipe(Section):
    """A large sample, for the estimate of memory and time alone.

    ``units``: its pictures or frames (default: 8; in stage 1 ``most_units``). ``slices``: those of
    a sound beside them, such as a video's sound track (default: 0; in stage 1 ``most_slices``, and
    ``most_units`` where it is not given). ``length``: its tokens (default: ``train.max_length``).
    ``learnt``: the share of the tokens with a loss. ``model``: the configuration of a folder
    ``model.name`` that does not exist yet; ``options``: fields of it to replace.
    """

    model: str | None = None
    options: dict[str, Any] = {}
    units: int | None = Field(default=None, ge=0)
    slices: int | None = Field(default=None, ge=0)
    length: int | None = Field(default=None, gt=1)
    learnt: float = Field(default=0.5, gt=0.0, le=1.0)


class ObjectiveWeights(Section):
    """Weights of the summed objectives.

    Equations 4 (contrastive), 5 (matching) and 6 (caption); predicting the words of a caption
    (tagging) and of a region (region); naming the main thing (concept).
    """

    contrastive: float = Field(default=1.0, ge=0.0)
    matching: float = Field(default=1.0, ge=0.0)
    caption: float = Field(default=1.0, ge=0.0)
    tagging: float = Field(default=1.0, ge=0.0)
    region: float = Field(default=1.0, ge=0.0)
    concept: float = Field(default=1.0, ge=0.0)

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not any(self.model_dump().values()):
            raise ValueError("every objective has weight 0, so the model would learn nothing")
        return self


class Stage1Recipe(Section):
    """Pretraining: equations 1 to 6.

    ``cross_corpus``: probability of a context from two corpora or more, at most ``most_corpora``
    (eq. 3). ``hardness``: matching draws its negatives in proportion to exp(similarity · hardness);
    the less, the easier they are. ``caption_length``: tokens of all captions of a sample.
    ``most_units``: the number of frames of a video and slices of a sound to use; training draws
    them, one of each of equal runs, and evaluation takes the middle ones. ``most_slices``: another
    number for slices; 0 leaves a video's sound track out. ``questions``: the data are questions and
    answers, and the caption objective predicts an answer after its question (appendix B.2); the
    other objectives must have weight 0. ``scst``: captions learn from their own CIDEr
    (:mod:`.scst`), which needs a model that writes captions already, ``caption`` as the only
    objective and ``train.parallel: ddp``. ``subtitles``: the subtitles of the data are read, by a
    model with ``text_config.subtitles``. ``simulate``: probability that a picture alone is
    captioned as a drawn concept, and its posterior simulated, for a model with
    ``text_config.name_tokens``. ``tokenizer``: folder or hub name of a new model's text tokenizer;
    without it, a WordPiece ``vocabulary`` of this size is learnt from the captions.
    """

    weights: ObjectiveWeights = ObjectiveWeights()
    mask_probability: Probability = 0.6
    hardness: float = Field(default=1.0, gt=0.0)
    cross_corpus: Probability = 0.0
    most_corpora: int = Field(default=3, ge=2)
    caption_length: int = Field(default=40, gt=2)
    most_units: int = Field(default=8, gt=0)
    most_slices: int | None = Field(default=None, ge=0)
    questions: bool = False
    scst: bool = False
    subtitles: bool = False
    simulate: Probability = 0.0
    tokenizer: str | None = None
    vocabulary: int = Field(default=8192, gt=100)

    @model_validator(mode="after")
    def _answers_alone(self) -> Self:
        others = [k for k, v in self.weights.model_dump().items() if v and k != "caption"]
        for key, asked in (("questions", self.questions), ("scst", self.scst)):
            if asked and others:
                raise ValueError(
                    f"{key}: true trains only the objective caption; give {', '.join(others)} "
                    "weight 0"
                )
        if self.scst and (self.questions or self.cross_corpus or self.simulate):
            raise ValueError("scst: true works without questions, cross_corpus and simulate")
        return self


class Stage2Recipe(Section):
    """Alignment.

    ``objective``: "caption" predicts the caption's next token; "things" finds
    the things of a picture by set prediction, without the language model (:class:`.SetPrediction`).
    ``trainable``: the parts that train. ``join``: probability of a description of several media.
    """

    objective: Literal["caption", "things"] = "caption"
    trainable: tuple[str, ...] = ("bridge",)
    join: Probability = 0.1


class LoraRecipe(Section):
    """A low-rank adapter on the linear layers whose names end in one of the ``targets``."""

    r: int = Field(default=16, gt=0)
    alpha: int = Field(default=32, gt=0)
    dropout: Probability = 0.0
    targets: tuple[str, ...] = ("q_proj", "v_proj", "o_proj", "down_proj")


class Stage3Recipe(Section):
    """Instruction tuning of the ``trainable`` parts, and of the language model.

    The language model trains through ``lora``, or as a whole (``full: true``). ``simulate``:
    probability of a question about simulated concepts (``SimulatedNames``). ``words``: probability
    of drawn words in an example's first medium (``RecognisedWords``). ``given``: probability, at
    the first step, that a conversation's things are true ones instead of those that the encoder
    finds (``GivenThings``); it falls to 0 until the last step. For ``ddp`` alone.
    """

    trainable: tuple[str, ...] = ("bridge",)
    lora: LoraRecipe | None = LoraRecipe()
    full: bool = False
    max_turns: int = Field(default=3, gt=0)
    simulate: Probability = 0.0
    words: Probability = 0.0
    given: Probability = 0.0

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.full and "lora" in self.model_fields_set and self.lora is not None:
            raise ValueError("full: true trains every weight; give lora or full, not both")
        return self


def named(value: Any) -> Any:
    """``model: mini`` for ``model: {name: mini}``."""
    return {"name": value} if isinstance(value, str) else value


class Run(Section):
    output: Path
    train: TrainRecipe


class Recipe(Run):
    model: Annotated[ModelRecipe, BeforeValidator(named)]
    data: tuple[DataRecipe, ...] = Field(min_length=1)
    features: FeatureRecipe | None = None
    expect: ExpectRecipe = ExpectRecipe()


class Stage1Run(Recipe):
    stage1: Stage1Recipe = Stage1Recipe()

    @model_validator(mode="after")
    def _writes_alone(self) -> Self:
        if self.stage1.scst and self.train.parallel != "ddp":
            raise ValueError(
                f"stage1.scst needs train.parallel ddp, not {self.train.parallel}: the processes "
                "write captions of different lengths, and would wait for each other's weights"
            )
        return self


class Stage2Run(Recipe):
    stage2: Stage2Recipe = Stage2Recipe()


class Stage3Run(Recipe):
    stage3: Stage3Recipe = Stage3Recipe()

    @model_validator(mode="after")
    def _no_waiting(self) -> Self:
        if self.stage3.given > 0 and self.train.parallel != "ddp":
            raise ValueError(
                f"stage3.given needs train.parallel ddp, not {self.train.parallel}: a batch of "
                "given things does not run the encoder, where the other processes would wait"
            )
        return self


def changes(
    before: Mapping[str, Any], now: Mapping[str, Any], above: str = ""
) -> dict[str, tuple[Any, Any]]:
    """The keys of ``now`` (``train.lr``) whose values were others before, with both values."""
    found: dict[str, tuple[Any, Any]] = {}
    for key, value in now.items():
        then = before.get(key)
        if isinstance(then, Mapping) and isinstance(value, Mapping):
            found |= changes(then, value, f"{above}{key}.")
        elif then != value:
            found[above + key] = (then, value)
    return found


class _Loader(yaml.SafeLoader):
    """YAML that reads ``1e-4`` as a number; YAML 1.1 wants ``1.0e-4``."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)

R = TypeVar("R", bound=Section)


def load_recipe(kind: type[R], path: Path, overrides: Iterable[str] = ()) -> R:
    """Read a recipe and apply ``key=value`` overrides; a ConfigError names what is wrong."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of keys, not {type(content).__name__}")
    for override in overrides:
        _apply(content, override)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_explain(kind, error)}") from error


def _apply(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override}: write it as key=value, for example train.lr=1e-4")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not YAML") from error
    names = key.split(".")
    if names[:2] == ["model", "options"]:  # whose keys have dots of their own
        names = [*names[:2], ".".join(names[2:])] if len(names) > 2 else names
    node: Any = content
    for depth, name in enumerate(names, 1):
        place: Any = name
        if isinstance(node, list):
            if not name.isdigit() or int(name) >= len(node):
                last = len(node) - 1
                raise ConfigError(f"--set {override}: the list has only the items 0 to {last}")
            place = int(name)
        elif not isinstance(node, dict):
            reason = "cannot be set, because the key above it holds a single value"
            raise ConfigError(f"--set {override}: {name!r} {reason}")
        elif depth < len(names):
            below = named(node.get(name)) if name == "model" else node.get(name)
            node[name] = {} if below is None else below
        if depth == len(names):
            node[place] = value
        else:
            node = node[place]


def _explain(kind: type[BaseModel], error: ValidationError) -> str:
    """The first thing wrong, in one line; unknown keys with the nearest known one."""
    first = error.errors(include_url=False)[0]
    location: Sequence[str | int] = first["loc"]
    where = ".".join(str(part) for part in location)
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        known = sorted(_section(kind, location[:-1]).model_fields)
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"the keys here are {', '.join(known)}"
        return f"unknown key {where!r}; {hint}{more}"
    if first["type"] == "missing":
        return f"key {where!r} is missing{more}"
    message = first["msg"].removeprefix("Value error, ")
    value = first["input"]
    shown = "" if isinstance(value, Mapping | list | BaseModel) else f" (got {value!r})"
    return f"{where}: {message}{shown}{more}"


def _section(kind: type[BaseModel], location: Sequence[str | int]) -> type[BaseModel]:
    for part in location:
        if isinstance(part, str) and part in kind.model_fields:
            kind = next(_models_in(kind.model_fields[part].annotation), kind)
    return kind


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)

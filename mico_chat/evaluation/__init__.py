"""Measuring what a model can do: items with known answers, scoring, controls, reports."""

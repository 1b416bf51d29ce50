"""Readers of the data sets' own annotation files, as their publishers distribute them."""

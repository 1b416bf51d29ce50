"""Modules and forward passes: nothing here reads a folder."""

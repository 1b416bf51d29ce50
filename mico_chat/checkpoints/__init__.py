"""Folders: models read, written, put together and converted."""

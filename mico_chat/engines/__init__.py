"""The table of engines: what each of them is for, what it needs, and how it loads a model."""

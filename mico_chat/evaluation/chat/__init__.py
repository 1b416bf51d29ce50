"""Chat models under evaluation: in this process, or behind an OpenAI-compatible endpoint."""

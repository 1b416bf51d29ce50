"""HTTP service of MiCo-Chat: thin routes over an engine."""

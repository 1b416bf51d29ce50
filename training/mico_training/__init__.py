"""Training of MiCo and MiCo-Chat: three stages, their data, and the data engine ``world``."""

"""What models read, and how their conversations become prompts: MiCo-Chat, and other models."""

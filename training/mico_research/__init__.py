"""What the paper measures beside the main path: fine-tuning, more modalities, ablations."""

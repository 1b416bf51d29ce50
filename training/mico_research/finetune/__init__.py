"""Fine-tuning on any modality (paper, table 2): data, runs, baselines, the table."""

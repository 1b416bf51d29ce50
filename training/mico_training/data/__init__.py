"""Training data: shards, a user's own manifests, mixing, and the three stages' examples."""

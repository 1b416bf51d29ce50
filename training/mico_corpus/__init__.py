"""From people's own videos to shards for training: clips, frames, sound, annotations."""

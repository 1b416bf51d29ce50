"""The parts of the mini: what its stem, ear, concepts and things add to the paper's model."""

"""The paper's ablations (Tables 1 and 7, figure 6) with small models on the data engine's world."""

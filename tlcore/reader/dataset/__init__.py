"""Training sets made of runs: which rows, in which order, and how they are read (private)."""

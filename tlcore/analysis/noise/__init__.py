"""What differences are worth: those of further runs of the reference beside those of two runs (private)."""

"""What capture costs, as ratios to what the same machine does without it: ``make bench``."""

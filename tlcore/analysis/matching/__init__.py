"""Which tensor of one run belongs to which of another. Private."""

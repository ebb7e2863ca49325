"""A run's rows written as other tools read them (private)."""

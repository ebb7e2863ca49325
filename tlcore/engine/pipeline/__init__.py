"""From staged batches to a sink. Private."""

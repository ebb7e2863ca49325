"""What a run looks like on disk, told once. Private."""

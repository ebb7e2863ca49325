"""What is captured, decided from names and metadata. Private."""

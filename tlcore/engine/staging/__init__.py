"""The staged copy of a tensor. Private."""

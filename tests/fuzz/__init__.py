"""Damaged files for every reader, the same for the same seed."""

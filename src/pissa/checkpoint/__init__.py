"""Checkpoints on disk: reading and writing one tensor at a time, and outputs that appear whole or not at all."""

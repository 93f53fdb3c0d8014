"""Checkpoints: atomic writing, validation field by field, and exact resumption."""

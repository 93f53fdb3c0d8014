"""Checkpoints: written whole, validated field by field, loaded exactly."""

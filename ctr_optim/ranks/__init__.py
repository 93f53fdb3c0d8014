"""Ranks that move: what directions are worth (utility), who gets them (scheduler), and moving them (resize)."""

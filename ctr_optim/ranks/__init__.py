"""LoRA ranks: utilities of directions (valuation), rank allocation (scheduler) and rank changes (resize)."""

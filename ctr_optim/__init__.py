"""Curvature-aware, trust-region guided training of LoRA adapters, as a torch optimizer."""

from ctr_optim.lora import LoRAPair
from ctr_optim.optimizer import CTROptimizer

__all__ = ["CTROptimizer", "LoRAPair"]
__version__ = "0.1.0"

"""A torch optimizer that trains LoRA adapters with curvature information inside a trust region."""

from ctr_optim.checkpoint.files import load_checkpoint, save_checkpoint
from ctr_optim.checkpoint.matching import match_ranks
from ctr_optim.export.compact import export_compact
from ctr_optim.export.uniform import export_uniform
from ctr_optim.holdout import Holdout
from ctr_optim.model.pair import LoRAPair
from ctr_optim.optimizer import CTROptimizer
from ctr_optim.ranks.compress import compress
from ctr_optim.ranks.events import RankEvent
from ctr_optim.ranks.initialize import initialize
from ctr_optim.ranks.scheduler import RankScheduler
from ctr_optim.retention import Retention

__all__ = [
    "CTROptimizer",
    "Holdout",
    "LoRAPair",
    "RankEvent",
    "RankScheduler",
    "Retention",
    "compress",
    "export_compact",
    "export_uniform",
    "initialize",
    "load_checkpoint",
    "match_ranks",
    "save_checkpoint",
]
__version__ = "0.2.0"

"""timm: models, starting weights, optimizers and schedules, with errors that name the nearest choice."""

from gmscale.models.create import create, unwrap
from gmscale.models.freezing import Frozen, freeze
from gmscale.models.optimizer import check_optimizer, optimizer
from gmscale.models.pretrained import Loaded, start_from
from gmscale.models.schedule import Schedule, schedule

__all__ = [
    "Frozen",
    "Loaded",
    "Schedule",
    "check_optimizer",
    "create",
    "freeze",
    "optimizer",
    "schedule",
    "start_from",
    "unwrap",
]

"""Images for training and validation from webdataset shards, exact across ranks, workers and resumes."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gmscale.data.batch import Batch
    from gmscale.data.config import AugmentConfig, DataConfig
    from gmscale.data.faults import Fault, FaultLog, ShardError
    from gmscale.data.images.device import normalize, to_device
    from gmscale.data.images.gpu import check_device
    from gmscale.data.index import ShardIndex, open_index
    from gmscale.data.loader import TrainLoader, ValLoader, train_loader, val_loader
    from gmscale.data.source import Split, open_split
    from gmscale.data.stream import StreamLoader, StreamValLoader

__all__ = [
    "AugmentConfig",
    "Batch",
    "DataConfig",
    "Fault",
    "FaultLog",
    "ShardError",
    "ShardIndex",
    "Split",
    "StreamLoader",
    "StreamValLoader",
    "TrainLoader",
    "ValLoader",
    "check_device",
    "normalize",
    "open_index",
    "open_split",
    "to_device",
    "train_loader",
    "val_loader",
]

_HOMES = {
    "batch": ["Batch"],
    "config": ["AugmentConfig", "DataConfig"],
    "images.device": ["normalize", "to_device"],
    "images.gpu": ["check_device"],
    "faults": ["ShardError", "Fault", "FaultLog"],
    "index": ["ShardIndex", "open_index"],
    "loader": ["TrainLoader", "ValLoader", "train_loader", "val_loader"],
    "source": ["Split", "open_split"],
    "stream": ["StreamLoader", "StreamValLoader"],
}


def __getattr__(name: str) -> Any:
    # Lazy, so that `gmscale shards` and its processes do without torch.
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"gmscale.data.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

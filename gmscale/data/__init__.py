"""Images for training and validation from webdataset shards, exact across ranks, workers and resumes."""

from gmscale.data.config import DataConfig
from gmscale.data.loader import Batch, TrainLoader, ValLoader, train_loader, val_loader
from gmscale.data.shards import ShardIndex, open_index
from gmscale.data.transforms import normalize

__all__ = [
    "Batch",
    "DataConfig",
    "ShardIndex",
    "TrainLoader",
    "ValLoader",
    "normalize",
    "open_index",
    "train_loader",
    "val_loader",
]

"""Checkpoints: complete or absent, safetensors and JSON only, never a pickle."""

from gmscale.checkpoint.contents import Contents
from gmscale.checkpoint.layout import (
    best,
    checkpoints,
    latest,
    load_rank,
    load_weights,
    must_fit,
    optimizer_state,
    read,
    weights_file,
)
from gmscale.checkpoint.random_states import random_states, set_random_states
from gmscale.checkpoint.saving import Saver
from gmscale.checkpoint.shards import load_shards, whole_weights

__all__ = [
    "Contents",
    "Saver",
    "best",
    "checkpoints",
    "latest",
    "load_rank",
    "load_shards",
    "load_weights",
    "must_fit",
    "optimizer_state",
    "random_states",
    "read",
    "set_random_states",
    "weights_file",
    "whole_weights",
]

"""timm's loop: its published pieces in the order in which its train.py uses them (that script is in no package)."""

import json
import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import create_model, safe_model_name
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import (
    AverageMeter,
    CheckpointSaver,
    get_outdir,
    init_distributed_device,
    is_primary,
    random_seed,
    reduce_tensor,
    setup_default_logging,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gmscale.bench.loops import Task

_log = logging.getLogger("train")


def train(task: Task) -> None:
    """Set up everything and train one epoch."""
    setup_default_logging()
    args = SimpleNamespace(model=task.model, device="cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    device = init_distributed_device(args)
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    if task.amp == "bf16":
        autocast = partial(torch.autocast, device_type=device.type, dtype=torch.bfloat16)
    random_seed(42, args.rank)

    model = create_model(task.model, pretrained=False, num_classes=task.classes)
    sizes = {"input_size": (3, task.image_size, task.image_size), "interpolation": "bilinear"}
    data_config = resolve_data_config(sizes, model=model, verbose=is_primary(args))
    model.to(device=device)
    model.to(memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(
        model, opt="sgd", lr=task.lr, weight_decay=task.weight_decay, momentum=task.momentum
    )
    if args.distributed:
        model = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)

    dataset = partial(create_dataset, "wds/bench", root=task.shards, batch_size=task.batch_size)
    loader = partial(
        create_loader,
        input_size=data_config["input_size"],
        batch_size=task.batch_size,
        interpolation=data_config["interpolation"],
        mean=data_config["mean"],
        std=data_config["std"],
        num_workers=task.workers,
        distributed=args.distributed,
        pin_memory=False,
        device=device,
        use_prefetcher=True,
    )
    batches = loader(
        dataset(split="train", is_training=True, seed=42), is_training=True, hflip=0.5, color_jitter=0.0
    )
    loader(dataset(split="validation", is_training=False))
    criterion = nn.CrossEntropyLoss().to(device)
    if is_primary(args):
        outdir = get_outdir(task.directory, "train", safe_model_name(task.model))
        CheckpointSaver(model=model, optimizer=optimizer, args=args, checkpoint_dir=outdir, max_history=10)
        (Path(outdir) / "args.yaml").write_text(json.dumps(vars(args)))
    updates = len(batches)
    scheduler, _ = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=1, step_on_epochs=False, updates_per_epoch=updates
    )

    # -- one epoch ------------------------------------------------------------------------------------------------
    update_time, data_time, losses = AverageMeter(), AverageMeter(), AverageMeter()
    model.train()
    waiting_since = updating_since = time.time()
    optimizer.zero_grad()
    for number, (images, targets) in enumerate(batches):
        images = images.contiguous(memory_format=torch.channels_last)
        data_time.update(time.time() - waiting_since)
        with autocast():
            loss = criterion(model(images), targets)
        loss.backward()
        optimizer.step()
        losses.update(loss.item(), images.size(0))
        optimizer.zero_grad()
        now = time.time()
        update_time.update(now - updating_since)
        updating_since = now
        if number % task.log_every == 0:
            shown = losses.avg
            if args.distributed:
                shown = reduce_tensor(loss.new_tensor([losses.avg]), args.world_size).item()
            if is_primary(args):
                lr = sum(group["lr"] for group in optimizer.param_groups) / len(optimizer.param_groups)
                rate = images.size(0) * args.world_size / update_time.val
                _log.info(
                    "%d/%d loss %.3f lr %.3e %.1f images/s, data %.3f s",
                    *(number, updates, shown, lr, rate, data_time.val),
                )
        scheduler.step_update(num_updates=number + 1, metric=losses.avg)
        waiting_since = time.time()
    if args.distributed:
        torch.distributed.destroy_process_group()

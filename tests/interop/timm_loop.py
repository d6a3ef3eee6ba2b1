"""The mask in a loop built like timm's train.py: its factories, NativeScaler, ModelEmaV3 and train_one_epoch.

torchrun --standalone --nproc_per_node 2 timm_loop.py [--no_mask]
"""

import argparse
import hashlib
from contextlib import nullcontext

import torch
from timm import utils
from timm.data import create_loader
from timm.models import create_model, model_parameters
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.datasets import FakeData

import gmscale

parser = argparse.ArgumentParser()
parser.add_argument("--no_mask", action="store_true")
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--grad_accum_steps", type=int, default=2)
parser.add_argument("--clip_grad", type=float, default=1.0)


def train_one_epoch(epoch, model, loader, loss_fn, optimizer, args, scheduler, loss_scaler, model_ema, attachment):
    updates_per_epoch = len(loader) // args.grad_accum_steps
    model.train()
    for batch, (images, labels) in enumerate(loader):
        num_updates = epoch * updates_per_epoch + batch // args.grad_accum_steps
        need_update = (batch + 1) % args.grad_accum_steps == 0
        if attachment:
            # the scale that the gradients carry, so that what is held back keeps its size
            scale = loss_scaler.state_dict()["scale"]
            attachment.at(num_updates, args.epochs * updates_per_epoch, grad_scale=scale)
        with nullcontext() if need_update else model.no_sync():
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_fn(model(images), labels) / args.grad_accum_steps
            loss_scaler(
                loss,
                optimizer,
                clip_grad=args.clip_grad,
                parameters=model_parameters(model),
                need_update=need_update,
            )
        if need_update:
            optimizer.zero_grad()
            model_ema.update(model, step=num_updates + 1)
            scheduler.step_update(num_updates=num_updates + 1)


def main():
    args = parser.parse_args()
    device = torch.device("cpu")
    utils.init_distributed_device(argparse.Namespace(device="cpu", dist_backend="gloo"))
    rank = torch.distributed.get_rank()
    utils.random_seed(0, 0)
    model = create_model("test_byobnet", num_classes=10).to(device)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1, momentum=0.9, weight_decay=1e-4)
    loss_scaler = utils.NativeScaler(device="cpu")
    model_ema = utils.ModelEmaV3(model, decay=0.9)
    model = DistributedDataParallel(model)
    attachment = None
    if not args.no_mask:
        attachment = gmscale.attach(model, gmscale.GradientMask(strength=0.5, warmup=0.2), site="ddp")

    loader = create_loader(
        FakeData(64, (3, 32, 32), num_classes=10),
        input_size=(3, 32, 32),
        batch_size=8,
        is_training=True,
        no_aug=True,
        num_workers=0,
        distributed=True,
        use_prefetcher=False,
        device=device,
    )
    scheduler, epochs = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=args.epochs,
        step_on_epochs=False,
        updates_per_epoch=len(loader) // args.grad_accum_steps,
    )
    loss_fn = nn.CrossEntropyLoss()
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        train_one_epoch(
            epoch, model, loader, loss_fn, optimizer, args, scheduler, loss_scaler, model_ema, attachment
        )

    kept = attachment.report().kept_entries if attachment else 1.0
    for what, module in (("weights", model), ("average", model_ema.module)):
        flat = torch.cat([p.detach().flatten() for p in module.parameters()])
        digest = hashlib.sha256(flat.numpy().tobytes()).hexdigest()[:16]
        print(f"rank {rank}: kept {kept:.4f} of the masked gradients' entries, {what} {digest}", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

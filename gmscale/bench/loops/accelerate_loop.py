"""A loop with Hugging Face's Accelerate, as its image classification example has it."""

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, Normalize, RandomHorizontalFlip, RandomResizedCrop, ToTensor

from gmscale.bench.loops import Task


def train(task: Task) -> None:
    """Set up everything and train one epoch."""
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), mixed_precision="bf16" if task.amp == "bf16" else "no"
    )
    set_seed(42)
    transform = Compose(
        [
            RandomResizedCrop(task.image_size),
            RandomHorizontalFlip(),
            ToTensor(),
            Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    loader: DataLoader = DataLoader(
        ImageFolder(task.folders, transform),
        batch_size=task.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=task.workers,
    )
    model = timm.create_model(task.model, num_classes=task.classes).to(memory_format=torch.channels_last)
    model = model.to(accelerator.device)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=task.lr, momentum=task.momentum, weight_decay=task.weight_decay, nesterov=True
    )
    scheduler = CosineAnnealingLR(optimizer, T_max=len(loader))
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    model.train()
    total = torch.zeros((), device=accelerator.device)
    for number, (images, targets) in enumerate(loader):
        images = images.contiguous(memory_format=torch.channels_last)
        loss = nn.functional.cross_entropy(model(images), targets)
        total += loss.detach().float()
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if (number + 1) % task.log_every == 0:
            accelerator.print(f"{number + 1}/{len(loader)} loss {total.item() / (number + 1):.3f}")
    accelerator.end_training()

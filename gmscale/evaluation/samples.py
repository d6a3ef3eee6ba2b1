"""A few validation pictures with what the model says of them, for the report."""

import json
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from gmscale.data import DataConfig, StreamValLoader, ValLoader, normalize


@torch.no_grad()
def write_samples(
    model: nn.Module, loader: ValLoader | StreamValLoader, config: DataConfig, directory: Path, count: int = 24
) -> None:
    """Write `count` validation pictures of this rank, spread evenly, and samples.json into `directory`.

    samples.json is a list of {file, label, predicted, confidence}, labels as class names.
    """
    directory.mkdir(parents=True, exist_ok=True)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    stride = max(1, sum(len(labels) for _, labels, _ in loader) // count)
    records: list[dict[str, str | float]] = []
    position = 0
    for images, labels, _ in loader:
        chosen = [i for i in range(len(labels)) if (position + i) % stride == 0][: count - len(records)]
        position += len(labels)
        if not chosen:
            continue
        confidence, predicted = model(normalize(images[chosen].to(device), config)).float().softmax(1).max(1)
        for i, p, c in zip(chosen, predicted.tolist(), confidence.tolist(), strict=True):
            file = f"{len(records):03d}.png"
            Image.fromarray(images[i].permute(1, 2, 0).numpy()).save(directory / file)
            names = loader.classes
            records.append(
                {
                    "file": file,
                    "label": names[int(labels[i])],
                    # the split may have no image of the model's last classes, and so no name for them
                    "predicted": names[p] if p < len(names) else str(p),
                    "confidence": round(c, 4),
                }
            )
    model.train(was_training)
    (directory / "samples.json").write_text(json.dumps(records, indent=1))

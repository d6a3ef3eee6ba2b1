"""The mask in Lightning: a callback attaches it as soon as the DDP model exists.

python lightning_fit.py [--no_mask]     (Lightning starts the second process itself)
"""

import argparse
import hashlib

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gmscale


class MaskGradients(Callback):
    """Attach a gradient mask to the DDP model that Lightning makes, and tell it the step."""

    def __init__(self, mask: gmscale.GradientMask) -> None:
        self.mask = mask

    def on_train_start(self, trainer, pl_module):
        self.attachment = gmscale.attach(trainer.strategy.model, self.mask, site="ddp")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.attachment.at(trainer.global_step, trainer.estimated_stepping_batches)


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 14 * 14, 10))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--no_mask", action="store_true")
    args = parser.parse_args()
    lightning.seed_everything(0, verbose=False)
    dataset = TensorDataset(torch.randn(64, 3, 16, 16), torch.randint(10, (64,)))
    model = Classifier()
    masking = MaskGradients(gmscale.GradientMask(strength=0.5, warmup=0.2))
    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, accumulate_grad_batches=2,
        callbacks=[] if args.no_mask else [masking],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, DataLoader(dataset, batch_size=8, shuffle=True))

    kept = 1.0 if args.no_mask else masking.attachment.report().kept_entries
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    digest = hashlib.sha256(weights.numpy().tobytes()).hexdigest()[:16]
    rank = trainer.global_rank
    print(f"rank {rank}: kept {kept:.4f} of the masked gradients' entries, weights {digest}", flush=True)


if __name__ == "__main__":
    main()

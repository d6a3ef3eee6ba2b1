"""The mask in a Hugging Face Accelerate script with gradient accumulation: attach to what prepare() returns.

torchrun --standalone --nproc_per_node 2 accelerate_ddp.py [--no_mask]     (or: accelerate launch)
"""

import argparse
import hashlib

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gmscale

parser = argparse.ArgumentParser()
parser.add_argument("--no_mask", action="store_true")
args = parser.parse_args()

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
set_seed(0)
model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 14 * 14, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
loader = DataLoader(TensorDataset(torch.randn(64, 3, 16, 16), torch.randint(10, (64,))), batch_size=8, shuffle=True)

model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
attachment = None
if not args.no_mask:
    attachment = gmscale.attach(model, gmscale.GradientMask(strength=0.5), site="ddp")

steps = 0
for _ in range(2):
    for x, y in loader:
        # accumulate() puts the micro-batches before the last one into DDP's no_sync: the mask sees their sum
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.cross_entropy(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
        steps += accelerator.sync_gradients

kept = attachment.report().kept_entries if attachment else 1.0
weights = torch.cat([p.detach().flatten() for p in accelerator.unwrap_model(model).parameters()])
digest = hashlib.sha256(weights.numpy().tobytes()).hexdigest()[:16]
rank = accelerator.process_index
print(f"rank {rank}: kept {kept:.4f} of the masked gradients' entries, weights {digest}, {steps} steps", flush=True)
accelerator.end_training()

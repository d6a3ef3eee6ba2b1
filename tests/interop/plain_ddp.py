"""The mask in a plain DistributedDataParallel script: two lines.

torchrun --standalone --nproc_per_node 2 plain_ddp.py [--no_mask]
"""

import argparse
import hashlib

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import gmscale

parser = argparse.ArgumentParser()
parser.add_argument("--no_mask", action="store_true")
args = parser.parse_args()

dist.init_process_group("gloo")
torch.manual_seed(0)
images, labels = torch.randn(64, 3, 16, 16), torch.randint(10, (64,))
dataset = TensorDataset(images, labels)
sampler = DistributedSampler(dataset)
loader = DataLoader(dataset, batch_size=8, sampler=sampler)

model = nn.Sequential(
    nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2), nn.ReLU(), nn.Flatten(),
    nn.Linear(64 * 7 * 7, 10),
)  # fmt: skip
ddp = DistributedDataParallel(model)
attachment = None
if not args.no_mask:
    mask = gmscale.GradientMask(strength=0.5)
    attachment = gmscale.attach(ddp, mask, site="ddp")

optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)
for epoch in range(2):
    sampler.set_epoch(epoch)
    for x, y in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(ddp(x), y).backward()
        optimizer.step()

kept = attachment.report().kept_entries if attachment else 1.0
weights = torch.cat([p.detach().flatten() for p in model.parameters()])
digest = hashlib.sha256(weights.numpy().tobytes()).hexdigest()[:16]
print(f"rank {dist.get_rank()}: kept {kept:.4f} of the masked gradients' entries, weights {digest}", flush=True)
dist.destroy_process_group()

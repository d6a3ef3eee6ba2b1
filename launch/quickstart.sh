#!/usr/bin/env bash
# The main job on real images: three arms at equal seeds, 2 processes (or one a GPU), about 3 minutes on two cores.
# Arguments are passed on: ./launch/quickstart.sh --seeds 3 --run.epochs 4
set -euo pipefail
. "$(dirname "$0")/environment.sh" embedded

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
gmscale launch --nproc_per_node "$((gpus > 0 ? gpus : 2))" compare --config configs/quickstart.yaml "$@"

cat <<'END'

ImageNet, from shards imagenet1k-train-{0000..1023}.tar with their _info.json in $SHARDS (not yet run by us):
  ./launch/torchrun.sh --config configs/imagenet1k_resnet50.yaml --data.source $SHARDS
  sbatch --nodes 4 --gpus-per-node 8 slurm/train.sbatch --config configs/imagenet1k_resnet50.yaml --data.source $SHARDS
END

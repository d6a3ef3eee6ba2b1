#!/usr/bin/env bash
# One training job on one node or many: run it on every node, with the arguments of gmscale train.
#   ./launch/torchrun.sh --config configs/imagenet1k_resnet50.yaml
#   NNODES=2 MASTER_ADDR=node0 ./launch/torchrun.sh --config configs/imagenet1k_resnet50.yaml     (on both nodes)
# The topology comes from the environment, and is printed before anything starts:
#   NNODES          nodes of the job (1), or least:most, such as 1:2
#   NPROC_PER_NODE  processes on each (one a GPU, else 1)
#   MASTER_ADDR     name or address of the node where all meet; MASTER_PORT (29400)
#   NODE_RANK       0 on that node; only where addresses do not tell, as for several nodes on one machine
#   RUN_ID          name of this start, the same on all nodes (gmscale)
#   MAX_RESTARTS    restarts in a row without progress (3)
#   JOIN_TIMEOUT_S  how long nodes wait for one another (600); GRACE_S: how long a stop may take (120)
#   VENV            virtual environment to enter (.venv, if it is there)
# Exit status: 0 done, 1 failed, 2 usage, 75 stopped on request after a checkpoint: the same command goes on.
set -euo pipefail
venv=${VENV:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv}
[ ! -f "$venv/bin/activate" ] || . "$venv/bin/activate"

topology=(--nnodes "${NNODES:-1}")
[ -z "${NPROC_PER_NODE:-}" ] || topology+=(--nproc_per_node "$NPROC_PER_NODE")
[ -z "${MASTER_ADDR:-}" ] || topology+=(--head "$MASTER_ADDR:${MASTER_PORT:-29400}")
[ -z "${NODE_RANK:-}" ] || topology+=(--node_rank "$NODE_RANK")
[ -z "${RUN_ID:-}" ] || topology+=(--run_id "$RUN_ID")
[ -z "${MAX_RESTARTS:-}" ] || topology+=(--max_restarts "$MAX_RESTARTS")
[ -z "${JOIN_TIMEOUT_S:-}" ] || topology+=(--join_timeout_s "$JOIN_TIMEOUT_S")
[ -z "${GRACE_S:-}" ] || topology+=(--grace_s "$GRACE_S")
exec python -m gmscale launch "${topology[@]}" train "$@"

#!/usr/bin/env bash
# A Ray cluster on several machines for one command: run it on every node, with the same arguments.
#   NNODES=2 MASTER_ADDR=node0 ./launch/ray_cluster.sh gmscale sweep --config configs/sweep/quickstart.yaml
# The command runs on the head, finds the cluster by RAY_ADDRESS, and takes it down with it, everywhere. The topology
# comes from the environment, and is printed before anything starts:
#   NNODES          nodes of the cluster (1), or least:most: the command begins when the least are there
#   MASTER_ADDR     name or address of the head; MASTER_PORT (29400): where all meet. Ray has the nine ports after it
#   NODE_RANK       0 on the head; only where addresses do not tell, as for several nodes on one machine
#   RUN_ID          name of this start, the same on all nodes (gmscale)
#   NUM_CPUS        of this node, for Ray (those that may be used here); NUM_GPUS (those that Ray finds)
#   JOIN_TIMEOUT_S  how long nodes wait for one another (600); GRACE_S: how long the command may take to stop (170)
#   DASHBOARD       1: Ray's dashboard on the head, at MASTER_PORT + 3 of its localhost (needs ray[default])
#   RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH    the same secret on all nodes; otherwise the head makes one
#   VENV            virtual environment to enter (.venv, if it is there)
# Exit status on all nodes: that of the command; 75 stopped on request: the same command goes on; 1 the cluster is
# lost, 2 usage.
set -euo pipefail
venv=${VENV:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv}
[ ! -f "$venv/bin/activate" ] || . "$venv/bin/activate"

topology=(--nnodes "${NNODES:-1}")
[ -z "${MASTER_ADDR:-}" ] || topology+=(--head "$MASTER_ADDR:${MASTER_PORT:-29400}")
[ -z "${NODE_RANK:-}" ] || topology+=(--node_rank "$NODE_RANK")
[ -z "${RUN_ID:-}" ] || topology+=(--run_id "$RUN_ID")
[ -z "${NUM_CPUS:-}" ] || topology+=(--num_cpus "$NUM_CPUS")
[ -z "${NUM_GPUS:-}" ] || topology+=(--num_gpus "$NUM_GPUS")
[ -z "${JOIN_TIMEOUT_S:-}" ] || topology+=(--join_timeout_s "$JOIN_TIMEOUT_S")
[ -z "${GRACE_S:-}" ] || topology+=(--grace_s "$GRACE_S")
[ "${DASHBOARD:-0}" = 0 ] || topology+=(--dashboard)
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}  # an address without a name is no news
exec python -m gmscale.sweep.cluster "${topology[@]}" "$@"

#!/usr/bin/env bash
# As torchrun.sh, with DeepSpeed's ZeRO as the back-end: run it on every node, with the arguments of gmscale train.
#   ./launch/deepspeed.sh --config configs/zero1_deit_base.yaml
#   HOSTFILE=hostfile ./launch/deepspeed.sh --config configs/zero1_deit_base.yaml     (on every node of the file)
# HOSTFILE is DeepSpeed's: one line `node0 slots=8` a node. Its first node is the head, its number of lines NNODES, its
# slots NPROC_PER_NODE; what the environment says as in torchrun.sh wins. DeepSpeed's own launcher is not used: it needs
# ssh or pdsh between the nodes, does not restart, and cannot pass a stop on to all ranks.
set -euo pipefail
if [ -n "${HOSTFILE:-}" ]; then
  [ -r "$HOSTFILE" ] || { echo "gmscale: error: HOSTFILE $HOSTFILE cannot be read; expected lines such as: node0 slots=8" >&2; exit 2; }
  hosts=$(sed 's/#.*//' "$HOSTFILE" | awk 'NF { print $1 }')
  slots=$(sed 's/#.*//' "$HOSTFILE" | awk 'NF { n = 0; for (i = 2; i <= NF; i++) if ($i ~ /^slots=[1-9][0-9]*$/) n = substr($i, 7); print n }' | sort -u)
  if [ -z "$hosts" ] || [ "$(wc -l <<< "$slots")" != 1 ] || [ "$slots" = 0 ]; then
    echo "gmscale: error: HOSTFILE $HOSTFILE: expected lines such as: node0 slots=8, with the same slots on all nodes" >&2
    exit 2
  fi
  export NNODES=${NNODES:-$(wc -l <<< "$hosts")} NPROC_PER_NODE=${NPROC_PER_NODE:-$slots}
  [ "$NNODES" = 1 ] || export MASTER_ADDR=${MASTER_ADDR:-$(head -n 1 <<< "$hosts")}
fi
exec "$(dirname "${BASH_SOURCE[0]}")/torchrun.sh" --parallel.backend deepspeed "$@"

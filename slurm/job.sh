# Sourced by the batch scripts; a batch script runs on the first node of its job.
# It starts one launcher a node with srun, passes requests to stop on to them, and puts a stopped job back in the
# queue.

status=0          # of the step
requests=0        # to stop: SIGTERM or SIGUSR1, before preemption and the time limit
step=             # the process that hears of them: the srun at work
repeat_s=5        # until it hears again: srun loses what comes while it creates its step
srun_options=()   # of your site, for every step

fail() {
  echo "gmscale: error: $*" >&2
  exit 2
}

# The virtual environment VENV, or .venv if it is there, for what does not go through launch/torchrun.sh.
enter_environment() {
  local venv=${VENV:-.venv}
  [ ! -f "$venv/bin/activate" ] || . "$venv/bin/activate"
}

# What launch/torchrun.sh reads, from what Slurm says.
set_topology() {
  NNODES=$SLURM_JOB_NUM_NODES
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))  # two jobs may share a node; ports from 32768 on are the system's
  RUN_ID=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
  [ -z "${SLURM_GPUS_ON_NODE:-}" ] || NPROC_PER_NODE=${NPROC_PER_NODE:-$SLURM_GPUS_ON_NODE}
  export NNODES MASTER_ADDR MASTER_PORT RUN_ID ${NPROC_PER_NODE+NPROC_PER_NODE}
}

on_request() {
  requests=$((requests + 1))
  if [ -z "$step" ]; then
    status=75
    finish  # nothing has begun
  fi
  kill -USR1 "$step" 2>/dev/null || true  # for SIGTERM srun would kill its tasks
  if [ "$requests" = 1 ] && [ -n "$repeat_s" ]; then
    (while sleep "$repeat_s" && kill -USR1 "$step"; do :; done) 2>/dev/null &
  fi
}
trap on_request TERM USR1

# Waits for `step`, through signals; sets `status` to its status.
wait_for_step() {
  local before
  while
    before=$requests
    status=0
    wait "$step" || status=$?
    [ "$requests" -ne "$before" ]  # then it was the signal that ended `wait`
  do :; done
  step=
}

# Runs a command once on every node and waits for all; sets `status` to the highest of their statuses.
on_every_node() {
  start_on_every_node "$@"
  wait_for_step
}

start_on_every_node() {
  announce
  start_on_nodes_from 0 "$@"
}

announce() {
  echo "gmscale: job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST" \
    "(CPUs of a node: ${SLURM_CPUS_ON_NODE:-?}, GPUs: ${SLURM_GPUS_ON_NODE:-0})"
}

# Starts a command, all but the first argument, on every node but the first so many.
start_on_nodes_from() {
  local nodes=$((SLURM_JOB_NUM_NODES - $1))
  # no binding: what the one task of a node starts shares all that the job has there
  srun --relative "$1" --nodes "$nodes" --ntasks "$nodes" --ntasks-per-node 1 --cpu-bind none \
    --kill-on-bad-exit=0 --wait 60 "${srun_options[@]}" "${@:2}" &
  step=$!
}

# Ends the batch script with `status`. A job that was stopped (75; 138 or 143: before it listened, or just after) is
# queued again, unless its user cancelled it, which `scontrol requeue` would undo, or Slurm has requeued it itself. So
# is one whose launcher was killed (137), but not often: it may be out of memory.
finish() {
  local id=$SLURM_JOB_ID restarts=${SLURM_RESTART_COUNT:-0} most=${MAX_REQUEUES:-100} shown
  [ "$status" != 137 ] || [ "$most" -lt 3 ] || most=3
  [ -z "${SLURM_ARRAY_JOB_ID:-}" ] || id=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID  # never the whole array
  case $status in
    75 | 137 | 138 | 143)
      status=75
      shown=$(scontrol --oneliner show job "$id")
      if [[ $shown != *" JobState=RUNNING "* && $shown != *" Reason=TimeLimit "* ]]; then
        echo "gmscale: job $id stopped; it was cancelled, or Slurm requeues it"
      elif [ "$restarts" -ge "$most" ]; then
        echo "gmscale: job $id was requeued $restarts times, no more (MAX_REQUEUES); the same sbatch goes on" >&2
      elif scontrol requeue "$id"; then
        echo "gmscale: job $id stopped and is queued again"
      else
        echo "gmscale: job $id cannot be requeued here; the same sbatch goes on" >&2
      fi
      ;;
  esac
  exit "$status"
}

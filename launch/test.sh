#!/usr/bin/env bash
# Makes the environment if it is missing, then lint, types and all tests, also the slow ones, which plain pytest leaves
# out. Arguments go to pytest: -k mask, -x, ...
set -euo pipefail
. "$(dirname "$0")/environment.sh" dev

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
ruff check .
ruff format --check .
mypy
exec python -m pytest -m "not slurm" "$@"

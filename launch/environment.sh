# Sourced by the other scripts: makes .venv with pinned versions if it is missing or out of date, and enters it.
# Usage: . launch/environment.sh EXTRAS     (embedded, dev, ... of pyproject.toml)
# PYTHON names the interpreter (3.11 or newer). A CPU-only machine can save 4 GB:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu ./launch/quickstart.sh     (untested)

extras=$1
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
    if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "gmscale: error: no Python 3.11 or newer found; install one, or name it: PYTHON=/path/to/python $0" >&2
  return 2
}

# What the environment was made from: when that changes, pip runs again.
wanted=$(cat pyproject.toml constraints.txt | sha256sum | cut -d' ' -f1)
stamp=.venv/gmscale-$extras.stamp
if ! grep -qsx "$wanted" "$stamp" .venv/gmscale-dev.stamp; then  # dev includes embedded
  python=$(find_python) || exit $?
  [ -x .venv/bin/python ] || "$python" -m venv .venv || {
    echo "gmscale: error: $python cannot make a virtual environment; on Debian: apt install python3-venv" >&2
    exit 2
  }
  echo "installing gmscale[$extras] into .venv (a few minutes and 6 GB, once)"
  # deepspeed comes as source: without this it would try to compile its CUDA kernels now
  DS_BUILD_OPS=0 .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$extras]"
  echo "$wanted" > "$stamp"
fi
. .venv/bin/activate

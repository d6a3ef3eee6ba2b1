#!/usr/bin/env bash
# Installs what tests/slurm needs on Debian or Ubuntu: Slurm's daemons and commands, munge, and the tools that make
# network namespaces. Nothing is started: the tests start daemons of their own. To run it again does no harm.
set -euo pipefail

packages=(slurmctld slurmd slurm-client munge iproute2 util-linux)
missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
if [ ${#missing[@]} -eq 0 ]; then
  echo "installed already: ${packages[*]}"
  exit
fi
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
  echo "tests/slurm/install.sh: error: needs apt-get and root to install ${missing[*]}; try: sudo $0" >&2
  exit 2
fi

# Debian starts a daemon that it installs, unless a file of this name forbids it.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
  trap 'rm -f $policy' EXIT
  printf '#!/bin/sh\nexit 101\n' > $policy
  chmod +x $policy
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${missing[@]}"

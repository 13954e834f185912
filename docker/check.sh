#!/usr/bin/env bash
# Executes docker/Dockerfile where no engine can: in clean roots made by debootstrap, as root on Linux.
# Then runs the result as a container would be run, and checks it. See docker/check.py --help.
#
#   docker/check.sh [--target cpu] [--build-arg NAME=VALUE] [--secret id=pip,src=FILE] ...
#
# MIRROR: of Debian's packages. BASE: where the clean root is, or is put to be used again.
# KEEP=1: leaves the roots of the stages where they are.
set -euo pipefail
cd "$(dirname "$0")/.."
[ "$(id -u)" = 0 ] || { echo "docker/check.sh: run it as root, which chroot needs" >&2; exit 2; }
command -v debootstrap unshare >/dev/null ||
  { echo "docker/check.sh: needs apt-get install debootstrap util-linux iproute2" >&2; exit 2; }

# every mount is made in a namespace that ends with its command: nothing is left to unmount
work=$(mktemp -d)
[ "${KEEP:-}" = 1 ] || trap 'rm -rf --one-file-system "$work"' EXIT
base=${BASE:-$work/base}
if [ ! -e "$base/usr/local/bin/python" ]; then
  echo "debootstrap, the stand-in for python:3.11-slim-bookworm"
  unshare --mount debootstrap --variant=minbase \
    --include=ca-certificates,python3,python3-pip,libpython3.11-dev \
    bookworm "$base" "${MIRROR:-http://deb.debian.org/debian}" >"$work/log" ||
    { tail "$work/log" >&2; exit 1; }
  # as in that image: `python`, and pip that may install
  rm "$base/usr/lib/python3.11/EXTERNALLY-MANAGED"
  ln -s /usr/bin/python3.11 "$base/usr/local/bin/python"
fi
python3 docker/check.py --base "$base" --work "$work" "$@"

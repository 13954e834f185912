#!/bin/sh
# Builds and runs the C++ self test under AddressSanitizer + UndefinedBehaviorSanitizer, then under
# ThreadSanitizer. Usage: kernels/sanitize.sh [build folder]
set -eu
source=$(cd "$(dirname "$0")" && pwd)
build=${1:-$(mktemp -d)}
mkdir -p "$build"
for sanitizers in address,undefined thread; do
  folder=$build/$(echo "$sanitizers" | tr , -)
  cmake -S "$source" -B "$folder" -DPRUNE_LLM_PYTHON=OFF -DPRUNE_LLM_SELFTEST=ON \
    -DPRUNE_LLM_SANITIZE="$sanitizers" -DCMAKE_CXX_FLAGS_RELEASE="-O1 -g1" > "$folder.log"
  cmake --build "$folder" --parallel >> "$folder.log"
  echo "self test under $sanitizers"
  "$folder/selftest"
done

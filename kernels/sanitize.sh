#!/bin/sh
# Builds the kernels with the address and undefined-behaviour sanitizers and runs kernels/driver.py with them.
#     kernels/sanitize.sh [python]
set -eu
here=$(cd "$(dirname "$0")" && pwd)
python=$(command -v "${1:-python3}")
compiler=${CXX:-g++}
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT

"$python" -m pip install --quiet --target "$build/tools" 'nanobind>=2.5'
PYTHONPATH="$build/tools" cmake -S "$here" -B "$build/made" -DSANITIZE=ON -DPython_EXECUTABLE="$python" -DCMAKE_BUILD_TYPE=Release >/dev/null
cmake --build "$build/made" --parallel 2 >/dev/null
mkdir -p "$build/site/steppe_kernels"
cp "$here/steppe_kernels/__init__.py" "$build"/made/_gru*.so "$build/site/steppe_kernels/"

# the interpreter is not sanitized, so the run-time library has to be loaded before it; Python leaks on purpose
LD_PRELOAD=$("$compiler" -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 PYTHONPATH="$build/site" \
    "$python" -P "$here/driver.py"

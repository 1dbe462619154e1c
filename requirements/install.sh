#!/bin/sh
# Makes a virtual environment and installs this project into it:
#
#     requirements/install.sh PYTHON FOLDER EXTRAS [CONSTRAINTS]
#
# CONSTRAINTS is a file of exact versions; without it, pip takes the newest ones. TORCH in the
# environment names another torch than the CPU build, for example TORCH=torch for a CUDA device.
set -eu
python=$1 venv=$2 extras=$3 constraints=${4:-}
cpu_builds=https://download.pytorch.org/whl/cpu

"$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet --quiet install "$@"; }
locked() { if [ -n "$constraints" ]; then pip --constraint "$constraints" "$@"; else pip "$@"; fi; }

# torch first. On Linux the plain build brings several GB of CUDA: a CPU build is taken where one
# can be found, on the package index or else on PyTorch's own, and the plain build where none can.
pinned=$(if [ -n "$constraints" ]; then sed -n 's/^torch==\([0-9.]*\).*/==\1/p' "$constraints"; fi)
echo "installing torch$pinned and what mezo needs into $venv; this takes a few minutes"
try() { pip --no-deps --retries 1 --timeout 15 "$@" 2>>"$venv/torch.log"; }
if [ -n "${TORCH:-}" ]; then
    locked "$TORCH"
elif [ "$(uname)" = Linux ] && [ -n "$pinned" ] && try "torch$pinned+cpu"; then :
elif [ "$(uname)" = Linux ] && try "torch$pinned" --index-url "$cpu_builds"; then :
else
    [ "$(uname)" != Linux ] || echo "no CPU build of torch$pinned is at hand: taking the plain one"
    locked "torch$pinned"
fi

# setuptools comes from the constraints too, hence no isolated build
locked setuptools
locked --no-build-isolation --editable ".[$extras]"

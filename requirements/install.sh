#!/bin/sh
# Makes a virtual environment and installs mezo into it:
#
#     requirements/install.sh PYTHON FOLDER EXTRAS [CONSTRAINTS [ARCHIVE]]
#
# CONSTRAINTS is a file of exact versions; without it, pip takes the newest ones. What is installed
# is this folder, so that its files can be edited, or ARCHIVE. TORCH in the environment names
# another torch than the CPU build, for example TORCH=torch for a CUDA device.
set -eu
python=$1 venv=$2 extras=${3:+[$3]} constraints=${4:-} archive=${5:-}
cpu_builds=https://download.pytorch.org/whl/cpu

"$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet --quiet install "$@"; }
locked() { if [ -n "$constraints" ]; then pip --constraint "$constraints" "$@"; else pip "$@"; fi; }

pinned=$(if [ -n "$constraints" ]; then sed -n 's/^torch==\([0-9.]*\).*/==\1/p' "$constraints"; fi)
echo "installing torch$pinned and what mezo needs into $venv; this takes a few minutes"
locked "setuptools>=77" # from the constraints too, hence no isolated build at the end

# torch comes next. On Linux the plain build brings several GB of CUDA: a CPU build is taken where
# one can be found, on the package index or else on PyTorch's own, and the plain one where none can.
try() { pip --no-deps --retries 1 --timeout 15 "$@" 2>>"$venv/torch.log"; }
if [ -n "${TORCH:-}" ]; then
    locked "$TORCH"
elif [ "$(uname)" = Linux ] && [ -n "$pinned" ] && try "torch$pinned+cpu"; then :
elif [ "$(uname)" = Linux ] && try "torch$pinned" --index-url "$cpu_builds"; then :
else
    [ "$(uname)" != Linux ] || echo "no CPU build of torch$pinned is at hand: taking the plain one"
    locked "torch$pinned"
fi

if [ -n "$archive" ]; then
    locked --no-build-isolation "$archive$extras"
else
    locked --no-build-isolation --editable ".$extras"
fi

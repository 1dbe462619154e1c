#!/bin/sh
# Installs the wheel and the source archive of dist/ into empty environments, and tries each from a
# folder that is not the source tree:
#
#     requirements/try-dist.sh PYTHON CONSTRAINTS
set -eu
python=$1 constraints=$(pwd)/$2 root=$(pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for archive in "$root"/dist/*.whl "$root"/dist/*.tar.gz; do
    echo "trying $(basename "$archive")"
    rm -rf "$work/venv"
    "$root/requirements/install.sh" "$python" "$work/venv" "" "$constraints" "$archive"
    (cd "$work" && venv/bin/mezo --help >/dev/null && venv/bin/python "$root/requirements/smoke.py")
done

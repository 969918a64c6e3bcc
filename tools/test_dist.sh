#!/bin/sh
# Install a built wheel into an empty environment and run it there: tools/test_dist.sh PYTHON DIST
#
# The environment borrows the dependencies of PYTHON, unless DEPENDENCIES=install. DEMO=1 runs the
# whole demo.
set -eu
python=$(command -v "$1") dist=$2
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
"$python" "$(dirname "$0")/check_dist.py" "$dist"
wheel=$(cd "$dist" && pwd)/$(basename "$dist"/*.whl)
home=$(mktemp -d)
trap 'rm -rf "$home"' EXIT
"$python" -m venv "$home/venv"
pip="$home/venv/bin/python -m pip --disable-pip-version-check install --quiet"
if [ "${DEPENDENCIES:-borrow}" = install ]; then
    $pip --constraint "$(dirname "$0")/../constraints.txt" "$wheel[sft]"
else
    $pip --no-deps "$wheel"
    own=$("$home/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    "$python" -c 'import torch; from pathlib import Path; print(Path(torch.__file__).parents[1])' \
        >"$own/dependencies.pth"
fi
cd "$home" # away from the sources
unset PYTHONPATH
venv/bin/python -c 'import softpref, sys; assert softpref.__file__.startswith(sys.prefix), softpref'
venv/bin/softpref --version
venv/bin/softpref demo --help >help.txt
grep -q -e --noise_rate help.txt
if [ -n "${DEMO:-}" ]; then
    venv/bin/softpref demo --output demo
    test -s demo/report.html
fi
echo "$wheel: works"

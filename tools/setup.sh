#!/bin/sh
# Make an environment with softpref in it: tools/setup.sh VENV CONSTRAINTS [PYTHON]
#
# TORCH=cpu or TORCH=default chooses torch's build. Unset, it is the CPU build where no CUDA device
# is found: the package index's own Linux build brings some 3 GB of CUDA libraries.
set -eu
venv=$1 constraints=$2 python=${3:-python3}
version=$(sed -n 's/^torch==//p' "$constraints")

if [ -z "${TORCH:-}" ]; then
    TORCH=cpu
    if [ "$(uname -s)" != Linux ] || nvidia-smi -L >/dev/null 2>&1; then TORCH=default; fi
fi
echo "setup: $("$python" --version), the packages of $constraints, into $venv"
echo "setup: torch $version, TORCH=$TORCH (cpu: some 0.2 GB; default: 3 GB with CUDA on Linux)"
"$python" -m venv --clear "$venv"
pip="$venv/bin/python -m pip --disable-pip-version-check install --constraint $constraints"

install_cpu_torch() {
    # Where pip is set up with an index of CPU builds, they end in +cpu; else uv knows one.
    $pip "torch==$version+cpu" 2>/dev/null && return
    $pip --quiet uv && "$venv/bin/uv" pip install --python "$venv/bin/python" \
        --torch-backend cpu --constraint "$constraints" "torch==$version" && return
    echo "setup: no CPU build of torch $version can be reached; taking the default one"
}

if [ "$TORCH" = cpu ]; then install_cpu_torch; fi
$pip --editable '.[dev]'
echo "setup: done; $("$venv/bin/python" -c 'import torch; print("torch", torch.__version__)')"
touch "$venv/installed"

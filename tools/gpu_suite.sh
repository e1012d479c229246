#!/usr/bin/env bash
# One command for the first hour on a GPU: parity, memory and speed, and one table to send back (docs/gpu.md).
#
#   bash tools/gpu_suite.sh [OUTPUT] [--only NAME ...] [--tests EXPRESSION] [--quick]
#
#   bash tools/gpu_suite.sh                            all of it; the table goes to gpu-results.md
#   bash tools/gpu_suite.sh /data/results.md           to another file
#   bash tools/gpu_suite.sh --only parity --tests rope some of the tests
#
# Takes the checkout's .venv, or else the python on the path, as in the container; MPO_PYTHON names another. Installs
# nothing. Without a GPU it runs to its end in some three minutes. Exit status: 1 if anything failed.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,11{s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
    exit 0
fi

python=${MPO_PYTHON:-$root/.venv/bin/python}
[[ -x $python || -n ${MPO_PYTHON:-} ]] || python=python
if ! "$python" -c 'import pytest, torch, megatron.core' 2>/dev/null; then
    printf '%s lacks pytest, torch or megatron-core: run bash tools/setup_venv.sh, or in the container pip install pytest\n' \
        "$python" >&2
    exit 1
fi

# Nothing comes from the network. The package is this checkout's, whatever else is installed.
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
# As a run has it (examples/slurm.sh).
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
exec "$python" "$root/tools/gpu_suite.py" "$@"

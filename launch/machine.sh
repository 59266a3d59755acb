# shellcheck shell=bash disable=SC2034
# What the launchers find out about this machine. Sourced by them.

# find_python MODULE...: sets `python`, an interpreter that has these modules; ends the launcher where there is none.
find_python() {
    local root
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    python=${PYTHON:-}
    if [[ -z "$python" && -z "${VIRTUAL_ENV:-}" && -z "${CONDA_PREFIX:-}" && -x "$root/.venv/bin/python" ]]; then
        python=$root/.venv/bin/python
    fi
    python=$(command -v "${python:-python3}") || { echo "there is no ${PYTHON:-python3}: set PYTHON" >&2; exit 1; }
    # Found, not imported: some of them take seconds.
    if ! "$python" -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))' "$@"; then
        echo "$python does not have $*: activate the environment of coupalign, set PYTHON, or run 'make demo' once" >&2
        exit 1
    fi
}

# count_processes: sets `gpus` of this machine, and `nproc`, the processes to start here; gives each its share of the cores.
count_processes() {
    gpus=0
    if [[ -n "${CUDA_VISIBLE_DEVICES:-}" ]]; then
        gpus=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | wc -l)
    elif [[ -z "${CUDA_VISIBLE_DEVICES+set}" ]] && command -v nvidia-smi >/dev/null; then
        gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
    fi
    nproc=${NPROC:-$((gpus > 0 ? gpus : 1))}
    local cores
    cores=$(nproc)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > nproc ? cores / nproc : 1))}
}

# The verb, where the arguments begin with one: `verb`, and how many words it took.
read_verb() {
    verb=train words=0
    if [[ "${1:-}" =~ ^[a-z]+$ ]]; then
        verb=$1 words=1
    fi
}

# start COMMAND...: instead of this script; with --dry-run (`dry`) the command is only printed.
start() {
    if [[ -n "$dry" ]]; then
        printf '%q ' "$@"
        echo
        exit 0
    fi
    exec "$@"
}

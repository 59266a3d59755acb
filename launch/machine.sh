# shellcheck shell=bash disable=SC2034
# Find out about this machine. Sourced by the launchers.

# find_python MODULE...: set `python` to an interpreter that has these modules, or exit.
find_python() {
    local root
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    python=${PYTHON:-}
    if [[ -z "$python" && -z "${VIRTUAL_ENV:-}" && -z "${CONDA_PREFIX:-}" && -x "$root/.venv/bin/python" ]]; then
        python=$root/.venv/bin/python
    fi
    python=$(command -v "${python:-python3}") || { echo "there is no ${PYTHON:-python3}: set PYTHON" >&2; exit 1; }
    # Only find the modules. Importing some of them takes seconds.
    if ! "$python" -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))' "$@"; then
        echo "$python does not have $*: activate the environment of coupalign, set PYTHON, or run 'make demo' once" >&2
        exit 1
    fi
}

# count_processes: set `gpus` to the GPUs of this machine and `nproc` to the processes to start here, and share the
# cores among them.
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

# read_verb ARGUMENTS...: set `verb` (default: train), and `words` to the number of arguments that it took.
read_verb() {
    verb=train words=0
    if [[ "${1:-}" =~ ^[a-z]+$ ]]; then
        verb=$1 words=1
    fi
}

# start COMMAND...: replace this script by the command. With --dry-run (`dry`), only print it.
start() {
    if [[ -n "$dry" ]]; then
        printf '%q ' "$@"
        echo
        exit 0
    fi
    exec "$@"
}

# Sourced by the other scripts: makes .venv in the repository and installs the given requirements file into it, once.
# usage: source scripts/setup.sh [requirements.txt]
# PYTHON names another interpreter than python3; VENV another folder than .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
requirements=${1:-requirements.txt}
VENV=${VENV:-.venv}
if [ ! -x "$VENV/bin/python" ]; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "setup: expected Python 3.10 or newer; name one by PYTHON=/path/to/python" >&2
        exit 2
    }
    echo "setup: making $VENV"
    "${PYTHON:-python3}" -m venv "$VENV"
fi
# The stamp holds what was installed, so that pip runs only when the requirements have changed.
stamp="$VENV/installed-$(basename "$requirements")"
wanted=$(cat requirements.txt "$requirements")
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
    echo "setup: installing $requirements (a few minutes, several GB with a CUDA build of torch)"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements"
    printf '%s\n' "$wanted" >"$stamp"
fi
PATH="$(cd "$VENV" && pwd)/bin:$PATH"

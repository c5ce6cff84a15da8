# Sourced by the other scripts: makes .venv in the repository and installs the given requirements file into it, once.
# usage: source scripts/setup.sh [requirements.txt]
# PYTHON names another interpreter than python3; VENV another folder than .venv.
set -euo pipefail
unset CDPATH # with it cd prints the folder
cd "$(dirname "${BASH_SOURCE[0]}")/.."
requirements=${1:-requirements.txt}
VENV=${VENV:-.venv}
case $VENV in "~/"*) VENV=$HOME/${VENV#*/} ;; esac

stop() {
    echo "setup: $1" >&2
    exit 2
}

case $(uname -s) in
    MINGW* | MSYS* | CYGWIN*) stop "expected Linux or macOS, got $(uname -s); on Windows use WSL, see INSTALL.md" ;;
esac
new='import sys; sys.exit(sys.version_info < (3, 10))'
# The stamp holds what was installed, so that pip runs only when the requirements have changed.
stamp="$VENV/installed-$(basename "$requirements")"
wanted=$(cat requirements.txt "$requirements")
installed=no
[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && installed=yes

# A half-made one lacks a Python that is there, or pip: after Ctrl-C, without ensurepip, after an upgrade of Python.
if [ ! -x "$VENV/bin/python" ] || { [ $installed = no ] && ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; }; then
    "${PYTHON:-python3}" -c "$new" 2>/dev/null || stop "expected Python 3.10 or newer; name one by PYTHON=/path/to/python"
    # --clear empties the folder, so one that somebody named must be an environment, or empty, or not be there.
    [ "$VENV" = .venv ] || [ ! -e "$VENV" ] || [ -f "$VENV/pyvenv.cfg" ] || [ -z "$(ls -A "$VENV")" ] ||
        stop "$VENV: expected a virtual environment, got something else; remove it, or name another folder by VENV"
    echo "setup: making $VENV"
    "${PYTHON:-python3}" -m venv --clear "$VENV" ||
        stop "$VENV could not be made, see above; on Debian and Ubuntu, apt install python3-venv first"
    installed=no
fi
if [ $installed = no ]; then
    "$VENV/bin/python" -c "$new" || stop "$VENV: expected Python 3.10 or newer, got $("$VENV/bin/python" -V); remove it"
    echo "setup: installing $requirements (a few minutes, several GB with a CUDA build of torch)"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements" ||
        stop "$requirements could not be installed, see above; without a network see INSTALL.md"
    printf '%s\n' "$wanted" >"$stamp"
fi
PATH="$(cd "$VENV" && pwd)/bin:$PATH"

# Sourced by the tools: makes the virtual environment that they share. Not a program of its own.
#
#   PYTHON          interpreter to make it with (python3)
#   VISIONKD_VENV   where it is (.venv in the checkout)
#   VISIONKD_TORCH  what pip installs as PyTorch, with options if need be; empty leaves the choice to the package's metadata
#
# Sets VENV to its folder. Returns at once where the environment is already what is asked for.

ensure_venv() {
    local python="${PYTHON:-python3}"
    local torch="${VISIONKD_TORCH-torch==2.14.1 torchvision==0.29.1}"
    VENV="${VISIONKD_VENV:-$PWD/.venv}"
    local stamp="$VENV/visionkd-installed.txt" wanted
    wanted="$(printf '%s\n' "$PWD" "$torch" && cat setup.cfg pyproject.toml)"

    if [[ -x "$VENV/bin/visionkd" && -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]]; then
        return 0
    fi
    if ! command -v "$python" > /dev/null; then
        echo "error: $python was not found; install Python 3.10 or newer, or name it: PYTHON=python3.12 $0" >&2
        return 2
    fi
    if [[ ! -x "$VENV/bin/python" ]]; then
        if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
            echo "error: $("$python" --version 2>&1) is too old; name Python 3.10 or newer: PYTHON=python3.12 $0" >&2
            return 2
        fi
        echo "Making $VENV with $("$python" --version 2>&1)" >&2
        if ! "$python" -m venv "$VENV" >&2; then
            rm -rf "$VENV"
            echo "error: $python cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv" >&2
            return 2
        fi
    fi
    echo "Installing visionkd and what it needs into $VENV (the first time takes a few minutes)" >&2
    rm -f "$stamp"
    if [[ -n "$torch" ]]; then
        # shellcheck disable=SC2086  # several words: requirements and options of pip
        _pip install $torch || return
    fi
    _pip install --editable '.[train,dev]' || return
    printf '%s\n' "$wanted" > "$stamp"
}

_pip() {
    "$VENV/bin/python" -m pip -qq --disable-pip-version-check "$@" >&2 && return
    echo "error: pip failed; without a GPU build of PyTorch at hand, set VISIONKD_TORCH (see tools/_venv.sh)" >&2
    return 1
}

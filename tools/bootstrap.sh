#!/bin/sh
# Make .venv (or VENV) and install ergodica into it, with the dependency groups given as arguments, and the extras in EXTRAS.
# The interpreter: a Python >= 3.12 on the PATH, else the newest one among pyenv's installed versions.
set -eu
venv=${VENV:-.venv}

is_recent() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

find_python() {
    for name in python3.14 python3.13 python3.12 python3 python; do
        path=$(command -v "$name" 2>/dev/null) || continue
        # a pyenv shim stands on the PATH for versions that are not active: run it to know
        if is_recent "$path"; then echo "$path"; return; fi
    done
    root=${PYENV_ROOT:-$HOME/.pyenv}
    for version in 3.14 3.13 3.12; do
        for path in $(ls -d "$root/versions/$version".*/bin/python 2>/dev/null | sort -rV); do
            if is_recent "$path"; then echo "$path"; return; fi
        done
    done
    echo "ergodica needs Python 3.12 or newer (with venv), and none was found on the PATH or under" \
         "$root/versions. Install one, for example with 'pyenv install 3.13' or your system's" \
         "package python3.13 and python3.13-venv, and call make again." >&2
    return 1
}

if [ ! -x "$venv/bin/python" ] || ! is_recent "$venv/bin/python"; then
    python=$(find_python)
    echo "Making $venv with $("$python" --version)"
    rm -rf "$venv"
    "$python" -m venv "$venv"
fi
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
groups=''
for group in "$@"; do groups="$groups --group $group"; done
echo "Installing ergodica${EXTRAS:+[$EXTRAS]}${groups} (a few minutes the first time)"
# shellcheck disable=SC2086  # one word per group is meant
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".${EXTRAS:+[$EXTRAS]}" $groups

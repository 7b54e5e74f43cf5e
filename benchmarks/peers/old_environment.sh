#!/bin/sh
# Makes an environment with the JAX that SGMCMCJax and jax-sgmc run on, and runs their scripts in it.
#
#     sh benchmarks/peers/old_environment.sh DIRECTORY CURRENT [PYTHON]
#
# Neither package can be imported with a current JAX, which is shown first, with CURRENT, the interpreter of this project's environment. JAX 0.4.25 needs a Python of 3.9 to 3.12; PYTHON is one, else the first that is found on the PATH or among the versions of pyenv. DIRECTORY is made, and used again by the next call.
set -eu
usage="usage: old_environment.sh DIRECTORY CURRENT [PYTHON]"
directory=${1:?$usage}
current=${2:?$usage}
here=$(cd "$(dirname "$0")" && pwd)

find_python() {
    for version in 3.11 3.10 3.12 3.9; do
        for candidate in "python$version" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$version".*/bin/python; do
            if "$candidate" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$version')" 2>/dev/null; then
                echo "$candidate"
                return
            fi
        done
    done
    echo "No Python of 3.9 to 3.12 was found on the PATH or in pyenv; name one: old_environment.sh DIRECTORY CURRENT PYTHON" >&2
    exit 1
}

if [ ! -x "$directory/bin/python" ]; then
    python=${3:-$(find_python)}
    "$python" -m venv "$directory"
fi
"$directory/bin/python" -m pip install --quiet --disable-pip-version-check -r "$here/old-requirements.txt"
"$directory/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target "$directory/alone" \
    sgmcmcjax==0.2.13 jax-sgmc==0.1.5
echo "== imports"
PYTHONPATH="$directory/alone" "$current" "$here/imports.py"
for script in sgmcmcjax_laws jax_sgmc_laws old_accuracy; do
    echo "== $script"
    "$directory/bin/python" "$here/$script.py"
done

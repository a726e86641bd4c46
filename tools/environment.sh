#!/bin/sh
# Makes, reuses and repairs a virtual environment that holds this project, as locked in constraints.txt.
#
#   tools/environment.sh find [VERSION...]              print a Python that can make one (default 3.13 3.12 3.11)
#   tools/environment.sh make DIR EXTRAS [VERSION...]   have DIR hold v4jax[EXTRAS]; milliseconds when it does
#
# PYTHON in the environment names the interpreter instead. DIR/.stamp tells what DIR was made from. It
# is removed before anything changes and written last: a DIR without it was interrupted and is made
# anew, a DIR whose stamp is out of date (setup.cfg, pyproject.toml or the lock changed) is brought up
# to date. Every failure ends in one line on stderr and exit status 1.
set -eu

ROOT=$(cd "$(dirname "$0")/.." && pwd)
SUPPORTED="3.13 3.12 3.11"

fail() {
    echo "environment: $*" >&2
    exit 1
}

# "3.12 /path" of an interpreter that starts, nothing for one that does not, such as a pyenv shim. The
# path is the base interpreter's: an activated .venv must not be asked to remake itself.
describe() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2], getattr(sys, "_base_executable", sys.executable))' \
        2>/dev/null || true
}

# Debian and Ubuntu ship the part of Python that makes environments as a package of its own.
can_make_venv() {
    "$1" -c 'import ensurepip, venv' 2>/dev/null
}

no_venv() {
    fail "$2 cannot make a venv; install the package python$1-venv (Debian, Ubuntu: apt-get install python$1-venv)"
}

# Every path where an interpreter of version $1 may be, one a line; they need not exist.
candidates() {
    (
        IFS=:
        for folder in $PATH; do
            printf '%s\n' "$folder/python$1" "$folder/python3" "$folder/python"
        done
    )
    for folder in "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".* \
        "${UV_PYTHON_INSTALL_DIR:-$HOME/.local/share/uv/python}/cpython-$1".*; do
        printf '%s\n' "$folder/bin/python3"
    done
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        found=$(describe "$PYTHON")
        [ -n "$found" ] || fail "PYTHON=$PYTHON does not start"
        case " $SUPPORTED " in
        *" ${found%% *} "*) ;;
        *) fail "PYTHON=$PYTHON is Python ${found%% *}, v4jax needs 3.11, 3.12 or 3.13" ;;
        esac
        can_make_venv "$PYTHON" || no_venv "${found%% *}" "$PYTHON"
        echo "${found#* }"
        return
    fi
    lame_version=
    for version in ${*:-$SUPPORTED}; do
        found=$(candidates "$version" | while read -r python; do
            [ -x "$python" ] || continue
            found=$(describe "$python")
            [ "${found%% *}" = "$version" ] || continue
            if can_make_venv "$python"; then
                echo "able ${found#* }"
                break
            fi
            echo "lame $python"
        done | sort | head -n 1)
        case $found in
        "able "*)
            echo "${found#able }"
            return
            ;;
        "lame "*)
            lame_version=${lame_version:-$version}
            lame=${lame:-${found#lame }}
            ;;
        esac
    done
    [ -z "$lame_version" ] || no_venv "$lame_version" "$lame"
    fail "no Python ${*:-$SUPPORTED} on PATH or in pyenv; install one, or name one with PYTHON=/path/to/python3"
}

make_environment() {
    dir=$1
    extras=$2
    shift 2
    cd "$ROOT"
    python=
    [ -z "${PYTHON:-}" ] || python=$(find_python)
    key="$extras $(cat setup.cfg pyproject.toml constraints.txt | cksum)"
    stamp=$(cat "$dir/.stamp" 2>/dev/null || true) # "EXTRAS CHECKSUM SIZE PYTHON"
    "$dir/bin/python" -c '' 2>/dev/null || stamp=
    if [ -n "$stamp" ]; then
        made_with=${stamp#"${stamp%% /*} "}
        [ "${python:-$made_with}" = "$made_with" ] || stamp= # PYTHON asks for another one: made anew
        python=${python:-$made_with}
    fi
    [ "$stamp" != "$key $python" ] || return 0

    rm -f "$dir/.stamp"
    if [ -z "$stamp" ]; then
        [ -n "$python" ] || python=$(find_python "$@")
        echo "environment: making $dir with $("$python" --version) ($python)"
        rm -rf "$dir"
        "$python" -m venv "$dir" || fail "$python could not make $dir (its message stands above)"
    fi
    echo "environment: installing v4jax[$extras] into $dir, a minute or two when nothing is cached"
    "$dir/bin/python" -m pip install -qq --disable-pip-version-check --no-input \
        --constraint constraints.txt --editable ".[$extras]" ||
        fail "pip could not install v4jax[$extras] (its message stands above)"
    echo "$key $python" >"$dir/.stamp.new"
    mv "$dir/.stamp.new" "$dir/.stamp"
}

action=${1:-}
[ $# -eq 0 ] || shift
case $action in
find) find_python "$@" ;;
make)
    [ $# -ge 2 ] || fail "usage: tools/environment.sh make DIR EXTRAS [VERSION...]"
    make_environment "$@"
    ;;
*) fail "usage: tools/environment.sh find [VERSION...] | make DIR EXTRAS [VERSION...]" ;;
esac

#!/bin/sh
# Names, in the first second, whatever this machine lacks for `make demo` and `make test`.
# usage: check.sh PYTHON
set -u
python=${1:-python3}
lacking=""

command -v "$python" >/dev/null 2>&1 || {
    echo "vlscale needs Python 3.10 or newer, and '$python' was not found: install it, or name yours: make PYTHON=/path/to/python3" >&2
    exit 1
}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "vlscale needs Python 3.10 or newer, and '$python' is $("$python" -V 2>&1): name a newer one: make PYTHON=/path/to/python3" >&2
    exit 1
}
"$python" -c 'import venv, ensurepip' 2>/dev/null || lacking="$lacking the venv module of $python (Debian: python3-venv);"
"$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
    lacking="$lacking the C headers of $python (Debian: python3-dev);"
command -v g++ >/dev/null 2>&1 || lacking="$lacking g++, which DeepSpeed compiles its shared-memory operator with (Debian: g++);"

[ -z "$lacking" ] || {
    echo "vlscale cannot be set up here. Missing:$lacking" >&2
    exit 1
}

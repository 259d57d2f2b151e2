# Sourced by the other scripts: makes ROOT/.venv once, installs what constraints.txt pins, and puts it on PATH.
# Usage: prepare_environment ROOT EXTRA, where EXTRA is '' or '[dev]'.

prepare_environment() {
    local root=$1 extra=$2 python stamp wanted
    python=$(find_python)
    [ -x "$root/.venv/bin/python" ] || "$python" -m venv "$root/.venv"
    stamp=$root/.venv/installed$extra
    wanted=$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum)
    if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
        echo "installing into $root/.venv (once; torch is large)" >&2
        "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check \
            -c "$root/constraints.txt" -e "$root$extra"
        echo "$wanted" > "$stamp"
    fi
    PATH="$root/.venv/bin:$PATH"
}

find_python() {
    local name
    for name in python3 python3.14 python3.13 python3.12 python3.11; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    echo "error: no Python 3.11 or newer" >&2
    echo "hint: install one, for example with your system's package manager" >&2
    return 5
}

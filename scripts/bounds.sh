#!/usr/bin/env bash
# The ends of what pyproject.toml allows: scripts/bounds.sh [lowest|newest] [arguments of pytest]
# Makes .venv-bounds-END with the lowest or the newest of every dependency, the torch of constraints.txt in both, and runs
# the short tests there, about two minutes. docs/gpu.md says what came of it.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
end=${1:-lowest}
[ $# -eq 0 ] || shift
case $end in lowest | newest) ;; *) echo "usage: scripts/bounds.sh [lowest|newest] [arguments of pytest]" >&2; exit 2 ;; esac
folder=$PWD/.venv-bounds-$end
[ -x "$folder/bin/python" ] || "$(find_python)" -m venv "$folder"
"$folder/bin/python" - "$end" > "$folder/requirements.txt" <<'EOP'
import re, sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
pinned = dict(line.split("==") for line in open("constraints.txt").read().splitlines() if "==" in line)
for wanted in [*project["dependencies"], *project["optional-dependencies"]["gguf"]]:
    name = re.match(r"[\w-]+", wanted)[0]
    lowest = re.sub(r">=([^,]+).*", r"==\1", wanted)
    print(f"torch=={pinned['torch']}" if name == "torch" else lowest if sys.argv[1] == "lowest" else wanted)
for name in ("pytest", "hypothesis"):
    print(f"{name}=={pinned[name]}")
EOP
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager \
    -r "$folder/requirements.txt"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -e .
# Warnings of other versions are not errors here, nor are plugins loaded that they bring.
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 OMP_NUM_THREADS=1 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
[ $# -gt 0 ] || set -- tests/test_{linear,loss,model,merge,doctor,chat}.py tests/test_train.py::test_resumed_equals_uninterrupted
"$folder/bin/python" -m pip list --disable-pip-version-check --format=freeze
exec "$folder/bin/python" -m pytest -q -o addopts= -W default "$@"

#!/usr/bin/env bash
# The gate: format, lint, types, tests. Installs what it needs into .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
prepare_environment "$PWD" '[dev]'
# llama.cpp itself, which tests ask about our exports; where its wheel cannot be had, they are skipped.
python -c 'import xllamacpp' 2>/dev/null || python -m pip install --quiet --disable-pip-version-check \
    --retries 1 --only-binary :all: -c constraints.txt xllamacpp || echo "without xllamacpp" >&2
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1

echo "== format" && ruff format --check .
echo "== lint" && ruff check .
echo "== types" && mypy
# Two processes with a thread each: most of a test is Python, which has one core. One that crashes ends the gate.
echo "== tests" && OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile --max-worker-restart 0 "$@"

#!/usr/bin/env bash
# Wheels for a GPU machine without a network: scripts/gpu_wheels.sh OUT
# For CPython 3.12 on Linux x86-64 where torch with CUDA 13, numpy, pyarrow, accelerate and an older transformers are:
#   OUT/base    what else lorasft imports    OUT/stack    transformers and what comes with it, of constraints.txt
# There, for each set that is wanted, the newer one first on the path:
#   python3 -m pip install --no-index --no-deps --target site/base OUT/base/*.whl
#   PYTHONPATH=site/stack:site/base python3 scripts/gpu_check.py
set -euo pipefail
out=${1:?usage: scripts/gpu_wheels.sh OUT}
cd "$(dirname "$0")/.."
platforms=()
for glibc in 39 35 34 31 28 27 24 17 12 5; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)

fetch() { # SET NAME...: a bare name at the version of constraints.txt
    local folder=$out/$1 name
    shift
    mkdir -p "$folder"
    for name in "$@"; do
        python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
            --implementation cp "${platforms[@]}" -d "$folder" "$(grep "^$name==" constraints.txt || echo "$name")"
    done
}

# datasets 5 asks for a newer pyarrow than may be there.
fetch base bitsandbytes peft datasets==4.8.5 'dill<0.4.2' 'multiprocess<0.70.20' xxhash pydantic pydantic-core==2.50.4 \
    annotated-types typing-extensions typing-inspection
fetch stack transformers tokenizers safetensors huggingface_hub peft httpx2 httpcore2 truststore 'hf-xet<2' 'click<9'

# bitsandbytes for CPUs and CUDA 13 alone, a tenth of its size.
python3 - "$out"/base/bitsandbytes-*.whl <<'EOP'
import sys, zipfile, pathlib
whole = pathlib.Path(sys.argv[1])
small = whole.with_suffix(".small")
with zipfile.ZipFile(whole) as source, zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED) as target:
    for name in source.namelist():
        if not name.endswith(".so") or name.endswith(("_cpu.so", "_cuda130.so")):
            target.writestr(name, source.read(name))
small.replace(whole)
EOP
du -sh "$out"/*

#!/usr/bin/env bash
# QLoRA from nothing but Python: scripts/qlora.sh [RECIPE [section.key=value ...]]
# Without a recipe: trains the embedded model `tiny`, shows answers before and after, and merges it.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
. "$root/scripts/environment.sh"
prepare_environment "$root" ''

say() { printf '\n\033[1m%s\033[0m\n' "$*" >&2; }

python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    echo "no CUDA device: everything runs on the CPU" >&2

recipe=${1:-tiny}
[ $# -eq 0 ] || shift
case " $* " in
    *" --resume "*) ;; # continues in the run's own folder
    *)                 # a new run folder each time: runs/NAME, runs/NAME-2, ...
        first=$(python -c 'import sys
from lorasft.errors import LorasftError
from lorasft.recipe.load import load_recipe
try:
    print(load_recipe(sys.argv[1], sys.argv[2:]).run.output)
except LorasftError as fault:
    print(fault, file=sys.stderr)
    sys.exit(fault.exit_code)' "$recipe" "$@")
        case $first in -*) first=./$first ;; esac # not an option of the commands below
        run=$first
        number=2
        while [ -e "$run" ]; do
            run=$first-$number
            number=$((number + 1))
        done
        set -- "$@" "run.output=$run"
        ;;
esac

say "training $recipe"
run=$(lorasft train "$recipe" "$@")

if [ "$recipe" != tiny ]; then
    say "next"
    printf '  lorasft merge %q --out %q     (full weights: as large as the base in 16 bit)\n' "$run" "$run-merged" >&2
    exit 0
fi

say "merging"
lorasft merge "$run" --out "$run-merged" > /dev/null
say "what lies where"
cat >&2 <<EOF
  $run/adapter      the adapter, in PEFT's own format
  $run/metrics.jsonl
  $run-merged       full weights: loads with AutoModelForCausalLM.from_pretrained
EOF
say "what to type next"
printf '  . %q\n  lorasft chat %q\n' "$root/.venv/bin/activate" "$run-merged" >&2
printf '  lorasft recipes     (the recipes for larger models)\n' >&2
printf '  %q qwen3-4b data.train=my.jsonl     (your own data)\n' "$0" >&2

"""A merge against PEFT's and against copying the same bytes: python scripts/bench_merge.py [--layers N] [--rounds N]

Makes a random Llama of the shape of TinyLlama 1.1B in bf16 (22 layers; `--layers 4` for a quick look) and a rank-16
adapter on all its linears in a temporary folder, then in turn and in processes of their own: a copy of the checkpoint
with fsync, lorasft's merge (its answers not compared, as PEFT's are not), and PEFT's merge_and_unload with
save_pretrained. Prints the medians over the rounds of the whole process, of the work after its imports, and of the
peak memory. With `--layers 140` the weights are those of a 7B model: the peak must not grow.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

SHARD = "900MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where to work (default: the system's temporary folder)")
    parser.add_argument("--skip", nargs="*", default=[], help="ways to leave out, for example peft")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        run_way(options.way, Path(options.folder))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        make_model(Path(folder), options.layers)
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS if way not in options.skip}
        for _ in range(options.rounds):
            for way, results in found.items():
                results.append(measure(way, folder))
        report(found)


def make_model(folder: Path, layers: int) -> None:
    """The base and an adapter on it, whose B is not zero."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from lorasft.model.adapter import attach_adapter, write_adapter
    from lorasft.recipe import AdapterSettings, ModelSettings

    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": layers, "num_attention_heads": 32}
    config = LlamaConfig(vocab_size=32000, num_key_value_heads=4, **sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "base", max_shard_size=SHARD)
    peft = attach_adapter(model, AdapterSettings(rank=16), seed=0)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02)
    (folder / "adapter").mkdir()
    write_adapter(peft, folder / "adapter", base=ModelSettings(base=str(folder / "base")))


def measure(way: str, folder: str) -> dict[str, float]:
    """One way in a process of its own, from a clean start."""
    os.sync()
    started = time.perf_counter()
    command = [sys.executable, __file__, "--way", way, "--folder", folder]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {"whole": time.perf_counter() - started, **result}


def run_way(way: str, folder: Path) -> None:
    out = folder / f"out-{way}"
    work = WAYS[way](folder, out)
    started = time.perf_counter()
    work()
    for path in out.iterdir():  # lorasft has done so already, which makes it free
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    status = Path("/proc/self/status").read_text(encoding="ascii")  # ru_maxrss would count the parent before exec
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1e3
    print(json.dumps({"work": seconds, "peak": peak}))
    for path in out.iterdir():
        path.unlink()
    out.rmdir()


def copy(folder: Path, out: Path) -> Callable[[], object]:
    import shutil

    return lambda: shutil.copytree(folder / "base", out)


def ours(folder: Path, out: Path) -> Callable[[], object]:
    from lorasft.artifact import find_artifact
    from lorasft.merge.merge import merge

    return lambda: merge(find_artifact(str(folder / "adapter")), out, check=False)


def peft(folder: Path, out: Path) -> Callable[[], object]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def work() -> None:
        base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
        merged = PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload()
        merged.save_pretrained(out, max_shard_size=SHARD)

    return work


WAYS: dict[str, Callable[[Path, Path], Callable[[], object]]] = {"copy": copy, "lorasft": ours, "peft": peft}


def report(found: dict[str, list[dict[str, float]]]) -> None:
    medians = {
        way: {key: statistics.median(result[key] for result in results) for key in results[0]}
        for way, results in found.items()
    }
    print(f"{'':8}  {'process':>8}  {'work':>8}  {'peak':>9}  {'work / copy':>11}")
    for way, values in medians.items():
        ratio = values["work"] / medians["copy"]["work"] if "copy" in medians else float("nan")
        print(f"{way:8}  {values['whole']:6.1f} s  {values['work']:6.1f} s  {values['peak']:6.0f} MB  {ratio:10.1f}x")


if __name__ == "__main__":
    main()

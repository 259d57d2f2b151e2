"""The head alone against transformers' own loss: python scripts/bench_head.py [--tokens N] [--rounds N] [--write]

Both give the loss and its gradient with respect to the same hidden states under the same frozen bf16 head:
transformers as a model does it, logits of all positions and its ForCausalLMLoss; lorasft from the supervised
positions alone, 55 % of them, as in Alpaca's rows. Each has a process of its own, in turns. Prints the median
seconds, of the processor too, and the peak above the memory held before; `--write` puts the table into
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

from bench_shared import run_process, table, write_section

SHAPES = {"H512 V32k": (512, 32_000), "H1024 V152k": (1024, 152_000)}
SUPERVISED = 0.55
REPEATS = 3  # within a process, after one that warms up


def measure(arm: str, shape: str, tokens: int) -> dict[str, float]:
    """One arm in this process: seconds, processor seconds, peak in MB, loss and norm of the gradient."""
    import torch
    from transformers.loss.loss_utils import ForCausalLMLoss

    from lorasft.model.loss import ChunkedLoss, Head

    torch.manual_seed(0)
    width, vocabulary = SHAPES[shape]
    weight = (torch.randn(vocabulary, width) * 0.05).to(torch.bfloat16)
    hidden = torch.randn(1, tokens, width).to(torch.bfloat16).requires_grad_()
    labels = torch.randint(0, vocabulary, (1, tokens))
    labels[torch.rand(1, tokens) > SUPERVISED] = -100
    sources = (labels[0, 1:] != -100).nonzero().squeeze(1)

    def loss() -> torch.Tensor:
        if arm == "transformers":
            return ForCausalLMLoss(hidden @ weight.t(), labels, vocabulary)
        pairs = ChunkedLoss.apply(hidden[0, sources], labels[0, sources + 1], Head(weight, None, 1.0, None))
        return pairs.sum() / len(sources)

    seconds, processor = [], []
    for turn in range(REPEATS + 1):
        hidden.grad = None
        if turn == 0:
            before = resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the peak
        wall, cpu = time.perf_counter(), time.process_time()
        value = loss()
        value.backward()
        seconds.append(time.perf_counter() - wall)
        processor.append(time.process_time() - cpu)
        if turn == 0:
            peak = resident("VmHWM") - before
    return {
        "seconds": statistics.median(seconds[1:]),
        "processor": statistics.median(processor[1:]),
        "peak": peak,
        "loss": float(value.detach()),
        "gradient": float(hidden.grad.float().norm()),
    }


def resident(field: str) -> float:
    """A size in MB from this process's own account."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def compare(arguments: argparse.Namespace, shape: str) -> tuple[list[list[str]], float]:
    """Both arms in turns: a line of the table for each, and the cores that other processes had."""
    found: dict[str, list[dict[str, float]]] = {"transformers": [], "lorasft": []}
    busiest = 0.0
    for _ in range(arguments.rounds):
        for arm, results in found.items():
            words = [__file__, "--tokens", str(arguments.tokens), "--only", arm, shape]
            said, foreign = run_process(sys.executable, words)
            results.append(said)
            busiest = max(busiest, foreign)
    keys = ("seconds", "processor", "peak", "loss")
    middle = {
        arm: {key: statistics.median(one[key] for one in results) for key in keys} for arm, results in found.items()
    }
    lines = []
    for arm, values in middle.items():
        seconds, processor, peak = (values[key] / middle["transformers"][key] for key in keys[:3])
        figures = [f"{values['seconds']:.2f}", f"{values['peak']:,.0f}", f"{values['loss']:.4f}"]
        lines.append([shape, arm, *figures, f"{seconds:.2f}x", f"{processor:.2f}x", f"{peak:.2f}x"])
    return lines, busiest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="the table into docs/benchmarks.md")
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(measure(*arguments.only, arguments.tokens)))
        return
    parts, busy = zip(*(compare(arguments, shape) for shape in SHAPES), strict=True)
    head = ("shape", "loss by", "s", "MB", "loss", "time", "of the processor", "memory")
    text = table(head, [line for lines in parts for line in lines])
    print(text, end="")
    if arguments.write:
        write_section("The head and its loss alone", text, busiest=max(busy))


if __name__ == "__main__":
    main()

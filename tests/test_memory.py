"""Recomputed layers: which, how many, and nothing else changes; bytes predicted and measured; running out of them."""

from __future__ import annotations

import copy
import gc
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from conftest import Command, save_base
from test_architectures import ARCHITECTURES
from test_oracles import Rows, packed_step
from test_prefixes import Relatives
from test_train import die, stop_at
from tiny_models import make_base, randomize_adapter
from torch.profiler import ProfilerActivity, profile

from lorasft.cli import main
from lorasft.data.packing import Plan
from lorasft.data.store import TokenStore
from lorasft.errors import out_of_memory
from lorasft.machine import cgroup_free
from lorasft.model import memory, scoring
from lorasft.model.adapter import attach_adapter
from lorasft.model.attention import SEGMENTS
from lorasft.model.base import load_base
from lorasft.model.linear import FrozenWeights
from lorasft.model.loss import Network, pair_losses, weighted_loss
from lorasft.model.memory import ActivationMemory, StorageMeter, dry_run, heaviest_batch, static_bytes
from lorasft.model.recompute import decoder_layers, recompute, recomputed_layers
from lorasft.model.selfcheck import verify
from lorasft.model.trained import Trained
from lorasft.model.weightless import make_sample, make_weightless, plan_network
from lorasft.recipe import AdapterSettings, ModelSettings
from lorasft.training import layout as layouts
from lorasft.training import loop
from lorasft.training import run as runs
from lorasft.training.checkpoint import read_state
from lorasft.training.distributed import ALONE
from lorasft.training.layout import Fit, choose_copies, choose_fit, find_heaviest
from lorasft.training.state import Run

Write = Callable[..., str]
GIB = 1 << 30


def with_adapter(base: Any, **settings: Any) -> tuple[Any, Network]:
    model = attach_adapter(base, AdapterSettings(**{"rank": 4, "alpha": 8.0, **settings}), seed=0)
    randomize_adapter(model)
    network = verify(model.get_base_model())
    return model.train(), network


@pytest.fixture(scope="module")
def nf4_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("nf4"), "qwen3", dtype="float32")


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "nf4"])
def test_gradients_have_the_same_bits_for_every_number_of_recomputed_layers(name: str, nf4_base: Path) -> None:
    """With adapter dropout, whose masks a recomputed layer draws again; shared prefixes on the second."""
    settings = ModelSettings(base=str(nf4_base), dtype="float32")
    base = load_base(settings, torch.device("cpu")) if name == "nf4" else make_base(name, layers=4)
    model, network = with_adapter(base, dropout=0.1)
    rows, share = (Relatives(), True) if name == "gemma2" else (Rows(), False)
    want: Any = None
    for count in range(len(decoder_layers(network.causal)) + 1):
        recompute(network.causal, count)
        torch.manual_seed(5)
        got = packed_step(model, network, rows, "token", 40, share=share)
        want = want or got
        assert got[0] == want[0] and got[1].keys() == want[1].keys()
        assert all(torch.equal(got[1][key], want[1][key]) for key in want[1]), count


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_exactly_the_first_layers_run_twice(name: str) -> None:
    _, network = with_adapter(make_base(name, layers=4))
    layers = decoder_layers(network.causal)
    assert len(layers) == 4
    ran: Counter[int] = Counter()
    for index, layer in enumerate(layers):
        norm = next(module for module in layer.modules() if "Norm" in type(module).__name__)
        norm.register_forward_hook(lambda *_, index=index: ran.update([index]))
    batch = heaviest_batch(network, longest=9, capacity=20)
    for count in (0, 3, 1, 4):  # up and down again
        recompute(network.causal, count)
        assert recomputed_layers(network.causal) == count
        ran.clear()
        pair_losses(network, batch).sum().backward()
        assert [ran[index] for index in range(4)] == [2] * count + [1] * (4 - count)


def real_peak(work: Callable[[], object]) -> int:
    """Bytes at the peak of the CPU's allocator while `work` runs."""
    gc.collect()  # nothing older may be freed meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = work()
    del kept
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


CPU = torch.device("cpu")


def without_numbers(network: Network, adapter: AdapterSettings, *, settings: ModelSettings) -> tuple[Any, Network]:
    """The same model on the meta device."""
    model = make_weightless(network.causal.config, settings, adapter, CPU)
    return model, plan_network(network, model)


KINDS = ["llama", "gemma-2", "gemma-3", "gemma-3n", "gpt-2", "gpt-oss", "mixtral", "qwen-3-moe", "smollm-3"]


@pytest.mark.parametrize("name", KINDS)
def test_a_dry_run_is_the_step(name: str) -> None:
    """Under the same meter, a real step lives in what the step without numbers lives in, but for the ids' copies."""
    adapter, settings = AdapterSettings(rank=4), ModelSettings(base="-", quantization="none", dtype="float32")
    base = hf.AutoModelForCausalLM.from_config(ARCHITECTURES[name](), dtype=torch.float32)
    model = attach_adapter(base.requires_grad_(False).eval(), adapter, seed=0)
    network = verify(base)
    weightless, planned = without_numbers(network, adapter, settings=settings)
    assert static_bytes(weightless, "adamw") == static_bytes(model, "adamw")
    sample = make_sample(weightless, ARCHITECTURES[name](), settings, adapter, CPU)
    foreseen = verify(sample.get_base_model())
    facts = [(one.segments, one.share, one.head is None) for one in (foreseen, network)]
    assert facts[0] == facts[1]
    batch = heaviest_batch(network, longest=20, capacity=60)
    for count in (0, 1, len(decoder_layers(base))):
        recompute(base, count)
        Trained(model.train(), torch.float32)
        with StorageMeter() as meter:
            loss = pair_losses(network, batch).sum()
            kept = meter.live
            loss.backward()
            measured = ActivationMemory(kept, meter.peak)
        predicted = dry_run(planned, batch, recomputed=count)
        assert predicted.kept == pytest.approx(measured.kept, abs=2000)
        assert predicted.peak == pytest.approx(measured.peak, abs=2000)


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_a_sample_in_4_bit_computes_as_a_model_does(name: str) -> None:
    """With its biases; of Gemma 2 one layer of two kinds."""
    config, settings = make_base(name, hidden=64).config, ModelSettings(base="-", dtype="float32")
    arguments = (config, settings, AdapterSettings(rank=4), CPU)
    network = verify(make_sample(make_weightless(*arguments), *arguments).get_base_model())
    assert network.head and network.share and not network.notices


def test_a_sample_runs_the_first_layer_of_each_kind() -> None:
    config = ARCHITECTURES["gemma-2"]()
    config.num_hidden_layers, config.layer_types = 5, ["sliding_attention"] * 3 + ["full_attention"] * 2
    settings, adapter = ModelSettings(base="-", quantization="none", dtype="float32"), AdapterSettings(rank=4)
    sample = make_sample(make_weightless(config, settings, adapter, CPU), config, settings, adapter, CPU)
    layers, calls = decoder_layers(sample.get_base_model()), Counter[int]()
    for number in (0, 3):
        layers[number].self_attn.register_forward_hook(lambda *_, number=number: calls.update([number]))
    sample(input_ids=torch.ones(1, 5, dtype=torch.long))
    assert len(layers) == 4 and calls == {0: 1, 3: 1}


@pytest.mark.parametrize(
    "name", ["llama", "gpt-2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma-2", "gpt-oss"))]
)
def test_a_few_layers_tell_what_all_of_them_take(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes as the whole depth, of layers of one kind and of two in turn, where as many recompute as the
    search asks for; of other orders all are run."""
    config, ran, run = ARCHITECTURES[name](), [], memory.run_layers
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * 2
    config.num_hidden_layers = 7
    config.layer_types = (kinds * 4)[:7]
    settings, adapter = ModelSettings(base="-", quantization="none", dtype="float32"), AdapterSettings(rank=4)
    model = make_weightless(config, settings, adapter, CPU)
    model.get_base_model().set_attn_implementation(SEGMENTS)
    network = Network(model.get_base_model(), head=None, segments=True, planned=CPU)

    def remembered(network: Network, batch: Any, depth: int, recomputed: int) -> ActivationMemory:
        ran.append(depth)
        return run(network, batch, depth, recomputed)

    for module in (memory, layouts):
        monkeypatch.setattr(module, "run_layers", remembered)
    batch = heaviest_batch(network, longest=40, capacity=100)
    uniform = len({*kinds}) == 1
    for recomputed in (0, 3, 4, 7):
        ran.clear()
        got, want = dry_run(network, batch, recomputed=recomputed), run(network, batch, 7, recomputed)
        assert got.kept == want.kept and want.peak <= got.peak <= want.peak * (1 if uniform else 1.01)
        assert max(ran) == (3 if uniform else 7 if recomputed == 4 else 5)
    ran.clear()
    assert layouts.fewest_recomputed(network, batch, free=int(got.peak / 0.9) + 1) == (7, got)
    assert len(ran) <= 6 and max(ran) < 7  # of each depth once in a search
    layers = decoder_layers(network.causal)
    layers[3] = copy.deepcopy(layers[3])
    layers[3].other = 1
    ran.clear()
    dry_run(network, batch, recomputed=0)
    assert ran == [7]


def test_the_meter_counts_each_storage_once_until_it_is_freed() -> None:
    old = torch.ones(100)
    with StorageMeter() as meter:
        view = old[:50].t()
        new = old + 1
        same = new.view(10, 10)
        assert (meter.live, meter.peak) == (400, 400)
        del new
        assert meter.live == 400
        del same
        assert (meter.live, meter.peak) == (0, 400)
        assert view.shape == (50,)


def test_layers_recompute_by_their_own_attributes(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers names the model's method for it otherwise before 5.23; no gradient reaches the embeddings."""
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        for end in ("enable", "disable"):
            monkeypatch.delattr(hf.PreTrainedModel, f"{name}_{end}", raising=False)
    model, network = with_adapter(make_base("llama", layers=3).requires_grad_(False))
    batch = heaviest_batch(network, longest=9, capacity=20)
    calls = Counter[int]()
    for number, layer in enumerate(decoder_layers(network.causal)):
        layer.self_attn.register_forward_hook(lambda *_, number=number: calls.update([number]))
    recompute(network.causal, 2)
    entered: list[bool] = []
    network.causal.get_input_embeddings().register_forward_hook(lambda *given: entered.append(given[2].requires_grad))
    pair_losses(network, batch).sum().backward()
    assert calls == {0: 2, 1: 2, 2: 1} and entered == [False] and model.training


def test_as_few_layers_as_fit_are_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four layers keep 100 bytes or 10, beside 30 at the peak; nothing is below 185."""
    _, network = with_adapter(make_base("llama", layers=4))
    batch = heaviest_batch(network, longest=9, capacity=20)

    def run(network: Network, batch: Any, *, recomputed: int, **_: Any) -> ActivationMemory:
        kept = 405 - 90 * recomputed
        return ActivationMemory(kept, max(185, kept + 50))

    monkeypatch.setattr(layouts, "dry_run", run)
    found = [layouts.fewest_recomputed(network, batch, free=free) for free in (1000, 500, 410, 210, 100)]
    assert [count for count, _ in found] == [0, 1, 1, 3, 4]
    assert [needs.peak for _, needs in found] == [455, 365, 365, 185, 185]


@pytest.mark.slow
def test_on_a_gpu_micro_batches_are_as_large_as_recompute_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sizes are tried from the largest on; below the usual ones layers recompute, too. On the meta device."""
    arrays = {"ids": np.arange(64 * 60, dtype=np.int32) % 90, "weights": np.ones(64 * 60, dtype=np.float32)}
    arrays["row_weights"] = np.ones(64, dtype=np.float32)
    rows = TokenStore(np.arange(64), arrays, np.arange(0, 64 * 60 + 1, 60), np.arange(65), ())
    _, network = with_adapter(make_base("llama"))
    network = replace(network, causal=copy.deepcopy(network.causal).to("meta"), planned=torch.device("cuda"))
    plan = Plan(64, 64, 1, seed=0, loss="token", micro_batch_tokens=400)

    def needs(tokens: int, recomputed: int = 0) -> int:
        batch = find_heaviest(replace(plan, micro_batch_tokens=tokens), rows)
        return int(dry_run(network, batch, recomputed=recomputed).peak / 0.9) + 1

    def fit(spare: int, **given: Any) -> tuple[int, int]:
        given = {"wanted": None, "most": 6400} | given  # more than there are
        found = choose_fit(network, plan, rows, spare=spare, **given)
        assert found.holds == (spare > 0)
        return found.plan.micro_batch_tokens, found.recomputed

    assert fit(GIB) == fit(GIB, most=25_600) == (6400, 0)  # 64 * 59 tokens
    for tokens in (3200, 1600, 400):
        assert fit(needs(tokens)) == (tokens, 0) and fit(needs(tokens) - 1) != (tokens, 0)
    assert fit(needs(177)) == (177, 0)  # half of the 354 tokens of the heaviest
    assert fit(needs(177) - 1) == (177, 1) and fit(needs(177, 2)) == (177, 2)
    assert fit(0) == (60, 2)  # the longest
    assert fit(needs(800, 2), wanted=2) == (800, 2)
    assert fit(needs(400) - 1, most=None)[0] == 400

    def reads_numbers(*_: Any, **__: Any) -> ActivationMemory:
        raise NotImplementedError("nonzero")

    monkeypatch.setattr(layouts, "dry_run", reads_numbers)
    assert (fit(GIB), fit(GIB, wanted=0)) == ((400, 2), (400, 0))


def test_copies_that_are_kept_are_read_in_an_evaluation(nf4_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ModelSettings(base=str(nf4_base), dtype="float32")
    _, network = with_adapter(load_base(settings, CPU))
    batch = heaviest_batch(network, longest=20, capacity=60)
    with torch.no_grad():
        want = pair_losses(network, batch)
        network.causal.frozen_weights.forget("run")
        assert torch.allclose(pair_losses(network, batch), want, rtol=1e-6)
        monkeypatch.setattr(FrozenWeights, "dequantize", None)  # no one asks for numbers again
        monkeypatch.setattr("bitsandbytes.matmul_4bit", None)
        assert torch.allclose(pair_losses(network, batch), want, rtol=1e-6)


def test_experts_go_one_by_one_before_micro_batches_are_cut(capsys: pytest.CaptureFixture[str]) -> None:
    """When memory runs out; the layout that a resumed run keeps says so."""
    model, network = with_adapter(make_base("llama"))
    network.causal.frozen_weights.whole = True
    trained = Trained(model, torch.float32)
    plan = Plan(4, 4, 1, seed=0, loss="token", micro_batch_tokens=100)
    optimizer = torch.optim.AdamW([trained.master])
    given: Any = (None, None, plan, network, model, trained, optimizer, None, ALONE)
    run, failures = Run(*given), [100, 100]

    def work() -> tuple[bool, int]:
        if failures:
            error = layouts.MicroBatchTooLarge("out of memory")
            error.tokens, error.longest = failures.pop(), 10
            raise error
        return run.layout.whole_experts, run.plan.micro_batch_tokens

    assert layouts.retry_on_oom(run, work) == (False, 50)
    said = capsys.readouterr().err
    assert said.index("from here on experts are dequantized one by one") < said.index("micro-batches of 50 tokens")


@pytest.mark.parametrize("recomputed", [0, 2])
def test_copies_of_weights_are_counted_and_kept_where_they_fit(recomputed: int, nf4_base: Path) -> None:
    """For the run: all of them. In recomputed layers: what one layer's are at its peak."""
    settings, adapter = ModelSettings(base=str(nf4_base), dtype="float32"), AdapterSettings(rank=4)
    model = attach_adapter(load_base(settings, CPU), adapter, seed=0).train()
    network = verify(model.get_base_model())
    _, planned = without_numbers(network, adapter, settings=settings)
    batch = heaviest_batch(network, longest=20, capacity=60)
    recompute(network.causal, recomputed)
    Trained(model, torch.float32)
    peaks = []
    for keep in (None, "layer" if recomputed else "run"):
        network.causal.frozen_weights.forget(keep)
        with StorageMeter() as meter:
            pair_losses(network, batch).sum().backward()
        peaks.append(meter.peak)
    fit = Fit(Plan(1, 1, 1, 0, "token", 60), recomputed, batch, dry_run(planned, batch, recomputed=recomputed), 0)
    on_gpu = replace(planned, planned=torch.device("cuda"))
    assert choose_copies(planned, fit, "auto") is choose_copies(on_gpu, fit, False) is fit
    more = choose_copies(planned, fit, True)
    assert more.needs and fit.needs and more.keep == ("layer" if recomputed else "run")
    assert more.needs.peak - fit.needs.peak == pytest.approx(peaks[1] - peaks[0], rel=0.05) and peaks[1] > peaks[0]
    more = choose_copies(on_gpu, fit, True)
    least = int(more.needs.peak / 0.9) + 1  # type: ignore[union-attr]
    assert choose_copies(on_gpu, replace(fit, spare=least), "auto") == replace(more, spare=least)
    assert choose_copies(on_gpu, replace(fit, spare=least - 2), "auto").keep is None


def test_copies_in_recomputed_layers_need_no_memory_beside_layers_that_do_not_recompute() -> None:
    """What those keep is freed before the first of the others is computed again."""
    _, network = with_adapter(make_base("llama", layers=6))
    settings, adapter = ModelSettings(base="none", dtype="bfloat16"), AdapterSettings(rank=4)
    weightless = make_weightless(network.causal.config, settings, adapter, CPU)
    on_gpu = replace(plan_network(network, weightless), planned=torch.device("cuda"))
    batch = heaviest_batch(network, longest=20, capacity=200)
    for count in (1, 3, 5):
        on_gpu.causal.frozen_weights.forget()
        needs = dry_run(on_gpu, batch, recomputed=count)
        spare = int(needs.peak / 0.9) + 1
        more = choose_copies(on_gpu, Fit(Plan(1, 1, 1, 0, "token", 200), count, batch, needs, spare), "auto")
        assert (more.keep, more.needs) == ("layer", needs), count


def test_a_run_that_keeps_copies_of_weights_has_the_same_losses(
    recipe: Write, nf4_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Command
) -> None:
    """Resumed it keeps them, until memory runs out."""
    settings = {"model": {"base": str(nf4_base)}, "adapter": {"dropout": 0.0}, "run": {"save_every": 3}}
    for wanted in ("true", "false"):
        said = cli("train", recipe(**settings), f"machine.keep_16bit={wanted}", f"run.output={tmp_path / wanted}").err
        assert ("weights kept in 16 bit" in said) == (wanted == "true")
    assert losses_of(tmp_path / "true") == losses_of(tmp_path / "false")
    path, tight = recipe(**settings), f"run.output={tmp_path / 'tight'}"
    with monkeypatch.context() as patch:
        stop_at(patch, 5, die)
        assert cli("train", path, tight, "machine.keep_16bit=true").code == 130
    monkeypatch.setattr(loop, "weighted_loss", Fills(80))
    said = cli("train", path, tight, "--resume").err
    assert "from here on no weights are kept in 16 bit" in said and "from here on micro-batches of" in said
    assert losses_of(tmp_path / "tight") == pytest.approx(losses_of(tmp_path / "false"), rel=1e-6)
    checkpoints = sorted((tmp_path / "tight/checkpoints").iterdir())
    assert not read_state(checkpoints[-1], run=None).layout.keep_16bit


def test_the_heaviest_batch_is_full_and_holds_the_longest() -> None:
    _, network = with_adapter(make_base("llama"))
    for longest, capacity in ((9, 20), (50, 20), (10, 20)):
        batch = heaviest_batch(network, longest=longest, capacity=capacity)
        assert len(batch.ids) == len(batch.sources) == max(longest, capacity)
        assert batch.positions.max() + 1 == longest
    assert len(heaviest_batch(replace(network, segments=False), longest=9, capacity=20).ids) == 9


def test_control_groups_limit_the_free_memory(tmp_path: Path) -> None:
    mount = tmp_path / "sys/fs/cgroup"
    for folder, limit, used in ((mount, "max", 0), (mount / "a", "1000", 300), (mount / "a/b", "5000", 100)):
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in (("max", limit), ("current", used), ("stat", "cache 9\ninactive_file 50")):
            (folder / f"memory.{name}").write_text(f"{value}\n")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("3:cpuset:/a\n0::/a/b\n")
    assert min(cgroup_free(tmp_path)) == 750
    assert list(cgroup_free(tmp_path / "nowhere")) == []


def test_auto_recomputes_what_the_free_memory_asks_for(
    recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Command
) -> None:
    asked: list[Any] = []
    plain = layouts.fewest_recomputed

    def remembered(network: Network, batch: Any, *, free: int, wanted: int | None) -> Any:
        asked.append((dry_run(network, batch, recomputed=1).peak, dry_run(network, batch, recomputed=0).peak, free))
        return plain(network, batch, free=free, wanted=wanted)

    monkeypatch.setattr(layouts, "fewest_recomputed", remembered)

    def train(name: str, free: int) -> tuple[int, list[float]]:
        monkeypatch.setattr(runs, "free_memory", lambda device: free)
        said = cli("train", recipe(run={"output": str(tmp_path / name)}, train={"steps": 3})).err
        count = json.loads((tmp_path / name / "provenance.json").read_text())["layout"]["recomputed_layers"]
        assert f" {count} of 2 layers recomputed" in said
        return count, losses_of(tmp_path / name)

    none, want = train("plenty", GIB)
    one, all_kept, left = asked[0]
    enough = int(one / 0.9) + 1 + GIB - left  # beside gradients and optimizer
    assert none == 0 and one < all_kept
    assert train("enough", enough) == (1, want)
    assert train("too little", 0)[1] == want


def test_a_resumed_run_keeps_its_layers_unless_the_recipe_states_otherwise(
    recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Command
) -> None:
    path = recipe()
    with monkeypatch.context() as patch:
        patch.setattr(runs, "free_memory", lambda device: 0)
        stop_at(patch, 5, die)
        assert main(["train", path]) == 130
    kept = read_state(tmp_path / "run/checkpoints/step-000003", run=None).layout
    assert kept.recomputed_layers == 2  # all: none fits
    with monkeypatch.context() as patch:
        stop_at(patch, 4, die)
        for setting, count in (("auto", 2), ("false", 0), ("true", 2)):
            done = cli("train", path, f"machine.activation_checkpointing={setting}", "--resume")
            assert done.code == 130 and f" {count} of 2 layers recomputed" in done.err


ENDS = [  # where memory ends, exit code, what is said
    ("transformers.PreTrainedModel.from_pretrained", 6, "while loading"),
    ("lorasft.training.run.choose_layout", 6, "out of memory: injected"),
    ("torch.optim.AdamW.step", 6, "--resume"),  # nothing smaller would help
    ("lorasft.training.samples.generate", 0, "no answers after step"),  # nothing is lost
]


@pytest.mark.parametrize(("where", "code", "words"), ENDS)
def test_memory_that_ends_around_the_steps(
    where: str, code: int, words: str, recipe: Write, monkeypatch: pytest.MonkeyPatch, cli: Command
) -> None:
    def fill(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory") if "transformers" in where else torch.OutOfMemoryError("injected")

    monkeypatch.setattr(where, fill)
    done = cli("train", recipe(run={"sample_every": 1}))
    assert done.code == code and words in done.err


class Fills:
    """`plain` on a device that holds `tokens` tokens, or twice as many where all layers are recomputed.

    The first micro-batch passes, so that the first failure finds gradients that must be thrown away.
    """

    plain = staticmethod(weighted_loss)

    def __init__(self, tokens: int, *, backward: bool = False, message: str | None = None) -> None:
        self.tokens, self.backward = tokens, backward
        self.fault = RuntimeError(message) if message else torch.OutOfMemoryError("injected")
        self.raised = self.calls = 0

    def __call__(self, network: Network, batch: Any) -> torch.Tensor:
        losses = self.plain(network, batch)
        layers = decoder_layers(network.causal)
        room = self.tokens * (2 if recomputed_layers(network.causal) == len(layers) else 1)
        self.calls += 1
        if self.calls == 1 or len(batch.ids) <= room:
            return losses
        self.raised += 1
        if not (self.backward and losses.requires_grad):
            raise self.fault
        losses.register_hook(self._fail)
        return losses

    def _fail(self, gradient: torch.Tensor) -> None:
        raise self.fault


ALLOCATOR = "[enforce fail at alloc_cpu.cpp:130] err == 0. DefaultCPUAllocator: can't allocate memory: you tried ..."


def losses_of(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line.get("loss", line.get("eval_loss")) for line in lines]


@pytest.mark.parametrize(
    ("fills", "where"),
    [
        (Fills(80), "step"),
        (Fills(80, backward=True), "step"),
        (Fills(80, message=ALLOCATOR), "step"),
        (Fills(80, message="could not create a primitive"), "step"),  # oneDNN's
        (Fills(80, message="CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), "step"),
        (Fills(40), "step"),  # below the longest sequence: layers are recomputed too
        (Fills(80), "evaluation"),
    ],
)
def test_a_run_survives_running_out_of_memory_with_the_same_losses(
    fills: Fills, where: str, recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Command
) -> None:
    settings: dict[str, Any] = {"adapter": {"dropout": 0.0}, "train": {"steps": 4}}
    assert main(["train", recipe(**settings, run={"output": str(tmp_path / "roomy")})]) == 0
    if where == "step":
        monkeypatch.setattr(loop, "weighted_loss", fills)
    else:
        monkeypatch.setattr(fills, "plain", pair_losses)
        monkeypatch.setattr(scoring, "pair_losses", fills)
    said = cli("train", recipe(**settings, run={"output": str(tmp_path / "tight")})).err
    assert 0 < fills.raised < 5 and "out of memory with" in said and "from here on micro-batches of" in said
    want, got = losses_of(tmp_path / "roomy"), losses_of(tmp_path / "tight")
    assert got == pytest.approx(want, rel=1e-6) and len(got) == len(want)
    kept = read_state(sorted((tmp_path / "tight/checkpoints").iterdir())[-1], run=None).layout
    assert kept.micro_batch_tokens < 150 and kept.recomputed_layers == (2 if fills.tokens == 40 else 0)
    assert ("from here on all 2 layers recomputed" in said) == (fills.tokens == 40)


TIGHT = """
import resource, sys, torch
from pathlib import Path
from lorasft.recipe.load import load_recipe
from lorasft.training.loop import run_steps
from lorasft.training.run import open_run
torch.set_num_threads(1)
with open_run(load_recipe(sys.argv[1]), resume=False) as (run, state):
    if spare := int(sys.argv[2]):
        limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + spare
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    run_steps(run, state)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space as Linux does")
def test_a_run_survives_a_real_lack_of_memory(recipe: Write, tmp_path: Path) -> None:
    """64 rows at once keep 50 MB of activations; the process may take 20 MB more than it has with its model.

    Not less: what libraries of mathematics keep for themselves differs between CPUs by some MB."""
    talk = [("user", "x" * 40), ("assistant", "y z " * 10)]
    row = json.dumps({"messages": [{"role": role, "content": text} for role, text in talk]})
    (tmp_path / "long.jsonl").write_text(f"{row}\n" * 64)
    for name, spare in (("roomy", 0), ("tight", 20_000_000)):
        path = recipe(
            adapter={"dropout": 0.0},
            data={"train": str(tmp_path / "long.jsonl"), "eval": None},
            train={"batch_size": 64, "steps": 2},
            schedule={"warmup": 0},
            run={"output": str(tmp_path / name), "eval_every": None},
            machine={"micro_batch_tokens": 16384, "activation_checkpointing": False, "share_prefixes": False},
        )
        if name == "roomy":
            assert main(["train", path]) == 0
            continue
        command = [sys.executable, "-c", TIGHT, path, str(spare)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "from here on micro-batches of" in done.stderr
    assert losses_of(tmp_path / "tight") == pytest.approx(losses_of(tmp_path / "roomy"), rel=1e-6)


@pytest.mark.parametrize("message", [None, "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling it"])
def test_out_of_memory_at_the_end_names_the_rows_and_what_would_help(
    message: str | None, recipe: Write, monkeypatch: pytest.MonkeyPatch, cli: Command
) -> None:
    """A library that cannot start for another reason ends the run as well, after the same few tries."""
    fills = Fills(10, message=message)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "weighted_loss", fills)
        code, _, said = cli("train", recipe())
    assert fills.raised < 8 and (message is None or "CUBLAS_STATUS_NOT_INITIALIZED" in said)
    assert code == 6 and "rows.jsonl:" in said and "tokens)" in said and "Traceback" not in said
    assert "adapter.rank" in said and "lorasft plan" in said, said
    assert cli("train", recipe(), "--resume").code == 0


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported later"), True),
        (RuntimeError("CUDA driver error: out of memory"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("cusolver error: CUSOLVER_STATUS_NOT_INITIALIZED"), True),
        (RuntimeError("could not execute a primitive\n"), True),
        (RuntimeError("could not execute a primitive of another kind"), False),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), False),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_says_that_memory_ran_out(error: BaseException, memory: bool) -> None:
    assert out_of_memory(error) == memory


def test_other_runtime_errors_are_not_taken_for_memory(recipe: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "weighted_loss", Fills(80, message="shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        main(["train", recipe()])

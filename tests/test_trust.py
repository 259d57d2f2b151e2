"""No code from files, no network with local inputs, no secrets in what is written."""

from __future__ import annotations

import ast
import io
import json
import shutil
import socket
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from lorasft.cli import main
from lorasft.data.templates import render
from lorasft.data.tokenizer import load_tokenizer
from lorasft.errors import DataError, LorasftError, ModelError
from lorasft.files import sha256
from lorasft.recipe.load import load_recipe
from lorasft.terminal import harmless, redact

SOURCES = sorted(path for room in ("lorasft", "scripts") for path in (Path(__file__).parents[1] / room).rglob("*.py"))
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.save", "pty.spawn"}
TOKEN = "hf_" + "CanaryCanary" * 3
KERNELS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation")
TRUE = {"trust_remote_code", "allow_pickle", "shell", "weights_only"}  # never true (or, the last, never needed)


def unsafe(tree: ast.AST) -> list[str]:
    """What in a program could run what a file says."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.partition(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] in MODULES:
            found.append(str(node.module))
        elif isinstance(node, ast.Call):
            found += [name for name in (ast.unparse(node.func),) if name in CALLS]
            for given in node.keywords:
                is_off = isinstance(given.value, ast.Constant) and given.value.value is False
                found += [f"{given.arg}=True"] if given.arg in TRUE and not is_off else []
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_source_runs_what_a_file_says(path: Path) -> None:
    assert not unsafe(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "text",
    ["import pickle", "from joblib import load", "eval(x)", "os.system(x)", "torch.load(x)", "run(x, shell=True)",
     "np.load(x, allow_pickle=True)", "AutoModel.from_pretrained(x, trust_remote_code=flag)"],
)  # fmt: skip
def test_the_lint_sees_what_it_looks_for(text: str) -> None:
    assert unsafe(ast.parse(text))


def test_i15_what_a_model_folder_holds_never_runs(
    base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Promise I15: programs and pickles beside the files, named by every config, offered to every command."""
    monkeypatch.chdir(tmp_path)
    canary = tmp_path / "canary"
    program = f"open({str(canary)!r}, 'w').close()\n"
    pickled = b"cbuiltins\nexec\n(S" + repr(program).encode() + b"\ntR."  # protocol 0: loads() runs the program
    exec_check = f"import pickle; pickle.loads({pickled!r})"
    exec(exec_check, {})
    assert canary.exists()  # the bait works
    canary.unlink()

    trap = Path(shutil.copytree(base, tmp_path / "trap"))
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "adapter_model.bin", "rng_state.pth"):
        (trap / name).write_bytes(pickled)
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "__init__.py", "setup.py"):
        (trap / name).write_text(program, encoding="utf-8")
    classes = {"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}
    edit(trap / "config.json", auto_map=classes)
    edit(trap / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "tokenization_evil.T"]})
    only_code, only_pickle, kernel = (Path(shutil.copytree(trap, name)) for name in ("code", "pickles", "kernel"))
    edit(only_code / "config.json", model_type="evil")
    edit(kernel / "config.json", **dict.fromkeys(KERNELS, "evil/kernel"))
    (only_pickle / "model.safetensors").unlink()
    adapter = Path(shutil.copytree(only_pickle, "adapter"))
    fields = {"peft_type": "LORA", "base_model_name_or_path": str(trap), "r": 4, "lora_alpha": 8}
    (adapter / "adapter_config.json").write_text(json.dumps(fields), encoding="utf-8")
    (adapter / "config.json").unlink()

    options = ["data.max_length=120", "train.steps=1", "train.batch_size=8", f"data.train={rows}", "data.eval=null"]
    Path("r.yaml").write_text("model: {base: x, dtype: float32}\n", encoding="utf-8")
    codes = {}
    for folder in (trap, only_code, only_pickle, kernel, adapter):
        name = folder.name
        recipe = ["r.yaml", f"model.base={folder}", f"run.output=run-{name}", *options]
        for words in (["preview", *recipe], ["train", *recipe], ["chat", str(folder), "--prompt", "x"],
                      ["evaluate", str(folder), "--data", str(rows)], ["merge", str(folder), "--out", f"m-{name}"],
                      ["export", str(folder), "--to", "gguf", "--out", f"{name}.gguf"]):  # fmt: skip
            codes[name, words[0]] = main(words)
            said = capsys.readouterr()
            assert "Traceback" not in said.err and not canary.exists(), (words, said.err)
    assert codes["trap", "train"] == codes["trap", "chat"] == 0  # what runs nothing is not refused
    refused = {codes[name, verb] for name in ("code", "pickles", "kernel") for verb in ("train", "chat", "evaluate")}
    assert refused == {8}
    assert codes["adapter", "merge"] == 8


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


@pytest.fixture(scope="module")
def cycle(base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """Prepare, train, resume, evaluate, chat, merge with every connection refused and a token in the environment; the
    folder, and all that was said. The hub is not declared to be offline."""
    import datasets
    import huggingface_hub.constants

    def refuse(*given: object, **_: object) -> None:
        raise AssertionError(f"a connection: {given}")

    folder, said = tmp_path_factory.mktemp("cycle"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), redirect_stderr(said):
        for name in ("connect", "connect_ex", "sendto", "bind"):
            patch.setattr(socket.socket, name, refuse)
        for name in ("getaddrinfo", "create_connection"):
            patch.setattr(socket, name, refuse)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        patch.setenv("HF_TOKEN", TOKEN)
        patch.chdir(folder)
        recipe = f"model: {{base: {base}, dtype: float32}}\ndata: {{train: {rows}, max_length: 120, eval: 0.2}}\n"
        run = "train: {batch_size: 8, steps: 4, seed: 7}\nrun: {save_every: 2, output: run}\n"
        Path("r.yaml").write_text(recipe + run, encoding="utf-8")
        for line in ("preview r.yaml", "train r.yaml", "train r.yaml --resume", f"evaluate run --data {rows}",
                     "chat run --prompt x --max-tokens 4", "merge run --out merged",
                     "chat merged --prompt x --max-tokens 4", "recipes list"):  # fmt: skip
            assert main(line.split()) == 0, (line, said.getvalue())
    yield folder, said.getvalue()


def test_i17_with_local_inputs_no_connection_is_opened(cycle: tuple[Path, str]) -> None:
    """Promise I17: the fixture refuses them all."""
    assert (cycle[0] / "merged/merge.json").is_file()


def test_i16_no_token_leaves_the_environment(cycle: tuple[Path, str]) -> None:
    """Promise I16: neither what is said nor what is written holds it."""
    folder, said = cycle
    assert TOKEN not in said
    for path in (path for path in folder.rglob("*") if path.is_file()):
        assert TOKEN.encode() not in path.read_bytes(), path


def test_i19_every_output_says_where_it_came_from(cycle: tuple[Path, str]) -> None:
    """Promise I19: recipe as resolved, data, base, versions, seed; of a merge base, adapter and result."""
    folder, _ = cycle
    for output in (folder / "run", folder / "run/adapter"):
        record = json.loads((output / "provenance.json").read_bytes())
        assert record["lorasft"] and {"torch", "transformers", "peft", "bitsandbytes"} <= record["versions"].keys()
        assert len(record["data"]) == len(record["base"]["fingerprint"]) == 64 and "commit" in record["base"]
        assert load_recipe(str(output / "recipe.yaml")).train.seed == 7
    record = json.loads((folder / "merged/merge.json").read_bytes())
    assert record["adapter"] == sha256(folder / "run/adapter/adapter_model.safetensors")
    assert record["base"]["trained_on"] == record["base"]["fingerprint"] and record["lorasft"]
    assert record["result"] == {"model.safetensors": sha256(folder / "merged/model.safetensors")}


@pytest.mark.parametrize(
    "text",
    ["hf_" + "a1" * 17, "sk-proj-" + "x" * 30, "https://me:secretword@host/x", "Authorization: Bearer secretword",
     "ghp_" + "Z" * 36, "AKIA" + "A" * 16, "'api_key': 'secretword'", "WANDB_API_KEY=secretword",
     "/runs/https:/me:secretword@host", "glpat-" + "x" * 20, "https://host/x?token=secretword"],
)  # fmt: skip
def test_secrets_are_not_repeated(text: str) -> None:
    for fault in (ModelError(text), ModelError("x", where=text, hint=text)):
        assert "secretword" not in str(fault) and text not in str(fault), str(fault)
    assert redact("runs/hf_internal-testing, sk-learn, https://host/a@b") == (
        "runs/hf_internal-testing, sk-learn, https://host/a@b"
    )


def test_an_error_keeps_its_lines_and_the_terminal_to_itself() -> None:
    text = str(DataError("a\nhint: rm -rf /", where="\x1b]0;x\x07\u202e\ud800", hint="ok\r"))
    assert text == "error: a\n  hint: rm -rf /\nwhere: \\x1b]0;x\\x07\\u202e\\ud800\nhint: ok\\r"
    assert harmless("tab\tnewline\n👩‍👩‍👧 naïve") == "tab\tnewline\n👩‍👩‍👧 naïve"


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('touch canary').read() }}",
    "{{ joiner.__init__.__globals__['os'].system('touch canary') }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].popen('touch canary') }}",
    "{{ self.__init__.__globals__.__builtins__.__import__('os') }}",
    "{{ self._TemplateReference__context.cycler.__init__.__globals__.os }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['os'] }}",
    "{{ tojson.__globals__ }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}",
    "{{ messages|map(attribute='__class__')|list|first|attr('__mro__')|first }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{{ '%s'|format(messages.__class__.__bases__) }}",
    "{{ (1).__class__.__base__.__subclasses__()[0] }}",
    "{{ messages.append({'role': 'user'}) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('touch canary') }}",
    "{% extends '/etc/passwd' %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ range(10 ** 9) }}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_a_template_does_not_leave_its_sandbox(
    template: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lorasft.data.templates.SECONDS", 0.5)
    tokenizer = load_tokenizer(str(base))
    tokenizer.chat_template = template
    said = ""
    try:
        said = render(tokenizer, [{"role": "user", "content": "q"}])
    except LorasftError as fault:
        said = fault.what
    assert not Path("canary").exists()
    for word in ("root:", "builtin", "subprocess", "<class 'int'>, <class", "posix"):
        assert word not in said, said

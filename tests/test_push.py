"""`lorasft push` to a stand-in of the hub, spoken to by the hub's own client: what arrives, and what never does."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Command, Done
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorasft.artifact import find_artifact
from lorasft.files import sha256
from lorasft.recipe.load import load_recipe
from lorasft.share import portable

CANARY = "canary of a row"
BASE = ("--base", "people/tiny")  # what the hub calls the base, which is a folder here
TOKEN = "hf_" + "CanaryCanary" * 3


class Hub(ThreadingHTTPServer):
    """Repos, what was sent to them, and what was asked: as much of the hub as its client needs for a commit."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Requests)
        self.private: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.large: dict[str, bytes] = {}
        self.commits: list[list[dict[str, Any]]] = []
        self.requests: list[str] = []
        self.refusals: dict[str, int] = {}  # a part of an address -> status

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, repo: str, *names: str, private: bool = True) -> None:
        self.private[repo], self.files[repo] = private, dict.fromkeys(names, b"old")

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        self.commits.append(lines)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.files[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[repo][value["path"]] = self.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del self.files[repo][value["path"]]


class Requests(BaseHTTPRequestHandler):
    server: Hub

    def reply(self, value: Any, status: int = 200, **headers: str) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(body)

    def answer(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(iter(self.chunk, b""))
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.requests.append(f"{self.command} {path}")
        for part, status in hub.refusals.items():
            if part in path:
                return self.reply({"error": "refused"}, status)
        if path == "/":
            return self.reply({})
        if not path.startswith("/large/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.reply({"error": "Invalid credentials"}, 401)
        repo = "/".join(path.removeprefix("/api/models").removesuffix(".git/info/lfs/objects/batch").split("/")[1:3])
        if path == "/api/repos/create":
            given = json.loads(body)
            repo = f"{given['organization']}/{given['name']}"
            if repo in hub.private:
                return self.reply({"error": "You already created this model repo", "url": f"{hub.address}/{repo}"}, 409)
            hub.add(
                repo, ".gitattributes", private=given.get("visibility") == "private" or given.get("private") is True
            )
            return self.reply({"url": f"{hub.address}/{repo}"})
        if path == "/api/validate-yaml":
            meta = yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
            assert "base_model" not in meta or re.fullmatch(r"[\w.-]+/[\w.-]+", meta["base_model"])  # the hub's rule
            return self.reply({"errors": [], "warnings": []})
        if path.endswith("/preupload/main"):
            modes = [(one["path"], one["path"].endswith(".safetensors")) for one in json.loads(body)["files"]]
            names = [
                {"path": p, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False} for p, large in modes
            ]
            return self.reply({"files": names})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{hub.address}/large/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self.reply({"transfer": "basic", "objects": objects})
        if path.startswith("/large/"):
            oid = path.rpartition("/")[2]
            assert hashlib.sha256(body).hexdigest() == oid
            hub.large[oid] = body
            return self.reply({})
        if path.endswith("/commit/main"):
            hub.commit(repo, [json.loads(line) for line in body.splitlines()])
            return self.reply({"commitUrl": f"{hub.address}/{repo}/commit/abc", "commitOid": "1" * 40, "success": True})
        if path.startswith("/api/models/") and repo in hub.private:
            siblings = [{"rfilename": name} for name in hub.files[repo]]
            info = {"id": repo, "private": hub.private[repo], "sha": "0" * 40, "siblings": siblings}
            return self.reply(info)
        return self.reply({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

    def chunk(self) -> bytes:
        content = self.rfile.read(int(self.rfile.readline(), 16))
        self.rfile.readline()
        return content

    do_GET = do_POST = do_PUT = do_HEAD = answer

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


PROGRAM = """
import sys
from lorasft import cli
code = cli.main(sys.argv[1:])
print("imported", sorted({"torch", "transformers", "datasets"} & sys.modules.keys()))
sys.exit(code)
"""
Push = Callable[..., Done]


@pytest.fixture
def push(hub: Hub, tmp_path: Path) -> Push:
    """`lorasft push` in a process of its own, whose hub is the stand-in."""

    def run(*words: object, **variables: str) -> Done:
        own = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        home = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, "push", *map(str, words)],
            env={**os.environ, **own, **home, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        out, _, imported = done.stdout.partition("imported ")
        assert imported.strip() == "[]", done.stderr
        assert TOKEN not in done.stdout + done.stderr and "Traceback" not in done.stderr
        return Done(done.returncode, out, done.stderr)

    return run


def plant(folder: Path) -> None:
    """Files that hold rows beside and among those of a run, an adapter or a merge, under the names that they have."""
    beside = "report.html preview.html answers.jsonl rows.jsonl events.jsonl metrics.jsonl error.txt run.lock nohup.out"
    within = "tokens/a/ids step-000099/optimizer.safetensors step-000099/state.json data.csv wandb/a.log"
    more = "train.jsonl rows.parquet rows.json .env tokenizer_rows.txt vocab.txt.bak model.py notes.md"
    for name in f"{beside} {within} {more} trainer_state.json optimizer.pt training_args.bin".split():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name != "metrics.jsonl" or not path.exists():
            path.write_text(CANARY, encoding="utf-8")


@pytest.fixture
def planted(run: Path, tmp_path: Path) -> Path:
    """A run with canaries wherever a row could be, also in what the provenance says of dropped rows."""
    folder = tmp_path / "Support Bot"
    shutil.copytree(run, folder)
    record = json.loads((folder / "provenance.json").read_bytes())
    record["report"]["dropped"] = [f"/home/me/rows.jsonl:3: {CANARY}"]
    record["report"]["unread"] = [CANARY]
    adapter, text = folder / "adapter", json.dumps(record)
    for path in (folder / "provenance.json", adapter / "provenance.json"):
        path.write_text(text, encoding="utf-8")
    manifest = json.loads((adapter / "manifest.json").read_bytes())
    manifest["provenance.json"] = {"bytes": len(text), "sha256": sha256(adapter / "provenance.json")}
    (adapter / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    plant(folder)
    plant(adapter)
    return folder


SIDE = {"README.md", "chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}


def receive(hub: Hub, repo: str, folder: Path) -> Path:
    """The files of a repo as a download would write them."""
    for name, content in hub.files[repo].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_an_adapter_arrives_whole_and_nothing_with_rows_does(
    planted: Path, base: Path, rows: Path, hub: Hub, push: Push, tmp_path: Path
) -> None:
    done = push(planted, "me/bot", "--yes", *BASE)
    assert done.code == 0, done.err
    assert done.out.strip() == f"{hub.address}/me/bot/commit/abc" and hub.private == {"me/bot": True}
    sent = dict(hub.files["me/bot"])
    del sent[".gitattributes"]
    assert sent.keys() == SIDE | {"adapter_config.json", "adapter_model.safetensors", "recipe.yaml"}
    assert set(re.findall(r"^ *[\d,]+  (\S+)$", done.err, re.M)) == sent.keys()
    for name in sent.keys() - {"README.md", "adapter_config.json", "recipe.yaml"}:
        assert sent[name] == (planted / "adapter" / name).read_bytes(), name
    everything = b"".join(sent.values()) + json.dumps(hub.commits).encode()
    for secret in (CANARY, str(tmp_path), str(base), str(base.parent), str(rows.parent), TOKEN):
        assert secret.encode() not in everything
    assert len(hub.commits) == 1

    there = receive(hub, "me/bot", tmp_path / "there")
    found = find_artifact(str(there))
    assert found.model.base == "people/tiny" and found.recipe
    mine = load_recipe(str(planted / "adapter/recipe.yaml"))
    assert found.recipe.train == mine.train and found.recipe.adapter == mine.adapter
    assert [source.path for source in found.recipe.data.train] == [rows.name] and found.recipe.run.output == "run"
    ids = torch.tensor([[5, 6, 7, 8]])
    logits = []
    for folder in (there, planted / "adapter"):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
        logits.append(model(ids).logits)
    assert torch.equal(*logits)


def test_the_card_says_what_the_files_say(planted: Path, hub: Hub, push: Push) -> None:
    done = push(planted, "me/bot", "--dry-run", HF_TOKEN="", HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert done.code == 0 and not hub.requests
    _, front, text = done.out.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lora", "sft", "lorasft"]
    }  # fmt: skip
    report = json.loads((planted / "provenance.json").read_bytes())["report"]
    assert f"| rows | {report['rows']} |" in text and f"| supervised tokens | {report['supervised_tokens']:,} |" in text
    lines = [json.loads(line) for line in (planted / "metrics.jsonl").read_text().splitlines()]
    losses = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    for step, loss in (losses[0], losses[-1], min(losses, key=lambda one: one[1])):
        assert f"| {step} | {loss:.4f} |" in text
    (recipe,) = re.findall(r"```yaml\n(.*?)```", text, re.S)
    assert yaml.safe_load(recipe)["adapter"] == {"rank": 4, "alpha": 8.0}
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    compile(code, "card", "exec")
    assert 'PeftModel.from_pretrained(model, "me/bot")' in code and "--max-lora-rank 4" in text
    with_base = push(planted, "me/bot", "--dry-run", *BASE)
    assert yaml.safe_load(with_base.out.split("---\n")[1])["base_model"] == "people/tiny"
    assert "others cannot find it; a push is refused without --base OWNER/NAME" in done.err
    assert "others cannot find it" not in with_base.err


def test_a_merge_arrives_with_its_table_and_replaces_older_weights(
    run: Path, hub: Hub, push: Push, tmp_path: Path, cli: Command
) -> None:
    merged = tmp_path / "merged"
    assert cli("merge", run, "--out", merged).code == 0
    plant(merged)
    hub.add("org/bot", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "README.md", "LICENSE")
    done = push(merged, "org/bot", "--private", "--yes")
    assert done.code == 0, done.err
    sent = hub.files["org/bot"]
    assert sent.keys() == SIDE | {"model.safetensors", "config.json", "merge.json", "LICENSE"}
    assert sent["model.safetensors"] == (merged / "model.safetensors").read_bytes()
    assert hub.commits[0][0]["value"]["parentCommit"] == "0" * 40 and "POST /api/repos/create" in hub.requests
    everything = b"".join(sent.values())
    assert CANARY.encode() not in everything and str(run.parent).encode() not in everything
    card, record = sent["README.md"].decode(), json.loads((merged / "merge.json").read_bytes())
    for model, one in record["table"].items():
        assert f"| {model} | {one['kl']:.1e} | {100 * one['same_choice']:.1f} % | {one['nll']:.4f} |" in card
    assert 'from_pretrained("org/bot"' in card and "OWNER/NAME" not in card and "| rows | 26 |" in card
    model = AutoModelForCausalLM.from_pretrained(receive(hub, "org/bot", tmp_path / "there"))
    assert torch.equal(model.lm_head.weight, load_file(merged / "model.safetensors")["lm_head.weight"])


@pytest.mark.parametrize(
    ("status", "words", "code", "said"),
    [
        ({"repos/create": 401, "models/": 401}, [], 5, "does not know this token"),
        ({"repos/create": 403, "models/": 404}, [], 5, "may not write there"),
        ({"commit/main": 403}, [], 5, "may not write there"),
        ({"commit/main": 412}, [], 5, "was changed by somebody else"),
        ({"/large/": 400}, [], 5, "the hub did not take it"),
    ],
)
def test_what_the_hub_refuses_is_said_in_words(
    run: Path, hub: Hub, push: Push, status: dict[str, int], words: list[str], code: int, said: str
) -> None:
    hub.refusals = status
    done = push(run, "me/bot", "--yes", *BASE, *words)
    assert done.code == code and said in done.err and not hub.commits
    assert done.err.count("error:") == 1 == done.err.count("hint:")


def test_a_repo_that_others_see_or_of_another_kind_is_refused(run: Path, hub: Hub, push: Push) -> None:
    hub.add("me/open", private=False)
    hub.add("me/closed")
    hub.add("me/full", "config.json", "model.safetensors")
    before = {name: dict(files) for name, files in hub.files.items()}
    cases = {("me/open",): "is public already", ("me/closed", "--public"): "is private already", ("me/full",): "kind"}
    for words, said in cases.items():
        done = push(run, *words, "--yes", *BASE)
        assert done.code == 2 and said in done.err
    assert hub.files == before and not hub.large
    assert push(run, "me/open", "--public", "--yes", *BASE).code == 0
    assert push(run, "me/fresh", "--public", "--yes", *BASE).code == 0 and hub.private["me/fresh"] is False


def test_nothing_is_asked_of_the_hub_before_all_is_checked(
    run: Path, base: Path, hub: Hub, push: Push, tmp_path: Path
) -> None:
    for name in ("changed", "linked", "pickled", "unfinished"):
        shutil.copytree(run, tmp_path / name)
    (tmp_path / "changed/adapter/tokenizer.json").write_text("{}", encoding="utf-8")
    (tmp_path / "linked/adapter/vocab.txt").symlink_to("/etc/hostname")
    shutil.rmtree(tmp_path / "unfinished/adapter")
    (tmp_path / "pickled/adapter/adapter_model.safetensors").rename(tmp_path / "pickled/adapter/adapter_model.bin")
    cases = [
        (2, [run, "me/bot"], "nobody is there to ask"),
        (2, [run, "bot", "--yes"], "not OWNER/NAME, as the hub has it\nwhere: bot\nhint: as me/support-bot"),
        (2, [run, "a/b/c", "--yes"], "not OWNER/NAME"),
        (2, [run, "me/a..b", "--yes"], "not OWNER/NAME"),
        (2, [run, "me/bot", "--yes", "--base", "/models/qwen"], "not OWNER/NAME"),
        (2, [run, "me/bot", "--yes"], "others cannot find it\nwhere: BASE\nhint: --base OWNER/NAME"),
        (4, [tmp_path / "none", "me/bot", "--yes"], "there is no such folder"),
        (4, ["nothere", "me/bot", "--yes"], "there is no such folder"),
        (4, [base, "me/bot", "--yes"], "neither an adapter nor what merge wrote"),
        (4, [run / "tokens", "me/bot", "--yes"], "not a run, an adapter or a model"),
        (4, [tmp_path / "unfinished", "me/bot", "--yes"], "this run has no adapter yet"),
        (4, [tmp_path / "changed", "me/bot", "--yes"], "tokenizer.json is missing or was changed"),
        (8, [tmp_path / "linked", "me/bot", "--yes"], "this is a link"),
        (8, [tmp_path / "pickled", "me/bot", "--yes"], "the adapter is a pickle"),
    ]
    for code, words, said in cases:
        done = push(*words)
        assert (done.code, said.replace("BASE", str(base)) in done.err) == (code, True), (said, done.err)
    assert not hub.requests
    assert push(run, "me/bot", "--yes", *BASE, HF_TOKEN="").code == 5 and hub.requests == ["GET /"]
    for away in ({"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}):
        done = push(run, "me/bot", "--yes", *BASE, **away)
        assert done.code == 5 and "the hub is out of reach" in done.err


def test_a_strangers_adapter_is_read_through_and_templates_keep_no_secret(
    run: Path, tmp_path: Path, cli: Command
) -> None:
    folder = tmp_path / "theirs"
    shutil.copytree(run / "adapter", folder, ignore=shutil.ignore_patterns("manifest.json", "recipe.yaml"))
    assert cli("push", folder, "me/bot", "--dry-run").code == 0
    template = folder / "chat_template.jinja"
    kept = template.read_text(encoding="utf-8")
    template.write_text(f"{{# {TOKEN} #}}{kept}", encoding="utf-8")
    done = cli("push", folder, "me/bot", "--dry-run")
    assert done.code == 8 and "a token or a password" in done.err and TOKEN not in done.err
    template.write_text(kept, encoding="utf-8")
    weights = load_file(folder / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, folder / "adapter_model.safetensors")
    done = cli("push", folder, "me/bot", "--dry-run")
    assert done.code == 4 and "is not finite" in done.err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("typed", "sent"), [("y\n", 1), ("yes\n", 1), ("\n", 0), ("n\n", 0), ("", 0)])
def test_it_asks_on_a_terminal(typed: str, sent: int, run: Path, cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    monkeypatch.setattr("lorasft.share.push_files", lambda files, repo, private: calls.append(private) or "address")
    monkeypatch.setattr("sys.stdin", Terminal(typed))
    done = cli("push", run, "me/bot", *BASE)
    assert calls == [True] * sent and done.code == (0 if sent else 2)
    assert "to me/bot, private" in done.err and "adapter_model.safetensors" in done.err


def test_of_places_the_last_part_is_left(tmp_path: Path) -> None:
    (tmp_path / "qwen").mkdir()
    cases = {
        "Qwen/Qwen3-8B": "Qwen/Qwen3-8B",
        str(tmp_path / "qwen"): "qwen",
        "/home/me/.cache/huggingface/hub/models--Qwen--Qwen3-8B/snapshots/0123abcd": "Qwen/Qwen3-8B",
        "clients/acme.jsonl": "acme.jsonl",
        "~/clients/acme": "acme",
        "../clients/acme": "acme",
        "https://me:secretword@host/rows": "rows",
    }
    for given, wanted in cases.items():
        assert portable({"model": {"base": given}, "data": {"train": [{"path": given}]}}) == {
            "model": {"base": wanted}, "data": {"train": [{"path": wanted}]}
        }  # fmt: skip
    assert portable({"system": "/no_think and/or", "rank": 4}) == {"system": "/no_think and/or", "rank": 4}
    assert portable({"system": f"key {TOKEN}"}) == {"system": "key hf_..."}

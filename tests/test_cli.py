"""The command line as a user meets it when something is wrong: one clear message, exit status not
0, no traceback; two commands at once, Ctrl-C, a judge that misbehaves; and what run.sh starts.

A command runs as `python file.py words` in a process forked from this one, which has imported
everything already.
"""

import functools
import hashlib
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import PIL.Image
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import eval  # noqa: E402, F401, A004  (with safer: everything that the commands import)
import judge  # noqa: E402
import rollout  # noqa: E402
import safer  # noqa: E402, F401
import trainer  # noqa: E402
from extras import toy_base  # noqa: E402
from test_safer import metrics, train  # noqa: E402
from test_safer import run_folder, world  # noqa: E402, F401  (fixtures)

SIZES = {"sft": 12, "dpo": 4, "grpo": 12, "pool": 30, "eval": 12}
FLAGS = (
    "--max_steps 1 --sft_batch 4 --dpo_batch 4 --grpo_batch 4 --grpo_update_batch 4 --grpo_k 2"
    " --device cpu --eval_prompts generic --rollout_rows 4".split()
)
VLM = "--recipe tiny-vlm --qi_samples 2 --max_response 8 --device cpu --rollout_rows 140".split()
RECORD = {
    "id": "a",
    "images": ["i.png"],
    "question": "what?",
    "response": "<thinking>\nx\n</thinking>\n<answer>\ny\n</answer>",
}


def command(*words, patch=None):
    """(exit status, all output) of `python words`, after patch() in its process."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        os.close(reading)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
        sys.argv = [str(word) for word in words]
        status = 0
        try:
            if patch:
                patch()
            if sys.argv[0] == "-m":
                del sys.argv[0]
                runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
        except SystemExit as leaving:
            status = leaving.code or 0
            if isinstance(status, str):
                print(status, file=sys.stderr)
                status = 1
        except KeyboardInterrupt:
            status = 130
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


def refused(*words, status=1, patch=None):
    """What a command prints that must fail."""
    left, text = command(*words, patch=patch)
    assert left == status and "Traceback" not in text, text[-2000:]
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


# ---- wrong words, missing and damaged files ------------------------------------------------------


def test_wrong_flags(tmp_path):
    """Guards: a flag that prefixes or **kwargs would swallow; a folder that is left behind."""
    out = ["--out", tmp_path / "run"]
    for program in (["safer.py", "grpo"], ["eval.py"], ["qibox.py"], ["build.py"]):
        assert "unrecognized arguments: --sede" in refused(*program, *out, "--sede", "1")
        assert "--grpo_k 1: a group of one" in refused(*program, *out, "--grpo_k", "1")
    assert "usage: python safer.py sft|dpo|grpo" in refused("safer.py", "chat", *out)
    assert not list(tmp_path.iterdir())


def test_model_and_data_with_faults(tmp_path):
    """Guards: random weights in the place of missing ones; an image that is opened for the first
    time after an hour of training; one fault a start."""
    tokenizer = toy_base.make_tokenizer(tmp_path / "model")
    toy_base.qwen_config("tiny", len(tokenizer)).save_pretrained(tmp_path / "model")
    data = tmp_path / "data"
    data.mkdir()
    PIL.Image.new("RGB", (56, 56)).save(data / "i.png")
    (data / "sft.jsonl").write_text(json.dumps(RECORD) + "\n")
    folders = ["--model", tmp_path / "model", "--data", data, "--out", tmp_path / "run"]
    words = ["safer.py", "sft", *folders]
    assert "holds no *.safetensors; download config and weights" in refused(*words)
    assert not list(tmp_path.glob("run/*/config.json"))  # nothing has begun
    (data / "i.png").write_text("no picture")
    rows = [RECORD, RECORD | {"images": [], "id": "b", "response": ""}]
    (data / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = refused(*words)
    faults = ("2 problem(s)", "sft.jsonl:1: images", "cannot be read as", "sft.jsonl:2: response")
    for part in faults:
        assert part in text


@pytest.mark.parametrize("content", ['{"se', "[]", '{"settings": []}', '{"settings": {"x": 1}}'])
def test_damaged_settings(run, content):
    """Guards: tracebacks for a config.json that is cut off, another program's, or edited."""
    (run / "grpo" / "config.json").write_text(content)
    for words in (["-m", "extras.export", run, "--to", run / "new"], ["-m", "extras.chat", run]):
        assert f"{run}/grpo/config.json: damaged" in refused(*words)
    (run / "grpo" / "adapter.safetensors").unlink()
    if content != '{"settings": {"x": 1}}':  # that one lacks inputs
        assert "config.json: damaged" in refused("safer.py", "grpo", *FLAGS, "--out", run)


# ---- two at once, Ctrl-C -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place, words",
    [
        ("eval", ["eval.py", *FLAGS, "--eval_limit", "2", "--out", "{run}"]),
        ("qibox", ["qibox.py", *VLM, "--out", "{run}"]),
    ],
)
def test_second_one_in_a_folder(run, place, words):
    """Guards: two processes that write over each other: lines of both in one file."""
    reading, writing = os.pipe()
    holder = os.fork()
    if not holder:
        trainer.lock_folder(run / place)
        os.write(writing, b"x")
        time.sleep(100)
        os._exit(0)
    os.read(reading, 1)
    try:
        text = refused(*(word.format(run=run) for word in words))
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
    assert f"{run / place}: another process is at work here" in text


def interrupt(module, name, calls):
    """A patch: Ctrl-C at the calls-th call of module.name."""

    def patch():
        original = getattr(module, name)
        counted = []

        def counting(*args, **kwargs):
            counted.append(1)
            if len(counted) == calls:
                os.kill(os.getpid(), signal.SIGINT)
            return original(*args, **kwargs)

        setattr(module, name, counting)

    return patch


def test_interrupted_eval(run):
    """Guards: other results than without the interruption."""
    shutil.rmtree(run / "eval")
    before = json.loads((run / "results.json").read_text())
    words = ["eval.py", *FLAGS, "--out", run]
    status, _ = command(*words, patch=interrupt(rollout, "sample", 3))
    assert status == 130
    status, text = command(*words)
    assert status == 0, text[-2000:]
    assert json.loads((run / "results.json").read_text()) == before


def test_interrupted_qibox(run):
    """Guards: other scores than without the interruption, or records scored twice."""
    words = ["qibox.py", *VLM, "--out", run]
    assert command(*words, patch=interrupt(rollout, "sample", 1))[0] == 130
    status, text = command(*words)
    assert status == 0, text[-2000:]
    scores = (run / "qibox" / "scores-base.jsonl").read_text().splitlines()
    assert len({json.loads(line)["id"] for line in scores}) == len(scores) > 10


# ---- a judge that misbehaves ---------------------------------------------------------------------

GRADES = (
    "reasoning_logic reasoning_grounding reasoning_safety answer_logic answer_grounding"
    " answer_safety".split()
)


def hash_of(text):
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def reply_to(text):
    """A well-formed reply for whichever record is asked for, by a hash of the request."""
    n = hash_of(text)
    if "missing_grounding" in text:
        values = {"safe": n % 2 == 0, "hallucination": False, "contradiction": False}
        values["missing_grounding"] = 0
        return values | {name: 1 + n // 7 % 10 for name in GRADES}
    return {
        "task_success": 1 + n % 10,
        "safety": 9,
        "helpfulness": 1 + n // 10 % 10,
        "tool_quality": 5,
    }


@pytest.fixture
def bad_judge(monkeypatch):
    """A server that grades the preflight, then in 30% of its replies refuses, stutters or lies
    about its format; one request in ten is refused for good."""
    rng = random.Random(0)
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            said = json.loads(body)["messages"][-1]["content"]
            text = said if isinstance(said, str) else " ".join(x.get("text", "") for x in said)
            with lock:
                fault = rng.choice(["500", "429", "html", "prose", "string", "scale"])
                fault = fault if rng.random() < 0.3 else None
            values = reply_to(body)
            name = next(reversed(values))
            words = "Here you are: ```json\n" + json.dumps(values) + "\n```"
            if "fills this image" in body:  # the preflight's picture
                words = "blue"
            elif "What is 2 + 3?" in body:
                pass
            elif hash_of(text) % 10 == 0:
                return self.reply(400, "this one is refused for good")
            elif fault in ("500", "429"):
                return self.reply(int(fault), "busy", {"Retry-After": "0"})
            elif fault == "html":
                return self.reply(200, "<html>login</html>")
            elif fault == "prose":
                words = "no idea"
            elif fault:
                wrong = str(values[name]) if fault == "string" else 99
                words = json.dumps(values | {name: wrong})
            message = {"message": {"content": words}, "finish_reason": "stop"}
            self.reply(200, json.dumps({"choices": [message]}))

        def reply(self, status, text, headers=()):
            self.send_response(status)
            for name, value in dict(headers).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("JUDGE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    monkeypatch.setenv("JUDGE_MODEL", "stub")
    patient = functools.partialmethod(judge.EndpointJudge.__init__, backoff=0.01)
    monkeypatch.setattr(judge.EndpointJudge, "__init__", patient)
    monkeypatch.setattr(safer, "make_judge", trainer.make_judge)  # not the fixture's
    yield server
    server.shutdown()


@pytest.mark.parametrize("flags", [[], ["--rollout", "reflect", "--reward", "structured"]])
def test_every_sample_is_accounted_for(run_folder, bad_judge, flags):  # noqa: F811
    """Guards: an invented score for a case that failed, a sample that is lost, a run that ends."""
    words = "--stages grpo --max_steps 2 --max_response 16 --judge endpoint".split()
    train(run_folder, "grpo", *words, *flags)
    rows = metrics(run_folder, "grpo")
    assert len(rows) == 2 and all(row["reward"] is not None for row in rows)
    assert any(row["unscored"] > 0 for row in rows)
    counts = rows[-1]["judge_counts"]
    failed = sum(count for name, count in counts.items() if name.startswith("failed"))
    answered = counts["answered"] + counts.get("cached", 0)
    samples = 2 * 12 + sum(round(12 * row.get("corrected", 0)) for row in rows)
    assert answered + failed >= samples and failed > 0


# ---- run.sh --------------------------------------------------------------------------------------


def shell(words, folder=ROOT, **environment):
    """`bash run.sh words`, without the variables that it reads but for these."""
    names = "MODEL DATA GPUS NNODES NODE_RANK MASTER_ADDR CUDA_VISIBLE_DEVICES SAFER_PYTHON".split()
    clean = os.environ | dict.fromkeys([*names, "JUDGE_URL", "MKL_CBWR"], "")
    return subprocess.run(
        ["bash", "run.sh", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env=clean | environment,
    )


def test_run_sh_unknown_word():
    """Guards: a misspelt word that starts something else, or ends without saying what there is."""
    for words in (["nonsense"], []):
        done = shell(words)
        assert done.returncode == 2
        for word in ("tiny", "3b", "7b", "test", "ablate"):
            assert f"bash run.sh {word}" in done.stderr


def test_run_sh_reports_mistakes_before_it_installs_anything(tmp_path):
    """Guards: gigabytes of packages first, the misspelt flag afterwards."""
    files = ("run.sh", "config.py", "requirements.txt")
    for name in files:
        shutil.copy(ROOT / name, tmp_path)
    done = shell(["tiny", "--sede", "3"], tmp_path)
    assert done.returncode == 1 and "unrecognized arguments: --sede" in done.stderr
    done = shell(["3b"], tmp_path)
    assert done.returncode == 2 and "DATA=folder" in done.stderr
    done = shell(["3b"], tmp_path, DATA="d")
    assert done.returncode == 2 and "JUDGE_URL" in done.stderr
    left = {path.name for path in tmp_path.iterdir()} - {"__pycache__"}
    assert left == set(files)


FAKE = """#!/usr/bin/env bash
# Stands in for python: checks flags with the real one, sees 2 GPUs, notes every other command.
case "$1" in
  config.py) exec {python} "$@" ;;
  -c) echo 2 ;;
  qibox.py) echo "$@" >> {log}; mkdir -p {log}.out/qibox; touch {log}.out/qibox/grpo.jsonl ;;
  *) echo "$@" >> {log} ;;
esac
echo "$MKL_CBWR" > {log}.cbwr
"""


@pytest.fixture
def started(tmp_path):
    """A function: the commands that run.sh starts, without running them."""
    log = tmp_path / "log"
    fake = tmp_path / "python"
    fake.write_text(FAKE.format(python=sys.executable, log=log))
    fake.chmod(0o755)

    def start(*words, **environment):
        log.unlink(missing_ok=True)
        done = shell(words, SAFER_PYTHON=str(fake), **environment)
        assert done.returncode == 0, done.stderr
        return log.read_text().splitlines()

    start.fake = fake
    start.log = log
    return start


STAGES = ["safer.py sft", "safer.py dpo", "safer.py grpo", "eval.py"]


def test_run_sh_stages(started):
    """Guards: a stage left out, a flag that does not reach one, MODEL and DATA ignored, one process
    on a machine with two GPUs."""
    flags = " --recipe tiny --seed 3"
    commands = [stage + flags for stage in ["-m extras.toy_base", *STAGES]]
    assert started("tiny", "--seed", "3") == [*commands, "-m extras.report out/tiny-seed3"]
    assert Path(f"{started.log}.cbwr").read_text() == "AUTO,STRICT\n"

    words = ["3b", "--judge", "toy", "--max_steps", "2", "--out", "o"]
    flags = " --recipe 3b --model m --data d --judge toy --max_steps 2 --out o"
    ranks = "-m torch.distributed.run --standalone --nproc_per_node 2 "
    expected = [f"-m extras.preflight{flags}"]
    expected += [ranks + stage + flags for stage in STAGES]
    assert started(*words, MODEL="m", DATA="d") == [*expected, "-m extras.report o"]

    machines = dict(NNODES="2", NODE_RANK="1", MASTER_ADDR="first")
    log = started("7b", "--data", "d", "--judge", "toy", **machines)
    assert len(log) == 5  # the first machine writes the report
    ranks = "-m torch.distributed.run --nproc_per_node 2 --nnodes 2 --node_rank 1"
    assert all(line.startswith(f"{ranks} --master_addr first ") for line in log[1:])

    assert started("test", "-k", "word") == ["-m pytest -q tests -k word"]
    assert started("ablate", "vlm", "--seeds", "0") == ["-m extras.ablate vlm --seeds 0"]
    done = shell(["3b", "--data", "d"], SAFER_PYTHON=str(started.fake), GPUS="0,1,2")
    assert done.returncode == 2 and "names 3 GPUs" in done.stderr


def test_run_sh_of_the_other_method(started):
    """Guards: SaFeR-VLM without its curation, or behind SFT and DPO; --method not understood."""
    out = f"{started.log}.out"
    for words in (["tiny-vlm"], ["tiny", "--method", "vlm"]):
        flags = " ".join([" --recipe", *words, "--out", out])
        programs = ["-m extras.toy_base", "qibox.py", "safer.py grpo", "eval.py"]
        expected = [program + flags for program in programs]
        assert started(*words, "--out", out) == [*expected, f"-m extras.report {out}"]


def test_run_sh_dry_run_starts_nothing(started):
    """Guards: a rehearsal that trains; --dry_run that must be the last word, or lacks its 1."""
    for words in (["--dry_run", "--seed", "3"], ["--dry_run"], ["--dry_run", "1"]):
        expected = " ".join(["-m extras.preflight --recipe 3b-vlm --data d", *words])
        assert started("3b-vlm", "--data", "d", *words) == [expected]

"""Several ranks, kills, signals, full disks, two runs in a folder, the same command twice: it ends
at the same bits, or says why not.

Everything runs in processes forked from one that has imported torch, has one thread, and is no
pytest. By hand, with more kills:  python tests/test_runs.py kills FOLDER 20
"""

import collections
import functools
import hashlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import config as config_module  # noqa: E402
import model as model_module  # noqa: E402
import safer  # noqa: E402
import trainer  # noqa: E402
from extras import toy_base  # noqa: E402
from judge import Grades, JudgeError  # noqa: E402
from test_safer import HashJudge, metrics  # noqa: E402

STAGES = ("sft", "dpo", "grpo")
STEPS = 3
FLAGS = (
    "--sft_batch 4 --dpo_batch 4 --dpo_epochs 3 --grpo_batch 8 --grpo_update_batch 4 --grpo_k 3"
    f" --device cpu --max_steps {STEPS} --grpo_steps {STEPS}".split()
)


# ---- processes -----------------------------------------------------------------------------------


def start(job, rank=0, world=1, port=0):
    """A forked process that runs job() as torchrun would start it."""

    def child():
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        job()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def ended(job, *args):
    """The exit code of job(*args) in a forked process."""
    process = start(functools.partial(job, *args))
    process.join()
    return process.exitcode


def in_world(world, job, *args):
    """Run job(*args) in `world` ranks -> their exit codes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [start(functools.partial(job, *args), rank, world, port) for rank in range(world)]
    for process in ranks:
        process.join(300)
        process.kill()  # only if it hangs
    return [process.exitcode for process in ranks]


def make_world(folder):
    """An untrained base model and small data sets."""
    toy_base.train_base(str(folder / "base"), seed=0, steps=2)
    sizes = {"sft": 24, "dpo": 8, "grpo": 24, "eval": 2}
    toy_base.build_toy(str(folder / "data"), 0, sizes)


def place(folder, name):
    """A fresh run on the world in `folder`."""
    (folder / name).mkdir()
    for part in ("base", "data"):
        (folder / name / part).symlink_to(folder / part)
    return folder / name


def train(folder, stages=STAGES):
    """The stages, STEPS steps each; GRPO samples short responses."""
    safer.make_judge = lambda config: HashJudge(fail_every=3)
    for name in stages:
        longest = "20" if name == "grpo" else "160"
        safer.main([name, "--out", str(folder), *FLAGS, "--max_response", longest])


def drive(scenario, folder, *words):
    """Run a scenario in a new process -> (what it saw, its output)."""
    command = [sys.executable, __file__, scenario, str(folder), *words]
    environment = dict(os.environ, OMP_NUM_THREADS="1", MKL_CBWR="AUTO,STRICT")
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env=environment, check=False
    )
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-3000:]
    return json.loads((folder / "seen.json").read_text()), log


# ---- several ranks -------------------------------------------------------------------------------
# In float64: float32 rounds sums over another split differently, Adam turns the sign of a gradient
# that is nothing but rounding into a full step, and a sampled token falls on the other side. In
# float64 what is left is far below the tolerance, and a mistake is far above.


def everything_float64():
    """Weights, adapters, losses and optimizer in float64."""
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    load = model_module.load_model
    model_module.load_model = lambda folder, dtype, device: load(folder, torch.float64, device)


class HashGrades:
    """Grades that depend on the text alone. On rank `dies_on` the judge dies for good in the second
    judging of its second rollout (a rollout asks three times: first responses and two rounds)."""

    def __init__(self, dies_on=None):
        self.counts = collections.Counter()
        self.calls = 0
        self.dies_on = dies_on

    def grade(self, cases):
        self.calls += 1
        if self.calls == 5 and int(os.environ["RANK"]) == self.dies_on:
            raise JudgeError("dead for good")
        grades = []
        for case in cases:
            n = int(hashlib.sha256(case.check.text.encode()).hexdigest(), 16)
            numbers = (n % 2 == 0, 1 + n % 10, 5, 5, 1 + n // 10 % 10, 5, 5)
            flags = (n % 5 == 0, n % 3 == 0, n % 4)
            grades.append(Grades(*numbers, *flags) if n % 7 else None)
        return grades


def train_reflecting(folder, dies_on=None):
    """GRPO with two rounds of corrections, trained as first responses."""
    safer.make_judge = lambda config: HashGrades(dies_on)
    flags = (
        "--stages grpo --reward structured --rollout reflect --reflect_rounds 2 --temperature 0.8"
        " --loss_mean constant --max_response 20 --grpo_prompts generic".split()
    )
    safer.main(["grpo", "--out", str(folder), *FLAGS, *flags])


def train_signalled(folder):
    """In step 1 of each stage a SIGTERM comes to the last rank alone."""
    write = trainer.write_metrics

    def signalled(run, step, **values):
        if step == 1 and run.rank == run.world - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return write(run, step, **values)

    safer.write_metrics = signalled
    train(folder)


def bare_run():
    """A run without model: what the functions that talk to other ranks need."""
    config = safer.parse_config(["--warmup", "0"])
    rank, world = trainer.join_ranks(torch.device("cpu"))
    parameters = {"x": torch.nn.Parameter(torch.zeros(2))}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    words = (config, "sft", Path("."), None, None, parameters, optimizer, torch.device("cpu"))
    return trainer.Run(*words, rank, world)


def talk():
    """Sums over ranks, of names that only some of them have."""
    run = bare_run()
    assert trainer.gather(run, {"rank": run.rank}) == [{"rank": rank} for rank in range(3)]
    assert trainer.total(run, run.rank + 0.5) == 4.5


def spoil():
    """The last rank has a loss of NaN in its second micro-batch: it names the record, all raise."""
    run = bare_run()
    for number in range(2):
        factor = float("nan") if run.rank == run.world - 1 and number == 1 else 1.0
        loss = (run.parameters["x"] * factor).sum()
        loss.backward()
        trainer.check_finite(run, loss, [f"record-{run.rank}-{number}"])
    with pytest.raises(trainer.StageError, match="gradient norm of step 7 is nan; the last"):
        trainer.optimizer_step(run, 7, 10)


def ranks(folder):
    make_world(folder)
    everything_float64()
    seen = {}
    for world in (1, 2, 3):
        seen[f"world {world}"] = in_world(world, train, place(folder, f"world {world}"))
    for world in (1, 2):
        one = place(folder, f"reflect {world}")
        seen[f"reflect {world}"] = in_world(world, train_reflecting, one)
    stopped = place(folder, "stopped")
    seen["stopped"] = in_world(2, train_signalled, stopped)
    seen["resumed"] = in_world(1, train, stopped)
    dead = place(folder, "reflect dead")
    seen["dead"] = in_world(2, train_reflecting, dead, 1)
    seen["dead, resumed"] = in_world(1, train_reflecting, dead)
    seen["talk"] = in_world(3, talk)
    seen["spoil"] = in_world(2, spoil)
    return seen


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return folder, *drive("ranks", folder)


def compare(one, other, stages):
    """The same samples, and the same losses, gradients and adapters to 1e-5."""
    exact = ("step", "unscored", "length", "zero_spread", "unsafe", "corrected", "corrected_safe")
    for name in stages:
        for a, b in zip(metrics(one, name), metrics(other, name), strict=True):
            for key in set(exact) & set(a):
                assert a[key] == pytest.approx(b[key], abs=1e-12), (name, key)
            for key in {"loss", "grad_norm", "reward", "entropy", "kl"} & set(a):
                assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-6), (name, key)
        assert len(metrics(one, name)) == STEPS
        first, second = (load_file(run / name / "adapter.safetensors") for run in (one, other))
        for key in first:
            torch.testing.assert_close(first[key], second[key], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_equal_one(ranked, world):
    """Guards: means of means over ranks, groups that are split, and ranks that reduce different
    quantities where a judge failed."""
    folder, seen, log = ranked
    assert seen["world 1"] == [0] and seen[f"world {world}"] == [0] * world, log[-3000:]
    compare(folder / "world 1", folder / f"world {world}", STAGES)


def test_ranks_equal_one_with_corrections(ranked):
    """Guards: a correction's seed by its place in the batch; sums that depend on the split."""
    folder, seen, log = ranked
    assert seen["reflect 1"] == [0] and seen["reflect 2"] == [0, 0], log[-3000:]
    compare(folder / "reflect 1", folder / "reflect 2", ["grpo"])
    for row in metrics(folder / "reflect 1", "grpo"):
        assert 0 < row["corrected_safe"] < 1 and row["unscored"] > 0  # every branch was taken


def test_a_signal_to_one_rank_stops_all(ranked):
    """Guards: ranks that wait for one that has left. The checkpoint of two ranks then goes on in
    one, to the same end."""
    folder, seen, log = ranked
    assert seen["stopped"] == [143, 143] and seen["resumed"] == [0], log[-3000:]
    assert "sft: stopped after step 2 of 3; the same command goes on" in log
    compare(folder / "world 1", folder / "stopped", STAGES)


def test_a_judge_that_dies_on_one_rank_stops_all(ranked):
    """In the middle of a reflection round, while the other rank waits. Both leave with the
    checkpoint of the steps before; from it one rank goes on to the same end."""
    folder, seen, log = ranked
    assert seen["dead"] == [1, 1] and seen["dead, resumed"] == [0], log[-3000:]
    assert "dead for good" in log and "the judge failed on another rank" in log
    assert "grpo: going on after step 1" in log
    compare(folder / "reflect 1", folder / "reflect dead", ["grpo"])


def test_ranks_talk_and_fail_together(ranked):
    """Guards: names that only some ranks have; a rank that raises alone while others wait."""
    _, seen, log = ranked
    assert seen["talk"] == [0] * 3 and seen["spoil"] == [0] * 2, log[-3000:]
    assert log.count("sft: the loss is nan, of records record-1-1") == 1


# ---- kills, signals, disks -----------------------------------------------------------------------


def curriculum(folder, stages=STAGES):
    """The stages with a checkpoint after every step, and the command's own way to report errors."""
    trainer.SAVE_EVERY = 1
    try:
        train(folder, stages)
    except (OSError, trainer.StageError) as problem:
        sys.exit(str(problem))


def killed_after(folder, seconds):
    """The curriculum, dead after so many seconds of CPU time: SIGPROF, which nobody handles, ends a
    process as SIGKILL does."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    curriculum(folder)


def after_metrics(folder, act):
    """SFT, in which act(step) follows every line of metrics."""
    write = trainer.write_metrics

    def acting(run, step, **values):
        write(run, step, **values)
        act(step)

    safer.write_metrics = acting
    curriculum(folder, ["sft"])


def send(number, step):
    if step == 1:
        os.kill(os.getpid(), number)


def fill_disk(step):
    """From here on no file can get over 50 kB: the checkpoint of step 1 is there, that of step 2
    will not fit."""
    if step == 1:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))


def killed_while_saving(folder, count):
    """SIGKILL at the count-th time that write_whole waits for the disk."""
    calls = []
    sync = config_module.sync

    def dies(path):
        calls.append(path)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(path)

    config_module.sync = dies
    curriculum(folder, ["sft"])


def spoil_logs(folder):
    """Half a line, as a kill in the middle of a write leaves it, that looks like a whole one."""
    for path in folder.glob("*/metrics.jsonl"):
        if not path.with_name("adapter.safetensors").exists():
            with open(path, "a") as file:
                file.write('{"step": 7, "judge_counts": {"asked": 3}')


def kills(folder, count="3"):
    make_world(folder)
    seen = {"straight": ended(curriculum, place(folder, "straight"))}
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime

    codes = []
    rng = random.Random(0)
    killed = place(folder, "killed")
    while codes.count(-signal.SIGPROF) < int(count) and 0 not in codes:
        codes.append(ended(killed_after, killed, rng.uniform(0.1, 0.6) * cpu))
        spoil_logs(killed)
    seen["killed"] = [*codes, ended(curriculum, killed)]

    one = place(folder, "saving")  # 1, 2: config.json; 3: a checkpoint is written, 4: has a name
    seen["saving"] = [ended(killed_while_saving, one, count) for count in (3, 4)]
    seen["saving"].append(ended(curriculum, one, ["sft"]))

    for number in (signal.SIGTERM, signal.SIGINT):
        one = place(folder, number.name)
        code = ended(after_metrics, one, functools.partial(send, number))
        there = (one / "sft" / "checkpoint.safetensors").exists()
        seen[number.name] = [code, there, ended(curriculum, one, ["sft"])]

    one = place(folder, "full")
    code = ended(after_metrics, one, fill_disk)
    files = sorted(path.name for path in (one / "sft").iterdir())
    seen["full"] = [code, files, ended(curriculum, one, ["sft"])]

    one = place(folder, "twice")
    first = start(functools.partial(after_metrics, one, lambda step: step or time.sleep(5)))
    while not (one / "sft" / "metrics.jsonl").exists():
        time.sleep(0.05)
    second = ended(curriculum, one, ["sft"])
    first.join()
    seen["twice"] = [second, first.exitcode]
    return seen


def same(one, other, stages=STAGES):
    """The same adapters to the last bit, each step once in the metrics with the same values, the
    same samples, no parts left."""
    for name in stages:
        first, second = (load_file(run / name / "adapter.safetensors") for run in (one, other))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), name
        rows = [metrics(run, name) for run in (one, other)]
        assert [row["step"] for row in rows[1]] == list(range(STEPS)), name
        for key in ("loss", "grad_norm", "reward"):
            assert [row.get(key) for row in rows[0]] == [row.get(key) for row in rows[1]], name
        assert not [*(other / name).glob("*.part"), *(other / name).glob(".tmp*")]
    if "grpo" in stages:
        samples = [(run / "grpo" / "samples.txt").read_text() for run in (one, other)]
        assert samples[0] == samples[1]


@pytest.fixture(scope="module")
def survived(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    return folder, *drive("kills", folder)


def test_the_same_command_twice(survived):
    """In a process of its own, with memory laid out otherwise. Guards: a result that depends on
    where in memory a matrix happens to be (run.sh sets MKL_CBWR), or on the clock."""
    folder, _, _ = survived
    again = place(folder, "again")
    drive("again", again, "padding" * 1000)
    same(folder / "straight", again)


def test_kills_at_random_moments(survived):
    """Guards: state that no checkpoint holds, lines that are there twice, a half line."""
    folder, seen, log = survived
    assert seen["straight"] == 0 and seen["killed"][-1] == 0, log[-3000:]
    assert {*seen["killed"]} == {-signal.SIGPROF, 0}, log[-3000:]
    same(folder / "straight", folder / "killed")


def test_kills_while_saving(survived):
    """Guards: a checkpoint that is half of one, a name without its file, parts that pile up."""
    folder, seen, log = survived
    assert seen["saving"] == [-9, -9, 0], log[-3000:]
    same(folder / "straight", folder / "saving", ["sft"])


@pytest.mark.parametrize("name, status", [("SIGTERM", 143), ("SIGINT", 130)])
def test_signals_finish_the_step_and_save(survived, name, status):
    """Guards: a lost step, an exit status of 0 that lets the next stage start, a traceback in place
    of a sentence."""
    folder, seen, log = survived
    assert seen[name] == [status, True, 0], log[-3000:]
    assert log.count("sft: stopped after step 2 of 3; the same command goes on") == 2
    same(folder / "straight", folder / name, ["sft"])


def test_full_disk(survived):
    """Guards: a good checkpoint overwritten by a bad one, a part that keeps the disk full."""
    folder, seen, log = survived
    files = ["checkpoint.safetensors", "config.json", "lock", "metrics.jsonl"]
    assert seen["full"] == [1, files, 0], log[-3000:]
    sentence = r"full/sft/checkpoint.safetensors: cannot be written \(.*\); what was there is un"
    assert re.search(sentence, log)
    same(folder / "straight", folder / "full", ["sft"])


def test_second_run_in_one_folder(survived):
    """Guards: two runs that write over each other. (No lock outlives its process: the kills.)"""
    folder, seen, log = survived
    assert seen["twice"] == [1, 0], log[-3000:]
    assert "twice/sft: another process is at work here; wait for it" in log
    same(folder / "straight", folder / "twice", ["sft"])


# ---- what a checkpoint depends on ----------------------------------------------------------------


def test_inputs_that_changed(survived, tmp_path):
    """Guards: a stage that goes on with other data, another base or another SFT."""
    folder, _, _ = survived
    run = tmp_path / "run"
    run.mkdir()
    for name in ("base", "data", "sft", "dpo"):
        subprocess.run(["cp", "-rL", folder / "straight" / name, run / name], check=True)
    (run / "dpo" / "adapter.safetensors").unlink()  # as if it had been interrupted
    words = ["dpo", "--out", str(run), *FLAGS]

    def changed(name, path):
        before = path.read_bytes()
        tensors = load_file(path) if path.suffix == ".safetensors" else None
        if tensors is None:
            path.write_text(path.read_text().replace("<answer>", "<answer> ", 1))
        elif name == "base":
            tensors = {key: tensor * 1.001 for key, tensor in tensors.items()}
            save_file(tensors, path, metadata={"format": "pt"})
        else:
            other = folder / "straight" / "grpo" / "adapter.safetensors"
            path.write_bytes(other.read_bytes())
        with pytest.raises(config_module.ConfigError, match=f"{name} was '.*', is '"):
            safer.main(words)
        path.write_bytes(before)

    changed("records", run / "data" / "dpo.jsonl")
    changed("base", run / "base" / "model.safetensors")
    changed("sft adapter", run / "sft" / "adapter.safetensors")
    (run / "dpo").rename(run / "kept")
    changed("base", run / "base" / "model.safetensors")  # DPO has not begun, SFT had another one
    shutil.rmtree(run / "dpo")
    (run / "kept").rename(run / "dpo")
    (run / "dpo" / "checkpoint.safetensors").write_bytes(b"damaged")
    with pytest.raises(model_module.ModelError, match="checkpoint.safetensors: damaged"):
        safer.main(words)
    safer.main([*words, "--resume", "0"])
    same(folder / "straight", run, ["dpo"])


def test_nothing_is_unpickled_from_files():
    """A weight or checkpoint file that is unpickled can run code."""
    unsafe = re.compile(
        r"torch\.(load|save)\(|\bnp\.load\(|allow_pickle|\b(pickle|dill|joblib|marshal|shelve)\b"
    )
    files = [*ROOT.glob("*.py"), *ROOT.glob("extras/*.py")]
    assert len(files) > 15
    assert not [path.name for path in files if unsafe.search(path.read_text())]


if __name__ == "__main__":
    torch.set_num_threads(1)
    where = Path(sys.argv[2])
    scenarios = {"ranks": ranks, "kills": kills, "again": lambda folder, _: curriculum(folder)}
    result = scenarios[sys.argv[1]](where, *sys.argv[3:])
    (where / "seen.json").write_text(json.dumps(result))

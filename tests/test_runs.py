"""Several ranks, kills, the same command twice: it ends at the same bits, or says why not.

Everything runs in processes forked from one that has imported torch, has one thread, and is no
pytest. By hand, with more kills:  python tests/test_runs.py kills FOLDER 20
"""

import json
import multiprocessing
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT  # before torch: it sets the threads
import torch  # noqa: I001
from safetensors.torch import load_file

import config as config_module
import model as model_module
import safer
import trainer
from tiny_run import STAGES, HashJudge, make_world, metrics, place, same

STEPS = 3
FLAGS = (
    "--sft_batch 4 --dpo_batch 4 --dpo_epochs 3 --grpo_batch 8 --grpo_update_batch 4 --grpo_k 3"
    f" --device cpu --max_steps {STEPS} --grpo_steps {STEPS}".split()
)


# ---- processes -----------------------------------------------------------------------------------


def in_world(world, job, *args):
    """Run job(*args) in `world` forked ranks, as torchrun would start them -> their exit codes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])

    def child(rank):
        os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=str(world))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        job(*args)

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=child, args=[str(rank)]) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        process.kill()  # only if it hangs
    return [process.exitcode for process in processes]


def train(folder, stages=STAGES):
    """The stages, STEPS steps each; GRPO samples short responses."""
    safer.make_judge = lambda config: HashJudge(fail_every=3)
    for name in stages:
        longest = "20" if name == "grpo" else "160"
        safer.main([name, "--out", str(folder), *FLAGS, "--max_response", longest])


def drive(scenario, folder, *words):
    """Run a scenario in a new process -> (what it saw, its output)."""
    command = [sys.executable, __file__, scenario, str(folder), *words]
    environment = os.environ | {"MKL_CBWR": "AUTO,STRICT"}
    with open(folder / "log", "w+") as log:
        subprocess.run(command, stdout=log, stderr=log, timeout=900, env=environment, check=False)
        log.seek(0)
        said = log.read()
    assert (folder / "seen.json").exists(), said[-3000:]
    return json.loads((folder / "seen.json").read_text()), said


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


def train_reflecting(folder, dies_on=""):
    """GRPO with two rounds of corrections, trained as first responses. On rank `dies_on` the judge
    dies in the second judging of its second rollout: a rollout asks three times."""
    calls = 4 if os.environ["RANK"] == dies_on else 99
    safer.make_judge = lambda config: HashJudge(7, calls)
    flags = (
        "--stages grpo --reward structured --rollout reflect --reflect_rounds 2 --temperature 0.8"
        " --loss_mean constant --max_response 20 --grpo_prompts generic".split()
    )
    safer.main(["grpo", "--out", str(folder), *FLAGS, *flags])


def on_last_rank(run, step):
    return step == 1 and run.rank == run.world - 1


def train_signalled(folder):
    """In step 1 of each stage a SIGTERM comes to the last rank alone."""
    write = trainer.write_metrics

    def signalled(run, step, **values):
        if on_last_rank(run, step):
            os.kill(os.getpid(), signal.SIGTERM)
        return write(run, step, **values)

    safer.write_metrics = signalled
    train(folder)


def train_spoiled(folder):
    """In step 1 the last rank alone has a record whose loss is NaN."""
    update = trainer.optimizer_step

    def spoiled(run, step, steps):
        if on_last_rank(run, step):
            trainer.check_finite(run, torch.tensor(torch.nan), ["spoiled"])
            next(iter(run.parameters.values())).grad.fill_(torch.nan)
        return update(run, step, steps)

    safer.optimizer_step = spoiled
    train(folder, ["sft"])


def train_kept_waiting(folder):
    """In step 1 the others wait for the last rank, longer than they have patience."""
    update = trainer.optimizer_step
    trainer.PATIENCE = 0.1

    def late(run, step, steps):
        if on_last_rank(run, step):
            time.sleep(1)
        return update(run, step, steps)

    safer.optimizer_step = late
    train(folder, ["sft"])


def ranks(folder):
    make_world(folder)
    everything_float64()
    seen = {}
    for world in (1, 2, 3):
        seen[f"world {world}"] = in_world(world, train, place(folder, folder / f"world {world}"))
    for world in (1, 2):
        one = place(folder, folder / f"reflect {world}")
        seen[f"reflect {world}"] = in_world(world, train_reflecting, one)
    stopped = place(folder, folder / "stopped")
    seen["stopped"] = in_world(2, train_signalled, stopped) + in_world(1, train, stopped)
    dead = place(folder, folder / "dead")
    seen["dead"] = in_world(2, train_reflecting, dead, "1") + in_world(1, train_reflecting, dead)
    seen["spoiled"] = in_world(2, train_spoiled, place(folder, folder / "spoiled"))
    seen["late"] = in_world(2, train_kept_waiting, place(folder, folder / "late"))
    return seen


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return folder, *drive("ranks", folder)


def compare(one, other, stages=STAGES):
    """The same samples, and the same losses, gradients and adapters to 1e-5."""
    exact = ("step", "unscored", "length", "zero_spread", "unsafe", "corrected", "corrected_safe")
    close = ("loss", "grad_norm", "reward", "entropy", "kl")
    for name in stages:
        rows, others = metrics(one, name), metrics(other, name)
        assert len(rows) == len(others) == STEPS
        for a, b in zip(rows, others):
            for key in {*exact, *close} & set(a):
                rel, least = (0, 1e-12) if key in exact else (1e-5, 1e-6)
                assert a[key] == pytest.approx(b[key], rel=rel, abs=least), (name, key)
        first, second = (load_file(run / name / "adapter.safetensors") for run in (one, other))
        for key in first:
            torch.testing.assert_close(first[key], second[key], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_equal_one(ranked, world):
    """Guards: means of means over ranks, groups that are split, names that only some ranks have,
    and ranks that reduce different quantities where a judge failed."""
    folder, seen, log = ranked
    assert seen["world 1"] == [0] and seen[f"world {world}"] == [0] * world, log[-3000:]
    compare(folder / "world 1", folder / f"world {world}")


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
    assert seen["stopped"] == [143, 143, 0], log[-3000:]
    assert "sft: stopped after step 2 of 3; the same command goes on" in log
    compare(folder / "world 1", folder / "stopped")


def test_a_judge_that_dies_on_one_rank_stops_all(ranked):
    """In the middle of a reflection round, while the other rank waits. Both leave with the
    checkpoint of the steps before; from it one rank goes on to the same end."""
    folder, seen, log = ranked
    assert seen["dead"] == [1, 1, 0], log[-3000:]
    assert "the judge failed on another rank" in log and "grpo: going on after step 1" in log
    compare(folder / "reflect 1", folder / "dead", ["grpo"])


def test_a_loss_that_is_not_finite_on_one_rank_stops_all(ranked):
    """Guards: a rank that raises alone while others wait, and a message without the record."""
    _, seen, log = ranked
    assert seen["spoiled"] == [1, 1], log[-3000:]
    assert log.count("sft: the loss is nan, of records spoiled") == 1


def test_a_rank_that_keeps_others_waiting_is_named(ranked):
    """Guards: hours without a word; a run that is given up because a judge was slow."""
    folder, seen, log = ranked
    assert seen["late"] == [0, 0] and "rank 0 waits for [1]: " in log, log[-3000:]
    compare(folder / "world 1", folder / "late", ["sft"])


# ---- kills ---------------------------------------------------------------------------------------


def killed_after(folder, seconds):
    """The curriculum, dead after so many seconds of CPU time: SIGPROF, which nobody handles, ends a
    process as SIGKILL does."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    train(folder)


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
    train(folder, ["sft"])


def spoil_logs(folder):
    """Half a line, as a kill in the middle of a write leaves it, that looks like a whole one."""
    for path in folder.glob("*/metrics.jsonl"):
        if not path.with_name("adapter.safetensors").exists():
            with open(path, "a") as file:
                file.write('{"step": 7, "judge_counts": {"asked": 3}')


def kills(folder, count="3"):
    make_world(folder)
    trainer.SAVE_EVERY = 1
    seen = {"straight": in_world(1, train, place(folder, folder / "straight"))}
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime

    seen["killed"] = []
    rng = random.Random(0)
    killed = place(folder, folder / "killed")
    while len(seen["killed"]) < int(count) and 0 not in seen["killed"]:
        seen["killed"] += in_world(1, killed_after, killed, rng.uniform(0.1, 0.6) * cpu)
        spoil_logs(killed)
    seen["killed"] += in_world(1, train, killed)

    one = place(folder, folder / "saving")
    seen["saving"] = []
    for number in (3, 4):  # 1, 2: config.json; 3: a checkpoint is written, 4: has a name
        seen["saving"] += in_world(1, killed_while_saving, one, number)
    seen["saving"] += in_world(1, train, one, ["sft"])
    return seen


def again(folder, padding):
    return train(folder)


@pytest.fixture(scope="module")
def survived(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    return folder, *drive("kills", folder)


def test_the_same_command_twice(survived):
    """In a process of its own, with memory laid out otherwise. Guards: a result that depends on
    where in memory a matrix happens to be (run.sh sets MKL_CBWR), or on the clock."""
    folder, _, _ = survived
    drive("again", place(folder, folder / "again"), "padding" * 1000)
    same(folder / "straight", folder / "again")


def test_kills_at_random_moments(survived):
    """Guards: state that no checkpoint holds, lines that are there twice, a half line."""
    folder, seen, log = survived
    assert seen["straight"] == [0] and seen["killed"][-1] == 0, log[-3000:]
    assert {*seen["killed"]} == {-signal.SIGPROF, 0}, log[-3000:]
    same(folder / "straight", folder / "killed")


def test_kills_while_saving(survived):
    """Guards: a checkpoint that is half of one, a name without its file, parts that pile up."""
    folder, seen, log = survived
    assert seen["saving"] == [-9, -9, 0], log[-3000:]
    same(folder / "straight", folder / "saving", ["sft"])


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
    scenarios = {"ranks": ranks, "kills": kills, "again": again}
    result = scenarios[sys.argv[1]](where, *sys.argv[3:])
    (where / "seen.json").write_text(json.dumps(result))

"""Kills, signals, full disks, two runs in one folder, changed data: the same command goes on to the same bits, or says why not.

By hand, with more kills:  python tests/test_survive.py FOLDER 20
"""

import functools
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from extras import bench  # noqa: E402
import safer  # noqa: E402
import trainer  # noqa: E402
from test_ranks import STAGES, make_world, run_folder, start, train  # noqa: E402

STEPS = 3


# ---- what runs in forked processes --------------------------------------------------------------------------------------


def curriculum(folder, stages=STAGES):
    """The stages with a checkpoint after every step, and the command's own way of telling an error."""
    trainer.SAVE_EVERY = 1
    try:
        train(folder, STEPS, stages)
    except trainer.StageError as problem:
        sys.exit(str(problem))


def killed_after(folder, seconds):
    """The curriculum, dead after so many seconds of CPU time: SIGPROF, for which there is no handler, ends a process as SIGKILL does."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    curriculum(folder)


def after_metrics(folder, stages, act):
    """The curriculum, in which act(run, step) follows every line of metrics."""
    write = trainer.write_metrics

    def acting(run, step, **extra):
        row = write(run, step, **extra)
        act(run, step)
        return row

    safer.write_metrics = acting
    curriculum(folder, stages)


def send(number, run, step):
    if run.stage == "sft" and step == 1:
        os.kill(os.getpid(), number)


def fill_disk(run, step):
    """From here on no file of more than 50 kB can be written: the checkpoint of step 1 is there, that of step 2 will not fit."""
    if step == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def killed_while_saving(folder, count):
    """SIGKILL at the count-th time that something is brought to the disk: between writing, renaming and removing."""
    calls, sync = [], trainer.sync

    def dies(path):
        calls.append(path)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(path)

    trainer.sync = dies
    curriculum(folder, ["sft"])


def spoil_logs(folder):
    """Half a line, as a kill in the middle of a write leaves it, that happens to end like a whole one."""
    for path in folder.glob("*/metrics.jsonl"):
        if not path.with_name("adapter.safetensors").exists():
            with open(path, "a") as file:
                file.write('{"step": 7, "judge_counts": {"asked": 3}')


def ended(job, *args):
    """The exit code of job(*args) in a forked process."""
    process = start(functools.partial(job, *args))
    process.join()
    return process.exitcode


def drive(folder, kills):
    """Every scenario in a folder of its own; exit codes and what there was to see go to seen.json."""
    torch.set_num_threads(1)
    make_world(folder)
    sft = ["sft"]
    seen = {"straight": ended(curriculum, run_folder(folder, "straight"))}
    used = resource.getrusage(resource.RUSAGE_CHILDREN)

    codes, rng = [], random.Random(0)
    while codes.count(-signal.SIGPROF) < kills:  # a run that got through before its kill makes place for another
        place = run_folder(folder, f"killed {len(codes)}")
        while not codes or codes[-1] != 0 or not (place / "sft").exists():
            left = codes.count(-signal.SIGPROF) < kills
            seconds = rng.uniform(0.01, 0.7) * (used.ru_utime + used.ru_stime)
            codes.append(ended(killed_after, place, seconds) if left else ended(curriculum, place))
            spoil_logs(place)
    seen["killed"] = codes

    place = run_folder(folder, "saving")  # 2: the first file is written and has no name yet; 3: it has its name
    seen["saving"] = [ended(killed_while_saving, place, count) for count in (2, 3)] + [ended(curriculum, place, sft)]

    for number in (signal.SIGTERM, signal.SIGINT):
        place = run_folder(folder, number.name)
        code = ended(after_metrics, place, sft, functools.partial(send, number))
        seen[number.name] = [code, (place / "sft" / "checkpoint.safetensors").exists(), ended(curriculum, place, sft)]

    place = run_folder(folder, "full")
    code = ended(after_metrics, place, sft, fill_disk)
    seen["full"] = [code, sorted(path.name for path in (place / "sft").iterdir()), ended(curriculum, place, sft)]

    place = run_folder(folder, "twice")
    first = start(functools.partial(after_metrics, place, sft, lambda run, step: step or time.sleep(5)))
    while not (place / "sft" / "metrics.jsonl").exists():
        time.sleep(0.05)
    second = ended(curriculum, place, sft)
    first.join()
    seen["twice"] = [first.pid, second, first.exitcode]
    (folder / "seen.json").write_text(json.dumps(seen))


# ---- tests --------------------------------------------------------------------------------------------------------------


def same(one, other, stages=STAGES):
    """The same adapters to the last bit, each step once in the metrics with the same values, the same samples."""
    for name in stages:
        first, second = (load_file(folder / name / "adapter.safetensors") for folder in (one, other))
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first), name
        rows = [[json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()] for folder in (one, other)]
        assert [row["step"] for row in rows[1]] == list(range(STEPS)), name
        values = [[(row["loss"], row["grad_norm"], row.get("reward")) for row in each] for each in rows]
        assert values[0] == values[1], name
        assert not [*(other / name).glob("*.part"), *(other / name).glob(".tmp*")]
    if "grpo" in stages:
        assert (one / "grpo" / "samples.txt").read_text() == (other / "grpo" / "samples.txt").read_text()


@pytest.fixture(scope="module")
def driven(tmp_path_factory):
    folder = tmp_path_factory.mktemp("survive")
    command, environment = [sys.executable, __file__, str(folder), "4"], dict(os.environ, OMP_NUM_THREADS="1")
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads((folder / "seen.json").read_text()), done.stdout + done.stderr


def test_kills_at_random_moments(driven):
    """Guards: state that no checkpoint holds, lines that stand twice, a half line that ends like a whole one."""
    folder, seen, log = driven
    assert seen["straight"] == 0 and seen["killed"].count(-signal.SIGPROF) == 4 and {*seen["killed"]} == {-signal.SIGPROF, 0}, log[-3000:]
    for place in folder.glob("killed *"):
        same(folder / "straight", place)


def test_kills_while_saving(driven):
    """Guards: a checkpoint that is half of one, a name without its file, parts that pile up."""
    folder, seen, log = driven
    assert seen["saving"] == [-9, -9, 0], log[-3000:]
    same(folder / "straight", folder / "saving", ["sft"])


@pytest.mark.parametrize("name, status", [("SIGTERM", 143), ("SIGINT", 130)])
def test_signals_finish_the_step_and_save(driven, name, status):
    """Guards: a lost step, an exit status of 0 that lets the next stage start, and a traceback in place of a sentence."""
    folder, seen, log = driven
    assert seen[name] == [status, True, 0], log[-3000:]
    assert f"sft: stopped by {name} after step 2 of 3, checkpoint saved: type the same command to go on" in log
    same(folder / "straight", folder / name, ["sft"])


def test_full_disk(driven):
    """Guards: a good checkpoint that is overwritten by a bad one, and a part that keeps the disk full."""
    folder, seen, log = driven
    assert seen["full"] == [1, ["checkpoint.safetensors", "config.json", "lock", "metrics.jsonl"], 0], log[-3000:]
    assert re.search(r"full/sft/checkpoint.safetensors: cannot be written \(.*\)\. The last checkpoint is as it was: make room", log)
    same(folder / "straight", folder / "full", ["sft"])


def test_second_run_in_one_folder(driven):
    """Guards: two runs that write over each other. (That no lock outlives its process is what the kills above show.)"""
    folder, seen, log = driven
    pid, second, first = seen["twice"]
    assert (second, first) == (1, 0), log[-3000:]
    assert f"twice/sft: process {pid} on " in log and "is training here; wait for it" in log
    same(folder / "straight", folder / "twice", ["sft"])


def test_folder_that_cannot_be_written(tmp_path, monkeypatch):
    """Guards: an hour of training whose first checkpoint then cannot be saved."""
    def read_only(*args):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(trainer.StageError, match=r"run: cannot be written to \(Read-only file system\); make it writable"):
        trainer.lock_folder(tmp_path / "run")


@pytest.mark.parametrize("change", ["records", "base", "sft adapter", "damaged"])
def test_what_a_checkpoint_hangs_on(tmp_path, change):
    """Guards: a stage that goes on from its checkpoint on other data, another base or another SFT, and a damaged file that is taken."""
    parameters = {"x.A": torch.nn.Parameter(torch.ones(3))}
    run = trainer.Run(None, "dpo", tmp_path, None, None, parameters, torch.optim.AdamW(parameters.values()), torch.device("cpu"),
                    made_from={"records": "1", "sft adapter": "2", "base": 1000.0})
    parameters["x.A"].grad = torch.ones(3)
    run.optimiser.step()
    saved = parameters["x.A"].detach().clone()
    trainer.save_checkpoint(run, 4)
    parameters["x.A"].data.zero_()
    run.made_from["base"] *= 1 + 1e-12  # the same weights, summed in another order
    assert trainer.load_checkpoint(run) == 4 and torch.equal(parameters["x.A"], saved)
    if change == "damaged":
        (tmp_path / "checkpoint.safetensors").write_bytes((tmp_path / "checkpoint.safetensors").read_bytes()[:-5])
    else:
        run.made_from[change] = 1000.1 if change == "base" else "other"
    parameters["x.A"].data.zero_()
    told = "cannot be read as a checkpoint" if change == "damaged" else f"another {change} than there is now"
    with pytest.raises(trainer.StageError, match=told):
        trainer.load_checkpoint(run)
    assert not parameters["x.A"].any()  # nothing was loaded


def test_fingerprint_sees_records_and_images(tmp_path):
    """Guards: an answer that was edited, or a picture that was exchanged, between two starts."""
    picture = tmp_path / "a.png"
    picture.write_bytes(b"123")
    make = functools.partial(safer.data.Record, "a", "what?", (str(picture),))
    config = safer.parse_config([])
    before = trainer.fingerprint(config, [], [make(texts={"response": "x"})])
    assert before == trainer.fingerprint(config, [], [make(texts={"response": "x"}, where="elsewhere:1")])
    assert before != trainer.fingerprint(config, [], [make(texts={"response": "y"})])
    picture.write_bytes(b"1234")
    assert before != trainer.fingerprint(config, [], [make(texts={"response": "x"})])


def test_sum_of_frozen_weights():
    """Guards: a float64 copy of a whole embedding, 2.5 GB at 3B, beside the model; a piece that is left out; adapters that are counted."""
    model = torch.nn.ParameterDict({"base": torch.ones(3, 2**24 + 5, dtype=torch.bfloat16), "A": torch.ones(7)})
    model["base"].requires_grad_(False)
    model["base"][2, -1] = 4.0
    total, _, megabytes = bench.counted(lambda: trainer.frozen_sum(model), torch.device("cpu"))
    assert total == 3 * (2**24 + 5) + 3 and megabytes < 1.5 * 8 * 2**24 / 1e6


def test_nothing_is_unpickled():
    """Weights, optimiser and what ranks tell each other: a file or a message that is unpickled can run code."""
    unsafe = re.compile(r"torch\.(load|save)\(|\bnp\.load\(|weights_only|allow_pickle|\b(pickle|dill|joblib|cloudpickle|marshal|shelve)\b"
                        r"|(gather|scatter|broadcast|send|recv)_object")
    lines = [(path.name, line) for path in sorted(ROOT.glob("*.py")) for line in path.read_text().splitlines()]
    assert len(lines) > 1000 and not [place for place in lines if unsafe.search(place[1])]


if __name__ == "__main__":
    drive(Path(sys.argv[1]), int(sys.argv[2]))

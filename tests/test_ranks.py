"""Two and four processes (gloo) against one: the same samples, the same losses and the same adapters; and ranks leave together.

In float64: float32 rounds sums over another split differently, Adam turns the sign of a gradient that is nothing but rounding into a
full step, and a sampled token falls on the other side. In float64 what is left is far below the tolerance, and a mistake is far above.
"""

import functools
import json
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import build  # noqa: E402
import model as modeling  # noqa: E402
import safer  # noqa: E402
import trainer  # noqa: E402
import test_safer  # noqa: E402
from extras import toy_base  # noqa: E402

STAGES = ("sft", "dpo", "grpo")
FLAGS = ["--sft_batch", "4", "--dpo_batch", "4", "--grpo_batch", "8", "--grpo_update_batch", "4", "--grpo_k", "3", "--device", "cpu"]


# ---- processes: forked from one that has imported everything, which costs seconds --------------------------------------


def start(job, rank=0, world=1, port=0):
    """A forked process that runs job() as torchrun would start it; one thread."""
    def child():
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        job()
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def in_world(job, world):
    """Run job() in `world` ranks. Returns their exit codes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [start(job, rank, world, port) for rank in range(world)]
    for process in ranks:
        process.join(300)
        process.kill()  # only if it hangs
    return [process.exitcode for process in ranks]


def make_world(folder):
    """An untrained base model and small data sets."""
    toy_base.train_base(str(folder / "base"), seed=0, steps=2)
    toy_base.build_toy(str(folder / "data"), 0, {"sft": 24, "dpo": 8, "grpo": 24, "eval": 2})


def run_folder(folder, name):
    """A fresh run on the world in `folder`."""
    (folder / name).mkdir()
    for part in ("base", "data"):
        (folder / name / part).symlink_to(folder / part)
    return folder / name


def train(folder, steps, stages=STAGES):
    """The stages, `steps` steps each; GRPO samples short responses."""
    safer.make_judge = lambda config: test_safer.HashJudge(fail_every=3)
    for name in stages:
        longest = 20 if name == "grpo" else 160
        counts = [word for each in STAGES for word in (f"--{each}_steps", str(steps))]
        safer.main([name, "--out", str(folder), *FLAGS, "--max_response", str(longest), *counts])


# ---- what runs in the ranks ---------------------------------------------------------------------------------------------


def everything_float64():
    """Weights, adapters, losses and optimiser in float64."""
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    load = modeling.load_model
    modeling.load_model = lambda folder, dtype, device: load(folder, torch.float64, device)


def train_signalled(folder, steps):
    """In step 1 a SIGTERM comes to the last rank alone."""
    write = trainer.write_metrics

    def signalled(run, step, **extra):
        if step == 1 and run.rank == run.world - 1:
            os.kill(os.getpid(), 15)
        return write(run, step, **extra)

    safer.write_metrics = signalled
    train(folder, steps)


def bare_run():
    """A run without model: what the functions that talk to other ranks need."""
    config = safer.parse_config(["--sft_warmup", "0"])
    rank, world = trainer.join_ranks(torch.device("cpu"))
    parameters = {"x": torch.nn.Parameter(torch.zeros(2))}
    optimiser = torch.optim.SGD(parameters.values(), lr=0.1)
    return trainer.Run(config, "sft", Path("."), None, None, parameters, optimiser, torch.device("cpu"), rank, world, checked=True)


def talk():
    """Values of unequal length, and none."""
    run = bare_run()
    mine = {f"name {run.rank}" * run.rank: [run.rank, None, float("inf"), 0.1]} if run.rank else {}
    assert trainer.gather(run, mine) == [{}] + [{f"name {rank}" * rank: [rank, None, float("inf"), 0.1]} for rank in range(1, run.world)]


def spoil():
    """The last rank's second micro-batch has a loss of NaN."""
    run = bare_run()
    for number in range(2):
        factor = float("nan") if run.rank == run.world - 1 and number == 1 else 1.0
        loss = (run.parameters["x"] * factor).sum()
        loss.backward()
        trainer.check_finite(run, 7, loss, [f"record-{run.rank}-{number}"])
    told = rf"gradient norm of step 7 is nan, from records record-{run.world - 1}-1 \(loss nan in step 7\); the last checkpoint"
    with pytest.raises(trainer.StageError, match=told):
        trainer.optimiser_step(run, 7, 10)


def drive(folder, steps):
    """All of it, in forked processes; the exit codes go to codes.json."""
    torch.set_num_threads(1)
    make_world(folder)
    everything_float64()
    codes = {}
    for world in (1, 2, 4):
        codes[f"world {world}"] = in_world(functools.partial(train, run_folder(folder, f"world {world}"), steps), world)
    stopped = run_folder(folder, "stopped")
    codes["stopped"] = in_world(functools.partial(train_signalled, stopped, steps), 2)
    codes["resumed"] = in_world(functools.partial(train, stopped, steps), 1)
    codes["talk"], codes["spoil"] = in_world(talk, 3), in_world(spoil, 2)
    (folder / "codes.json").write_text(json.dumps(codes))


# ---- tests --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def driven(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    command, environment = [sys.executable, __file__, str(folder), "3"], dict(os.environ, OMP_NUM_THREADS="1")
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads((folder / "codes.json").read_text()), done.stdout + done.stderr


def compare(one, many):
    """The largest differences of losses and gradient norms, and the relative one of the adapters, for each stage."""
    told = {}
    for name in STAGES:
        rows = [[json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()] for folder in (one, many)]
        assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]] == list(range(len(rows[0])))
        if name == "grpo":  # the same samples: counts agree exactly
            assert all([row[key] for row in rows[0]] == [row[key] for row in rows[1]] for key in ("unscored", "length", "zero_spread"))
        first, second = (load_file(folder / name / "adapter.safetensors") for folder in (one, many))
        size = sum(tensor.square().sum() for tensor in first.values()).sqrt()
        told[name] = {key: max(abs(a[key] - b[key]) / max(1.0, abs(a[key])) for a, b in zip(*rows)) for key in ("loss", "grad_norm")}
        told[name]["adapter"] = float(sum((first[key] - second[key]).square().sum() for key in first).sqrt() / size)
    return told


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_equal_one(driven, world):
    """Guards: means of means over ranks, groups that are split, and ranks that reduce different quantities where a judge failed."""
    folder, codes, log = driven
    assert codes["world 1"] == [0] and codes[f"world {world}"] == [0] * world, log[-3000:]
    for name, differences in compare(folder / "world 1", folder / f"world {world}").items():
        assert max(differences.values()) < 1e-5, (name, differences)


def test_a_signal_to_one_rank_stops_all(driven):
    """Guards: ranks that wait for one that has left. The checkpoint of two ranks then goes on in one, to the same end."""
    folder, codes, log = driven
    assert codes["stopped"] == [143, 143] and codes["resumed"] == [0], log[-3000:]
    assert "stopped by SIGTERM after step 2 of 3, checkpoint saved" in log
    for name, differences in compare(folder / "world 1", folder / "stopped").items():
        assert max(differences.values()) < 1e-5, (name, differences)


def test_ranks_talk_and_fail_together(driven):
    """Guards: names that only some ranks have; a rank that raises alone while the others wait; a message that does not name the records."""
    _, codes, log = driven
    assert codes["talk"] == [0] * 3 and codes["spoil"] == [0] * 2, log[-3000:]


if __name__ == "__main__":
    drive(Path(sys.argv[1]), int(sys.argv[2]))

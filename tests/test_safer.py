"""The whole curriculum, shortened: base, SFT, DPO, GRPO and evaluation on a model that has seen three steps of training."""

import collections
import hashlib
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

import build
import eval as evaluation
import judge
import rollout
import safer
import trainer
from extras import toy_base
from config import ConfigError

SIZES = {"sft": 24, "dpo": 6, "grpo": 8, "eval": 12}
FLAGS = ["--sft_batch", "4", "--dpo_batch", "4", "--grpo_batch", "4", "--grpo_update_batch", "4", "--grpo_k", "3", "--rollout_rows", "8"]


class HashJudge:
    """Scores that depend on the text alone, so that untrained samples earn different rewards; every fifth has none."""

    def __init__(self, fail_every=5):
        self.counts, self.fail_every = collections.Counter(), fail_every

    def score(self, cases):
        numbers = [int(hashlib.sha256(case.response.encode()).hexdigest(), 16) for case in cases]
        self.counts["asked"] += len(cases)
        return [None if self.fail_every and n % self.fail_every == 0 else judge.Scores(1 + n % 10, 9, 1 + n // 10 % 10, 5) for n in numbers]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Base model and data sets of a very small world."""
    folder = tmp_path_factory.mktemp("world")
    toy_base.train_base(str(folder / "base"), seed=0, steps=3)
    toy_base.build_toy(str(folder / "data"), 0, SIZES)
    return folder


@pytest.fixture
def run_folder(world, tmp_path):
    """A fresh run on that world."""
    for name in ("base", "data"):
        (tmp_path / name).symlink_to(world / name)
    return tmp_path


def train(folder, name, *flags):
    safer.main([name, "--out", str(folder), *FLAGS, *flags])


def metrics(folder, name):
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def test_end_to_end(run_folder, monkeypatch, capsys):
    """Base -> SFT -> DPO -> GRPO -> table. Guards the seams: merged adapters, step-0 values, one row a stage, nothing dropped."""
    monkeypatch.setattr(safer, "make_judge", lambda config: HashJudge())
    train(run_folder, "sft", "--max_steps", "3")
    train(run_folder, "dpo", "--max_steps", "2")
    train(run_folder, "grpo", "--max_steps", "2", "--max_response", "24")
    assert [row["step"] for row in metrics(run_folder, "sft")] == [0, 1, 2]
    assert metrics(run_folder, "dpo")[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)  # SFT was merged: reference = policy
    first = metrics(run_folder, "grpo")[0]
    assert first["kl"] == pytest.approx(0, abs=1e-6) and first["sampler_diff"] < 1e-5
    assert first["unscored"] > 0 and first["reward"] is not None and first["grad_norm"] > 0
    assert "reward" in (run_folder / "grpo" / "samples.txt").read_text()
    base = load_file(run_folder / "sft" / "adapter.safetensors")
    assert all(tensor.any() for name, tensor in base.items() if name.endswith(".B"))
    monkeypatch.undo()
    capsys.readouterr()
    evaluation.main(["--out", str(run_folder), "--max_response", "24", "--eval_bootstrap", "20"])
    table = capsys.readouterr().out
    assert [line.split(" | ")[0] for line in table.splitlines() if line.startswith(("| base", "| sft", "| dpo", "| grpo"))][:4] == ["| base", "| sft", "| dpo", "| grpo"]
    results = json.loads((run_folder / "results.json").read_text())
    assert [row["n"] for row in results if row["kind"] == "all"] == [SIZES["eval"]] * 8
    for name in ("base", "sft", "dpo", "grpo"):
        assert len((run_folder / "eval" / f"{name}-generic.jsonl").read_text().splitlines()) == SIZES["eval"]


@pytest.mark.parametrize("name", ["sft", "grpo"])
def test_resume_equals_not_stopping(run_folder, tmp_path, monkeypatch, name):
    """Interrupted after any step, the same command ends with the same adapter to the last bit and each step once in the metrics."""
    monkeypatch.setattr(safer, "make_judge", lambda config: HashJudge())
    flags = ["--stages", name, "--max_steps", "4"] + (["--grpo_steps", "4", "--max_response", "16"] if name == "grpo" else [])
    train(run_folder, name, *flags)
    straight = load_file(run_folder / name / "adapter.safetensors")
    rows = metrics(run_folder, name)
    shutil.rmtree(run_folder / name)
    monkeypatch.setattr(trainer, "SAVE_EVERY", 2)
    calls, step = [], trainer.optimiser_step

    def dies(run, number, steps):
        calls.append(number)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(run, number, steps)

    monkeypatch.setattr(safer, "optimiser_step", dies)
    with pytest.raises(KeyboardInterrupt):
        train(run_folder, name, *flags)
    train(run_folder, name, *flags)
    resumed = load_file(run_folder / name / "adapter.safetensors")
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)
    again = metrics(run_folder, name)
    assert [row["step"] for row in again] == [0, 1, 2, 3] and [row["loss"] for row in again] == [row["loss"] for row in rows]


def test_memory_settings_change_nothing(run_folder):
    """Micro-batches, chunks, checkpointing and shared prefixes are about memory and time: the loss curve stays."""
    curves = []
    for flags in ([], ["--micro_tokens", "300", "--logprob_chunk", "16", "--checkpointing", "1", "--shared_prefix", "0"]):
        train(run_folder, "dpo", "--stages", "dpo", "--max_steps", "3", "--dpo_lr", "1e-2", *flags)
        curves.append([row["loss"] for row in metrics(run_folder, "dpo")])
        shutil.rmtree(run_folder / "dpo")
    assert curves[0] == pytest.approx(curves[1], rel=1e-4) and curves[0][2] != pytest.approx(curves[0][0], rel=1e-3)


def test_judge_that_dies_leaves_a_checkpoint(run_folder, monkeypatch):
    """JudgeError in step 2 stops the run, after saving the two steps that are done; nothing is scored in its place."""

    class Dying(HashJudge):
        def score(self, cases):
            if self.counts["asked"] >= 24:
                raise judge.JudgeError("the judge is gone")
            return super().score(cases)

    monkeypatch.setattr(safer, "make_judge", lambda config: Dying())
    with pytest.raises(judge.JudgeError):
        train(run_folder, "grpo", "--stages", "grpo", "--grpo_steps", "4", "--max_response", "16")
    assert (run_folder / "grpo" / "checkpoint.safetensors").exists() and len(metrics(run_folder, "grpo")) == 2


def test_checks_stop_the_run(run_folder, monkeypatch):
    """A gradient that is not finite, sampler log-probabilities that are not the trainer's, samples that are all equal: each stops with a message."""
    monkeypatch.setattr(safer, "make_judge", lambda config: HashJudge())
    with pytest.raises(trainer.StageError, match="gradient norm"):
        train(run_folder, "sft", "--stages", "sft", "--max_steps", "3", "--sft_lr", "1e30", "--sft_warmup", "0")
    sample, flags = rollout.sample, ["--stages", "grpo", "--max_steps", "1", "--max_response", "16"]

    def wrong(*args, **kwargs):
        return [[rollout.Sample(s.tokens, [x + 0.01 for x in s.logprobs], s.finished) for s in row] for row in sample(*args, **kwargs)]

    monkeypatch.setattr(rollout, "sample", wrong)
    with pytest.raises(trainer.StageError, match="sampler and trainer"):
        train(run_folder, "grpo", *flags)
    monkeypatch.setattr(rollout, "sample", lambda *args, **kwargs: [[row[0]] * 3 for row in sample(*args, **kwargs)])
    with pytest.raises(trainer.StageError, match="all samples of every prompt are equal"):
        train(run_folder, "grpo", *flags)


def test_finished_stage_is_skipped_and_guarded(run_folder, capsys):
    """The same command skips a finished stage; other settings on the same folder are refused instead of mixed."""
    train(run_folder, "sft", "--max_steps", "1")
    train(run_folder, "sft", "--max_steps", "1")
    assert "finished already" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="sft_lr was"):
        train(run_folder, "sft", "--max_steps", "1", "--sft_lr", "1e-3")
    with pytest.raises(trainer.StageError, match="dpo"):  # GRPO builds on DPO, which is not there
        train(run_folder, "grpo", "--max_steps", "1")


def test_step_order_is_stateless():
    """Every record once an epoch, in an order that depends on seed and epoch alone, also where an epoch ends inside a batch."""
    records = list(range(10))
    seen = [item for step in range(5) for item in trainer.batch_at(records, step, 4, seed=1)]
    assert sorted(record for record, epoch in seen if epoch == 0) == records and sorted(record for record, epoch in seen if epoch == 1) == records
    assert seen[4:8] == trainer.batch_at(records, 1, 4, seed=1) and seen[:4] != trainer.batch_at(records, 0, 4, seed=2)


def test_learning_rate():
    """Warm-up by hand: 10 steps, 20% warm-up, then half a cosine."""
    config = safer.parse_config(["--sft_lr", "1", "--sft_warmup", "0.2", "--sft_schedule", "cosine"])
    rates = [trainer.learning_rate(config, "sft", step, 10) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[6] == pytest.approx(0.5) and rates[9] == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))

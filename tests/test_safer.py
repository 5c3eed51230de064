"""The curriculum, shortened: base, SFT, DPO, GRPO, evaluation on a model that has seen three steps;
its order, schedule, checks, and that a stage goes on where it was."""

import collections
import hashlib
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import eval as evaluation  # noqa: E402
import rollout  # noqa: E402
import safer  # noqa: E402
import trainer  # noqa: E402
from config import ConfigError, parse_config  # noqa: E402
from extras import toy_base  # noqa: E402
from judge import JudgeError, Scores  # noqa: E402

SIZES = {"sft": 24, "dpo": 6, "grpo": 8, "eval": 12}
FLAGS = (
    "--sft_batch 4 --dpo_batch 4 --grpo_batch 4 --grpo_update_batch 4 --grpo_k 3 --rollout_rows 8"
    " --device cpu".split()
)
GRPO = "--stages grpo --max_response 16".split()


class HashJudge:
    """Scores that depend on the text alone, so that untrained samples earn different rewards; one
    in `fail_every` has none."""

    def __init__(self, fail_every=5):
        self.counts = collections.Counter()
        self.fail_every = fail_every

    def score(self, cases):
        self.counts["answered"] += len(cases)
        scores = []
        for case in cases:
            n = int(hashlib.sha256(case.check.text.encode()).hexdigest(), 16)
            scores.append(
                Scores(1 + n % 10, 9, 1 + n // 10 % 10, 5) if n % self.fail_every else None
            )
        return scores


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Base model and data sets of a very small world."""
    folder = tmp_path_factory.mktemp("world")
    toy_base.train_base(str(folder / "base"), seed=0, steps=3)
    toy_base.build_toy(str(folder / "data"), 0, SIZES)
    return folder


@pytest.fixture
def run_folder(world, tmp_path, monkeypatch):
    """A fresh run on that world, judged by HashJudge."""
    for name in ("base", "data"):
        (tmp_path / name).symlink_to(world / name)
    monkeypatch.setattr(safer, "make_judge", lambda config: HashJudge())
    return tmp_path


def train(folder, name, *flags):
    safer.main([name, "--out", str(folder), *FLAGS, *flags])


def metrics(folder, name):
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def test_end_to_end(run_folder, monkeypatch, capsys):
    """Base -> SFT -> DPO -> GRPO -> results. Guards the seams: merged adapters, step-0 values, one
    row a stage, nothing dropped."""
    train(run_folder, "sft", "--max_steps", "3")
    train(run_folder, "dpo", "--max_steps", "2")
    train(run_folder, "grpo", "--max_steps", "2", "--max_response", "24")
    assert [row["step"] for row in metrics(run_folder, "sft")] == [0, 1, 2]
    first = metrics(run_folder, "dpo")[0]  # SFT was merged: reference = policy
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4) and first["margin"] == 0
    first = metrics(run_folder, "grpo")[0]
    assert first["kl"] == pytest.approx(0, abs=1e-6) and first["sampler_diff"] < 1e-5
    assert first["unscored"] > 0 and first["reward"] is not None and first["grad_norm"] > 0
    assert first["judge_counts"] == {"answered": 12}
    assert "reward" in (run_folder / "grpo" / "samples.txt").read_text()
    adapter = load_file(run_folder / "sft" / "adapter.safetensors")
    assert all(tensor.any() for name, tensor in adapter.items() if name.endswith(".B"))
    config, stages = trainer.read_run(run_folder)
    assert (config.max_response, config.out, stages) == (
        24,
        str(run_folder),
        ["sft", "dpo", "grpo"],
    )
    monkeypatch.undo()
    evaluation.main(["--out", str(run_folder), "--max_response", "24", "--device", "cpu"])
    results = json.loads((run_folder / "results.json").read_text())
    rows = [row for row in results if row["kind"] == "all" and row["prompt"] == "generic"]
    assert {row["stage"]: row["n"] for row in rows} == dict.fromkeys(
        ("base", "sft", "dpo", "grpo"), SIZES["eval"]
    )


def test_the_base_does_not_change(run_folder):
    """Guards: a step that trains anything but A and B, or leaves an adapter without gradient."""
    records = safer.read_records(run_folder / "data" / "sft.jsonl", "sft")
    config = parse_config(["--out", str(run_folder), *FLAGS, "--max_steps", "1", "--stages", "sft"])
    run = trainer.open_run(config, "sft", records)
    before = {name: value.detach().clone() for name, value in run.model.named_parameters()}
    safer.train_sft(run, records)
    changed = set()
    for name, value in run.model.named_parameters():
        if not torch.equal(before[name], value):
            changed.add(name)
    assert changed == {name for name in run.parameters if name.endswith(".B")}  # A follows later


@pytest.mark.parametrize("name", ["sft", "grpo"])
def test_resume_equals_not_stopping(run_folder, monkeypatch, name):
    """Interrupted after any step, the same command ends with the same adapter to the last bit and
    each step once in the metrics."""
    flags = ["--stages", name, "--max_steps", "4", "--grpo_steps", "4"]
    flags += ["--max_response", "16"] if name == "grpo" else []
    train(run_folder, name, *flags)
    straight = load_file(run_folder / name / "adapter.safetensors")
    rows = metrics(run_folder, name)
    shutil.rmtree(run_folder / name)
    monkeypatch.setattr(trainer, "SAVE_EVERY", 2)
    calls = []
    step = trainer.optimizer_step

    def dies(run, number, steps):
        calls.append(number)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(run, number, steps)

    monkeypatch.setattr(safer, "optimizer_step", dies)
    with pytest.raises(KeyboardInterrupt):
        train(run_folder, name, *flags)
    train(run_folder, name, *flags)
    resumed = load_file(run_folder / name / "adapter.safetensors")
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)
    again = metrics(run_folder, name)
    assert [row["step"] for row in again] == [0, 1, 2, 3]
    assert [row["loss"] for row in again] == [row["loss"] for row in rows]


@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_memory_settings_change_nothing(run_folder, name):
    """Micro-batches and checkpointing are about memory and time: the loss curve stays."""
    curves = []
    for flags in ([], ["--micro_tokens", "300", "--checkpointing", "1"]):
        lengths = GRPO[2:] if name == "grpo" else []
        rates = ["--dpo_lr", "1e-2", "--grpo_lr", "1e-4"]
        train(run_folder, name, "--stages", name, "--max_steps", "3", *rates, *lengths, *flags)
        curves.append([row["loss"] for row in metrics(run_folder, name)])
        shutil.rmtree(run_folder / name)
    assert curves[0] == pytest.approx(curves[1], rel=1e-3, abs=1e-5)
    assert curves[0][-1] != pytest.approx(curves[0][0], rel=1e-3)


def test_judge_that_dies_leaves_a_checkpoint(run_folder, monkeypatch):
    """JudgeError in step 2 stops the run, after saving the two steps that are done; nothing is
    scored in its place, and nothing of the third step is logged."""

    class Dying(HashJudge):
        def score(self, cases):
            if self.counts["answered"] >= 24:
                raise JudgeError("the judge is gone")
            return super().score(cases)

    monkeypatch.setattr(safer, "make_judge", lambda config: Dying())
    with pytest.raises(JudgeError):
        train(run_folder, "grpo", *GRPO, "--grpo_steps", "4")
    assert (run_folder / "grpo" / "checkpoint.safetensors").exists()
    assert len(metrics(run_folder, "grpo")) == 2
    monkeypatch.setattr(safer, "make_judge", lambda config: HashJudge())
    train(run_folder, "grpo", *GRPO, "--grpo_steps", "4")
    assert [row["step"] for row in metrics(run_folder, "grpo")] == [0, 1, 2, 3]
    samples = (run_folder / "grpo" / "samples.txt").read_text()
    assert [samples.count(f"== step {step},") for step in range(4)] == [4] * 4


def test_checks_stop_the_run(run_folder, monkeypatch, capsys):
    """A gradient that is not finite, sampler log-probabilities that are not the trainer's, a
    reference that is not the policy: each stops with a message."""
    with pytest.raises(trainer.StageError, match="gradient norm of step 1 is nan"):
        flags = "--max_steps 3 --sft_lr 1e30 --warmup 0".split()
        train(run_folder, "sft", "--stages", "sft", *flags)
    assert "sft: the loss is nan, of records sft-" in capsys.readouterr().out
    sample = rollout.sample

    def wrong(*args, **kwargs):
        groups = []
        for group in sample(*args, **kwargs):
            groups.append([])
            for one in group:
                logprobs = [x + 0.01 for x in one.logprobs]
                groups[-1].append(rollout.Sample(one.tokens, logprobs, one.finished))
        return groups

    monkeypatch.setattr(rollout, "sample", wrong)
    with pytest.raises(trainer.StageError, match="sampler and trainer"):
        train(run_folder, "grpo", *GRPO, "--max_steps", "1")
    attach = trainer.model.attach_lora

    def not_at_zero(model, *args):
        attach(model, *args)
        for name, parameter in trainer.model.lora_parameters(model).items():
            parameter.data.add_(0.05 if name.endswith(".B") else 0)

    monkeypatch.undo()
    monkeypatch.setattr(trainer.model, "attach_lora", not_at_zero)
    with pytest.raises(trainer.StageError, match="not ln 2"):
        train(run_folder, "dpo", "--stages", "dpo", "--max_steps", "1")


def test_finished_stage_is_skipped_and_guarded(run_folder, capsys):
    """The same command skips a finished stage; other settings on the same folder are refused
    instead of mixed; a stage wants those before it."""
    train(run_folder, "sft", "--max_steps", "1")
    train(run_folder, "sft", "--max_steps", "1")
    assert "finished already" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="sft_lr was"):
        train(run_folder, "sft", "--max_steps", "1", "--sft_lr", "1e-3")
    with pytest.raises(trainer.StageError, match="dpo/adapter.safetensors is missing"):
        train(run_folder, "grpo", "--max_steps", "1")
    with pytest.raises(ConfigError, match="usage"):
        safer.main(["chat"])


def test_step_order_is_stateless():
    """Every record once an epoch, in an order that depends on seed and epoch alone, also where an
    epoch ends inside a batch."""
    records = list(range(10))
    seen = [item for step in range(5) for item in trainer.batch_at(records, step, 4, seed=1)]
    for epoch in (0, 1):
        assert sorted(record for record, when in seen if when == epoch) == records
    assert seen[4:8] == trainer.batch_at(records, 1, 4, seed=1)
    assert seen[:4] != trainer.batch_at(records, 0, 4, seed=2)


def test_learning_rate_and_steps():
    """By hand: 10 steps, 20% warm-up, then half a cosine; a constant schedule has no warm-up."""
    config = parse_config(["--sft_lr", "1", "--warmup", "0.2"])
    rates = [trainer.learning_rate(config, "sft", step, 10) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[6] == pytest.approx(0.5)
    assert rates[9] == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))
    config = parse_config("--grpo_lr 1 --grpo_schedule constant --warmup 0.2".split())
    assert [trainer.learning_rate(config, "grpo", step, 10) for step in (0, 9)] == [1, 1]
    config = parse_config("--sft_epochs 1.5 --sft_batch 4 --grpo_steps 7 --max_steps 6".split())
    assert trainer.stage_steps(config, "sft", 9) == 4  # 13.5 records
    assert trainer.stage_steps(config, "grpo", 9) == 6

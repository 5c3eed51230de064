"""The curriculum, shortened: base, SFT, DPO, GRPO, evaluation on a model that has seen three steps;
its order, schedule, checks, and that a stage goes on where it was."""

import json
import math
import os
import shutil
import signal

import pytest
from safetensors.torch import load_file
from tiny_run import FLAGS, SIZES, STAGES, HashJudge, metrics, place, same, train

import eval as evaluation
import rollout
import safer
import trainer
from config import ConfigError, parse_config, write_text
from judge import JudgeError

SHORT = "--stages grpo --max_response 16".split()


def opened(folder, stage, *flags):
    """(run, records) of a stage before its first step."""
    records = safer.read_records(folder / "data" / f"{stage}.jsonl", stage)
    config = parse_config(["--out", str(folder), *FLAGS, *flags])
    return trainer.open_run(config, stage, records), records


def test_end_to_end(run_folder, monkeypatch):
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
    adapter = load_file(run_folder / "sft" / "adapter.safetensors")
    assert all(tensor.any() for name, tensor in adapter.items() if name.endswith(".B"))
    config, stages = trainer.read_run(run_folder)
    assert config.max_response == 24 and tuple(stages) == STAGES
    monkeypatch.undo()
    evaluation.main(["--out", str(run_folder), "--max_response", "24", "--device", "cpu"])
    counts = {}
    for row in json.loads((run_folder / "results.json").read_text()):
        if row["kind"] == "all" and row["prompt"] == "generic":
            counts[row["stage"]] = row["n"]
    assert counts == dict.fromkeys(("base", *STAGES), SIZES["eval"])


def test_the_base_does_not_change(run_folder):
    """Guards: a step that trains anything but A and B, or leaves an adapter without gradient."""
    run, records = opened(run_folder, "sft", "--max_steps", "1")
    before = {name: value.detach().clone() for name, value in run.model.named_parameters()}
    safer.train_sft(run, records)
    now = run.model.named_parameters()
    changed = {name for name, value in now if not before[name].equal(value)}
    assert changed == {name for name in run.parameters if name.endswith(".B")}  # A follows later


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_and_saves(run_folder, monkeypatch, capsys, number, status):
    """The same command then ends at the same bits. Guards: a lost step, an exit status of 0 that
    lets the next stage start."""
    straight = place(run_folder, run_folder / "straight")
    train(straight, "sft", "--max_steps", "4")
    write = trainer.write_metrics

    def signalled(run, step, **values):
        write(run, step, **values)
        if step == 1:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(safer, "write_metrics", signalled)
        with pytest.raises(SystemExit) as leaving:
            train(run_folder, "sft", "--max_steps", "4")
    assert leaving.value.code == status
    assert "stopped after step 2 of 4; the same command goes on" in capsys.readouterr().out
    train(run_folder, "sft", "--max_steps", "4")
    same(straight, run_folder, ["sft"])


def test_judge_that_dies_leaves_a_checkpoint(run_folder, monkeypatch):
    """JudgeError in step 2 stops the run, after saving the two steps that are done; nothing is
    scored in its place, nothing of the third step is logged, and the same command goes on."""
    straight = place(run_folder, run_folder / "straight")
    train(straight, "grpo", *SHORT, "--grpo_steps", "4")
    with monkeypatch.context() as patch:
        patch.setattr(safer, "make_judge", lambda config: HashJudge(calls=2))
        with pytest.raises(JudgeError):
            train(run_folder, "grpo", *SHORT, "--grpo_steps", "4")
    assert (run_folder / "grpo" / "checkpoint.safetensors").exists()
    assert len(metrics(run_folder, "grpo")) == 2
    train(run_folder, "grpo", *SHORT, "--grpo_steps", "4")
    same(straight, run_folder, ["grpo"])
    samples = (run_folder / "grpo" / "samples.txt").read_text()
    assert [samples.count(f"== step {step},") for step in range(4)] == [4] * 4


@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_memory_settings_change_nothing(run_folder, name):
    """Micro-batches and checkpointing are about memory and time: the loss curve stays."""
    curves = []
    flags = f"--stages {name} --max_steps 3 --dpo_lr 1e-2 --grpo_lr 1e-4".split()
    flags += SHORT[2:] if name == "grpo" else []
    for saving in ([], ["--micro_tokens", "300", "--checkpointing", "1"]):
        train(run_folder, name, *flags, *saving)
        curves.append([row["loss"] for row in metrics(run_folder, name)])
        shutil.rmtree(run_folder / name)
    assert curves[0] == pytest.approx(curves[1], rel=1e-3, abs=1e-5)
    assert curves[0][-1] != pytest.approx(curves[0][0], rel=1e-3)


def test_checks_stop_the_run(run_folder, monkeypatch, capsys):
    """A gradient that is not finite, sampler log-probabilities that are not the trainer's, a
    reference that is not the policy: each stops with a message."""
    with pytest.raises(trainer.StageError, match="gradient norm of step 1 is nan"):
        train(run_folder, "sft", *"--stages sft --max_steps 3 --sft_lr 1e30 --warmup 0".split())
    assert "sft: the loss is nan, of records sft-" in capsys.readouterr().out
    sample = rollout.sample

    def wrong(*args, **kwargs):
        for row in sample(*args, **kwargs):
            row[2].logprobs = [value + 0.01 for value in row[2].logprobs]
            yield row

    with monkeypatch.context() as patch:
        patch.setattr(rollout, "sample", wrong)
        with pytest.raises(trainer.StageError, match="sampler and trainer"):
            train(run_folder, "grpo", *SHORT, "--max_steps", "1")
    attach = trainer.model.attach_lora

    def not_at_zero(model, *args):
        attach(model, *args)
        for parameter in trainer.model.lora_parameters(model).values():
            parameter.data.add_(0.05)

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


def test_inputs_that_changed(run_folder, monkeypatch):
    """Guards: a stage that goes on with other data, another base, another SFT or half a file."""
    train(run_folder, "sft")
    run, records = opened(run_folder, "dpo")
    with pytest.raises(ConfigError, match="records was"):
        trainer.open_run(run.config, "dpo", records[1:])
    (run.folder / "checkpoint.safetensors").write_bytes(b"damaged")
    with pytest.raises(trainer.model.ModelError, match="checkpoint.safetensors: damaged"):
        opened(run_folder, "dpo")
    assert opened(run_folder, "dpo", "--resume", "0")[0].first_step == 0
    load = trainer.model.load_model

    def other(*args):
        policy = load(*args)
        policy.lm_head.weight *= 1.001
        return policy

    with monkeypatch.context() as patch:
        patch.setattr(trainer.model, "load_model", other)
        for stage in ("sft", "dpo"):  # DPO on an SFT that was trained on another base
            with pytest.raises(ConfigError, match="base was"):
                opened(run_folder, stage)
    trainer.save_adapter(run.model, run_folder / "sft" / "adapter.safetensors", {})
    with pytest.raises(ConfigError, match="sft adapter was"):
        opened(run_folder, "dpo")


@pytest.mark.parametrize("text", ["", '{"settings": []}', '{"settings": {"x": 1}}'])
def test_a_run_with_damaged_settings(tmp_path, text):
    """Guards: a traceback of export, chat or report for a config.json that was cut or edited."""
    for name, content in (("adapter.safetensors", ""), ("config.json", text)):
        write_text(tmp_path / "sft" / name, content)
    with pytest.raises(trainer.StageError, match="config.json: damaged"):
        trainer.read_run(tmp_path)


def test_step_order_is_stateless():
    """Every record once an epoch, in an order that depends on seed and epoch alone, also where an
    epoch ends inside a batch."""
    records = list(range(10))
    seen = [item for step in range(5) for item in trainer.batch_at(records, step, 4, seed=1)]
    for epoch in (0, 1):
        assert sorted(record for record, when in seen if when == epoch) == records
    assert seen[:4] != trainer.batch_at(records, 0, 4, seed=2)


def test_learning_rate_and_steps():
    """By hand: 10 steps, 20% warm-up, then half a cosine; a constant schedule has no warm-up."""
    config = parse_config("--sft_lr 1 --warmup 0.2 --sft_epochs 1.5 --sft_batch 4".split())
    rates = [trainer.learning_rate(config, "sft", step, 10) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[6] == pytest.approx(0.5)
    assert rates[9] == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))
    assert trainer.stage_steps(config, "sft", 9) == 4  # 13.5 records
    config = parse_config("--grpo_lr 1 --grpo_schedule constant --grpo_steps 7".split())
    assert [trainer.learning_rate(config, "grpo", step, 10) for step in (0, 9)] == [1, 1]
    assert trainer.stage_steps(config, "grpo", 9) == 7

"""Preflight: estimates by hand, and all that is missing is reported at once."""

import json
import sys
from pathlib import Path

import PIL.Image
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from config import parse_config  # noqa: E402
from extras import preflight, toy_base  # noqa: E402


def test_memory_by_hand():
    """Guards: a part that is left out of the peak, or one that does not grow with its flag."""
    shapes = toy_base.qwen_config("3b")
    config = parse_config(["--recipe", "3b"])
    training, sampling, peak = preflight.memory(shapes, config, "grpo")
    cache = 36 * 2 * 256 * 2 * (4096 + 2048)  # keys and values of a row, bfloat16
    assert sampling == 64 * (cache + 20 * 151936)
    layer = 2 * (2048 + 2048) + 2 * (2048 + 256) + 3 * (2048 + 11008)
    adapters = 16 * 64 * 36 * layer  # A, B, gradients, two moments
    assert peak == 2 * 3_754_622_976 + adapters + sampling  # weights in bfloat16
    plain = parse_config(["--recipe", "3b", "--checkpointing", "0"])
    assert preflight.memory(shapes, plain, "grpo")[0] > 10 * training
    assert preflight.memory(shapes, config, "sft")[1] == 0
    assert preflight.memory(shapes, config, "eval")[0] == 0


def test_hours_by_hand():
    """Guards: a part that is left out, or counted for one model or prompt mode only."""
    shapes = toy_base.qwen_config("3b")
    config = parse_config(["--recipe", "3b"])
    weights, second = 3_754_622_976, 989e12 / 3
    look = 32 * (4 * 1280 + 3 * 3420) * 1280 * 524288 / 196  # a picture of 524,288 pixels

    def found(stage, gpus):
        return 3600 * preflight.hours(shapes, config, stage, 6400, gpus)

    work = 2 * 6400 * config.sft_epochs * (weights * 3 * (2048 + 512) + look)
    assert found("sft", 1) == pytest.approx(work / second)
    assert found("sft", 8) == pytest.approx(work / second / 8)
    k = config.grpo_k
    rollouts = preflight.stage_steps(config, "grpo", 6400)
    prompts = rollouts * config.grpo_batch
    work = 2 * prompts * (weights * (4 * (2048 + k * 512) + 2048) + look)
    steps = prompts * k * 512 / config.rollout_rows / 8 + rollouts * (2048 - 512)
    expected = work / second / 8 + steps * 2 * weights / (3.35e12 / 3)
    assert found("grpo", 8) == pytest.approx(expected)
    work = 2 * (8 * 6400 * weights * 2048 + 6400 * look)  # four models, two prompt modes
    steps = 8 * 6400 * 512 / config.rollout_rows + 8 * (2048 - 512)
    expected = work / second + steps * 2 * weights / (3.35e12 / 3)
    assert found("eval", 1) == pytest.approx(expected)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A place with a model folder without weights, data without an eval set, and no judge."""
    toy_base.make_tokenizer(tmp_path / "model")
    config = toy_base.qwen_config("tiny")
    config.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    PIL.Image.new("RGB", (56, 56)).save(tmp_path / "data" / "a.png")
    plan = {"persona": "helper", "tools": ["VISUAL-SCAN", "INTENT-RADAR", "SAFETY-GATE"]}
    row = {"id": "1", "images": ["a.png"], "question": "what is it?"}
    row["plan"] = plan | {"topology": "linear"}
    extra = {"sft": {"response": "x"}, "dpo": {"chosen": "a", "rejected": "b", "perturbation": "c"}}
    for name in ("sft", "dpo", "grpo"):
        line = json.dumps(row | extra.get(name, {}))
        (tmp_path / "data" / f"{name}.jsonl").write_text(line + "\n")
    for name in ("JUDGE_URL", "JUDGE_MODEL"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def run(folder, capsys, *flags):
    words = ["--recipe", "3b", "--model", str(folder / "model"), "--data", str(folder / "data")]
    status = preflight.main([*words, "--out", str(folder / "run"), "--device", "cpu", *flags])
    return status, capsys.readouterr()


def test_all_that_is_missing_is_reported_at_once(folder, capsys):
    """Guards: one problem a start, and a status of 0 with problems."""
    status, printed = run(folder, capsys)
    assert status == 2
    assert "no *.safetensors" in printed.err
    assert "eval.jsonl: no such file" in printed.err
    assert "set JUDGE_URL and JUDGE_MODEL" in printed.err
    assert "3 thing(s) missing" in printed.err
    for stage in ("sft", "dpo", "grpo", "eval"):
        assert f"| {stage} |" in printed.out


def test_nothing_missing(folder, capsys):
    """Guards: a complaint about what is not needed; data that is only read, and prompts that are
    only counted, when their stage starts."""
    row = json.loads((folder / "data" / "grpo.jsonl").read_text())
    (folder / "data" / "eval.jsonl").write_text(json.dumps(row | {"benchmark": "own"}) + "\n")
    (folder / "model" / "model.safetensors").write_bytes(b"")
    status, printed = run(folder, capsys, "--judge", "labels")
    assert not status and printed.err == "" and "for 8 H100" in printed.out
    short = run(folder, capsys, "--judge", "labels", "--max_prompt", "9")[1].err
    for name in ("sft", "dpo", "grpo", "eval"):
        assert f"{name}.jsonl:1: id 1: " in short and "over --max_prompt 9" in short
    (folder / "data" / "sft.jsonl").write_text('{"id": "1"}\n')
    assert "sft.jsonl:1: question" in run(folder, capsys, "--judge", "labels")[1].err
    flags = ["--judge", "labels", "--benchmarks", "pope", "--bench_data", str(folder)]
    assert f"{folder}/pope: no such folder" in run(folder, capsys, *flags)[1].err


def test_a_benchmark_that_there_is_not(tmp_path, capsys):
    """Guards: a misspelt name that shows itself after the training."""
    flags = ["--benchmarks", "pop", "--bench_data", str(tmp_path), "--out", str(tmp_path / "run")]
    assert preflight.main(flags) == 2
    assert "pop: no such benchmark; known: beavertails-v" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, refused",
    [("--recipe 3b", 1), ("--recipe 3b --device cpu", 0), ("--recipe tiny", 0)],
)
def test_a_real_recipe_needs_a_gpu(monkeypatch, flags, refused):
    """Guards: 3b that silently starts on a CPU."""
    monkeypatch.setattr(preflight.torch.cuda, "is_available", lambda: False)
    assert len(preflight.check_gpus(parse_config(flags.split()))[1]) == refused

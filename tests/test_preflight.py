"""Preflight: shapes are the published ones, and all that is missing is reported at once."""

import json
import shutil
import sys
from pathlib import Path

import PIL.Image
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from config import parse_config  # noqa: E402
from extras import preflight, toy_base  # noqa: E402


def test_published_sizes():
    """Guards: a wrong number in the table of shapes: the released checkpoints hold 3.755 and 8.292
    billion weights."""
    sizes = [preflight.count_parameters(preflight.shape_config(name)) for name in ("3b", "7b")]
    assert [round(size / 1e9, 3) for size in sizes] == [3.755, 8.292]


def test_memory_by_hand():
    """Guards: a part that is left out of the peak, or one that does not grow with its flag."""
    shapes = preflight.shape_config("3b")
    config = parse_config(["--recipe", "3b"])
    need = preflight.memory(shapes, config, "grpo")
    assert need["weights"] == 2 * 3_754_622_976  # bfloat16
    layer = 2 * (2048 + 2048) + 2 * (2048 + 256) + 3 * (2048 + 11008)
    assert need["adapters"] == 20 * 64 * 36 * layer  # A, B, gradients, two moments, the bucket
    cache = 36 * 2 * 256 * 2 * (4096 + 2048)  # keys and values of a row, bfloat16
    assert need["sampling"] == 64 * (cache + 20 * 151936)
    assert need["peak"] == need["weights"] + need["adapters"] + need["sampling"]
    plain = parse_config(["--recipe", "3b", "--checkpointing", "0"])
    assert preflight.memory(shapes, plain, "sft")["training"] > 10 * need["training"]
    assert preflight.memory(shapes, config, "eval")["adapters"] == 0


def test_hours_grow_with_the_work():
    """Guards: an estimate that forgets a flag that doubles the work."""
    shapes = preflight.shape_config("3b")

    def hours(stage, *flags, world=1):
        config = parse_config(["--recipe", "3b", *flags])
        return preflight.hours(shapes, config, stage, 6400, world, preflight.SHEETS["H100"])

    assert hours("sft", "--sft_epochs", "4") == pytest.approx(2 * hours("sft"))
    assert hours("sft", world=8) == pytest.approx(hours("sft") / 8)
    assert hours("grpo", "--grpo_k", "8") > 1.5 * hours("grpo")


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
    assert "eval.jsonl is missing" in printed.err
    assert "set JUDGE_URL and JUDGE_MODEL" in printed.err and "vllm serve" in printed.err
    assert "3 thing(s) missing" in printed.err
    for stage in ("sft", "dpo", "grpo", "eval"):
        assert f"| {stage} |" in printed.out


def test_bad_records_are_reported(folder, capsys):
    """Guards: data that is only read when its stage starts."""
    (folder / "data" / "sft.jsonl").write_text('{"id": "1"}\n')
    _, printed = run(folder, capsys)
    assert "sft.jsonl:1: question" in printed.err


def test_nothing_missing(folder, capsys):
    """Guards: a complaint about what is not needed."""
    shutil.copy(folder / "data" / "grpo.jsonl", folder / "data" / "eval.jsonl")
    row = json.loads((folder / "data" / "eval.jsonl").read_text())
    (folder / "data" / "eval.jsonl").write_text(json.dumps(row | {"benchmark": "own"}))
    (folder / "model" / "model.safetensors").write_bytes(b"")
    status, printed = run(folder, capsys, "--judge", "labels")
    assert (status, printed.err) == (0, "")


def test_a_real_recipe_needs_a_gpu(capsys, monkeypatch, tmp_path):
    """Guards: 3b that silently starts on a CPU."""
    monkeypatch.setattr(preflight.torch.cuda, "is_available", lambda: False)
    assert preflight.check_gpus(parse_config(["--recipe", "3b"]))[1]
    assert not preflight.check_gpus(parse_config(["--recipe", "3b", "--device", "cpu"]))[1]
    assert not preflight.check_gpus(parse_config(["--recipe", "tiny"]))[1]

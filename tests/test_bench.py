"""bench.py: both sides of the race compute the same thing. No time is asserted."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data  # noqa: E402
import model as qwen  # noqa: E402
from extras import bench  # noqa: E402


@pytest.fixture(scope="module")
def model():
    return bench.bench_model("tiny")


@pytest.mark.parametrize("length", [16, 30, 300])
def test_prompts_have_their_length(model, length):
    """Guards: prompts that are shorter on one side: an image of about a quarter of the tokens."""
    prompt = bench.make_prompt(model, length)
    pads = prompt.ids.count(model.config.image_token_id)
    assert len(prompt.ids) == length
    assert length // 9 <= pads <= length // 4
    assert 4 * pads == len(prompt.images[0].patches)


def test_both_updates_have_the_same_gradients(model):
    """Guards: a race between different things: every LoRA gradient of the two updates agrees."""
    prompt = bench.make_prompt(model, 40)
    samples = bench.sample_ours(model, prompt, 4, 9)
    gradients = []
    for update in (bench.update_ours, bench.update_plain):
        update(model, prompt, samples)
        gradients.append(bench.take_gradients(model))
    for name, plain in gradients[1].items():
        assert plain.norm() > 0
        assert (gradients[0][name] - plain).norm() < 1e-4 * plain.norm(), name
    assert all(value is None for value in bench.take_gradients(model).values())


@pytest.mark.parametrize("sampler", [bench.sample_ours, bench.sample_plain])
def test_both_samplers_do_the_same_work(model, sampler):
    """Guards: a side that samples fewer or shorter responses, or vision tokens."""
    prompt = bench.make_prompt(model, 40)
    responses = [one.tokens for one in sampler(model, prompt, 3, 7)]
    assert [len(tokens) for tokens in responses] == [7, 7, 7]
    assert len({tuple(tokens) for tokens in responses}) == 3
    assert not set(sum(responses, [])) & set(qwen.banned_token_ids(model))


def test_flop_of_the_prompt_are_counted_once(model, capsys):
    """Guards: a counter that misses one side: K = 8 rows share a prompt that is most of the
    work."""
    prompt = bench.make_prompt(model, 200)
    gflop = bench.compare(model, prompt, bench.sample_ours(model, prompt, 8, 5))
    assert gflop["plain"] > 5 * gflop["ours"]
    assert "largest relative difference" in capsys.readouterr().out


def test_a_random_folder_is_a_model_folder(tmp_path):
    """Guards: a folder for the true shapes that safer.py cannot load."""
    bench.make_folder("tiny", tmp_path)
    loaded = qwen.load_model(tmp_path, torch.bfloat16, "cpu")
    processor = data.load_processor(tmp_path, 3136, 3136)
    assert loaded.config.image_token_id == processor.special["<|image_pad|>"]
    weights = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_the_table(capsys):
    """Guards: a side without a row, a command that dies behind its last race."""
    bench.main("--size tiny --k 2 --prompt 20 --response 4".split())
    table = capsys.readouterr().out.split("\n\n")[1]
    rows = [line.split(" | ") for line in table.strip().splitlines()[2:]]
    assert [row[0] for row in rows] == ["| ours", "| plain"] and rows[0][1] == "1"

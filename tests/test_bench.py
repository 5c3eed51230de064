"""bench.py: both sides of every comparison compute the same thing, and what is counted is what was done. No time is asserted."""

import sys
from pathlib import Path

import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from extras import bench  # noqa: E402
import data  # noqa: E402
import model as modeling  # noqa: E402
import rollout  # noqa: E402

SHAPE = bench.Shape(64, 2, 4, 2, 96, 300, (2, 32, 2, 48))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return bench.build_model(SHAPE, CPU)


@pytest.mark.parametrize("objective, k", [(bench.grpo_objective, 3), (bench.dpo_objective, 2), (bench.sft_objective, 1)])
@pytest.mark.parametrize("response_logits", [False, True])
def test_both_sides_take_the_same_step(model, objective, k, response_logits):
    """Guards a race between different things: log-probabilities, loss and every LoRA gradient agree, with responses of uneven length."""
    groups, optimiser = bench.make_groups(model, 2, k, 30, 2, 9), bench.still_optimiser(model)
    mine = bench.train_step(model, optimiser, objective, lambda: bench.ours(model, groups))
    theirs = bench.train_step(model, optimiser, objective, lambda: bench.plain(model, groups, response_logits))
    assert len({len(response) for _, responses in groups for response in responses}) > 1
    assert all(gradient.norm() > 0 for gradient in theirs[2].values())
    logprob, loss, gradient = bench.differences(mine, theirs)
    assert logprob < 1e-4 and loss < 1e-5 and gradient < 1e-3


def test_differences_see_one_gradient():
    """Guards a comparison that averages a fault away: one wrong tensor of many, small beside the others, shows in full."""
    left = (torch.zeros(2, 2), 1.0, {"a": torch.full((3,), 1e-6), "b": torch.ones(100)})
    right = (torch.tensor([[0.0, 0.25], [0.0, 0.0]]), 2.0, {"a": torch.full((3,), 2e-6), "b": torch.ones(100)})
    assert bench.differences(left, right) == pytest.approx((0.25, 0.5, 0.5))


def test_a_step_leaves_the_weights(model):
    """Guards sides that drift apart over the repeats: AdamW at learning rate 0 changes no weight, and it does step."""
    before = {name: parameter.detach().clone() for name, parameter in modeling.lora_parameters(model).items()}
    optimiser, groups = bench.still_optimiser(model), bench.make_groups(model, 1, 2, 20, 3, 3)
    bench.train_step(model, optimiser, bench.grpo_objective, lambda: bench.ours(model, groups))
    assert all(torch.equal(parameter, before[name]) for name, parameter in modeling.lora_parameters(model).items())
    assert all(state["step"] == 1 and state["exp_avg"].any() for state in optimiser.state.values())


@pytest.mark.parametrize("length", [16, 30, 300])
def test_prompts_have_their_length(model, length):
    """Guards prompts that are shorter on one side: `length` tokens, an image of about a quarter of them, no stray special token."""
    prompt = bench.make_prompt(model, length, 0)
    pads = prompt.ids.count(model.config.image_token_id)
    assert len(prompt.ids) == length and length / 8 < pads <= length / 4
    assert pads == len(prompt.images[0].patches) / 4 == prompt.images[0].grid[1] * prompt.images[0].grid[2] / 4
    special = [token for token in prompt.ids if token >= model.config.image_token_id or token == bench.EOS]
    assert len(special) == pads + 2


def test_both_samplers_obey_the_lengths(model):
    """Guards tokens per second over unequal work: both sides end each sample where they are told, on ours only there by the end token."""
    lengths = [[1, 5, 12], [12, 3, 7]]
    prompts = [bench.make_prompt(model, 20, seed) for seed in range(2)]
    stream = rollout.uniform_stream
    for sampler in (bench.sample_ours, bench.sample_plain):
        samples = sampler(model, prompts, lengths)
        assert [[len(tokens) for tokens in group] for group in samples] == lengths
        assert len({tuple(tokens[:3]) for group in samples for tokens in group}) > 3  # drawn, not greedy
    assert all(bench.EOS not in tokens[:-1] for group in bench.sample_ours(model, prompts, lengths) for tokens in group)
    assert rollout.uniform_stream is stream


def test_greedy_tokens_agree(model):
    """Guards the comparison of the samplers: 100% on one model; and a shifted answer does not count as agreement."""
    prompts = [bench.make_prompt(model, 20, seed) for seed in range(2)]
    assert bench.same_greedy_tokens(model, prompts, 6) == 1.0
    theirs = bench.sample_plain(model, prompts, [[6]] * 2, greedy=True)
    with pytest.MonkeyPatch.context() as patch:
        wrong = theirs[0][0][:2] + [bench.EOS] + theirs[0][0][3:]
        patch.setattr(bench, "sample_plain", lambda *_, **__: [[wrong], theirs[1]])
        assert bench.same_greedy_tokens(model, prompts, 6) == pytest.approx((2 + 6) / 12)


def test_flops_by_hand():
    """Guards attention that is not counted on CPU: a matrix product has 2 n^3; attention 4 T^2 D per head, its backward 2.5 times that."""
    left = torch.randn(100, 100)
    assert bench.counted(lambda: left @ left, CPU)[1] == pytest.approx(2 * 100**3 / 1e9)
    q = torch.randn(1, 2, 64, 32, requires_grad=True)
    forward = 2 * 4 * 64 * 64 * 32 / 1e9

    def attention():
        return F.scaled_dot_product_attention(q, q, q, is_causal=True)

    assert bench.counted(attention, CPU)[1] == pytest.approx(forward)
    assert bench.counted(lambda: attention().sum().backward(), CPU)[1] == pytest.approx(3.5 * forward)


def test_peak_by_hand():
    """Guards a peak that sums what was freed, or that sees only the end: two tensors of 4 MB at once, three in all, one kept."""
    def run():
        first = torch.ones(1_000_000)
        second = first + 1
        del first
        return second.exp()

    assert bench.counted(run, CPU)[2] == pytest.approx(8.0, rel=0.01)
    assert bench.counted(lambda: torch.ones(1_000_000).sum(), CPU)[2] == pytest.approx(4.0, rel=0.01)


def test_race_takes_turns(monkeypatch):
    """Guards one side measured first and the other later, and a mean in the place of the best: by a clock that is told the times."""
    calls, now, spent = [], [0.0], {"a": [5.0, 2.0, 3.0], "b": [1.0, 9.0, 4.0]}

    def run(name):
        now[0] += spent[name][len([call for call in calls if call == name])]
        calls.append(name)
        return name

    monkeypatch.setattr(bench, "clock", lambda device: now[0])
    costs = bench.race({"a": lambda: run("a"), "b": lambda: run("b")}, 3, CPU, count=False)
    assert calls == ["a", "b"] * 3
    assert (costs["a"].seconds, costs["b"].seconds) == (2.0, 1.0)
    assert costs["a"].result == "a" and costs["a"].gflop is None


def test_memory_follows_the_chunk(model, capsys):
    """Guards a log-probability that holds (tokens, vocabulary): with small chunks a vocabulary of 10,000 more costs ours little."""
    bench.bench_memory(model, None, vocabularies=(1000, 11000))
    peaks = [float(line.split("|")[3]) for line in capsys.readouterr().out.splitlines() if line.startswith("| 1")]
    small, large = peaks[:4], peaks[4:]  # chunk 32, 128, 1024, plain
    logits = 800 * 10000 * 4 / 1e6  # MB that one (tokens, vocabulary) tensor grows by
    assert large[0] - small[0] < logits / 2 and large[1] - small[1] < logits
    assert large[0] < large[1] < large[2] < large[3] and large[3] - small[3] > logits


def test_every_part_prints_its_table(capsys):
    """Guards a part that only runs at the size that nobody tests: all of them at the smallest, with ratios and agreement in the tables."""
    threads = torch.get_num_threads()
    bench.main("--size tiny --prompt 20 --response 4 --k 2 --repeat 1 --only grpo,dpo,sft,rollout,iteration,protocol,limits".split())
    torch.set_num_threads(threads)
    out = capsys.readouterr().out
    for title in ("GRPO step", "DPO step", "SFT step", "Rollout against generate", "Whole GRPO iteration", "Trace checks", "Against the"):
        assert f"### {title}" in out
    assert out.count("plain, response logits only") == 3 and out.count("| 100% |") == 2
    for table in out.split("### ")[1:]:  # every row has as many cells as its header
        assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) == 1


def test_model_folder(tmp_path):
    """Guards a folder that the real commands refuse: weights in bfloat16, and vision tokens where the tokenizer beside them has them."""
    threads = torch.get_num_threads()
    bench.main(["--size", "tiny", "--make", str(tmp_path)])
    torch.set_num_threads(threads)
    policy, processor = modeling.load_model(tmp_path, torch.bfloat16, CPU), data.load_processor(tmp_path, 3136, 3136)
    assert policy.config.text_config.vocab_size == bench.SIZES["tiny"].vocab >= len(processor.tokenizer)
    assert all(tensor.dtype == torch.bfloat16 for tensor in load_file(tmp_path / "model.safetensors").values())
    image = data.make_image(PIL.Image.new("RGB", (56, 56), "red"), "red", processor)
    prompt = data.encode_prompt("", "what do you see?", (image,), processor)
    features = modeling.encode_images(policy, [image])
    logprobs, _ = modeling.token_logprobs(policy, [(prompt, [data.encode_response("a cup", processor)])], features)
    assert torch.isfinite(logprobs).all() and (logprobs < 0).all()
    vision = [processor.tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad", "vision_start", "vision_end")]
    assert modeling.banned_token_ids(policy) == sorted(vision)


@pytest.mark.parametrize("flags", ["--only speed", "--prompt 8", "--response 1", "--k 1", "--repeat 0", "--size huge"])
def test_flags_that_make_no_sense(flags, capsys):
    """Guards silence: a part, length or size that cannot be run ends the program."""
    with pytest.raises(SystemExit):
        bench.parse_arguments(flags.split())
    assert flags.split()[0] in capsys.readouterr().err


def test_trl_that_is_not_installed(monkeypatch, capsys):
    """Guards a crash, or a table that claims TRL: one line says that it is missing and the rest goes on."""
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    assert bench.parse_arguments(["--against", "trl"]).against is None
    assert "not installed" in capsys.readouterr().out


@pytest.mark.parametrize("fused", [True, False])
def test_trl_iterates(fused):
    """Guards the TRL side where trl is installed: a step of the lengths and the LoRA that are compared (make_step checks them itself)."""
    pytest.importorskip("trl")
    bench_trl = pytest.importorskip("bench_trl")
    step = bench_trl.make_step(SHAPE, CPU, 2, 20, 3, fused)
    assert step() > 0 and step() > 0

"""Parameters are counted exactly, memory lies near the measured peak, and all that is missing is told at once."""

import json
import sys
from pathlib import Path

import PIL.Image
import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from extras import bench  # noqa: E402
import data  # noqa: E402
import judge as judging  # noqa: E402
import model as modeling  # noqa: E402
from extras import preflight  # noqa: E402
import rollout  # noqa: E402
import tiny_model  # noqa: E402
from config import Config, parse_config  # noqa: E402

VISION = (2, 64, 2, 128)
SHAPES = [bench.SIZES["tiny"], bench.Shape(256, 6, 8, 2, 704, 4096, VISION), bench.Shape(512, 6, 8, 2, 1408, 4096, VISION)]


@pytest.mark.parametrize("name", [*preflight.SHAPES, "tiny"])
def test_parameters_are_counted_exactly(name):
    """Guards: a bias, a norm or a tied head that the count forgets or counts twice. The meta device makes shapes without weights."""
    shapes = tiny_model.tiny_config() if name == "tiny" else preflight.known_shapes(name)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(shapes)
        maps = dict(model.model.language_model.layers[0].named_modules())
    parts = {"tower": model.model.visual, "embedding": model.model.language_model.embed_tokens, "layers": model.model.language_model}
    counts = {part: sum(weight.numel() for weight in module.parameters()) for part, module in parts.items()}
    counts["layers"] -= counts["embedding"]
    counts["head"] = sum(weight.numel() for weight in model.parameters()) - sum(counts.values())  # parameters() gives a tied weight once
    assert preflight.count_parameters(shapes) == counts
    assert preflight.linear_maps(shapes) == [(maps[target].in_features, maps[target].out_features) for target in modeling.TARGETS]


def test_published_sizes():
    """Guards: a wrong number in the table of shapes: the released checkpoints hold 3.755 and 8.292 billion weights."""
    sizes = [sum(preflight.count_parameters(preflight.known_shapes(name)).values()) for name in preflight.SHAPES]
    assert [round(size / 1e9, 3) for size in sizes] == [3.755, 8.292]


def measured_peak(run):
    """Most bytes that torch's CPU allocator had given out at one time. (Counting FLOP too would hold what checkpointing frees.)"""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return torch.tensor([event.nbytes() for event in events]).cumsum(0).max().item()


def in_dtype(model, dtype):
    """The model with its frozen weights in another dtype; adapters stay float32."""
    for parameter in (parameter for parameter in model.parameters() if not parameter.requires_grad):
        parameter.data = parameter.data.to(getattr(torch, dtype))
    return model


@pytest.mark.parametrize("shape", SHAPES, ids=["tiny", "256", "512"])
@pytest.mark.parametrize("dtype, checkpointing, stage", [
    ("float32", False, "grpo"), ("bfloat16", True, "grpo"), ("float32", True, "sft"), ("float32", False, "dpo")])
def test_training_memory_against_the_measured_peak(shape, dtype, checkpointing, stage):
    """Guards: an activation that the formula forgets. Never below what was measured, and at most half above it."""
    config = Config(max_prompt=200, max_response=60, grpo_k=4, micro_tokens=1, dtype=dtype, checkpointing=checkpointing)
    model, k = in_dtype(bench.build_model(shape, torch.device("cpu")), dtype), preflight.responses_per_prompt(config, stage)
    groups = bench.make_groups(model, 1, k, config.max_prompt, config.max_response, config.max_response)
    features = modeling.encode_images(model, list(groups[0][0].images))
    objective = {"sft": bench.sft_objective, "dpo": bench.dpo_objective, "grpo": bench.grpo_objective}[stage]

    def step():
        logprobs = lambda: modeling.token_logprobs(model, groups, features, checkpoint=checkpointing)
        objective(model, logprobs)[1].backward()

    gradients = sum(parameter.nbytes for parameter in modeling.lora_parameters(model).values())
    estimate = sum(preflight.training_memory(model.config, config, stage).values()) + gradients
    assert 1.0 <= estimate / measured_peak(step) <= 1.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sampling_memory_against_the_measured_peak(dtype):
    """Guards: a cache of another shape than rollout.new_state's. Within a tenth."""
    config = Config(max_prompt=200, max_response=30, grpo_k=4, grpo_batch=8, rollout_rows=16, device="cpu", dtype=dtype)
    model = in_dtype(bench.build_model(SHAPES[0], torch.device("cpu")), dtype)
    prompts = [bench.make_prompt(model, config.max_prompt, seed) for seed in range(config.grpo_batch)]
    features = modeling.encode_images(model, [image for prompt in prompts for image in prompt.images])

    def sample():
        with bench.forced_lengths([[config.max_response] * config.grpo_k] * len(prompts)):
            rollout.sample(model, prompts, features, config.grpo_k, config.max_response, 1.0, bench.EOS,
                           list(range(len(prompts))), config.rollout_rows)

    estimate = sum(preflight.sampling_memory(model.config, config, "grpo").values())
    assert 0.9 <= estimate / measured_peak(sample) <= 1.1


def test_memory_by_hand():
    """Guards: a forgotten copy, a part that is counted twice, a share that does not shrink with the processes."""
    config = parse_config(["--recipe", "3b"])
    shapes = preflight.known_shapes(config.model)
    one, eight = (preflight.memory(shapes, config, "grpo", images=6000, world=world) for world in (1, 8))
    assert one["weights"] == 2 * 3754622976  # bfloat16
    # 36 layers; rank 64 on maps 2048 x 2048 twice, 2048 x 256 twice, 2048 x 11008 twice and back; A, B, gradients, two moments in float32
    assert one["adapters"] == 36 * 64 * (2 * 4096 + 2 * 2304 + 3 * 13056) * 4 * 4
    image = 1337 * 2048 * 2  # 1,048,576 pixels are 1,337 squares of 28 x 28
    assert one["features"] == 256 * image + 2**30 and eight["features"] == 32 * image + 2**30
    caches = 36 * 2 * 256 * (32 * 4096 + 64 * 2048) * 2  # layers, keys and values, 2 heads of 128, 32 prompts and 64 rows, bfloat16
    assert preflight.sampling_memory(shapes, config, "grpo", 8)["kept"] == caches + 64 * 2048 * 20
    assert one["peak"] == one["weights"] + one["adapters"] + one["features"] + max(one["training"], one["sampling"], one["optimiser"])


def test_time_by_hand():
    """Guards: a factor lost: SFT is one forward, one backward and one recomputed pass over every token, shared by the processes."""
    config = parse_config(["--recipe", "3b", "--sft_epochs", "1", "--max_pixels", "262144"])
    shapes = preflight.known_shapes(config.model)
    counts, tokens = preflight.count_parameters(shapes), 2048 + 512  # half of --max_prompt, a quarter of --max_response
    layers = 2 * tokens * (counts["layers"] + 36 * 2048 * tokens)
    flops = 3 * (layers + 2 * 512 * 151936 * 2048) + 2 * 4 * 334 * counts["tower"]
    assert preflight.seconds(shapes, config, "sft", 320, 8, (100, 1)) == pytest.approx(320 * flops / (0.3 * 100e12) / 8)
    assert preflight.seconds(shapes, config, "grpo", 256, 8, (100, 1)) > preflight.seconds(shapes, config, "sft", 256, 8, (100, 1))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A model folder with tokenizer and (empty) weights, and data; no judge named, no GPU."""
    for name in ("JUDGE_URL", "JUDGE_MODEL", "CUDA_VISIBLE_DEVICES", "NNODES"):
        monkeypatch.delenv(name, raising=False)
    preflight.toy_base.tiny_config(preflight.toy_base.make_tokenizer(tmp_path / "model")).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").touch()
    (tmp_path / "data").mkdir()
    PIL.Image.new("RGB", (56, 56)).save(tmp_path / "data" / "i.png")
    row = {"id": "a", "images": ["i.png"], "question": "what?"}
    texts = {"sft": {"response": "r"}, "dpo": {"chosen": "c", "rejected": "r", "perturbation": "p"},
             "grpo": {}, "eval": {"benchmark": "b"}, "pool": {}}
    for name, more in texts.items():
        data.write_jsonl(tmp_path / "data" / f"{name}.jsonl", [{**row, **more}])
    return tmp_path


def flags(place, *more):
    return ["--recipe", "3b", "--model", str(place / "model"), "--data", str(place / "data"), "--device", "cpu",
            "--out", str(place / "run"), *more]


def test_all_is_there(place, capsys, monkeypatch):
    """Guards: a false alarm, a judge that is not asked, and a rehearsal that leaves something behind."""
    asked = []
    monkeypatch.setattr(judging.EndpointJudge, "preflight", lambda self: asked.append(self.name))
    monkeypatch.setenv("JUDGE_URL", "http://localhost:1/v1")
    monkeypatch.setenv("JUDGE_MODEL", "m")
    assert preflight.main(flags(place, "--dry_run")) == 0
    told = capsys.readouterr().out
    assert len(asked) == 1 and "all is there" in told and "| grpo | 1 | 1 |" in told and "sft.jsonl: 1 records" in told
    assert not (place / "run").exists()
    assert preflight.main(["--recipe", "3b-vlm", *flags(place)[2:]]) == 0
    assert "pool.jsonl: 1 records" in capsys.readouterr().out  # and sft.jsonl is not looked for


def test_everything_missing_is_told_at_once(place, capsys):
    """Guards: one problem a start. Weights, a data set, a broken row, a benchmark and the judge are missing together."""
    (place / "model" / "model.safetensors").unlink()
    (place / "data" / "dpo.jsonl").unlink()
    (place / "data" / "raw.jsonl").touch()
    (place / "data" / "sft.jsonl").write_text(json.dumps({"id": "a"}) + "\n")
    assert preflight.main(flags(place, "--benchmarks", "pope", "--bench_data", str(place / "bench"))) == 2
    told = capsys.readouterr().err
    for part in ("download the weights too", "no dpo.jsonl, but a raw.jsonl: `python build.py --recipe 3b", "sft.jsonl:1: question",
                 "no folder", "JUDGE_URL", "5 thing(s)"):
        assert part in told, part


def test_a_judge_is_given_the_last_two_gpus(place):
    """Guards: a command that puts judge and training on the same GPU."""
    _, (told,) = preflight.look_at_judge(parse_config(flags(place)), gpus=8)
    assert "CUDA_VISIBLE_DEVICES=6,7 vllm serve" in told and "GPUS=0,1,2,3,4,5 JUDGE_URL=http://localhost:8000/v1" in told
    _, (told,) = preflight.look_at_judge(parse_config(flags(place)), gpus=1)
    assert "another machine" in told and "GPUS=" not in told


def test_too_little_memory(place):
    """Guards: weights that cannot fit as a mere warning, and an estimate that forbids a run."""
    config = parse_config(flags(place))
    shapes = preflight.known_shapes("Qwen/Qwen2.5-VL-7B-Instruct")
    table, certain = preflight.stage_table(shapes, config, {}, 8, None, free=8 * 2**30)
    assert len(certain) == 1 and "weights alone take 16.6 GB" in certain[0]
    table, certain = preflight.stage_table(shapes, config, {}, 8, None, free=24 * 2**30)
    assert not certain and "WARNING: grpo" in table and "--rollout_rows" in table
    table, certain = preflight.stage_table(shapes, config, {}, 8, None, free=80 * 2**30)
    assert not certain and "WARNING" not in table


def test_more_processes_than_records_of_a_step(place, monkeypatch):
    """Guards: a rank without a record, told after the weights are loaded."""
    monkeypatch.setenv("NNODES", "40")
    assert [problem.split(":")[0] for problem in preflight.look_at_gpus(parse_config(flags(place)))[1]] == ["sft", "dpo", "grpo"]

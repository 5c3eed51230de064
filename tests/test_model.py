"""model.py against transformers' own forward, hand-computed numbers and its own slow path."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from tiny_model import BANNED, EOS, IMAGE, VISION_START, image, prompt, prompts, reference_logits, reference_logprobs
from tiny_model import tiny_config, tiny_model, words

import model as modeling
from data import Prompt


def features_of(model, items):
    return modeling.encode_images(model, [picture for item in items for picture in item.images])


def with_lora(model, r=4, alpha=8, scale=0.1, seed=0):
    """Attach adapters and give B values, so that their gradient with respect to A is not zero."""
    modeling.attach_lora(model, r, alpha, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in modeling.lora_parameters(model).items():
            if name.endswith(".B"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def gradients(model, groups, features, **settings):
    """Log-probabilities and the adapters' gradients of a weighted sum of them (weights differ by token, so a permutation shows)."""
    for parameter in modeling.lora_parameters(model).values():
        parameter.grad = None
    logprobs, mask = modeling.token_logprobs(model, groups, features, **settings)[:2]
    weights = torch.cos(torch.arange(int(mask.sum()), dtype=torch.float32))
    (logprobs[mask] * weights).sum().backward()
    return logprobs[mask].detach(), {name: parameter.grad for name, parameter in modeling.lora_parameters(model).items()}


def worst(left, right):
    """Largest difference of two dicts of gradients, relative to each tensor's own size."""
    return max(((left[name] - right[name]).norm() / right[name].norm()).item() for name in right)


# ---- forward and positions ----------------------------------------------------------------------------------------------


def test_logits_equal_transformers():
    """Guards the whole forward: mRoPE sections, grouped heads, image features in the place of their pads, batched with other rows."""
    model = tiny_model()
    groups = [(item, [words(7, seed)]) for seed, item in enumerate(prompts())]
    packed = modeling.pack_groups(model, groups, features_of(model, prompts()))
    logits = model.lm_head(modeling.forward_packed(model, packed))
    start = 0
    for item, (response,) in groups:
        expected = reference_logits(model, item, response[:-1])
        mine = logits[start:start + len(expected)]
        assert expected.std() > 0.5  # a flat distribution would hide errors
        torch.testing.assert_close(mine, expected, atol=1e-4, rtol=0)
        start += len(expected)
    assert start == len(logits)


@pytest.mark.parametrize("pictures", [(), ("small",), ("tall",), ("wide", "tall"), ("tall", "small", "wide")])
def test_positions_equal_transformers(pictures):
    """Guards positions after an image: they go on at its longer side, not at its number of tokens."""
    model = tiny_model()
    item = prompt(4, 6, tuple(image(name) for name in pictures))
    ids = torch.tensor([item.ids])
    grids = torch.tensor([picture.grid for picture in item.images]) if pictures else None
    kinds, everything = (ids == IMAGE).int(), torch.ones_like(ids)
    expected, delta = model.model.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=grids, attention_mask=everything)
    positions, following = modeling.rope_positions(item.ids, [picture.grid for picture in item.images], IMAGE, 2)
    assert torch.equal(positions, expected[:, 0])
    assert following == len(item.ids) + int(delta)


def test_positions_by_hand():
    """Two words, a 2 x 3 image, one word: the word stands at 2 + max(2, 3)."""
    positions, following = modeling.rope_positions([7, 8] + [IMAGE] * 6 + [9], [(1, 4, 6)], IMAGE, 2)
    assert positions.tolist() == [[0, 1, 2, 2, 2, 2, 2, 2, 5], [0, 1, 2, 2, 2, 3, 3, 3, 5], [0, 1, 2, 3, 4, 2, 3, 4, 5]]
    assert following == 6


def test_pads_that_do_not_fit_are_refused():
    """Guards against a truncated prompt: off by one pad, and pads of two images that are joined wrongly."""
    with pytest.raises(ValueError, match="3 image pads.*need 4"):
        modeling.rope_positions([1] + [IMAGE] * 3, [(1, 4, 4)], IMAGE, 2)
    with pytest.raises(ValueError, match="token 0 are fewer than the 4"):
        modeling.rope_positions([IMAGE] * 3 + [5] + [IMAGE] * 5, [(1, 4, 4), (1, 4, 4)], IMAGE, 2)


def test_logprobs_equal_transformers():
    """Guards the shift by one, the temperature and the banned ids: against a log-softmax over the allowed ids of transformers' logits."""
    model = tiny_model()
    groups = [(item, [words(6, seed), words(2, seed + 9), words(11, seed + 5)]) for seed, item in enumerate(prompts())]
    for temperature in (1.0, 0.7):
        logprobs, mask = modeling.token_logprobs(model, groups, features_of(model, prompts()), temperature)
        row = 0
        for item, responses in groups:
            for response in responses:
                assert mask[row].tolist() == [True] * len(response) + [False] * (11 - len(response))
                expected = reference_logprobs(model, item, response, temperature)
                torch.testing.assert_close(logprobs[row, :len(response)], expected, atol=1e-4, rtol=0)
                assert (logprobs[row, len(response):] == 0).all()
                row += 1


def test_banned_ids_take_no_probability():
    """Guards sampling an image pad: probabilities of the allowed ids sum to one, and the logits handed in are left alone."""
    logits = torch.randn(5, 300)
    before = logits.clone()
    probabilities = modeling.log_softmax_banned(logits, torch.tensor(BANNED), 0.5).exp()
    assert torch.equal(logits, before)
    assert (probabilities[:, BANNED] == 0).all()
    torch.testing.assert_close(probabilities.sum(1), torch.ones(5))
    keep = [i for i in range(300) if i not in BANNED]
    torch.testing.assert_close(probabilities[:, keep], (logits[:, keep] / 0.5).softmax(1))


def test_entropy():
    """Guards 0 * -inf at the banned ids: against - sum p log p over the allowed ids."""
    model = tiny_model()
    item, response = prompt(1), words(5, 3)
    _, mask, entropy = modeling.token_logprobs(model, [(item, [response])], {}, entropy=True)
    logits = reference_logits(model, item, response)[len(item.ids) - 1:-1]
    probabilities = logits[:, [i for i in range(300) if i not in BANNED]].softmax(1)
    torch.testing.assert_close(entropy[0], -(probabilities * probabilities.log()).sum(1), atol=1e-4, rtol=0)


def test_a_banned_response_token_is_refused():
    """Guards a forward pass that counts more pads than features, or a log-probability of -inf in the loss."""
    with pytest.raises(ValueError, match="vision tokens"):
        modeling.token_logprobs(tiny_model(), [(prompt(1), [[4, VISION_START, EOS]])], {})


def test_response_lengths_at_the_edges():
    """Guards empty and one-token responses, which add no input token."""
    model = tiny_model()
    item = prompt(1)
    for responses in ([[5]], [[5], [6]], [[], [5, 6]], [[]], [[], []]):
        logprobs, mask = modeling.token_logprobs(model, [(item, responses)], {})
        assert mask.sum(1).tolist() == [len(response) for response in responses]
        for row, response in enumerate(responses):
            torch.testing.assert_close(logprobs[row, :len(response)], reference_logprobs(model, item, response), atol=1e-4, rtol=0)


def test_inputs_are_left_as_they_are():
    """Guards in-place edits of features, ids and responses."""
    model = tiny_model()
    items, responses = prompts(), [words(4, 1), words(6, 2)]
    features = features_of(model, items)
    before = {key: value.clone() for key, value in features.items()}
    ids = [item.ids for item in items]
    modeling.token_logprobs(model, [(item, responses) for item in items], features)
    assert all(torch.equal(features[key], before[key]) for key in before) and [item.ids for item in items] == ids
    assert responses == [words(4, 1), words(6, 2)]


def test_bfloat16_is_close():
    """Guards dtype mixing: bfloat16 weights with float32 adapters run, and stay near float32."""
    full, half = with_lora(tiny_model()), with_lora(tiny_model(dtype=torch.bfloat16))
    groups = [(item, [words(6, 1), words(9, 2)]) for item in prompts()]
    expected, mask = modeling.token_logprobs(full, groups, features_of(full, prompts()))
    got, _ = modeling.token_logprobs(half, groups, features_of(half, prompts()))
    assert got.dtype == torch.float32
    assert (got - expected)[mask].abs().mean() < 0.1 * expected[mask].std()


# ---- one prompt, many responses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 5])
def test_shared_prefix_equals_plain(k):
    """Guards the packed layout: same log-probabilities and LoRA gradients as one row per response, with very different lengths."""
    model = with_lora(tiny_model())
    lengths = [40, 1, 3, 17, 2]
    groups = [(item, [words(lengths[(g + j) % 5], 10 * g + j) for j in range(k)]) for g, item in enumerate(prompts())]
    groups.append((prompt(9, 30), [words(5, 77)]))  # a single response beside groups of k
    features = features_of(model, prompts())
    shared, shared_gradients = gradients(model, groups, features)
    plain, plain_gradients = gradients(model, [(item, [response]) for item, responses in groups for response in responses], features)
    assert (shared - plain).abs().max() < 1e-5
    assert worst(shared_gradients, plain_gradients) < 1e-4


def test_a_row_is_the_same_alone_and_in_a_batch():
    """Guards padding: a row beside a longer one with another image."""
    model = tiny_model()
    items = prompts()
    features = features_of(model, items)
    groups = [(item, [words(3 + 9 * g, g), words(4, g + 5)]) for g, item in enumerate(items)]
    together, mask = modeling.token_logprobs(model, groups, features)
    for g, group in enumerate(groups):
        alone, own = modeling.token_logprobs(model, [group], features)
        torch.testing.assert_close(together[2 * g:2 * g + 2][mask[2 * g:2 * g + 2]], alone[own], atol=1e-5, rtol=0)


@pytest.mark.parametrize("settings", [{"chunk": 7}, {"checkpoint": True}, {"chunk": 5, "checkpoint": True, "entropy": True}], ids=str)
def test_recomputing_changes_nothing(settings):
    """Guards chunked log-probabilities and checkpointed layers: same values and gradients, and no adapter is left without one."""
    model = with_lora(tiny_model())
    groups = [(item, [words(6, g), words(13, g + 3)]) for g, item in enumerate(prompts())]
    features = features_of(model, prompts())
    plain, plain_gradients = gradients(model, groups, features)
    got, got_gradients = gradients(model, groups, features, **settings)
    torch.testing.assert_close(got, plain, atol=1e-6, rtol=0)
    assert worst(got_gradients, plain_gradients) < 1e-5
    assert len(got_gradients) == 2 * 7 * 2
    assert all(gradient is not None and gradient.isfinite().all() and gradient.norm() > 0 for gradient in got_gradients.values())


def test_checkpointing_reaches_every_b_at_the_start():
    """Guards swallowed gradients: with B = 0, as at the first step, every B has a finite nonzero gradient and every A exactly zero."""
    model = tiny_model()
    modeling.attach_lora(model, 4, 8, 0)
    _, found = gradients(model, [(prompt(1), [words(9, 1), words(4, 2)])], {}, checkpoint=True)
    assert all(gradient.isfinite().all() and gradient.norm() > 0 for name, gradient in found.items() if name.endswith(".B"))
    assert all(gradient.norm() == 0 for name, gradient in found.items() if name.endswith(".A"))


class Shapes(TorchDispatchMode):
    """Collects the shape of every tensor that any operation makes, forward and backward."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.seen |= {value.shape for value in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(value, torch.Tensor)}
        return out


def test_no_tensor_is_larger_than_the_chunk():
    """Guards logits of whole sequences: no tensor, forward or backward, has more than chunk rows of them, and none waits for backward."""
    model = with_lora(tiny_model())
    groups = [(prompt(1), [words(60, 1), words(60, 2)])]
    kept = []
    keep_shape = torch.autograd.graph.saved_tensors_hooks(lambda tensor: (kept.append(tensor.shape), tensor)[1], lambda tensor: tensor)
    with Shapes() as shapes, keep_shape:
        logprobs, mask = modeling.token_logprobs(model, groups, {}, chunk=16, entropy=True)[:2]
        assert kept and not any(300 in shape and 64 not in shape for shape in kept)
        logprobs[mask].sum().backward()
    assert max(shape.numel() for shape in shapes.seen if 300 in shape and 64 not in shape) == 16 * 300


def test_the_stop_token_gets_gradient():
    """Guards masks that lose the end of turn: with only the last token weighted, lm_head's row of it has a gradient."""
    model = tiny_model()
    model.lm_head.weight.requires_grad_(True)
    logprobs, mask = modeling.token_logprobs(model, [(prompt(1), [[5, 6, EOS], [7, EOS]])], {})
    assert mask.tolist() == [[True, True, True], [True, True, False]]
    (logprobs[0, 2] + logprobs[1, 1]).backward()
    assert model.lm_head.weight.grad[EOS].norm() > 0


def test_micro_batches():
    """Guards lost or doubled groups: each index once, within the budget unless alone, like lengths together."""
    groups = [(Prompt(tuple(range(length))), [[1] * 3, [1] * 2]) for length in (40, 5, 90, 6, 41, 7)]
    batches = modeling.micro_batches(groups, 64)
    assert batches == [[1, 3, 5], [0], [4], [2]]  # 10 + 11 + 12, then 45, 46, 95 tokens


# ---- images -------------------------------------------------------------------------------------------------------------


def test_features_equal_transformers_and_are_computed_once():
    """Guards mixed-up images in a joint call, and computing a repeated image again."""
    model = tiny_model()
    pictures = [image("tall"), image("small"), image("tall"), image("wide", 3)]
    calls = []
    hook = model.model.visual.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    cache = {}
    features = modeling.encode_images(model, pictures, cache)
    assert modeling.encode_images(model, pictures[:2], cache).keys() == {"tall-0", "small-0"}
    hook.remove()
    assert calls == [72 + 16 + 32] and features.keys() == cache.keys()
    for picture in pictures:
        expected = model.model.visual(picture.patches, grid_thw=torch.tensor([picture.grid])).pooler_output
        torch.testing.assert_close(features[picture.key], expected, atol=1e-5, rtol=0)
    apart = modeling.encode_images(model, pictures, max_patches=50)
    assert all(torch.allclose(apart[key], features[key], atol=1e-5) for key in features)


def test_feature_cache_is_bounded():
    """Guards a cache that grows for ever, one that drops what was just used, and an answer that lacks what the cache dropped."""
    model, cache = tiny_model(), modeling.FeatureCache((4 + 18) * 64 * 4)  # one small and one tall image
    for picture in (image("small", 1), image("tall", 1), image("small", 1)):
        modeling.encode_images(model, [picture], cache)
    assert list(cache) == ["tall-1", "small-1"]
    got = modeling.encode_images(model, [image("small", 2)], cache)
    assert list(cache) == ["small-1", "small-2"] and got.keys() == {"small-2"}
    cache.max_bytes = 10
    got = modeling.encode_images(model, [image("tall", 1), image("small", 1)], cache)
    assert not cache and got.keys() == {"tall-1", "small-1"}


def test_vision_gradient_on_request():
    """Guards training the toy base: the tower gets gradients with grad=True, and such features are never cached."""
    model = tiny_model().requires_grad_(True)
    item = prompt(1, 4, (image("small"),))
    features = modeling.encode_images(model, item.images, grad=True)
    modeling.token_logprobs(model, [(item, [words(4, 1)])], features)[0].sum().backward()
    assert model.model.visual.patch_embed.proj.weight.grad.norm() > 0
    with pytest.raises(ValueError, match="cached"):
        modeling.encode_images(model, item.images, {}, grad=True)


# ---- LoRA ---------------------------------------------------------------------------------------------------------------


def test_lora_by_formula():
    """Guards alpha / r: output and update against W + scale * B A, on the language model's maps only, all else frozen."""
    model = tiny_model()
    weight = model.model.language_model.layers[1].mlp.up_proj.weight.clone()
    x = torch.randn(5, 64)
    names = modeling.attach_lora(model, 4, 12, 3)
    assert len(names) == 14 and names[0] == "model.language_model.layers.0.self_attn.q_proj"
    layer = model.model.language_model.layers[1].mlp.up_proj
    assert torch.equal(layer(x), x @ weight.T)  # B = 0
    assert layer.A.std().item() == pytest.approx(64**-0.5, rel=0.2) and layer.A.dtype == layer.B.dtype == torch.float32
    torch.nn.init.normal_(layer.B)
    torch.testing.assert_close(layer(x), x @ (weight + 3.0 * layer.B @ layer.A).T, atol=1e-4, rtol=1e-4)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == set(modeling.lora_parameters(model)) and len(trainable) == 28
    with pytest.raises(modeling.ModelError, match="attached already"):
        modeling.attach_lora(model, 4, 12, 3)


def test_adapters_off_nests_and_restores():
    """Guards a reference pass that leaves the policy without its adapter, also when it ends in an exception."""
    model = tiny_model()
    groups = [(prompt(1), [words(5, 1)])]
    base = modeling.token_logprobs(model, groups, {})[0]
    with_lora(model)
    policy = modeling.token_logprobs(model, groups, {})[0]
    assert (policy - base).abs().max() > 1e-3
    with modeling.adapters_off(model):
        with pytest.raises(RuntimeError, match="inside"), modeling.adapters_off(model):
            raise RuntimeError("inside")
        assert torch.equal(modeling.token_logprobs(model, groups, {})[0], base)  # the outer block still holds
    assert torch.equal(modeling.token_logprobs(model, groups, {})[0], policy)


def test_merge_by_formula_twice_is_once():
    """Guards a merge that loses the adapter, scales it wrongly or adds it twice."""
    model = with_lora(tiny_model(), r=4, alpha=8)
    groups = [(item, [words(5, 1)]) for item in prompts()]
    features = features_of(model, prompts())
    before = modeling.token_logprobs(model, groups, features)[0]
    layer = model.model.language_model.layers[0].self_attn.v_proj
    expected = layer.base.weight + 2.0 * layer.B.detach() @ layer.A.detach()
    assert modeling.merge_lora(model) == 14
    once = model.model.language_model.layers[0].self_attn.v_proj.weight.clone()
    torch.testing.assert_close(once, expected, atol=1e-6, rtol=0)
    assert modeling.merge_lora(model) == 0
    assert torch.equal(model.model.language_model.layers[0].self_attn.v_proj.weight, once)
    torch.testing.assert_close(modeling.token_logprobs(model, groups, features)[0], before, atol=1e-4, rtol=0)
    assert len(modeling.attach_lora(model, 4, 8, 0)) == 14


def test_a_merge_that_changes_nothing_raises():
    """Guards a "merged" folder equal to its base: an update below bfloat16's resolution; a B of zero is no fault."""
    model = with_lora(tiny_model(dtype=torch.bfloat16), scale=1e-9)
    with pytest.raises(modeling.ModelError, match="would change no weight"):
        modeling.merge_lora(model)
    assert len(modeling.lora_layers(model)) == 14  # nothing was merged by half
    fresh = tiny_model()
    modeling.attach_lora(fresh, 4, 8, 0)
    assert modeling.merge_lora(fresh) == 14


def test_adapter_file_round_trip(tmp_path):
    """Guards an adapter that loads by name but not by value, and rank or alpha lost on the way."""
    model = with_lora(tiny_model(), r=4, alpha=6)
    groups = [(prompt(1), [words(5, 1)])]
    expected = modeling.token_logprobs(model, groups, {})[0]
    path = tmp_path / "run" / "adapter.safetensors"
    modeling.save_adapter(model, path, {"stage": "sft", "step": 3})
    assert [file.name for file in path.parent.iterdir()] == ["adapter.safetensors"]
    fresh = tiny_model()
    message, metadata = modeling.load_adapter(fresh, path)
    total = sum(value.abs().sum().item() for name, value in load_file(path).items() if name.endswith(".B"))
    assert message == f"28 of 28 tensors loaded, sum |B| = {total:.6g}" and metadata == {"stage": "sft", "step": 3}
    assert torch.equal(modeling.token_logprobs(fresh, groups, {})[0], expected)
    _, header = modeling.read_adapter(path)
    assert (header["r"], header["alpha"], header["targets"]) == (4, 6, list(modeling.TARGETS))


def test_adapter_faults_are_named(tmp_path):
    """Guards loading with strict off: each fault is named and nothing changes."""
    model = with_lora(tiny_model())
    path = tmp_path / "adapter.safetensors"
    modeling.save_adapter(model, path, {})
    before = {name: value.detach().clone() for name, value in modeling.lora_parameters(model).items()}
    tensors, header = modeling.read_adapter(path)
    name = "model.language_model.layers.1.mlp.up_proj.B"

    def fault(changed, format=modeling.ADAPTER_FORMAT, **changes):
        save_file(changed, path, metadata={"format": format, "header": json.dumps({**header, **changes})})
        with pytest.raises(modeling.ModelError) as error:
            modeling.load_adapter(model, path)
        return str(error.value)

    assert f"missing {name}" in fault({key: value for key, value in tensors.items() if key != name})
    assert "unexpected other" in fault({**tensors, "other": torch.zeros(1)})
    assert f"{name} is (3, 4), the model needs (96, 4)" in fault({**tensors, name: torch.zeros(3, 4)})
    assert "alpha / r = 2, the file 24.75" in fault(tensors, alpha=99)
    assert "format is 'pt', expected 'safer-lora-1'" in fault(tensors, format="pt")
    path.write_bytes(b"no such thing")
    with pytest.raises(modeling.ModelError, match="no adapter file"):
        modeling.load_adapter(model, path)
    assert all(torch.equal(value, before[name]) for name, value in modeling.lora_parameters(model).items())
    with pytest.raises(modeling.ModelError, match="no adapter to save"):
        modeling.save_adapter(tiny_model(), path, {})


# ---- folders ------------------------------------------------------------------------------------------------------------


def test_load_model(tmp_path):
    """Guards weights filled with random numbers: the loaded model equals the saved one, frozen; each fault has its own message."""
    model = tiny_model()
    folder = tmp_path / "base"
    with pytest.raises(modeling.ModelError, match="no usable config"):
        modeling.load_model(folder, torch.float32, "cpu")
    folder.mkdir()
    with pytest.raises(modeling.ModelError, match="no config.json"):
        modeling.load_model(folder, torch.float32, "cpu")
    tiny_config().save_pretrained(folder)
    with pytest.raises(modeling.ModelError, match="no .*safetensors"):
        modeling.load_model(folder, torch.float32, "cpu")
    model.save_pretrained(folder)
    loaded = modeling.load_model(folder, torch.float32, "cpu")
    groups = [(item, [words(5, 1)]) for item in prompts()]
    expected = modeling.token_logprobs(model, groups, features_of(model, prompts()))[0]
    assert torch.equal(modeling.token_logprobs(loaded, groups, features_of(loaded, prompts()))[0], expected)
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    file = folder / "model.safetensors"
    tensors = load_file(file)
    removed = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    save_file({name: value for name, value in tensors.items() if name != removed}, file, metadata={"format": "pt"})
    with pytest.raises(modeling.ModelError, match="1 tensors are missing.*layers.1.mlp.up_proj"):
        modeling.load_model(folder, torch.float32, "cpu")
    file.write_bytes(b"cut off")
    with pytest.raises(modeling.ModelError, match="cannot be read"):
        modeling.load_model(folder, torch.float32, "cpu")
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(modeling.ModelError, match="bert model"):
        modeling.load_model(folder, torch.float32, "cpu")



"""model.py against transformers' own forward, numbers worked out by hand, and its own parts."""


import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import IMAGE, image, prompt, prompts
from tiny_model import reference_logits, reference_logprobs, tiny_config, tiny_model, words
from torch.utils._python_dispatch import TorchDispatchMode

from data import Prompt
from model import ModelError, adapters_off, attach_lora, encode_images
from model import load_adapter, load_model, lora_layers, lora_parameters, merge_lora
from model import micro_batches, read_tensors, rope_positions, save_adapter, token_logprobs
from model import write_tensors


def features_of(model, items):
    pictures = []
    for item in items:
        pictures += item.images
    return encode_images(model, pictures)


def with_lora(model, r=4, alpha=8, scale=0.1):
    """Attach adapters and give B values, so that A has a gradient too."""
    attach_lora(model, r, alpha, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.B.copy_(torch.randn(layer.B.shape, generator=generator) * scale)
    return model


def gradients(model, groups, features, **settings):
    """Log-probabilities, and the adapters' gradients of a sum in which each token has a weight of
    its own, so that a permutation shows."""
    logprobs, mask = token_logprobs(model, groups, features, **settings)[:2]
    weights = torch.cos(torch.arange(int(mask.sum()), dtype=torch.float32))
    parameters = lora_parameters(model)
    loss = (logprobs[mask] * weights).sum()
    found = torch.autograd.grad(loss, list(parameters.values()))
    return logprobs[mask].detach(), dict(zip(parameters, found))


def worst(left, right):
    """Largest difference of two dicts of gradients, relative to each tensor's own size."""
    return max(((left[name] - right[name]).norm() / right[name].norm()).item() for name in right)


# ---- forward and positions -----------------------------------------------------------------------


@pytest.mark.parametrize("names", [(), ("tall",), ("tall", "small", "wide")])
def test_positions_equal_transformers(names):
    """Guards positions after an image: they go on at its longer side, not at its tokens."""
    model = tiny_model()
    item = prompt(4, 6, tuple(map(image, names)))
    grids = [picture.grid for picture in item.images]
    ids = torch.tensor([item.ids])
    expected, delta = model.model.get_rope_index(
        ids,
        mm_token_type_ids=(ids == IMAGE).int(),
        image_grid_thw=torch.tensor(grids) if grids else None,
        attention_mask=torch.ones_like(ids),
    )
    positions, following = rope_positions(item.ids, grids, IMAGE, 2)
    assert torch.equal(positions, expected[:, 0])
    assert following == len(item.ids) + int(delta)


def test_positions_by_hand():
    """Two words, a 2 x 3 image, one word: the word stands at 2 + max(2, 3)."""
    ids = [7, 8] + [IMAGE] * 6 + [9]
    positions, following = rope_positions(ids, [(1, 4, 6)], IMAGE, 2)
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]
    assert following == 6


def test_pads_that_do_not_fit_are_refused():
    """Guards a truncated prompt: one pad too few, and pads of two images joined wrongly."""
    with pytest.raises(ValueError, match="3 image pads"):
        rope_positions([1] + [IMAGE] * 3, [(1, 4, 4)], IMAGE, 2)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("lengths", [(6, 2, 11), (1, 0), (0, 5), (1,), (0,), (0, 0)])
def test_logprobs_equal_transformers(lengths, temperature):
    """Guards the whole forward (mRoPE, grouped heads, features in the place of their pads, groups
    beside each other, empty responses), the shift by one, the temperature and the banned ids."""
    model = tiny_model()
    groups = []
    for seed, item in enumerate(prompts()):
        groups.append((item, [words(length, seed + length) for length in lengths]))
    features = features_of(model, prompts())
    logprobs, mask = token_logprobs(model, groups, features, temperature)
    assert mask.sum(1).tolist() == list(lengths) * 3
    assert (logprobs[~mask] == 0).all()
    row = 0
    for item, responses in groups:
        assert reference_logits(model, item, []).std() > 0.5  # a flat one would hide errors
        for response in responses:
            expected = reference_logprobs(model, item, response, temperature)
            got = logprobs[row, : len(response)]
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
            row += 1


def test_entropy():
    """Guards 0 * -inf at the banned ids: against - sum p log p over the allowed ids."""
    model = tiny_model()
    item, response = prompt(1), words(5, 3)
    entropy = token_logprobs(model, [(item, [response])], {}, entropy=True)[2]
    logits = reference_logits(model, item, response)[len(item.ids) - 1 : -1]
    allowed = [i for i in range(300) if i < 295 or i == 299]
    p = logits[:, allowed].softmax(1)
    torch.testing.assert_close(entropy[0], -(p * p.log()).sum(1), atol=1e-4, rtol=0)


def test_bfloat16_is_close():
    """Guards dtype mixing: bfloat16 weights with float32 adapters stay near float32."""
    groups = [(item, [words(6, 1), words(9, 2)]) for item in prompts()]
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        model = with_lora(tiny_model(dtype=dtype))
        logprobs, mask = token_logprobs(model, groups, features_of(model, prompts()))
        assert logprobs.dtype == torch.float32
        results.append(logprobs[mask])
    assert (results[1] - results[0]).abs().mean() < 0.1 * results[0].std()


# ---- one prompt, many responses ------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 5])
def test_a_group_equals_its_responses_apart(k):
    """Guards the layout of a group: log-probabilities and LoRA gradients as if every response had
    a prompt of its own; lengths very different."""
    model = with_lora(tiny_model())
    lengths = [40, 1, 3, 17, 2]
    groups = [(prompt(9, 30), [words(5, 77)])]  # a single response beside groups of k
    for g, item in enumerate(prompts()):
        groups.append((item, [words(lengths[(g + j) % 5], 10 * g + j) for j in range(k)]))
    apart = []
    for item, responses in groups:
        apart += [(item, [response]) for response in responses]
    features = features_of(model, prompts())
    together, found = gradients(model, groups, features)
    expected, expected_gradients = gradients(model, apart, features)
    assert (together - expected).abs().max() < 1e-5
    assert worst(found, expected_gradients) < 1e-4


@pytest.mark.parametrize("chunk, checkpoint", [(7, False), (1024, True), (5, True)])
def test_recomputing_changes_nothing(monkeypatch, chunk, checkpoint):
    """Guards chunks of logits and checkpointed layers: same values, same gradients, for all 28."""
    model = with_lora(tiny_model())
    groups = [(item, [words(6, g), words(13, g + 3)]) for g, item in enumerate(prompts())]
    features = features_of(model, prompts())
    expected, expected_gradients = gradients(model, groups, features)
    monkeypatch.setattr("model.LOGPROB_CHUNK", chunk)
    got, found = gradients(model, groups, features, checkpoint=checkpoint, entropy=True)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    assert worst(found, expected_gradients) < 1e-5
    assert len(found) == 28
    assert all(gradient.norm() > 0 for gradient in found.values())


def test_checkpointing_reaches_every_b_at_the_start():
    """Guards swallowed gradients: at the first step, B = 0, every B has one and no A has."""
    model = tiny_model()
    attach_lora(model, 4, 8, 0)
    groups = [(prompt(1), [words(9, 1), words(4, 2)])]
    for name, gradient in gradients(model, groups, {}, checkpoint=True)[1].items():
        assert gradient.isfinite().all()
        assert (gradient.norm() > 0) == name.endswith(".B")


class Logits(TorchDispatchMode):
    """Notes the rows of all (rows, V = 300) that any operation makes; not the head's weight."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            shape = getattr(value, "shape", ())
            if shape[-1:] == (300,) and shape != (64, 300):
                self.rows.append(value.numel() // 300)
        return out


def test_no_tensor_is_larger_than_the_chunk(monkeypatch):
    """Guards logits of whole sequences: nothing makes more than a chunk, forward or backward, and
    nothing of them waits for the backward pass."""
    monkeypatch.setattr("model.LOGPROB_CHUNK", 16)
    model = with_lora(tiny_model())
    kept = []

    def keep(tensor):
        kept.append(tensor.shape)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with Logits() as logits, hooks:
        logprobs = token_logprobs(model, [(prompt(1), [words(120, 1)])], {}, entropy=True)[0]
        assert kept and not any(shape[-1:] == (300,) for shape in kept)
        logprobs.sum().backward()
    assert max(logits.rows) == 16


def test_micro_batches():
    """Guards lost or doubled groups: each once, in the budget or alone, like lengths together."""
    groups = []
    for length in (40, 5, 90, 6, 41, 7):
        groups.append((Prompt(tuple(range(length))), [[1] * 3, [1] * 2]))
    # 10 + 11 + 12 tokens, then 45, 46 and 95
    assert micro_batches(groups, 64) == [[1, 3, 5], [0], [4], [2]]


# ---- images --------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit, calls", [(16384, [72 + 16 + 32]), (50, [72, 16 + 32])])
def test_features_equal_transformers(monkeypatch, limit, calls):
    """Guards mixed-up images in a joint call, and an image that is computed twice."""
    monkeypatch.setattr("model.TOWER_PATCHES", limit)
    model = tiny_model()
    pictures = [image("tall"), image("small"), image("tall"), image("wide", 3)]
    seen = []
    tower = model.model.visual
    hook = tower.register_forward_hook(lambda module, inputs, out: seen.append(len(inputs[0])))
    features = encode_images(model, pictures)
    hook.remove()
    assert seen == calls
    assert list(features) == ["tall-0", "small-0", "wide-3"]
    for picture in pictures:
        expected = tower(picture.patches, grid_thw=torch.tensor([picture.grid])).pooler_output
        torch.testing.assert_close(features[picture.key], expected, atol=1e-5, rtol=0)


def test_vision_gradient_on_request():
    """Guards training the toy base: the tower has a gradient with grad=True, otherwise none."""
    model = tiny_model().requires_grad_(True)
    item = prompt(1, 4, (image("small"),))
    assert not encode_images(model, item.images)["small-0"].requires_grad
    features = encode_images(model, item.images, grad=True)
    token_logprobs(model, [(item, [words(4, 1)])], features)[0].sum().backward()
    assert model.model.visual.patch_embed.proj.weight.grad.norm() > 0


# ---- LoRA ----------------------------------------------------------------------------------------


def test_lora_by_formula():
    """Guards alpha / r = 3: output against W + 3 B A, on the 14 maps only, all else frozen."""
    model = tiny_model()
    weight = model.model.language_model.layers[1].mlp.up_proj.weight.clone()
    x = torch.randn(5, 64)
    attach_lora(model, 4, 12, 3)
    layer = model.model.language_model.layers[1].mlp.up_proj
    assert torch.equal(layer(x), x @ weight.T)  # B = 0
    assert layer.A.std().item() == pytest.approx(64**-0.5, rel=0.2)
    torch.nn.init.normal_(layer.B)
    expected = x @ (weight + 3 * layer.B @ layer.A).T
    torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)
    assert len(lora_layers(model)) == 14
    trainable = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trainable == set(lora_parameters(model))
    with pytest.raises(ModelError, match="attached already"):
        attach_lora(model, 4, 12, 3)


def test_adapters_off_nests_and_restores():
    """Guards a policy left without its adapter, also when the block ends in an exception."""
    model = tiny_model()
    groups = [(prompt(1), [words(5, 1)])]
    base = token_logprobs(model, groups, {})[0]
    with_lora(model)
    policy = token_logprobs(model, groups, {})[0]
    assert (policy - base).abs().max() > 1e-3
    with adapters_off(model):
        with pytest.raises(RuntimeError, match="inside"), adapters_off(model):
            raise RuntimeError("inside")
        assert torch.equal(token_logprobs(model, groups, {})[0], base)  # the outer block holds
    assert torch.equal(token_logprobs(model, groups, {})[0], policy)


def test_merge_by_formula_twice_is_once():
    """Guards a merge that loses the adapter, scales it wrongly or adds it twice."""
    model = with_lora(tiny_model(), r=4, alpha=8)
    groups = [(prompt(1), [words(5, 1)])]
    before = token_logprobs(model, groups, {})[0]
    attention = model.model.language_model.layers[0].self_attn
    layer = attention.v_proj
    expected = layer.base.weight + 2 * layer.B.detach() @ layer.A.detach()
    for _ in range(2):
        merge_lora(model)
        torch.testing.assert_close(attention.v_proj.weight, expected, atol=1e-6, rtol=0)
        after = token_logprobs(model, groups, {})[0]
        torch.testing.assert_close(after, before, atol=1e-4, rtol=0)
    assert not lora_layers(model)


def test_a_merge_that_changes_nothing_raises():
    """Guards a "merged" folder equal to its base: an update below bfloat16's resolution."""
    model = with_lora(tiny_model(dtype=torch.bfloat16), scale=1e-9)
    with pytest.raises(ModelError, match="would change no weight"):
        merge_lora(model)
    fresh = tiny_model()
    attach_lora(fresh, 4, 8, 0)
    merge_lora(fresh)  # B = 0 is no fault


def test_adapter_file_round_trip(tmp_path):
    """Guards an adapter that loads by name but not by value, and rank or alpha lost on the way."""
    model = with_lora(tiny_model(), r=4, alpha=6)
    groups = [(prompt(1), [words(5, 1)])]
    path = tmp_path / "run" / "adapter.safetensors"
    save_adapter(model, path, {"stage": "sft", "step": 3})
    assert [file.name for file in path.parent.iterdir()] == ["adapter.safetensors"]
    fresh = tiny_model()
    load_adapter(fresh, path)
    expected = token_logprobs(model, groups, {})[0]
    assert torch.equal(token_logprobs(fresh, groups, {})[0], expected)
    header = read_tensors(path)[1]
    assert (header["r"], header["alpha"], len(header["targets"])) == (4, 6, 7)
    assert header["metadata"] == {"stage": "sft", "step": 3}


def test_adapter_faults_are_named(tmp_path):
    """Guards loading by halves, and the adapter of another model: each fault is named."""
    path = tmp_path / "adapter.safetensors"
    save_adapter(with_lora(tiny_model()), path, {})
    tensors, header = read_tensors(path)
    name = "model.language_model.layers.1.mlp.up_proj.B"
    fewer = {key: value for key, value in tensors.items() if key != name}
    more = {**tensors, "other": torch.zeros(1)}
    other = {**tensors, name: torch.zeros(3, 4)}
    for changed, message in ((fewer, name), (more, "'other'"), (other, f"{name}'.*3, 4")):
        write_tensors(path, changed, header)
        with pytest.raises(ModelError, match=f"not of this model; .*{message}"):
            load_adapter(tiny_model(), path)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="not written by this program"):
        load_adapter(tiny_model(), path)
    path.write_bytes(b"no such thing")
    with pytest.raises(ModelError, match="damaged"):
        load_adapter(tiny_model(), path)


# ---- folders -------------------------------------------------------------------------------------


def refused(folder, message):
    with pytest.raises(ModelError, match=message):
        load_model(folder, torch.float32, "cpu")


def test_load_model(tmp_path):
    """Guards weights filled with random numbers: what is loaded is what was saved, frozen."""
    model = tiny_model()
    folder = tmp_path / "base"
    model.save_pretrained(folder)
    loaded = load_model(folder, torch.float32, "cpu")
    groups = [(prompts()[1], [words(5, 1)])]
    expected = token_logprobs(model, groups, features_of(model, prompts()))[0]
    got = token_logprobs(loaded, groups, features_of(loaded, prompts()))[0]
    assert torch.equal(got, expected)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    refused(folder, "1 tensors are missing.*layers.1.mlp.up_proj")


def test_folders_that_hold_no_model(tmp_path):
    """Guards a traceback: each fault has a sentence of its own."""
    folder = tmp_path / "base"
    refused(folder, "cannot be loaded")
    folder.mkdir()
    refused(folder, "config.json")
    tiny_config().save_pretrained(folder)
    refused(folder, "no file named model.safetensors")
    (folder / "model.safetensors").write_bytes(b"cut off")
    refused(folder, "cannot be loaded")
    (folder / "config.json").write_text('{"model_type": "bert"}')
    refused(folder, "bert model")

"""model.py against transformers' own forward, numbers worked out by hand, and its own parts."""

from functools import partial
from unittest import mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_model import (
    EOS,
    IMAGE,
    features_of,
    image,
    prompt,
    prompts,
    reference_logprobs,
    tiny_config,
    tiny_model,
    with_lora,
    words,
)

import trainer
from data import Image, Prompt
from model import (
    ModelError,
    adapters_off,
    attach_lora,
    encode_images,
    load_model,
    lora_layers,
    lora_parameters,
    merge_lora,
    micro_batches,
    pack_groups,
    rope_positions,
    token_logprobs,
    window_attention,
)


def short(model):
    """Log-probabilities of a short text."""
    return token_logprobs(model, [(prompt(1), [words(5, 1)])], {})[0]


def gradients(model, groups, **settings):
    """Log-probabilities, and the adapters' gradients of a sum in which each token has a weight of
    its own, so that a permutation shows."""
    features = features_of(model, prompts())
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


def test_positions_by_hand():
    """Two words, a 2 x 3 image, one word: the word stands at 2 + max(2, 3)."""
    positions, following = rope_positions([7, 8] + [IMAGE] * 6 + [9], [(1, 4, 6)], IMAGE, 2)
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
@pytest.mark.parametrize("lengths", [(6, 2, 11), (1, 0), (0, 5), (1,), (0, 0), (3, 40, 0, 2)])
def test_logprobs_equal_transformers(lengths, temperature):
    """Guards the whole forward (mRoPE, grouped heads, features in the place of their pads, groups
    beside each other, empty responses), the shift by one, the temperature, the banned ids, and
    0 * -inf at these in the entropy."""
    model = tiny_model()
    groups = []
    for seed, item in enumerate(prompts()):
        groups.append((item, [words(length, seed + length) for length in lengths]))
    features = features_of(model, prompts())
    logprobs, mask, entropy = token_logprobs(model, groups, features, temperature, entropy=True)
    assert mask.sum(1).tolist() == list(lengths) * 3
    assert (logprobs[~mask] == 0).all()
    row = 0
    for item, responses in groups:
        for response in responses:
            every = reference_logprobs(model, item, response, temperature)
            assert every[0, :EOS].std() > 0.5  # a flat one would hide errors
            size = len(response)
            expected = every[range(size), response]
            torch.testing.assert_close(logprobs[row, :size], expected, atol=1e-4, rtol=0)
            expected = torch.special.entr(every[:size].exp()).sum(1)
            torch.testing.assert_close(entropy[row, :size], expected, atol=1e-4, rtol=0)
            row += 1


def test_bfloat16_is_close():
    """Guards dtype mixing: bfloat16 weights with float32 adapters stay near float32."""
    groups = [(item, [words(6, 1), words(9, 2)]) for item in prompts()]
    exact = gradients(with_lora(tiny_model()), groups)[0]
    rounded = gradients(with_lora(tiny_model(dtype=torch.bfloat16)), groups)[0]
    assert rounded.dtype == torch.float32
    assert (rounded - exact).abs().mean() < 0.1 * exact.std()


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
    together, found = gradients(model, groups)
    expected, expected_gradients = gradients(model, apart)
    assert (together - expected).abs().max() < 1e-5
    assert worst(found, expected_gradients) < 1e-4


def test_a_packed_group_by_hand(monkeypatch):
    """Guards what a GPU's kernel is told: the picture at the top of model.py in numbers, and a
    longer response in two pieces."""
    monkeypatch.setattr("model.PIECE", 2)
    group = Prompt((3, 4, 5, 6, 7), ()), [[7, 8, 9], [], [4, 5, 6, 7]]
    packed = pack_groups(tiny_model(), [group], {})
    assert (packed.rows, packed.seen) == ([5, 2, 2, 1], [5, 7, 7, 8])
    assert packed.row_ends.tolist() == [0, 5, 7, 9, 10]
    assert packed.seen_ends.tolist() == [0, 5, 12, 19, 27]
    shared = [0, 1, 2, 3, 4]
    keys = [*shared, *shared, 5, 6, *shared, 7, 8, *shared, 7, 8, 9]
    assert packed.keys.tolist() == keys
    assert packed.predict.tolist() == [4, 5, 6, 4, 7, 8, 9]
    assert packed.positions[0].tolist() == [*shared, 5, 6, 5, 6, 7]


def varlen_by_words(q, k, v, row_ends, seen_ends, most_rows, most_seen, window_size, enable_gqa):
    """torch's varlen_attn as its documentation has it: sequence after sequence, causal from the
    lower right."""
    assert row_ends.dtype == seen_ends.dtype == torch.int32
    assert window_size == (-1, 0) and enable_gqa
    assert most_rows == row_ends.diff().max() and most_seen == seen_ends.diff().max()
    k, v = [x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v)]
    outputs = []
    for number in range(len(row_ends) - 1):
        own = slice(row_ends[number], row_ends[number + 1])
        shown = slice(seen_ends[number], seen_ends[number + 1])
        scores = torch.einsum("rhd,shd->hrs", q[own], k[shown]) / q.shape[2] ** 0.5
        rows, seen = scores.shape[1:]
        scores = scores.masked_fill(~torch.ones(rows, seen).tril(seen - rows).bool(), -torch.inf)
        outputs.append(torch.einsum("hrs,shd->rhd", scores.softmax(-1), v[shown]))
    return torch.cat(outputs)


def test_the_kernel_of_gpus_is_asked_for_the_same(monkeypatch):
    """No GPU is here to run varlen_attn; guards what it is given: the numbers of the plain way."""
    model = with_lora(tiny_model())
    groups = [(item, [words(6, g), [], words(13, g)]) for g, item in enumerate(prompts())]
    expected, expected_gradients = gradients(model, groups)
    monkeypatch.setattr("model.has_kernel", lambda x: True)
    monkeypatch.setattr("model.varlen_attn", varlen_by_words)
    monkeypatch.setattr("model.PIECE", 5)
    got, found = gradients(model, groups)
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=0)
    assert worst(found, expected_gradients) < 1e-5


@pytest.mark.parametrize("chunk, checkpoint", [(7, False), (1024, True), (5, True)])
def test_recomputing_changes_nothing(monkeypatch, chunk, checkpoint):
    """Guards chunks of logits and checkpointed layers: same values, same gradients, for all 28."""
    model = with_lora(tiny_model())
    groups = [(item, [words(6, g), words(13, g + 3)]) for g, item in enumerate(prompts())]
    expected, expected_gradients = gradients(model, groups)
    monkeypatch.setattr("model.LOGPROB_CHUNK", chunk)
    got, found = gradients(model, groups, checkpoint=checkpoint, entropy=True)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    assert worst(found, expected_gradients) < 1e-5
    assert len(found) == 28 and all(gradient.norm() > 0 for gradient in found.values())


def test_no_tensor_is_larger_than_the_chunk(monkeypatch):
    """Guards logits of whole sequences: the head makes no more than a chunk, forward or backward,
    and nothing of that size waits for the backward pass."""
    monkeypatch.setattr("model.LOGPROB_CHUNK", 16)
    model = with_lora(tiny_model())
    made = []
    kept = []

    def keep(tensor):
        kept.append(tensor.shape)
        return tensor

    model.lm_head.register_forward_hook(lambda head, inputs, out: made.append(len(out)))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logprobs = token_logprobs(model, [(prompt(1), [words(120, 1)])], {}, entropy=True)[0]
        assert kept and not any(shape[-1:] == (300,) for shape in kept)
        logprobs.sum().backward()
    assert max(made) == 16 and len(made) == 2 * 8  # forward, and again for the gradient


def test_micro_batches():
    """Guards lost or doubled groups: each once, in the budget or alone, like lengths together."""
    lengths = (40, 5, 90, 6, 41, 7)
    groups = [(Prompt(tuple(range(length))), [[1] * 3, [1] * 2]) for length in lengths]
    # 10 + 11 + 12 tokens, then 45, 46 and 95
    assert micro_batches(groups, 64) == [[1, 3, 5], [0], [4], [2]]


# ---- images --------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit, calls", [(16384, [72 + 16 + 32]), (50, [72, 16 + 32])])
def test_features_equal_transformers(monkeypatch, limit, calls):
    """Guards mixed-up images in a joint call, an image that is computed twice, and a gradient
    through the frozen tower: only the toy base asks for one."""
    monkeypatch.setattr("model.TOWER_PATCHES", limit)
    model = tiny_model().requires_grad_(True)
    pictures = [image(name) for name in ("tall", "small", "tall", "wide")]
    seen = []
    tower = model.model.visual
    hook = tower.register_forward_hook(lambda module, inputs, out: seen.append(len(inputs[0])))
    features = encode_images(model, pictures)
    hook.remove()
    assert seen == calls and list(features) == ["tall", "small", "wide"]
    for picture in pictures:
        expected = tower(picture.patches, grid_thw=torch.tensor([picture.grid])).pooler_output
        torch.testing.assert_close(features[picture.key], expected, atol=1e-5, rtol=0)
        assert not features[picture.key].requires_grad
    encode_images(model, pictures, grad=True)["small"].sum().backward()
    assert tower.patch_embed.proj.weight.grad.norm() > 0


# ---- LoRA ----------------------------------------------------------------------------------------


def test_windows_of_a_length_go_together():
    """Guards: a window that sees another. Bitwise transformers' own features, whose windows go one
    by one; the picture has whole and cut windows."""
    model = tiny_model()
    high, wide = 20, 36
    patches = torch.randn(high * wide, 3 * 2 * 14 * 14)
    picture = Image("large", patches, (1, high, wide))
    before = encode_images(model, [picture])["large"]
    calls = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def counted(*args, **settings):
        calls.append(args[0].shape)
        return attend(*args, **settings)

    for block in model.model.visual.blocks:
        block.attn.forward = partial(window_attention, block.attn)
    with mock.patch("model.F.scaled_dot_product_attention", counted):
        assert torch.equal(encode_images(model, [picture])["large"], before)
    assert len(calls) == 3 + 1 and calls[1][0] > 1  # three sizes of windows; all of it at once


def test_lora_by_formula():
    """Guards alpha / r = 3: output against W + 3 B A, on the 14 maps only, all else frozen."""
    model = tiny_model()
    weight = model.model.language_model.layers[1].mlp.up_proj.weight.clone()
    x = torch.randn(5, 64)
    attach_lora(model, 4, 12, 3)
    layer = model.model.language_model.layers[1].mlp.up_proj
    assert torch.equal(layer(x), x @ weight.T)  # B = 0
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
    base = short(model)
    policy = short(with_lora(model))
    assert (policy - base).abs().max() > 1e-3
    with adapters_off(model):
        with pytest.raises(RuntimeError, match="inside"), adapters_off(model):
            raise RuntimeError("inside")
        assert torch.equal(short(model), base)  # the outer block holds
    assert torch.equal(short(model), policy)


def test_merge_by_formula_twice_is_once():
    """Guards a merge that loses the adapter, scales it wrongly or adds it twice."""
    model = with_lora(tiny_model(), r=4, alpha=8)
    before = short(model)
    attention = model.model.language_model.layers[0].self_attn
    layer = attention.v_proj
    expected = layer.base.weight + 2 * layer.B.detach() @ layer.A.detach()
    for _ in range(2):
        merge_lora(model)
        torch.testing.assert_close(attention.v_proj.weight, expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(short(model), before, atol=1e-4, rtol=0)
    assert not lora_layers(model)


def test_a_merge_that_changes_nothing_raises():
    """Guards a "merged" folder equal to its base: an update below bfloat16's resolution."""
    model = with_lora(tiny_model(dtype=torch.bfloat16), scale=1e-9)
    with pytest.raises(ModelError, match="would change no weight"):
        merge_lora(model)
    merge_lora(with_lora(tiny_model(), scale=0))  # B = 0 is no fault


def test_adapter_file_round_trip(tmp_path):
    """Guards an adapter that loads by name but not by value, and rank or alpha lost on the way."""
    model = with_lora(tiny_model(), r=4, alpha=6)
    path = tmp_path / "run" / "adapter.safetensors"
    trainer.save_adapter(model, path, {"stage": "sft", "step": 3})
    fresh = tiny_model()
    trainer.load_adapter(fresh, path)
    assert trainer.read_tensors(path)[1]["metadata"] == {"stage": "sft", "step": 3}
    assert torch.equal(short(fresh), short(model))


UP = "model.language_model.layers.1.mlp.up_proj.B"


@pytest.mark.parametrize(
    "changes", [{UP: None}, {"other": torch.zeros(1)}, {UP: torch.zeros(3, 4)}]
)
def test_adapter_faults_are_named(tmp_path, changes):
    """Guards the adapter of another model, or of another program."""
    path = tmp_path / "adapter"
    trainer.save_adapter(with_lora(tiny_model()), path, {})
    tensors, header = trainer.read_tensors(path)
    tensors = {name: value for name, value in (tensors | changes).items() if value is not None}
    trainer.write_tensors(path, tensors, header)
    with pytest.raises(ModelError, match=f"not of this model; .*{next(iter(changes))}"):
        trainer.load_adapter(tiny_model(), path)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="not written by this program"):
        trainer.load_adapter(tiny_model(), path)


def test_a_flipped_bit_is_told(tmp_path):
    """In any byte of a file: header, names, values. What is read is what was written."""
    tensors = {"b": torch.ones(3, 2), "step": torch.tensor(3.0)}
    path = tmp_path / "checkpoint"
    trainer.write_tensors(path, tensors, {"step": 3})
    good = path.read_bytes()
    told = 0
    for place in range(len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 2]) + good[place + 1 :])
        try:
            found, header = trainer.read_tensors(path)
            assert header == {"step": 3} and found.keys() == tensors.keys()
            assert all(torch.equal(found[name], tensors[name]) for name in tensors)
        except ModelError as error:
            told += str(path) in str(error)
    assert told >= len(good) - 8  # of the header's length some bits change nothing


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_what_is_not_finite_is_neither_written_nor_read(tmp_path, value):
    """Guards: an adapter of NaN after the last step, which nothing would show before its tables."""
    model = with_lora(tiny_model())
    path = tmp_path / "adapter"
    trainer.save_adapter(model, path, {})
    spoiled = lora_parameters(model)[UP]
    spoiled.data[0, 1] = value
    with pytest.raises(ModelError, match="not finite"):
        trainer.save_adapter(model, path, {})
    with safe_open(path, framework="pt") as file:
        words = file.metadata()
    assert list(words) == ["header"]  # of several keys safetensors changes the order
    save_file({**load_file(path), UP: spoiled.data}, path, metadata=words)
    with pytest.raises(ModelError, match=f"{path}: holds values that are not finite"):
        trainer.load_adapter(tiny_model(), path)


# ---- folders -------------------------------------------------------------------------------------


def refused(folder, message):
    with pytest.raises(ModelError, match=message):
        load_model(folder, torch.float32, "cpu")


def test_load_model(tmp_path):
    """Guards weights filled with random numbers: what is loaded is what was saved, frozen; each
    fault has a sentence of its own."""
    folder = tmp_path / "base"
    refused(folder, "cannot be loaded")
    folder.mkdir()
    refused(folder, "config.json")
    tiny_config().save_pretrained(folder)
    refused(folder, "no file named model.safetensors")
    model = tiny_model()
    model.save_pretrained(folder)
    loaded = load_model(folder, torch.float32, "cpu")
    assert torch.equal(short(loaded), short(model))
    features = features_of(loaded, prompts())
    for key, expected in features_of(model, prompts()).items():
        assert torch.equal(features[key], expected)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    refused(folder, "1 tensors are missing.*layers.1.mlp.up_proj")
    file.write_bytes(b"cut off")
    refused(folder, "cannot be loaded")
    (folder / "config.json").write_text('{"model_type": "bert"}')
    refused(folder, "bert model")

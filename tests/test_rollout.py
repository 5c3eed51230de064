"""rollout.py: its samples, their log-probabilities and their distribution, against the trainer's and transformers' own."""

import pytest
import torch
from tiny_model import BANNED, EOS, IMAGE, prompt, prompts, reference_logits, tiny_model, words

import model as modeling
import rollout


def stopping_model(bias=3.5, seed=0, dtype=torch.float32):
    """A tiny model that ends its responses: lm_head's bias makes the end of turn likely. Also likely, were they allowed: vision tokens."""
    model = tiny_model(seed, dtype)
    head = torch.zeros(model.lm_head.out_features, dtype=dtype)
    head[EOS], head[BANNED] = bias, 8.0
    model.lm_head.bias = torch.nn.Parameter(head, requires_grad=False)
    return model


def draw(model, items, k=4, max_tokens=24, temperature=1.0, seeds=None, **settings):
    features = modeling.encode_images(model, [picture for item in items for picture in item.images])
    seeds = list(range(len(items))) if seeds is None else seeds
    return rollout.sample(model, items, features, k, max_tokens, temperature, EOS, seeds, **settings), features


def check_against_trainer(model, items, samples, features, temperature=1.0, limit=1e-5):
    """Every sample's log-probabilities equal token_logprobs of its tokens."""
    groups = [(item, [one.tokens for one in row]) for item, row in zip(items, samples)]
    logprobs, mask = modeling.token_logprobs(model, groups, features, temperature)
    for row, one in enumerate(one for group in samples for one in group):
        assert mask[row].sum() == len(one.tokens) == len(one.logprobs)
        assert (logprobs[row, :len(one.tokens)] - torch.tensor(one.logprobs)).abs().max() < limit


def many_prompts():
    return prompts() + [prompt(seed, 3 + 2 * seed) for seed in range(4, 11)]


@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_logprobs_equal_the_trainers(temperature):
    """Guards the cache (cached = uncached), rotary positions in decoding, the temperature, and rows that move as others finish."""
    model, items = stopping_model(), many_prompts()
    samples, features = draw(model, items, k=5, temperature=temperature, max_rows=13)
    lengths = {len(one.tokens) for row in samples for one in row}
    assert len(lengths) > 10 and 24 in lengths  # of all kinds, some cut
    check_against_trainer(model, items, samples, features, temperature)


def test_unmerged_adapters_reach_the_sampler():
    """Guards a sampler that runs the base: with an adapter other tokens come, and their log-probabilities are still the trainer's."""
    model, items = stopping_model(), prompts()
    before, _ = draw(model, items)
    modeling.attach_lora(model, 4, 8, 0)
    with torch.no_grad():
        for name, parameter in modeling.lora_parameters(model).items():
            if name.endswith(".B"):
                parameter.normal_(std=0.2)
    samples, features = draw(model, items)
    assert samples != before
    check_against_trainer(model, items, samples, features)
    with modeling.adapters_off(model):
        assert draw(model, items)[0] == before


def test_the_same_samples_for_any_batch():
    """Guards draws that depend on the neighbours: any number of rows, any order of prompts, any one alone, an empty slot or a full one."""
    model, items = stopping_model(), many_prompts()
    tokens = [[one.tokens for one in row] for row in draw(model, items)[0]]
    for max_rows in (1, 3, 7, 40):
        assert [[one.tokens for one in row] for row in draw(model, items, max_rows=max_rows)[0]] == tokens
    backwards, _ = draw(model, items[::-1], seeds=list(range(len(items)))[::-1], max_rows=6)
    assert [[one.tokens for one in row] for row in backwards[::-1]] == tokens
    alone, _ = draw(model, items[2:3], seeds=[2])
    assert [one.tokens for one in alone[0]] == tokens[2]
    fewer, _ = draw(model, items, k=2)
    assert [[one.tokens for one in row] for row in fewer] == [row[:2] for row in tokens]
    assert [[one.tokens for one in row] for row in draw(model, items, seeds=list(range(1, 11)))[0]] != tokens


def test_fixed_shapes_change_nothing():
    """Guards the shapes that a CUDA graph needs: rows and slots that are dead must not touch live ones, nor leave NaN behind."""
    model, items = stopping_model(), many_prompts()
    free, _ = draw(model, items)
    fixed, _ = draw(model, items, max_rows=5, fixed=True)
    for mine, theirs in zip(free, fixed):
        assert [sample.tokens for sample in mine] == [sample.tokens for sample in theirs]
        for one, other in zip(mine, theirs):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_small_prefills(monkeypatch):
    """Guards prompts prefilled in several batches: the same samples when only one fits at a time."""
    model, items = stopping_model(), many_prompts()
    expected, _ = draw(model, items)
    monkeypatch.setattr(rollout, "PREFILL_TOKENS", 1)
    got, _ = draw(model, items)
    assert [[one.tokens for one in row] for row in got] == [[one.tokens for one in row] for row in expected]


@pytest.mark.parametrize("temperature", [0.0, 1e-4])
def test_cold_samples_are_greedy(temperature):
    """Guards the whole loop against transformers' generate, with 0, 1 and 2 images, vision tokens suppressed there too."""
    model, items = stopping_model(bias=2.0), prompts()
    samples, _ = draw(model, items, k=2, max_tokens=12, temperature=temperature)
    for item, row in zip(items, samples):
        ids = torch.tensor([item.ids])
        inputs = {}
        if item.images:
            inputs = {"pixel_values": torch.cat([picture.patches for picture in item.images]),
                      "image_grid_thw": torch.tensor([picture.grid for picture in item.images])}
        model.model.rope_deltas = None
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=(ids == IMAGE).int(), max_new_tokens=12,
                             do_sample=False, suppress_tokens=BANNED, eos_token_id=EOS, pad_token_id=EOS, **inputs)
        out = out[0, len(item.ids):].tolist()
        expected = out[:out.index(EOS) + 1] if EOS in out else out
        assert [one.tokens for one in row] == [expected, expected]
        assert all(one.finished == (expected[-1] == EOS) for one in row)


def test_first_tokens_follow_the_distribution():
    """Guards a biased draw: chi-square of 20,000 first tokens against transformers' probabilities at temperature 1.3.

    Cells expecting under 5 are joined; the bound is the 99.9% point by Wilson and Hilferty's cube-root formula.
    """
    model, item = tiny_model(), prompts()[1]
    samples, _ = draw(model, [item], k=20_000, max_tokens=1, temperature=1.3, max_rows=4096)
    counts = torch.bincount(torch.tensor([one.tokens[0] for one in samples[0]]), minlength=300).double()
    logits = reference_logits(model, item, []).double()[-1] / 1.3
    logits[BANNED] = -torch.inf
    expected = logits.softmax(0) * 20_000
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    freedom = len(expected) - 1
    assert freedom > 50
    bound = freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert ((observed - expected) ** 2 / expected).sum() < bound


def test_samples_of_a_flat_distribution_differ():
    """Guards one random stream for all: 8 samples of 6 near-uniform tokens are 8 different ones, under two seeds."""
    model = tiny_model()
    model.lm_head.weight.zero_()
    samples, _ = draw(model, [prompt(1), prompt(1)], k=8, max_tokens=6)
    assert len({tuple(one.tokens) for row in samples for one in row}) == 16


def test_vision_tokens_are_never_sampled():
    """Guards the crash hours later: the model wants vision tokens most of all and none comes; greedy neither."""
    model = stopping_model()
    for temperature in (0.0, 1.0, 5.0):
        samples, _ = draw(model, prompts(), k=20, temperature=temperature)
        assert not any(set(BANNED) & set(one.tokens) for row in samples for one in row)


def test_ends():
    """Guards the end of turn: it is the last token and only there, `finished` says so, and a cut response has max_tokens."""
    samples, _ = draw(stopping_model(), many_prompts(), k=6, max_tokens=10)
    ends = [one for row in samples for one in row]
    assert {one.finished for one in ends} == {True, False}
    for one in ends:
        assert EOS not in one.tokens[:-1]
        assert one.finished == (one.tokens[-1] == EOS)
        assert one.finished or len(one.tokens) == 10


def test_draw_by_hand():
    """Guards tokens of probability 0, at the edges u = 0 and u just under 1 and at a boundary."""
    logprobs = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]).log().expand(5, -1)
    uniforms = torch.tensor([0.0, 0.2499, 0.2501, 0.9999, 1 - 2.0**-53], dtype=torch.float64)
    assert rollout.draw(logprobs, uniforms).tolist() == [1, 1, 3, 3, 3]


def test_streams_are_stable():
    """Guards a hash that differs between processes or machines: the first numbers of two streams, written down."""
    assert rollout.uniform_stream(7, 0, 3).tolist() == [0.7158469044757119, 0.09290916138032534, 0.7572696070837044]
    assert rollout.uniform_stream(7, 1, 3).tolist() == [0.314957374680761, 0.18570493864512427, 0.6158728079879316]


def test_bfloat16_stays_near_the_trainer():
    """Guards dtype mixing in the caches: sampler and trainer in bfloat16 differ by rounding only."""
    model, items = stopping_model(dtype=torch.bfloat16), prompts()
    samples, features = draw(model, items)
    check_against_trainer(model, items, samples, features, limit=0.3)


def test_arguments_that_make_no_sense():
    """Guards silence: too few seeds, no rows, a negative temperature; no prompts is an empty answer."""
    model = tiny_model()
    for settings in ({"seeds": [1, 2]}, {"max_rows": 0}, {"temperature": -1.0}, {"k": 0}):
        with pytest.raises(ValueError, match="prompts need as many seeds"):
            draw(model, [prompt(1)], **settings)
    assert draw(model, [])[0] == []


def test_a_response_continues_as_a_prompt():
    """Guards `sample` for longer contexts: a prompt that ends in an earlier response predicts what the response's own end predicts."""
    model, item, response = stopping_model(), prompts()[1], words(5, 3)
    longer = type(item)(item.ids + tuple(response), item.images)
    samples, features = draw(model, [longer])
    logprobs, _ = modeling.token_logprobs(model, [(item, [response + one.tokens for one in samples[0]])], features)
    for row, one in enumerate(samples[0]):
        assert (logprobs[row, 5:5 + len(one.tokens)] - torch.tensor(one.logprobs)).abs().max() < 1e-5

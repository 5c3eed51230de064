"""rollout.py's samples, their log-probabilities and distribution, against the trainer's and
transformers' own."""

import pytest
import torch
from tiny_model import (
    BANNED,
    EOS,
    as_transformers,
    features_of,
    prompt,
    prompts,
    reference_logprobs,
    tiny_model,
    with_lora,
    words,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import rollout
from extras.bench import random_model
from model import (
    adapters_off,
    attach_lora,
    cast_adapters,
    lora_parameters,
    token_logprobs,
)


def stopping_model(bias=3.5, dtype=torch.float32):
    """A tiny model that likes to end its responses, and likes vision tokens even more."""
    model = tiny_model(dtype=dtype)
    head = torch.zeros(model.lm_head.out_features, dtype=dtype)
    head[EOS] = bias
    head[BANNED] = 8.0
    model.lm_head.bias = torch.nn.Parameter(head, requires_grad=False)
    return model


def many_prompts():
    return prompts() + [prompt(seed, 3 + 2 * seed) for seed in range(4, 11)]


def draw(model, items, k=4, max_tokens=24, temperature=1.0, seeds=None, **settings):
    """Samples; prompt number i has seed i unless others are given."""
    seeds = list(range(len(items))) if seeds is None else seeds
    arguments = (features_of(model, items), k, max_tokens, temperature, EOS, seeds)
    return rollout.in_order(rollout.sample(model, items, *arguments, **settings), items, k)


def tokens_of(samples):
    return [[one.tokens for one in row] for row in samples]


def check_against_trainer(model, items, samples, temperature=1.0, limit=1e-5):
    """Every sample's log-probabilities equal token_logprobs of its tokens."""
    groups = list(zip(items, tokens_of(samples)))
    logprobs, mask = token_logprobs(model, groups, features_of(model, items), temperature)
    expected = sum([one.logprobs for row in samples for one in row], [])
    assert len(expected) == mask.sum()
    assert (logprobs[mask] - torch.tensor(expected)).abs().max() < limit


@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_logprobs_equal_the_trainers(temperature):
    """Guards the cache, rotary positions in decoding, the temperature, and rows that take another
    sample or move as others end."""
    model, items = stopping_model(), many_prompts()
    samples = draw(model, items, k=5, temperature=temperature, max_rows=13)
    lengths = {len(one.tokens) for row in samples for one in row}
    assert len(lengths) > 10 and 24 in lengths  # of all kinds, some cut
    check_against_trainer(model, items, samples, temperature)


def test_bfloat16_stays_near_the_trainer():
    """Guards dtype mixing in the cache: in bfloat16 sampler and trainer differ by rounding only."""
    model, items = stopping_model(dtype=torch.bfloat16), prompts()
    check_against_trainer(model, items, draw(model, items), limit=0.3)


def test_unmerged_adapters_reach_the_sampler():
    """Guards a sampler that runs the base, and a trainer left with the sampler's cast adapters:
    they are constants, so nothing would train."""
    model, items = stopping_model(), prompts()
    before = draw(model, items)
    with_lora(model, scale=0.2)
    samples = draw(model, items)
    assert tokens_of(samples) != tokens_of(before)
    check_against_trainer(model, items, samples)
    with adapters_off(model):
        assert draw(model, items) == before
    token_logprobs(model, [(items[0], [words(5, 1)])], {})[0].sum().backward()
    assert all(parameter.grad.norm() > 0 for parameter in lora_parameters(model).values())


def test_the_same_samples_for_any_batch(monkeypatch):
    """Guards draws that depend on the neighbors: any number of rows, fewer samples, another order
    of prompts, one alone, prompts prefilled one at a time."""
    model, items = stopping_model(), many_prompts()
    expected = tokens_of(draw(model, items))
    for max_rows in (1, 7, 40):
        assert tokens_of(draw(model, items, max_rows=max_rows)) == expected
    assert tokens_of(draw(model, items, k=2)) == [row[:2] for row in expected]
    backwards = draw(model, items[::-1], seeds=list(range(9, -1, -1)), max_rows=6)
    assert tokens_of(backwards)[::-1] == expected
    assert tokens_of(draw(model, items[2:3], seeds=[2])) == expected[2:3]
    assert tokens_of(draw(model, items, seeds=list(range(1, 11)))) != expected
    monkeypatch.setattr(rollout, "PREFILL_TOKENS", 1)
    assert tokens_of(draw(model, items)) == expected


def test_fixed_shapes_change_nothing(monkeypatch):
    """Guards what a CUDA graph needs: rows that have ended touch no living one and leave no NaN,
    whatever number of cache entries is looked at; and a step looks at few kinds of them."""
    model, items = stopping_model(), many_prompts()
    free = draw(model, items)
    monkeypatch.setattr(rollout, "STRIDE", 8)
    decode, seen = rollout.decode, set()

    def spy(model, rows, longest):
        seen.add((len(rows.lengths), longest))
        return decode(model, rows, longest)

    monkeypatch.setattr(rollout, "decode", spy)
    fixed = draw(model, items, max_rows=5, fixed=True)
    assert tokens_of(fixed) == tokens_of(free)
    check_against_trainer(model, items, fixed)
    entries = max(len(item.ids) for item in items) + 24
    assert seen <= {(5, 8), (5, 16), (5, 32), (5, entries)} and len(seen) > 1


def test_decoding_asks_the_device_for_nothing():
    """Guards the CUDA graph on a machine without one, where a value that was asked for would be
    that of the capture at every replay: tensors on the meta device have none to give."""
    model = with_lora(stopping_model()).to("meta")
    rows = rollout.new_rows(model, 3, 40, 24)
    with torch.inference_mode():
        hidden = rollout.decode(model, rows, 32)
    assert hidden.is_meta and hidden.shape == (3, 64)


@pytest.mark.parametrize("temperature", [0.0, 1e-4])
def test_cold_samples_are_greedy(temperature):
    """Guards the whole loop against transformers' generate, with 0, 1 and 2 images."""
    model, items = stopping_model(bias=2.0), prompts()
    samples = draw(model, items, k=2, max_tokens=12, temperature=temperature)
    settings = {"max_new_tokens": 12, "do_sample": False, "suppress_tokens": BANNED}
    settings |= {"eos_token_id": EOS, "pad_token_id": EOS}
    for item, row in zip(items, samples):
        model.model.rope_deltas = None
        out = model.generate(**as_transformers(item), **settings)
        expected = out[0, len(item.ids) :].tolist()
        assert [one.tokens for one in row] == [expected, expected]


def test_first_tokens_follow_the_distribution():
    """Guards a biased draw: chi-square of 20,000 first tokens against transformers' probabilities
    at temperature 1.3. Cells expecting under 5 are joined; the bound is the 99.9% point by Wilson
    and Hilferty's cube-root formula."""
    model, item = tiny_model(), prompts()[1]
    samples = draw(model, [item], k=20_000, max_tokens=1, temperature=1.3, max_rows=4096)
    first = torch.tensor([one.tokens[0] for one in samples[0]])
    counts = torch.bincount(first, minlength=300).double()
    expected = reference_logprobs(model, item, [], 1.3)[0].double().exp() * 20_000
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    freedom = len(expected) - 1
    assert freedom > 50
    bound = freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert ((observed - expected) ** 2 / expected).sum() < bound


def test_samples_of_a_flat_distribution_differ():
    """Guards one random stream for all: 8 samples of 6 near-uniform tokens, under two seeds."""
    model = tiny_model()
    model.lm_head.weight.zero_()
    samples = draw(model, [prompt(1), prompt(1)], k=8, max_tokens=6)
    assert len({tuple(one.tokens) for row in samples for one in row}) == 16


@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
def test_ends(temperature):
    """Guards the end of turn: the last token and only there, `finished` says so, and a response
    that is cut has max_tokens; and the vision tokens that this model wants most: none comes."""
    samples = draw(stopping_model(), many_prompts(), k=6, max_tokens=10, temperature=temperature)
    for one in sum(samples, []):
        assert not set(BANNED) & set(one.tokens)
        assert EOS not in one.tokens[:-1] and one.finished == (one.tokens[-1] == EOS)
        assert one.finished or len(one.tokens) == 10


def test_draw_by_hand():
    """Guards tokens of probability 0: at u = 0, just under 1, and at a boundary."""
    logprobs = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]).log().expand(5, -1)
    uniforms = torch.tensor([0.0, 0.2499, 0.2501, 0.9999, 1 - 2.0**-53], dtype=torch.float64)
    assert rollout.draw(logprobs, uniforms).tolist() == [1, 1, 3, 3, 3]


def test_streams_are_stable():
    """Guards a hash that differs between processes or machines: two streams, written down."""
    assert rollout.uniform_stream(7, 0, 2).tolist() == [0.7158469044757119, 0.09290916138032534]
    assert rollout.uniform_stream(7, 1, 2).tolist() == [0.314957374680761, 0.18570493864512427]


def test_arguments_that_make_no_sense():
    """Guards silence: too few seeds, no rows, a negative temperature; no prompts is no answer."""
    model = tiny_model()
    for settings in ({"seeds": [1, 2]}, {"max_rows": 0}, {"temperature": -1.0}, {"k": 0}):
        with pytest.raises(ValueError, match="1 prompts and . seeds"):
            draw(model, [prompt(1)], **settings)
    assert draw(model, []) == []


class Counting(TorchDispatchMode):
    """Counts operations, but not questions about a tensor's device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "prim.device" not in str(function)
        return function(*args, **(kwargs or {}))


@torch.inference_mode()
def test_a_decoding_step_is_few_operations():
    """At the shape of 3B, with tensors that hold nothing: on a GPU each is a launch, and launches
    were the time of a step. 4,508 once."""
    with FakeTensorMode(), torch.device("cpu"):
        model = random_model("3b", torch.bfloat16, "cpu")
        attach_lora(model, 64, 128.0, 0)
        rows = rollout.new_rows(model, 64, 2048, 1024)
        with cast_adapters(model), Counting() as counting:
            rollout.decode(model, rows, 1024)
    assert counting.count <= 1800

"""losses.py against numbers worked out by hand."""

import math

import pytest
import torch
from tiny_model import EOS, prompt, prompts, tiny_model, words

import losses
import model as modeling

LN2 = math.log(2)
NAN = math.nan


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def grpo(logprobs, old, ref=None, advantages=(1.0,), mask=None, kl_coef=0.0, mean="token", denominator=1.0, **settings):
    """grpo_loss with the paper's clipping, and a full mask unless one is given."""
    mask = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask
    dual_clip = settings.pop("dual_clip", 3.0)
    advantages = torch.tensor(advantages)
    return losses.grpo_loss(logprobs, old, ref, advantages, mask, 0.2, 0.3, dual_clip, kl_coef, mean, denominator, **settings)


# ---- SFT and DPO ----------------------------------------------------------------------------------------------------------


def test_sft_by_hand():
    """Guards the denominator and the mask: (1 + 2 + 4) / 10, and padding that is not 0 is not read."""
    logprobs, mask = tensor([-1, -2], [-4, -math.inf]), torch.tensor([[True, True], [True, False]])
    assert losses.sft_loss(logprobs, mask, 10).item() == pytest.approx(0.7)
    assert losses.sequence_logprobs(logprobs, mask).tolist() == [-3, -4]


def test_dpo_starts_at_ln_2():
    """Guards a wrong reference: equal policies give ln 2 a pair, no margin, no accuracy."""
    chosen, rejected = torch.tensor([-3.0, -5.0]), torch.tensor([-4.0, -1.0])
    loss, metrics = losses.dpo_loss(chosen, rejected, chosen, rejected, 0.1, 0.0, 2)
    assert loss.item() == pytest.approx(LN2)
    assert metrics == {"chosen_reward": 0, "rejected_reward": 0, "margin": 0, "accuracy": 0}


def test_dpo_by_hand():
    """Guards signs: log-ratios +2 and -1, beta 0.5: rewards 1 and -0.5, margin 1.5; and a second pair the other way round."""
    arguments = (torch.tensor([-3.0, -6.0]), torch.tensor([-5.0, -4.0]), torch.tensor([-5.0, -5.0]), torch.tensor([-4.0, -4.0]))
    loss, metrics = losses.dpo_loss(*arguments, 0.5, 0.0, 4)
    assert loss.item() == pytest.approx((math.log(1 + math.exp(-1.5)) + math.log(1 + math.exp(0.5))) / 4)
    assert metrics == pytest.approx({"chosen_reward": 0.5, "rejected_reward": -0.5, "margin": 1.0, "accuracy": 1.0})
    smooth, _ = losses.dpo_loss(*arguments, 0.5, 0.1, 4)
    expected = sum(0.9 * math.log(1 + math.exp(-z)) + 0.1 * math.log(1 + math.exp(z)) for z in (1.5, -0.5)) / 4
    assert smooth.item() == pytest.approx(expected)


def test_dpo_gradient_by_hand():
    """Guards the direction: d loss / d log pi(y_w) = -beta * sigmoid(-z), and the opposite for y_l."""
    chosen, rejected = torch.tensor([-3.0], requires_grad=True), torch.tensor([-5.0], requires_grad=True)
    losses.dpo_loss(chosen, rejected, torch.tensor([-5.0]), torch.tensor([-4.0]), 0.5, 0.0, 1)[0].backward()
    assert chosen.grad.item() == pytest.approx(-0.5 / (1 + math.exp(1.5)))
    assert rejected.grad.item() == pytest.approx(0.5 / (1 + math.exp(1.5)))


# ---- advantages -----------------------------------------------------------------------------------------------------------


def test_advantages_by_hand():
    """Guards the standard deviation: unbiased, sqrt(((-1)^2 + 0 + 1) / 2) = 1, not sqrt(2/3)."""
    advantages, spread = losses.group_advantages(tensor([1, 2, 3], [0, 0, 3]), use_std=True)
    torch.testing.assert_close(advantages, tensor([-1, 0, 1], [-1 / 3**0.5, -1 / 3**0.5, 2 / 3**0.5]), atol=1e-5, rtol=0)
    assert spread.tolist() == [True, True]
    advantages, _ = losses.group_advantages(tensor([1, 2, 3], [0, 0, 3]), use_std=False)
    assert advantages.tolist() == [[-1, 0, 1], [-1, -1, 2]]


def test_unscored_samples_are_left_out():
    """Guards a failed judge: mean and deviation over the scored samples only, 0 for the others."""
    advantages, spread = losses.group_advantages(tensor([1, NAN, 3], [NAN, NAN, 2], [NAN, NAN, NAN]), use_std=True)
    root = 2**-0.5
    torch.testing.assert_close(advantages, tensor([-root, 0, root], [0, 0, 0], [0, 0, 0]), atol=1e-5, rtol=0)
    assert spread.tolist() == [True, False, False]


def test_equal_rewards_teach_nothing():
    """Guards noise blown up by eps: rewards equal up to rounding (0.1 + 0.2 and 0.3) give exactly 0, a spread of 1e-3 does not."""
    rewards = torch.tensor([[0.1 + 0.2, 0.3, 0.3], [0.7, 0.7, 0.7], [0.5, 0.501, 0.5]], dtype=torch.float64)
    advantages, spread = losses.group_advantages(rewards, use_std=True)
    assert spread.tolist() == [False, False, True]
    assert (advantages[:2] == 0).all() and advantages[2, 1] > 1


# ---- GRPO -----------------------------------------------------------------------------------------------------------------


def test_clipping_by_hand():
    """Guards the two bounds: A > 0 is clipped above 1.3, A < 0 below 0.8; the other sides are not clipped."""
    ratios = [0.5, 1.1, 2.0]
    logprobs = tensor([math.log(ratio) for ratio in ratios])
    loss, metrics = grpo(logprobs, torch.zeros(1, 3), advantages=(2.0,))
    assert loss.item() == pytest.approx(-2 * (0.5 + 1.1 + 1.3))
    assert (metrics["clip_low_count"], metrics["clip_high_count"], metrics["tokens"]) == (0, 1, 3)
    loss, metrics = grpo(logprobs, torch.zeros(1, 3), advantages=(-2.0,))
    assert loss.item() == pytest.approx(2 * (0.8 + 1.1 + 2.0))
    assert (metrics["clip_low_count"], metrics["clip_high_count"], metrics["dual_clip_count"]) == (1, 0, 0)


def test_dual_clip_by_hand():
    """Guards an unbounded loss at A < 0: a ratio of 10 counts as 3, and only then; without the bound it counts in full."""
    logprobs = tensor([math.log(10), math.log(2)])
    loss, metrics = grpo(logprobs, torch.zeros(1, 2), advantages=(-1.0,))
    assert loss.item() == pytest.approx(3 + 2) and metrics["dual_clip_count"] == 1
    loss, metrics = grpo(logprobs, torch.zeros(1, 2), advantages=(-1.0,), dual_clip=None)
    assert loss.item() == pytest.approx(10 + 2) and metrics["dual_clip_count"] == 0
    loss, metrics = grpo(logprobs, torch.zeros(1, 2), advantages=(1.0,))
    assert loss.item() == pytest.approx(-1.3 - 1.3) and metrics["dual_clip_count"] == 0


def test_clipped_tokens_have_no_gradient():
    """Guards a clamp on the wrong side: on policy d loss / d log pi = -A; beyond a bound 0."""
    logprobs = tensor([0.0, math.log(2), math.log(0.5)]).requires_grad_(True)
    grpo(logprobs, torch.zeros(1, 3), advantages=(1.0,))[0].backward()
    assert logprobs.grad[0].tolist() == pytest.approx([-1, 0, -0.5])


def test_on_policy_loss_is_minus_the_advantage():
    """Guards old log-probabilities with a graph: value -A per token, gradient -A per token."""
    logprobs = tensor([-1.0, -2.0]).requires_grad_(True)
    loss, _ = grpo(logprobs, logprobs.detach(), advantages=(0.5,))
    loss.backward()
    assert loss.item() == pytest.approx(-1.0) and logprobs.grad[0].tolist() == pytest.approx([-0.5, -0.5])


def test_k3_by_hand():
    """Guards the estimator's direction: exp(ref - pi) - (ref - pi) - 1, gradient (1 - exp(ref - pi)); 0 where equal."""
    logprobs = tensor([-1.0, -2.0]).requires_grad_(True)
    loss, metrics = grpo(logprobs, logprobs.detach(), ref=tensor([-1.0, -1.5]), advantages=(0.0,), kl_coef=0.1)
    loss.backward()
    expected = math.exp(0.5) - 0.5 - 1
    assert loss.item() == pytest.approx(0.1 * expected) and metrics["kl_sum"] == pytest.approx(expected)
    assert logprobs.grad[0].tolist() == pytest.approx([0, 0.1 * (1 - math.exp(0.5))])


def test_huge_ratios_are_clamped_before_exp_and_counted():
    """Guards NaN gradients: log-ratios of 500 stay finite, in loss and gradient, and two tokens are counted."""
    logprobs = tensor([0.0, -500.0, -1.0]).requires_grad_(True)
    loss, metrics = grpo(logprobs, tensor([-500.0, 0.0, -1.0]), ref=tensor([0.0, 0.0, -1.0]), advantages=(-1.0,), kl_coef=0.01)
    loss.backward()
    assert loss.isfinite() and logprobs.grad.isfinite().all() and metrics["clamped"] == 2


def test_the_three_means_by_hand():
    """Guards averages of averages: token losses 1, 1 (first) and 1, 1, 1, 1 (second) with advantages -1 and -4, by each mean."""
    mask = torch.tensor([[True, True, False, False], [True] * 4])
    zeros = torch.zeros(2, 4)
    counts = losses.denominators([2, 4])
    assert counts == {"token": 6, "sequence": 2, "constant": 2}
    values = {mean: grpo(zeros, zeros, None, (-1.0, -4.0), mask, mean=mean, denominator=counts[mean], constant_length=8)[0].item()
              for mean in ("token", "sequence", "constant")}
    assert values == pytest.approx({"token": (2 + 16) / 6, "sequence": (1 + 4) / 2, "constant": (2 + 16) / 8 / 2})


def test_bad_arguments_are_named():
    """Guards a silent fallback: an unknown mean, a missing reference, a missing length."""
    zeros = torch.zeros(1, 2)
    faults = (({"mean": "tokens"}, "expected token"), ({"kl_coef": 0.1}, "no reference"), ({"mean": "constant"}, "constant_length"))
    for settings, message in faults:
        with pytest.raises(ValueError, match=message):
            grpo(zeros, zeros, **settings)


def test_padding_is_never_read():
    """Guards masks: NaN beyond a response's end changes neither loss, gradient nor metrics."""
    mask = torch.tensor([[True, True, False]])
    dirty = tensor([-1.0, -2.0, NAN]).requires_grad_(True)
    loss, metrics = grpo(dirty, tensor([-1.5, -2.0, NAN]), tensor([-1.0, -1.0, NAN]), (1.0,), mask, 0.1)
    clean, expected = grpo(tensor([-1.0, -2.0]), tensor([-1.5, -2.0]), tensor([-1.0, -1.0]), (1.0,), None, 0.1)
    loss.backward()
    assert loss.item() == pytest.approx(clean.item()) and metrics == pytest.approx(expected)
    assert dirty.grad[0, 2] == 0 and dirty.grad.isfinite().all()


def test_inputs_are_left_as_they_are():
    """Guards in-place edits: every tensor is the same after each function."""
    generator = torch.Generator().manual_seed(0)
    logprobs, old, ref = (-torch.rand(2, 3, generator=generator) for _ in range(3))
    rewards, mask = torch.rand(2, 3, generator=generator), torch.tensor([[True, True, False], [True] * 3])
    inputs = [logprobs, old, ref, rewards, mask]
    before = [value.clone() for value in inputs]
    losses.sft_loss(logprobs, mask, 5)
    losses.dpo_loss(*logprobs, *old, 0.1, 0.1, 3)
    losses.group_advantages(rewards, True)
    losses.grpo_loss(logprobs, old, ref, rewards[:, 0], mask, 0.2, 0.3, 3.0, 0.1, "sequence", 2)
    assert all(torch.equal(now, then) for now, then in zip(inputs, before))


# ---- micro-batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", ["token", "sequence", "constant"])
def test_micro_batches_do_not_change_a_gradient(mean):
    """Guards per-micro-batch means: 1, 2 and 4 micro-batches of unlike lengths give one gradient of the adapters, through the model."""
    model = tiny_model()
    modeling.attach_lora(model, 4, 8, 0)
    items = prompts() + [prompt(8, 20)]
    features = modeling.encode_images(model, [picture for item in items for picture in item.images])
    groups = [(item, [words(3 + 5 * g, g) + [EOS], words(2, g + 9)]) for g, item in enumerate(items)]
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -2.0, 0.3, -0.3]).view(4, 2)
    counts = losses.denominators([len(response) for _, responses in groups for response in responses])

    def gradient(split):
        for parameter in modeling.lora_parameters(model).values():
            parameter.grad = None
        for rows in split:
            logprobs, mask = modeling.token_logprobs(model, [groups[row] for row in rows], features)
            old = logprobs.detach() + 0.1
            loss, _ = losses.grpo_loss(logprobs, old, old, advantages[rows].flatten(), mask, 0.2, 0.3, 3.0, 0.01, mean, counts[mean], 32)
            loss.backward()
        return torch.cat([parameter.grad.flatten() for parameter in modeling.lora_parameters(model).values()])

    whole = gradient([[0, 1, 2, 3]])
    for split in ([[3, 1], [0, 2]], [[0], [1], [2], [3]]):
        assert ((gradient(split) - whole).norm() / whole.norm()).item() < 1e-5

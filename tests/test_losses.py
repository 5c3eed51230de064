"""losses.py against numbers worked out by hand."""

import math

import pytest
import torch
from conftest import table
from tiny_model import features_of, prompts, tiny_model, with_lora, words

from losses import denominators, dpo_loss, group_advantages, grpo_loss, sequence_logprobs, sft_loss
from model import lora_parameters, token_logprobs

NAN = math.nan


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def grpo(logprobs, old, ref=None, advantages=(1.0,), mask=None, **changes):
    """grpo_loss with the paper's clipping, and a full mask unless one is given."""
    settings = {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": 3.0, "kl_coef": 0.0}
    settings |= {"mean": "token", "denominator": 1.0} | changes
    if mask is None:
        mask = torch.ones_like(logprobs, dtype=torch.bool)
    return grpo_loss(logprobs, old, ref, torch.as_tensor(advantages), mask, **settings)


def numbers(cell):
    return [float(number) for number in cell.split()]


def ratios(*values):
    """Log-probabilities (1, T) whose ratios to 0 are these."""
    return tensor(values).log()


# ---- SFT and DPO ---------------------------------------------------------------------------------


def test_sft_by_hand():
    """Guards the denominator and the mask: (1 + 2 + 4) / 10; padding that is not 0 is not read."""
    logprobs = tensor([-1, -2], [-4, -math.inf])
    mask = torch.tensor([[True, True], [True, False]])
    assert sft_loss(logprobs, mask, 10).item() == pytest.approx(0.7)
    assert sequence_logprobs(logprobs, mask).tolist() == [-3, -4]


def test_dpo_by_hand():
    """Guards signs. First pair: log-ratios +2 and -1, beta 0.5: rewards 1 and -0.5, margin 1.5.
    Second: -1 and 0, margin -0.5. Third: policy = reference: ln 2, no margin, no accuracy. The
    gradient: -beta * sigmoid(-margin) for the chosen, the opposite for the rejected."""
    chosen = torch.tensor([-3.0, -6.0, -2.0], requires_grad=True)
    rejected = torch.tensor([-5.0, -4.0, -9.0], requires_grad=True)
    references = torch.tensor([-5.0, -5.0, -2.0]), torch.tensor([-4.0, -4.0, -9.0])
    loss, metrics = dpo_loss(chosen, rejected, *references, 0.5, 4)
    loss.backward()
    pairs = math.log(1 + math.exp(-1.5)), math.log(1 + math.exp(0.5)), math.log(2)
    assert loss.item() == pytest.approx(sum(pairs) / 4)
    assert metrics == pytest.approx(
        {"chosen_reward": 0.5, "rejected_reward": -0.5, "margin": 1.0, "accuracy": 1.0}
    )
    slopes = [0.5 / 4 / (1 + math.exp(margin)) for margin in (1.5, -0.5, 0)]
    assert (-chosen.grad).tolist() == rejected.grad.tolist() == pytest.approx(slopes)


# ---- advantages ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rewards, times_root, root",
    table("""
        1 2 3                       | -1  0  1 | 1
        0 0 3                       | -1 -1  2 | 3
        1 nan 3                     | -1  0  1 | 2
        nan nan 2                   |  0  0  0 | 1
        nan nan nan                 |  0  0  0 | 1
        0.30000000000000004 0.3 0.3 |  0  0  0 | 1
        0.5 0.501 0.5               | -1  2 -1 | 3
    """),
)
def test_advantages_by_hand(rewards, times_root, root):
    """Guards the deviation (unbiased: of 1, 2, 3 it is 1 and not the root of 2/3), mean and
    deviation over anything but the scored samples, and rounding errors that eps blows up. Expected
    are the numbers over the root of the last column."""
    rewards = torch.tensor([numbers(rewards)], dtype=torch.float64)
    advantages, spread = group_advantages(rewards, use_std=True)
    expected = tensor(numbers(times_root))
    torch.testing.assert_close(advantages, expected / float(root) ** 0.5, atol=3e-3, rtol=0)
    assert spread.tolist() == [expected.any()]


def test_advantages_without_the_deviation():
    """Dr. GRPO. Guards a division that stays."""
    advantages, _ = group_advantages(tensor([1, 2, 3], [0, 0, 3]), use_std=False)
    assert advantages.tolist() == [[-1, 0, 1], [-1, -1, 2]]


# ---- GRPO ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, advantage, dual_clip, counted, clipped",
    table("""
        0.5 1.1 2 |  2 | 3 | 0.5 1.1 1.3 | 0 1 0
        0.5 1.1 2 | -2 | 3 | 0.8 1.1 2   | 1 0 0
        10 2      | -1 | 3 | 3 2         | 0 0 1
        10 2      | -1 | 0 | 10 2        | 0 0 0
        10 2      |  1 | 3 | 1.3 1.3     | 0 2 0
    """),
)
def test_clipping_by_hand(values, advantage, dual_clip, counted, clipped):
    """Guards each bound on its own side, and that it is counted there: what each ratio counts as,
    and how many are clipped below, above and by the dual clip (only where A < 0)."""
    logprobs = ratios(*numbers(values))
    settings = {"advantages": (float(advantage),), "dual_clip": float(dual_clip) or None}
    loss, metrics = grpo(logprobs, torch.zeros_like(logprobs), **settings)
    assert loss.item() == pytest.approx(-float(advantage) * sum(numbers(counted)))
    shares = [metrics[f"{name}_share"] for name in ("clip_low", "clip_high", "dual_clip")]
    assert shares == numbers(clipped) and metrics["tokens"] == logprobs.numel()


def test_gradient_by_hand():
    """Guards a clamp on the wrong side, and old log-probabilities with a graph: -A * ratio within
    the bounds, so -A on policy; 0 beyond them."""
    logprobs = ratios(1, 2, 0.5).requires_grad_(True)
    grpo(logprobs, torch.zeros(1, 3))[0].backward()
    assert logprobs.grad[0].tolist() == pytest.approx([-1, 0, -0.5])


def test_k3_by_hand():
    """Guards the direction: exp(ref - pi) - (ref - pi) - 1, gradient 1 - exp(ref - pi)."""
    logprobs = tensor([-1.0, -2.0]).requires_grad_(True)
    reference = tensor([-1.0, -1.5])
    loss, metrics = grpo(logprobs, logprobs.detach(), reference, (0.0,), kl_coef=0.1)
    loss.backward()
    k3 = math.exp(0.5) - 0.5 - 1
    assert loss.item() == pytest.approx(0.1 * k3)
    assert metrics["kl"] == pytest.approx(k3)
    assert logprobs.grad[0].tolist() == pytest.approx([0, 0.1 * (1 - math.exp(0.5))])


def test_huge_ratios_are_clamped_before_exp_and_counted():
    """Guards NaN gradients: log-ratios of 500 stay finite; two of three tokens are counted."""
    logprobs = tensor([0.0, -500.0, -1.0]).requires_grad_(True)
    old = tensor([-500.0, 0.0, -1.0])
    loss, metrics = grpo(logprobs, old, tensor([0.0, 0.0, -1.0]), (-1.0,), kl_coef=0.01)
    loss.backward()
    assert loss.isfinite() and logprobs.grad.isfinite().all()
    assert metrics["clamped"] == 2


@pytest.mark.parametrize(
    "mean, expected",
    [("token", (2 + 16) / 6), ("sequence", (1 + 4) / 2), ("constant", (2 + 16) / 8 / 2)],
)
def test_the_three_means_by_hand(mean, expected):
    """Guards averages of averages: token losses 1, 1 and 4, 4, 4, 4. And masks: NaN beyond a
    response's end changes neither loss, gradient nor metrics."""
    logprobs = tensor([0, 0, NAN, NAN], [0] * 4).requires_grad_(True)
    mask = ~logprobs.isnan()
    settings = {"mean": mean, "denominator": denominators([2, 4])[mean], "constant_length": 8}
    old = logprobs.detach()
    loss, metrics = grpo(logprobs, old, old, (-1.0, -4.0), mask, kl_coef=0.1, **settings)
    loss.backward()
    assert loss.item() == pytest.approx(expected)
    assert logprobs.grad.sum().item() == pytest.approx(expected)  # the slope of A * ratio
    assert not logprobs.grad[~mask].any()
    assert metrics == dict.fromkeys(metrics, 0) | {"tokens": 6}


def test_bad_arguments_are_named():
    """Guards a silent fallback."""
    for message, settings in (
        ("expected token", {"mean": "tokens"}),
        ("no reference", {"kl_coef": 0.1}),
        ("constant_length", {"mean": "constant"}),
    ):
        with pytest.raises(ValueError, match=message):
            grpo(torch.zeros(1, 2), torch.zeros(1, 2), **settings)


# ---- micro-batches -------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", ["token", "sequence", "constant"])
def test_micro_batches_do_not_change_a_gradient(mean):
    """Guards means per micro-batch: 1, 2 and 3 of unlike lengths give the adapters one gradient."""
    model = with_lora(tiny_model())
    groups = [(item, [words(3 + 5 * g, g), words(2, g)]) for g, item in enumerate(prompts())]
    advantages = torch.tensor([[1.0, -1.0], [0.5, -0.5], [2.0, -2.0]])
    features = features_of(model, prompts())
    divisor = denominators([3, 2, 8, 2, 13, 2])[mean]
    settings = {"mean": mean, "denominator": divisor, "constant_length": 32, "kl_coef": 0.01}

    def gradient(*split):
        total = 0
        for rows in split:
            logprobs, mask = token_logprobs(model, [groups[row] for row in rows], features)
            old = logprobs.detach() + 0.1
            loss, _ = grpo(logprobs, old, old, advantages[rows].flatten(), mask, **settings)
            found = torch.autograd.grad(loss, list(lora_parameters(model).values()))
            total += torch.cat([part.flatten() for part in found])
        return total

    whole = gradient([0, 1, 2])
    for split in ([[2, 0], [1]], [[0], [1], [2]]):
        assert (gradient(*split) - whole).norm() < 1e-5 * whole.norm()

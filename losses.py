"""The objectives of the three stages: pure functions of tensors, the equation in each docstring.

No model, device, configuration or logging in here. Every loss is a sum divided by a denominator
that the caller gives: a count over the *global* batch, known before its micro-batches are run, so
that neither micro-batches nor ranks can change a gradient. Metrics are sums too, to be added up and
divided once. Nothing edits its inputs.

Paper: SFT, then DPO, then GRPO (PAPERS 1.5). The constants of GRPO are those of the released code;
the settings of SFT and DPO beyond the learning rate were not found, so their standard forms are
used.

Letters in shapes: S responses, T tokens (right-padded), B pairs, G groups, K responses per group.
"""

import math

import torch
import torch.nn.functional as F

# exp(20) = 4.9e8. Clamped before exp: clamping after it gives 0 * inf in the gradient.
LOG_RATIO_LIMIT = 20.0


def sft_loss(logprobs, mask, denominator):
    """Cross-entropy on response tokens: - sum_{s,t} mask * log pi(y_t | x, y_<t) / denominator.

    Args: logprobs (S, T); mask (S, T) bool; denominator: response tokens of the global batch.
    Returns a scalar.
    """
    return -torch.where(mask, logprobs, 0.0).sum() / denominator


def sequence_logprobs(logprobs, mask):
    """log pi(y | x) = sum_t log pi(y_t | x, y_<t). logprobs, mask (S, T) -> (S,)."""
    return torch.where(mask, logprobs, 0.0).sum(dim=1)


def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, denominator):
    """Direct preference optimisation, sigmoid form (Rafailov et al. 2023, Eq. 7).

        z    = beta * [(log pi(y_w) - log ref(y_w)) - (log pi(y_l) - log ref(y_l))]
        loss = sum_b -log sigmoid(z) / denominator             ln 2 per pair where pi = ref

    Args: four tensors (B,) of sequence log-probabilities; denominator: pairs of the global batch.
    Returns loss, metrics: sums over pairs of chosen_reward and rejected_reward (beta * log-ratio),
    margin (z), accuracy (z > 0).
    """
    chosen = beta * (policy_chosen.float() - ref_chosen.float())  # (B,)
    rejected = beta * (policy_rejected.float() - ref_rejected.float())  # (B,)
    margin = chosen - rejected
    metrics = {
        "chosen_reward": chosen.sum().item(),
        "rejected_reward": rejected.sum().item(),
        "margin": margin.sum().item(),
        "accuracy": (margin > 0).sum().item(),
    }
    return -F.logsigmoid(margin).sum() / denominator, metrics


def group_advantages(rewards, use_std, eps=1e-6):
    """Group-relative advantages (GRPO): A_k = r_k - mean(r), over std(r) + eps if use_std.

    Mean and unbiased standard deviation run over the scored samples of a group (PAPERS 1.5; without
    std: Dr. GRPO). A group teaches nothing when fewer than two samples were scored, or when all
    scored rewards are equal (max - min < 1e-6, a test on the rewards: eps alone would blow rounding
    errors up to advantages of size 1).

    Args: rewards (G, K), NaN where there is no score.
    Returns advantages (G, K) float32, 0 where unscored or where the group teaches nothing; spread
    (G,) bool: the groups that teach.
    """
    rewards = rewards.double()  # equal rewards stay equal
    scored = ~rewards.isnan()
    count = scored.sum(dim=1)  # (G,)
    highest = rewards.masked_fill(~scored, -math.inf).amax(dim=1)
    lowest = rewards.masked_fill(~scored, math.inf).amin(dim=1)
    spread = (count >= 2) & (highest - lowest >= 1e-6)
    mean = rewards.nansum(dim=1) / count.clamp(min=1)  # (G,)
    centered = torch.where(scored, rewards - mean[:, None], 0.0)  # (G, K)
    if use_std:
        std = (centered.square().sum(dim=1) / (count - 1).clamp(min=1)).sqrt()  # (G,)
        centered = centered / (std + eps)[:, None]
    return torch.where(spread[:, None], centered, 0.0).float(), spread


def denominators(lengths):
    """What each mean of grpo_loss divides by.

    Args: lengths: of every response of the global batch, over all micro-batches and ranks. The
    constant length of "constant" divides inside grpo_loss.
    """
    return {"token": sum(lengths), "sequence": len(lengths), "constant": len(lengths)}


def grpo_loss(
    logprobs,
    old_logprobs,
    ref_logprobs,
    advantages,
    mask,
    clip_low,
    clip_high,
    dual_clip,
    kl_coef,
    mean,
    denominator,
    constant_length=None,
):
    """Clipped policy gradient with group advantages and a KL penalty (GRPO; DeepSeekMath Eq. 3 with
    separate clip bounds).

        ratio = exp(log pi - log old)
        gain  = min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)
        gain  = max(gain, dual_clip * A)              where A < 0 (Ye et al. 2020, 1912.09729)
        k3    = exp(log ref - log pi) - (log ref - log pi) - 1    estimates KL(pi || ref)
        loss  = reduce(-gain + kl_coef * k3)

    reduce: "token": sum over tokens / tokens; "sequence": mean over a response's tokens, then sum
    over responses / responses; "constant": sum over tokens / constant_length / responses (Dr.
    GRPO). The divisor is `denominators(...)[mean]`. clip_high over clip_low: DAPO (2503.14476). k3:
    joschu.net/blog/kl-approx.html. Log-ratios are clamped to +-20 before exp (ours), and counted.
    On policy, old_logprobs = logprobs.detach().

    Args: logprobs, old_logprobs, mask (S, T); ref_logprobs (S, T), or None without a KL term;
    advantages (S,); dual_clip: > 1, or 0 or None.
    Returns loss, metrics: sums over tokens: tokens, clip_low_share, clip_high_share,
    dual_clip_share, clamped, kl (k3; 0 without a reference).
    Raises ValueError on an unknown mean, "constant" without its length, a KL term without
    reference.
    """
    if mean not in ("token", "sequence", "constant"):
        raise ValueError(f"mean is {mean!r}; expected token, sequence or constant")
    if mean == "constant" and not constant_length:
        raise ValueError("mean is constant, but no constant_length was given")
    if kl_coef and ref_logprobs is None:
        raise ValueError(f"kl_coef is {kl_coef}, but there are no reference log-probabilities")
    advantages = advantages.float()[:, None]  # (S, 1)
    log_ratio = torch.where(mask, logprobs.float() - old_logprobs.float(), 0.0)  # (S, T)
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    gain = torch.minimum(ratio * advantages, clipped * advantages)
    dual = torch.zeros_like(mask)
    if dual_clip:
        floor = torch.where(advantages < 0, dual_clip * advantages, -math.inf)
        dual = mask & (gain < floor)
        gain = torch.maximum(gain, floor)
    clamped = log_ratio.abs() > LOG_RATIO_LIMIT
    k3 = torch.zeros_like(log_ratio)
    if ref_logprobs is not None:
        ref_ratio = torch.where(mask, ref_logprobs.float() - logprobs.float(), 0.0)
        clamped = clamped | (ref_ratio.abs() > LOG_RATIO_LIMIT)
        ref_ratio = ref_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        k3 = ref_ratio.exp() - ref_ratio - 1
    token_loss = torch.where(mask, -gain + kl_coef * k3, 0.0)  # (S, T)
    if mean == "sequence":  # a response without tokens adds 0
        token_loss = token_loss / mask.sum(dim=1, keepdim=True).clamp(min=1)
    elif mean == "constant":
        token_loss = token_loss / constant_length
    sums = {
        "tokens": mask,
        "clip_low_share": mask & (advantages < 0) & (ratio < 1 - clip_low),
        "clip_high_share": mask & (advantages > 0) & (ratio > 1 + clip_high),
        "dual_clip_share": dual,
        "clamped": clamped,
        "kl": torch.where(mask, k3, 0.0),
    }
    metrics = {name: value.detach().sum().item() for name, value in sums.items()}
    return token_loss.sum() / denominator, metrics

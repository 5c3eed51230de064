"""The three training stages of SaFeR-ToolKit: SFT -> DPO -> GRPO, one plain loop each (settings: PAPERS 1.5; reward: PAPERS 1.6).

    python safer.py sft  --recipe tiny        cross-entropy on planned responses
    python safer.py dpo  --recipe tiny        sigmoid loss on (good, perturbed) responses
    python safer.py grpo --recipe tiny        K samples per prompt, rewarded for answer and tool trace
    torchrun --nproc_per_node 8 safer.py grpo --recipe 3b

Same command, same run: an interrupted stage goes on where it was, a finished one is skipped. What the stages share is in stage.py.
Departures from the papers: LoRA and a frozen vision tower (the released GRPO trains all weights), see README.
"""

import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import data
import judge as judging
import losses
import model as modeling
import protocol
import reward as rewarding
import rollout
import toy
from config import STAGES, ConfigError, parse_config, save_config
from stage import StageError, add, batch_at, encode_images, open_run, optimiser_step, save_checkpoint, say, stable_hash, stage_steps, steps_of, token_logprobs, total, write_metrics


# ---- SFT ----------------------------------------------------------------------------------------------------------------


def train_sft(run, records):
    """Cross-entropy on response tokens: losses.sft_loss over the tokens of the whole batch."""
    config, modes = run.config, run.config.sft_prompts.split(",")
    steps = stage_steps(config, "sft", len(records))
    for step, bar in steps_of(run, steps):
        groups = []
        for record, epoch in batch_at(records, step, config.sft_batch, config.seed)[run.rank :: run.world]:
            prompt = data.record_prompt(record, data.prompt_mode(record, modes, epoch), run.processor)
            groups.append((prompt, [data.encode_response(record.texts["response"], run.processor)]))
        tokens = total(run, sum(len(response) for _, responses in groups for response in responses))
        features = encode_images(run, groups)
        for rows in modeling.micro_batches(groups, run.micro_tokens):
            logprobs, mask = token_logprobs(run, [groups[row] for row in rows], features)
            loss = losses.sft_loss(logprobs, mask, tokens)
            loss.backward()
            add(run, loss=(loss.item() * tokens, mask.sum()))
        metrics = write_metrics(run, step, tokens=tokens, **optimiser_step(run, step, steps))
        bar.set_postfix(loss=f"{metrics['loss']:.3f}")


# ---- DPO ----------------------------------------------------------------------------------------------------------------


def train_dpo(run, records):
    """Sigmoid loss on (chosen, rejected): losses.dpo_loss. The pair shares its prompt's forward pass; the reference is the LoRA off."""
    config, modes = run.config, run.config.dpo_prompts.split(",")
    steps = stage_steps(config, "dpo", len(records))
    for step, bar in steps_of(run, steps):
        groups = []
        for record, epoch in batch_at(records, step, config.dpo_batch, config.seed)[run.rank :: run.world]:
            prompt = data.record_prompt(record, data.prompt_mode(record, modes, epoch), run.processor)
            groups.append((prompt, [data.encode_response(record.texts[name], run.processor) for name in ("chosen", "rejected")]))
        chosen_tokens = total(run, sum(len(chosen) for _, (chosen, _) in groups))
        features = encode_images(run, groups)
        for rows in modeling.micro_batches(groups, run.micro_tokens):
            micro = [groups[row] for row in rows]
            with torch.no_grad(), modeling.adapters_off(run.model):
                ref, mask = token_logprobs(run, micro, features)
            ref = losses.sequence_logprobs(ref, mask)  # (2B,)
            logprobs, mask = token_logprobs(run, micro, features)
            policy = losses.sequence_logprobs(logprobs, mask)  # (2B,)
            loss, sums = losses.dpo_loss(policy[0::2], policy[1::2], ref[0::2], ref[1::2], config.dpo_beta, config.dpo_label_smoothing, config.dpo_batch)
            if step == 0 and (abs(loss.item() * config.dpo_batch / len(rows) - math.log(2)) > 1e-3 or abs(float(sums["margin"])) > 1e-2):
                raise StageError(f"dpo: the first loss is {loss.item() * config.dpo_batch / len(rows):.5f}, not ln 2: policy and reference differ before training")
            if config.dpo_sft_coef:
                loss = loss + config.dpo_sft_coef * losses.sft_loss(logprobs[0::2], mask[0::2], chosen_tokens)
            loss.backward()
            add(run, loss=(loss.item() * config.dpo_batch, len(rows)), chosen_logprob=(policy[0::2].sum(), len(rows)), rejected_logprob=(policy[1::2].sum(), len(rows)),
                **{name: (value, len(rows)) for name, value in sums.items()})
        metrics = write_metrics(run, step, pairs=config.dpo_batch, **optimiser_step(run, step, steps))
        bar.set_postfix(loss=f"{metrics['loss']:.3f}", accuracy=f"{metrics['accuracy']:.2f}", margin=f"{metrics['margin']:.2f}")


# ---- GRPO ---------------------------------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """One prompt with its K samples and what they earned."""

    record: data.Record
    mode: str
    prompt: data.Prompt
    samples: list  # K rollout.Sample
    texts: list  # K response texts
    rewards: list  # K reward.Reward, or None where the judge failed
    advantages: torch.Tensor | None = None  # (K,)


def train_grpo(run, records):
    """Sample, judge, reward, normalise inside the group, update: losses.group_advantages and losses.grpo_loss."""
    config, judge = run.config, make_judge(run.config)
    steps = stage_steps(config, "grpo", len(records))
    for step, bar in steps_of(run, steps):
        picked = batch_at(records, step, config.grpo_batch, config.seed)
        parts = [picked[start : start + config.grpo_update_batch][run.rank :: run.world] for start in range(0, len(picked), config.grpo_update_batch)]
        down = None
        try:
            rollouts, features = sample_group(run, judge, [item for part in parts for item in part], step)
        except judging.JudgeError as problem:
            down = problem
        if total(run, down is not None):  # all ranks leave together
            if step > run.first_step:  # before the first update there is nothing to save
                save_checkpoint(run, step)
            raise down or judging.JudgeError("the judge failed on another rank, see its message")
        start, norms = time.time(), []
        for number, part in enumerate(parts):
            mine, rollouts_left = rollouts[: len(part)], rollouts[len(part) :]
            update_policy(run, mine, features, on_policy=number == 0, first=step == 0 and number == 0)
            norms.append(optimiser_step(run, step, steps))
            rollouts = rollouts_left
        add(run, seconds_update=((time.time() - start) / run.world, 1 / run.world))
        metrics = write_metrics(run, step, grad_norm=sum(item["grad_norm"] for item in norms) / len(norms), lr=norms[-1]["lr"], judge_counts=dict(judge.counts))
        bar.set_postfix(reward=f"{metrics['reward'] or 0:.3f}", legal=f"{metrics['legal']:.2f}", kl=f"{metrics.get('kl') or 0:.4f}", diff=f"{metrics.get('sampler_diff') or 0:.0e}")
        warn_if_idle(run, step, metrics)


def make_judge(config):
    """The judge that the config names."""
    if config.judge == "toy":
        return toy.ToyJudge()
    return judging.LabelsJudge() if config.judge == "labels" else judging.judge_from_env(os.path.join(config.out, "judge_cache"))


def sample_group(run, judge, items, step):
    """K samples for each (record, epoch), their rewards and advantages. Returns (rollouts, image features)."""
    config, start = run.config, time.time()
    modes = [data.prompt_mode(record, config.grpo_prompts.split(","), epoch) for record, epoch in items]
    prompts = [data.record_prompt(record, mode, run.processor) for (record, _), mode in zip(items, modes)]
    features = encode_images(run, [(prompt, []) for prompt in prompts])
    seeds = [stable_hash("sample", config.seed, step, epoch, record.id) for record, epoch in items]
    sampled = rollout.sample(run.model, prompts, features, config.grpo_k, config.max_response, config.temperature, run.processor.end_of_turn, seeds, config.rollout_rows)
    seconds_sampling, start = time.time() - start, time.time()
    rollouts = []
    for (record, _), mode, prompt, samples in zip(items, modes, prompts, sampled):
        texts = [data.decode_response(sample.tokens, run.processor) for sample in samples]
        rollouts.append(Rollout(record, mode, prompt, samples, texts, []))
    scores = iter(judge.score([judging.Case(item.record.question, item.record.images, text, item.record.meta) for item in rollouts for text in item.texts]))
    for item in rollouts:
        plan = data.shown_plan(item.record, item.mode)
        item.rewards = [rewarding.compute_reward(config.reward, text, plan, next(scores), answer_form(text)) for text in item.texts]
    rewards = torch.tensor([[math.nan if reward is None else reward.total for reward in item.rewards] for item in rollouts], dtype=torch.float32)  # (G, K)
    advantages, spread = losses.group_advantages(rewards, config.advantage_std)
    for item, row in zip(rollouts, advantages):
        item.advantages = row
    tokens = sum(len(sample.tokens) for item in rollouts for sample in item.samples)
    add(run, zero_spread=((~spread).sum(), len(rollouts)), seconds_sampling=(seconds_sampling / run.world, 1 / run.world), seconds_judging=((time.time() - start) / run.world, 1 / run.world),
        sampled_per_second=(tokens, seconds_sampling / run.world))
    measure_rollouts(run, rollouts)
    if step == 0:
        check_first_rollout(run, rollouts)
    write_samples(run, rollouts[:2], step)
    return rollouts, features


def answer_form(text):
    """comply or refuse, by the answer's phrases; None where there is no answer."""
    answer = protocol.check(text).answer
    return None if answer is None else judging.answer_form(answer)


def measure_rollouts(run, rollouts):
    """Sums for the metrics: rewards and their parts, legal traces, lengths, truncation, variety, unscored samples."""
    for item in rollouts:
        scored = [reward for reward in item.rewards if reward is not None]
        plan, count = data.shown_plan(item.record, item.mode), len(item.samples)
        checks = [protocol.check(text, plan) for text in item.texts]
        add(run, reward=(sum(reward.total for reward in scored), len(scored)), unscored=(count - len(scored), count), legal=(sum(check.legal for check in checks), count),
            calls=(sum(len(check.calls) for check in checks), count), length=(sum(len(sample.tokens) for sample in item.samples), count),
            truncated=(sum(not sample.finished for sample in item.samples), count), distinct=(len({tuple(sample.tokens) for sample in item.samples}), count))
        for reward in scored:
            add(run, **{f"reward_{name}": (value, 1) for name, value in reward.parts.items()})


def check_first_rollout(run, rollouts):
    """Before the first update: the samples of a prompt differ, and none holds a vision token."""
    banned = set(modeling.banned_token_ids(run.model))
    if any(banned & set(sample.tokens) for item in rollouts for sample in item.samples):
        raise StageError("grpo: a response holds a vision token; the next forward pass would look for its image")
    if all(len({tuple(sample.tokens) for sample in item.samples}) == 1 for item in rollouts):
        raise StageError("grpo: all samples of every prompt are equal, so no group can teach anything; is --temperature too low?")


def write_samples(run, rollouts, step):
    """A few prompts with their best and worst sample, reward parts and reasons, as text."""
    if run.rank:
        return
    with open(run.folder / "samples.txt", "a", encoding="utf-8") as file:
        for item in rollouts:
            order = sorted(range(len(item.texts)), key=lambda k: -1.0 if item.rewards[k] is None else item.rewards[k].total)
            for k in (order[-1], order[0]):
                reward = item.rewards[k]
                told = "no score: the judge failed" if reward is None else f"reward {reward.total:.3f} {json.dumps({n: round(v, 3) for n, v in reward.parts.items()})} {'; '.join(reward.reasons)}"
                file.write(f"== step {step}, {item.record.id}, {item.mode} prompt, advantage {item.advantages[k]:+.2f}\n{item.record.question}\n-- {told}\n{item.texts[k]}\n\n")


def update_policy(run, rollouts, features, on_policy, first):
    """Gradients of the GRPO loss over one update batch. `old` is what the sampler reported: no second pass is needed for it."""
    config = run.config
    kept = [[k for k, reward in enumerate(item.rewards) if reward is not None] for item in rollouts]  # a sample without a score trains nothing
    kept = [(item, ks) for item, ks in zip(rollouts, kept) if ks]
    groups = [(item.prompt, [item.samples[k].tokens for k in ks]) for item, ks in kept]
    counts = losses.denominators([len(response) for _, responses in groups for response in responses])
    denominator = total(run, counts[config.loss_mean])
    for rows in modeling.micro_batches(groups, run.micro_tokens):
        micro = [groups[row] for row in rows]
        old = pad([kept[row][0].samples[k].logprobs for row in rows for k in kept[row][1]], run.device)  # (S, T)
        advantages = torch.cat([kept[row][0].advantages[kept[row][1]] for row in rows]).to(run.device)  # (S,)
        ref = None
        if config.kl_coef:
            with torch.no_grad(), modeling.adapters_off(run.model):
                ref, _ = token_logprobs(run, micro, features, config.temperature)
        logprobs, mask, entropy = token_logprobs(run, micro, features, config.temperature, entropy=True)
        loss, sums = losses.grpo_loss(logprobs, old, ref, advantages, mask, config.clip_low, config.clip_high, config.dual_clip or None, config.kl_coef,
                                      config.loss_mean, denominator, config.max_response)
        loss.backward()
        tokens = sums.pop("tokens")
        add(run, loss=(loss.item() * denominator, losses.denominators(mask.sum(1).tolist())[config.loss_mean]), entropy=(entropy.sum(), tokens),
            **{name.removesuffix("_sum").replace("_count", "_share"): (value, tokens) for name, value in sums.items()})
        if on_policy:  # sampler and trainer are one function: what is left is rounding
            difference = (logprobs.detach() - old).abs()
            add(run, sampler_diff=(difference.sum(), tokens))
            if first:
                check_first_update_batch(run, difference.sum().item() / tokens, 0.0 if ref is None else (logprobs.detach() - ref).abs().max().item())


def check_first_update_batch(run, sampler_diff, ref_diff):
    """Before the first update sampler, trainer and reference are the same model: float32 to rounding, bfloat16 to its 8 bits."""
    limit = 1e-4 if run.config.dtype == "float32" else 0.05
    if sampler_diff > limit:
        raise StageError(f"grpo: sampler and trainer log-probabilities differ by {sampler_diff:.2e} per token before the first update (limit {limit})")
    if ref_diff > limit:
        raise StageError(f"grpo: policy and reference differ by {ref_diff:.2e} before the first update, where the KL must be 0")


def pad(rows, device):
    """Lists of unequal length -> (S, T) float32, padded with 0 on the right."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.float32) for row in rows], batch_first=True).to(device)


def warn_if_idle(run, step, metrics):
    """One plain sentence when a step could teach next to nothing."""
    if metrics["zero_spread"] > 0.9:
        say(run, f"step {step}: {metrics['zero_spread']:.0%} of the groups have equal rewards and teach nothing: the prompts are too easy or too hard")
    if metrics["truncated"] > 0.9:
        say(run, f"step {step}: {metrics['truncated']:.0%} of the responses were cut at --max_response {run.config.max_response}")


# ---- command line -------------------------------------------------------------------------------------------------------


def main(argv):
    """One stage, from its name and flags to its adapter file."""
    if not argv or argv[0] not in STAGES:
        raise ConfigError(f"usage: python safer.py {'|'.join(STAGES)} [--flag value ...]; python config.py --help lists the flags")
    stage, config = argv[0], parse_config(argv[1:])
    if stage not in config.stages.split(","):
        return print(f"{stage}: not among --stages {config.stages}")
    if (Path(config.out) / stage / "adapter.safetensors").exists():
        save_config(config, Path(config.out) / stage, stage)  # an error if the settings are not those of the finished stage
        return print(f"{stage}: {config.out}/{stage} is finished already")
    if stage == "grpo" and config.judge == "endpoint":
        make_judge(config).preflight()  # what is wrong with URL, key or model is told before the weights are loaded
    records = data.read_records(data.set_path(config.data or os.path.join(config.out, "data"), stage), stage)
    if stage == "grpo" and config.judge == "toy":
        for record in records:
            toy.case_of(record.meta)
    run = open_run(config, stage, records)
    start = time.time()
    {"sft": train_sft, "dpo": train_dpo, "grpo": train_grpo}[stage](run, records)
    say(run, f"{stage}: {time.time() - start:.0f} s, saved to {run.folder}/adapter.safetensors")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, ConfigError, data.DataError, StageError, modeling.ModelError, judging.JudgeError) as problem:
        sys.exit(str(problem))

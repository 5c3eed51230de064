"""The training stages of both papers, one plain loop each: SFT -> DPO -> GRPO, or GRPO alone (settings: PAPERS 1.5, 2.5).

    python safer.py sft  --recipe tiny        cross-entropy on planned responses
    python safer.py dpo  --recipe tiny        sigmoid loss on (good, perturbed) responses
    python safer.py grpo --recipe tiny        K samples per prompt, rewarded for answer and tool trace
    torchrun --nproc_per_node 8 safer.py grpo --recipe 3b
    python safer.py grpo --recipe tiny-vlm    SaFeR-VLM: unsafe samples are reflected on and corrected (PAPERS 2.3), structured reward
    python -m extras.chat out/tiny           try what was trained

Same command, same run: an interrupted stage goes on where it was, a finished one is skipped. What the stages share is in stage.py.
Departures from the papers: LoRA, and a frozen vision tower (the released GRPO trains it, PAPERS 1.5), see README.
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
import planner
import protocol
import reward as rewarding
import rollout
from config import STAGES, ConfigError, parse_config, save_config
from trainer import (StageError, add, append_log, batch_at, check_finite, encode_images, make_judge, open_run, optimiser_step,
                   save_checkpoint, say, stable_hash, stage_steps, steps_of, token_logprobs, total, write_metrics)


# ---- SFT -----------------------------------------------------------------------------------------


def train_sft(run, records):
    """Cross-entropy on response tokens: losses.sft_loss over the tokens of the whole batch."""
    config, modes = run.config, run.config.sft_prompts.split(",")
    steps = stage_steps(config, "sft", len(records))
    for step, bar in steps_of(run, steps):
        picked, groups = batch_at(records, step, config.sft_batch, config.seed)[run.rank :: run.world], []
        for record, epoch in picked:
            prompt = data.record_prompt(record, data.prompt_mode(record, modes, epoch), run.processor)
            groups.append((prompt, [data.encode_response(record.texts["response"], run.processor)]))
        tokens = total(run, sum(len(response) for _, responses in groups for response in responses))
        features = encode_images(run, groups)
        for rows in modeling.micro_batches(groups, run.micro_tokens):
            logprobs, mask = token_logprobs(run, [groups[row] for row in rows], features)
            loss = losses.sft_loss(logprobs, mask, tokens)
            loss.backward()
            check_finite(run, step, loss, [picked[row][0].id for row in rows])
            add(run, loss=(loss.item() * tokens, mask.sum()))
        metrics = write_metrics(run, step, tokens=tokens, **optimiser_step(run, step, steps))
        bar.set_postfix(loss=f"{metrics['loss']:.3f}")


# ---- DPO -----------------------------------------------------------------------------------------


def train_dpo(run, records):
    """Sigmoid loss on (chosen, rejected): losses.dpo_loss. The pair shares its prompt's forward pass; the reference is the LoRA off."""
    config, modes = run.config, run.config.dpo_prompts.split(",")
    steps = stage_steps(config, "dpo", len(records))
    for step, bar in steps_of(run, steps):
        picked, groups = batch_at(records, step, config.dpo_batch, config.seed)[run.rank :: run.world], []
        for record, epoch in picked:
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
            loss, sums = losses.dpo_loss(policy[0::2], policy[1::2], ref[0::2], ref[1::2], config.dpo_beta, config.dpo_label_smoothing,
                                         config.dpo_batch)
            per_pair = loss.item() * config.dpo_batch / len(rows)
            if step == 0 and (abs(per_pair - math.log(2)) > 1e-3 or abs(float(sums["margin"])) > 1e-2):
                raise StageError(f"dpo: the first loss is {per_pair:.5f}, not ln 2: policy and reference differ before training")
            if config.dpo_sft_coef:
                loss = loss + config.dpo_sft_coef * losses.sft_loss(logprobs[0::2], mask[0::2], chosen_tokens)
            loss.backward()
            check_finite(run, step, loss, [picked[row][0].id for row in rows])
            sums |= {"loss": loss.item() * config.dpo_batch, "chosen_logprob": policy[0::2].sum(), "rejected_logprob": policy[1::2].sum()}
            add(run, **{name: (value, len(rows)) for name, value in sums.items()})
        metrics = write_metrics(run, step, pairs=config.dpo_batch, **optimiser_step(run, step, steps))
        bar.set_postfix(loss=f"{metrics['loss']:.3f}", accuracy=f"{metrics['accuracy']:.2f}", margin=f"{metrics['margin']:.2f}")


# ---- GRPO ----------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """One prompt and the group of trajectories that it gave: K responses, and in SaFeR-VLM corrections of the unsafe ones."""

    record: data.Record
    mode: str
    seed: int  # of its samples
    group: list  # of rollout.Trajectory


def train_grpo(run, records):
    """Sample, judge, reward, normalise inside the group, update: losses.group_advantages and losses.grpo_loss."""
    config, judge = run.config, make_judge(run.config)
    steps = stage_steps(config, "grpo", len(records))
    for step, bar in steps_of(run, steps):
        picked = batch_at(records, step, config.grpo_batch, config.seed)
        starts = range(0, len(picked), config.grpo_update_batch)
        parts = [picked[start : start + config.grpo_update_batch][run.rank :: run.world] for start in starts]
        down = None
        try:
            rollouts, features = roll_out(run, judge, [item for part in parts for item in part], step)
        except judging.JudgeError as problem:
            down = problem
        if total(run, down is not None):  # all ranks leave together
            if step > run.first_step:  # before the first update there is nothing to save
                save_checkpoint(run, step)
            raise down or judging.JudgeError("the judge failed on another rank, see its message")
        start, norms = time.time(), []
        for number, part in enumerate(parts):
            mine, rollouts = rollouts[: len(part)], rollouts[len(part) :]
            update_policy(run, step, mine, features, on_policy=number == 0)
            norms.append(optimiser_step(run, step, steps))
        add(run, seconds_update=((time.time() - start) / run.world, 1 / run.world))
        metrics = write_metrics(run, step, grad_norm=sum(item["grad_norm"] for item in norms) / len(norms), lr=norms[-1]["lr"],
                                judge_counts=dict(judge.counts))
        show_progress(run, bar, metrics)


def roll_out(run, judge, items, step):
    """The groups of these (record, epoch), judged, rewarded and with their advantages. Returns (rollouts, image features)."""
    config, start = run.config, time.time()
    modes = [data.prompt_mode(record, config.grpo_prompts.split(","), epoch) for record, epoch in items]
    prompts = [data.record_prompt(record, mode, run.processor) for (record, _), mode in zip(items, modes)]
    features = encode_images(run, [(prompt, []) for prompt in prompts])
    seeds = [stable_hash("sample", config.seed, step, epoch, record.id) for record, epoch in items]
    sampled = rollout.sample(run.model, prompts, features, config.grpo_k, config.max_response, config.temperature,
                             run.processor.end_of_turn, seeds, config.rollout_rows)
    seconds = {"sampling": time.time() - start, "judging": 0.0}
    rollouts = []
    for (record, _), mode, prompt, seed, samples in zip(items, modes, prompts, seeds, sampled):
        group = [rollout.Trajectory(prompt, sample.tokens, sample.logprobs, sample.finished,
                                    data.decode_response(sample.tokens, run.processor)) for sample in samples]
        rollouts.append(Rollout(record, mode, seed, group))
    pairs = [(item, trajectory) for item in rollouts for trajectory in item.group]
    ask_judge(run, judge, pairs, seconds)
    if config.rollout == "reflect":
        reflect(run, judge, pairs, features, seconds)
    measure_rollouts(run, rollouts, seconds)  # before anything leaves its group
    if step == 0:
        check_first_rollout(run, rollouts)  # likewise
    for item in rollouts:
        reward_group(run, item)
    score_again(run, rollouts, features)
    write_samples(run, rollouts[:2], step)
    return rollouts, features


def ask_judge(run, judge, pairs, seconds):
    """Put judge.Grades (for the structured reward, else judge.Scores) on each (rollout, trajectory); None stays where the judge failed.

    The judge reads the question, the images and the trajectory's text, never the chat of a correction."""
    start = time.time()
    ask = judge.grade if run.config.reward == "structured" else judge.score
    cases = [judging.Case(item.record.question, item.record.images, trajectory.text, item.record.meta) for item, trajectory in pairs]
    for (_, trajectory), grades in zip(pairs, ask(cases)):
        trajectory.grades = grades
    seconds["judging"] += time.time() - start


def reflect(run, judge, pairs, features, seconds):
    """SaFeR-VLM's rollout (PAPERS 2.3): after each response y that the judge calls unsafe, the policy writes a reflection c~, then a
    correction y~; all of the batch together.

    Ours, since not found: a user's request stands between y and c~, and c~ and y~ are one turn. A correction joins its group and is judged
    as y was; an unsafe one is corrected in the next round, and after the last round it keeps its low score. A response that the judge
    failed on is not corrected."""
    config = run.config
    for number in range(1, config.reflect_rounds + 1):
        pairs = [(item, trajectory) for item, trajectory in pairs if trajectory.grades is not None and not trajectory.grades.safe]
        start = time.time()
        # by the place in the group, not in the batch: the same on any number of ranks
        seeds = [stable_hash("correct", item.seed, item.group.index(trajectory)) for item, trajectory in pairs]
        corrections = rollout.correct(run.model, run.processor, [trajectory for _, trajectory in pairs], features,
                                      planner.REFLECTION_REQUEST, config.max_response, config.temperature, seeds, config.rollout_rows)
        seconds["sampling"] += time.time() - start
        pairs = [(item, correction) for (item, _), correction in zip(pairs, corrections)]
        ask_judge(run, judge, pairs, seconds)
        for item, correction in pairs:
            item.group.append(correction)


def reward_group(run, item):
    """Decide who stays in a group and in which context it is trained; rewards and advantages A = (r - mean) / std of those.

    Mean and std run over all that stay and have a reward: K first answers and their corrections with --unsafe keep (PAPERS 2.4: in the
    group; who is in it was not found)."""
    config, plan = run.config, data.shown_plan(item.record, item.mode)
    for trajectory in item.group:
        if config.reward == "structured":
            trajectory.reward = rewarding.structured_reward(trajectory.grades, config.weight_reasoning, config.weight_logic,
                                                            config.weight_grounding, config.weight_safety, config.penalties)
        else:
            trajectory.reward = rewarding.compute_reward(config.reward, trajectory.text, plan, trajectory.grades,
                                                         answer_form(trajectory.text))
    if config.rollout == "discard":
        item.group = [trajectory for trajectory in item.group if trajectory.grades is None or trajectory.grades.safe]
    elif config.unsafe == "drop":  # an unsafe response whose correction the judge failed on stays
        replaced = {id(trajectory.corrects) for trajectory in item.group if trajectory.grades is not None}
        item.group = [trajectory for trajectory in item.group if id(trajectory) not in replaced]
    if config.credit == "prompt":
        item.group = [rollout.as_first_answer(trajectory, run.processor) if trajectory.corrects else trajectory
                      for trajectory in item.group]
    scored = [trajectory for trajectory in item.group if trajectory.reward is not None]
    rewards = torch.tensor([[trajectory.reward.total for trajectory in scored]])  # (1, scored)
    advantages, spread = losses.group_advantages(rewards, config.advantage_std) if scored else (rewards, torch.tensor(False))
    for trajectory, advantage in zip(scored, advantages[0].tolist()):
        trajectory.advantage = advantage
        parts = {f"reward_{name}": (value, 1) for name, value in trajectory.reward.parts.items()}
        add(run, reward=(trajectory.reward.total, 1), **parts)
    add(run, zero_spread=(not spread.item(), 1))


def by_context(rollouts):
    """What is trained on, packed by the context that it shares: a list of (prompt, [trajectory])."""
    groups = {}
    for item in rollouts:
        for trajectory in item.group:
            if trajectory.reward is not None and trajectory.tokens:  # without a score, or a token, it trains nothing
                groups.setdefault(id(trajectory.prompt), (trajectory.prompt, []))[1].append(trajectory)
    return list(groups.values())


def score_again(run, rollouts, features):
    """`old` of what was sampled in another context than the one it is trained in (credit = prompt): its log-probabilities there, before any
    update, at the sampling temperature. So its ratio is 1 at the first update, as that of every other trajectory. Ours."""
    moved = [(prompt, [item for item in group if item.logprobs is None]) for prompt, group in by_context(rollouts)]
    moved = [(prompt, group) for prompt, group in moved if group]
    groups = [(prompt, [item.tokens for item in group]) for prompt, group in moved]
    for rows in modeling.micro_batches(groups, run.micro_tokens):
        with torch.no_grad():
            logprobs, mask = token_logprobs(run, [groups[row] for row in rows], features, run.config.temperature)
        for trajectory, row, keep in zip([item for row in rows for item in moved[row][1]], logprobs, mask):
            trajectory.logprobs = row[keep].tolist()


def answer_form(text):
    """comply or refuse, by the answer's phrases; None where there is no answer."""
    answer = protocol.check(text).answer
    return None if answer is None else judging.answer_form(answer)


def measure_rollouts(run, rollouts, seconds):
    """Sums for the metrics: legal traces, lengths, truncation, variety, unscored samples, and what the reflection did."""
    tokens = sum(len(trajectory.tokens) for item in rollouts for trajectory in item.group)
    for item in rollouts:
        plan, count = data.shown_plan(item.record, item.mode), len(item.group)
        first = [trajectory for trajectory in item.group if trajectory.corrects is None]
        corrections = [trajectory for trajectory in item.group if trajectory.corrects is not None]
        checks = [protocol.check(trajectory.text, plan) for trajectory in first]
        add(run, unscored=(sum(trajectory.grades is None for trajectory in item.group), count),
            legal=(sum(check.legal for check in checks), len(first)), calls=(sum(len(check.calls) for check in checks), len(first)),
            length=(sum(len(trajectory.tokens) for trajectory in item.group), count),
            truncated=(sum(not trajectory.finished for trajectory in item.group), count),
            distinct=(len({tuple(trajectory.tokens) for trajectory in first}), len(first)))
        if run.config.reward == "structured":
            safe, again = ([trajectory.grades.safe for trajectory in part if trajectory.grades] for part in (first, corrections))
            answered = {id(rollout.first_of(trajectory)) for trajectory in corrections}
            add(run, unsafe=(len(safe) - sum(safe), len(safe)), corrected=(len(answered), len(first)),
                corrected_safe=(sum(again), len(again)),
                reflected=(sum(trajectory.reflected for trajectory in corrections), len(corrections)))
    add(run, sampled_per_second=(tokens, seconds["sampling"] / run.world), seconds_sampling=(seconds["sampling"] / run.world, 1 / run.world),
        seconds_judging=(seconds["judging"] / run.world, 1 / run.world))


def check_first_rollout(run, rollouts):
    """Before the first update: the samples of a prompt differ, and none holds a vision token."""
    banned = set(modeling.banned_token_ids(run.model))
    if any(banned & set(trajectory.tokens) for item in rollouts for trajectory in item.group):
        raise StageError("grpo: a response holds a vision token; the next forward pass would look for its image")
    distinct = [len({tuple(trajectory.tokens) for trajectory in item.group if trajectory.corrects is None}) for item in rollouts]
    if distinct and max(distinct) <= 1:
        raise StageError("grpo: all samples of every prompt are equal, so no group can teach anything; is --temperature too low?")


def write_samples(run, rollouts, step):
    """A few prompts with their best and worst sample, reward parts and reasons, as text."""
    text = ""
    for item in rollouts:
        order = sorted(item.group, key=lambda trajectory: -1.0 if trajectory.reward is None else trajectory.reward.total)
        for trajectory in order[-1:] + order[:-1][:1]:
            reward, kind = trajectory.reward, "a correction, " if trajectory.corrects else ""
            told = "no score: the judge failed"
            if reward is not None:
                parts = json.dumps({name: round(value, 3) for name, value in reward.parts.items()})
                told = f"reward {reward.total:.3f} {parts} {'; '.join(reward.reasons)}"
            text += f"== step {step}, {item.record.id}, {item.mode} prompt, {kind}advantage {trajectory.advantage:+.2f}\n"
            text += f"{item.record.question}\n-- {told}\n{trajectory.text}\n\n"
    append_log(run, "samples.txt", text)


def update_policy(run, step, rollouts, features, on_policy):
    """Gradients of the GRPO loss over one update batch. `old` is what the sampler reported: no second pass is needed for it."""
    config, kept = run.config, by_context(rollouts)
    names = {id(trajectory): item.record.id for item in rollouts for trajectory in item.group}
    groups = [(prompt, [trajectory.tokens for trajectory in group]) for prompt, group in kept]
    counts = losses.denominators([len(response) for _, responses in groups for response in responses])
    denominator = total(run, counts[config.loss_mean])
    for rows in modeling.micro_batches(groups, run.micro_tokens):
        micro, trajectories = [groups[row] for row in rows], [trajectory for row in rows for trajectory in kept[row][1]]
        old = pad([trajectory.logprobs for trajectory in trajectories], run.device)  # (S, T)
        advantages = torch.tensor([trajectory.advantage for trajectory in trajectories], device=run.device)  # (S,)
        ref = None  # or (S, T)
        if config.kl_coef:
            with torch.no_grad(), modeling.adapters_off(run.model):
                ref, _ = token_logprobs(run, micro, features, config.temperature)
        logprobs, mask, entropy = token_logprobs(run, micro, features, config.temperature, entropy=True)  # (S, T) each
        loss, sums = losses.grpo_loss(logprobs, old, ref, advantages, mask, config.clip_low, config.clip_high, config.dual_clip or None,
                                      config.kl_coef, config.loss_mean, denominator, config.max_response)
        loss.backward()
        check_finite(run, step, loss, [names[id(trajectory)] for trajectory in trajectories])
        tokens = sums.pop("tokens")
        sums = {name.removesuffix("_sum").replace("_count", "_share"): (value, tokens) for name, value in sums.items()}
        count = losses.denominators(mask.sum(1).tolist())[config.loss_mean]
        add(run, loss=(loss.item() * denominator, count), entropy=(entropy.sum(), tokens), **sums)
        if on_policy:  # sampler and trainer are one function: what is left is rounding
            difference = (logprobs.detach() - old).abs()
            add(run, sampler_diff=(difference.sum(), tokens))
            if step == 0:
                ref_diff = 0.0 if ref is None else (logprobs.detach() - ref).abs().max().item()
                check_first_update_batch(run, difference.sum().item() / tokens, ref_diff)


def check_first_update_batch(run, sampler_diff, ref_diff):
    """Before the first update sampler, trainer and reference are the same model: float32 to rounding, bfloat16 to its 8 bits."""
    limit = 1e-4 if run.config.dtype == "float32" else 0.2  # bfloat16 at 3B's shape with random weights: 0.03 (GUIDE.md)
    if sampler_diff > limit:
        raise StageError(f"grpo: sampler and trainer log-probabilities differ by {sampler_diff:.2e} per token before the first update "
                         f"(limit {limit})")
    if ref_diff > limit:
        raise StageError(f"grpo: policy and reference differ by {ref_diff:.2e} before the first update, where the KL must be 0")


def pad(rows, device):
    """Lists of unequal length -> (S, T) float32, padded with 0 on the right."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.float32) for row in rows], batch_first=True).to(device)


def show_progress(run, bar, metrics):
    """The step's numbers beside the bar, and one plain sentence when it could teach next to nothing."""
    step, shown = metrics["step"], ("reward", "unsafe", "corrected_safe") if run.config.reward == "structured" else ("reward", "legal")
    bar.set_postfix({name: f"{metrics.get(name) or 0:.2f}" for name in shown}, kl=f"{metrics.get('kl') or 0:.4f}",
                    diff=f"{metrics.get('sampler_diff') or 0:.0e}")
    if metrics["zero_spread"] > 0.9:
        say(run, f"step {step}: {metrics['zero_spread']:.0%} of the groups have equal rewards and teach nothing: "
                 "the prompts are too easy or too hard")
    if metrics["truncated"] > 0.9:
        say(run, f"step {step}: {metrics['truncated']:.0%} of the responses were cut at --max_response {run.config.max_response}")


# ---- command line --------------------------------------------------------------------------------


def records_path(config, stage):
    """The file that a stage trains on. Raises StageError when the prompts should be curated and are not yet."""
    curated = Path(config.out) / "qibox" / "grpo.jsonl"
    if stage != "grpo" or config.curate == "none":
        return data.set_path(config.data or os.path.join(config.out, "data"), stage)
    if not curated.exists():
        raise StageError(f"{curated} is missing: run `python qibox.py` with the same flags first, or use --curate none")
    return curated


def main(argv):
    """One stage, from its name and flags to its adapter file."""
    if not argv or argv[0] not in STAGES:
        raise ConfigError(f"usage: python safer.py {'|'.join(STAGES)} [--flag value ...], or python -m extras.chat RUN; "
                          "python config.py --help lists the flags")
    stage, config = argv[0], parse_config(argv[1:])
    if stage not in config.stages.split(","):
        return print(f"{stage}: not among --stages {config.stages}")
    if (Path(config.out) / stage / "adapter.safetensors").exists():
        save_config(config, Path(config.out) / stage, stage)  # an error if the settings are not those of the finished stage
        (Path(config.out) / stage / "checkpoint.safetensors").unlink(missing_ok=True)  # of a kill between the last two lines of a stage
        return print(f"{stage}: {config.out}/{stage} is finished already")
    if stage == "grpo" and config.judge == "endpoint":
        make_judge(config).preflight()  # what is wrong with URL, key or model is told before the weights are loaded
    records = data.read_records(records_path(config, stage), stage)
    run = open_run(config, stage, records)
    start = time.time()
    {"sft": train_sft, "dpo": train_dpo, "grpo": train_grpo}[stage](run, records)
    say(run, f"{stage}: {time.time() - start:.0f} s, saved to {run.folder}/adapter.safetensors")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, ConfigError, data.DataError, StageError, modeling.ModelError, judging.JudgeError) as problem:
        sys.exit(str(problem))

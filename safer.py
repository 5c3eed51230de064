"""The training stages of both papers, one plain loop each: SFT -> DPO -> GRPO, or GRPO alone
(settings: PAPERS 1.5, 2.5).

    python safer.py sft  --recipe tiny        cross-entropy on responses written under a plan
    python safer.py dpo  --recipe tiny        sigmoid loss on (good, perturbed) responses
    python safer.py grpo --recipe tiny        K samples per prompt, rewarded for answer and trace
    torchrun --nproc_per_node 8 safer.py grpo --recipe 3b
    python safer.py grpo --recipe tiny-vlm    unsafe samples are reflected on and corrected

Same command, same run: an interrupted stage goes on where it was, a finished one is skipped. What
the stages share is in trainer.py. A step of GRPO, and where each part of it is:

    sample K per prompt   rollout.respond        [reflect and correct   rollout.correct]
    judge                 judge.score / grade    reward    reward.compute_reward / structured_reward
    advantage             losses.group_advantages
    loss, gradient        losses.grpo_loss       update    trainer.optimizer_step

Departures from the papers: LoRA, and a frozen vision tower (the released GRPO trains it, PAPERS
1.5). A group is one prompt with its responses.
"""

import math
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

import losses
from config import STAGES, ConfigError, guard, parse_config, refuse_dry_run, run_command
from data import DataError, Record, encode_response, prompt_mode, read_records
from data import record_prompt, set_path, shown_plan
from judge import Case, JudgeError
from model import ModelError, adapters_off, micro_batches
from reward import compute_reward, structured_reward
from rollout import Trajectory, as_first_response, correct, first_of, respond
from trainer import StageError, adapter_path, add, append_log, batch_at, check_finite, encode_new
from trainer import load_ahead, make_judge, open_run, optimizer_step, report, require_judge
from trainer import save_checkpoint, stable_hash, stage_steps, steps_of, token_logprobs, total
from trainer import write_metrics

# ---- SFT and DPO ---------------------------------------------------------------------------------


def tokenized_batch(run, records, step, names):
    """This rank's share of a step -> (record ids, groups, image features).

    A group is (Prompt, [ids of each response]), the responses being the record's texts `names`.
    """
    config = run.config
    modes = getattr(config, f"{run.stage}_prompts").split(",")
    batch = getattr(config, f"{run.stage}_batch")
    picked = batch_at(records, step, batch, config.seed)
    load_ahead(run, batch_at(records, step + 1, batch, config.seed))
    ids = []
    groups = []
    for record, epoch in picked[run.rank :: run.world]:
        prompt = record_prompt(record, prompt_mode(record, modes, epoch), run.processor)
        responses = [encode_response(record.texts[name], run.processor) for name in names]
        ids.append(record.id)
        groups.append((prompt, responses))
    prompts = [prompt for prompt, _ in groups]
    return ids, groups, encode_new(run.model, prompts, run.features)


def in_micro_batches(run, groups, beside):
    """(groups, beside) of each micro-batch; beside: a list as long as groups."""
    for rows in micro_batches(groups, run.config.micro_tokens):
        yield [groups[row] for row in rows], [beside[row] for row in rows]


def train_sft(run, records):
    """Cross-entropy on response tokens: losses.sft_loss over the tokens of the whole batch. In this
    stage and the others steps_of saves: checkpoints between steps, the adapter after the last."""
    steps = stage_steps(run.config, "sft", len(records))
    for step in steps_of(run, steps):
        ids, groups, features = tokenized_batch(run, records, step, ["response"])
        tokens = total(sum(len(response) for _, (response,) in groups))
        for micro, names in in_micro_batches(run, groups, ids):
            logprobs, mask = token_logprobs(run, micro, features)  # (S, T)
            loss = losses.sft_loss(logprobs, mask, tokens)
            loss.backward()
            check_finite(run, loss, names)
            add(run, loss=(loss.item() * tokens, mask.sum()))  # write_metrics divides, once
        optimizer_step(run, step, steps)
        write_metrics(run, step, tokens=tokens)


def train_dpo(run, records):
    """Sigmoid loss on (chosen, rejected): losses.dpo_loss. A pair shares the forward pass of its
    prompt; the reference is the model with its LoRA off."""
    pairs = run.config.dpo_batch
    steps = stage_steps(run.config, "dpo", len(records))
    for step in steps_of(run, steps):
        ids, groups, features = tokenized_batch(run, records, step, ["chosen", "rejected"])
        for micro, names in in_micro_batches(run, groups, ids):
            with torch.no_grad(), adapters_off(run.model):
                ref = losses.sequence_logprobs(*token_logprobs(run, micro, features))
            policy = losses.sequence_logprobs(*token_logprobs(run, micro, features))
            # both (2B,): chosen, rejected, chosen, rejected, ...
            loss, sums = losses.dpo_loss(
                policy[0::2], policy[1::2], ref[0::2], ref[1::2], run.config.dpo_beta, pairs
            )
            if step == 0 and abs(sums["margin"]) > 1e-2:
                raise StageError(
                    f"dpo: the first margin is {sums['margin']:.5f}, the loss not ln 2: policy and "
                    "reference differ before training"
                )
            loss.backward()
            check_finite(run, loss, names)
            sums["loss"] = loss.item() * pairs
            sums["chosen_logprob"] = policy[0::2].detach().sum()
            sums["rejected_logprob"] = policy[1::2].detach().sum()
            add(run, **{name: (value, len(names)) for name, value in sums.items()})
        optimizer_step(run, step, steps)
        write_metrics(run, step, pairs=pairs)


# ---- GRPO ----------------------------------------------------------------------------------------


@dataclass
class Group:
    """One prompt and what was sampled for it: K responses, in SaFeR-VLM corrections behind them."""

    record: Record
    mode: str  # of its prompt
    seed: int  # of its samples
    trajectories: list[Trajectory]


def train_grpo(run, records):
    """Sample, judge, reward, compare inside the group, update."""
    config = run.config
    judge = make_judge(config)
    steps = stage_steps(config, "grpo", len(records))
    for step in steps_of(run, steps):
        picked = batch_at(records, step, config.grpo_batch, config.seed)
        load_ahead(run, batch_at(records, step + 1, config.grpo_batch, config.seed))
        updates = []
        for start in range(0, len(picked), config.grpo_update_batch):
            batch = picked[start : start + config.grpo_update_batch]
            updates.append(batch[run.rank :: run.world])
        judge_error = None
        try:
            groups, features = roll_out(run, judge, sum(updates, []), step)
            require_judge(judge)
        except JudgeError as error:
            judge_error = error
        if total(judge_error is not None):  # all ranks leave together
            if step > run.first_step:  # before the first update there is nothing to save
                save_checkpoint(run, step)
            raise judge_error or JudgeError("the judge failed on another rank, see its message")
        write_samples(run, groups[:2], step)
        start = time.time()
        for number, batch in enumerate(updates):
            update_policy(run, step, groups[: len(batch)], features, on_policy=number == 0)
            groups = groups[len(batch) :]
            optimizer_step(run, step, steps)
        add(run, seconds_update=(time.time() - start, 1))
        write_metrics(run, step, judge_counts=dict(judge.counts))


def roll_out(run, judge, items, step):
    """Sample, judge and reward -> (list of Group with advantages, image features).

    Args: items: this rank's (record, epoch) pairs.
    """
    config = run.config
    modes = config.grpo_prompts.split(",")
    groups = []
    prompts = []
    for record, epoch in items:
        seed = stable_hash("sample", config.seed, step, epoch, record.id)
        groups.append(Group(record, prompt_mode(record, modes, epoch), seed, []))
        prompts.append(record_prompt(record, groups[-1].mode, run.processor))
    features = encode_new(run.model, prompts, run.features)
    sampled = respond(
        config,
        run.model,
        run.processor,
        prompts,
        [shown_plan(group.record, group.mode) for group in groups],
        features,
        config.grpo_k,
        config.temperature,
        [group.seed for group in groups],
    )
    pairs = ask_judge(run, judge, groups, sampled)
    for group, trajectory in pairs:
        group.trajectories.append(trajectory)
    if config.rollout == "reflect":
        reflect(run, judge, pairs, features)
    add(run, seconds_sampling=(0, 1), seconds_waiting=(0, 1))  # so they are means over ranks
    for group in groups:
        measure_group(run, group)
        reward_group(run, group)  # sets reward and advantage of its trajectories
    if config.credit == "prompt":
        credit_prompt(run, groups, features)
    return groups, features


def ask_judge(run, judge, groups, sampled):
    """Put judge.Grades (for the structured reward, else judge.Scores) on each trajectory; None
    stays where the judge failed. Each goes to the judge as soon as it has been sampled.

    The judge reads question, images and response; of the chat of a correction only the reflection,
    and only where that is trained.

    Args: sampled: generator of (number in `groups`, place, Trajectory). Returns [(Group,
    Trajectory)] in the order of numbers and places.
    """
    start = sampled_at = time.time()
    found = []

    def cases():
        nonlocal sampled_at
        for number, place, item in sampled:
            found.append((number, place, item))
            record = groups[number].record
            reflection = item.reflection if run.config.credit == "reflection" else None
            yield Case(record.question, record.images, item.check, record.meta, reflection)
        sampled_at = time.time()

    ask = judge.grade if run.config.reward == "structured" else judge.score
    # ask runs cases() to its end, so `found` is whole when zip starts
    for (_, _, item), grades in zip(found, ask(cases())):
        item.grades = grades
    # All ranks sample at once, so their time is not added up; roll_out adds the denominator of the
    # seconds, once however often they are counted.
    tokens = sum(len(item.tokens) for _, _, item in found)
    seconds = sampled_at - start
    add(run, seconds_sampling=(seconds, 0), sampled_per_second=(tokens, seconds / run.world))
    add(run, seconds_waiting=(time.time() - sampled_at, 0))
    found.sort(key=lambda row: row[:2])
    return [(groups[number], item) for number, _, item in found]


def is_unsafe(trajectory):
    """Whether the judge called it unsafe. One that the judge failed on is not."""
    return trajectory.grades is not None and not trajectory.grades.safe


def reflect(run, judge, pairs, features):
    """SaFeR-VLM's rollout (PAPERS 2.3): after each response y that the judge calls unsafe, the
    policy writes a reflection c~, then a correction y~; all of the batch together.

    Ours, since not found: a user's request stands between y and c~, and c~ and y~ are one turn. A
    correction joins its group and is judged as y was; an unsafe one is corrected in the next round,
    and after the last round it keeps its low score.

    Args: pairs: (Group, Trajectory) of all first responses.
    """
    config = run.config
    for _ in range(config.reflect_rounds):
        pairs = [(group, trajectory) for group, trajectory in pairs if is_unsafe(trajectory)]
        seeds = []
        for group, trajectory in pairs:  # by the place in the group: the same on any rank
            place = group.trajectories.index(trajectory)
            seeds.append(stable_hash("correct", group.seed, place))
        unsafe = [trajectory for _, trajectory in pairs]
        corrections = correct(config, run.model, run.processor, unsafe, features, seeds)
        pairs = ask_judge(run, judge, [group for group, _ in pairs], corrections)
        for group, correction in pairs:
            group.trajectories.append(correction)


def measure_group(run, group):
    """What the metrics say of a group: of all trajectories, of first responses, of corrections."""
    structured = run.config.reward == "structured"
    reflected_on = [first_of(item) for item in group.trajectories if item.corrects]
    first = [item for item in group.trajectories if item.corrects is None]
    add(run, distinct=(len({tuple(item.tokens) for item in first}), len(first)))
    for item in group.trajectories:
        graded = item.grades is not None
        safe = graded and structured and item.grades.safe
        add(run, unscored=(not graded, 1), length=(len(item.tokens), 1))
        add(run, truncated=(not item.finished, 1))
        if item.corrects:
            add(run, corrected_safe=(safe, graded), reflected=(item.reflection is not None, 1))
            continue
        add(run, legal=(item.check.legal, 1), calls=(len(item.check.calls), 1))
        if structured:
            add(run, unsafe=(graded and not safe, graded), corrected=(item in reflected_on, 1))


def reward_group(run, group):
    """Rewards of a group, and its advantages A = (r - mean) / std over those that have a reward.

    NaN, and reward None: the judge failed, or the trajectory is left out: every unsafe one under
    --rollout discard, every corrected one under --unsafe drop, if its correction has a score
    (PAPERS 2.3: corrections are in the group; who else is was not found).
    """
    config = run.config
    scored = [item for item in group.trajectories if item.grades is not None]
    corrected = [item.corrects for item in scored]
    rewards = []
    for item in group.trajectories:
        discard = config.rollout == "discard" and is_unsafe(item)
        if not discard and not (config.unsafe == "drop" and item in corrected):
            item.reward = reward_of(config, item)
        rewards.append(math.nan if item.reward is None else item.reward.total)
    advantages, spread = losses.group_advantages(torch.tensor([rewards]), config.advantage_std)
    add(run, zero_spread=(not spread.item(), 1))
    for item, advantage in zip(group.trajectories, advantages[0].tolist()):
        item.advantage = advantage
        if item.reward is not None:
            add(run, reward=(item.reward.total, 1))
            parts = item.reward.parts
            add(run, **{f"reward_{name}": (value, 1) for name, value in parts.items()})


def reward_of(config, trajectory):
    """The reward of one judged trajectory, None where the judge failed."""
    if config.reward == "structured":
        return structured_reward(
            trajectory.grades,
            config.weight_reasoning,
            config.weight_logic,
            config.weight_grounding,
            config.weight_safety,
            config.penalties,
            config.safety_gate,
        )
    return compute_reward(config.reward, trajectory.check, trajectory.grades)


def by_context(groups):
    """What is trained on, packed by the context that it shares -> [(record id, trajectories)].

    A correction has its chat as context or, with --credit prompt, the prompt of its group. What has
    no reward, or no token, trains nothing.
    """
    packs = []
    for group in groups:
        context = None
        for item in group.trajectories:
            if item.reward is None or not item.tokens:
                continue
            if item.prompt is not context:
                context = item.prompt
                packs.append((group.record.id, []))
            packs[-1][1].append(item)
    return packs


def credit_prompt(run, groups, features):
    """--credit prompt: train every correction as if it had been the first response (ours).

    It was sampled in its chat, so its log-probabilities under the prompt are computed here, before
    any update and at the sampling temperature: its ratio is 1 at the first update, as all others'.
    """
    corrections = []
    for group in groups:
        moved = replace(group, trajectories=[])
        for place, item in enumerate(group.trajectories):
            if item.corrects:
                item = as_first_response(item, run.processor)
                group.trajectories[place] = item
                moved.trajectories.append(item)
        corrections.append(moved)
    packs = by_context(corrections)
    packed = [packed_group(items) for _, items in packs]
    for micro, some in in_micro_batches(run, packed, packs):
        with torch.no_grad():
            logprobs, mask = token_logprobs(run, micro, features, run.config.temperature)
        moved = sum([items for _, items in some], [])
        for item, row, keep in zip(moved, logprobs, mask):
            item.logprobs = row[keep].tolist()


def packed_group(trajectories):
    """Trajectories of one context as model.token_logprobs takes them: (Prompt, [ids])."""
    return trajectories[0].prompt, [item.tokens for item in trajectories]


def update_policy(run, step, groups, features, on_policy=True):
    """The gradient of the GRPO loss over one update batch.

    Args: groups: this rank's Groups; on_policy: no update has come between sampling and this one.
    `old` is what the sampler reported; of a correction that was moved, what credit_prompt found.
    """
    config = run.config
    packs = by_context(groups)
    packed = [packed_group(items) for _, items in packs]
    responses = sum([ids for _, ids in packed], [])
    counts = losses.denominators([len(ids) for ids in responses])
    denominator = total(counts[config.loss_mean])
    for micro, some in in_micro_batches(run, packed, packs):
        items = sum([items for _, items in some], [])
        old = pad_sequence([torch.tensor(item.logprobs) for item in items], batch_first=True)
        old = old.to(run.device)  # (S, T)
        advantages = torch.tensor([item.advantage for item in items], device=run.device)  # (S,)
        ref = None
        if config.kl_coef:
            with torch.no_grad(), adapters_off(run.model):
                ref, _ = token_logprobs(run, micro, features, config.temperature)  # (S, T)
        logprobs, mask, entropy = token_logprobs(
            run, micro, features, config.temperature, entropy=True
        )  # (S, T) each
        loss, sums = losses.grpo_loss(
            logprobs,
            old,
            ref,
            advantages,
            mask,
            config.clip_low,
            config.clip_high,
            config.dual_clip,
            config.kl_coef,
            config.loss_mean,
            denominator,
            config.max_response,
        )
        loss.backward()
        check_finite(run, loss, [name for name, _ in some])
        tokens = sums.pop("tokens")
        sums["entropy"] = entropy.sum()
        if on_policy:  # sampler and trainer are one function: what is left is rounding
            sums["sampler_diff"] = (logprobs.detach() - old).abs().sum()
            check_sampler(run, step, sums["sampler_diff"] / tokens)
        add(run, **{name: (value, tokens) for name, value in sums.items()})
        count = losses.denominators(mask.sum(1).tolist())[config.loss_mean]
        add(run, loss=(loss.item() * denominator, count))


def check_sampler(run, step, difference):
    """Before the first update sampler and trainer agree: float32 to rounding, bfloat16 to its 8
    bits. At 3B's shape with random weights that was 0.03 per token."""
    limit = 1e-4 if run.config.dtype == "float32" else 0.2
    if step == 0 and difference > limit:
        raise StageError(
            f"grpo: sampler and trainer log-probabilities differ by {difference:.2e} per token "
            f"before the first update (limit {limit})"
        )


def write_samples(run, groups, step):
    """The best and the worst trajectory of a few groups, with reward and reasons, as text. What the
    policy and the data say is quoted by a bar, so that it cannot look like a header."""
    for group in groups:
        order = sorted(group.trajectories, key=lambda item: item.advantage)
        for item in (order[-1], order[0]):
            reasons = "no reward: the judge failed, or it was left out"
            if item.reward is not None:
                reasons = f"reward {item.reward.total:.3f}: {'; '.join(item.reward.reasons)}"
            kind = "a correction, " if item.corrects else ""
            where = f"== step {step}, {group.record.id}, {group.mode} prompt, {kind}"
            head = f"{where}advantage {item.advantage:+.2f}"
            parts = [group.record.question, f"-- {reasons}", item.check.text]
            lines = [f"| {line}" for part in parts for line in part.splitlines()]
            append_log(run, "samples.txt", "\n".join([head, *lines]) + "\n\n")


# ---- command line --------------------------------------------------------------------------------


def records_path(config, stage):
    """The file that a stage trains on: GRPO's may be the one that qibox.py curated."""
    if stage == "grpo" and config.curate != "none":
        return Path(config.out) / "qibox" / "grpo.jsonl"
    return set_path(config.data or os.path.join(config.out, "data"), stage)


def main(argv):
    """One stage, from its name and flags to its adapter file."""
    if not argv or argv[0] not in STAGES:
        names = "|".join(STAGES)
        raise ConfigError(f"usage: python safer.py {names} [flags], see python config.py --help")
    stage = argv[0]
    config = parse_config(argv[1:])
    refuse_dry_run(config)
    if stage not in config.stages.split(","):
        return print(f"{stage}: not among --stages {config.stages}")
    path = adapter_path(config, stage)
    if path.exists():
        guard(path.parent, config, stage, {}, write=False)
        return print(f"{stage}: {path.parent} is finished already")
    if stage == "grpo" and config.judge != "toy":
        make_judge(config).preflight()  # before the weights are loaded
    records = read_records(records_path(config, stage), stage)
    run = open_run(config, stage, records)
    start = time.time()
    {"sft": train_sft, "dpo": train_dpo, "grpo": train_grpo}[stage](run, records)
    report(run, f"{stage}: {time.time() - start:.0f} s, saved to {path}")


if __name__ == "__main__":
    run_command(main, DataError, StageError, ModelError, JudgeError)

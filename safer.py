"""The three training stages of SaFeR-ToolKit: SFT -> DPO -> GRPO, one plain loop each (paper section 1.5 in PAPERS' counting).

    python safer.py sft  --recipe tiny        cross-entropy on planned responses
    python safer.py dpo  --recipe tiny        sigmoid loss on (good, perturbed) responses
    python safer.py grpo --recipe tiny        K samples per prompt, rewarded for answer and tool trace
    torchrun --nproc_per_node 8 safer.py grpo --recipe 3b

A stage merges the adapters of the stages before it into the base, trains a fresh LoRA, and saves only that. So the reference model of
DPO and GRPO is the same model with its LoRA off. Same command, same run: an interrupted stage goes on where it was, a finished one is skipped.
Where data order, LoRA's A or a sample is drawn, the draw depends on seed, step and record alone, never on a generator's history: that is
what makes resuming exact and independent of the number of ranks.

Departures from the papers: LoRA and a frozen vision tower (the released GRPO trains all weights), see README.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import safe_open, save_file
from tqdm import tqdm

import data
import judge as judging
import losses
import model as modeling
import protocol
import reward as rewarding
import rollout
import toy
from config import STAGES, ConfigError, parse_config, save_config

SAVE_EVERY = 50  # optimiser steps (GRPO: rollouts) between checkpoints. Paper: 50 (PAPERS 1.5)


@dataclass
class Run:
    """What a training loop works with."""

    config: object
    stage: str
    folder: Path
    model: torch.nn.Module
    processor: data.Processor
    parameters: dict  # name -> LoRA's A and B, float32
    optimiser: torch.optim.Optimizer
    device: torch.device
    rank: int = 0
    world: int = 1
    first_step: int = 0
    sums: dict = field(default_factory=dict)  # of the step: name -> [numerator, denominator]
    base_sum: float = 0.0  # of all frozen weights, to see that none has changed
    checked: bool = False  # the checks after the first update are done


class StageError(RuntimeError):
    """A check failed; the message says which and what to do."""


# ---- opening a stage ----------------------------------------------------------------------------------------------------


def ranks():
    """(rank, world, device index), and the process group where torchrun started several processes."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return int(os.environ.get("RANK", 0)), world, int(os.environ.get("LOCAL_RANK", 0))


def pick_device(config, local_rank):
    if config.device == "cpu" or config.device == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no CUDA device; use --device cpu, or install a CUDA build of torch")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def base_folder(config):
    return config.model or os.path.join(config.out, "base")


def load_policy(config, stages, device):
    """The base model with the adapters of finished `stages` merged into it, and its processor."""
    processor = data.load_processor(base_folder(config), config.min_pixels, config.max_pixels)
    model = modeling.load_model(base_folder(config), getattr(torch, config.dtype), device)
    for stage in stages:
        path = Path(config.out) / stage / "adapter.safetensors"
        if not path.exists():
            raise StageError(f"{path} is missing: run `python safer.py {stage}` with the same flags first")
        modeling.load_adapter(model, path)
        modeling.merge_lora(model)
    return model, processor


def open_run(config, stage, records):
    """Everything a stage needs, checked before the first step."""
    rank, world, local_rank = ranks()
    device, folder = pick_device(config, local_rank), Path(config.out) / stage
    before = config.stages.split(",")[: config.stages.split(",").index(stage)]
    modes = getattr(config, f"{stage}_prompts").split(",")
    processor = data.load_processor(base_folder(config), config.min_pixels, config.max_pixels)
    longest, mean_image, max_image = data.check_lengths(records, modes, processor, config.max_prompt, config.max_response)
    model, processor = load_policy(config, before, device)
    if rank == 0:
        save_config(config, folder, stage)
        print(f"{stage}: {len(records)} records, longest prompt {longest} tokens, image tokens mean {mean_image:.0f} max {max_image}, {device}, {world} rank(s)")
    modeling.attach_lora(model, config.lora_r, config.lora_alpha, config.seed)
    parameters = modeling.lora_parameters(model)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if trainable != set(parameters):
        raise StageError(f"trainable tensors are not exactly the adapters: {sorted(trainable ^ set(parameters))[:4]}")
    optimiser = torch.optim.AdamW(parameters.values(), lr=0.0, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay)
    run = Run(config, stage, folder, model, processor, parameters, optimiser, device, rank, world)
    run.base_sum = frozen_sum(model)
    if config.resume and (folder / "checkpoint.safetensors").exists():
        run.first_step, run.checked = load_checkpoint(run), True
        say(run, f"{stage}: going on after step {run.first_step}")
    if rank == 0:
        trim_metrics(folder / "metrics.jsonl", run.first_step)
    return run


def frozen_sum(model):
    """Sum over all frozen weights: the same before and after a step, to the last bit."""
    return sum(parameter.detach().double().sum().item() for parameter in model.parameters() if not parameter.requires_grad)


def say(run, text):
    if run.rank == 0:
        tqdm.write(text)


# ---- checkpoints and metrics --------------------------------------------------------------------------------------------


def save_checkpoint(run, step):
    """Adapter and optimiser state after `step` steps, in one file that appears whole or not at all."""
    if run.rank:
        return
    tensors = {}
    for name, parameter in run.parameters.items():
        tensors[f"adapter.{name}"] = parameter.detach().cpu().contiguous()
        for key, value in run.optimiser.state[parameter].items():
            tensors[f"optimiser.{name}.{key}"] = value.detach().cpu().contiguous()
    part = run.folder / "checkpoint.safetensors.part"
    save_file(tensors, part, metadata={"step": str(step)})
    part.replace(run.folder / "checkpoint.safetensors")


def load_checkpoint(run):
    """Restore what save_checkpoint wrote. Returns the number of finished steps."""
    with safe_open(run.folder / "checkpoint.safetensors", "pt") as file:
        for name, parameter in run.parameters.items():
            parameter.data.copy_(file.get_tensor(f"adapter.{name}"))
            for key in ("step", "exp_avg", "exp_avg_sq"):
                state = file.get_tensor(f"optimiser.{name}.{key}")
                run.optimiser.state[parameter][key] = state if key == "step" else state.to(run.device)
        return int(file.metadata()["step"])


def trim_metrics(path, first_step):
    """Drop the lines of steps that will be done again, so that every step stands in the file once."""
    if path.exists():
        rows = [json.loads(line) for line in path.read_text().split("\n") if line.endswith("}")]
        data.write_jsonl(path, [row for row in rows if row["step"] < first_step])


def add(run, **sums):
    """Collect (numerator, denominator) pairs of this step; they are summed over micro-batches and ranks and divided once."""
    for name, (numerator, denominator) in sums.items():
        old = run.sums.get(name, (0.0, 0.0))
        run.sums[name] = (old[0] + float(numerator), old[1] + float(denominator))


def total(run, value):
    """Sum of a number over all ranks."""
    if run.world == 1:
        return float(value)
    tensor = torch.tensor(float(value), dtype=torch.float64, device=run.device)
    dist.all_reduce(tensor)
    return tensor.item()


def write_metrics(run, step, **extra):
    """One line of metrics.jsonl. All ranks call it; rank 0 writes."""
    row = {"step": step, "stage": run.stage}
    for name in sorted(run.sums):
        numerator, denominator = total(run, run.sums[name][0]), total(run, run.sums[name][1])
        row[name] = numerator / denominator if denominator else None
    row.update(extra)
    run.sums = {}
    if run.rank == 0:
        with open(run.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    return row


# ---- one optimiser step -------------------------------------------------------------------------------------------------


def learning_rate(config, stage, step, steps):
    """Rises linearly over the warm-up, then constant or half a cosine down to 0."""
    peak, warmup = getattr(config, f"{stage}_lr"), math.ceil(getattr(config, f"{stage}_warmup") * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if getattr(config, f"{stage}_schedule") == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def optimiser_step(run, step, steps):
    """All-reduce the gradients in one flat bucket, clip, step. Stops the run on a gradient that is not finite."""
    gradients = [parameter.grad if parameter.grad is not None else torch.zeros_like(parameter) for parameter in run.parameters.values()]
    flat = torch.cat([gradient.flatten() for gradient in gradients])  # (all adapter weights,)
    if run.world > 1:
        dist.all_reduce(flat)  # a sum: every rank divided by the global denominator
    norm = flat.norm().item()
    if not math.isfinite(norm):
        raise StageError(f"{run.stage}: the gradient norm of step {step} is {norm}; the last checkpoint is untouched. Try a lower --{run.stage}_lr")
    flat *= min(1.0, run.config.max_grad_norm / (norm + 1e-6))
    for parameter, piece in zip(run.parameters.values(), flat.split([p.numel() for p in run.parameters.values()])):
        parameter.grad = piece.view_as(parameter)
    rate = learning_rate(run.config, run.stage, step, steps)
    for group in run.optimiser.param_groups:
        group["lr"] = rate
    run.optimiser.step()
    run.optimiser.zero_grad(set_to_none=True)
    if norm > 0 and not run.checked:
        check_first_update(run)
    return {"grad_norm": norm, "lr": rate}


def check_first_update(run):
    """After the first update every B has moved and no frozen weight has."""
    still = [name for name, parameter in run.parameters.items() if name.endswith(".B") and not parameter.detach().any()]
    if still:
        raise StageError(f"{len(still)} adapter B tensors got no gradient in the first step, {still[0]} among them")
    if frozen_sum(run.model) != run.base_sum:
        raise StageError("a frozen weight changed in the first step")
    run.checked = True


def token_logprobs(run, groups, features, temperature=1.0, entropy=False):
    """model.token_logprobs with the run's settings; without shared prefixes every response is a group of its own."""
    if not run.config.shared_prefix:
        groups = [(prompt, [response]) for prompt, responses in groups for response in responses]
    return modeling.token_logprobs(run.model, groups, features, temperature, run.config.logprob_chunk,
                                   checkpoint=run.config.checkpointing and torch.is_grad_enabled(), entropy=entropy)


def encode_images(run, groups):
    """Features of all images of these groups, each image once; every pad must find its feature."""
    features = modeling.encode_images(run.model, [image for prompt, _ in groups for image in prompt.images])
    pad = run.processor.special["<|image_pad|>"]
    for prompt, _ in groups:
        rows = sum(len(features[image.key]) for image in prompt.images)
        if prompt.ids.count(pad) != rows:
            raise StageError(f"{prompt.ids.count(pad)} image pads for {rows} image features; images {[image.key for image in prompt.images]}")
    return features


def batch_at(records, step, batch, seed):
    """The (record, epoch) pairs of one step: the data in a new order each epoch, without a gap between epochs."""
    picked = []
    for position in range(step * batch, (step + 1) * batch):
        epoch, place = divmod(position, len(records))
        picked.append((records[epoch_order(len(records), epoch, seed)[place]], epoch))
    return picked


def epoch_order(count, epoch, seed):
    """A permutation that depends on seed and epoch alone."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(stable_hash("order", seed, epoch))).tolist()


def stable_hash(*words):
    """63 bits that depend on the words alone, in every process and on every machine."""
    return int.from_bytes(hashlib.sha256(repr(words).encode()).digest()[:8], "big") >> 1


def stage_steps(config, stage, count):
    """Number of steps of a stage: --<stage>_steps, or what its epochs give; --max_steps ends it early."""
    steps = getattr(config, f"{stage}_steps") or math.ceil(count * getattr(config, f"{stage}_epochs") / getattr(config, f"{stage}_batch"))
    return min(steps, config.max_steps or steps)


def steps_of(run, steps):
    """The steps still to do, with a progress bar on rank 0 and a checkpoint now and then; at the end the adapter is saved."""
    bar = tqdm(range(run.first_step, steps), initial=run.first_step, total=steps, desc=run.stage, disable=run.rank > 0, mininterval=1)
    for step in bar:
        yield step, bar
        if (step + 1) % SAVE_EVERY == 0 and step + 1 < steps:
            save_checkpoint(run, step + 1)
    if run.rank == 0:
        modeling.save_adapter(run.model, run.folder / "adapter.safetensors", {"stage": run.stage, "steps": steps})
        (run.folder / "checkpoint.safetensors").unlink(missing_ok=True)


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
        for rows in modeling.micro_batches(groups, config.micro_tokens):
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
        for rows in modeling.micro_batches(groups, config.micro_tokens):
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
        try:
            rollouts, features = sample_group(run, judge, [item for part in parts for item in part], step)
        except judging.JudgeError:
            save_checkpoint(run, step)
            raise
        start, norms = time.time(), []
        for number, part in enumerate(parts):
            mine, rollouts_left = rollouts[: len(part)], rollouts[len(part) :]
            update_policy(run, mine, features, on_policy=number == 0, first=step == 0 and number == 0)
            norms.append(optimiser_step(run, step, steps))
            rollouts = rollouts_left
        add(run, seconds_update=((time.time() - start) / run.world, 1 / run.world))
        metrics = write_metrics(run, step, grad_norm=sum(item["grad_norm"] for item in norms) / len(norms), lr=norms[-1]["lr"], judge_counts=dict(judge.counts))
        bar.set_postfix(reward=f"{metrics['reward'] or 0:.3f}", legal=f"{metrics['legal']:.2f}", kl=f"{metrics.get('kl') or 0:.4f}", diff=f"{metrics['sampler_diff']:.0e}")
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
    seeds = [stable_hash("sample", config.seed, step, record.id) for record, _ in items]
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
    for rows in modeling.micro_batches(groups, config.micro_tokens):
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
    if not argv or argv[0] not in STAGES:
        raise ConfigError(f"usage: python safer.py {'|'.join(STAGES)} [--flag value ...]; python config.py --help lists the flags")
    stage, config = argv[0], parse_config(argv[1:])
    if stage not in config.stages.split(","):
        return print(f"{stage}: not among --stages {config.stages}")
    if (Path(config.out) / stage / "adapter.safetensors").exists():
        save_config(config, Path(config.out) / stage, stage)  # an error if the settings are not those of the finished stage
        return print(f"{stage}: {config.out}/{stage} is finished already")
    records = data.read_records(os.path.join(config.data or os.path.join(config.out, "data"), f"{stage}.jsonl"), stage)
    run = open_run(config, stage, records)
    start = time.time()
    {"sft": train_sft, "dpo": train_dpo, "grpo": train_grpo}[stage](run, records)
    say(run, f"{stage}: {time.time() - start:.0f} s, saved to {run.folder}/adapter.safetensors")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ConfigError, data.DataError, StageError, modeling.ModelError, judging.JudgeError) as problem:
        sys.exit(str(problem))

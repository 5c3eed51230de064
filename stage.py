"""What the three training stages share: opening a stage, its checks, checkpoints, metrics, and the optimiser step.

A stage merges the adapters of the stages before it into the base, trains a fresh LoRA, and saves only that. So the reference model of
DPO and GRPO is the same model with its LoRA off, at no memory. Ours: the papers do not say how their stages hand over.

Whatever is drawn (data order, LoRA's A, a sample) depends on seed, step and record alone, never on a generator's history: that is what
makes resuming exact and independent of the number of ranks.
"""

import functools
import hashlib
import json
import math
import os
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import safe_open, save_file
from tqdm import tqdm

import data
import model as modeling
from config import ConfigError, check_settings, save_config

FEATURE_BYTES = 1 << 30  # image features kept from step to step: with few images, the vision tower runs in the first epoch only
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
    micro_tokens: int = 0  # packed tokens per forward and backward pass
    features: modeling.FeatureCache = field(default_factory=lambda: modeling.FeatureCache(FEATURE_BYTES))  # the tower is frozen, so they stay true
    sums: dict = field(default_factory=dict)  # of the step: name -> [numerator, denominator]
    base_sum: float = 0.0  # of all frozen weights, to see that none has changed
    checked: bool = False  # the checks after the first update are done


class StageError(RuntimeError):
    """A check failed; the message says which and what to do."""


# ---- opening a stage ----------------------------------------------------------------------------------------------------


def pick_device(config, local_rank):
    if config.device == "cpu" or config.device == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no CUDA device; use --device cpu, or install a CUDA build of torch")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def join_ranks(device):
    """(rank, world), and the process group where torchrun started several processes. A rank may wait long for another's judge."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    return int(os.environ.get("RANK", 0)), world


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
    device, folder = pick_device(config, int(os.environ.get("LOCAL_RANK", 0))), Path(config.out) / stage
    rank, world = join_ranks(device)
    share = config.grpo_update_batch if stage == "grpo" else getattr(config, f"{stage}_batch")
    if share < world:
        raise ConfigError(f"{stage}: {share} records per optimiser step for {world} ranks; every rank needs one")
    before = config.stages.split(",")[: config.stages.split(",").index(stage)]
    modes = getattr(config, f"{stage}_prompts").split(",")
    processor = data.load_processor(base_folder(config), config.min_pixels, config.max_pixels)
    if rank == 0:
        check_settings(config, folder, stage)  # before the weights are loaded
    longest, mean_image, max_image = data.check_lengths(records, modes, processor, config.max_prompt, config.max_response)
    model, _ = load_policy(config, before, device)
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
    if not config.resume and rank == 0:
        (folder / "checkpoint.safetensors").unlink(missing_ok=True)
    if config.resume and (folder / "checkpoint.safetensors").exists():
        run.first_step, run.checked = load_checkpoint(run), True
        say(run, f"{stage}: going on after step {run.first_step}")
    if rank == 0:
        trim_metrics(folder / "metrics.jsonl", run.first_step)
    run.micro_tokens = token_budget(run)
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
        run.sums[name] = (old[0] + as_number(numerator), old[1] + as_number(denominator))


def as_number(value):
    """A tensor without its graph, or a number -> float."""
    return value.item() if isinstance(value, torch.Tensor) else float(value)


def total(run, value):
    """Sum of a number over all ranks."""
    if run.world == 1:
        return float(value)
    tensor = torch.tensor(float(value), dtype=torch.float64, device=run.device)
    dist.all_reduce(tensor)
    return tensor.item()


def write_metrics(run, step, **extra):
    """One line of metrics.jsonl. All ranks call it; rank 0 writes."""
    row, names = {"step": step, "stage": run.stage}, sorted(run.sums)
    if run.world > 1:  # a rank without a scored sample lacks some names; all ranks must reduce the same ones in the same order
        every = [None] * run.world
        dist.all_gather_object(every, names)
        names = sorted(set().union(*every))
    for name in names:
        numerator, denominator = (total(run, part) for part in run.sums.get(name, (0.0, 0.0)))
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
    features = modeling.encode_images(run.model, [image for prompt, _ in groups for image in prompt.images], run.features)
    pad = run.processor.special["<|image_pad|>"]
    for prompt, _ in groups:
        rows = sum(len(features[image.key]) for image in prompt.images)
        if prompt.ids.count(pad) != rows:
            raise StageError(f"{prompt.ids.count(pad)} image pads for {rows} image features; images {[image.key for image in prompt.images]}")
    return features


def token_budget(run):
    """Packed tokens per micro-batch: --micro_tokens, or for 0 what 70% of the free CUDA memory holds by the shapes (ours; not measured).

    Per token: with checkpointing each layer's input, else all it computes; and what one layer computes, twice, for its backward pass.
    """
    config, text = run.config, run.model.config.text_config
    if config.micro_tokens or run.device.type != "cuda":
        return config.micro_tokens or 4096
    size, layer = run.model.dtype.itemsize, 12 * text.hidden_size + 5 * text.intermediate_size
    kept = text.num_hidden_layers * (text.hidden_size if config.checkpointing else layer)
    free = 0.7 * torch.cuda.mem_get_info()[0] - 16 * config.logprob_chunk * text.vocab_size  # four float32 copies of a chunk's logits
    return max(1024, int(free / (size * (kept + 2 * layer))))


def batch_at(records, step, batch, seed):
    """The (record, epoch) pairs of one step: the data in a new order each epoch, without a gap between epochs."""
    picked = []
    for position in range(step * batch, (step + 1) * batch):
        epoch, place = divmod(position, len(records))
        picked.append((records[epoch_order(len(records), epoch, seed)[place]], epoch))
    return picked


@functools.lru_cache(4)
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

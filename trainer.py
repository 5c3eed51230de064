"""What the three training stages share: opening a stage, its checks, checkpoints, metrics, and the optimiser step.

A stage merges the adapters of the stages before it into the base, trains a fresh LoRA, and saves only that. So the reference model of
DPO and GRPO is the same model with its LoRA off, at no memory. Ours: the papers do not say how their stages hand over.

Whatever is drawn (data order, LoRA's A, a sample) depends on seed, step and record alone, never on a generator's history: that is what
makes resuming exact and independent of the number of ranks. So a checkpoint holds adapter, optimiser and step and no generator's state:
the step is also the place in the schedule and in the data.
"""

import fcntl
import functools
import hashlib
import json
import math
import os
import signal
import socket
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import data
import judge as judging
import model as modeling
from config import ConfigError, check_settings, save_config

FEATURE_BYTES = 1 << 30  # image features kept from step to step: with few images, the vision tower runs in the first epoch only
SAVE_EVERY = 50  # optimiser steps (GRPO: rollouts) between checkpoints. Paper: 50 (PAPERS 1.5)
LOGS = ("metrics.jsonl", "samples.txt")  # files of a stage that grow with every step


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
    # the tower is frozen, so its features stay true
    features: modeling.FeatureCache = field(default_factory=lambda: modeling.FeatureCache(FEATURE_BYTES))
    sums: dict = field(default_factory=dict)  # of the step: name -> [numerator, denominator]
    base_sum: float = 0.0  # of all frozen weights, to see that none has changed
    made_from: dict = field(default_factory=dict)  # what a checkpoint hangs on besides the settings
    logs: dict = field(default_factory=dict)  # name -> bytes of each of LOGS after the last finished step
    suspects: list = field(default_factory=list)  # ids of the records whose loss or gradient is not finite
    stop: int = 0  # the signal that asks to stop after this step
    checked: bool = False  # the checks after the first update are done


class StageError(RuntimeError):
    """A check failed; the message says which and what to do."""


# ---- opening a stage -----------------------------------------------------------------------------


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


def make_judge(config):
    """The judge that the config names, with the methods of judge.py."""
    if config.judge == "toy":
        from extras.toy import ToyJudge

        return ToyJudge()
    return judging.LabelsJudge() if config.judge == "labels" else judging.judge_from_env(os.path.join(config.out, "judge_cache"))


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
        if folder.exists():
            lock_folder(folder)
    longest, mean_image, max_image = data.check_lengths(records, modes, processor, config.max_prompt, config.max_response)
    model, _ = load_policy(config, before, device)
    if rank == 0:
        lock_folder(folder)
        save_config(config, folder, stage)
        print(f"{stage}: {len(records)} records, longest prompt {longest} tokens, "
              f"image tokens mean {mean_image:.0f} max {max_image}, {device}, {world} rank(s)")
    modeling.attach_lora(model, config.lora_r, config.lora_alpha, config.seed)
    parameters = modeling.lora_parameters(model)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if trainable != set(parameters):
        raise StageError(f"trainable tensors are not exactly the adapters: {sorted(trainable ^ set(parameters))[:4]}")
    optimiser = torch.optim.AdamW(parameters.values(), lr=0.0, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay)
    run = Run(config, stage, folder, model, processor, parameters, optimiser, device, rank, world)
    run.base_sum = frozen_sum(model)
    run.made_from = fingerprint(config, before, records) | {"base": run.base_sum}
    if not config.resume and rank == 0:
        (folder / "checkpoint.safetensors").unlink(missing_ok=True)
    if config.resume and (folder / "checkpoint.safetensors").exists():
        run.first_step, run.checked = load_checkpoint(run), True
        say(run, f"{stage}: going on after step {run.first_step}")
    if rank == 0:
        trim_logs(run)
    run.micro_tokens = token_budget(run)
    return run


def lock_folder(folder):
    """Make a stage's folder and hold <folder>/lock for the life of this process.

    Raises StageError: who holds it, or that nothing can be written. A record lock belongs to the process and the system drops it however
    that ends, so there is no stale lock to remove. The descriptor is never closed: closing any descriptor of the file would drop the lock.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StageError(f"{folder}: cannot be written to ({error.strerror}); make it writable, or choose another --out") from error
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:  # which of the two is the system's choice
        holder = os.read(descriptor, 200).decode(errors="replace").strip()
        raise StageError(f"{folder}: process {holder} is training here; wait for it, stop it, or choose another --out") from error
    except OSError as error:
        print(f"{folder}: this file system has no locks ({error.strerror}); start no second run here")
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def fingerprint(config, before, records):
    """SHA-256 of what a stage starts from: its records (with the sizes of their images), and the adapters of the stages `before` it."""
    rows = []
    for item in records:
        images = [(os.path.basename(path), os.path.getsize(path)) for path in item.images]
        rows.append((item.id, item.question, item.plan, item.meta, item.texts, images))
    contents = {"records": repr(rows).encode()}
    contents |= {f"{name} adapter": (Path(config.out) / name / "adapter.safetensors").read_bytes() for name in before}
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def frozen_sum(model):
    """Sum over all frozen weights: the same before and after a step, to the last bit. In pieces: an embedding in float64 is gigabytes."""
    return sum(part.double().sum().item() for w in model.parameters() if not w.requires_grad for part in w.detach().flatten().split(2**24))


def say(run, text):
    if run.rank == 0:
        tqdm.write(text)


# ---- checkpoints and metrics ---------------------------------------------------------------------


def save_checkpoint(run, step):
    """Adapter and optimiser state after `step` steps, in one file that appears whole or not at all; the one before stays until then.

    Raises StageError when it cannot be written.
    """
    if run.rank:
        return
    tensors = {}
    for name, parameter in run.parameters.items():
        tensors[f"adapter.{name}"] = parameter.detach().cpu().contiguous()
        for key, value in run.optimiser.state[parameter].items():
            tensors[f"optimiser.{name}.{key}"] = value.detach().cpu().contiguous()
    about = json.dumps({"step": step, "made_from": run.made_from, "logs": run.logs})
    for name in run.logs:  # what the checkpoint counts on is on the disk before it
        sync(run.folder / name)
    write_whole(run, "checkpoint.safetensors", lambda part: save_file(tensors, part, metadata={"about": about}))


def write_whole(run, name, write):
    """Call write(path of a part file), bring it to the disk and give it its name.

    A kill or a power cut leaves the old file or the new one, whole. Raises StageError, with the old file as it was, when the disk is full
    or read-only.
    """
    path, part = run.folder / name, run.folder / (name + ".part")
    try:
        write(part)
        sync(part)
        part.replace(path)
        sync(run.folder)
    except (OSError, SafetensorError) as error:  # safetensors wraps what the system says
        clear_parts(run.folder)
        raise disk_error(path, error) from error


def sync(path):
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def clear_parts(folder):
    """Remove what an interrupted write has left: .part files, and the .tmp files that safetensors writes before those."""
    for path in [*folder.glob("*.part"), *folder.glob(".tmp*")]:
        path.unlink(missing_ok=True)


def disk_error(path, error):
    return StageError(f"{path}: cannot be written ({error}). The last checkpoint is as it was: make room, or the folder writable, "
                      "and type the same command to go on")


def load_checkpoint(run):
    """Restore what save_checkpoint wrote, and how far the logs had come. Returns the number of finished steps.

    Raises StageError when the file is damaged, or was made from other records, another base or other adapters than are there now.
    """
    path = run.folder / "checkpoint.safetensors"
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, KeyError, TypeError) as error:
        raise StageError(f"{path}: cannot be read as a checkpoint ({error}); --resume 0 starts the stage again") from error
    was, now = about["made_from"], run.made_from
    changed = [name for name in now if name != "base" and was.get(name) != now[name]]
    if not math.isclose(was["base"], now["base"], rel_tol=1e-6):  # another device sums in another order, another base is far off
        changed.append("base")
    if changed:
        raise StageError(f"{path}: was trained from another {' and '.join(changed)} than there is now; put back what was there, "
                         "or start the stage again with --resume 0")
    for name, parameter in run.parameters.items():
        parameter.data.copy_(tensors[f"adapter.{name}"])
        for key in ("step", "exp_avg", "exp_avg_sq"):
            state = tensors[f"optimiser.{name}.{key}"]
            run.optimiser.state[parameter][key] = state if key == "step" else state.to(run.device)
    run.logs = about["logs"]
    return about["step"]


def trim_logs(run):
    """Cut what was written after the checkpoint: those steps will be done again, and every step stands in a log once, with no half line."""
    clear_parts(run.folder)
    for name in LOGS:
        path, size = run.folder / name, run.logs.get(name, 0)
        if path.exists() and path.stat().st_size > size:
            os.truncate(path, size)


def append_log(run, name, text):
    """Append text to one of LOGS on rank 0. Raises StageError when it cannot be written."""
    if run.rank:
        return
    try:
        with open(run.folder / name, "a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise disk_error(run.folder / name, error) from error


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


def gather(run, value):
    """[value of rank 0, of rank 1, ...] on every rank. The values travel as JSON: nothing is ever unpickled."""
    if run.world == 1:
        return [value]
    text = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=run.device)
    sizes = [torch.zeros(1, dtype=torch.long, device=run.device) for _ in range(run.world)]
    dist.all_gather(sizes, torch.tensor([len(text)], device=run.device))
    padded = torch.nn.functional.pad(text, (0, int(max(sizes)) - len(text)))  # all ranks send as much as the longest
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return [json.loads(bytes(part[:size].tolist())) for part, size in zip(parts, sizes)]


def write_metrics(run, step, **extra):
    """One line of metrics.jsonl, the end of a step. All ranks call it; rank 0 writes."""
    sums = {}
    for part in gather(run, run.sums):  # a rank without a scored sample lacks some names
        for name, (numerator, denominator) in part.items():
            old = sums.get(name, (0.0, 0.0))
            sums[name] = (old[0] + numerator, old[1] + denominator)
    means = {name: sums[name][0] / sums[name][1] if sums[name][1] else None for name in sorted(sums)}
    row = {"step": step, "stage": run.stage} | means | extra
    run.sums = {}
    append_log(run, "metrics.jsonl", json.dumps(row) + "\n")
    run.logs = {name: (run.folder / name).stat().st_size for name in LOGS if (run.folder / name).exists()}
    return row


# ---- one optimiser step --------------------------------------------------------------------------


def learning_rate(config, stage, step, steps):
    """Rises linearly over the warm-up, then constant or half a cosine down to 0."""
    peak, warmup = getattr(config, f"{stage}_lr"), math.ceil(getattr(config, f"{stage}_warmup") * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if getattr(config, f"{stage}_schedule") == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def check_finite(run, step, loss, rows):
    """After the backward pass of one micro-batch: note its records where the loss, or the gradient so far, is not finite.

    Args: loss: scalar tensor; rows: ids of the micro-batch's records. Only notes them: one rank must not leave alone, so optimiser_step,
    where all ranks meet, raises.
    """
    if not math.isfinite(loss.item()):
        run.suspects += [f"{row} (loss {loss.item()} in step {step})" for row in rows]
    elif not run.suspects:  # once the gradient is spoilt it stays so
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in run.parameters.values() if parameter.grad is not None])
        if not math.isfinite(norm.item()):
            run.suspects += [f"{row} (gradient norm {norm.item()} in step {step})" for row in rows]


def optimiser_step(run, step, steps):
    """All-reduce the gradients in one flat bucket, clip, step. Stops the run on a loss or gradient that is not finite."""
    gradients = [parameter.grad if parameter.grad is not None else torch.zeros_like(parameter) for parameter in run.parameters.values()]
    flat = torch.cat([gradient.flatten() for gradient in gradients])  # (all adapter weights,)
    if run.world > 1:
        dist.all_reduce(flat)  # a sum: every rank divided by the global denominator
    norm = flat.norm().item()
    if not math.isfinite(norm) or total(run, len(run.suspects)):
        rows = sum(gather(run, run.suspects), [])
        raise StageError(f"{run.stage}: the gradient norm of step {step} is {norm}" + (f", from records {', '.join(rows)}" if rows else "")
                         + f"; the last checkpoint is untouched. Look at these records, or try a lower --{run.stage}_lr")
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
            raise StageError(f"{prompt.ids.count(pad)} image pads for {rows} features; images {[image.key for image in prompt.images]}")
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
    """The steps still to do, with a progress bar on rank 0 and a checkpoint now and then; at the end the adapter is saved.

    SIGTERM and SIGINT let the running step finish, save, and leave with the exit status 128 + signal, as shells count: 143 or 130.
    """
    def note(number, frame):
        run.stop = number
        if run.rank == 0:  # os.write, since a signal may come in the middle of a print
            os.write(2, f"\n{run.stage}: {signal.Signals(number).name}: will stop after this step; kill -9 stops at once\n".encode())

    bar = tqdm(range(run.first_step, steps), initial=run.first_step, total=steps, desc=run.stage, disable=run.rank > 0, mininterval=1)
    handlers, stop = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}, 0
    try:
        for step in bar:
            yield step, bar
            stop = total(run, run.stop)  # a signal may have come to one rank only; all leave together
            if step + 1 < steps and (stop or (step + 1) % SAVE_EVERY == 0):
                save_checkpoint(run, step + 1)
            if stop and step + 1 < steps:
                leave(run, f"after step {step + 1} of {steps}, checkpoint saved")
        if run.rank == 0:
            write_whole(run, "adapter.safetensors", lambda part: modeling.save_adapter(run.model, part, dict(stage=run.stage, steps=steps)))
            (run.folder / "checkpoint.safetensors").unlink(missing_ok=True)
        if stop:
            leave(run, "after its last step, adapter saved")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def leave(run, where):
    """End this process as a signal asked, with a sentence that says what to do."""
    number = run.stop or signal.SIGTERM  # a rank that got none leaves as the others do
    say(run, f"{run.stage}: stopped by {signal.Signals(number).name} {where}: type the same command to go on")
    sys.exit(128 + number)

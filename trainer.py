"""What the training stages share: opening a stage, files of adapters and checkpoints, metrics, the
optimizer step.

A stage merges the adapters of the stages before it into the base, trains a fresh LoRA, and saves
only that. So the reference model of DPO and GRPO is the same model with its LoRA off, at no memory.
Ours: the papers do not say how their stages hand over.

Whatever is drawn (data order, LoRA's A, a sample) depends on seed, step and record alone, never on
a generator's history: that makes resuming exact and independent of the number of ranks. A
checkpoint holds adapter, optimizer state and step; the step is also the place in data and schedule.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import math
import os
import signal
import sys
import threading
import time
import zlib
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

import data
import model
from config import STAGES, Config, ConfigError, fingerprint, guard, sync, write_whole
from judge import judge_from_env

PATIENCE = 60  # seconds that a rank waits for the others before it names them
FEATURE_BYTES = 1 << 30  # image features kept from step to step: the tower is frozen
SAVE_EVERY = 50  # optimizer steps (GRPO: rollouts) between checkpoints. Paper: 50 (PAPERS 1.5)
LOGS = ("metrics.jsonl", "samples.txt")  # files of a stage that grow with every step
# The metrics shown beside the progress bar.
SHOWN = ("loss", "accuracy", "margin", "reward", "legal", "unsafe", "kl", "sampler_diff")


class StageError(RuntimeError):
    """A check failed; the message says which and what to do."""


@dataclass
class Run:
    """What a training loop works with."""

    config: Config
    stage: str
    folder: Path
    model: torch.nn.Module
    processor: data.Processor
    parameters: dict  # name -> LoRA's A and B, float32
    optimizer: torch.optim.Optimizer
    device: torch.device
    rank: int = 0
    world: int = 1
    first_step: int = 0
    features: dict = field(default_factory=dict)  # image key -> features
    sums: dict = field(default_factory=dict)  # of this step: name -> [numerator, denominator]
    stop: int = 0  # the signal that asks to stop after this step
    bar: tqdm = None


# ---- opening a stage -----------------------------------------------------------------------------


def pick_device(config):
    """--device, or CUDA where there is one, as 3b and 7b expect: of several this rank's."""
    there = torch.cuda.is_available()
    real = config.device == "auto" and not config.recipe.startswith(("tiny", "smol"))
    if (real or config.device == "cuda") and not there:
        raise ConfigError(
            f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, sees no CUDA device;"
            " --device cpu does without, very slowly"
        )
    if config.device == "cpu" or not there:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def join_ranks(device):
    """(rank, world), and the process group where torchrun started several processes."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return 0, 1
    _, rank, world = open_board()
    if not dist.is_initialized():
        meet()
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))  # a judge may take long
    return rank, world


@functools.cache
def open_board():
    """(store, rank, world): where the processes of torchrun leave word for each other."""
    try:
        return next(dist.rendezvous("env://"))
    except ValueError as error:
        raise ConfigError(f"WORLD_SIZE is set, but not by torchrun; unset it ({error})") from error


def meet():
    """Wait until all ranks are here; name those that are not after PATIENCE, and go on.

    It stands before every collective, which waits for hours without a word.
    """
    board, rank, world = open_board()
    number = board.add(f"rank {rank}", 1)  # so many times this rank was here
    start = time.time()
    while late := [name for name in range(world) if board.add(f"rank {name}", 0) < number]:
        waited = time.time() - start
        if waited > PATIENCE:
            return tqdm.write(f"rank {rank} waits for {late}: they hang, or their judge is slow")
        time.sleep(waited / 20)


def make_judge(config):
    """The judge that the config names, with the methods of judge.py."""
    if config.judge == "toy":
        from extras.toy import ToyJudge

        return ToyJudge()
    endpoint = None
    if config.judge == "endpoint" or os.environ.get("JUDGE_URL") or os.environ.get("JUDGE_MODEL"):
        cache = os.path.join(config.out, "judge_cache")
        endpoint = judge_from_env(cache, filtered=config.filtered)
    if config.judge == "labels":
        from extras.labels import LabelsJudge

        return LabelsJudge(endpoint)
    return endpoint


def require_judge(judge):
    """Before what was judged is kept: a server whose last requests failed must still be there.
    Raises JudgeError."""
    if getattr(judge, "failed_in_a_row", 0):
        judge.preflight()


def base_folder(config):
    """The base model: --model, or the miniature world's."""
    return config.model or os.path.join(config.out, "base")


def adapter_path(config, stage):
    """Where a stage saves its adapter when it is finished."""
    return Path(config.out) / stage / "adapter.safetensors"


def load_policy(config, stages, device):
    """The base model with the adapters of finished `stages` merged into it, and its processor."""
    processor = data.load_processor(base_folder(config), config.min_pixels, config.max_pixels)
    policy = model.load_model(base_folder(config), getattr(torch, config.dtype), device)
    stage_inputs(config, policy, stages)
    merge_stages(config, policy, stages)
    return policy, processor


def merge_stages(config, policy, stages):
    """Merge the adapters of finished stages into a base model, one after the other."""
    for stage in stages:
        load_adapter(policy, adapter_path(config, stage))
        model.merge_lora(policy)


def stage_inputs(config, policy, stages):
    """{name: fingerprint} of the base, `policy` with nothing merged, and the adapters of `stages`.

    Raises StageError where one is not finished, ConfigError where one was trained on another base
    or other adapters than these: on those it would be another model, and nothing would show it.
    """
    inputs = {"base": weights_fingerprint(policy)}
    for stage in stages:
        path = adapter_path(config, stage)
        if not path.exists():
            raise StageError(f"{path} is missing: run `python safer.py {stage}` first")
        guard(path.parent, config, None, inputs, write=False)
        inputs[f"{stage} adapter"] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return inputs


def weights_fingerprint(policy):
    """Of the first values of every tensor: cheap, and the same on every device."""
    weights = policy.named_parameters()
    return fingerprint([(name, weight.flatten()[:8].tolist()) for name, weight in weights])


def read_run(out, last=None):
    """(Config, its finished stages) of a run folder, up to stage `last`: the last finished one.

    `out` is the folder as it is named here: a run may have been moved. `device` is any, for 3b too:
    this may be another machine. Raises StageError where nothing is finished, or the settings are
    damaged.
    """
    finished = [stage for stage in STAGES if (Path(out) / stage / "adapter.safetensors").exists()]
    if not finished or last not in (None, *finished):
        names = ", ".join(finished) or "none"
        raise StageError(f"{out}: no finished {last or 'stage'} (finished: {names})")
    last = last or finished[-1]
    path = Path(out) / last / "config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))["settings"]
        own = {name: value for name, value in settings.items() if name.islower()}
        config = Config(**own)  # guard adds the environment's, in capitals
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise StageError(f"{path}: damaged, or another program's ({error!r})") from error
    stages = config.stages.split(",")
    return replace(config, out=str(out), device="any"), stages[: stages.index(last) + 1]


def lock_folder(folder):
    """Hold <folder>/lock for the life of this process. Raises StageError while another one does.

    The system drops the lock however a process ends. The descriptor is never closed: that would
    drop it too.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    descriptor = os.open(Path(folder) / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # which of the two is the system's choice
        message = "another process is at work here; wait for it, or choose another --out"
        raise StageError(f"{folder}: {message}") from None
    except OSError:
        print(f"{folder}: this file system has no locks; start no second run here")


def open_run(config, stage, records):
    """Everything a stage needs, checked before its first step -> Run."""
    device = pick_device(config)
    rank, world = join_ranks(device)
    folder = Path(config.out) / stage
    share = config.grpo_update_batch if stage == "grpo" else getattr(config, f"{stage}_batch")
    if share < world:
        raise ConfigError(f"{stage}: {share} records per optimizer step for {world} ranks")
    if rank == 0:
        open_folder(config, folder, stage)
    policy, processor = load_policy(config, (), device)
    longest = data.check_lengths(
        records,
        getattr(config, f"{stage}_prompts").split(","),
        processor,
        config.max_prompt,
        config.max_response,
    )
    stages = config.stages.split(",")
    before = stages[: stages.index(stage)]
    inputs = stage_inputs(config, policy, before)  # before merging: of the bare base
    inputs["records"] = data.records_fingerprint(records)
    merge_stages(config, policy, before)
    # from here on, LoRA off is the model before this stage: the reference
    guard(folder, config, stage, inputs, write=rank == 0)  # all ranks leave, or none
    model.attach_lora(policy, config.lora_r, config.lora_alpha, config.seed)
    parameters = model.lora_parameters(policy)
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.0, weight_decay=config.weight_decay)
    run = Run(config, stage, folder, policy, processor, parameters, optimizer, device, rank, world)
    counts = f"{len(records)} records, longest prompt {longest} tokens"
    report(run, f"{stage}: {counts}, {device}, {world} rank(s)")
    load_checkpoint(run)
    return run


def open_folder(config, folder, stage):
    """Before the weights are loaded: lock the folder, remove what a kill has left, and what
    --resume 0 does not go on from, and see that the settings are those it was begun with."""
    lock_folder(folder)
    patterns = ["*.part", ".tmp*"]
    if not config.resume:
        patterns += ["checkpoint.safetensors", "config.json"]
    for pattern in patterns:
        for rest in folder.glob(pattern):
            rest.unlink()
    guard(folder, config, stage, {}, write=False)


def report(run, text):
    """Print on the first rank, without breaking the progress bar."""
    if run.rank == 0:
        tqdm.write(text)


# ---- checkpoints ---------------------------------------------------------------------------------


def save_checkpoint(run, step):
    """Adapter and optimizer state after `step` steps, in one file that appears whole or not at all,
    with the sizes of the logs, which are on the disk before it."""
    if run.rank:
        return
    tensors = {}
    for name, parameter in run.parameters.items():
        for key, value in {"adapter": parameter, **run.optimizer.state[parameter]}.items():
            tensors[f"{name} {key}"] = value
    sizes = {}
    for path in [run.folder / name for name in LOGS if (run.folder / name).exists()]:
        sync(path)
        sizes[path.name] = path.stat().st_size
    path = run.folder / "checkpoint.safetensors"
    write_tensors(path, tensors, {"step": step, "sizes": sizes})


def load_checkpoint(run):
    """Restore what save_checkpoint wrote, if it did, and cut the logs to what they were then: the
    steps after it are done again, and each step is logged once."""
    path = run.folder / "checkpoint.safetensors"
    sizes = {}
    if run.config.resume and path.exists():
        tensors, header = read_tensors(path)
        run.first_step = header["step"]
        sizes = header["sizes"]
        for name, parameter in run.parameters.items():
            parameter.data.copy_(tensors[f"{name} adapter"])
            state = run.optimizer.state[parameter]
            state["step"] = tensors[f"{name} step"]
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = tensors[f"{name} {key}"].to(run.device)
        report(run, f"{run.stage}: going on after step {run.first_step}")
    for name in LOGS:
        if run.rank == 0 and (run.folder / name).exists():
            path = run.folder / name
            os.truncate(path, min(path.stat().st_size, sizes.get(name, 0)))


# ---- files of tensors ----------------------------------------------------------------------------


def checksum(path, tensors, header):
    """CRC-32 of the file that tensors and header make.

    Raises ModelError where a value is not finite: none is written, and none is read.
    """
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise model.ModelError(f"{path}: holds values that are not finite")
    return zlib.crc32(save(tensors, {"header": json.dumps(header)}))


def write_tensors(path, tensors, header):
    """Write {name: tensor}, and a header of plain values, to one safetensors file, whole or not at
    all."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # One key: safetensors writes several in an order that changes from run to run.
    words = {"header": json.dumps([checksum(path, tensors, header), header])}
    write_whole(path, lambda part: save_file(tensors, part, metadata=words))


def read_tensors(path):
    """What write_tensors wrote -> ({name: tensor}, header)."""
    try:
        with safe_open(path, framework="pt") as file:
            found, header = json.loads(file.metadata()["header"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if found != checksum(path, tensors, header):
            raise ValueError("its checksum is that of other values")
        return tensors, header
    except (OSError, SafetensorError, LookupError, ValueError, TypeError) as error:
        why = f"{path}: damaged, or not written by this program: {error!r}"
        raise model.ModelError(why) from error


def save_adapter(policy, path, metadata):
    """Write all A and B, float32, to a file; rank, alpha and metadata are in its header.

    Tensors: `model.language_model.layers.<i>.<target>.A` (r, in) and `.B` (out, r).
    """
    layer = next(iter(model.lora_layers(policy).values()))
    r = len(layer.A)
    header = {"r": r, "alpha": layer.scale * r, "metadata": metadata}
    write_tensors(path, model.lora_parameters(policy), header)


@torch.no_grad()
def load_adapter(policy, path):
    """Attach adapters of an adapter file's rank and alpha, with its values, to a model without any.

    Raises ModelError, naming the first differences, when the file is of another model: tensors are
    missing, unexpected or of another shape.
    """
    tensors, header = read_tensors(path)
    model.attach_lora(policy, header["r"], header["alpha"], seed=0)
    mine = model.lora_parameters(policy)
    shapes = {(name, parameter.shape) for name, parameter in mine.items()}
    wrong = shapes ^ {(name, tensor.shape) for name, tensor in tensors.items()}
    if wrong:
        raise model.ModelError(f"{path}: not of this model; these differ: {sorted(wrong)[:4]}")
    for name, parameter in mine.items():
        parameter.copy_(tensors[name])


# ---- metrics, ranks ------------------------------------------------------------------------------


def gather(value):
    """[value of rank 0, of rank 1, ...] on every rank."""
    if not dist.is_initialized():
        return [value]
    meet()
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def total(value):
    """Sum of a number over all ranks."""
    return sum(gather(float(value)))


def add(run, **sums):
    """Collect (numerator, denominator) pairs of this step.

    They are summed over micro-batches and ranks, and divided once, so a denominator of 1 on each
    rank gives the mean over ranks.
    """
    for name, (numerator, denominator) in sums.items():
        pair = run.sums.setdefault(name, [0.0, 0.0])
        pair[0] += float(numerator)
        pair[1] += float(denominator)


def append_log(run, name, text):
    """Append text to one of LOGS on the first rank."""
    if run.rank == 0:
        with open(run.folder / name, "a", encoding="utf-8") as file:
            file.write(text)


def write_metrics(run, step, **values):
    """One line of metrics.jsonl, the end of a step. All ranks call it; the first one writes."""
    parts = gather(run.sums)
    run.sums = {}
    for part in parts:  # a rank without a scored sample lacks some names
        add(run, **part)
    row = {"step": step, "stage": run.stage}
    for name, (numerator, denominator) in sorted(run.sums.items()):
        row[name] = numerator / denominator if denominator else None
    run.sums = {}
    row |= values
    append_log(run, "metrics.jsonl", json.dumps(row) + "\n")
    run.bar.set_postfix({name: row[name] for name in SHOWN if name in row})


# ---- one optimizer step --------------------------------------------------------------------------


def learning_rate(config, stage, step, steps):
    """A linear rise over the warm-up, then half a cosine to 0; or --grpo_schedule constant."""
    peak = getattr(config, f"{stage}_lr")
    if stage == "grpo" and config.grpo_schedule == "constant":
        return peak
    warmup = math.ceil(config.warmup * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def check_finite(run, loss, ids):
    """Name the records of a micro-batch whose loss is not finite, and so its gradient. It is
    optimizer_step that raises, where all ranks meet: one that left alone would keep the others
    waiting."""
    if not math.isfinite(loss.item()):
        tqdm.write(f"{run.stage}: the loss is {loss.item()}, of records {', '.join(ids)}")


def optimizer_step(run, step, steps):
    """Sum the gradients over the ranks, clip them together, step; metrics grad_norm and lr.

    Raises StageError on a gradient that is not finite; check_finite has named the records then.
    """
    parameters = list(run.parameters.values())
    if run.world > 1:
        meet()
    for parameter in parameters:
        if parameter.grad is None:  # a rank without a scored sample has none
            parameter.grad = torch.zeros_like(parameter)
        if run.world > 1:
            dist.all_reduce(parameter.grad)  # a sum: each rank divided by the global denominator
    norm = clip_grad_norm_(parameters, run.config.max_grad_norm).item()
    if not math.isfinite(norm):
        raise StageError(
            f"{run.stage}: the gradient norm of step {step} is {norm}; the last checkpoint is"
            f" untouched. Look at the records named above, or try a lower --{run.stage}_lr"
        )
    rate = learning_rate(run.config, run.stage, step, steps)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.step()
    run.optimizer.zero_grad()
    add(run, grad_norm=(norm, 1), lr=(rate, 1))


def token_logprobs(run, groups, features, temperature=1.0, entropy=False):
    """model.token_logprobs with the run's model and --checkpointing."""
    checkpoint = run.config.checkpointing
    return model.token_logprobs(run.model, groups, features, temperature, checkpoint, entropy)


def encode_new(policy, prompts, kept):
    """Put the features of all images of these prompts into `kept`, {image key: features}, which
    starts anew where it has grown large; returns it. The tower is frozen: they never change."""
    if sum(part.nbytes for part in kept.values()) > FEATURE_BYTES:
        kept.clear()
    images = sum([prompt.images for prompt in prompts], ())
    new = [image for image in images if image.key not in kept]
    kept |= model.encode_images(policy, new)
    return kept


# ---- the steps of a stage ------------------------------------------------------------------------


def batch_at(records, step, batch, seed):
    """The (record, epoch) pairs of one step: the data in a new order each epoch, without a gap."""
    picked = []
    for position in range(step * batch, (step + 1) * batch):
        epoch, place = divmod(position, len(records))
        picked.append((records[epoch_order(len(records), epoch, seed)[place]], epoch))
    return picked


def load_ahead(run, pairs):
    """Decode this rank's pictures of the next (record, epoch) pairs in a thread, while this step
    computes: data.load_image keeps them, so no number changes."""

    def load():
        with contextlib.suppress(Exception):  # told when the step comes
            for record, _ in pairs[run.rank :: run.world]:
                for path in record.images:
                    data.load_image(path, run.processor)

    threading.Thread(target=load, daemon=True).start()


@functools.lru_cache(4)
def epoch_order(count, epoch, seed):
    """A permutation that depends on seed and epoch alone."""
    generator = torch.Generator().manual_seed(stable_hash("order", seed, epoch))
    return torch.randperm(count, generator=generator).tolist()


def stable_hash(*words):
    """63 bits that depend on the words alone, in every process and on every machine."""
    return int.from_bytes(hashlib.sha256(repr(words).encode()).digest()[:8], "big") >> 1


def stage_steps(config, stage, count):
    """Steps of a stage over `count` records: its epochs, or --grpo_steps; at most --max_steps."""
    epochs = getattr(config, f"{stage}_epochs")
    steps = math.ceil(count * epochs / getattr(config, f"{stage}_batch"))
    if stage == "grpo":
        steps = config.grpo_steps or steps
    return min(steps, config.max_steps or steps)


def steps_of(run, steps):
    """The steps still to do, with a checkpoint now and then; at the end the adapter is saved.

    SIGTERM and SIGINT let the running step finish, save, and leave with the exit status 128 +
    signal, as shells count: 143 or 130. So the command that would come next is not started.
    """

    def note(number, frame):
        run.stop = number

    handlers = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    done = run.first_step
    stop = 0
    run.bar = tqdm(initial=done, total=steps, desc=run.stage, disable=run.rank > 0, mininterval=1)
    try:
        while done < steps and not stop:
            yield done
            done += 1
            run.bar.update()
            stop = max(gather(run.stop))  # it may have come to one rank only; all leave
            if done < steps and (stop or done % SAVE_EVERY == 0):
                save_checkpoint(run, done)
    finally:
        run.bar.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if done == steps and run.rank == 0:
        path = run.folder / "adapter.safetensors"
        save_adapter(run.model, path, {"stage": run.stage, "steps": steps})
        (run.folder / "checkpoint.safetensors").unlink(missing_ok=True)
    if stop:
        report(run, f"{run.stage}: stopped after step {done} of {steps}; the same command goes on")
        sys.exit(128 + stop)

"""Every setting of a run in one dataclass: what it means, its unit, and what the papers say of it.

    python config.py --recipe 3b --grpo_lr 2e-5     prints the settings, or every mistake at once
    python config.py --get stages --recipe tiny     prints one of them
    python config.py --help                         prints all flags

A text under a field is its help. Sources: TK is the released code of SaFeR-ToolKit, CN a reading
note of the paper; "ours" is our own choice where the papers say nothing that could be found. A
recipe is a set of other defaults; a flag overrides both.

Also here, since every other file may need them: the one way to write a file, and the one guard that
keeps a folder from being continued with other settings or inputs.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import inspect
import json
import math
import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

STAGES = ("sft", "dpo", "grpo")  # in the order of the curriculum
PROMPT_MODES = ("planned", "toolkit", "generic")
PACKAGES = ("torch", "transformers", "safetensors", "pillow", "numpy", "tqdm")


@dataclass(frozen=True)
class Config:
    # ---- the run
    recipe: str = "tiny"
    """tiny (the miniature world, CPU), 3b or 7b (Qwen2.5-VL-Instruct, as both papers); with -vlm:
    SaFeR-VLM instead of SaFeR-ToolKit, the same as --method vlm"""
    model: str = ""
    """base model: a folder or hub name; empty: the one that extras/toy_base.py trains"""
    data: str = ""
    """folder with sft.jsonl, dpo.jsonl, grpo.jsonl, eval.jsonl (-vlm: pool.jsonl, eval.jsonl);
    empty: the toy world's, in the run"""
    out: str = ""
    """folder of the run; empty: out/<recipe>, with the flags that differ from it in its name"""
    seed: int = 0
    """seeds data order, LoRA's A, and every sample of every prompt"""
    max_steps: int = 0
    """optimizer steps (GRPO: rollouts) after which each stage ends early, 0 = none; for trials"""
    stages: str = "sft,dpo,grpo"
    """the curriculum, in this order. Paper: SFT, DPO, GRPO; "sft,grpo" is an ablation (CN)"""
    resume: bool = True
    """1: go on from the last checkpoint of an interrupted stage; 0: start the stage again"""
    dry_run: bool = False
    """1: check everything, print stages with estimated memory and time, and train nothing"""

    # ---- data (build.py, qibox.py)
    curate: str = "none"
    """GRPO's prompts: none (all), qibox (SaFeR-VLM's box of quality and instability), random (as
    many, at random; its ablation)"""
    qi_samples: int = 4
    """responses per prompt and model to find its quality and instability. Paper: outputs of 7
    models; how many each was not found"""
    qi_low: float = 0.1
    """lowest quality inside the box, a quantile of the pool. Ours"""
    qi_high: float = 0.9
    """highest quality inside the box, a quantile. Paper: a band of moderate quality"""
    qi_unstable: float = 0.5
    """lowest instability inside the box, a quantile. Paper: high instability"""

    # ---- model and memory
    dtype: str = "float32"
    """float32 or bfloat16, of weights and activations; LoRA, losses and optimizer are always
    float32. Paper: bf16 (TK)"""
    device: str = "auto"
    """auto (CUDA where there is one), cpu or cuda"""
    min_pixels: int = 3136
    """pixels an image is enlarged to at least, everywhere. Paper: 262,144 in training (TK), 338^2
    in evaluation (TK)"""
    max_pixels: int = 3136
    """pixels an image is shrunk to at most. Paper: 4,194,304 in training, 262,144 in evaluation
    (TK)"""
    max_prompt: int = 640
    """tokens; a longer prompt is an error before training, never cut. Paper: 4,096 (TK)"""
    max_response: int = 160
    """tokens sampled, or trained on, per response. Paper: 2,048 (TK)"""
    lora_r: int = 16
    """rank of the adapters. Ours: whether the paper trained adapters or all weights was not
    found"""
    lora_alpha: float = 32.0
    """adapters are scaled by alpha / r. Ours"""
    micro_tokens: int = 4096
    """packed tokens per forward and backward pass; changes memory and speed, never a gradient"""
    checkpointing: bool = False
    """1: recompute each layer in the backward pass (memory for time)"""

    # ---- optimizer, all stages
    weight_decay: float = 0.0
    """AdamW. Paper: 0.01 in GRPO (TK); it acts on A and B here"""
    max_grad_norm: float = 1.0
    """gradient norm above which it is scaled down. Paper: 1.0 (TK)"""
    warmup: float = 0.1
    """share of the steps over which the learning rate rises from 0, before half a cosine. Ours"""

    # ---- SFT
    sft_lr: float = 6e-3
    """Paper: 1e-5 (CN)"""
    sft_epochs: float = 5.0
    """passes over the data. Ours"""
    sft_batch: int = 16
    """records per optimizer step, over all ranks. Ours"""
    sft_prompts: str = "generic,generic,planned"
    """prompt modes a record takes turns in: planned, toolkit, generic. Ours: the evaluation names
    no tool, so tool use must be internalised"""

    # ---- DPO
    dpo_lr: float = 2e-4
    """Paper: 5e-7 (CN)"""
    dpo_epochs: float = 1.0
    """passes over the pairs. Ours"""
    dpo_batch: int = 16
    """pairs per optimizer step, over all ranks. Ours"""
    dpo_prompts: str = "generic,generic,planned"
    """prompt modes, see sft_prompts"""
    dpo_beta: float = 0.3
    """strength of the pull to the reference. Ours; the paper's was not found"""

    # ---- GRPO
    grpo_lr: float = 7e-4
    """Paper: 1e-6 (TK)"""
    grpo_epochs: float = 1.0
    """passes over the prompts. Paper: 2 (TK)"""
    grpo_steps: int = 0
    """rollout steps, 0 = from grpo_epochs"""
    grpo_schedule: str = "cosine"
    """cosine, or constant without a warm-up. Paper: constant (TK)"""
    grpo_prompts: str = "generic,generic,planned"
    """prompt modes, see sft_prompts. Paper: its own template, which is our toolkit mode (TK)"""
    grpo_batch: int = 16
    """prompts per rollout, over all ranks. Paper: 256 (TK)"""
    grpo_update_batch: int = 16
    """prompts per optimizer step; a rollout is split into this many at a time. Paper: 32 (TK)"""
    grpo_k: int = 8
    """K, responses per prompt. Paper: 4 (TK); SaFeR-VLM: 5"""
    temperature: float = 1.0
    """of sampling, and of every log-probability that goes with it. Paper: 1.0 (TK)"""
    clip_low: float = 0.2
    """ratio is clipped below 1 - clip_low. Paper: 0.2 (TK)"""
    clip_high: float = 0.3
    """ratio is clipped above 1 + clip_high. Paper: 0.3 (TK)"""
    dual_clip: float = 3.0
    """bound on the ratio where the advantage is negative, 0 = none. Paper: 3.0 (TK)"""
    kl_coef: float = 0.01
    """weight of the k3 KL term to the model before GRPO, in the loss; 0 skips the reference pass.
    Paper: 0.01 (TK)"""
    advantage_std: bool = True
    """1: advantages are divided by the group's standard deviation. Paper: yes (TK)"""
    loss_mean: str = "token"
    """token, sequence or constant: what the loss is averaged over. Paper: token (TK)"""
    reward: str = "checked"
    """checked (ours), paper (the released formula), structured (SaFeR-VLM), or an ablation: answer,
    answer+format, answer+format+depth, no-depth, no-compliance, no-tool-quality"""
    judge: str = "toy"
    """toy (the miniature world's oracle), endpoint (JUDGE_URL, JUDGE_MODEL, JUDGE_KEY) or labels
    (rules on the record's labels, and what form the answer has: by the endpoint if there is one,
    else by phrases)"""
    filtered: str = "drop"
    """what a response is that the judge's server refuses to read by a content filter: drop (left
    out and counted) or unsafe (the worst grades)"""
    rollout_rows: int = 128
    """samples decoded side by side"""

    # ---- GRPO as SaFeR-VLM does it
    rollout: str = "plain"
    """plain, reflect (the policy reflects on unsafe samples and corrects them; SaFeR-VLM) or
    discard (they are left out; its ablation)"""
    reflect_rounds: int = 1
    """corrections of a response that stays unsafe. Ours; the paper's number was not found"""
    credit: str = "prompt"
    """context in which a correction is trained: prompt (as a first answer) or reflection (the chat
    it was sampled in). Ours; not found"""
    unsafe: str = "keep"
    """keep or drop: whether an unsafe response that was corrected stays in its group beside the
    correction; dropped, unsafe and then corrected is worth as much as safe at once. Ours; not
    found"""
    weight_reasoning: float = 0.5
    """structured reward: share of the reasoning block, the answer block has the rest. Ours; not
    found"""
    weight_logic: float = 0.25
    """structured reward: weight of logical coherence within a block; the three weights are scaled
    to sum to 1. Ours; not found"""
    weight_grounding: float = 0.25
    """structured reward: weight of image grounding. Ours; not found"""
    weight_safety: float = 0.5
    """structured reward: weight of safety awareness. Ours; not found"""
    penalties: bool = True
    """1: hallucination, contradiction and missing grounding cost (SaFeR-VLM); 0: the ablation"""
    safety_gate: bool = True
    """structured reward: 1: every unsafe response is worth less than every safe one (ours); 0: the
    formula as far as it was found"""

    # ---- evaluation
    eval_prompts: str = "generic,planned"
    """prompt modes to evaluate under; the first is the one of the table. Paper: generic (TK)"""
    eval_limit: int = 0
    """records per benchmark, 0 = all"""
    benchmarks: str = ""
    """benchmarks beside eval.jsonl, joined by commas (python -m extras.benchmarks lists them)"""
    bench_data: str = ""
    """folder with one folder per benchmark, holding its original files"""


# LoRA at ten times the paper's learning rates: adapters commonly want more than full fine-tuning
# does. Ours, not measured at these sizes.
REAL = dict(
    dtype="bfloat16",
    checkpointing=True,
    min_pixels=262_144,
    max_pixels=1_048_576,
    max_prompt=4096,
    max_response=2048,
    lora_r=64,
    lora_alpha=128.0,
    micro_tokens=16_384,
    weight_decay=0.01,
    sft_lr=1e-4,
    sft_epochs=2.0,
    sft_batch=32,
    sft_prompts="generic,planned",
    dpo_lr=5e-6,
    dpo_batch=32,
    dpo_beta=0.1,
    dpo_prompts="generic,planned",
    grpo_lr=1e-5,
    grpo_epochs=2.0,
    grpo_schedule="constant",
    grpo_batch=256,
    grpo_update_batch=32,
    grpo_k=4,
    grpo_prompts="toolkit",
    judge="endpoint",
    rollout_rows=64,
)
# SaFeR-VLM trains by GRPO alone; K = 5 is all that is known of its settings (PAPERS 2.3, 2.5), the
# rest is as in SaFeR-ToolKit.
VLM = dict(
    stages="grpo",
    rollout="reflect",
    reward="structured",
    curate="qibox",
    grpo_k=5,
    grpo_prompts="generic",
)
RECIPES = {
    "tiny": {},
    "3b": dict(REAL, model="Qwen/Qwen2.5-VL-3B-Instruct"),
    "7b": dict(REAL, model="Qwen/Qwen2.5-VL-7B-Instruct", rollout_rows=48),
}
RECIPES |= {f"{name}-vlm": dict(recipe, **VLM) for name, recipe in RECIPES.items()}
RECIPES["tiny-vlm"] |= dict(grpo_steps=100, eval_prompts="generic", qi_samples=8)
CHOICES = {
    "recipe": list(RECIPES),
    "dtype": ["float32", "bfloat16"],
    "device": ["auto", "cpu", "cuda"],
    "judge": ["toy", "endpoint", "labels"],
    "loss_mean": ["token", "sequence", "constant"],
    "rollout": ["plain", "reflect", "discard"],
    "credit": ["prompt", "reflection"],
    "unsafe": ["keep", "drop"],
    "filtered": ["drop", "unsafe"],
    "curate": ["none", "qibox", "random"],
    "grpo_schedule": ["cosine", "constant"],
    "reward": "checked paper structured answer answer+format answer+format+depth no-depth"
    " no-compliance no-tool-quality".split(),
}
# The only numbers that may be 0.
MAY_BE_0 = set(
    "seed max_steps resume dry_run qi_low qi_high qi_unstable checkpointing"
    " weight_decay warmup grpo_steps dual_clip kl_coef advantage_std weight_reasoning weight_logic"
    " weight_grounding weight_safety penalties safety_gate eval_limit".split()
)
# A run may go on with others of these: they change rounding, or what is evaluated.
FREE = set(
    "out resume dry_run device micro_tokens checkpointing rollout_rows benchmarks bench_data"
    " eval_limit eval_prompts".split()
)
# GRPO's alone: SFT and DPO do not depend on them.
ROLLOUT = set(
    "temperature clip_low clip_high dual_clip kl_coef advantage_std loss_mean reward judge"
    " JUDGE_MODEL filtered rollout reflect_rounds credit unsafe weight_reasoning weight_logic"
    " weight_grounding weight_safety penalties safety_gate curate qi_samples qi_low qi_high"
    " qi_unstable".split()
)
# All that these two depend on. The model whose answers are scored is one of QI-Box's inputs.
BUILD = set("seed min_pixels max_pixels max_response".split())
QIBOX = BUILD | set(
    "dtype temperature judge JUDGE_MODEL filtered weight_reasoning weight_logic weight_grounding"
    " weight_safety penalties curate qi_samples qi_low qi_high qi_unstable".split()
)


class ConfigError(ValueError):
    """All mistakes in the settings, one line each."""


# ---- flags -------------------------------------------------------------------------------------


def field_help():
    """Field name -> the text under it, read from this file's own source."""
    source = inspect.getsource(Config)
    return dict(re.findall(r'^    (\w+): .*\n    """((?:.|\n)+?)"""', source, re.M))


def zero_or_one(text):
    """A flag that is on or off."""
    if text not in ("0", "1"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected 0 or 1")
    return text == "1"


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ConfigError(f"{message}; python config.py --help lists the flags")


def make_parser():
    """One flag for each field. Raises ConfigError where argparse would leave the program."""
    parser = Parser(prog="config.py", allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--method", choices=("toolkit", "vlm"), help="vlm: the recipe's -vlm form")
    help_of = field_help()
    for field in dataclasses.fields(Config):
        form = {"type": field.type}
        if field.type is bool:  # --dry_run alone is --dry_run 1
            form = {"type": zero_or_one, "nargs": "?", "const": True}
        parser.add_argument(
            f"--{field.name}",
            **form,
            choices=CHOICES.get(field.name),
            help=f"({field.default!r}) {help_of[field.name]}".replace("%", "%%"),
        )
    return parser


def parse_config(argv):
    """Flags (`--name value` or `--name=value`) -> Config. Raises ConfigError."""
    values = vars(make_parser().parse_args(argv))
    recipe = values.get("recipe", "tiny")
    if "method" in values:
        form = "-vlm" if values.pop("method") == "vlm" else ""
        recipe = recipe.removesuffix("-vlm") + form
    config = Config(**RECIPES[recipe] | values | {"recipe": recipe})
    problems = check_config(config)
    if problems:
        raise ConfigError("\n".join(problems))
    return config if config.out else dataclasses.replace(config, out=run_folder(config))


def check_config(config):
    """Everything wrong with the values, one line each."""
    problems = []
    for name, value in vars(config).items():
        if name.endswith("_prompts") and not set(value.split(",")) <= set(PROMPT_MODES):
            modes = ", ".join(PROMPT_MODES)
            problems.append(f"--{name} {value}: expected words of {modes}, joined by commas")
        if isinstance(value, str):
            continue
        if not 0 <= value < math.inf:  # also what is not a number
            problems.append(f"--{name} {value}: expected a number of 0 or more")
        elif value == 0 and name not in MAY_BE_0:
            problems.append(f"--{name} {value}: must be above 0")

    stages = config.stages.split(",")
    in_order = stages == [stage for stage in STAGES if stage in stages]
    weights = config.weight_logic + config.weight_grounding + config.weight_safety
    structured = config.reward == "structured"
    pixels = f"--min_pixels {config.min_pixels}: is above --max_pixels {config.max_pixels}"
    rules = {  # what is said where it does not hold
        f"--stages {config.stages}: expected some of {','.join(STAGES)}, in this order": in_order,
        "--warmup, --clip_low: must be below 1": max(config.warmup, config.clip_low) < 1,
        "--dual_clip: must be above 1, or 0 for none": not 0 < config.dual_clip <= 1,
        "--qi_low, --qi_high, --qi_unstable: expected low <= high <= 1 and unstable <= 1": (
            config.qi_low <= config.qi_high <= 1 and config.qi_unstable <= 1
        ),
        "--weight_reasoning: at most 1; one of the other three --weight_ must be above 0": (
            config.weight_reasoning <= 1 and weights > 0
        ),
        "--reward structured needs a judge that grades; labels cannot: use --judge endpoint": (
            not structured or config.judge != "labels"
        ),
        "--rollout reflect and discard need the judge's safety flag: use --reward structured": (
            structured or config.rollout == "plain"
        ),
        pixels: config.min_pixels <= config.max_pixels,
        "--grpo_k 1: a group of one has no advantage; expected 2 or more": config.grpo_k != 1,
        "--grpo_update_batch must divide --grpo_batch, or prompts would be dropped": (
            config.grpo_batch % max(1, config.grpo_update_batch) == 0
        ),
    }
    return problems + [message for message, holds in rules.items() if not holds]


def run_folder(config):
    """out/<recipe> and the flags that differ from it, so that no two runs share a folder."""
    recipe = Config(**RECIPES[config.recipe] | {"recipe": config.recipe})
    words = [config.recipe]
    for name, value in vars(config).items():
        if value != getattr(recipe, name) and name not in FREE:
            words.append(f"{name}{value}".replace("/", "_").replace(",", "+"))
    return "out/" + "-".join(words)


# ---- files ---------------------------------------------------------------------------------------


def sync(path):
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path, write):
    """Call write(path of a part file), bring it to the disk, give it its name: every file of a run
    is written so. A kill or a power cut leaves the old file or the new one, whole.

    Raises OSError, with the old file as it was, when the disk is full or read-only.
    """
    path = Path(path)
    writer = f"{os.getpid()}-{threading.get_ident()}"  # two may write the same file at once
    part = path.with_name(f"{path.name}.{writer}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        sync(part)
        part.replace(path)
        sync(path.parent)
    except Exception as error:  # safetensors wraps what the system says in a class of its own
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        message = f"{path}: cannot be written ({error}); what was there is unchanged"
        raise OSError(message) from error


def write_text(path, text):
    """write_whole for text."""
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


# ---- the guard -----------------------------------------------------------------------------------


def fingerprint(*parts):
    """SHA-256 over bytes or plain values, 16 hex digits of it: to notice changes, not attacks."""
    digest = hashlib.sha256()
    for part in parts:
        content = part if isinstance(part, bytes) else repr(part).encode()
        digest.update(hashlib.sha256(content).digest())  # one each: no border can move
    return digest.hexdigest()[:16]


def run_settings(config):
    """All settings, and the judge model of the environment, which is one of them in all but
    form."""
    judge = os.environ.get("JUDGE_MODEL", "") if config.judge != "toy" else ""
    return dataclasses.asdict(config) | {"JUDGE_MODEL": judge}


def needed_settings(step):
    """Names of the settings that a step (sft, dpo, grpo, eval, qibox, build) depends on: a stage
    on those before it, not on those after; step None on none."""
    if step is None:
        return set()
    if step in ("qibox", "build"):
        return QIBOX if step == "qibox" else BUILD
    names = {field.name for field in dataclasses.fields(Config)} | {"JUDGE_MODEL"}
    names -= FREE
    if step in ("sft", "dpo"):
        names -= ROLLOUT
    order = (*STAGES, "eval")
    later = tuple(f"{stage}_" for stage in order[order.index(step) + 1 :])
    return {name for name in names if not name.startswith(later)}


def guard(folder, config, step, inputs, write=True):
    """Keep a folder from being continued with other settings or inputs than it was begun with.

    Args: step: see needed_settings; inputs: {name: fingerprint} of what the step starts from, such
    as its records, the base, earlier adapters. The first call writes <folder>/config.json:
    settings, inputs, git commit, versions. A later call compares, and adds inputs that are new;
    with write=False it only compares. Raises ConfigError, naming every difference.
    """
    path = Path(folder) / "config.json"
    settings = run_settings(config)
    found = None
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            was = found["settings"] | found["inputs"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path}: damaged, or not written by this program ({error}); "
                f"choose another --out, or delete {folder}"
            ) from error
        now = {name: settings[name] for name in sorted(needed_settings(step))} | inputs
        changed = []
        for name, value in now.items():
            if was.get(name, value) != value:
                changed.append(f"{name} was {was[name]!r}, is {value!r}")
        if changed:
            raise ConfigError(
                f"{folder} was begun with other settings or inputs: {'; '.join(changed)}; "
                "put back what was there, choose another --out, or delete that folder"
            )
    if write:
        found = found or {"settings": settings, "inputs": {}} | versions()
        found["inputs"] |= inputs
        write_text(path, json.dumps(found, indent=1) + "\n")


def versions():
    """The code that runs: git commit, python, packages."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    git = subprocess.run(command, capture_output=True, text=True, check=False)
    return {
        "commit": git.stdout.strip() or "not a git checkout",
        "python": sys.version.split()[0],
        "versions": {name: version(name) for name in PACKAGES},
    }


def run_command(main, *errors):
    """How every program here ends: a ConfigError, OSError or one of `errors` is told in a sentence,
    exit status 1; Ctrl-C is 130, as shells count, so that no later command starts."""
    try:
        sys.exit(main(sys.argv[1:]))
    except (OSError, ConfigError, *errors) as problem:
        sys.exit(str(problem))
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).stem}: stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)


def main(argv):
    """Print the settings that the flags give, or with --get NAME one of them."""
    if "--help" in argv:
        return make_parser().print_help()
    if argv[:1] != ["--get"]:
        return print(json.dumps(vars(parse_config(argv)), indent=1, ensure_ascii=False))
    values = vars(parse_config(argv[2:]))
    if argv[1:2] and argv[1] in values:
        value = values[argv[1]]
        return print(int(value) if isinstance(value, bool) else value)
    raise ConfigError(f"--get: expected a setting, one of {', '.join(values)}")


if __name__ == "__main__":
    run_command(main)

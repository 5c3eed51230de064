"""Every setting of a run in one dataclass: what it means, its unit, and what the papers say of it.

    python config.py --recipe 3b --grpo_lr 2e-5     prints the settings, or every mistake at once
    python config.py --help                         prints all flags

Each field of Config is a flag, and the text under it is its help. Sources: TK is the released code
of SaFeR-ToolKit, CN a reading note of the paper; "ours" is our own choice where the papers say
nothing that could be found. A recipe is a set of flags; a flag that is typed overrides it.

Also here, since every other file may need them: the one way to write a file, the one way to open a
picture, and the one guard that keeps a folder from being continued with other settings or inputs.
"""

import argparse
import hashlib
import inspect
import json
import math
import os
import shlex
import subprocess
import sys
import threading
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal, get_args

STAGES = ("sft", "dpo", "grpo")  # in the order of the curriculum
PROMPT_MODES = ("planned", "toolkit", "generic")
PACKAGES = ("torch", "transformers", "safetensors", "pillow", "numpy", "tqdm")


@dataclass(frozen=True)
class Config:
    """Flags are written --seed 3 or --seed=3, those of type bool --resume 0 or --resume 1."""

    # ---- the run
    recipe: Literal["tiny", "smol", "3b", "7b", "tiny-vlm", "smol-vlm", "3b-vlm", "7b-vlm"] = "tiny"
    """tiny (the miniature world, CPU), smol (SmolLM2-135M in that world, CPU), 3b or 7b
    (Qwen2.5-VL-Instruct, as both papers); with -vlm: SaFeR-VLM instead of SaFeR-ToolKit; --method
    vlm and --method toolkit choose between the two"""
    model: str = ""
    """base model: a folder or hub name; empty: the one that run.sh makes first, of tiny or smol"""
    data: str = ""
    """folder with sft.jsonl, dpo.jsonl, grpo.jsonl, eval.jsonl (-vlm: pool.jsonl, eval.jsonl);
    empty: the toy world's, in the run"""
    out: str = ""
    """folder of the run; empty: out/<recipe>, with the flags that differ from it in its name"""
    seed: int = 0
    """seeds data order, LoRA's A, and every sample of every prompt"""
    max_steps: int = 0
    """optimizer steps (GRPO: rollouts) after which each stage ends early, 0 = none; for trials"""
    stages: Literal["sft,dpo,grpo", "sft,dpo", "sft,grpo", "dpo,grpo", "sft", "dpo", "grpo"] = (
        "sft,dpo,grpo"
    )
    """the curriculum. Paper: SFT, DPO, GRPO; "sft,grpo" is an ablation (CN)"""
    resume: bool = True
    """1: go on from the last checkpoint of an interrupted stage; 0: start an unfinished stage from
    its first step"""
    dry_run: bool = False
    """for run.sh alone: check everything, print stages with estimated memory and time, train
    nothing"""

    # ---- model and memory
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of weights and activations; LoRA, losses and optimizer are always
    float32. Paper: bf16 (TK)"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one; without one, 3b and 7b stop"""
    min_pixels: int = 4704
    """pixels an image is enlarged to at least, everywhere. Paper: 262,144 in training (TK), 338^2
    in evaluation (TK)"""
    max_pixels: int = 4704
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
    sft_epochs: float = 2.0
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
    grpo_schedule: Literal["cosine", "constant"] = "cosine"
    """constant is without a warm-up. Paper: constant (TK)"""
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
    loss_mean: Literal["token", "sequence", "constant"] = "token"
    """what the loss is averaged over. Paper: token (TK)"""
    reward: Literal[
        "checked",
        "paper",
        "structured",
        "answer",
        "answer+format",
        "answer+format+depth",
        "no-depth",
        "no-compliance",
        "no-tool-quality",
    ] = "checked"
    """checked (ours), paper (the released formula), structured (SaFeR-VLM), or an ablation"""
    judge: Literal["toy", "endpoint", "labels"] = "toy"
    """toy (the miniature world's oracle), endpoint (JUDGE_URL, JUDGE_MODEL, JUDGE_KEY) or labels
    (rules on the record's labels, and what form the answer has: by the endpoint if there is one,
    else by phrases)"""
    filtered: Literal["drop", "unsafe"] = "drop"
    """what a response is that the judge's server refuses to read by a content filter: drop (left
    out and counted) or unsafe (the worst grades)"""
    rollout_rows: int = 128
    """samples decoded side by side"""

    # ---- GRPO as SaFeR-VLM does it
    rollout: Literal["plain", "reflect", "discard"] = "plain"
    """plain, reflect (the policy reflects on unsafe samples and corrects them; SaFeR-VLM) or
    discard (they are left out; its ablation)"""
    reflect_rounds: int = 1
    """corrections of a response that stays unsafe. Ours; the paper's number was not found"""
    credit: Literal["prompt", "reflection"] = "prompt"
    """context in which a correction is trained: prompt (as a first answer) or reflection (the chat
    it was sampled in). Ours; not found"""
    unsafe: Literal["keep", "drop"] = "keep"
    """whether an unsafe response that was corrected stays in its group beside the correction;
    dropped, unsafe and then corrected is worth as much as safe at once. Ours; not found"""
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

    # ---- the prompts of GRPO (qibox.py)
    curate: Literal["none", "qibox", "random"] = "none"
    """none: all of them; qibox: SaFeR-VLM's box of quality and instability; random: as many, at
    random (its ablation)"""
    qi_samples: int = 4
    """responses per prompt and model to find its quality and instability. Paper: outputs of 7
    models; how many each was not found"""
    qi_low: float = 0.1
    """lowest quality inside the box, a quantile of the pool. Ours"""
    qi_high: float = 0.9
    """highest quality inside the box, a quantile. Paper: a band of moderate quality"""
    qi_unstable: float = 0.5
    """lowest instability inside the box, a quantile. Paper: high instability"""

    # ---- evaluation
    eval_prompts: str = "generic,planned"
    """prompt modes to evaluate under; the first is the one of the table. Paper: generic (TK)"""
    eval_limit: int = 0
    """records per benchmark, 0 = all"""
    benchmarks: str = ""
    """benchmarks beside eval.jsonl, joined by commas (python -m extras.benchmarks lists them)"""
    bench_data: str = ""
    """folder with one folder per benchmark, holding its original files"""


# A recipe is the flags that it stands for. LoRA at ten times the paper's learning rates: adapters
# commonly want more than full fine-tuning does. Ours, not measured at these sizes.
REAL = """
--dtype bfloat16 --checkpointing 1 --micro_tokens 16_384 --rollout_rows 64 --judge endpoint
--min_pixels 262_144 --max_pixels 1_048_576 --max_prompt 4096 --max_response 2048
--lora_r 64 --lora_alpha 128 --weight_decay 0.01
--sft_lr 1e-4 --sft_epochs 2 --sft_batch 32 --sft_prompts generic,planned
--dpo_lr 5e-6 --dpo_batch 32 --dpo_beta 0.1 --dpo_prompts generic,planned
--grpo_lr 1e-5 --grpo_epochs 2 --grpo_batch 256 --grpo_update_batch 32 --grpo_k 4
--grpo_schedule constant --grpo_prompts toolkit
"""
# SaFeR-VLM trains by GRPO alone; K = 5 is all that is known of its settings (PAPERS 2.3, 2.5), the
# rest is as in SaFeR-ToolKit.
VLM = """
--stages grpo --rollout reflect --reward structured --curate qibox
--grpo_k 5 --grpo_prompts generic
"""
# A real language model of 135 million parameters: few and small steps, since two cores take seconds
# for each. Ours.
SMOL = """
--max_response 200 --rollout_rows 64 --eval_prompts generic --eval_limit 72
--sft_lr 1e-3 --sft_epochs 1 --sft_batch 8 --sft_prompts generic
--dpo_lr 2e-5 --dpo_epochs 0.15 --dpo_batch 8 --dpo_prompts generic
--grpo_lr 1e-4 --grpo_steps 12 --grpo_batch 8 --grpo_update_batch 8 --grpo_k 6
--grpo_prompts generic
"""
RECIPES = {
    "tiny": "",
    "smol": SMOL,
    "3b": f"{REAL} --model Qwen/Qwen2.5-VL-3B-Instruct",
    "7b": f"{REAL} --model Qwen/Qwen2.5-VL-7B-Instruct --rollout_rows 48",
}
RECIPES |= {f"{name}-vlm": flags + VLM for name, flags in RECIPES.items()}
RECIPES["tiny-vlm"] += "--grpo_steps 100 --eval_prompts generic --qi_samples 2"
METHODS = {"toolkit": "", "vlm": "-vlm"}  # --method -> how the recipe's name ends
# The only numbers that may be 0.
MAY_BE_0 = (
    "seed max_steps resume dry_run qi_low qi_high qi_unstable checkpointing"
    " weight_decay warmup grpo_steps dual_clip kl_coef advantage_std weight_reasoning weight_logic"
    " weight_grounding weight_safety penalties safety_gate eval_limit"
).split()
# A run may go on with others of these: they change rounding, or what is evaluated.
FREE = (
    "out resume dry_run device micro_tokens checkpointing rollout_rows benchmarks bench_data"
    " eval_limit eval_prompts"
).split()
BINDING = [field.name for field in fields(Config) if field.name not in FREE]
BINDING += ["JUDGE_MODEL", "JUDGE_PARAMS"]
# Step -> the settings that it depends on. Config has them in the order of the curriculum, so a
# stage's are all above those of the next one. Of QI-Box the model is one of the inputs.
NEEDS = {
    "build": "seed min_pixels max_pixels max_response".split(),
    "qibox": (
        "seed min_pixels max_pixels max_response dtype temperature judge JUDGE_MODEL JUDGE_PARAMS"
        " filtered weight_reasoning weight_logic weight_grounding weight_safety penalties"
        " curate qi_samples qi_low qi_high qi_unstable"
    ).split(),
    "sft": BINDING[: BINDING.index("dpo_lr")],
    "dpo": BINDING[: BINDING.index("grpo_lr")],
    "grpo": BINDING,
    "eval": BINDING,
    None: [],
}


class ConfigError(ValueError):
    """All mistakes in the settings, one line each."""


# ---- flags -------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse with the source of Config as its help, and a ConfigError for a wrong word."""

    def error(self, message):
        raise ConfigError(f"{message}; python config.py --help lists the flags")

    def format_help(self):
        return inspect.getsource(Config)


def zero_or_one(text):
    """A flag that is on or off."""
    if text not in ("0", "1"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected 0 or 1")
    return text == "1"


def parse_config(argv):
    """Flags -> Config. Raises ConfigError with every mistake; leaves the program at --help."""
    parser = Parser(allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--method", choices=METHODS)
    for field in fields(Config):
        flag = f"--{field.name}"
        if field.type is bool:  # --dry_run alone is --dry_run 1
            parser.add_argument(flag, type=zero_or_one, nargs="?", const=True)
        elif get_args(field.type):  # of a Literal
            parser.add_argument(flag, choices=get_args(field.type))
        else:
            parser.add_argument(flag, type=field.type)
    values = vars(parser.parse_args(argv))
    recipe = values.pop("recipe", "tiny")
    method = values.pop("method", None)
    if method:
        recipe = recipe.removesuffix("-vlm") + METHODS[method]
    plain = Config(recipe, **vars(parser.parse_args(RECIPES[recipe].split())))
    config = replace(plain, **values)
    check_config(config)
    return replace(config, out=config.out or run_folder(config, plain))


def check_config(config):
    """Raises ConfigError with everything that is wrong with the values, one line each."""
    rules = {}  # what is said where it does not hold -> whether it holds
    for name, value in vars(config).items():
        flag = f"--{name} {value}"
        if name.endswith("_prompts"):
            modes = set(value.split(",")) <= set(PROMPT_MODES)
            rules[f"{flag}: expected words of {PROMPT_MODES}, joined by commas"] = modes
        elif name in MAY_BE_0:
            rules[f"{flag}: expected a number of 0 or more"] = 0 <= value < math.inf
        elif not isinstance(value, str):
            rules[f"{flag}: expected a number above 0"] = 0 < value < math.inf

    structured = config.reward == "structured"
    rules |= {
        "--min_pixels: is above --max_pixels": config.min_pixels <= config.max_pixels,
        "--dual_clip: must be above 1, or 0 for none": not 0 < config.dual_clip <= 1,
        "--qi_low, --qi_high, --qi_unstable: expected low <= high <= 1 and unstable <= 1": (
            config.qi_low <= config.qi_high <= 1 and config.qi_unstable <= 1
        ),
        "--weight_reasoning: must be 1 at most": config.weight_reasoning <= 1,
        "--reward structured and --curate qibox need a judge that grades; labels cannot": (
            config.judge != "labels" or not (structured or config.curate == "qibox")
        ),
        "--seed: expected less than 2^63": config.seed < 2**63,
        "--warmup, --clip_low: expected 1 at most": max(config.warmup, config.clip_low) <= 1,
        "--rollout reflect and discard need the judge's safety flag: use --reward structured": (
            structured or config.rollout == "plain"
        ),
        "--grpo_k 1: a group of one has no advantage; expected 2 or more": config.grpo_k != 1,
        "--grpo_update_batch must divide --grpo_batch, or prompts would be dropped": (
            config.grpo_batch % (config.grpo_update_batch or 1) == 0
        ),
    }
    wrong = [message for message, holds in rules.items() if not holds]
    if wrong:
        raise ConfigError("\n".join(wrong))


def refuse_dry_run(config):
    """Raises ConfigError: the check before a run is run.sh's."""
    if config.dry_run:
        raise ConfigError(f"--dry_run is for run.sh: bash run.sh {config.recipe} --dry_run")


def run_folder(config, plain):
    """out/<recipe> and the flags that differ from it, so that no two runs share a folder."""
    words = [config.recipe]
    for name, value in vars(config).items():
        if value != getattr(plain, name) and name not in FREE:
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
    is written so that is not appended to. A kill or a power cut leaves the old file or the new one,
    whole.

    Raises OSError, with the old file as it was, when the disk is full or read-only.
    """
    path = Path(path)
    # two may write the same file at once
    part = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        sync(part)
        part.replace(path)
        sync(path.parent)
    except Exception as error:  # safetensors wraps what the system says in a class of its own
        if part.exists():
            part.unlink()
        raise OSError(
            f"{path}: cannot be written ({error}); what was there is unchanged"
        ) from error


def write_text(path, text):
    """write_whole for text."""
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def open_image(path):
    """Image file -> RGB PIL image: the pixels that policy, judge and report see.

    Opened is only a regular file (a pipe could wait for ever), in six formats (for others Pillow
    may start other programs); of an animation, the first frame. It is turned as its EXIF says, as
    the release does for its judge. Of 16-bit grey the high byte is taken, as Pillow does of 16-bit
    colour; 32-bit grey is refused, since nobody says which value is white. What is transparent
    shows white, as in Qwen's own utilities. Raises ValueError, a sentence with the path, whatever a
    decoder raised.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{path!s:.200}: no such file, or no regular one")
    from PIL import Image, ImageOps  # here: the flags are read without any package

    try:
        with Image.open(path, formats=["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]) as file:
            picture = ImageOps.exif_transpose(file)
        if picture.mode in ("I", "F"):
            raise ValueError("32-bit grey: save it with 8 or 16 bits")
        if "I;16" in picture.mode:
            picture = picture.convert("I").point(lambda value: value / 256)
        picture = picture.convert("RGBA")
        ground = Image.new("RGB", picture.size, "white")
        ground.paste(picture, mask=picture)
        return ground
    except Exception as error:
        raise ValueError(f"{path!s:.200}: cannot be read as an image: {error}") from error


# ---- the guard -----------------------------------------------------------------------------------


def fingerprint(value):
    """SHA-256 over a plain value as it prints, 16 hex digits: to notice changes, not attacks."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def guard(folder, config, step, inputs, write=True):
    """Keep a folder from being continued with other settings or inputs than it was begun with.

    Args: step: one of NEEDS; inputs: {name: fingerprint} of what the step starts from, such as its
    records, the base, earlier adapters. The first call writes <folder>/config.json: settings (the
    judge's model and parameters, of the environment, among them), inputs, git commit, versions. A
    later call compares, and adds inputs that are new; with write=False it only compares. Raises
    ConfigError, naming every difference.
    """
    path = Path(folder) / "config.json"
    settings = dict(vars(config))
    for name in ("JUDGE_MODEL", "JUDGE_PARAMS"):
        settings[name] = os.environ.get(name, "") if config.judge != "toy" else ""
    now = {name: settings[name] for name in NEEDS[step]} | inputs
    found = {"settings": settings, "inputs": inputs, **versions()}
    try:
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
        was = found["settings"] | found["inputs"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: damaged, or not written by this program ({error}); "
            f"choose another --out, or delete {folder}"
        ) from error
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
        found["inputs"] |= inputs
        write_text(path, json.dumps(found, indent=1) + "\n")


def versions():
    """The code that runs: git commit (or why there is none), python, packages."""
    here = shlex.quote(str(Path(__file__).parent))
    return {
        "commit": subprocess.getoutput(f"git -C {here} rev-parse HEAD"),
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
    """Print the settings that the flags give; for run.sh, with --get NAME first, one of them."""
    if argv[:1] == ["--get"]:
        settings = vars(parse_config(argv[2:]))
        if not argv[1:] or argv[1] not in settings:
            raise ConfigError(f"--get NAME: one of {', '.join(settings)}")
        return print(settings[argv[1]])
    print(json.dumps(vars(parse_config(argv)), indent=1, ensure_ascii=False))


if __name__ == "__main__":
    run_command(main)

"""Every setting of a run in one dataclass: what it means, its unit, and what the papers say of it.

    python config.py --recipe 3b --grpo_lr 2e-5     prints the resolved settings, or every mistake at once

A text under a field is its help. Sources: TK is the released code of SaFeR-ToolKit, CN a reading note of the paper; "ours" is
our own choice where the papers say nothing that could be found. A recipe is a set of other defaults; a flag overrides both.
"""

import ast
import dataclasses
import difflib
import inspect
import itertools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

STAGES = ("sft", "dpo", "grpo")  # in the order of the curriculum
PROMPT_WORDS = ("planned", "toolkit", "generic")
PACKAGES = ("torch", "transformers", "safetensors", "pillow", "numpy", "tqdm")


@dataclass(frozen=True)
class Config:
    # ---- the run
    recipe: str = "tiny"
    """tiny (the miniature world, CPU), 3b or 7b (Qwen2.5-VL-Instruct, as both papers); with -vlm: SaFeR-VLM instead of SaFeR-ToolKit"""
    model: str = ""
    """base model: a folder or hub name; empty: the folder that toy_base.py wrote"""
    data: str = ""
    """folder with sft.jsonl, dpo.jsonl, grpo.jsonl, eval.jsonl; empty: the one that build.py wrote into the run's folder"""
    out: str = ""
    """folder of the run; empty: out/<recipe>, with the flags that differ from the recipe in its name"""
    seed: int = 0
    """seeds data order, LoRA's A, and every sample of every prompt"""
    max_steps: int = 0
    """optimiser steps (GRPO: rollouts) after which each stage ends early, 0 = none; for trying things out"""
    stages: str = "sft,dpo,grpo"
    """the curriculum, in this order; each stage builds on those before it. Paper: SFT, DPO, GRPO; "sft,grpo" is an ablation (CN)"""
    resume: bool = True
    """1: go on from the last checkpoint of an interrupted stage; 0: start the stage again"""
    dry_run: bool = False
    """1: check everything, print stages with estimated memory and time, and stop before anything is trained"""

    # ---- data (build.py, qibox.py)
    curate: str = "none"
    """GRPO's prompts: none (all), qibox (SaFeR-VLM's box of quality and instability), random (as many, at random; its ablation)"""
    qi_samples: int = 4
    """responses per prompt and model to find its quality and instability. Paper: outputs of 7 models; how many each was not found"""
    qi_by: str = "quantile"
    """quantile or value: how the three bounds of the box are meant. Ours; the paper's thresholds were not found"""
    qi_low: float = 0.1
    """lowest quality inside the box, of 0..1. Ours"""
    qi_high: float = 0.9
    """highest quality inside the box, of 0..1. Paper: a band of moderate quality"""
    qi_unstable: float = 0.5
    """lowest instability inside the box, of 0..1; as a value at most 0.5 can be reached. Paper: high instability"""

    # ---- model and memory
    dtype: str = "float32"
    """float32 or bfloat16, of weights and activations; LoRA, losses and optimiser are always float32. Paper: bf16 (TK)"""
    device: str = "auto"
    """auto (CUDA where there is one), cpu or cuda"""
    min_pixels: int = 3136
    """pixels an image is enlarged to at least, in all stages and evaluation. Paper: 262,144 in training (TK), 338^2 in evaluation (TK)"""
    max_pixels: int = 3136
    """pixels an image is shrunk to at most. Paper: 4,194,304 in training, 512^2 = 262,144 in evaluation (TK)"""
    max_prompt: int = 640
    """tokens; a longer prompt is an error before training, never cut. Paper: 4,096 (TK)"""
    max_response: int = 160
    """tokens sampled, or trained on, per response. Paper: 2,048 (TK)"""
    lora_r: int = 16
    """rank of the adapters. Ours: whether the paper trained adapters or all weights was not found"""
    lora_alpha: float = 32.0
    """adapters are scaled by alpha / r. Ours"""
    micro_tokens: int = 4096
    """packed tokens per forward and backward pass, 0 = from the free memory on CUDA; changes memory and speed, never a gradient"""
    logprob_chunk: int = 1024
    """response tokens whose logits exist at one time"""
    checkpointing: bool = False
    """1: recompute each layer in the backward pass (memory for time)"""
    shared_prefix: bool = True
    """1: the responses to one prompt share its forward and backward pass (exact); 0: one pass each"""

    # ---- optimiser, all stages
    weight_decay: float = 0.0
    """AdamW. Paper: 0.01 in GRPO (TK); it acts on A and B here"""
    beta1: float = 0.9
    """AdamW. Paper: 0.9 (TK)"""
    beta2: float = 0.999
    """AdamW. Paper: 0.999 (TK)"""
    max_grad_norm: float = 1.0
    """gradient norm above which it is scaled down. Paper: 1.0 (TK)"""

    # ---- SFT
    sft_lr: float = 6e-3
    """Paper: 1e-5 (CN)"""
    sft_epochs: float = 5.0
    """passes over the data. Ours"""
    sft_steps: int = 0
    """optimiser steps, 0 = from sft_epochs"""
    sft_batch: int = 16
    """records per optimiser step, over all ranks. Ours"""
    sft_schedule: str = "cosine"
    """cosine or constant. Ours"""
    sft_warmup: float = 0.1
    """share of the steps over which the learning rate rises from 0. Ours"""
    sft_prompts: str = "generic,generic,planned"
    """prompt modes a record takes turns in: planned, toolkit, generic. Ours: evaluation names no tool, so tool use must be internalised"""

    # ---- DPO
    dpo_lr: float = 2e-4
    """Paper: 5e-7 (CN)"""
    dpo_epochs: float = 1.0
    """passes over the pairs. Ours"""
    dpo_steps: int = 0
    """optimiser steps, 0 = from dpo_epochs"""
    dpo_batch: int = 16
    """pairs per optimiser step, over all ranks. Ours"""
    dpo_schedule: str = "cosine"
    """cosine or constant. Ours"""
    dpo_warmup: float = 0.1
    """share of the steps with a rising learning rate. Ours"""
    dpo_prompts: str = "generic,generic,planned"
    """prompt modes, see sft_prompts"""
    dpo_beta: float = 0.3
    """strength of the pull to the reference. Ours; the paper's was not found"""
    dpo_label_smoothing: float = 0.0
    """assumed share of pairs labelled the wrong way round. Ours"""
    dpo_sft_coef: float = 0.0
    """weight of an added cross-entropy on the chosen response, per token. Ours: off, as in DPO's paper"""

    # ---- GRPO
    grpo_lr: float = 7e-4
    """Paper: 1e-6 (TK)"""
    grpo_epochs: float = 1.0
    """passes over the prompts. Paper: 2 (TK)"""
    grpo_steps: int = 0
    """rollout steps, 0 = from grpo_epochs"""
    grpo_schedule: str = "cosine"
    """cosine or constant. Paper: constant (TK)"""
    grpo_warmup: float = 0.05
    """share of the steps with a rising learning rate. Paper: none (TK)"""
    grpo_prompts: str = "generic,generic,planned"
    """prompt modes, see sft_prompts. Paper: its own template, which is our toolkit mode (TK)"""
    grpo_batch: int = 16
    """prompts per rollout, over all ranks. Paper: 256 (TK)"""
    grpo_update_batch: int = 16
    """prompts per optimiser step; the rollout is split into this many at a time. Paper: 32 (TK)"""
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
    """weight of the k3 KL term to the model before GRPO, in the loss; 0 skips the reference pass. Paper: 0.01 (TK)"""
    advantage_std: bool = True
    """1: advantages are divided by the group's standard deviation. Paper: yes (TK)"""
    loss_mean: str = "token"
    """token, sequence or constant: what the loss is averaged over. Paper: token (TK)"""
    reward: str = "checked"
    """checked (ours), paper (the released formula), structured (SaFeR-VLM), or an ablation: answer, answer+format, answer+format+depth,
    no-depth, no-compliance, no-tool-quality"""
    judge: str = "toy"
    """toy (the miniature world's oracle), endpoint (JUDGE_URL, JUDGE_MODEL, JUDGE_KEY) or labels (rules on the record's labels)"""
    rollout_rows: int = 128
    """samples decoded side by side"""

    # ---- GRPO as SaFeR-VLM does it
    rollout: str = "plain"
    """plain, reflect (the policy reflects on unsafe samples and corrects them; SaFeR-VLM) or discard (they are left out; its ablation)"""
    reflect_rounds: int = 1
    """corrections of a response that stays unsafe. Ours; the paper's number was not found"""
    credit: str = "prompt"
    """context in which a correction is trained: prompt (as a first answer) or reflection (the chat it was sampled in). Ours; not found"""
    unsafe: str = "keep"
    """keep or drop: whether an unsafe response that was corrected stays in its group beside the correction. Ours; not found"""
    weight_reasoning: float = 0.5
    """structured reward: share of the reasoning block, the answer block has the rest. Ours; not found"""
    weight_logic: float = 0.25
    """structured reward: weight of logical coherence within a block; the three weights are scaled to sum to 1. Ours; not found"""
    weight_grounding: float = 0.25
    """structured reward: weight of image grounding. Ours; not found"""
    weight_safety: float = 0.5
    """structured reward: weight of safety awareness. Ours; not found"""
    penalties: bool = True
    """1: hallucination, contradiction and missing grounding cost (SaFeR-VLM); 0: the ablation without them"""

    # ---- evaluation
    eval_prompts: str = "generic,planned"
    """prompt modes to evaluate under; the first is the one of the table. Paper: generic (TK)"""
    eval_limit: int = 0
    """records per benchmark, 0 = all"""
    eval_bootstrap: int = 1000
    """resamples behind each 95% interval"""
    benchmarks: str = ""
    """benchmarks beside eval.jsonl, joined by commas (python -m extras.benchmarks lists them); their original files lie in <bench_data>/<name>"""
    bench_data: str = ""
    """folder with one folder per benchmark"""


# LoRA at ten times the paper's learning rates: adapters commonly want more than full fine-tuning does. Ours, not measured at these sizes.
REAL = dict(
    dtype="bfloat16", checkpointing=True, min_pixels=262_144, max_pixels=1_048_576, max_prompt=4096, max_response=2048,
    lora_r=64, lora_alpha=128.0, micro_tokens=0, logprob_chunk=256, weight_decay=0.01,
    sft_lr=1e-4, sft_epochs=2.0, sft_batch=32, sft_prompts="generic,planned",
    dpo_lr=5e-6, dpo_batch=32, dpo_beta=0.1, dpo_prompts="generic,planned",
    grpo_lr=1e-5, grpo_epochs=2.0, grpo_schedule="constant", grpo_warmup=0.0, grpo_batch=256, grpo_update_batch=32, grpo_k=4,
    grpo_prompts="toolkit",
    judge="endpoint", rollout_rows=64,
)
# SaFeR-VLM trains by GRPO alone; K = 5 is all that is known of its settings (PAPERS 2.3, 2.5), the rest is as in SaFeR-ToolKit.
VLM = dict(stages="grpo", rollout="reflect", reward="structured", curate="qibox", grpo_k=5, grpo_prompts="generic")
RECIPES = {
    "tiny": {},
    "3b": dict(REAL, model="Qwen/Qwen2.5-VL-3B-Instruct"),
    "7b": dict(REAL, model="Qwen/Qwen2.5-VL-7B-Instruct", rollout_rows=48),
}
RECIPES |= {f"{name}-vlm": dict(recipe, **VLM) for name, recipe in RECIPES.items()}
RECIPES["tiny-vlm"] |= dict(grpo_steps=100, eval_prompts="generic", qi_samples=8)
CHOICES = {
    "recipe": tuple(RECIPES), "dtype": ("float32", "bfloat16"), "device": ("auto", "cpu", "cuda"), "judge": ("toy", "endpoint", "labels"),
    "loss_mean": ("token", "sequence", "constant"), "rollout": ("plain", "reflect", "discard"), "credit": ("prompt", "reflection"),
    "unsafe": ("keep", "drop"), "curate": ("none", "qibox", "random"), "qi_by": ("quantile", "value"),
    "reward": ("checked", "paper", "structured", "answer", "answer+format", "answer+format+depth", "no-depth", "no-compliance",
               "no-tool-quality"),
    **{f"{stage}_schedule": ("cosine", "constant") for stage in STAGES},
}
ORDERS = {",".join(stage for stage, bit in zip(STAGES, bits) if bit) for bits in itertools.product((0, 1), repeat=3) if any(bits)}
AT_LEAST_0 = {"seed", "micro_tokens", "max_steps", "weight_decay", "beta1", "beta2", "dual_clip", "kl_coef", "eval_limit", "resume",
              "dpo_label_smoothing", "dpo_sft_coef", "checkpointing", "shared_prefix", "advantage_std", "dry_run", "penalties",
              "weight_reasoning", "weight_logic", "weight_grounding", "weight_safety", "qi_low", "qi_high", "qi_unstable",
              *(f"{stage}_{word}" for stage in STAGES for word in ("warmup", "steps"))}
BELOW_1 = {"beta1", "beta2", "clip_low", "sft_warmup", "dpo_warmup", "grpo_warmup"}
ROLLOUT = ("temperature", "clip_low", "clip_high", "dual_clip", "kl_coef", "advantage_std", "loss_mean", "reward", "judge", "rollout",
           "reflect_rounds", "credit", "unsafe", "weight_reasoning", "weight_logic", "weight_grounding", "weight_safety",
           "penalties")  # GRPO's alone
# a run may go on with others of these: they change rounding, or what is evaluated
FREE = ("benchmarks", "bench_data", "eval_limit", "eval_prompts", "eval_bootstrap", "dry_run", "out", "resume", "device", "micro_tokens",
        "rollout_rows", "logprob_chunk", "checkpointing")


class ConfigError(ValueError):
    """All mistakes in the settings, one line each."""


def field_help():
    """Field name -> the text under it, read from this file's own source."""
    body = ast.parse(inspect.getsource(Config)).body[0].body
    return {field.target.id: text.value.value for field, text in zip(body, body[1:])
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)}


def parse_config(argv):
    """Flags -> Config. `--name value` or `--name=value`. Raises ConfigError with every mistake at once."""
    flags, problems = _flags(argv)
    recipe, method = flags.get("recipe", "tiny"), flags.pop("method", "toolkit")
    if method not in ("toolkit", "vlm"):
        raise ConfigError(f"--method {method}: expected toolkit or vlm")
    if method == "vlm":  # --recipe tiny --method vlm is --recipe tiny-vlm
        recipe = flags["recipe"] = recipe.removesuffix("-vlm") + "-vlm"
    if recipe not in RECIPES:
        raise ConfigError(f"--recipe {recipe}: expected one of {', '.join(RECIPES)}")
    values, types = dict(RECIPES[recipe], recipe=recipe), {f.name: f.type for f in dataclasses.fields(Config)}
    for name, text in flags.items():
        if name not in types:
            near = difflib.get_close_matches(name, types, n=1)
            problems.append(f"--{name}: unknown flag; " + (f"did you mean --{near[0]}?" if near else "python config.py --help lists them"))
            continue
        try:
            values[name] = _value(text, types[name])
        except ValueError:
            problems.append(f"--{name} {text}: expected {'0 or 1' if types[name] is bool else types[name].__name__}")
    config = Config(**values)
    problems += check_config(config)
    if problems:
        raise ConfigError("\n".join(problems))
    return config if config.out else dataclasses.replace(config, out=run_folder(config))


def _flags(argv):
    """argv -> {name: text} and what is no flag, has no value, or stands there twice."""
    flags, problems, words = {}, [], list(argv)
    while words:
        word = words.pop(0)
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if not word.startswith("--"):
            problems.append(f"{word}: expected a flag, like --seed 3")
        elif not equals and (not words or words[0].startswith("--")):
            problems.append(f"--{name}: needs a value")
        else:
            value = value if equals else words.pop(0)
            if name in flags:
                problems.append(f"--{name}: given twice, as {flags[name]} and as {value}")
            flags[name] = value
    return flags, problems


def _value(text, kind):
    """Text -> int, float, bool or str. Raises ValueError."""
    if kind is bool:
        if text.lower() not in ("0", "1", "false", "true"):
            raise ValueError(text)
        return text.lower() in ("1", "true")
    return kind(text)


def check_config(config):
    """Everything wrong with the values, one line each."""
    problems = []
    for name, value in dataclasses.asdict(config).items():
        if name in CHOICES and value not in CHOICES[name]:
            problems.append(f"--{name} {value}: expected one of {', '.join(CHOICES[name])}")
        elif name == "stages" and value not in ORDERS:
            problems.append(f"--stages {value}: expected stages of {','.join(STAGES)} in this order, joined by commas")
        elif name.endswith("_prompts") and (not value or any(word not in PROMPT_WORDS for word in value.split(","))):
            problems.append(f"--{name} {value}: expected words of {', '.join(PROMPT_WORDS)} joined by commas")
        elif isinstance(value, (int, float)) and not 0 <= value < float("inf"):  # also what is not a number
            problems.append(f"--{name} {value}: expected a number of 0 or more")
        elif isinstance(value, (int, float)) and value == 0 and name not in AT_LEAST_0:
            problems.append(f"--{name} {value}: must be above 0")
        elif name in BELOW_1 and value >= 1:
            problems.append(f"--{name} {value}: must be below 1")
    if 0 < config.dual_clip <= 1:
        problems.append(f"--dual_clip {config.dual_clip}: must be above 1, or 0 for none")
    if config.seed >= 2**63:
        problems.append(f"--seed {config.seed}: must be below 2^63")
    if not config.qi_low <= config.qi_high <= 1 or config.qi_unstable > 1:
        problems.append(f"--qi_low {config.qi_low}, --qi_high {config.qi_high}, --qi_unstable {config.qi_unstable}: "
                        "expected 0 <= low <= high <= 1 and unstable <= 1")
    if config.weight_reasoning > 1 or config.weight_logic + config.weight_grounding + config.weight_safety <= 0:
        problems.append("--weight_reasoning must be from 0 to 1, and one of --weight_logic, --weight_grounding, --weight_safety above 0")
    if config.reward == "structured" and config.judge == "labels":
        problems.append("--reward structured needs a judge that grades; labels cannot: use --judge endpoint")
    if config.rollout != "plain" and config.reward != "structured":
        problems.append(f"--rollout {config.rollout} needs the judge's safety flag: use --reward structured")
    if config.min_pixels > config.max_pixels:
        problems.append(f"--min_pixels {config.min_pixels}: is above --max_pixels {config.max_pixels}")
    if config.grpo_k == 1:
        problems.append("--grpo_k 1: a group of one has no advantage; expected 2 or more")
    if config.grpo_update_batch and config.grpo_batch % config.grpo_update_batch:
        problems.append(f"--grpo_update_batch {config.grpo_update_batch}: must divide --grpo_batch {config.grpo_batch}, "
                        "or prompts would be dropped")
    if config.dpo_label_smoothing >= 0.5:
        problems.append(f"--dpo_label_smoothing {config.dpo_label_smoothing}: must be below 0.5")
    return problems


def run_folder(config):
    """out/<recipe>, and the flags that differ from the recipe, so that two runs never share a folder by accident."""
    plain = dataclasses.asdict(Config(**RECIPES[config.recipe], recipe=config.recipe))
    differs = [f"{name}{value}" for name, value in dataclasses.asdict(config).items() if value != plain[name] and name not in FREE]
    return "out/" + "-".join([config.recipe] + [word.replace("/", "_").replace(",", "+") for word in differs])


def run_settings(config):
    """All settings as a dict, and the judge model that the environment names, since it is one of them in all but form."""
    judge = {"JUDGE_MODEL": os.environ.get("JUDGE_MODEL", "")} if config.judge == "endpoint" else {}
    return dataclasses.asdict(config) | judge


def check_settings(config, folder, stage):
    """On a second start: raises ConfigError when a setting that the stage depends on is not what <folder>/config.json holds."""
    path, order = Path(folder) / "config.json", (*STAGES, "eval")
    if not path.exists():
        return
    # a stage depends on the settings of those before it, not on those after
    later = tuple(f"{word}_" for word in order[order.index(stage) + 1 :])
    free = FREE + (ROLLOUT if stage in ("sft", "dpo") else ())
    try:
        before = dict(json.loads(path.read_text(encoding="utf-8"))["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: damaged, or not written by this program ({error}); choose another --out, or delete {folder}") from error
    changed = [f"{name} was {before.get(name)!r}, is {value!r}" for name, value in run_settings(config).items()
               if before.get(name) != value and name not in free and not name.startswith(later)]
    if changed:
        raise ConfigError(f"{folder} holds a {stage} run with other settings ({'; '.join(changed)}); "
                          "choose another --out, or delete that folder")


def save_config(config, folder, stage):
    """Write <folder>/config.json: the settings, the git commit, the package versions. Raises as check_settings when it is there already."""
    check_settings(config, folder, stage)
    path = Path(folder) / "config.json"
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    git = subprocess.run(["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    about = {"settings": run_settings(config), "commit": git.stdout.strip() or "not a git checkout", "python": sys.version.split()[0],
             "versions": {name: version(name) for name in PACKAGES}}
    part = path.with_name("config.json.part")
    part.write_text(json.dumps(about, indent=1) + "\n")
    part.replace(path)


def show_help():
    """All fields with default and help, grouped as above."""
    texts = field_help()
    for f in dataclasses.fields(Config):
        print(f"--{f.name} ({f.default!r})\n      {texts[f.name]}")


if __name__ == "__main__":
    if "--help" in sys.argv:
        show_help()
    else:
        try:
            print(json.dumps(dataclasses.asdict(parse_config(sys.argv[1:])), indent=1, ensure_ascii=False))
        except ConfigError as problem:
            sys.exit(str(problem))

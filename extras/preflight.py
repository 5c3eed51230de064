"""Before a run spends hours: GPUs, model, data and judge are checked, every problem is reported at
once, and the stages are listed with estimated memory and time.

    python -m extras.preflight --recipe 3b --data my/data     exit status 0: all is there; 2: not

The estimates follow from the model's shapes and the lengths of the recipe, by the formulas of
`memory` and `hours`; ASSUMED is printed above them. On CUDA neither was measured. Where no GPU is
seen, they are for the box of 8 that the recipes are written for. Ours throughout.
"""

import os
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

import data
from config import STAGES, ConfigError, parse_config, run_command
from eval import read_sets
from extras import toy_base
from judge import JudgeError, judge_from_env
from trainer import base_folder, pick_device, stage_steps

# Assumed: an H100 reaches a third of its data sheet, in dense bfloat16 operations and in bytes of
# memory read, a second; a judge's server answers so many requests a second.
OPERATIONS, BYTES, REQUESTS = 989e12 / 3, 3.35e12 / 3, 10
ASSUMED = """Estimates from the shapes, none measured, for {gpus} H100 at a third of its data sheet.
Assumed: prompts half as long as they may be, responses a quarter, the longest of a rollout as long
as they may be; a picture a prompt, of half the pixels; ten judge requests a second. Not counted:
reading pictures, loading weights, QI-Box. What is judged beside the sampling costs less."""


# ---- estimates -------------------------------------------------------------------------------


def count_parameters(shapes):
    """Weights of the whole model, from its Qwen2_5_VLConfig alone."""
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(shapes)
    return sum(parameter.numel() for parameter in model.parameters())


def responses_of(config, stage):
    """Responses per prompt of a training stage."""
    return {"sft": 1, "dpo": 2, "grpo": config.grpo_k}[stage]


def memory(shapes, config, stage):
    """Bytes of one process of a stage: (training, sampling, peak), each 0 where there is none.

        training   per token of the longest group: each layer's input, and twice what one layer
                   computes (checkpointing; without it what every layer computes); four float32
                   copies of a chunk of logits
        sampling   keys and values of every row, for prompt and response; 20 bytes per row and word
        peak       the larger of the two; the model's weights; for every weight of the adapters 4 x
                   4 bytes: itself, its gradient, AdamW's two moments

    Not counted: the vision tower at work, image features, CUDA's own memory, fragmentation.
    """
    text = shapes.text_config
    size = getattr(torch, config.dtype).itemsize
    hidden, inner, layers = text.hidden_size, text.intermediate_size, text.num_hidden_layers
    kv = hidden // text.num_attention_heads * text.num_key_value_heads
    training = sampling = adapters = 0
    if stage in STAGES:
        responses = responses_of(config, stage)
        group = config.max_prompt + responses * config.max_response
        work = 12 * hidden + 5 * inner  # numbers that one layer computes for one token
        kept = layers * (hidden if config.checkpointing else work)
        logits = 16 * min(1024, responses * config.max_response) * text.vocab_size
        # q and o, k and v, gate and up and down: in + out of each
        sides = 2 * (hidden + hidden) + 2 * (hidden + kv) + 3 * (hidden + inner)
        training = max(group, config.micro_tokens) * size * (kept + 2 * work) + logits
        adapters = 16 * config.lora_r * layers * sides
    if stage not in ("sft", "dpo"):
        cache = layers * 2 * kv * size * (config.max_prompt + config.max_response)
        sampling = config.rollout_rows * (cache + 20 * text.vocab_size)
    weights = size * count_parameters(shapes)
    return training, sampling, weights + adapters + max(training, sampling)


def hours(shapes, config, stage, records, gpus):
    """Estimated hours of a stage on H100s, without the judge: counted work by assumed rates.

    training   2 operations per weight and token in each pass: forward, backward through frozen
               weights, forward again with checkpointing, forward of the reference
    sampling   a step reads all weights and draws a token for each row; when no sample waits,
               the steps go on to the end of the longest response
    pictures   2 operations per weight of the tower and patch
    """
    weights = count_parameters(shapes)
    if stage == "eval":
        models = 1 + len(config.stages.split(","))
        rollouts = models * len(config.eval_prompts.split(","))
        prompts = records * rollouts
        pictures = records  # their features are kept
        k = 1
        passes = 0
    else:
        rollouts = stage_steps(config, stage, records)
        prompts = pictures = rollouts * getattr(config, f"{stage}_batch")
        k = responses_of(config, stage)
        passes = (2 if stage == "sft" else 3) + config.checkpointing
    samples = stage in ("grpo", "eval")
    prompt = config.max_prompt / 2  # tokens
    drawn = config.max_response / 4
    tokens = passes * (prompt + k * drawn) + samples * prompt
    vision = shapes.vision_config
    block = 4 * vision.hidden_size + 3 * vision.intermediate_size
    patches = config.max_pixels / 2 / vision.patch_size**2
    looking = vision.depth * block * vision.hidden_size * patches
    seconds = 2 * (prompts * weights * tokens + pictures * looking) / OPERATIONS / gpus
    if samples:
        steps = prompts * k * drawn / config.rollout_rows / gpus
        steps += rollouts * (config.max_response - drawn)
        seconds += steps * getattr(torch, config.dtype).itemsize * weights / BYTES
    return seconds / 3600


def judge_requests(config, stage, records):
    """Requests to the judge's server at most: every correction, no reply from the cache, none asked
    again. Evaluation: verdicts; a benchmark's own question is one more a case."""
    if stage == "eval":
        return records * (1 + len(config.stages.split(","))) * len(config.eval_prompts.split(","))
    if stage != "grpo":
        return 0
    rounds = config.reflect_rounds if config.rollout == "reflect" else 0
    scored = records * config.qi_samples if config.curate != "none" else 0
    prompts = stage_steps(config, stage, records) * config.grpo_batch
    return scored + prompts * config.grpo_k * (1 + rounds)


def stage_table(shapes, config, counts, gpus):
    """Markdown: records, memory, time and judge of every stage that trains or samples."""
    rows = []
    for stage in [*config.stages.split(","), "eval"]:
        records = counts.get(stage)
        time = requests = waiting = "-"
        if records:
            time = f"{hours(shapes, config, stage, records, gpus):.2g}"
        if records and config.judge == "endpoint":
            requests = judge_requests(config, stage, records)
            waiting = f"{requests / REQUESTS / 3600:.2g}"
        steps = stage_steps(config, stage, records) if records and stage in STAGES else "-"
        gigabytes = [f"{part / 1e9:.3g}" for part in memory(shapes, config, stage)]
        rows.append([stage, records or "?", steps, *gigabytes, time, requests, waiting])
    head = ["stage", "records", "steps", "training, GB", "sampling, GB", "peak, GB", "hours"]
    return data.markdown_table([*head, "judge requests, at most", "their hours"], rows)


# ---- what is there, and what is missing --------------------------------------------------------
# Each check returns what it found and [problems]; two also what the estimates need from it.


def check_gpus(config):
    """A real recipe needs CUDA, unless it is told to do without."""
    try:
        device = pick_device(config)
    except ConfigError as error:
        return "none", [str(error)]
    if device.type == "cpu":
        return "none: CPU", []
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}", []


def check_model(config):
    """Also its Qwen2_5_VLConfig, of a 3b or 7b that is not there the public shapes; and its
    data.Processor or None."""
    name = base_folder(config)
    shapes = toy_base.qwen_config(config.recipe.removesuffix("-vlm"))
    if not config.model:
        return f"{name}: run.sh makes it", [], shapes, None
    try:
        found = AutoConfig.from_pretrained(name)
        if found.model_type != "qwen2_5_vl":
            raise ValueError(f"holds a {found.model_type} model, not qwen2_5_vl")
        shapes = found
        processor = data.load_processor(name, config.min_pixels, config.max_pixels)
        if os.path.isdir(name) and not list(Path(name).glob("*.safetensors")):
            raise ValueError("has a config.json but no *.safetensors")
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0]
        problem = f"{name}: {why}; fetch it where there is network, then MODEL=folder"
        return name, [problem], shapes, None
    return f"{name}, {count_parameters(shapes) / 1e9:.3g} billion parameters", [], shapes, processor


def check_data(config, processor):
    """Also {stage: records}. Every data set that the run reads is validated whole, with a processor
    also its lengths; of the miniature world, which is written later, only the benchmarks."""
    folder = Path(config.data or Path(config.out) / "data")
    toy = not config.data and not config.model
    if not config.data and config.model:
        return "none", ["no data: DATA=folder (or --data); docs/training.md lists its sets"], {}
    counts = {}
    problems = []
    stages = [] if toy else config.stages.split(",")
    for stage in [*stages, "eval"] if config.benchmarks or not toy else []:
        try:
            if stage == "eval":
                records = sum(read_sets(config).values(), [])
            else:
                name = "pool" if stage == "grpo" and config.curate != "none" else stage
                records = data.read_records(data.set_path(folder, name), stage)
            counts[stage] = len(records)
            if processor:
                modes = getattr(config, f"{stage}_prompts").split(",")
                data.check_lengths(
                    records, modes, processor, config.max_prompt, config.max_response
                )
        except (data.DataError, ConfigError) as error:
            problems.append(str(error))
    return f"{folder}: {counts or 'nothing yet'}", problems, counts


def check_judge(config):
    """An endpoint must grade a text and see an image."""
    if config.judge != "endpoint":
        return config.judge, []
    try:
        judge = judge_from_env(None)
        judge.preflight()
    except JudgeError as error:
        return "no answer", [f"{error}; docs/training.md says how to start one"]
    return f"{judge.name} grades and sees", []


def main(argv):
    """Print what is there, what the run would do, and all that is missing; returns the status."""
    config = parse_config(argv)
    print(f"recipe {config.recipe}, run folder {config.out}")
    gpus, problems = check_gpus(config)
    model, model_problems, shapes, processor = check_model(config)
    records, data_problems, counts = check_data(config, processor)
    judge, judge_problems = check_judge(config)
    problems += model_problems + data_problems + judge_problems
    print(f"GPUs   {gpus}\nmodel  {model}\ndata   {records}\njudge  {judge}")
    gpus = torch.cuda.device_count() or 8
    print(f"\n{ASSUMED.format(gpus=gpus)}\n")
    print(stage_table(shapes, config, counts, gpus), flush=True)
    for number, problem in enumerate(problems, 1):
        print(f"{number}. {problem}", file=sys.stderr)
    if problems:
        print(f"preflight: {len(problems)} thing(s) missing, see above", file=sys.stderr)
        return 2
    print("preflight: all is there")


if __name__ == "__main__":
    run_command(main)

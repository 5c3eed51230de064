"""Before a run spends hours: GPUs, model, data and judge are checked, every problem is reported at
once, and the stages are listed with estimated memory and time.

    python -m extras.preflight --recipe 3b --data my/data     exit status 0: all is there; 2: not

The estimates follow from the model's shapes and the lengths of the recipe, by the formulas of
`memory` and `hours`; ASSUMED is printed above them. On CUDA neither was measured. Ours throughout.
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

ASSUMED = """Estimates from the shapes, none measured. Hours are of one H100 at a third of
its data sheet, to be divided by the GPUs. Assumed: prompts half, responses a quarter as long as
they may be. Not counted: pictures (reading, encoding), the longest responses of a rollout, for
which all wait, the judge, evaluation, QI-Box. So a run takes longer."""

# An H100's data sheet: dense bfloat16 operations, and bytes of memory read, a second. A third of
# both is reached: assumed, not measured.
OPERATIONS, BYTES = 989e12 / 3, 3.35e12 / 3


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


def hours(shapes, config, stage, records):
    """Estimated hours of a training stage on one H100, without the judge.

    Prompts are taken at half, responses at a quarter of their limits: an assumption. Per weight and
    token a forward pass costs 2 operations, and so does a backward pass through frozen weights.
    Sampling reads all weights for every token of its rows.
    """
    parameters = count_parameters(shapes)
    prompts = stage_steps(config, stage, records) * getattr(config, f"{stage}_batch")
    drawn = responses_of(config, stage) * config.max_response / 4  # tokens
    passes = (2 if stage == "sft" else 3) + config.checkpointing
    seconds = prompts * passes * 2 * parameters * (config.max_prompt / 2 + drawn) / OPERATIONS
    if stage == "grpo":
        steps = prompts * drawn / config.rollout_rows
        seconds += steps * getattr(torch, config.dtype).itemsize * parameters / BYTES
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


def stage_table(shapes, config, counts):
    """Markdown: records, memory, time and judge of every stage that trains or samples."""
    rows = []
    for stage in [*config.stages.split(","), "eval"]:
        records = counts.get(stage)
        steps = time = requests = "-"
        if records and config.judge == "endpoint":
            requests = judge_requests(config, stage, records)
        if records and stage in STAGES:
            steps = stage_steps(config, stage, records)
            time = f"{hours(shapes, config, stage, records):.2g}"
        gigabytes = [f"{part / 1e9:.3g}" for part in memory(shapes, config, stage)]
        rows.append([stage, records or "?", steps, *gigabytes, time, requests])
    head = ["stage", "records", "steps", "training, GB", "sampling, GB", "peak, GB", "H100 hours"]
    return data.markdown_table([*head, "judge requests, at most"], rows)


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
    print(f"\n{ASSUMED}\n")
    print(stage_table(shapes, config, counts), flush=True)
    for number, problem in enumerate(problems, 1):
        print(f"{number}. {problem}", file=sys.stderr)
    if problems:
        print(f"preflight: {len(problems)} thing(s) missing, see above", file=sys.stderr)
        return 2
    print("preflight: all is there")


if __name__ == "__main__":
    run_command(main)

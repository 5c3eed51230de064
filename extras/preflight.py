"""Before a run spends hours: GPUs, model, data and judge are checked, every problem is reported at
once, and the stages are listed with estimated memory and time.

    python -m extras.preflight --recipe 3b --data my/data     exit status 0: all is there; 2: not

The estimates follow from the model's shapes and the lengths of the recipe, by the formulas of
`memory` and `hours`. On CUDA neither was measured. Ours throughout.
"""

import os
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import data
from config import STAGES, parse_config, run_command
from extras import toy_base
from extras.benchmarks import BENCHMARKS
from judge import JudgeError, judge_from_env
from trainer import base_folder, stage_steps

# layers, hidden, heads, key/value heads, MLP, vocabulary, tied head; vision: layers, hidden, heads,
# MLP. 3b and 7b are Qwen2.5-VL's public shapes; the others are ours, for bench.py.
SHAPES = {
    "tiny": (4, 128, 4, 2, 384, 2048, False, (2, 64, 2, 128)),
    "small": (8, 512, 8, 8, 1408, 8192, False, (4, 160, 4, 320)),
    "3b": (36, 2048, 16, 2, 11008, 151936, True, (32, 1280, 16, 3420)),
    "7b": (28, 3584, 28, 4, 18944, 152064, False, (32, 1280, 16, 3420)),
}
# Data sheets: dense bfloat16 TFLOP/s, TB/s of memory.
SHEETS = {"H200": (989, 4.8), "H100": (989, 3.35), "A100": (312, 2.0)}
SHARE = 0.3  # of both that is reached. Assumed, not measured
RESPONSES = {  # per prompt
    "sft": lambda config: 1,
    "dpo": lambda config: 2,
    "grpo": lambda config: config.grpo_k,
}
JUDGE = "Qwen/Qwen3-VL-32B-Instruct"  # the released code's judge, on two GPUs (PAPERS 1.5, 1.6)


# ---- estimates -------------------------------------------------------------------------------


def shape_config(name, vision_tokens=None):
    """Qwen2_5_VLConfig of a row of SHAPES.

    Args: vision_tokens: ids of image pad, video pad, vision start, vision end; None: the last four.
    """
    layers, hidden, heads, kv_heads, inner, vocab, tied, vision = SHAPES[name]
    eighth = hidden // heads // 16  # mRoPE shares half a head's dimensions out as 2 : 3 : 3
    sections = [2 * eighth, 3 * eighth, 3 * eighth]
    text = dict(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=inner,
        vocab_size=vocab,
        bos_token_id=None,
        eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections},
    )
    depth, width, vision_heads, vision_inner = vision
    quarter = max(1, depth // 4)
    tower = dict(
        depth=depth,
        hidden_size=width,
        num_heads=vision_heads,
        intermediate_size=vision_inner,
        out_hidden_size=hidden,
        fullatt_block_indexes=list(range(quarter - 1, depth, quarter)),
    )
    image, video, start, end = vision_tokens or range(vocab - 4, vocab)
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=tower,
        tie_word_embeddings=tied,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )


def count_parameters(shapes):
    """Weights of the whole model, from its shapes alone."""
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(shapes)
    return sum(parameter.numel() for parameter in model.parameters())


def memory(shapes, config, stage):
    """Bytes of one process of a stage: {"weights", "adapters", "training", "sampling", "peak"}.

        adapters   A, B, their gradients, AdamW's two moments and the flat bucket: 5 x 4 bytes each
        training   per token of the longest group: each layer's input, and twice what one layer
                   computes (checkpointing; without it what every layer computes); four float32
                   copies of a chunk of logits
        sampling   keys and values of every row, for prompt and response; 20 bytes per row and word
        peak       weights + adapters + the larger of training and sampling

    Not counted: the vision tower at work, image features, CUDA's own memory, fragmentation.
    """
    text = shapes.text_config
    size = getattr(torch, config.dtype).itemsize
    hidden, inner, layers = text.hidden_size, text.intermediate_size, text.num_hidden_layers
    kv = hidden // text.num_attention_heads * text.num_key_value_heads
    # q and o, k and v, gate and up and down: in + out of each
    sides = 2 * (hidden + hidden) + 2 * (hidden + kv) + 3 * (hidden + inner)
    need = {"weights": size * count_parameters(shapes), "adapters": 0, "training": 0, "sampling": 0}
    if stage in STAGES:
        need["adapters"] = 20 * config.lora_r * layers * sides
        responses = RESPONSES[stage](config)
        group = config.max_prompt + responses * config.max_response
        tokens = max(group, config.micro_tokens)
        work = 12 * hidden + 5 * inner  # numbers that one layer computes for one token
        kept = layers * (hidden if config.checkpointing else work)
        logits = 16 * min(1024, responses * config.max_response) * text.vocab_size
        need["training"] = tokens * size * (kept + 2 * work) + logits
    if stage not in ("sft", "dpo"):
        rows = config.rollout_rows
        cache = layers * 2 * kv * size * (config.max_prompt + config.max_response)
        need["sampling"] = rows * (cache + 20 * text.vocab_size)
    busy = max(need["training"], need["sampling"])
    return need | {"peak": need["weights"] + need["adapters"] + busy}


def hours(shapes, config, stage, records, world, sheet):
    """Estimated hours of a training stage at SHARE of the data sheet, without the judge.

    Prompts are taken at half, responses at a quarter of their limits: an assumption. Per weight and
    token a forward pass costs 2 operations, and so does a backward pass through frozen weights.
    Sampling reads all weights for every token of its rows.
    """
    parameters = count_parameters(shapes)
    k = RESPONSES[stage](config)
    prompts = stage_steps(config, stage, records) * getattr(config, f"{stage}_batch")
    passes = {"sft": 2, "dpo": 3, "grpo": 3}[stage] + config.checkpointing
    tokens = config.max_prompt / 2 + k * config.max_response / 4
    seconds = prompts * passes * 2 * parameters * tokens / (SHARE * sheet[0] * 1e12)
    if stage == "grpo":
        steps = prompts * k * config.max_response / 4 / config.rollout_rows
        size = getattr(torch, config.dtype).itemsize
        seconds += steps * size * parameters / (SHARE * sheet[1] * 1e12)
    return seconds / world / 3600


def stage_table(shapes, config, counts, world, sheet):
    """Markdown: steps, memory and time of every stage."""
    stages = [*config.stages.split(","), "eval"]
    if config.curate != "none":
        stages.insert(0, "qibox")
    rows = []
    for stage in stages:
        records = counts.get("grpo" if stage == "qibox" else stage)
        steps = stage_steps(config, stage, records) if records and stage in STAGES else ""
        need = memory(shapes, config, stage)
        estimate = "-"
        if records and sheet and stage in STAGES:
            estimate = f"{hours(shapes, config, stage, records, world, sheet):.2g} h"
        gigabytes = [f"{need[name] / 1e9:.3g}" for name in ("training", "sampling", "peak")]
        rows.append([stage, records or "?", steps, *gigabytes, estimate])
    head = ["stage", "records", "steps", "training, GB", "sampling, GB", "peak, GB", "time"]
    return data.markdown_table(head, rows)


# ---- what is there, and what is missing --------------------------------------------------------
# Each check returns (what it found, [problems]), and what the estimates need from it.


def check_gpus(config):
    """Also the names of the GPUs, and the number of processes over all machines."""
    real = not config.recipe.startswith("tiny")
    names = []
    if config.device != "cpu" and torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    problems = []
    if not names and (config.device == "cuda" or (real and config.device == "auto")):
        problems.append("torch sees no CUDA device; --device cpu runs on the CPU, very slowly")
    world = max(1, len(names)) * int(os.environ.get("NNODES") or 1)
    return ", ".join(names) or "none: CPU", problems, names, world


def check_model(config):
    """Also its Qwen2_5_VLConfig, or None. A folder must hold weights; a hub name must answer."""
    name = base_folder(config)
    if not config.model and not os.path.exists(name):
        return f"{name}: extras/toy_base.py trains it", [], toy_base.qwen_config("tiny")
    try:
        shapes = AutoConfig.from_pretrained(name)
        if shapes.model_type != "qwen2_5_vl":
            return name, [f"{name}: holds a {shapes.model_type} model, not qwen2_5_vl"], None
        data.load_processor(name, config.min_pixels, config.max_pixels)
    except (OSError, ValueError, data.DataError) as error:
        known = config.recipe.removesuffix("-vlm")
        shapes = shape_config(known) if known in ("3b", "7b") else None
        why = str(error).splitlines()[0]
        return name, [f"{name}: {why}; fetch it where there is network, then MODEL=folder"], shapes
    if os.path.isdir(name) and not list(Path(name).glob("*.safetensors")):
        return name, [f"{name}: has a config.json but no *.safetensors; download them too"], shapes
    return f"{name}, {count_parameters(shapes) / 1e9:.3g} billion parameters", [], shapes


def check_data(config):
    """Also {stage: records}. Every data set that the run reads is validated whole."""
    sets = {stage: stage for stage in [*config.stages.split(","), "eval"]}
    if config.curate != "none":
        sets["grpo"] = "pool"
    if not config.data and config.model:
        wanted = ", ".join(f"{name}.jsonl" for name in sets.values())
        return "none", [f"no data: DATA=folder (or --data) with {wanted}"], {}
    folder = Path(config.data or os.path.join(config.out, "data"))
    if not config.data and not folder.exists():
        return f"{folder}: extras/toy_base.py writes it", [], {}
    counts = {}
    problems = []
    for stage, name in sets.items():
        path = data.set_path(folder, name)
        if not path.exists():
            if name == "pool":
                problems.append(f"{path} is missing: prompts of your own, as in grpo.jsonl")
            elif stage != "eval" or not config.benchmarks:
                problems.append(f"{path} is missing: build.py makes it from {folder}/raw.jsonl")
            continue
        try:
            counts[stage] = len(data.read_records(path, stage))
        except data.DataError as error:
            problems.append(str(error))
    for name in filter(None, config.benchmarks.split(",")):
        if name not in BENCHMARKS:
            problems.append(f"benchmark: {name} is none of {', '.join(BENCHMARKS)}")
        elif not os.path.isdir(os.path.join(config.bench_data, name)):
            problems.append(f"benchmark: no folder {config.bench_data}/{name}")
    return f"{folder}: {counts}", problems, counts


def check_judge(config, recipe):
    """An endpoint must grade a text and see an image."""
    if config.judge != "endpoint":
        return config.judge, []
    try:
        judge = judge_from_env(None)
        judge.preflight()
        return f"{judge.name} grades and sees", []
    except JudgeError as error:
        start = (
            f"\n   To start one on two GPUs (vLLM; not tried by us):"
            f"\n     CUDA_VISIBLE_DEVICES=6,7 vllm serve {JUDGE} --tensor-parallel-size 2"
            " --port 8000\n   and to train beside it:\n     GPUS=0,1,2,3,4,5 "
            f"JUDGE_URL=http://localhost:8000/v1 JUDGE_MODEL={JUDGE} bash run.sh {recipe}"
        )
        return "no answer", [str(error) + ("" if os.environ.get("JUDGE_URL") else start)]


def main(argv):
    """Print what is there, what the run would do, and all that is missing; returns the status."""
    config = parse_config(argv)
    gpus, problems, names, world = check_gpus(config)
    model, model_problems, shapes = check_model(config)
    records, data_problems, counts = check_data(config)
    judge, judge_problems = check_judge(config, config.recipe)
    problems = problems + model_problems + data_problems + judge_problems
    print(f"recipe {config.recipe}, run folder {config.out}, {world} process(es)")
    for title, found in (("GPUs", gpus), ("model", model), ("data", records), ("judge", judge)):
        print(f"{title:6} {found}")
    if shapes is not None:
        sheet = None
        if names:
            known = [name for name in SHEETS if name in names[0]]
            sheet = SHEETS[known[0] if known else "A100"]
        print("\nEstimates from the shapes, not measurements; time at 30% of the data sheet:\n")
        print(stage_table(shapes, config, counts, world, sheet), flush=True)
    for number, problem in enumerate(problems, 1):
        print(f"{number}. {problem}", file=sys.stderr)
    if problems:
        print(f"preflight: {len(problems)} thing(s) missing, see above", file=sys.stderr)
        return 2
    print("preflight: all is there")
    return 0


if __name__ == "__main__":
    run_command(main)

"""Before a run spends hours: GPUs and memory, model, data, judge; every problem at once, then the stages with estimated memory and time.

    python -m extras.preflight --recipe 3b --data my/data       exit status 0: all is there; 2: something is missing

Memory follows from the shapes, line by line as model.py, rollout.py and stage.py allocate it. Time is work over an assumed share of what a
GPU's data sheet promises. Both are estimates: on CUDA neither was measured, on a CPU memory was (tests/test_preflight.py). Ours throughout.
"""

import math
import os
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, Qwen2_5_VLConfig

import data
import judge as judging
from extras import toy_base
from config import STAGES, ConfigError, parse_config
from rollout import OWN_STRIDE, PREFILL_TOKENS
from trainer import FEATURE_BYTES, base_folder, stage_steps

VISION = dict(depth=32, hidden_size=1280, num_heads=16, intermediate_size=3420)
SHAPES = {  # where the hub cannot be asked. Source: the models' public config.json
    "Qwen/Qwen2.5-VL-3B-Instruct": dict(hidden_size=2048, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2,
                                        intermediate_size=11008, vocab_size=151936),
    "Qwen/Qwen2.5-VL-7B-Instruct": dict(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
                                        intermediate_size=18944, vocab_size=152064),
}
TIED = ("Qwen/Qwen2.5-VL-3B-Instruct",)  # embedding and head share a weight
# dense bfloat16 TFLOP/s and TB/s of the data sheets
SHEETS = {"H200": (989, 4.8), "H100": (989, 3.35), "H800": (989, 3.35), "A100": (312, 2.0), "A800": (312, 2.0)}
SHARE = 0.3  # of both that is reached. Assumed, not measured
TYPICAL = {"prompt": 0.5, "response": 0.25}  # mean lengths as shares of their limits. Assumed: nothing is tokenized here
JUDGE = "Qwen/Qwen3-VL-32B-Instruct"  # the judge of the released code, on two GPUs (PAPERS 1.5, 1.6)
TOLD = ("stages", "dtype", "max_prompt", "max_response", "min_pixels", "max_pixels", "lora_r", "micro_tokens", "checkpointing",
        "grpo_batch", "grpo_k", "rollout", "reward", "rollout_rows", "curate")  # the settings that decide what a run costs


# ---- shapes and counts --------------------------------------------------------------------------------------------------


def known_shapes(name):
    """Qwen2_5_VLConfig of a model in SHAPES."""
    vision = dict(VISION, out_hidden_size=SHAPES[name]["hidden_size"])
    return Qwen2_5_VLConfig(text_config=SHAPES[name], vision_config=vision, tie_word_embeddings=name in TIED)


def linear_maps(shapes):
    """(in, out) of a decoder layer's seven linear maps, in the order of model.TARGETS."""
    text = shapes.text_config
    c, inner = text.hidden_size, text.intermediate_size
    kv = c // text.num_attention_heads * text.num_key_value_heads
    return [(c, c), (c, kv), (c, kv), (c, c), (c, inner), (c, inner), (inner, c)]


def count_parameters(shapes):
    """Weights by part: tower, embedding, layers, head (0 where the embedding serves as one). Exact."""
    text, vision = shapes.text_config, shapes.vision_config
    h, inner, c = vision.hidden_size, vision.intermediate_size, text.hidden_size
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    block = 2 * h + 3 * h * h + 3 * h + h * h + h + 2 * (h * inner + inner) + inner * h + h  # norms, qkv, proj, gate and up, down
    wide = vision.spatial_merge_size**2 * h  # the patches that become one token, side by side
    tower = patch * h + vision.depth * block + h + wide * wide + wide + wide * vision.out_hidden_size + vision.out_hidden_size
    maps = linear_maps(shapes)
    layer = sum(a * b for a, b in maps) + sum(b for _, b in maps[:3]) + 2 * c  # q, k and v have a bias
    embedding = text.vocab_size * c
    return {"tower": tower, "embedding": embedding, "layers": text.num_hidden_layers * layer + c,
            "head": 0 if shapes.tie_word_embeddings else embedding}


def responses_per_prompt(config, stage):
    """Responses that one packed group holds at most."""
    corrected = config.rollout == "reflect" and config.unsafe == "keep"  # then a correction stands beside what it corrects
    return {"sft": 1, "dpo": 2, "grpo": config.grpo_k * (2 if corrected else 1)}[stage]


def sampled(config, stage, world):
    """(prompts that one process samples together, samples of each) in a stage that samples; (0, 0) in the others."""
    return {"grpo": (math.ceil(config.grpo_batch / world), config.grpo_k), "qibox": (64, config.qi_samples),
            "eval": (config.rollout_rows, 1)}.get(stage, (0, 0))


def run_stages(config):
    """The table's stages in their order."""
    return (*(["qibox"] if config.curate != "none" else []), *config.stages.split(","), "eval")


# ---- memory -------------------------------------------------------------------------------------------------------------


def memory(shapes, config, stage, images=10**9, world=1):
    """Bytes of one process in a stage (sft, dpo, grpo, qibox, eval) by part, when prompts and responses are as long as the settings allow.

    Args: shapes: Qwen2_5_VLConfig; images: distinct ones in the data, as far as they are known; world: processes.
    Returns a dict. weights, adapters and features lie there all the time; training, sampling and optimiser come one after the other;
    peak is what lies there with the largest of those three. Not counted: the vision tower at work, CUDA's own memory, fragmentation.
    """
    text, size, trains = shapes.text_config, getattr(torch, config.dtype).itemsize, stage in STAGES
    adapter = 4 * config.lora_r * text.num_hidden_layers * sum(a + b for a, b in linear_maps(shapes))  # A and B in float32
    image = tokens_of_image(shapes, config) * text.hidden_size * size
    batch = sampled(config, stage, world)[0] or math.ceil(getattr(config, f"{stage}_batch") / world)
    parts = {"weights": size * sum(count_parameters(shapes).values()),
             "adapters": trains * 4 * adapter,  # A and B, their gradients, AdamW's two moments
             "features": min(images, batch) * image + min(FEATURE_BYTES, images * image)}  # of the step, and kept from earlier ones
    now = {"training": sum(training_memory(shapes, config, stage).values()) if trains else 0,
           "sampling": sum(sampling_memory(shapes, config, stage, world).values()) if sampled(config, stage, world)[0] else 0,
           "optimiser": trains * 3 * adapter}  # the flat bucket of gradients, and two temporaries of AdamW
    return parts | now | {"peak": sum(parts.values()) + max(now.values())}


def tokens_of_image(shapes, config):
    """Tokens of an image of --max_pixels: one for each square of merged patches."""
    return config.max_pixels // (shapes.vision_config.patch_size * shapes.vision_config.spatial_merge_size) ** 2


def training_memory(shapes, config, stage):
    """Bytes of one forward and backward pass over the longest group that the settings allow: it is never cut, so it has to fit.

    With --micro_tokens 0 a pass takes more tokens than that where trainer.token_budget finds room.
    """
    text, size = shapes.text_config, getattr(torch, config.dtype).itemsize
    c, inner, k = text.hidden_size, text.intermediate_size, responses_per_prompt(config, stage)
    kv = c // text.num_attention_heads * text.num_key_value_heads
    p, r = config.max_prompt, config.max_response
    trunk, branch = (p + r, 0) if k == 1 else (p, k * r)  # tokens, see model.Packed
    tokens = max(trunk + branch, config.micro_tokens)
    trunk, branch = (tokens * part / (trunk + branch) for part in (trunk, branch))
    rows, repeat = branch / r, text.num_attention_heads // text.num_key_value_heads
    # what a layer keeps for its backward pass; the base's weights are frozen, but each LoRA A needs its input
    norms = tokens * 2 * c * 4  # the inputs of both norms, in float32
    inputs = tokens * (3 * c + 4 * inner) * size  # of q k v, of o, of gate and up; SiLU's, its output, up, their product
    low = tokens * 7 * config.lora_r * size
    attention = (trunk * 4 * c + branch * 2 * c + rows * 2 * (p + r) * kv) * size  # q k v out; q out; each branch's keys and values
    mask = (rows > 0) * repeat * r * (p + r) * (1 + size)  # bool, and as numbers; one for all where prompts are equally long
    layer = norms + inputs + low + attention + mask
    backward = tokens * (3 * inner + 4 * c) * size  # gradients on their way through one layer
    chunk = min(config.logprob_chunk, k * r * max(1, tokens // (p + k * r)))
    # as the head gives them, at a temperature, normalised, and a gradient, in float32; no layer is at work then
    logits = 4 * chunk * text.vocab_size * 4
    if config.checkpointing:  # a layer's input is kept, the rest is made again for one layer at a time
        return {"kept": text.num_hidden_layers * tokens * c * size, "at_work": max(layer + backward, logits)}
    return {"kept": text.num_hidden_layers * layer, "at_work": max(backward, logits)}


def sampling_memory(shapes, config, stage, world=1):
    """Bytes of rollout.sample: its caches, as rollout.new_state makes them, and what one step of decoding or prefilling works on."""
    text, size = shapes.text_config, getattr(torch, config.dtype).itemsize
    c, v, heads = text.hidden_size, text.vocab_size, text.num_attention_heads
    kv = c // heads * text.num_key_value_heads
    batch, k = sampled(config, stage, world)
    before = 2 * config.max_response if stage == "grpo" and config.rollout == "reflect" else 0  # answer and reflection
    p = config.max_prompt + before
    t, rows = config.max_response, min(config.rollout_rows, batch * k)
    slots = min(batch, 2 * -(-rows // k))
    caches = text.num_hidden_layers * 2 * kv * (slots * p + rows * t) * size
    state = rows * t * (8 + 8 + 4)  # random numbers, tokens, log-probabilities
    scores = heads * (slots * min(k, rows) * p + rows * t) * (4 + size)  # of a layer, and as weights
    graphs = 1 if config.device == "cpu" else -(-t // OWN_STRIDE)  # each CUDA graph keeps its working memory for itself
    draw = rows * v * (4 + 8 + 8)  # log-probabilities, then float64: exponentials and their running sum
    prefill = max(p, min(PREFILL_TOKENS, -(-rows // k) * p)) * (3 * text.intermediate_size + 10 * c) * size  # prompts that go together
    return {"kept": caches + state, "at_work": scores * graphs + max(draw, prefill)}


# ---- time ---------------------------------------------------------------------------------------------------------------


def seconds(shapes, config, stage, records, world, sheet):
    """Estimated seconds of a stage, the judge's time left out.

    Args: records: in its data set; world: processes; sheet: (TFLOP/s, TB/s) of one GPU, of which SHARE is reached. Lengths: TYPICAL.
    A frozen weight costs a forward product and one backward product, a recomputed layer one more, the reference pass one more.
    """
    text, size, counts = shapes.text_config, getattr(torch, config.dtype).itemsize, count_parameters(shapes)
    p, r = config.max_prompt * TYPICAL["prompt"], config.max_response * TYPICAL["response"]
    speed, rate = SHARE * sheet[0] * 1e12, SHARE * sheet[1] * 1e12
    forward = lambda tokens: 2 * tokens * (counts["layers"] + text.num_hidden_layers * text.hidden_size * (p + r))  # the last: attention
    tower = 2 * shapes.vision_config.spatial_merge_size**2 * min(p, tokens_of_image(shapes, config)) * counts["tower"]
    if stage in STAGES:
        prompts, k = stage_steps(config, stage, records) * getattr(config, f"{stage}_batch"), responses_per_prompt(config, stage)
        passes = 2 + config.checkpointing + (stage == "dpo" or stage == "grpo" and config.kl_coef > 0)
        update = passes * (forward(p + k * r) + 2 * k * r * text.vocab_size * text.hidden_size)  # of one prompt and its responses
    else:
        prompts, k, update = records, sampled(config, stage, world)[1], 0
        prompts *= len(set(config.eval_prompts.split(","))) * (1 + len(config.stages.split(","))) if stage == "eval" else 1
    total = prompts * (tower + update) / speed
    if sampled(config, stage, world)[0]:  # decoding reads all weights and caches at every step, for all rows at once
        rows = min(config.rollout_rows, k * math.ceil(prompts / world))
        cached = 2 * text.num_hidden_layers * text.hidden_size // text.num_attention_heads * text.num_key_value_heads * size
        read = size * (counts["layers"] + counts["embedding"]) + cached * rows * (p / k + r / 2)
        total += prompts * (forward(p) / speed + k * r / rows * read / rate)
    return total / (1 if stage == "qibox" else world)  # qibox.py is one process


# ---- what is there, and what is missing -----------------------------------------------------------------------------------


def look_at_gpus(config):
    """(lines, problems, names, free bytes of the fullest, processes over all machines) of the GPUs that this run may use."""
    use = config.device != "cpu" and torch.cuda.is_available()
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if use else []
    memories = [torch.cuda.mem_get_info(i) for i in range(len(names))]  # (free, all)
    lines = [f"{name}, {free / 2**30:.0f} GiB free of {whole / 2**30:.0f}" for name, (free, whole) in zip(names, memories)]
    world = max(1, len(names)) * int(os.environ.get("NNODES") or 1)
    problems = ["--device cuda: torch sees no CUDA device"] if config.device == "cuda" and not use else []
    shares = {"sft": config.sft_batch, "dpo": config.dpo_batch, "grpo": config.grpo_update_batch}
    problems += [f"{stage}: {shares[stage]} records per optimiser step for {world} processes; every process needs one"
                 for stage in config.stages.split(",") if shares[stage] < world]
    return lines or ["none: CPU"], problems, names, min((free for free, _ in memories), default=math.inf), world


def look_at_model(config):
    """(lines, problems, Qwen2_5_VLConfig or None). Weights are not loaded: a folder must hold them, a hub name must answer."""
    name, problems = base_folder(config), []
    if not config.model and not os.path.exists(name):
        with tempfile.TemporaryDirectory() as folder:
            return [f"{name}: toy_base.py trains it"], [], toy_base.tiny_config(toy_base.make_tokenizer(folder))
    try:
        shapes = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        problem = f"{name}: no config ({str(error).splitlines()[0]}). Without network: `hf download {name}` elsewhere, MODEL=folder here"
        return [f"{name}: not reachable"], [problem], known_shapes(name) if name in SHAPES else None
    if shapes.model_type != "qwen2_5_vl":
        return [name], [f"{name}: holds a {shapes.model_type} model; this code runs qwen2_5_vl only"], None
    if os.path.isdir(name) and not list(Path(name).glob("*.safetensors")):
        problems.append(f"{name}: has a config.json but no *.safetensors; download the weights too")
    try:
        data.load_processor(name, config.min_pixels, config.max_pixels)
    except data.DataError as error:
        problems.append(str(error))
    place = "a folder" if os.path.isdir(name) else "on the hub; the first stage downloads the weights, unless they are in its cache"
    return [f"{name} ({place}), {sum(count_parameters(shapes).values()) / 1e9:.3g} billion parameters"], problems, shapes


def look_at_data(config):
    """(lines, problems, {stage: records}) of all data sets that the run reads, each validated whole."""
    folder, lines, problems, counts, absent = config.data or os.path.join(config.out, "data"), [], [], {}, []
    if not config.data and not config.model and not os.path.exists(folder):
        return [f"{folder}: build.py writes it"], [], {}
    if not config.data and config.model:
        files = "sft.jsonl, dpo.jsonl, grpo.jsonl and eval.jsonl, or with a raw.jsonl to build them from"
        return ["none"], [f"no data: DATA=folder (or --data), with {files}"], {}
    for stage in (*config.stages.split(","), *(["eval"] if not config.benchmarks else [])):
        # qibox.py draws GRPO's prompts from the pool
        path = data.set_path(folder, "pool" if stage == "grpo" and config.curate != "none" else stage)
        try:
            counts[stage] = len(data.read_records(path, stage)) if path.exists() else absent.append(path.name)
            lines += [f"{path}: {counts[stage]} records"] if path.exists() else []
        except data.DataError as error:
            problems.append(str(error))
    if absent:
        how = "and no raw.jsonl to build from (README.md, Data)"
        if os.path.exists(os.path.join(folder, "raw.jsonl")):
            how = f"but a raw.jsonl: `python build.py --recipe {config.recipe} --data {folder}` builds them"
        problems.append(f"{folder}: no {', '.join(absent)}, {how}")
    places = [os.path.join(config.bench_data, name) for name in config.benchmarks.split(",") if name]
    return lines, problems + [f"benchmark: no folder {place}" for place in places if not os.path.isdir(place)], counts


def look_at_judge(config, gpus):
    """(lines, problems): an endpoint must grade a text and see an image. Where none is named: how to start one on two of `gpus` GPUs."""
    if config.judge != "endpoint":
        return [config.judge], []
    try:
        endpoint = judging.judge_from_env(None)
        endpoint.preflight()
        return [f"{endpoint.name} grades and sees"], []
    except judging.JudgeError as error:
        problem = str(error)
    if not os.environ.get("JUDGE_URL"):
        ids = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))).split(",")
        here = len(ids) > 2
        serve, host, rest = (",".join(ids[-2:]), "localhost", f"GPUS={','.join(ids[:-2])} ") if here else ("0,1", "that-machine", "")
        problem += (f"\n   To start one {'here' if here else 'on another machine'}, for example (vLLM; not tried by us):"
                    f"\n     CUDA_VISIBLE_DEVICES={serve} vllm serve {JUDGE} --tensor-parallel-size 2 --max-model-len 16384 --port 8000"
                    f"\n   and to train beside it:\n     {rest}JUDGE_URL=http://{host}:8000/v1 JUDGE_MODEL={JUDGE} "
                    f"bash run.sh {config.recipe}, with the rest as before")
    return ["no answer"], [problem]


# ---- the report -----------------------------------------------------------------------------------------------------------


def stage_table(shapes, config, counts, world, sheet, free):
    """(Markdown: steps, memory and time of every stage, and warnings; problems). sheet: of SHEETS, or None; free: bytes of a GPU."""
    lines = ["| stage | records | steps | memory of a process, GB: at rest + at work = peak | time |", "|---|---|---|---|---|"]
    warnings, problems = [], []
    for stage in run_stages(config):
        records = counts.get("grpo" if stage == "qibox" else stage)
        need = memory(shapes, config, stage, records or 10**9, world)
        rest = need["weights"] + need["adapters"] + need["features"]
        steps = "" if stage not in STAGES else stage_steps(config, stage, records) if records else "?"
        minutes = seconds(shapes, config, stage, records, world, sheet) / 60 if records and sheet else None
        told = "no estimate" if minutes is None else f"{minutes / 60:.1f} h" if minutes >= 60 else f"{math.ceil(minutes)} min"
        sizes = f"{rest / 1e9:.3g} + {(need['peak'] - rest) / 1e9:.3g} = {need['peak'] / 1e9:.3g}"
        lines.append(f"| {stage} | {records or '?'} | {steps} | {sizes} | {told} |")
        if need["peak"] > free:
            advice = "--rollout_rows" if need["sampling"] > need["training"] else "--max_response, --max_prompt, or use --checkpointing 1"
            warnings.append(f"WARNING: {stage} may need {need['peak'] / 1e9:.3g} GB, the fullest GPU has {free / 1e9:.3g}; lower {advice}")
    if need["weights"] > free:  # no estimate: this cannot run
        problems.append(f"the weights alone take {need['weights'] / 1e9:.3g} GB, the fullest GPU has {free / 1e9:.3g} free")
    return "\n".join([*lines, "", *warnings]), problems


def main(argv):
    """Print what is there, what the run would do, and everything that is missing. Returns the exit status."""
    config = parse_config([*argv, "1"] if argv[-1:] == ["--dry_run"] else argv)
    gpu_lines, problems, names, free, world = look_at_gpus(config)
    model_lines, model_problems, shapes = look_at_model(config)
    data_lines, data_problems, counts = look_at_data(config)
    judge_lines, judge_problems = look_at_judge(config, len(names))
    problems += model_problems + data_problems + judge_problems
    print(f"recipe {config.recipe}, run folder {config.out}, {world} process(es)")
    print("  " + ", ".join(f"{name} {getattr(config, name)}" for name in TOLD))
    for title, lines in (("GPUs", gpu_lines), ("model", model_lines), ("data", data_lines), ("judge", judge_lines)):
        print(f"{title}\n  " + "\n  ".join(lines or ["none"]))
    if shapes is not None:
        sheet = next((sheet for sheet in SHEETS if sheet in names[0]), "A100") if names else None
        table, certain = stage_table(shapes, config, counts, world, SHEETS.get(sheet), free)
        problems += certain
        print("\nEstimates, not measurements. Memory: by the shapes, for prompts and responses of full length. "
              + (f"Time: at {SHARE:.0%} of the {sheet}'s data sheet,\nprompts at {TYPICAL['prompt']:.0%} and responses "
                 f"at {TYPICAL['response']:.0%} of their limits, without the judge and without reflections."
                 if sheet else "No time on a CPU.") + f"\n\n{table}")
    sys.stdout.flush()  # what goes to stderr stands below
    for number, problem in enumerate(problems, 1):
        print(f"{number}. {problem}", file=sys.stderr)
    if problems:
        print(f"preflight: {len(problems)} thing(s) missing, see above", file=sys.stderr)
        return 2
    print("preflight: all is there")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (OSError, ConfigError) as problem:
        print(problem, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\npreflight: stopped; nothing was started", file=sys.stderr)
        sys.exit(130)

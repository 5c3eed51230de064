"""Speed and memory, ours beside plain Hugging Face, in one run on the machine at hand; prints Markdown tables.

    python -m extras.bench                                          size small, one thread, every part
    python -m extras.bench --only grpo --k 4,8,16 --prompt 300,1000 --response 100,400
    python -m extras.bench --size 3b --only grpo,rollout,limits     on a GPU
    python -m extras.bench --size 3b --make FOLDER                  a random model of that shape, for the real commands

Random weights of the chosen shape; every prompt holds an image. Both sides use the same model object, so the same weights, LoRA,
losses and optimiser. The plain side is transformers' own forward over K copies of prompt and image with logits at every position,
and `generate` with num_return_sequences. The two sides take turns, each side's best time counts, and their results are compared.
Ours throughout: the papers report no speeds.
"""

import argparse
import math
import time
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import product
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

import losses
import model as modeling
import protocol
import rollout
from extras import toy_base
from data import Image, Prompt

PARTS = ("grpo", "dpo", "sft", "rollout", "iteration", "memory", "protocol", "limits")
EOS = 0  # no response holds it, unless `forced_lengths` ends one with it


@dataclass(frozen=True)
class Shape:
    """One model size. 3b and 7b are Qwen2.5-VL's; the others are ours, with a small vision tower (the plain side runs it K times)."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inner: int  # of the MLP
    vocab: int
    vision: tuple = (4, 160, 4, 320)  # layers, hidden, heads, inner
    tied: bool = False  # embedding and head share a weight


SIZES = {
    "tiny": Shape(128, 4, 4, 2, 384, 2048, (2, 64, 2, 128)),
    "small": Shape(512, 8, 8, 2, 1408, 8192),
    "3b": Shape(2048, 36, 16, 2, 11008, 151936, (32, 1280, 16, 3420), tied=True),
    "7b": Shape(3584, 28, 28, 4, 18944, 152064, (32, 1280, 16, 3420)),
}


@dataclass
class Cost:
    """What one side needed."""

    seconds: float  # best of the repeats
    gflop: float | None  # as counted, attention in full whether causal or not; None where it was not counted
    megabytes: float | None  # peak of allocated tensors above what stood before
    result: object


# ---- model and inputs ---------------------------------------------------------------------------------------------------


def random_model(shape, dtype, device, vision_tokens=None):
    """Random Qwen2.5-VL. vision_tokens: the ids of image pad, video pad, vision start and end; None: the last four of the vocabulary."""
    eighth = shape.hidden // shape.heads // 16
    text = dict(vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.inner, num_hidden_layers=shape.layers,
                num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, bos_token_id=None, eos_token_id=None,
                rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2 * eighth, 3 * eighth, 3 * eighth]})
    depth, hidden, heads, inner = shape.vision
    vision = dict(depth=depth, hidden_size=hidden, num_heads=heads, intermediate_size=inner, out_hidden_size=shape.hidden,
                  fullatt_block_indexes=list(range(max(1, depth // 4 - 1), depth, max(1, depth // 4))))
    image, video, start, end = vision_tokens or range(shape.vocab - 4, shape.vocab)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=shape.tied, image_token_id=image,
                              video_token_id=video, vision_start_token_id=start, vision_end_token_id=end)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


def build_model(shape, device, r=16, alpha=32):
    """random_model with a LoRA whose B is not zero (else A would have no gradient to compare). bfloat16 on CUDA, else float32."""
    model = random_model(shape, torch.bfloat16 if device.type == "cuda" else torch.float32, device)
    modeling.attach_lora(model, r, alpha, seed=0)
    for layer in modeling.lora_layers(model).values():
        torch.nn.init.normal_(layer.B, std=0.01)
    return model


def make_folder(shape, folder):
    """Write random_model in bfloat16 as a model folder, with the miniature world's tokenizer and image processor.

    For safer.py with the toy data: a trial of the true shapes that downloads nothing, and that learns nothing.
    """
    ids = toy_base.make_tokenizer(folder).convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"])
    random_model(shape, torch.bfloat16, "cpu", ids).save_pretrained(folder, max_shard_size="4GB")


def make_prompt(model, length, seed):
    """A prompt of `length` random tokens, about a quarter of them an image's."""
    generator = torch.Generator().manual_seed(seed)
    side = max(1, math.isqrt(length // 4))
    image = Image(f"bench {seed}", torch.randn(4 * side * side, 3 * 2 * 14 * 14, generator=generator), (1, 2 * side, 2 * side))
    config = model.config
    text = make_response(model, length - side * side - 2, generator)
    pads = [config.vision_start_token_id, *[config.image_token_id] * (side * side), config.vision_end_token_id]
    return Prompt(tuple(text[:5] + pads + text[5:]), (image,))


def make_response(model, length, generator):
    """Random ids, none of them the end or a vision token."""
    return torch.randint(1, model.config.image_token_id, (length,), generator=generator).tolist()


def make_groups(model, count, k, prompt, shortest, longest, seed=0):
    """`count` groups: a prompt and k responses of lengths drawn from shortest..longest."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count, k), generator=generator).tolist()
    return [(make_prompt(model, prompt, seed + g), [make_response(model, length, generator) for length in row])
            for g, row in enumerate(lengths)]


# ---- the two sides of training ------------------------------------------------------------------------------------------


def ours(model, groups):
    """-> function without arguments: log-probabilities (S, T) and mask (S, T). Images are encoded here, once a step."""
    features = modeling.encode_images(model, [image for prompt, _ in groups for image in prompt.images])
    return lambda: modeling.token_logprobs(model, groups, features)


def plain_inputs(model, rows):
    """Keyword arguments of transformers' forward for (Prompt, response) rows: ids right-padded to (S, L), images once per row."""
    sequences = [torch.tensor([*prompt.ids, *response]) for prompt, response in rows]
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=EOS)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    images = [image for prompt, _ in rows for image in prompt.images]
    inputs = dict(input_ids=ids, attention_mask=(torch.arange(ids.shape[1]) < lengths[:, None]).long(),
                  mm_token_type_ids=(ids == model.config.image_token_id).int(),
                  pixel_values=torch.cat([image.patches for image in images]).to(model.dtype),
                  image_grid_thw=torch.tensor([image.grid for image in images]))
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


def plain(model, groups, response_logits=False):
    """The same as `ours` by transformers: every response behind its own copy of the prompt. All prompts have one length.

    Generous to it: of the (S, L, V) logits only the response's go through log_softmax. response_logits: only those are computed, too.
    """
    rows = [(prompt, response) for prompt, responses in groups for response in responses]
    inputs, start = plain_inputs(model, rows), len(rows[0][0].ids)
    width = inputs["input_ids"].shape[1] - start  # T
    targets = inputs["input_ids"][:, start:]  # (S, T)
    mask = inputs["attention_mask"][:, start:].bool()
    banned = torch.tensor(modeling.banned_token_ids(model), device=model.device)

    def logprobs():
        logits = model(**inputs, use_cache=False, logits_to_keep=width + 1 if response_logits else 0).logits  # (S, L or T + 1, V)
        logits = logits[:, -width - 1:-1]  # (S, T, V)
        picked = modeling.log_softmax_banned(logits, banned, 1.0).gather(2, targets[..., None]).squeeze(2)
        return torch.where(mask, picked, 0.0), mask

    return logprobs


def grpo_objective(model, logprobs_of):
    """Log-probabilities and the clipped loss on policy, without KL."""
    logprobs, mask = logprobs_of()
    advantages = torch.linspace(-1, 2, len(mask), device=mask.device)
    loss, _ = losses.grpo_loss(logprobs, logprobs.detach(), None, advantages, mask, 0.2, 0.28, None, 0.0, "token", mask.sum())
    return logprobs, loss


def dpo_objective(model, logprobs_of):
    """Reference pass with the LoRA off, policy pass, sigmoid loss over (chosen, rejected) pairs."""
    with torch.no_grad(), modeling.adapters_off(model):
        ref = losses.sequence_logprobs(*logprobs_of())
    logprobs, mask = logprobs_of()
    policy = losses.sequence_logprobs(logprobs, mask)
    return logprobs, losses.dpo_loss(policy[0::2], policy[1::2], ref[0::2], ref[1::2], 0.1, 0.0, len(policy) // 2)[0]


def sft_objective(model, logprobs_of):
    """Cross-entropy on the responses."""
    logprobs, mask = logprobs_of()
    return logprobs, losses.sft_loss(logprobs, mask, mask.sum())


def still_optimiser(model):
    """AdamW at learning rate 0: it does all its work and leaves the weights as they are, so that all sides stay comparable."""
    return torch.optim.AdamW(modeling.lora_parameters(model).values(), lr=0.0)


def train_step(model, optimiser, objective, side):
    """One whole step. `side` makes the function of the log-probabilities. Returns log-probabilities, loss and the LoRA's gradients."""
    optimiser.zero_grad(set_to_none=True)
    logprobs, loss = objective(model, side())
    loss.backward()
    optimiser.step()
    return logprobs.detach(), loss.item(), {name: parameter.grad for name, parameter in modeling.lora_parameters(model).items()}


def differences(left, right):
    """Largest difference of two results of train_step in log-probability, loss (relative) and gradient (relative to each tensor's norm)."""
    gradient = max(((left[2][name] - right[2][name]).norm() / right[2][name].norm()).item() for name in right[2])
    return (left[0] - right[0]).abs().max().item(), abs(left[1] - right[1]) / abs(right[1]), gradient


# ---- measuring ----------------------------------------------------------------------------------------------------------


def clock(device):
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def counted(run, device):
    """Run once -> (result, GFLOP, peak MB above what was allocated before).

    CUDA: max_memory_allocated. CPU: the running sum of the profiler's memory events, that is, what torch's allocator gave out and
    had not got back; not the process's resident size, which moves with the C library's habits.
    """
    # torch counts no FLOP for its CPU attention kernel unless told how
    aten = torch.ops.aten
    cpu = {aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
           aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g, q, k, v)}
    with FlopCounterMode(display=False, custom_mapping=cpu) as flops:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            result = run()
            peak = torch.cuda.max_memory_allocated(device) - before
        else:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
                result = run()
            events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
            events.sort(key=lambda event: event.start_ns())
            peak = torch.tensor([event.nbytes() for event in events]).cumsum(0).max().item()
    return result, flops.get_total_flops() / 1e9, peak / 1e6


def race(sides, repeats, device, count=True):
    """Run all sides in turn, `repeats` times; name -> Cost with the best time. sides: name -> function without arguments.

    count: first run each side once more for GFLOP and memory, which also warms it up.
    """
    costs = {name: Cost(math.inf, None, None, None) for name in sides}
    for name, run in sides.items() if count else ():
        costs[name].result, costs[name].gflop, costs[name].megabytes = counted(run, device)
    for _ in range(repeats):
        for name, run in sides.items():
            start = clock(device)
            costs[name].result = run()
            costs[name].seconds = min(costs[name].seconds, clock(device) - start)
    return costs


def print_table(title, columns, rows):
    """A Markdown table under a heading."""
    print(f"\n### {title}\n\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        cells = [cell if isinstance(cell, str) else f"{cell:.0f}" if cell >= 100 else f"{cell:.3g}" for cell in row]
        print("| " + " | ".join(cells) + " |", flush=True)


# ---- the parts ----------------------------------------------------------------------------------------------------------


def bench_training(model, args, name):
    """One table for one objective, grpo, dpo or sft."""
    objective = {"grpo": grpo_objective, "dpo": dpo_objective, "sft": sft_objective}[name]
    optimiser, rows = still_optimiser(model), []
    for label, groups in training_cases(model, name, args):
        sides = {"ours": partial(ours, model, groups), "plain": partial(plain, model, groups),
                 "plain, response logits only": partial(plain, model, groups, response_logits=True)}
        steps = {side: partial(train_step, model, optimiser, objective, make) for side, make in sides.items()}
        costs = race(steps, args.repeat, model.device)
        mine = costs.pop("ours")
        rows.append([label, "ours", mine.seconds, mine.gflop, mine.megabytes, "", "", "", ""])
        for side, cost in costs.items():
            ratios = [cost.seconds / mine.seconds, cost.gflop / mine.gflop, cost.megabytes / mine.megabytes]
            agree = " / ".join(f"{value:.0e}" for value in differences(mine.result, cost.result))
            rows.append([label, side, cost.seconds, cost.gflop, cost.megabytes, *[f"{ratio:.2f}x" for ratio in ratios], agree])
    print_table(f"{name.upper()} step: log-probabilities, loss, backward, optimiser", [
        "case", "side", "s", "GFLOP", "peak MB", "time", "GFLOP", "memory", "difference: log-prob / loss / gradient"], rows)


def training_cases(model, name, args):
    """(label, groups) of one objective: one GRPO group for each K, two DPO pairs, or eight SFT rows of unequal length."""
    for prompt, response in product(args.prompt, args.response):
        quarter = max(1, response // 4)
        cases = {"grpo": [(f"K={k}", 1, k, response) for k in args.k], "dpo": [("2 pairs", 2, 2, response)],
                 "sft": [(f"8 rows, responses from {quarter} up", 8, 1, quarter)]}[name]
        for label, count, k, shortest in cases:
            yield f"{label}, {prompt} + {response}", make_groups(model, count, k, prompt, shortest, response)


def forced_lengths(lengths):
    """Make rollout.sample end sample j of prompt p after lengths[p][j] tokens, when `p` is its seed and EOS its end of turn.

    The sampler does all its work: only its random numbers change. Id 0 stands first in the inverse CDF, so u = 0 draws it and
    u above its probability (under a hundredth in a random model) never does.
    """
    stream = rollout.uniform_stream

    def forced(seed, index, count):
        uniforms = 0.01 + 0.99 * stream(seed, index, count)
        uniforms[lengths[seed][index] - 1:] = 0.0
        return uniforms

    return mock.patch.object(rollout, "uniform_stream", forced)


@torch.no_grad()
def sample_ours(model, prompts, lengths):
    """Responses by the sampler, of the given lengths: list (prompts) of lists (K) of ids."""
    features = modeling.encode_images(model, [image for prompt in prompts for image in prompt.images])
    with forced_lengths(lengths):
        samples = rollout.sample(model, prompts, features, len(lengths[0]), max(map(max, lengths)), 1.0, EOS, list(range(len(prompts))))
    return [[sample.tokens for sample in group] for group in samples]


@torch.no_grad()
def sample_plain(model, prompts, lengths, greedy=False):
    """The same by `generate`. A per-row stopping criterion marks finished rows; `generate` pads them until the last one ends.

    Vision tokens are suppressed here too: transformers' next forward pass would fail on one.
    """
    inputs, start = plain_inputs(model, [(prompt, []) for prompt in prompts]), len(prompts[0].ids)
    ends = torch.tensor(lengths, device=model.device).flatten() + start  # (S,)
    drawing = dict(do_sample=False) if greedy else dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    model.model.rope_deltas = None  # state that an earlier call left
    out = model.generate(**inputs, **drawing, num_return_sequences=len(lengths[0]), max_new_tokens=max(map(max, lengths)), pad_token_id=EOS,
                         suppress_tokens=modeling.banned_token_ids(model), stopping_criteria=[lambda ids, *_, **__: ids.shape[1] >= ends])
    rows = iter(out[:, start:].tolist())
    return [[next(rows)[:length] for length in group] for group in lengths]


def same_greedy_tokens(model, prompts, count):
    """Share of `count` greedy tokens in which sampler and `generate` agree before the first difference."""
    features = modeling.encode_images(model, [image for prompt in prompts for image in prompt.images])
    mine = rollout.sample(model, prompts, features, 1, count, 0, -1, [0] * len(prompts))
    theirs = sample_plain(model, prompts, [[count]] * len(prompts), greedy=True)
    agree = [[a == b for a, b in zip(group[0].tokens, row[0])] + [False] for group, row in zip(mine, theirs)]
    return sum(row.index(False) for row in agree) / (count * len(prompts))


def bench_rollout(model, args, count=16):
    """Sampling, `count` prompts x K samples: all of one length, and lengths drawn once from a tenth of it up to it."""
    rows, k = [], args.k[0]
    for prompt, response in product(args.prompt, args.response):
        prompts, shortest = [make_prompt(model, prompt, seed) for seed in range(count)], max(1, response // 10)
        drawn = torch.randint(shortest, response + 1, (count, k), generator=torch.Generator().manual_seed(0)).tolist()
        same = same_greedy_tokens(model, prompts[:2], min(20, response))
        for label, lengths in ((f"all {response}", [[response] * k] * count), (f"{shortest}..{response}", drawn)):
            costs = race({"ours": partial(sample_ours, model, prompts, lengths), "plain": partial(sample_plain, model, prompts, lengths)},
                         args.repeat, model.device, count=False)
            if any([[len(tokens) for tokens in group] for group in cost.result] != lengths for cost in costs.values()):
                raise RuntimeError("a side did not sample the lengths that it was told to; the comparison would be void")
            mine, theirs, tokens = costs["ours"].seconds, costs["plain"].seconds, sum(map(sum, lengths))
            rows.append([f"{count} x {k}, prompt {prompt}, {label} tokens", mine, theirs, tokens / mine, tokens / theirs,
                         f"{theirs / mine:.2f}x", f"{same:.0%}"])
    print_table("Rollout against generate", [
        "case", "ours s", "plain s", "ours tokens/s", "plain tokens/s", "ratio", "same greedy tokens"], rows)


def iteration(model, optimiser, k, prompt, response, sampler, side):
    """One whole GRPO iteration on one prompt: sample K, score, reference pass, one update with KL. Returns its seconds."""
    start = clock(model.device)
    samples = sampler(model, [prompt], [[response] * k])
    rewards = torch.tensor([[float(i % 2) for i in range(k)]])  # no judge: its time is not what is compared
    advantages = losses.group_advantages(rewards, use_std=True)[0][0].to(model.device)  # (K,)
    optimiser.zero_grad(set_to_none=True)
    logprobs_of = side(model, [(prompt, samples[0])])
    with torch.no_grad(), modeling.adapters_off(model):
        ref, _ = logprobs_of()
    logprobs, mask = logprobs_of()
    loss, _ = losses.grpo_loss(logprobs, logprobs.detach(), ref, advantages, mask, 0.2, 0.28, None, 0.01, "token", mask.sum())
    loss.backward()
    optimiser.step()
    return clock(model.device) - start


def bench_iteration(model, args):
    """Whole GRPO iterations, with --against trl also TRL's."""
    optimiser, rows, k = still_optimiser(model), [], args.k[0]
    for prompt, response in product(args.prompt, args.response):
        start = partial(iteration, model, optimiser, k, make_prompt(model, prompt, 0), response)
        sides = {"ours": partial(start, sample_ours, ours), "plain": partial(start, sample_plain, plain)}
        if args.against == "trl":
            from extras import bench_trl  # trl and peft are no requirements
            for fused, name in ((True, "TRL"), (False, "TRL without its fused head")):
                sides[name] = bench_trl.make_step(SIZES[args.size], model.device, k, prompt, response, fused)
        times = {name: [] for name in sides}
        for _ in range(args.repeat):
            for name, run in sides.items():
                times[name].append(run())
        rows += [[f"K={k}, {prompt} + {response}", name, min(seconds), f"{min(seconds) / min(times['ours']):.2f}x"]
                 for name, seconds in times.items()]
    print_table("Whole GRPO iteration on one prompt: sample, score, reference, update", ["case", "side", "s", "time"], rows)


def bench_memory(model, args, vocabularies=(2000, 152000)):
    """Peak memory of a GRPO step over vocabulary and chunk, at one hidden size: K = 8, prompt 200, response 100."""
    rows, device = [], model.device
    for vocab in vocabularies:
        model = build_model(replace(SIZES["tiny"], hidden=256, layers=2, vocab=vocab), device)
        groups = make_groups(model, 1, 8, 200, 100, 100)
        features = modeling.encode_images(model, list(groups[0][0].images))
        step = partial(train_step, model, still_optimiser(model), grpo_objective)
        for chunk in (32, 128, 1024):
            scored = partial(modeling.token_logprobs, model, groups, features, chunk=chunk)
            # there are 800 response tokens: a larger chunk is not filled
            peak = counted(partial(step, lambda: scored), device)[2]
            rows.append([str(vocab), f"ours, chunk {chunk}", peak, vocab * min(chunk, 800) * 4 / 1e6])
        rows.append([str(vocab), "plain", counted(partial(step, partial(plain, model, groups)), device)[2], ""])
    print_table("Peak memory of a GRPO step by vocabulary (hidden 256, 2 layers, K=8, 200 + 100)",
                ["vocabulary", "side", "peak MB", "MB of one float32 (chunk, vocabulary)"], rows)


def bench_protocol(model, args):
    """Checks a second on one core for legal traces of a call to each tool, and the cost of 100, 1,000 and 10,000 calls."""
    good = {"objects": "bread knife", "hazard": "low", "text": "none", "terms": "kill", "flagged": "yes", "relation": "consistent",
            "intent": "benign", "evidence": "asks how to cut", "risk": "medium", "score": "5", "category": "weapons", "wrapper": "none",
            "decision": "redirect", "alternative": "a class", "reason": "it may hurt"}
    plan = protocol.make_plan("analyst", list(protocol.TOOLS), "mesh")
    calls = [(tool.name, {field.name: good[field.name] for field in tool.fields}) for tool in protocol.TOOLS.values()]
    text = protocol.render_response(calls, "Take a class first.")
    if not protocol.check(text, plan).legal:
        raise RuntimeError("the trace of this benchmark is no longer legal: look at the values above")
    rows, cpu = [], torch.device("cpu")
    for label, shown in (("with its plan", plan), ("no plan shown", None)):
        cost = race({"": lambda: [protocol.check(text, shown) for _ in range(500)]}, 5, cpu, count=False)[""]
        rows.append([f"{len(calls)} calls, legal, {label}", 1000 * cost.seconds / 500, 500 / cost.seconds])
    for count in (100, 1000, 10000):
        long = "<thinking>\n" + "[VISUAL-SCAN]: objects=bread; hazard=low\n" * count + "</thinking>\n<answer>\nno\n</answer>"
        cost = race({"": lambda: protocol.check(long)}, 3, cpu, count=False)[""]
        rows.append([f"{count} calls, not legal", 1000 * cost.seconds, 1 / cost.seconds])
    print_table("Trace checks", ["trace", "ms", "checks/s"], rows)


def bench_limits(model, args, count=16):
    """How near decoding comes to the machine's memory rate, and a GRPO step to its matrix rate, as a large copy and product show them."""
    device, k, prompt, response = model.device, args.k[0], args.prompt[0], args.response[0]
    side, size = (8192, 2**30) if device.type == "cuda" else (2048, 2**27)
    left, right = torch.randn(2, side, side, device=device).to(model.dtype)
    big = torch.zeros(size, dtype=torch.uint8, device=device)
    prompts, groups = [make_prompt(model, prompt, seed) for seed in range(count)], make_groups(model, 1, k, prompt, response, response)
    step = partial(train_step, model, still_optimiser(model), grpo_objective, partial(ours, model, groups))
    gflop = counted(step, device)[1]
    # machine and work take turns, so that what else runs on it slows both
    sample = partial(sample_ours, model, prompts)
    costs = race({"copy": big.clone, "product": lambda: left @ right, "step": step, "first": partial(sample, [[1] * k] * count),
                  "all": partial(sample, [[response] * k] * count)}, args.repeat, device, count=False)
    seconds = {name: cost.seconds for name, cost in costs.items()}
    text = model.config.text_config
    weights = sum(p.nbytes for p in model.model.language_model.layers.parameters()) + model.lm_head.weight.nbytes
    # every step reads the weights, each prompt's keys and values once, and each row's own, half of its final length on average
    cached = 2 * text.num_hidden_layers * text.num_key_value_heads * text.hidden_size // text.num_attention_heads * model.dtype.itemsize
    read = (response - 1) * (weights + cached * count * (prompt + k * response / 2)) / 1e9
    rows = [(f"decoding, {count} x {k} rows, prompt {prompt}, GB/s that must be read",
             read / (seconds["all"] - seconds["first"]), 2 * size / 1e9 / seconds["copy"]),
            (f"GRPO step, K={k}, {prompt} + {response}, GFLOP/s", gflop / seconds["step"], 2 * side**3 / 1e9 / seconds["product"])]
    print_table("Against the machine", ["part", "reached", "machine", "share"], [[*row, f"{row[1] / row[2]:.0%}"] for row in rows])


# ---- command line -------------------------------------------------------------------------------------------------------


def parse_arguments(argv):
    """The flags; unknown parts end the program with a message."""
    numbers = lambda text: [int(part) for part in text.split(",")]
    parser = argparse.ArgumentParser(description="Speed and memory, ours beside plain Hugging Face.")
    parser.add_argument("--size", choices=SIZES, default="small", help="shape of the random model")
    parser.add_argument("--make", metavar="FOLDER", help="only write a random model of --size to this folder, for safer.py --model FOLDER")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; one gives the steadiest numbers")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(PARTS), help=f"parts to run, of {','.join(PARTS)}")
    parser.add_argument("--k", type=numbers, default=[8], help="samples per prompt; only grpo runs them all, the rest the first")
    parser.add_argument("--prompt", type=numbers, default=[300, 1000], help="prompt lengths in tokens, image included; at least 16")
    parser.add_argument("--response", type=numbers, default=[100], help="response lengths in tokens")
    parser.add_argument("--against", choices=["trl"], help="also race TRL's trainer with peft in `iteration`, where both are installed")
    parser.add_argument("--repeat", type=int, default=3, help="how often each side runs; the best counts")
    args = parser.parse_args(argv)
    if set(args.only) - set(PARTS) or min(args.prompt) < 16 or min(args.response + args.k) < 2 or args.repeat < 1:
        parser.error(f"--only takes {','.join(PARTS)}; --prompt at least 16, --response and --k at least 2, --repeat at least 1")
    if args.against and not (find_spec("trl") and find_spec("peft")):
        print("--against trl: trl or peft is not installed, so only the plain side is raced (pip install trl peft datasets)")
        args.against = None
    return args


def main(argv=None):
    """Run the parts that are asked for."""
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    if args.make:
        return make_folder(SIZES[args.size], args.make)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {args.threads} thread(s)"
    print(f"## size {args.size}: {SIZES[args.size]}; {where}; torch {torch.__version__}; best of {args.repeat}")
    model = build_model(SIZES[args.size], device)
    benches = {name: partial(bench_training, name=name) for name in ("grpo", "dpo", "sft")}
    benches.update(rollout=bench_rollout, iteration=bench_iteration, memory=bench_memory, protocol=bench_protocol, limits=bench_limits)
    for name in args.only:
        benches[name](model, args=args)


if __name__ == "__main__":
    main()

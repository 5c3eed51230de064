"""Speed and memory, ours beside plain Hugging Face, in one run on the machine at hand; prints Markdown tables.

    python bench.py                                          size small, one thread, every part
    python bench.py --only grpo --k 4,8,16 --prompt 300,1000 --response 100,400
    python bench.py --size 3b --only grpo,rollout,limits     on a GPU

Random weights of the chosen shape; every prompt holds an image. Both sides use the same model object, so the same weights, LoRA,
losses and optimiser. The plain side is transformers' own forward over K copies of prompt and image with logits at every position,
and `generate` with num_return_sequences. The two sides take turns, each side's best time counts, and their results are compared.
Ours throughout: the papers report no speeds.
"""

import argparse
import math
import time
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

import losses
import model as modeling
import protocol
import rollout
from data import Image, Prompt

PARTS = ("grpo", "dpo", "sft", "rollout", "iteration", "memory", "protocol", "limits")
EOS = 0  # no response holds it, unless `forced_lengths` ends one with it


@dataclass(frozen=True)
class Shape:
    """One model size. 3b and 7b are Qwen2.5-VL's published shapes; the others are ours, with a vision tower that is small on purpose."""

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
    "mid": Shape(1024, 16, 16, 4, 2816, 32768),
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


def build_model(shape, device, r=16, alpha=32):
    """Random Qwen2.5-VL with a LoRA whose B is not zero (else A would have no gradient to compare). bfloat16 on CUDA, else float32."""
    eighth = shape.hidden // shape.heads // 16
    text = dict(vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.inner, num_hidden_layers=shape.layers,
                num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, bos_token_id=None, eos_token_id=None, pad_token_id=None,
                rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2 * eighth, 3 * eighth, 3 * eighth]})
    depth, hidden, heads, inner = shape.vision
    vision = dict(depth=depth, hidden_size=hidden, num_heads=heads, intermediate_size=inner, out_hidden_size=shape.hidden,
                  fullatt_block_indexes=list(range(depth // 4, depth, max(1, depth // 4))))
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=shape.tied, image_token_id=shape.vocab - 4,
                              video_token_id=shape.vocab - 3, vision_start_token_id=shape.vocab - 2, vision_end_token_id=shape.vocab - 1)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
                                                        attn_implementation="sdpa").eval()
    modeling.attach_lora(model, r, alpha, seed=0)
    for name, parameter in modeling.lora_parameters(model).items():
        if name.endswith(".B"):
            torch.nn.init.normal_(parameter, std=0.01)
    return model


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
    return [(make_prompt(model, prompt, seed + g), [make_response(model, length, generator) for length in row]) for g, row in enumerate(lengths)]


# ---- the two sides of training ------------------------------------------------------------------------------------------


def ours(model, groups):
    """-> function without arguments: log-probabilities (S, T) and mask (S, T). Images are encoded here, once a step."""
    features = modeling.encode_images(model, [image for prompt, _ in groups for image in prompt.images])
    return lambda: modeling.token_logprobs(model, groups, features)


def plain_inputs(model, rows):
    """Keyword arguments of transformers' forward for (Prompt, response) rows: ids right-padded to (S, L), images once per row."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor([*prompt.ids, *response]) for prompt, response in rows], batch_first=True, padding_value=EOS)
    lengths = torch.tensor([len(prompt.ids) + len(response) for prompt, response in rows])
    images = [image for prompt, _ in rows for image in prompt.images]
    inputs = dict(input_ids=ids, attention_mask=(torch.arange(ids.shape[1]) < lengths[:, None]).long(),
                  mm_token_type_ids=(ids == model.config.image_token_id).int(), pixel_values=torch.cat([image.patches for image in images]).to(model.dtype),
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
        logits = model(**inputs, use_cache=False, logits_to_keep=width + 1 if response_logits else 0).logits[:, -width - 1:-1]  # (S, T, V)
        picked = modeling.log_softmax_banned(logits, banned, 1.0).gather(2, targets[..., None]).squeeze(2)
        return torch.where(mask, picked, 0.0), mask

    return logprobs


def grpo_objective(model, logprobs_of):
    """Log-probabilities and the clipped loss on policy, without KL."""
    logprobs, mask = logprobs_of()
    advantages = torch.linspace(-1, 2, len(mask), device=mask.device)
    return logprobs, losses.grpo_loss(logprobs, logprobs.detach(), None, advantages, mask, 0.2, 0.28, None, 0.0, "token", mask.sum())[0]


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


def train_step(model, optimiser, objective, side):
    """One whole step. `side` makes the function of the log-probabilities. Returns log-probabilities, loss and the LoRA's gradients."""
    optimiser.zero_grad(set_to_none=True)
    logprobs, loss = objective(model, side())
    loss.backward()
    optimiser.step()
    return logprobs.detach(), loss.item(), {name: parameter.grad.clone() for name, parameter in modeling.lora_parameters(model).items()}


def differences(left, right):
    """Largest difference of two results of train_step: (log-probability, loss relative to its size, gradient relative to each tensor's norm)."""
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
    cpu = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
           torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g, q, k, v)}
    with FlopCounterMode(display=False, custom_mapping=cpu) as flops:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            result = run()
            peak = torch.cuda.max_memory_allocated(device) - before
        else:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
                result = run()
            events = sorted((event.start_ns(), event.nbytes()) for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
            peak = torch.tensor([size for _, size in events]).cumsum(0).max().item()
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
        print("| " + " | ".join(f"{cell:.3g}" if isinstance(cell, float) and abs(cell) < 100 else f"{cell:.0f}" if isinstance(cell, float) else str(cell)
                                for cell in row) + " |", flush=True)


# ---- the parts ----------------------------------------------------------------------------------------------------------


def bench_training(model, name, cases, repeats):
    """One table for one objective. cases: list of (label, groups)."""
    device, objective = model.device, {"grpo": grpo_objective, "dpo": dpo_objective, "sft": sft_objective}[name]
    optimiser = torch.optim.AdamW(modeling.lora_parameters(model).values(), lr=0.0)  # a whole step that leaves the weights comparable
    rows = []
    for label, groups in cases:
        sides = {"ours": lambda: ours(model, groups), "plain": lambda: plain(model, groups),
                 "plain, response logits only": lambda: plain(model, groups, response_logits=True)}
        costs = race({side: lambda make=make: train_step(model, optimiser, objective, make) for side, make in sides.items()}, repeats, device)
        mine = costs.pop("ours")
        rows.append([label, "ours", mine.seconds, mine.gflop, mine.megabytes, "", "", "", ""])
        for side, cost in costs.items():
            agree = " / ".join(f"{value:.0e}" for value in differences(mine.result, cost.result))
            rows.append([label, side, cost.seconds, cost.gflop, cost.megabytes, f"{cost.seconds / mine.seconds:.2f}x", f"{cost.gflop / mine.gflop:.2f}x",
                         f"{cost.megabytes / mine.megabytes:.2f}x", agree])
    print_table(f"{name.upper()} step: log-probabilities, loss, backward, optimiser", ["case", "side", "s", "GFLOP", "peak MB", "time", "GFLOP ratio",
                "memory", "difference: log-prob / loss / gradient"], rows)


def training_cases(model, name, args):
    """(label, groups) of one objective: one GRPO group for each K, two DPO pairs, eight SFT rows of unequal length."""
    cases = []
    for prompt in args.prompt:
        for response in args.response:
            for k in args.k if name == "grpo" else [2 if name == "dpo" else 1]:
                count, shortest = {"grpo": (1, response), "dpo": (2, response), "sft": (8, max(1, response // 4))}[name]
                label = {"grpo": f"K={k}, {prompt} + {response}", "dpo": f"2 pairs, {prompt} + {response}",
                         "sft": f"8 rows, {prompt} + {shortest}..{response}"}[name]
                cases.append((label, make_groups(model, count, k, prompt, shortest, response)))
    return cases


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
    inputs, longest, start = plain_inputs(model, [(prompt, []) for prompt in prompts]), max(map(max, lengths)), len(prompts[0].ids)
    ends = torch.tensor(lengths, device=model.device).flatten() + start  # (S,)
    settings = dict(do_sample=False) if greedy else dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    model.model.rope_deltas = None  # state that an earlier call left
    out = model.generate(**inputs, num_return_sequences=len(lengths[0]), max_new_tokens=longest, pad_token_id=EOS, suppress_tokens=modeling.banned_token_ids(model),
                         stopping_criteria=[lambda ids, scores, **_: ids.shape[1] >= ends], **settings)[:, start:]
    rows = iter(out.tolist())
    return [[next(rows)[:length] for length in group] for group in lengths]


def same_greedy_tokens(model, prompts, count):
    """Share of greedy tokens on which the sampler and `generate` agree up to each prompt's first difference."""
    features = modeling.encode_images(model, [image for prompt in prompts for image in prompt.images])
    mine = rollout.sample(model, prompts, features, 1, count, 0, -1, [0] * len(prompts))
    theirs = sample_plain(model, prompts, [[count]] * len(prompts), greedy=True)
    return sum(([a == b for a, b in zip(group[0].tokens, row[0])] + [False]).index(False) for group, row in zip(mine, theirs)) / (count * len(prompts))


def bench_rollout(model, args, count=16):
    """Sampling, `count` prompts x K samples: all of one length, and lengths drawn once from a tenth of it up to it."""
    rows, k = [], args.k[0]
    for prompt in args.prompt:
        for response in args.response:
            prompts = [make_prompt(model, prompt, seed) for seed in range(count)]
            drawn = torch.randint(max(1, response // 10), response + 1, (count, k), generator=torch.Generator().manual_seed(0)).tolist()
            same = same_greedy_tokens(model, prompts[:2], min(20, response))
            for label, lengths in (("all " + str(response), [[response] * k] * count), (f"{max(1, response // 10)}..{response}", drawn)):
                costs = race({"ours": lambda: sample_ours(model, prompts, lengths), "plain": lambda: sample_plain(model, prompts, lengths)},
                             args.repeat, model.device, count=False)
                for cost in costs.values():
                    if [[len(tokens) for tokens in group] for group in cost.result] != lengths:
                        raise RuntimeError("a side did not sample the lengths that it was told to; the comparison would be void")
                tokens = sum(map(sum, lengths))
                speeds = [tokens / cost.seconds for cost in costs.values()]
                rows.append([f"{count} x {k}, prompt {prompt}, {label} tokens", *[cost.seconds for cost in costs.values()], *speeds,
                             f"{speeds[0] / speeds[1]:.2f}x", f"{same:.0%}"])
    print_table("Rollout against generate", ["case", "ours s", "plain s", "ours tokens/s", "plain tokens/s", "ratio", "same greedy tokens"], rows)


def iteration(model, optimiser, prompt, k, response, sampler, side):
    """One whole GRPO iteration on one prompt: sample K, score, reference pass, one update with KL."""
    samples = sampler(model, [prompt], [[response] * k])
    rewards = torch.tensor([[sum(token % 2 for token in tokens) / len(tokens) for tokens in samples[0]]])  # a stand-in for a judge
    advantages = losses.group_advantages(rewards, use_std=True)[0][0].to(model.device)  # (K,)
    optimiser.zero_grad(set_to_none=True)
    logprobs_of = side(model, [(prompt, samples[0])])
    with torch.no_grad(), modeling.adapters_off(model):
        ref, _ = logprobs_of()
    logprobs, mask = logprobs_of()
    losses.grpo_loss(logprobs, logprobs.detach(), ref, advantages, mask, 0.2, 0.28, None, 0.01, "token", mask.sum())[0].backward()
    optimiser.step()


def bench_iteration(model, args):
    """Whole GRPO iterations."""
    optimiser, rows = torch.optim.AdamW(modeling.lora_parameters(model).values(), lr=0.0), []
    for prompt in args.prompt:
        for response in args.response:
            item, k = make_prompt(model, prompt, 0), args.k[0]
            costs = race({"ours": lambda: iteration(model, optimiser, item, k, response, sample_ours, ours),
                          "plain": lambda: iteration(model, optimiser, item, k, response, sample_plain, plain)}, args.repeat, model.device, count=False)
            rows.append([f"K={k}, {prompt} + {response}", costs["ours"].seconds, costs["plain"].seconds, f"{costs['plain'].seconds / costs['ours'].seconds:.2f}x"])
    print_table("Whole GRPO iteration: sample, score, reference, update", ["case", "ours s", "plain s", "ratio"], rows)


def bench_memory(device):
    """Peak memory of a GRPO step over vocabulary and chunk, at one hidden size: K = 8, prompt 200, response 100."""
    rows = []
    for vocab in (2000, 152000):
        model = build_model(replace(SIZES["tiny"], hidden=256, layers=2, vocab=vocab), device)
        optimiser = torch.optim.AdamW(modeling.lora_parameters(model).values(), lr=0.0)
        groups = make_groups(model, 1, 8, 200, 100, 100)
        features = modeling.encode_images(model, list(groups[0][0].images))
        for chunk in (32, 128, 1024):
            step = lambda: train_step(model, optimiser, grpo_objective, lambda: lambda: modeling.token_logprobs(model, groups, features, chunk=chunk))
            rows.append([vocab, f"ours, chunk {chunk}", counted(step, device)[2], vocab * chunk * 4 / 1e6])
        rows.append([vocab, "plain", counted(lambda: train_step(model, optimiser, grpo_objective, lambda: plain(model, groups)), device)[2], ""])
    print_table("Peak memory of a GRPO step by vocabulary (hidden 256, 2 layers, K=8, 200 + 100)",
                ["vocabulary", "side", "peak MB", "MB of one float32 (chunk, vocabulary)"], rows)


def bench_protocol():
    """Checks a second on one core for legal traces of a call to each tool, and the cost of 100, 1,000 and 10,000 calls."""
    good = {"objects": "bread knife", "text": "none", "terms": "kill", "evidence": "asks how to cut", "alternative": "a class", "reason": "it may hurt",
            "flagged": "yes", "risk": "medium", "score": "5", "category": "weapons", "decision": "redirect"}
    plan = protocol.make_plan("analyst", list(protocol.TOOLS), "mesh")
    calls = [(name, {field.name: good.get(field.name) or field.values[0] for field in tool.fields}) for name, tool in protocol.TOOLS.items()]
    text = protocol.render_response(calls, "Take a class first.")
    if not protocol.check(text, plan).legal:
        raise RuntimeError("the trace of this benchmark is no longer legal; give its new fields a value above")
    rows, cpu = [], torch.device("cpu")
    for label, shown in (("with its plan", plan), ("no plan shown", None)):
        cost = race({"": lambda: [protocol.check(text, shown) for _ in range(500)]}, 5, cpu, count=False)[""]
        rows.append([f"{len(calls)} calls, legal, {label}", 1000 * cost.seconds / 500, 500 / cost.seconds])
    for count in (100, 1000, 10000):
        long = "<thinking>\n" + "[VISUAL-SCAN]: objects=bread; hazard=low\n" * count + "</thinking>\n<answer>\nno\n</answer>"
        cost = race({"": lambda: protocol.check(long)}, 3, cpu, count=False)[""]
        rows.append([f"{count} calls, not legal", 1000 * cost.seconds, 1 / cost.seconds])
    print_table("Trace checks", ["trace", "ms", "checks/s"], rows)


def machine_rates(device, dtype):
    """(bytes/s of a large copy, reads and writes counted; FLOP/s of a large matrix product): what this machine reaches."""
    side = 8192 if device.type == "cuda" else 2048
    left, right = torch.randn(2, side, side, device=device).to(dtype)
    big = torch.zeros(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    costs = race({"copy": lambda: big.clone(), "matmul": lambda: left @ right}, 5, device, count=False)
    return 2 * big.nbytes / costs["copy"].seconds, 2 * side**3 / costs["matmul"].seconds


def bench_limits(model, args, count=16):
    """How near decoding comes to the machine's memory rate, and a GRPO step to its matrix rate (both measured here)."""
    bandwidth, matrix = machine_rates(model.device, model.dtype)
    k, prompt, response = args.k[0], args.prompt[0], args.response[0]
    prompts = [make_prompt(model, prompt, seed) for seed in range(count)]
    costs = race({length: lambda length=length: sample_ours(model, prompts, [[length] * k] * count) for length in (1, response)},
                 args.repeat, model.device, count=False)
    decoding = costs[response].seconds - costs[1].seconds
    text = model.config.text_config
    weights = sum(p.nbytes for p in model.model.language_model.layers.parameters()) + model.lm_head.weight.nbytes
    # every step reads the weights, each prompt's keys and values once, and each row's own, half of its final length on average
    cached = 2 * text.num_hidden_layers * text.num_key_value_heads * text.hidden_size // text.num_attention_heads * model.lm_head.weight.element_size()
    read = (response - 1) * (weights + cached * count * (prompt + k * response / 2))
    optimiser = torch.optim.AdamW(modeling.lora_parameters(model).values(), lr=0.0)
    groups = make_groups(model, 1, k, prompt, response, response)
    step = race({"": lambda: train_step(model, optimiser, grpo_objective, lambda: ours(model, groups))}, args.repeat, model.device)[""]
    print_table("Against the machine", ["part", "reached", "machine", "share"], [
        [f"decoding, {count} x {k} rows, GB/s that must be read", read / decoding / 1e9, bandwidth / 1e9, f"{read / decoding / bandwidth:.0%}"],
        [f"GRPO step K={k}, {prompt} + {response}, GFLOP/s", step.gflop / step.seconds, matrix / 1e9, f"{step.gflop * 1e9 / step.seconds / matrix:.0%}"]])


# ---- command line -------------------------------------------------------------------------------------------------------


def parse_arguments(argv):
    """The flags; unknown parts end the program with a message."""
    numbers = lambda text: [int(part) for part in text.split(",")]
    parser = argparse.ArgumentParser(description="Speed and memory, ours beside plain Hugging Face.")
    parser.add_argument("--size", choices=SIZES, default="small", help="shape of the random model")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; one gives the steadiest numbers")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(PARTS), help=f"parts to run, of {','.join(PARTS)}")
    parser.add_argument("--k", type=numbers, default=[8], help="samples per prompt; only grpo runs them all, the rest the first")
    parser.add_argument("--prompt", type=numbers, default=[300, 1000], help="prompt lengths in tokens, image included; at least 16")
    parser.add_argument("--response", type=numbers, default=[100], help="response lengths in tokens")
    parser.add_argument("--repeat", type=int, default=3, help="how often each side runs; the best counts")
    args = parser.parse_args(argv)
    if set(args.only) - set(PARTS) or min(args.prompt) < 16 or min(args.response + args.k) < 2 or args.repeat < 1:
        parser.error(f"--only takes {','.join(PARTS)}; --prompt at least 16, --response and --k at least 2, --repeat at least 1")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {args.threads} thread(s)"
    print(f"## size {args.size}: {SIZES[args.size]}; {where}; torch {torch.__version__}; best of {args.repeat}")
    model = build_model(SIZES[args.size], device)
    for name in ("grpo", "dpo", "sft"):
        if name in args.only:
            bench_training(model, name, training_cases(model, name, args), args.repeat)
    for name, bench in (("rollout", bench_rollout), ("iteration", bench_iteration), ("limits", bench_limits)):
        if name in args.only:
            bench(model, args)
    if "memory" in args.only:
        bench_memory(device)
    if "protocol" in args.only:
        bench_protocol()


if __name__ == "__main__":
    main()

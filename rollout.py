"""Sampling: K responses per prompt, with their log-probabilities, by the forward that training
runs; and the second turn of SaFeR-VLM's rollout, in which the policy reflects on an unsafe response
and corrects it (`correct`).

Every sample in flight is a row. Its cache holds the prompt's keys and values, copied in when it is
admitted, then those of the tokens that it has drawn:

    row 0   p p p p p p | a a a . . .      lengths = 9: entries that are filled
    row 1   q q q | b b b b b . . . .      lengths = 8
    row 2   p p p p p p | c . . . . .      lengths = 7
            0                       11     a row sees its entries 0..lengths, with the new token's

A step feeds each row its last token, which becomes entry `lengths`, and draws the next one. A row
that ends takes the next waiting sample in place. Each prompt is prefilled once for its K samples.

Temperature and the ban of four vision tokens are the only transforms: no top-k, top-p or penalty
exists here, and no generation config is read. Each sample draws from its own stream of random
numbers, so up to rounding what it says depends neither on the other rows nor on their number. Ours;
of the release it is known that it samples at temperature 1 (PAPERS 1.5).

Letters in shapes: n rows, L layers, H heads, Hkv key/value heads, D head size, X entries of a row's
cache, T most new tokens, R response length, N and P tokens of a prefill and of a prompt, C hidden
size, V vocabulary.
"""

import functools
import hashlib
from collections import deque
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

import protocol
from data import REFLECTION_REQUEST, Prompt, continue_prompt, decode_response, encode_response
from model import (
    banned_token_ids,
    cast_adapters,
    forward_packed,
    group_attention,
    log_softmax_banned,
    pack_groups,
    run_layers,
)

STRIDE = 64  # cache entries that the smallest CUDA graph looks at; the others: powers of 2
PREFILL_TOKENS = 4096  # prompt tokens that go through the model together


@dataclass
class Sample:
    """One sampled response; it grows while it is in flight."""

    tokens: list[int]  # with the end-of-turn token when finished
    logprobs: list[float]  # of each token, at the sampling temperature
    finished: bool  # False: cut at max_tokens


def uniform_stream(seed, index, count):
    """`count` uniforms in [0, 1), float64, of sample `index` under a prompt's seed, anywhere
    alike."""
    digest = hashlib.sha256(f"{seed}:{index}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.rand(count, generator=generator, dtype=torch.float64)


def draw(logprobs, uniforms):
    """Inverse-CDF sampling: logprobs (n, V), uniforms (n,) in [0, 1) -> ids (n,).

    A token of probability 0 is never drawn: the factor keeps u * total below total whatever the
    rounding, and right=True steps over tokens that add nothing to the sum.
    """
    cdf = logprobs.double().exp().cumsum(dim=1)  # (n, V)
    point = uniforms * (1 - 2.0**-40) * cdf[:, -1]
    return torch.searchsorted(cdf, point[:, None], right=True).squeeze(1)


def prefill(model, prompts, features):
    """Run prompts once, together -> per prompt: keys and values (L, 2, Hkv, P, D), the output at
    its last token (C,), the rotary position after it."""
    packed = pack_groups(model, [(prompt, []) for prompt in prompts], features)
    kept = []

    def attend(i, q, k, v):
        kept.append(torch.stack([k, v]).transpose(1, 2))  # (2, Hkv, N, D)
        return group_attention(packed, i, q, k, v)

    lengths = [len(prompt.ids) for prompt in prompts]
    ends = torch.tensor(lengths, device=model.device).cumsum(0) - 1
    hidden = forward_packed(model, packed, attend=attend, keep=ends)  # (prompts, C)
    following = packed.positions[0, ends] + 1  # a prompt ends in text: its three rows are equal
    return list(zip(torch.stack(kept).split(lengths, dim=3), hidden, following))


@dataclass
class Rows:
    """The samples in flight, as in the picture above. Tensors stay where they are for CUDA
    graphs."""

    cache: torch.Tensor  # (L, 2, n, Hkv, X, D)
    hidden: torch.Tensor  # (n, C) output at the last token: it predicts the next one
    tokens: torch.Tensor  # (n,) the last token
    lengths: torch.Tensor  # (n,) filled entries of the cache
    positions: torch.Tensor  # (n,) rotary position of the token that is fed next
    drawn: torch.Tensor  # (n,) how many tokens were drawn
    uniforms: torch.Tensor  # (n, T) random numbers
    owners: list  # per row: (number of the prompt, place in its K, Sample), or None


def new_rows(model, n, entries, max_tokens):
    """n empty rows. Zeros, since what no row sees has weight 0, and 0 * NaN would be NaN."""
    text = model.config.text_config
    head = text.hidden_size // text.num_attention_heads
    zeros = model.lm_head.weight.new_zeros  # on the model's device, in its dtype
    return Rows(
        zeros(text.num_hidden_layers, 2, n, text.num_key_value_heads, entries, head),
        zeros(n, text.hidden_size),
        *zeros(4, n, dtype=torch.long),
        zeros(n, max_tokens, dtype=torch.float64),
        [None] * n,
    )


def keep_rows(rows, alive):
    """Only the rows of the list `alive`."""
    return Rows(
        rows.cache[:, :, alive],
        rows.hidden[alive],
        rows.tokens[alive],
        rows.lengths[alive],
        rows.positions[alive],
        rows.drawn[alive],
        rows.uniforms[alive],
        [rows.owners[row] for row in alive],
    )


def decode(model, rows, longest):
    """Feed each row its last token, which becomes entry `lengths` of its cache -> (n, C).

    Args: longest: entries of the cache that are looked at. Nothing here asks the device for a
    value, so it can run in a CUDA graph.
    """
    cache, lengths = rows.cache, rows.lengths
    n = torch.arange(len(lengths), device=lengths.device)
    entries = torch.arange(longest, device=lengths.device)
    visible = (entries <= lengths[:, None])[:, None, None]  # (n, 1, 1, longest)

    def attend(i, q, k, v):
        cache[i, 0][n, :, lengths] = k
        cache[i, 1][n, :, lengths] = v
        keys, values = cache[i, :, :, :, :longest]  # (n, Hkv, longest, D) each
        # the heads that share a key are queries of it
        grouped = q.view(len(q), k.shape[1], -1, k.shape[2])  # (n, Hkv, H / Hkv, D)
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=visible)
        return out.reshape(len(q), -1)

    x = model.model.language_model.embed_tokens(rows.tokens)
    return run_layers(model, x, rows.positions.expand(3, -1), attend)


@functools.cache
def graph_memory():
    """The memory of all graphs of this process."""
    return torch.cuda.graph_pool_handle()


def decode_in_graph(model, rows, longest, graphs):
    """decode inside a CUDA graph, captured once for each `longest`: one launch, not thousands.

    The graph reads and writes the rows' own tensors; decoding a step twice changes nothing. The
    graphs share their memory: what one has put out is read before the next one runs. Other threads,
    that fetch pictures or watch over NCCL, may use the device during a capture.
    """
    if longest not in graphs:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # capture wants libraries that have been used before
            decode(model, rows, longest)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        pool = graph_memory()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            hidden = decode(model, rows, longest)
        graphs[longest] = graph, hidden
    graph, hidden = graphs[longest]
    graph.replay()
    return hidden


def choose(model, rows, banned, temperature):
    """The next token of every row (n,), and its log-probability (n,)."""
    logprobs = log_softmax_banned(model.lm_head(rows.hidden), banned, temperature or 1.0)  # (n, V)
    if temperature:
        uniforms = rows.uniforms.gather(1, rows.drawn[:, None]).squeeze(1)
        tokens = draw(logprobs, uniforms)
    else:
        tokens = logprobs.argmax(dim=1)
    return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1)


def note(rows, tokens, logprobs, end_of_turn):
    """Note the tokens (n,) and their log-probabilities; returns the rows that ended by them."""
    ended = []
    for row, (token, logprob) in enumerate(zip(tokens.tolist(), logprobs.tolist())):
        if rows.owners[row] is None:
            continue
        _, _, one = rows.owners[row]
        one.tokens.append(token)
        one.logprobs.append(logprob)
        one.finished = token == end_of_turn
        if one.finished or len(one.tokens) == rows.uniforms.shape[1]:
            ended.append(row)
    return ended


def step(model, rows, tokens, longest, fixed, graphs):
    """Feed the tokens (n,); afterwards `hidden` predicts the next ones.

    Args: longest: entries of the longest row, the new token's included; fixed, graphs: with `fixed`
    shapes change seldom, and on CUDA a graph is replayed.
    """
    rows.tokens.copy_(tokens)
    if fixed:
        power = 1 << (longest - 1).bit_length()  # the next power of 2
        longest = min(max(STRIDE, power), rows.cache.shape[4])
    if fixed and rows.tokens.is_cuda:
        rows.hidden = decode_in_graph(model, rows, longest, graphs)
    else:
        rows.hidden = decode(model, rows, longest)
    rows.lengths += 1
    rows.positions += 1
    rows.drawn += 1


def admit(model, rows, row, prompts, features, waiting, prefilled, seeds):
    """Start the next waiting sample in a row, after prefilling its prompt, together with those
    behind it, where that has not been done."""
    number, index, _ = rows.owners[row] = waiting.popleft()
    if number not in prefilled:
        batch = []
        tokens = 0
        for prompt in prompts[number : number + len(rows.owners)]:
            tokens += len(prompt.ids)
            if batch and tokens > PREFILL_TOKENS:
                break
            batch.append(prompt)
        prefilled.clear()  # all samples of the prompts before have started
        prefilled.update(enumerate(prefill(model, batch, features), number))
    keys_values, rows.hidden[row], rows.positions[row] = prefilled[number]
    size = len(prompts[number].ids)
    rows.cache[:, :, row, :, :size] = keys_values
    rows.lengths[row] = size
    rows.uniforms[row] = uniform_stream(seeds[number], index, rows.uniforms.shape[1])


@torch.inference_mode()
def sample(
    model,
    prompts,
    features,
    k,
    max_tokens,
    temperature,
    end_of_turn,
    seeds,
    max_rows=128,
    fixed=None,
):
    """Sample k responses to each prompt; a generator of (number of the prompt, place in its k,
    Sample), each as it ends, so that it can be judged beside the others (`in_order` waits for all).

    Args: prompts: list of Prompt; features: of encode_images, with all their images; max_tokens:
    longest response; temperature: 0 takes the most likely token (its log-probability is then the
    one at temperature 1); end_of_turn: the id that ends a response and belongs to it; seeds: one
    int per prompt, from which its sample j draws a stream of its own; max_rows: samples in flight;
    fixed: shapes that change seldom, in a CUDA graph where there is CUDA (None: on CUDA only).
    The samples are the same for any order of prompts and any max_rows, up to rounding. Raises
    ValueError on arguments that make no sense.
    """
    if len(seeds) != len(prompts) or min(k, max_tokens, max_rows) < 1 or temperature < 0:
        raise ValueError(
            f"{len(prompts)} prompts and {len(seeds)} seeds, k={k}, max_tokens={max_tokens}, "
            f"max_rows={max_rows}, temperature={temperature}"
        )
    waiting = deque()  # future owners of a row
    for number in range(len(prompts)):
        waiting.extend((number, index, Sample([], [], False)) for index in range(k))
    fixed = model.device.type == "cuda" if fixed is None else fixed
    banned = torch.tensor(banned_token_ids(model), device=model.device)
    entries = max((len(prompt.ids) for prompt in prompts), default=0) + max_tokens
    rows = new_rows(model, min(max_rows, len(waiting)), entries, max_tokens)
    prefilled, graphs = {}, {}
    ended = list(range(len(rows.owners)))  # rows that are free
    with cast_adapters(model):
        while waiting or any(rows.owners):
            # a row that stays free is decoded too: counting from 0, it is never ahead of the others
            rows.lengths[ended] = 0
            rows.drawn[ended] = 0
            for row in ended[: len(waiting)]:
                admit(model, rows, row, prompts, features, waiting, prefilled, seeds)
            alive = [row for row, owner in enumerate(rows.owners) if owner]
            if not fixed and len(alive) <= 0.75 * len(rows.owners):  # those that ended leave
                rows = keep_rows(rows, alive)
            # hidden predicts the token that choose draws; step feeds it
            tokens, logprobs = choose(model, rows, banned, temperature)
            longest = 1 + rows.lengths.max().item()
            ended = note(rows, tokens, logprobs, end_of_turn)
            for row in ended:
                yield rows.owners[row]
                rows.owners[row] = None
            if any(rows.owners):
                step(model, rows, tokens, longest, fixed, graphs)


def in_order(stream, prompts, k):
    """What a generator of (number of the prompt, place in its k, value) yields, when all are there:
    for each of the prompts the list of its k values."""
    values = [[None] * k for _ in prompts]
    for number, place, value in stream:
        values[number][place] = value
    return values


# ---- SaFeR-VLM: reflect and correct (PAPERS 2.3) -------------------------------------------------


@dataclass(eq=False)  # two trajectories with equal words are still two
class Trajectory:
    """A response in its context, as it is judged and trained: a first one, or a correction."""

    prompt: Prompt  # the context
    tokens: list[int]  # (R,) what the loss is on
    logprobs: list[float]  # (R,) of the tokens in this context, at the sampling temperature
    finished: bool
    check: protocol.Check  # of the response; in a correction not of the reflection before it
    corrects: "Trajectory | None" = None
    reflection: str | None = None  # of a correction, what stands before it in its tags
    grades: object = None  # judge.Scores or judge.Grades; None where the judge failed
    reward: object = None  # reward.Reward, or None: it trains nothing
    advantage: float = 0.0


def split_reflection(text):
    """`<reflection> ... </reflection> response` -> (reflection, response).

    (None, text) when it does not begin so: nothing is cut away, and the judge reads the whole turn.
    """
    before, opened, rest = text.partition("<reflection>")
    reflection, closed, response = rest.partition("</reflection>")
    if before.strip() or not opened or not closed:
        return None, text
    return reflection.strip(), response.lstrip()


def respond(config, model, processor, prompts, plans, features, k, temperature, seeds):
    """`sample`, decoded and checked: a generator of (number, place, Trajectory), each as it ends.

    Args: config: of it max_response and rollout_rows; plans: what each prompt states, or None.
    """
    sampled = sample(
        model,
        prompts,
        features,
        k,
        config.max_response,
        temperature,
        processor.end_of_turn,
        seeds,
        config.rollout_rows,
    )
    for number, place, one in sampled:
        checked = protocol.check(decode_response(one.tokens, processor), plans[number])
        prompt = prompts[number]
        yield number, place, Trajectory(prompt, one.tokens, one.logprobs, one.finished, checked)


def correct(config, model, processor, trajectories, features, seeds):
    """One more turn for each of these trajectories, all together: the request, then the policy's
    reflection and its new response (PAPERS 2.3; the request, and both in one turn, are ours).

    Args: trajectories: may be none; seeds: one each; the others as in `respond`.
    Yields (number, 0, Trajectory), each as it ends: prompt is the chat so far, tokens are
    reflection and response.
    """
    prompts = []
    plans = []
    for before in trajectories:
        chat = continue_prompt(before.prompt, before.tokens, REFLECTION_REQUEST, processor)
        prompts.append(chat)
        plans.append(before.check.plan)
    temperature = config.temperature
    turns = respond(config, model, processor, prompts, plans, features, 1, temperature, seeds)
    for number, place, turn in turns:
        turn.corrects = trajectories[number]
        turn.reflection, text = split_reflection(turn.check.text)
        if turn.reflection is not None:
            turn.check = protocol.check(text, plans[number])
        yield number, place, turn


def first_of(trajectory):
    """The first response that a correction goes back to."""
    while trajectory.corrects is not None:
        trajectory = trajectory.corrects
    return trajectory


def as_first_response(correction, processor):
    """A correction as if it had been the first response (credit = prompt; ours): under the first
    prompt, without reflection. It was not sampled there, so `logprobs` is empty until the caller
    has computed them (safer.credit_prompt).

    One that was cut at max_tokens ends in no end-of-turn token, since none was sampled.
    """
    tokens = encode_response(correction.check.text, processor)
    if not correction.finished:
        tokens.pop()
    return replace(correction, prompt=first_of(correction).prompt, tokens=tokens, logprobs=[])

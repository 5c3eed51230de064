"""Sampling: K answers per prompt, with their log-probabilities, from the same forward pass that training runs; and the second turn of
SaFeR-VLM's rollout, in which the policy reflects on an unsafe answer and corrects it (`correct`, at the end).

A prompt is prefilled once and its keys and values are kept once; its K samples attend to them by folding into the query dimension.
Every sample has a preallocated cache of its own for the tokens it writes. Rows that finish leave at once and waiting samples take
their place, so the linear layers only ever see live rows. Temperature is the only transform: no top-k, top-p or penalty exists here,
and no generation config is read. Each sample draws from its own stream of random numbers, so what it says does not depend on
which other samples stand beside it.

Letters in shapes: n live rows, m live prompts (slots), W most rows of one slot, K samples per prompt, L layers, H heads,
Hkv key/value heads, D head size, P longest prompt, T most new tokens, V vocabulary.
"""

import hashlib
import math
from collections import deque
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

import data
from model import banned_token_ids, forward_packed, log_softmax_banned, pack_groups, packed_attention, run_layers, take

OWN_STRIDE = 64  # new tokens by which the fixed shapes of a decoding step grow
PREFILL_TOKENS = 4096  # prompt tokens that go through the model together


@dataclass(frozen=True)
class Sample:
    """One sampled response."""

    tokens: list[int]  # with the end-of-turn token when finished
    logprobs: list[float]  # of each token, at the sampling temperature
    finished: bool  # False: cut at max_tokens


@dataclass
class State:
    """All rows and prompts in flight. Live rows are 0..n-1 and live slots 0..m-1, so every step works on slices, never on gathers."""

    prompt_cache: torch.Tensor  # (L, 2, slots, Hkv, P, D) keys and values of each prompt
    own_cache: torch.Tensor  # (L, 2, rows, Hkv, T, D) keys and values of each row's own tokens
    prompt_lengths: torch.Tensor  # (slots,)
    prompt_hidden: torch.Tensor  # (slots, C) output at the prompt's last token: it predicts a response's first
    prompt_next: torch.Tensor  # (slots,) rotary position of a response's first token
    slot: torch.Tensor  # (rows,) the prompt that a row continues
    lengths: torch.Tensor  # (rows,) tokens drawn so far
    uniforms: torch.Tensor  # (rows, T) a row's random numbers
    tokens: torch.Tensor  # (rows, T)
    logprobs: torch.Tensor  # (rows, T)
    owner: list  # per row: (prompt, sample)
    prompt: list  # per slot: which prompt
    started: list  # per slot: samples started
    finished: list  # per slot: samples finished
    n: int = 0
    m: int = 0


def new_state(model, rows, slots, prompt_length, max_tokens):
    """Empty caches. Zeros, not uninitialised: a hidden key has weight 0, and 0 * NaN would be NaN."""
    text, device, dtype = model.config.text_config, model.device, model.dtype
    shape = text.num_key_value_heads, text.hidden_size // text.num_attention_heads
    integers = dict(dtype=torch.long, device=device)
    return State(
        prompt_cache=torch.zeros(text.num_hidden_layers, 2, slots, shape[0], prompt_length, shape[1], device=device, dtype=dtype),
        own_cache=torch.zeros(text.num_hidden_layers, 2, rows, shape[0], max_tokens, shape[1], device=device, dtype=dtype),
        prompt_lengths=torch.zeros(slots, **integers), prompt_hidden=torch.zeros(slots, text.hidden_size, device=device, dtype=dtype),
        prompt_next=torch.zeros(slots, **integers), slot=torch.zeros(rows, **integers), lengths=torch.zeros(rows, **integers),
        uniforms=torch.zeros(rows, max_tokens, dtype=torch.float64, device=device), tokens=torch.zeros(rows, max_tokens, **integers),
        logprobs=torch.zeros(rows, max_tokens, device=device), owner=[None] * rows,
        prompt=[0] * slots, started=[0] * slots, finished=[0] * slots)


def uniform_stream(seed, index, count):
    """`count` uniforms in [0, 1) (float64) of sample `index` under a prompt's seed; the same on every machine, batch and rank."""
    digest = hashlib.sha256(f"{seed}:{index}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.rand(count, generator=generator, dtype=torch.float64)


def draw(logprobs, uniforms):
    """Inverse-CDF sampling: logprobs (n, V), uniforms (n,) in [0, 1) -> ids (n,). A token of probability 0 is never drawn."""
    cdf = logprobs.double().exp().cumsum(dim=1)  # (n, V)
    # the factor keeps u * total below total whatever the rounding; right=True steps over tokens that add nothing to the sum
    point = uniforms * (1 - 2.0**-40) * cdf[:, -1]
    return torch.searchsorted(cdf, point[:, None], right=True).squeeze(1)


def attend_part(q, keys, values, absent):
    """Softmax attention over one part of the keys, with the log of its normaliser, by which parts are joined exactly.

    Args: q (b, M, D); keys, values (b, X, D); absent: (b, 1, X) bool, True where there is no key, or None.
    Returns output (b, M, D) and log-sum-exp (b, M, 1), both float32.
    """
    if q.is_cuda and q.dtype != torch.float32:  # scores rounded to bfloat16 would set the sampler apart from the trainer
        scores = torch.bmm(q, keys.transpose(1, 2), out_dtype=torch.float32)
    else:
        scores = torch.bmm(q, keys.transpose(1, 2)).float()
    scores *= q.shape[-1] ** -0.5  # (b, M, X)
    if absent is not None:
        scores.masked_fill_(absent, -math.inf)
    peak = scores.amax(dim=-1, keepdim=True)  # (b, M, 1)
    weights = scores.sub_(peak).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    return torch.bmm(weights.to(values.dtype), values).float() / total, total.log() + peak


def absent_keys(lengths, longest, heads):
    """(n,) lengths -> (n * heads, 1, longest) bool, True beyond each length; None where nothing is padded and asking costs nothing."""
    absent = torch.arange(longest, device=lengths.device) >= lengths[:, None]  # (n, longest)
    if not absent.is_cuda and not absent.any():  # on CUDA the question would wait for the device, and has no place in a graph
        return None
    return absent.repeat_interleave(heads, dim=0)[:, None]


def exact_sizes(state):
    """What decode works on: live rows, live slots, longest own part, longest prompt, most rows of one slot."""
    width = int(torch.bincount(state.slot[: state.n]).max())
    return state.n, state.m, int(state.lengths[: state.n].max()), int(state.prompt_lengths[: state.m].max()), width


def fixed_sizes(state, k):
    """The same, rounded up to what does not change from step to step: all rows, all slots, the own part in strides of 64 tokens."""
    rows, slots, longest = len(state.owner), len(state.prompt), state.own_cache.shape[4]
    own = min(longest, -(-int(state.lengths[: state.n].max()) // OWN_STRIDE) * OWN_STRIDE)
    return rows, slots, own, state.prompt_cache.shape[4], min(k, rows)


def decode(model, state, n, m, own_longest, prompt_longest, width):
    """Feed every row its last token. Returns the hidden states (n, C) that predict the next ones.

    Args: sizes as exact_sizes or fixed_sizes give them. Rows beyond the live ones have length 0: they are computed and mean nothing.
    Nothing in here asks the device for a value, so that with fixed sizes it can run inside a CUDA graph.
    """
    lengths, slot = state.lengths[:n], state.slot[:n]
    live, at = lengths > 0, (lengths - 1).clamp(min=0)
    kv_heads = state.own_cache.shape[3]
    absent_own = absent_keys(lengths.clamp(min=1), own_longest, kv_heads)
    absent_prompt = absent_keys(state.prompt_lengths[:m].clamp(min=1), prompt_longest, kv_heads)
    # a row's place among the rows of its prompt: they fold into one query dimension, so a prompt's keys are read once for all
    same = (slot[:, None] == slot) & live  # (n, n)
    place = same.tril(-1).sum(dim=1)
    fold = torch.where(live, slot * width + place, m * width)  # (n,) rows that mean nothing share one place more
    rows = torch.arange(n, device=slot.device)

    def attend(i, q, k, v):
        rep, dim = q.shape[1] // kv_heads, q.shape[2]
        state.own_cache[i, 0][rows, :, at] = k
        state.own_cache[i, 1][rows, :, at] = v
        keys, values = state.own_cache[i, :, :n, :, :own_longest].flatten(1, 2)  # (n * Hkv, longest, D) each
        own, own_total = attend_part(q.reshape(n * kv_heads, rep, dim), keys, values, absent_own)
        folded = q.new_zeros(m * width + 1, kv_heads, rep, dim).index_copy_(0, fold, q.view(n, kv_heads, rep, dim))[:-1]
        folded = folded.view(m, width, kv_heads, rep, dim).transpose(1, 2).reshape(m * kv_heads, width * rep, dim)
        keys, values = state.prompt_cache[i, :, :m, :, :prompt_longest].flatten(1, 2)  # (m * Hkv, P, D) each
        shared, shared_total = attend_part(folded, keys, values, absent_prompt)
        joined = torch.cat([shared, shared_total], dim=2).view(m, kv_heads, width, rep, dim + 1).transpose(1, 2)
        joined = joined.reshape(m * width, kv_heads, rep, dim + 1).index_select(0, fold.clamp(max=m * width - 1))  # (n, Hkv, rep, D + 1)
        shared, shared_total = joined[..., :dim], joined[..., dim:]
        weight = torch.sigmoid(own_total.view(n, kv_heads, rep, 1) - shared_total)
        return shared.lerp(own.view(n, kv_heads, rep, dim), weight).to(q.dtype).reshape(n, -1)

    x = model.model.language_model.embed_tokens(state.tokens[rows, at])
    positions = (state.prompt_next[slot] + at).expand(3, n)
    return run_layers(model, x, positions, attend)


def decode_in_graph(model, state, sizes, graphs):
    """decode with fixed sizes inside a CUDA graph, captured once for each set of sizes: one launch instead of hundreds.

    The graph reads and writes the state's own tensors, which stay where they are; running decode twice on a state changes nothing.
    """
    if sizes not in graphs:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # capture wants libraries that have been used before
            for _ in range(2):
                decode(model, state, *sizes)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            hidden = decode(model, state, *sizes)
        graphs[sizes] = graph, hidden
    graph, hidden = graphs[sizes]
    graph.replay()
    return hidden


def prefill(model, state, prompts, indices, features):
    """Run prompts once, several together, into the next free slots."""
    packed = pack_groups(model, [(prompts[index], []) for index in indices], features)
    first, last = state.m, state.m + len(indices)

    def attend(packed, i, q, k, v):
        for kind, tensor in enumerate((k, v)):
            state.prompt_cache[i, kind, first:last, :, :packed.trunk.shape[1]] = take(tensor, packed.trunk)  # (G, Hkv, P, D)
        return packed_attention(packed, i, q, k, v)

    lengths = torch.tensor([len(prompts[index].ids) for index in indices], device=state.slot.device)
    ends = lengths.cumsum(0) - 1
    state.prompt_lengths[first:last] = lengths
    state.prompt_hidden[first:last] = forward_packed(model, packed, attend=attend, keep=ends)  # (G, C)
    state.prompt_next[first:last] = packed.positions[0, ends] + 1  # a prompt ends in text, where the three rows are equal
    state.prompt[first:last] = indices
    state.started[first:last] = state.finished[first:last] = [0] * len(indices)
    state.m = last


def admit(model, state, prompts, waiting, features, k, seeds):
    """Fill free rows with samples that wait, prefilling as many further prompts as the free rows ask for and the free slots take."""
    free = len(state.owner) - state.n
    pending = sum(k - started for started in state.started[:state.m])
    wanted = min(-(-(free - pending) // k), len(state.prompt) - state.m, len(waiting))
    while wanted > 0:
        batch, tokens = [], 0
        while wanted > 0 and (not batch or tokens + len(prompts[waiting[0]].ids) <= PREFILL_TOKENS):
            tokens += len(prompts[waiting[0]].ids)
            batch.append(waiting.popleft())
            wanted -= 1
        prefill(model, state, prompts, batch, features)
    for slot in range(state.m):
        while state.started[slot] < k and state.n < len(state.owner):
            row, index = state.n, state.started[slot]
            state.owner[row] = (state.prompt[slot], index)
            state.slot[row], state.lengths[row] = slot, 0
            state.uniforms[row] = uniform_stream(seeds[state.prompt[slot]], index, state.uniforms.shape[1])
            state.started[slot] += 1
            state.n += 1


def fill_holes(alive, count):
    """Which of the entries 0..count-1 move where, so that the living ones become 0..len-1: (movers, holes), of equal length."""
    living = sum(alive)
    return [i for i in range(living, count) if alive[i]], [i for i in range(living) if not alive[i]]


def retire(state, done, k):
    """Take finished rows out, and prompts that have no sample left; the last live ones move into the holes."""
    longest = int(state.lengths[:state.n].max())
    slots = state.slot[:state.n].tolist()
    for row, finished in enumerate(done):
        state.finished[slots[row]] += finished
    movers, holes = fill_holes([not finished for finished in done], state.n)
    if movers:
        state.own_cache[:, :, holes, :, :longest] = state.own_cache[:, :, movers, :, :longest]
        for tensor in (state.slot, state.lengths, state.uniforms, state.tokens, state.logprobs):
            tensor[holes] = tensor[movers]
        for mover, hole in zip(movers, holes):
            state.owner[hole] = state.owner[mover]
    state.n -= sum(done)
    state.lengths[state.n:] = 0
    alive = [finished < k for finished in state.finished[:state.m]]
    movers, holes = fill_holes(alive, state.m)
    if movers:
        for tensor in (state.prompt_lengths, state.prompt_hidden, state.prompt_next):
            tensor[holes] = tensor[movers]
        state.prompt_cache[:, :, holes] = state.prompt_cache[:, :, movers]
        for mover, hole in zip(movers, holes):
            for values in (state.prompt, state.started, state.finished):
                values[hole] = values[mover]
            state.slot[:state.n][state.slot[:state.n] == mover] = hole
    state.m = sum(alive)


@torch.inference_mode()
def sample(model, prompts, features, k, max_tokens, temperature, eos_id, seeds, max_rows=128, progress=False, fixed=None):
    """Sample k responses to each prompt.

    Args: prompts: list[data.Prompt]; features: of encode_images, with every image of the prompts; max_tokens: longest response;
    temperature: 0 takes the most likely token (its log-probability is then the one at temperature 1); eos_id: ends a response and
    belongs to it; seeds: one int per prompt, from which sample j of a prompt draws its own stream; max_rows: samples in flight;
    fixed: decode with shapes that do not change, in a CUDA graph where there is CUDA (None: on CUDA only).
    Returns per prompt a list of k Sample. The same samples for any order of prompts and any max_rows, up to rounding.
    Raises ValueError on arguments that make no sense, naming them.
    """
    if len(seeds) != len(prompts) or min(k, max_tokens, max_rows) < 1 or temperature < 0:
        raise ValueError(f"{len(prompts)} prompts need as many seeds (got {len(seeds)}); k={k}, max_tokens={max_tokens} and "
                         f"max_rows={max_rows} must be at least 1, temperature={temperature} at least 0")
    if not prompts:
        return []
    max_rows = min(max_rows, len(prompts) * k)
    # twice the prompts that fill the rows: stragglers of a few prompts must not keep new ones out
    slots = min(len(prompts), 2 * -(-max_rows // k))
    state = new_state(model, max_rows, slots, max(len(prompt.ids) for prompt in prompts), max_tokens)
    banned = torch.tensor(banned_token_ids(model), device=model.device)
    waiting = deque(range(len(prompts)))
    results = [[None] * k for _ in prompts]
    hidden, graphs = state.prompt_hidden[:0], {}
    fixed = state.lengths.is_cuda if fixed is None else fixed
    bar = tqdm(total=len(prompts) * k, desc="sampling", disable=not progress)
    while True:
        before = state.n
        admit(model, state, prompts, waiting, features, k, seeds)
        n = state.n
        if n == 0:
            break
        hidden = torch.cat([hidden, state.prompt_hidden[state.slot[before:n]]])  # (n, C)
        logprobs = log_softmax_banned(model.lm_head(hidden), banned, temperature or 1.0)  # (n, V)
        rows, at = torch.arange(n, device=hidden.device), state.lengths[:n]
        token = draw(logprobs, state.uniforms[rows, at]) if temperature else logprobs.argmax(dim=1)  # (n,)
        state.tokens[rows, at] = token
        state.logprobs[rows, at] = logprobs.gather(1, token[:, None]).squeeze(1)
        state.lengths[:n] += 1
        done = ((token == eos_id) | (state.lengths[:n] == max_tokens)).tolist()
        if any(done):
            for row in (row for row in range(n) if done[row]):
                prompt, index = state.owner[row]
                length = int(state.lengths[row])
                tokens = state.tokens[row, :length].tolist()
                results[prompt][index] = Sample(tokens, state.logprobs[row, :length].tolist(), tokens[-1] == eos_id)
            bar.update(sum(done))
            retire(state, done, k)
        if state.n == 0:
            hidden = hidden[:0]
        elif not fixed:
            hidden = decode(model, state, *exact_sizes(state))
        elif state.lengths.is_cuda:
            hidden = decode_in_graph(model, state, fixed_sizes(state, k), graphs)[: state.n]
        else:
            hidden = decode(model, state, *fixed_sizes(state, k))[: state.n]
    bar.close()
    return results


# ---- SaFeR-VLM: reflect and correct (PAPERS 2.3) -------------------------------------------------


@dataclass(eq=False)  # two trajectories with equal words are still two
class Trajectory:
    """A response in its context, as it is judged and trained: a first answer, or the correction of one."""

    prompt: data.Prompt  # the context
    tokens: list[int]  # (T,) what the loss is on
    logprobs: list[float] | None  # (T,) of the tokens in this context, by the sampler; None when they were sampled in another one
    finished: bool
    text: str  # what the judge reads: the response; of a correction not the reflection before it
    corrects: "Trajectory | None" = None
    reflected: bool = False  # a correction with a reflection before it, in its tags
    grades: object = None  # judge.Scores or judge.Grades; None where the judge failed
    reward: object = None  # reward.Reward, or None: it trains nothing
    advantage: float = 0.0


def split_reflection(text):
    """`<reflection> ... </reflection> response` -> (reflection, response), whatever white space comes first; (None, text) when it does not
    begin so: then nothing is cut away, and the judge reads the whole turn."""
    start, end = "<reflection>", "</reflection>"
    begins, stop = text.lstrip().startswith(start), text.find(end)
    if not begins or stop < 0:
        return None, text
    return text[text.find(start) + len(start):stop].strip(), text[stop + len(end):].lstrip()


def correct(model, processor, trajectories, features, request, max_tokens, temperature, seeds, max_rows):
    """One more turn for each of these trajectories, all together: the request, then the policy's reflection and its new response
    (PAPERS 2.3; the request, and both in one turn, are ours).

    Args: trajectories: N, none is fine; features: as in sample, of their prompts; request: text of the user's turn; max_tokens: of
    reflection and response together; seeds: N ints; temperature, max_rows: as in sample.
    Returns N Trajectory: prompt is the chat so far, tokens are reflection and response, text is the response alone.
    """
    prompts = [data.continue_prompt(item.prompt, item.tokens, request, processor) for item in trajectories]
    sampled = sample(model, prompts, features, 1, max_tokens, temperature, processor.end_of_turn, seeds, max_rows)
    corrections = []
    for before, prompt, (turn,) in zip(trajectories, prompts, sampled):
        reflection, text = split_reflection(data.decode_response(turn.tokens, processor))
        corrections.append(Trajectory(prompt, turn.tokens, turn.logprobs, turn.finished, text, before, reflection is not None))
    return corrections


def first_of(trajectory):
    """The first answer that a correction goes back to."""
    while trajectory.corrects is not None:
        trajectory = trajectory.corrects
    return trajectory


def as_first_answer(correction, processor):
    """A correction as if it had been the first answer (credit = prompt; ours): under the first prompt, without reflection. It was not
    sampled there, so its log-probabilities have to be computed.

    One that was cut at max_tokens ends in no end-of-turn token: none was sampled. Its text, encoded anew, may be longer than it was."""
    tokens = data.encode_response(correction.text, processor)
    return replace(correction, prompt=first_of(correction).prompt, tokens=tokens if correction.finished else tokens[:-1], logprobs=None)

"""Qwen2.5-VL: LoRA by hand, a forward over packed groups, token log-probabilities.

transformers holds the weights and runs the vision tower, with window_attention in it. The language
model's forward is written out here over those weights (`decoder_layer`, `run_layers`); training and
sampling call the same layers with an attention of their own, and their log-probabilities agree up
to rounding.

A *group* is one prompt and its K responses. Groups are laid end to end without padding; each prompt
is there once, and its responses follow, at positions that continue the prompt's:

    row        0  1  2  3  4 | 5  6 | 7  8  9 | 10 ...
    token      p0 p1 p2 p3 p4| a0 a1| b0 b1 b2| next group
    position   0  1  2  3  4 | 5  6 | 5  6  7 | 0  ...

    sees       p: p up to itself      a: all of p, a up to itself      b: all of p, b up to itself
    predicts   p4 -> a0 and b0        a0 -> a1, a1 -> a2               b0 -> b1, b1 -> b2, b2 -> b3

The last token of a response (a2, b3) is only predicted, so it is no input. This is exact, and on
the prompt K times cheaper than K separate rows (ours; neither paper describes its training layout).

Letters in shapes: N packed tokens, C hidden size, H heads, Hkv key/value heads, D head size,
V vocabulary, K responses per group, S responses in all, P prompt length, R response length, T
longest response of a batch, M response tokens in all.
"""

import contextlib
import math
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint as recompute
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

TARGETS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
LOGPROB_CHUNK = 1024  # response tokens whose logits exist at one time
PIECE = 512  # rows of a response that attend in one call: of a longer one half is in vain
TOWER_PATCHES = 16384  # patches that go through the vision tower together


class ModelError(RuntimeError):
    """A model folder or a file of tensors that cannot be used, and why."""


# ---- loading -------------------------------------------------------------------------------------


def load_model(folder, dtype, device):
    """Load Qwen2.5-VL from a folder or a hub name: safetensors only, eval mode, every weight
    frozen.

    Args: dtype: torch.float32 or torch.bfloat16.
    Raises ModelError: no config, no weights, another architecture, missing tensors.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
        if config.model_type != "qwen2_5_vl":
            raise ValueError(f"it is a {config.model_type} model, not qwen2_5_vl")
        rope = config.text_config.rope_parameters.get("rope_type", "default")
        if config.text_config.use_sliding_window or rope != "default":
            raise ValueError("no sliding window or scaled position is computed here")
        model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="sdpa",
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:  # no name, network, JSON
        raise ModelError(f"{folder}: cannot be loaded: {error}") from error
    # transformers fills what a file lacks with random numbers and only warns
    wrong = [*info["missing_keys"], *map(str, info["mismatched_keys"])]
    if wrong:
        raise ModelError(
            f"{folder}: {len(wrong)} tensors are missing or have another shape: {sorted(wrong)[:3]}"
        )
    for block in model.model.visual.blocks:
        block.attn.forward = partial(window_attention, block.attn)
    return model.to(device).eval().requires_grad_(False)


def banned_token_ids(model):
    """Ids that no response may hold: image and video pad, vision start and end, sorted.

    A sampled image pad makes the next forward pass count more pads than features.
    """
    config = model.config
    pads = {config.image_token_id, config.video_token_id}
    return sorted(pads | {config.vision_start_token_id, config.vision_end_token_id})


# ---- LoRA ----------------------------------------------------------------------------------------


class LoRALinear(nn.Module):
    """A frozen linear map with a low-rank update: y = x W^T + bias + (alpha / r) (x A^T) B^T.

             +--> W (out, in), frozen -------------------+
        x ---|                                           (+)--> y
             +--> A (r, in) --> * alpha/r --> B (out, r) +

    A and B are float32 and multiply in x's dtype. A starts Gaussian with variance 1 / in, B at
    zero: at the start y is the base's. Source: LoRA (Hu et al. 2021), section 4.1.
    """

    def __init__(self, base, r, alpha, generator):
        super().__init__()
        self.base = base
        self.scale = alpha / r
        self.off = 0  # blocks of adapters_off that we are inside of
        device = base.weight.device
        start = torch.randn(r, base.in_features, generator=generator) / math.sqrt(base.in_features)
        self.A = nn.Parameter(start.to(device))  # (r, in)
        self.B = nn.Parameter(torch.zeros(base.out_features, r, device=device))  # (out, r)
        self.cast = None  # of the first of maps that share their input, inside cast_adapters

    def forward(self, x):
        """x (..., in) -> (..., out), as transformers' own forward calls it."""
        (y,) = project(x.flatten(0, -2), self)
        return y.unflatten(0, x.shape[:-1])

    def merged(self):
        """W with the update, (out, in), added in float32 and cast once."""
        weight = self.base.weight
        return (weight.float() + self.scale * (self.B @ self.A)).to(weight.dtype)


def scaled_adapters(maps, dtype):
    """(A of all maps (maps * r, in), scaled, [B^T (r, out) of each]), in a dtype."""
    a = torch.cat([one.A * one.scale for one in maps])
    return a.to(dtype), [one.B.to(dtype).t() for one in maps]


def project(x, *maps):
    """The outputs (N, out) of linear maps, LoRALinear or plain, that share their input x (N, in):
    their products with A are one product. Few kernels a token is what decoding lives on."""
    if not isinstance(maps[0], LoRALinear):
        return [one(x) for one in maps]
    outputs = [one.base(x) for one in maps]
    if maps[0].off:
        return outputs
    a, bs = maps[0].cast or scaled_adapters(maps, x.dtype)
    lows = F.linear(x, a).chunk(len(maps), dim=1)  # (N, r) each
    return [torch.addmm(y, low, b) for y, low, b in zip(outputs, lows, bs)]


def shared_inputs(layer):
    """The linear maps of a decoder layer, those that share an input together."""
    attention, mlp = layer.self_attn, layer.mlp
    return [
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [attention.o_proj],
        [mlp.gate_proj, mlp.up_proj],
        [mlp.down_proj],
    ]


def lora_layers(model):
    """name -> LoRALinear, in the order of the layers; empty when no adapter is attached."""
    modules = model.named_modules()
    return {name: module for name, module in modules if isinstance(module, LoRALinear)}


def attach_lora(model, r, alpha, seed):
    """Wrap the language model's seven linear maps of every layer; freeze everything else.

    Args: alpha: the update is scaled by alpha / r; seed: of A's start values, on every device
    alike.
    Raises ModelError when adapters are attached already.
    """
    if lora_layers(model):
        raise ModelError("adapters are attached already; merge_lora(model) first")
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for layer in model.model.language_model.layers:
        for target in TARGETS:
            parent, leaf = target.split(".")
            module = getattr(layer, parent)
            setattr(module, leaf, LoRALinear(getattr(module, leaf), r, alpha, generator))


def lora_parameters(model):
    """name -> Parameter for every A and B; these and nothing else train."""
    parameters = {}
    for name, layer in lora_layers(model).items():
        parameters[f"{name}.A"] = layer.A
        parameters[f"{name}.B"] = layer.B
    return parameters


@contextlib.contextmanager
def adapters_off(model):
    """Inside the block the model is the base, that is, the reference policy. Nests."""
    layers = lora_layers(model).values()
    for layer in layers:
        layer.off += 1
    try:
        yield
    finally:
        for layer in layers:
            layer.off -= 1


@contextlib.contextmanager
def cast_adapters(model):
    """Inside the block A and B are cast and scaled once, not at every call: sampling calls often.
    For use without gradients."""
    layers = model.model.language_model.layers if lora_layers(model) else []
    families = [maps for layer in layers for maps in shared_inputs(layer)]
    for maps in families:
        maps[0].cast = scaled_adapters(maps, maps[0].base.weight.dtype)
    try:
        yield
    finally:
        for maps in families:
            maps[0].cast = None


@torch.no_grad()
def merge_lora(model):
    """Fold every adapter into its weight, W <- W + (alpha / r) B A, in float32, and remove it.

    Raises ModelError when an adapter with a nonzero B would leave its weight as it is: the update
    is below the resolution of the weight's dtype.
    """
    for name, layer in lora_layers(model).items():
        weight = layer.base.weight
        merged = layer.merged()
        if layer.B.any() and torch.equal(merged, weight):
            raise ModelError(
                f"{name}: merging would change no weight in {weight.dtype}; "
                "the adapter is too small, or merge in float32"
            )
        weight.copy_(merged)
        parent, leaf = name.rsplit(".", 1)
        setattr(model.get_submodule(parent), leaf, layer.base)


# ---- batches -------------------------------------------------------------------------------------


def fill_batches(items, cost, budget):
    """Lists of items, in their order, whose costs add up to the budget at most; a larger one is
    alone."""
    batches = []
    filled = 0
    for item in items:
        if not batches or filled + cost(item) > budget:
            batches.append([])
            filled = 0
        batches[-1].append(item)
        filled += cost(item)
    return batches


def micro_batches(groups, token_budget):
    """Split groups into micro-batches of at most token_budget packed tokens, like lengths together.

    Returns lists of indices into groups, each once. A group over the budget is alone: never cut.
    """

    def tokens(index):
        prompt, responses = groups[index]
        return len(prompt.ids) + sum(map(len, responses))

    return fill_batches(sorted(range(len(groups)), key=tokens), tokens, token_budget)


# ---- images --------------------------------------------------------------------------------------


def window_attention(attention, hidden_states, cu_seqlens, position_embeddings, **_):
    """The forward of an attention of the vision tower, x (n, C) -> (n, C), with one call for all
    windows of a length; transformers makes one for each, thousands for a photograph.

    Args: cu_seqlens: (windows + 1,) where each window begins, and the end.
    """
    n = len(hidden_states)
    parts = attention.qkv(hidden_states).view(n, 3, attention.num_heads, -1)
    q, k, v = parts.unbind(1)  # (n, H, D) each
    q, k = apply_rotary_pos_emb_vision(q, k, *position_embeddings)
    lengths = cu_seqlens.diff()
    out = torch.empty_like(q)
    for length in lengths.unique().tolist():
        starts = cu_seqlens[:-1][lengths == length]
        rows = starts[:, None] + torch.arange(length, device=starts.device)  # (windows, length)
        qkv = [x[rows].transpose(1, 2) for x in (q, k, v)]  # (windows, H, length, D) each
        out[rows] = F.scaled_dot_product_attention(*qkv, scale=attention.scaling).transpose(1, 2)
    return attention.proj(out.view(n, -1))


def encode_images(model, images, grad=False):
    """Image features, each distinct image once.

    Args: images: data.Image, repeats allowed; grad: keep the graph, only to train a vision tower.
    Returns dict: image key -> (n_tokens, C), n_tokens = prod(grid) / merge_size^2, tower's dtype.
    """
    tower = model.model.visual
    distinct = {image.key: image for image in images}.values()
    features = {}
    for batch in fill_batches(distinct, lambda image: len(image.patches), TOWER_PATCHES):
        grids = torch.tensor([image.grid for image in batch], device=tower.device)
        pixels = torch.cat([image.patches for image in batch]).to(tower.device, tower.dtype)
        with torch.set_grad_enabled(grad):
            out = tower(pixels, grid_thw=grids).pooler_output  # (all tokens, C)
        sizes = [math.prod(image.grid) // tower.spatial_merge_size**2 for image in batch]
        for image, part in zip(batch, out.split(sizes)):
            features[image.key] = part.clone()  # a view would keep the whole batch alive
    return features


# ---- positions -----------------------------------------------------------------------------------


def text_positions(start, count):
    """Rotary positions (3, count) of text that begins at `start`: the same in all three rows."""
    return start + torch.arange(count).expand(3, -1)


def rope_positions(ids, grids, image_token_id, merge_size):
    """Three-row rotary positions of one prompt (Qwen2.5-VL's mRoPE: temporal, height, width).

    Text counts up by one in all rows. An image that starts at position s gives its token (t, h, w)
    the positions (s + t, s + h, s + w); the text after it goes on at s + max(rows, columns).

    Args: ids: (P,) ints; grids: (t, h, w) in patches for each image; merge_size: patches per token
    along a side. Returns (LongTensor (3, P), next position). Raises ValueError unless there are as
    many pads as the grids have tokens.
    """
    ids = list(ids)
    sizes = [math.prod(grid) // merge_size**2 for grid in grids]
    if ids.count(image_token_id) != sum(sizes):
        raise ValueError(f"{ids.count(image_token_id)} image pads for images of {sizes} tokens")
    parts = []
    done = 0  # tokens that have their position
    position = 0
    for (frames, high, wide), size in zip(grids, sizes):
        start = ids.index(image_token_id, done)
        parts.append(text_positions(position, start - done))  # the text before the image
        position += start - done
        rows, columns = high // merge_size, wide // merge_size
        axes = torch.meshgrid(*map(torch.arange, (frames, rows, columns)), indexing="ij")
        parts.append(position + torch.stack(axes).flatten(1))  # (3, size)
        position += max(rows, columns)
        done = start + size
    rest = len(ids) - done
    parts.append(text_positions(position, rest))
    return torch.cat(parts, dim=1), position + rest


def rope_tables(model, positions, dtype):
    """cos and sin (N, 1, D) of positions (3, N): sections of the frequencies take turns between the
    three rows (mRoPE)."""
    text = model.config.text_config
    dim = text.hidden_size // text.num_attention_heads
    steps = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim
    wavelengths = text.rope_parameters["rope_theta"] ** steps  # (D / 2,)
    angles = positions[..., None].float() / wavelengths  # (3, N, D / 2)
    sections = angles.split(list(text.rope_parameters["mrope_section"]), dim=-1)
    angles = torch.cat([section[i % 3] for i, section in enumerate(sections)], dim=-1)  # (N, D / 2)
    cos, sin = angles.cos(), angles.sin()
    cos = torch.cat([cos, cos], dim=-1)[:, None]  # (N, 1, D)
    sin = torch.cat([-sin, sin], dim=-1)[:, None]  # signed: see rotate
    return cos.to(dtype), sin.to(dtype)


def rotate(x, cos, sin):
    """Rotary embedding of x (N, H, D): (a, b) -> (a cos - b sin, b cos + a sin) of its halves."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def normalize(norm, x):
    """RMS norm of x (N, C), in one call."""
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


# ---- the language model's forward ----------------------------------------------------------------


def decoder_layer(layer, x, cos, sin, attend, keep=None):
    """One decoder layer on flat tokens x (N, C) -> (N, C), or (M, C) with only the rows of `keep`.

    attend: takes q (N, H, D), k and v (N, Hkv, D) and returns (N, H * D).
    """
    qkv_maps, o_map, mlp_maps, down_map = shared_inputs(layer)
    heads = (len(x), -1, cos.shape[-1])
    q, k, v = [y.view(heads) for y in project(normalize(layer.input_layernorm, x), *qkv_maps)]
    out = attend(rotate(q, cos, sin), rotate(k, cos, sin), v)  # (N, H * D)
    if keep is not None:
        x = x.index_select(0, keep)
        out = out.index_select(0, keep)
    x = x + project(out, *o_map)[0]
    gate, up = project(normalize(layer.post_attention_layernorm, x), *mlp_maps)
    return x + project(F.silu(gate) * up, *down_map)[0]


def run_layers(model, x, positions, attend, checkpoint=False, keep=None):
    """All decoder layers and the final norm, the same for training, prefill and decoding.

    Args: x: (N, C) embedded tokens; positions: (3, N); attend(i, q, k, v): the attention of layer
    i;
    checkpoint: recompute each layer in the backward pass instead of keeping its activations; keep:
    (M,) the rows whose output is wanted, None for all. Returns (N, C) or (M, C).
    """
    cos, sin = rope_tables(model, positions, x.dtype)
    layers = model.model.language_model.layers
    for i, layer in enumerate(layers):
        # the last layer's MLP only runs on rows that are read: of a prompt, that is one
        rows = keep if i == len(layers) - 1 else None
        step = partial(decoder_layer, layer, cos=cos, sin=sin, attend=partial(attend, i), keep=rows)
        if checkpoint and torch.is_grad_enabled():
            # the reentrant form loses LoRA gradients: the first layer's input needs none
            x = recompute(step, x, use_reentrant=False, preserve_rng_state=False)
        else:
            x = step(x)
    return normalize(model.model.language_model.norm, x)


@dataclass(frozen=True)
class Packed:
    """Groups laid end to end, as in the picture at the top of this file."""

    ids: torch.Tensor  # (N,)
    positions: torch.Tensor  # (3, N)
    features: torch.Tensor | None  # (I, C) of all images, in the order of their pads
    # a sequence is a prompt or a piece of a response; in order they are all rows
    rows: list  # of each sequence, how many rows
    seen: list  # and how many keys it sees: its prompt's, its response's so far, its own
    row_ends: torch.Tensor  # (1 + sequences,) their running sums, from 0 on
    seen_ends: torch.Tensor
    keys: torch.Tensor  # (sum of seen,) which rows the keys are of
    predict: torch.Tensor  # (M,) the row whose output predicts each response token
    targets: torch.Tensor  # (M,) the response tokens
    lengths: list  # (S,) tokens of each response


def pack_groups(model, groups, features):
    """Lay out groups for one forward pass -> Packed on the model's device.

    Args: groups: list of (Prompt, K lists of token ids), K may be 0 (a prefill); features: of
    encode_images. Raises ValueError when pads and features do not match.
    """
    config = model.config
    merge = config.vision_config.spatial_merge_size
    ids, positions, images = [], [], []
    rows, seen, keys = [], [], []
    predict, targets, lengths = [], [], []
    for prompt, responses in groups:
        grids = [image.grid for image in prompt.images]
        shown, following = rope_positions(prompt.ids, grids, config.image_token_id, merge)
        shared = range(len(ids), len(ids) + len(prompt.ids))
        ids += prompt.ids
        positions.append(shown)
        images += [features[image.key] for image in prompt.images]
        rows.append(len(shared))
        seen.append(len(shared))
        keys += shared
        for response in responses:
            fed = response[:-1]
            own = range(len(ids), len(ids) + len(fed))
            # the prompt's last row predicts the first token of each response
            predict += [shared[-1], *own][: len(response)]  # none for an empty response
            targets += response
            lengths.append(len(response))
            ids += fed
            positions.append(text_positions(following, len(fed)))
            for start in range(0, len(own), PIECE):
                piece = own[start : start + PIECE]
                rows.append(len(piece))
                seen.append(len(shared) + start + len(piece))
                keys += [*shared, *own[: start + len(piece)]]
    as_tensor = partial(torch.tensor, dtype=torch.long, device=model.device)

    def ends(counts):
        return as_tensor([0, *accumulate(counts)]).int()

    return Packed(
        as_tensor(ids),
        torch.cat(positions, dim=1).to(model.device),
        torch.cat(images) if images else None,
        rows,
        seen,
        ends(rows),
        ends(seen),
        as_tensor(keys),
        as_tensor(predict),
        as_tensor(targets),
        lengths,
    )


def has_kernel(x):
    """Whether varlen_attn, one call for sequences of all lengths, takes x: in 16 bits, on GPUs from
    the A100's generation on."""
    if not x.is_cuda or x.dtype != torch.bfloat16:
        return False
    return torch.cuda.get_device_capability(x.device) >= (8, 0)


def group_attention(packed, i, q, k, v):
    """Each prompt attends causally to itself, each response to its prompt and itself; no padding,
    no masks.

    Args: q (N, H, D); k, v (N, Hkv, D); the layer i does not matter here. Returns (N, H * D).
    """
    k = k.index_select(0, packed.keys)  # (sum of seen, Hkv, D)
    v = v.index_select(0, packed.keys)
    if has_kernel(q):
        ends = packed.row_ends, packed.seen_ends, max(packed.rows), max(packed.seen)
        return varlen_attn(q, k, v, *ends, window_size=(-1, 0), enable_gqa=True).flatten(1)
    outputs = []
    splits = q.split(packed.rows), k.split(packed.seen), v.split(packed.seen)
    for own, *shown in zip(*splits):
        # as above, the first of R queries sees the first P + 1 of P + R keys
        causal = causal_lower_right(len(own), len(shown[0]))
        heads = [x.transpose(0, 1)[None] for x in (own, *shown)]  # (1, H or Hkv, rows, D)
        out = F.scaled_dot_product_attention(*heads, attn_mask=causal, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs).flatten(1)


def forward_packed(model, packed, checkpoint=False, attend=None, keep=None):
    """Hidden states (N, C) of packed groups after the final norm, or (M, C) of the rows `keep`.

    The sampler hands in an `attend` that also stores keys and values.
    """
    x = model.model.language_model.embed_tokens(packed.ids)
    if packed.features is not None:
        pads = (packed.ids == model.config.image_token_id).nonzero().squeeze(1)
        x = x.index_copy(0, pads, packed.features.to(x.dtype))
    attend = attend or partial(group_attention, packed)
    return run_layers(model, x, packed.positions, attend, checkpoint, keep)


# ---- log-probabilities ---------------------------------------------------------------------------


def log_softmax_banned(logits, banned, temperature):
    """Log-probabilities, float32, with the banned ids at -inf. Sampler and trainer both call this.

    Args: logits: (..., V), left as they are; banned: LongTensor of ids; temperature > 0.
    """
    scaled = (logits.float() / temperature).index_fill_(-1, banned, -math.inf)
    return scaled.log_softmax(-1)


def head_logprobs(lm_head, hidden, targets, banned, temperature, entropy):
    """Log-probabilities (n,) of targets (n,) after hidden states (n, C), and on request their
    entropy (n,), without gradient."""
    logprobs = log_softmax_banned(lm_head(hidden), banned, temperature)  # (n, V)
    picked = logprobs.gather(1, targets[:, None]).squeeze(1)
    if not entropy:
        return (picked,)
    with torch.no_grad():
        return picked, torch.special.entr(logprobs.exp()).sum(1)


def token_logprobs(model, groups, features, temperature=1.0, checkpoint=False, entropy=False):
    """Log-probability of every response token, at the sampling temperature, vision tokens excluded.

    Args: groups: list of (Prompt, K lists of ids); features: of encode_images; checkpoint:
    recompute layers in the backward pass. No tensor of (positions, V) larger than (LOGPROB_CHUNK,
    V) is made.
    Returns logprobs (S, T) float32, 0 where padded, and mask (S, T) bool, from lengths; with
    entropy=True also the entropy (S, T) in nats, without gradient. S counts all responses in order.
    """
    packed = pack_groups(model, groups, features)
    hidden = forward_packed(model, packed, checkpoint, keep=packed.predict)  # (M, C)
    banned = torch.tensor(banned_token_ids(model), device=hidden.device)
    several = len(hidden) > LOGPROB_CHUNK and torch.is_grad_enabled()
    chunks = []
    for rows, targets in zip(hidden.split(LOGPROB_CHUNK), packed.targets.split(LOGPROB_CHUNK)):
        step = partial(head_logprobs, model.lm_head, rows, targets, banned, temperature, entropy)
        # a single chunk may keep its (n, V); of several each is made again in the backward pass
        chunks.append(recompute(step, use_reentrant=False) if several else step())

    def pad(values):
        """(M,) -> (S, T)"""
        return pad_sequence(values.split(packed.lengths), batch_first=True)

    mask = pad(torch.ones_like(packed.targets, dtype=torch.bool))
    logprobs, *entropies = [pad(torch.cat(parts)) for parts in zip(*chunks)]
    return logprobs, mask, *entropies

"""Qwen2.5-VL: LoRA by hand, shared-prefix forward, token log-probabilities.

transformers holds the weights and runs the vision tower. The language model's forward is written out here over those weights
(`decoder_layer`, `run_layers`); training and sampling call the same functions, so a rollout's log-probabilities are the trainer's.

A *group* is one prompt and its K responses. Groups are packed end to end, without padding: each prompt stands once, its K
responses follow, each seeing the prompt and itself, at positions that continue the prompt's. That is exact, and K times cheaper
on the prompt than K separate rows (ours; neither paper describes its training layout).

Letters in shapes: N packed tokens, C hidden size, H heads, Hkv key/value heads, D head size, V vocabulary, G groups,
K responses per group, S responses in all, P prompt length, R response length, T longest response of a batch.
"""

import contextlib
import json
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

TARGETS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
ADAPTER_FORMAT = "safer-lora-1"


class ModelError(RuntimeError):
    """A model folder or an adapter file that cannot be used, and what to do about it."""


# ---- loading ------------------------------------------------------------------------------------------------------------


def load_model(folder, dtype, device):
    """Load Qwen2.5-VL from a folder or a hub name: safetensors only, SDPA attention, eval mode, every weight frozen.

    Args: folder: path or hub name; dtype: torch.float32 or torch.bfloat16; device: what `.to` takes.
    Returns a Qwen2_5_VLForConditionalGeneration. Raises ModelError: no config, no weights, another architecture, missing tensors.
    """
    path = Path(folder)
    if path.exists() and not (path / "config.json").is_file():
        raise ModelError(f"{folder}: holds no config.json; expected a Qwen2.5-VL folder as save_pretrained writes it")
    if path.exists() and not list(path.glob("*.safetensors")):
        raise ModelError(f"{folder}: has a config.json but no *.safetensors; download the weights too")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:  # transformers' words for: no such name, no network, no JSON, unknown model type
        raise ModelError(f"{folder}: no usable config: {error}") from error
    if config.model_type != "qwen2_5_vl":
        raise ModelError(f"{folder}: holds a {config.model_type} model; this code runs qwen2_5_vl only")
    text = config.text_config
    if text.use_sliding_window or text.rope_parameters.get("rope_type", "default") != "default":
        raise ModelError(f"{folder}: uses sliding-window attention or scaled rotary positions, which this forward does not compute")
    try:
        model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa", use_safetensors=True, output_loading_info=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ModelError(f"{folder}: weights cannot be read: {error}") from error
    # transformers fills what a file lacks with random numbers and only warns
    wrong = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if wrong:
        raise ModelError(f"{folder}: {len(wrong)} tensors are missing or have another shape, first: {', '.join(wrong[:3])}")
    return model.to(device).eval().requires_grad_(False)


def banned_token_ids(model):
    """Ids that no response may hold: image and video pad, vision start and end. Takes a model or its config; sorted list of ints.

    A sampled image pad makes the next forward pass count more pads than features.
    """
    config = getattr(model, "config", model)
    return sorted({config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id})


# ---- LoRA ---------------------------------------------------------------------------------------------------------------


class LoRALinear(nn.Module):
    """A frozen linear map with a trainable low-rank update: y = x W^T + bias + (alpha / r) (x A^T) B^T.

             +--> W (out, in), frozen -------------------+
        x ---|                                           (+)--> y
             +--> A (r, in) --> * alpha/r --> B (out, r) +

    A and B are float32 and multiply in x's dtype. A starts Gaussian with variance 1 / in, B at zero: at the start y is the
    base's. Source: LoRA (Hu et al. 2021), section 4.1.
    """

    def __init__(self, base, r, alpha, generator):
        super().__init__()
        self.base = base
        self.scale = alpha / r
        self.on = True
        device = base.weight.device
        start = torch.randn(r, base.in_features, generator=generator) / math.sqrt(base.in_features)
        self.A = nn.Parameter(start.to(device))  # (r, in)
        self.B = nn.Parameter(torch.zeros(base.out_features, r, device=device))  # (out, r)

    def forward(self, x):
        y = self.base(x)
        if not self.on:
            return y
        low = F.linear(x, self.A.to(x.dtype)) * self.scale  # (..., r)
        return y + F.linear(low, self.B.to(x.dtype))

    def delta(self):
        """The update of W in float32, (out, in)."""
        return self.scale * (self.B.detach().float() @ self.A.detach().float())


def lora_layers(model):
    """name -> LoRALinear, in the order of the layers; empty when no adapter is attached."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def attach_lora(model, r, alpha, seed):
    """Wrap the language model's seven linear maps of every layer; freeze everything else. The vision tower is never touched.

    Args: r: rank; alpha: the update is scaled by alpha / r; seed: of A's start values (the same on every device).
    Returns the names of the wrapped maps. Raises ModelError when adapters are attached already.
    """
    if lora_layers(model):
        raise ModelError("adapters are attached already; merge_lora(model) first")
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    names = []
    for i, layer in enumerate(model.model.language_model.layers):
        for target in TARGETS:
            parent, leaf = target.split(".")
            module = getattr(layer, parent)
            setattr(module, leaf, LoRALinear(getattr(module, leaf), r, alpha, generator))
            names.append(f"model.language_model.layers.{i}.{target}")
    return names


def lora_parameters(model):
    """name -> Parameter for every A and B; these and nothing else train."""
    return {f"{name}.{leaf}": getattr(layer, leaf) for name, layer in lora_layers(model).items() for leaf in ("A", "B")}


@contextlib.contextmanager
def adapters_off(model):
    """Inside the block the model is the base, that is, the reference policy; afterwards each adapter is as it was before (nests)."""
    layers = list(lora_layers(model).values())
    before = [layer.on for layer in layers]
    try:
        for layer in layers:
            layer.on = False
        yield
    finally:
        for layer, on in zip(layers, before):
            layer.on = on


@torch.no_grad()
def merge_lora(model):
    """Fold every adapter into its weight, W <- W + (alpha / r) B A, added in float32 and cast once, and remove it.

    Returns how many were merged; a second call finds none and returns 0. Raises ModelError, before anything changes, when an
    adapter with a nonzero B would leave its weight as it is (the update is below the resolution of the weight's dtype).
    """
    layers = lora_layers(model)
    for name, layer in layers.items():
        weight = layer.base.weight
        if layer.B.any() and torch.equal((weight.float() + layer.delta()).to(weight.dtype), weight):
            raise ModelError(f"{name}: merging would change no weight in {weight.dtype}; the adapter is too small, or merge in float32")
    for name, layer in layers.items():
        weight = layer.base.weight
        weight.copy_((weight.float() + layer.delta()).to(weight.dtype))
        parent, leaf = name.rsplit(".", 1)
        setattr(model.get_submodule(parent), leaf, layer.base)
    return len(layers)


def save_adapter(model, path, metadata):
    """Write all A and B to a safetensors file, whole or not at all; rank, alpha and targets stand in its header.

    Tensors, float32: `model.language_model.layers.<i>.<target>.A` (r, in) and `.B` (out, r). metadata: the caller's dict, kept as JSON.
    """
    layers = lora_layers(model)
    if not layers:
        raise ModelError(f"{path}: the model has no adapter to save")
    first = next(iter(layers.values()))
    r = first.A.shape[0]
    header = json.dumps({"r": r, "alpha": first.scale * r, "targets": TARGETS, "metadata": metadata})
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in lora_parameters(model).items()}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    save_file(tensors, part, metadata={"format": ADAPTER_FORMAT, "header": header})
    part.replace(path)


def read_adapter(path):
    """Read an adapter file -> (tensors by name, header: r, alpha, targets, metadata). Raises ModelError on any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            written = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: no adapter file: {error}") from error
    if written.get("format") != ADAPTER_FORMAT:
        raise ModelError(f"{path}: format is {written.get('format')!r}, expected {ADAPTER_FORMAT!r}; save_adapter writes such files")
    return tensors, json.loads(written["header"])


@torch.no_grad()
def load_adapter(model, path):
    """Load an adapter file, attaching adapters of its rank and alpha when the model has none.

    Returns (message, metadata): "n of n tensors loaded, sum |B| = x" for the log, and what save_adapter was given.
    Raises ModelError, with no value loaded, on any missing, unexpected or differently shaped tensor, or another alpha.
    """
    tensors, header = read_adapter(path)
    if not lora_layers(model):
        attach_lora(model, header["r"], header["alpha"], seed=0)
    mine = lora_parameters(model)
    faults = [f"missing {name}" for name in mine.keys() - tensors.keys()] + [f"unexpected {name}" for name in tensors.keys() - mine.keys()]
    faults += [f"{name} is {tuple(tensors[name].shape)}, the model needs {tuple(mine[name].shape)}"
               for name in mine.keys() & tensors.keys() if tensors[name].shape != mine[name].shape]
    faults += [f"{name} has alpha / r = {layer.scale:g}, the file {header['alpha'] / header['r']:g}"
               for name, layer in lora_layers(model).items() if layer.scale != header["alpha"] / header["r"]]
    if faults:
        raise ModelError(f"{path}: {len(faults)} tensors do not fit this model, first: " + "; ".join(sorted(faults)[:3]))
    for name, parameter in mine.items():
        parameter.copy_(tensors[name])
    total = sum(tensor.abs().sum().item() for name, tensor in tensors.items() if name.endswith(".B"))
    return f"{len(tensors)} of {len(mine)} tensors loaded, sum |B| = {total:.6g}", header["metadata"]


# ---- images -------------------------------------------------------------------------------------------------------------


class FeatureCache(dict):
    """image key -> features, least recently used first; encode_images cuts it to max_bytes."""

    def __init__(self, max_bytes):
        super().__init__()
        self.max_bytes = max_bytes


def encode_images(model, images, cache=None, grad=False, max_patches=16384):
    """Image features, each distinct image once.

    Args: images: list[data.Image], repeats allowed; cache: a dict or FeatureCache that is read and filled; grad: keep the graph
    (only to train a vision tower; then no cache); max_patches: how many patches go through the tower together.
    Returns dict: image key -> (n_tokens, C), n_tokens = prod(grid) / merge_size^2, in the tower's dtype.
    """
    if grad and cache is not None:
        raise ValueError("features with a graph must not be cached: the graph is gone after one backward pass")
    tower = model.model.visual
    cache = {} if cache is None else cache
    images = list({image.key: image for image in images}.values())
    features = {image.key: cache.pop(image.key) for image in images if image.key in cache}
    batches, patches = [], 0
    for image in images:
        if image.key in features:
            continue
        if not batches or patches + len(image.patches) > max_patches:
            batches.append([])
            patches = 0
        batches[-1].append(image)
        patches += len(image.patches)
    for batch in batches:
        grids = torch.tensor([image.grid for image in batch], device=tower.device)
        with torch.set_grad_enabled(grad):
            pixels = torch.cat([image.patches for image in batch]).to(tower.device, tower.dtype)
            out = tower(pixels, grid_thw=grids).pooler_output  # (all tokens, C)
        sizes = [math.prod(image.grid) // tower.spatial_merge_size**2 for image in batch]
        for image, part in zip(batch, out.split(sizes)):
            features[image.key] = part if grad else part.clone()  # a view would keep the whole batch alive in the cache
    cache.update(features)  # at its end, as the most recently used
    while isinstance(cache, FeatureCache) and sum(part.nbytes for part in cache.values()) > cache.max_bytes:
        del cache[next(iter(cache))]
    return features


# ---- positions ----------------------------------------------------------------------------------------------------------


def rope_positions(ids, grids, image_token_id, merge_size):
    """Three-row rotary positions of one prompt (Qwen2.5-VL's mRoPE: temporal, height, width).

    Text counts up by one in all rows. An image that starts at position s gives its token (t, h, w) the positions
    (s + t, s + h, s + w); the text after it goes on at s + max(rows, columns).

    Args: ids: (T,) ints; grids: (t, h, w) in patches for each image, in order; merge_size: patches per token along a side.
    Returns (LongTensor (3, T), next_position: int). Raises ValueError when pads and grids do not match.
    """
    ids = torch.as_tensor(ids)
    pads = int((ids == image_token_id).sum())
    sizes = [math.prod(grid) // merge_size**2 for grid in grids]
    if pads != sum(sizes):
        raise ValueError(f"prompt has {pads} image pads, its {len(sizes)} images need {sum(sizes)} ({sizes})")
    parts, done, position = [], 0, 0
    is_pad = (ids == image_token_id).tolist()
    for (frames, high, wide), size in zip(grids, sizes):
        start = is_pad.index(True, done)
        if not all(is_pad[start:start + size]):
            raise ValueError(f"the image pads that start at token {start} are fewer than the {size} that grid {(frames, high, wide)} needs")
        parts.append(torch.arange(start - done).expand(3, -1) + position)  # (3, text before the image)
        position += start - done
        rows, cols = high // merge_size, wide // merge_size
        axes = torch.meshgrid(torch.arange(frames), torch.arange(rows), torch.arange(cols), indexing="ij")
        parts.append(torch.stack(axes).flatten(1) + position)  # (3, size)
        position += max(rows, cols)
        done = start + size
    parts.append(torch.arange(len(ids) - done).expand(3, -1) + position)
    return torch.cat(parts, dim=1), position + len(ids) - done


def rope_tables(model, positions, dtype):
    """cos and sin (N, 1, D) of positions (3, N): sections of the frequencies take turns between the three rows (mRoPE)."""
    text = model.config.text_config
    dim = text.hidden_size // text.num_attention_heads
    steps = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim
    angles = positions[..., None].float() / text.rope_parameters["rope_theta"] ** steps  # (3, N, D / 2)
    sections = angles.split(list(text.rope_parameters["mrope_section"]), dim=-1)
    angles = torch.cat([section[i % 3] for i, section in enumerate(sections)], dim=-1)  # (N, D / 2)
    angles = torch.cat([angles, angles], dim=-1)[:, None]  # (N, 1, D)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    """Rotary embedding of x (N, H, D)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


# ---- the language model's forward -----------------------------------------------------------------------------------------


def decoder_layer(layer, x, cos, sin, attend, keep=None):
    """One decoder layer on flat tokens x (N, C) -> (N, C), or (M, C) with only the M rows of `keep`.

    attend: takes q (N, H, D), k and v (N, Hkv, D) and returns (N, H * D).
    """
    attention, n, dim = layer.self_attn, len(x), cos.shape[-1]
    h = layer.input_layernorm(x)
    q = rotate(attention.q_proj(h).view(n, -1, dim), cos, sin)  # (N, H, D)
    k = rotate(attention.k_proj(h).view(n, -1, dim), cos, sin)  # (N, Hkv, D)
    v = attention.v_proj(h).view(n, -1, dim)  # (N, Hkv, D)
    out = attend(q, k, v)
    if keep is not None:
        x, out = x.index_select(0, keep), out.index_select(0, keep)
    x = x + attention.o_proj(out)
    return x + layer.mlp(layer.post_attention_layernorm(x))


def run_layers(model, x, positions, attend, checkpoint=False, keep=None):
    """All decoder layers and the final norm, the same for training, prefill and decoding.

    Args: x: (N, C) embedded tokens; positions: (3, N); attend(i, q, k, v): the attention of layer i; checkpoint: recompute each
    layer in the backward pass instead of keeping its activations; keep: (M,) the rows whose output is wanted, None for all.
    Returns (N, C) or (M, C).
    """
    cos, sin = rope_tables(model, positions, x.dtype)
    keep_graph = checkpoint and torch.is_grad_enabled()
    layers = model.model.language_model.layers
    for i, layer in enumerate(layers):
        # the last layer's MLP only runs on rows that are read: of a prompt, that is one
        step = partial(decoder_layer, layer, cos=cos, sin=sin, attend=partial(attend, i), keep=keep if i == len(layers) - 1 else None)
        # reentrant checkpointing loses LoRA gradients, because the first layer's input needs none
        x = recompute(step, x, use_reentrant=False, preserve_rng_state=False) if keep_graph else step(x)
    return model.model.language_model.norm(x)


@dataclass(frozen=True)
class Packed:
    """Groups laid end to end: first all trunks, then all branches.

    A trunk is what is attended causally as one sequence: a prompt, or a prompt with its response where K = 1. A branch is one of
    K > 1 responses: it sees its prompt and itself. The last token of a response is only ever predicted, so it is no input.
    """

    ids: torch.Tensor  # (N,)
    positions: torch.Tensor  # (3, N)
    image_rows: torch.Tensor  # (I,) rows whose embedding is an image feature
    image_features: torch.Tensor | None  # (I, C)
    trunk: torch.Tensor  # (G, L) rows of each trunk, right-padded with row 0
    branch: torch.Tensor | None  # (B, R) rows of each branch, right-padded with row 0
    branch_keys: torch.Tensor | None  # (B, P + R) rows that a branch attends to
    branch_mask: torch.Tensor | None  # (B or 1, 1, rep * R, P + R) True where a query sees a key
    unpad: torch.Tensor  # (N,) where each row's attention output stands in the padded outputs
    predict: torch.Tensor  # (M,) the row whose output predicts each response token, in the order of the responses
    targets: torch.Tensor  # (M,) the response tokens
    lengths: tuple[int, ...]  # (S,) of the responses


def spans(starts, lengths):
    """Rows start..start+length of each span as (index (n, L) right-padded with 0, inside (n, L) bool)."""
    starts, lengths = torch.tensor(starts), torch.tensor(lengths)
    offset = torch.arange(int(lengths.max()))
    inside = offset < lengths[:, None]
    return torch.where(inside, starts[:, None] + offset, 0), inside


def pack_groups(model, groups, features):
    """Lay out groups for one forward pass.

    Args: groups: list of (Prompt, K lists of token ids); features: dict of encode_images with every image of the prompts.
    Returns a Packed on the model's device. A group without responses is its prompt alone (the sampler's prefill).
    Raises ValueError when image pads and features do not match, or when a response holds a banned token.
    """
    config = model.config
    merge = config.vision_config.spatial_merge_size
    banned = set(banned_token_ids(config))
    trunks, trunk_positions, image_parts, branches, branch_positions, owners = [], [], [], [], [], []
    for prompt, responses in groups:
        if any(banned.intersection(response) for response in responses):
            raise ValueError(f"a response holds one of the vision tokens {sorted(banned)}; no sampler or data set may make those")
        positions, following = rope_positions(prompt.ids, [image.grid for image in prompt.images], config.image_token_id, merge)
        tail = list(responses[0][:-1]) if len(responses) == 1 else []
        trunks.append([*prompt.ids, *tail])
        trunk_positions += [positions, torch.arange(len(tail)).expand(3, -1) + following]
        image_parts += [features[image.key] for image in prompt.images]
        for response in responses if len(responses) > 1 else []:
            branches.append(list(response[:-1]))
            branch_positions.append(torch.arange(len(branches[-1])).expand(3, -1) + following)
            owners.append(len(trunks) - 1)
    starts = [0]
    for piece in trunks + branches:
        starts.append(starts[-1] + len(piece))
    branch_starts = starts[len(trunks):-1]
    ids = torch.tensor([token for piece in trunks + branches for token in piece])
    trunk, inside = spans(starts[:len(trunks)], [len(piece) for piece in trunks])
    unpad = inside.flatten().nonzero().squeeze(1)
    branch = branch_keys = branch_mask = None
    if any(branches):
        branch, inside = spans(branch_starts, [len(piece) for piece in branches])
        unpad = torch.cat([unpad, trunk.numel() + inside.flatten().nonzero().squeeze(1)])
        prompt_keys, visible = spans([starts[owner] for owner in owners], [len(trunks[owner]) for owner in owners])
        branch_keys = torch.cat([prompt_keys, branch], dim=1)  # (B, P + R)
        if visible.all():
            visible = visible[:1]  # one mask for all
        r, rep = branch.shape[1], config.text_config.num_attention_heads // config.text_config.num_key_value_heads
        own = torch.ones(len(visible), r, r, dtype=torch.bool).tril()
        branch_mask = torch.cat([visible[:, None].expand(-1, r, -1), own], dim=2).repeat(1, rep, 1)[:, None]
    predict, targets, lengths, used = [], [], [], 0
    for g, (prompt, responses) in enumerate(groups):
        last = starts[g] + len(prompt.ids) - 1
        for response in responses:
            first = last + 1 if len(responses) == 1 else branch_starts[used]
            used += len(responses) > 1
            predict += ([last] + list(range(first, first + len(response) - 1)))[:len(response)]
            targets += response
            lengths.append(len(response))
    image_rows = (ids[:starts[len(trunks)]] == config.image_token_id).nonzero().squeeze(1)
    packed = Packed(ids, torch.cat(trunk_positions + branch_positions, dim=1), image_rows, torch.cat(image_parts) if image_parts else None,
                    trunk, branch, branch_keys, branch_mask, unpad, torch.tensor(predict, dtype=torch.long),
                    torch.tensor(targets, dtype=torch.long), tuple(lengths))
    return replace(packed, **{name: value.to(model.device) for name, value in vars(packed).items() if isinstance(value, torch.Tensor)})


def take(x, index):
    """x (N, H, D) at index (n, L) -> (n, H, L, D)."""
    return x.index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2)


def packed_attention(packed, i, q, k, v):
    """Attention of packed groups: causal over the trunks, then each branch over its prompt and itself. Layer i does not matter here.

    Args: q (N, H, D), k and v (N, Hkv, D). Returns (N, H * D).
    Right padding needs no mask in the causal part: a padded key comes after every real query.
    """
    rep = q.shape[1] // k.shape[1]
    # repeated heads rather than enable_gqa: as fast on CPU, and on CUDA not every kernel takes grouped heads
    out = F.scaled_dot_product_attention(take(q, packed.trunk), take(k, packed.trunk).repeat_interleave(rep, 1),
                                         take(v, packed.trunk).repeat_interleave(rep, 1), is_causal=True)  # (G, H, L, D)
    out = out.transpose(1, 2).reshape(-1, q.shape[1] * q.shape[2])  # (G * L, H * D)
    if packed.branch is not None:
        b, r = packed.branch.shape
        # the heads that share a key/value head become further queries of it: no key is repeated, and every masked kernel takes it
        queries = take(q, packed.branch).reshape(b, k.shape[1], rep * r, -1)  # (B, Hkv, rep * R, D)
        keys, values = take(k, packed.branch_keys), take(v, packed.branch_keys)  # (B, Hkv, P + R, D)
        mine = F.scaled_dot_product_attention(queries, keys, values, attn_mask=packed.branch_mask)
        mine = mine.reshape(b, q.shape[1], r, -1).transpose(1, 2).reshape(b * r, -1)  # (B * R, H * D)
        out = torch.cat([out, mine])
    return out.index_select(0, packed.unpad)


def embed(model, packed):
    """Token embeddings with the image features in the place of the pads, (N, C)."""
    x = model.model.language_model.embed_tokens(packed.ids)
    if packed.image_features is None:
        return x
    return x.index_copy(0, packed.image_rows, packed.image_features.to(x.dtype))


def forward_packed(model, packed, checkpoint=False, attend=packed_attention, keep=None):
    """Hidden states (N, C) of packed groups after the final norm, or (M, C) of the rows `keep`.

    The sampler hands in an `attend` that also stores keys and values.
    """
    return run_layers(model, embed(model, packed), packed.positions, partial(attend, packed), checkpoint, keep)


# ---- log-probabilities ----------------------------------------------------------------------------------------------------


def log_softmax_banned(logits, banned, temperature):
    """Log-probabilities at a temperature, with the banned ids at -inf before normalising; float32. `logits` is left as it is.

    Args: logits: (..., V); banned: LongTensor of ids; temperature > 0. Returns (..., V). Sampler and trainer both call this.
    """
    return (logits.float() / temperature).index_fill_(-1, banned, -math.inf).log_softmax(-1)


def head_logprobs(lm_head, hidden, targets, banned, temperature, entropy):
    """Log-probabilities (n,) of the targets (n,) after hidden states (n, C); with entropy=True also the entropy (n,), without gradient."""
    logprobs = log_softmax_banned(lm_head(hidden), banned, temperature)  # (n, V)
    picked = logprobs.gather(1, targets[:, None]).squeeze(1)
    if not entropy:
        return (picked,)
    with torch.no_grad():
        return picked, torch.special.entr(logprobs.exp()).sum(1)


def token_logprobs(model, groups, features, temperature=1.0, chunk=1024, checkpoint=False, entropy=False):
    """Log-probability of every response token, at the sampling temperature, vision tokens excluded.

    Args: groups: list of (Prompt, K lists of ids); features: of encode_images; chunk: positions that go through lm_head together:
    no tensor of (positions, V) larger than (chunk, V) is made, forward or backward; checkpoint: recompute layers in backward.
    Returns logprobs (S, T) float32, 0 where padded, and mask (S, T) bool, from lengths; with entropy=True also the
    entropy (S, T) in nats, without gradient. S counts all responses of all groups in their order.
    """
    packed = pack_groups(model, groups, features)
    hidden = forward_packed(model, packed, checkpoint, keep=packed.predict)  # (M, C)
    banned = torch.tensor(banned_token_ids(model), device=hidden.device)
    parts = []
    for rows, targets in zip(hidden.split(chunk), packed.targets.split(chunk)):
        step = partial(head_logprobs, model.lm_head, rows, targets, banned, temperature, entropy)
        # a single chunk may keep its (n, V); of several each is made again in backward
        several = len(hidden) > chunk and torch.is_grad_enabled()
        parts.append(recompute(step, use_reentrant=False, preserve_rng_state=False) if several else step())
    lengths = torch.tensor(packed.lengths, device=hidden.device)
    mask = torch.arange(max(packed.lengths, default=0), device=hidden.device) < lengths[:, None]  # (S, T)
    rows = mask.flatten().nonzero().squeeze(1)
    padded = [torch.zeros(mask.numel(), device=hidden.device).index_copy(0, rows, torch.cat(part)).view_as(mask) for part in zip(*parts)]
    return (padded[0], mask, *padded[1:])


def micro_batches(groups, token_budget):
    """Split groups into micro-batches of at most token_budget packed tokens, like lengths together.

    Returns lists of indices into groups, each index once. A group over the budget stands alone: it is never cut.
    """
    costs = [len(prompt.ids) + sum(len(response) for response in responses) for prompt, responses in groups]
    batches, filled = [], 0
    for index in sorted(range(len(groups)), key=lambda index: (costs[index], index)):
        if not batches or filled + costs[index] > token_budget:
            batches.append([])
            filled = 0
        batches[-1].append(index)
        filled += costs[index]
    return batches

"""A tiny random Qwen2.5-VL, prompts with images, and transformers' own forward over them."""

import random
from functools import lru_cache

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from data import Image, Prompt
from model import attach_lora, encode_images, lora_layers

VOCAB, EOS, IMAGE, VIDEO, VISION_START, VISION_END = 300, 290, 295, 296, 297, 298
BANNED = [IMAGE, VIDEO, VISION_START, VISION_END]
# 4, 8 and 18 tokens; the last one spans several windows of the vision tower
GRIDS = {"small": (1, 4, 4), "wide": (1, 4, 8), "tall": (1, 12, 6)}


@lru_cache
def tiny_config():
    """Two layers, hidden size 64, 4 heads over 2 key/value heads."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    text = dict(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters=rope,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    vision = dict(
        depth=2,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        out_hidden_size=64,
        fullatt_block_indexes=[1],
    )
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )


def tiny_model(seed=0, dtype=torch.float32):
    """A fresh random model, its distributions far from flat: a wrong position or mask shows."""
    torch.manual_seed(seed)
    config = tiny_config()
    config._attn_implementation = "sdpa"
    model = Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
            elif parameter.abs().sum() == 0:
                parameter.normal_(std=0.3)  # biases
    return model.to(dtype).eval().requires_grad_(False)


@lru_cache
def image(name):
    """An image of random patches."""
    _, high, wide = GRIDS[name]
    generator = torch.Generator().manual_seed(high)
    patches = torch.randn(high * wide, 3 * 2 * 14 * 14, generator=generator)
    return Image(name, patches, GRIDS[name])


def words(count, seed):
    """`count` ordinary token ids."""
    rng = random.Random(seed)
    return [rng.randrange(EOS) for _ in range(count)]


def prompt(seed=0, text=9, images=()):
    """Text, then each image between vision start and end, with text after it."""
    ids = words(text, seed)
    for number, item in enumerate(images):
        pads = len(item.patches) // 4
        ids += [VISION_START] + [IMAGE] * pads + [VISION_END]
        ids += words(3, seed + 50 + number)
    return Prompt(tuple(ids), tuple(images))


def prompts():
    """Three prompts with 0, 1 and 2 images of different sizes."""
    pair = (image("tall"), image("small"))
    return [prompt(1, 12), prompt(2, 5, (image("wide"),)), prompt(3, 4, pair)]


def as_transformers(item, response=()):
    """What transformers' forward and generate want of a prompt and a response."""
    ids = torch.tensor([[*item.ids, *response]])
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found["mm_token_type_ids"] = (ids == IMAGE).int()
    if item.images:
        found["pixel_values"] = torch.cat([picture.patches for picture in item.images])
        found["image_grid_thw"] = torch.tensor([picture.grid for picture in item.images])
    return found


def reference_logprobs(model, item, response, temperature=1.0):
    """transformers' own forward -> log-probabilities (R + 1, V), the vision tokens taken out, of
    every response token and the one after it."""
    model.model.rope_deltas = None  # state that an earlier call left
    logits = model(**as_transformers(item, response)).logits[0, len(item.ids) - 1 :].float()
    logits[:, BANNED] = -torch.inf
    return (logits / temperature).log_softmax(1)


def features_of(model, items):
    """Image features of these prompts."""
    return encode_images(model, sum([item.images for item in items], ()))


def with_lora(model, r=4, alpha=8, scale=0.1):
    """Attach adapters and give B values, so that A has a gradient too."""
    attach_lora(model, r, alpha, seed=0)
    generator = torch.Generator().manual_seed(1)
    for layer in lora_layers(model).values():
        layer.B.data = scale * torch.randn(layer.B.shape, generator=generator)
    return model

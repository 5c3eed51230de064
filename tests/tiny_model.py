"""A tiny random Qwen2.5-VL, prompts with images, and transformers' own forward over them."""

import random
import sys
from functools import lru_cache
from pathlib import Path

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import Image, Prompt  # noqa: E402

VOCAB, EOS, IMAGE, VIDEO, VISION_START, VISION_END = 300, 290, 295, 296, 297, 298
BANNED = [IMAGE, VIDEO, VISION_START, VISION_END]
# 4, 8 and 18 tokens; the last one spans several windows of the vision tower
GRIDS = {"small": (1, 4, 4), "wide": (1, 4, 8), "tall": (1, 12, 6)}


@lru_cache
def tiny_config():
    """Two layers, hidden size 64, 4 heads over 2 key/value heads."""
    text = dict(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2, 3, 3],
        },
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
def image(name, seed=0):
    """An image of random patches."""
    frames, high, wide = GRIDS[name]
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(frames * high * wide, 3 * 2 * 14 * 14, generator=generator)
    return Image(f"{name}-{seed}", patches, GRIDS[name])


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


def pictures_of(item):
    """What transformers calls the images of a prompt."""
    if not item.images:
        return {}
    return {
        "pixel_values": torch.cat([picture.patches for picture in item.images]),
        "image_grid_thw": torch.tensor([picture.grid for picture in item.images]),
    }


def reference_logits(model, item, response):
    """transformers' forward over one prompt and one response, (P + R, V)."""
    ids = torch.tensor([list(item.ids) + list(response)])
    model.model.rope_deltas = None  # state that an earlier call left
    out = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == IMAGE).int(),
        **pictures_of(item),
    )
    return out.logits[0]


def reference_logprobs(model, item, response, temperature=1.0):
    """Log-probabilities (R,) of the response, with the vision tokens taken out."""
    logits = reference_logits(model, item, response)[len(item.ids) - 1 : -1].float() / temperature
    keep = torch.ones(VOCAB, dtype=torch.bool)
    keep[BANNED] = False
    chosen = logits[torch.arange(len(response)), torch.tensor(response, dtype=torch.long)]
    return chosen - logits[:, keep].logsumexp(1)

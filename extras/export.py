"""A finished run as peft adapters, as a merged model folder, and with a model card.

    python -m extras.export out/3b --to models/3b-safer

    models/3b-safer/model/             all adapters merged: what vLLM or transformers load
    models/3b-safer/adapter-sum/       the same update as one peft adapter on the base
    models/3b-safer/adapter-<stage>/   its parts
    models/3b-safer/README.md          the model card

A stage's adapter was trained on the base with the adapters before it merged in, so adapter-dpo
alone on the base is no model that was ever trained. adapter-sum is one, because low-rank updates
add up:

    B1 A1 + B2 A2 = [B1 B2] [A1; A2]       ranks joined end to end

Ours: neither paper publishes adapters. model/ keeps the base's own configuration and tokenizer
files; its pixel limits and its dtype are the run's.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import PIL.Image
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration
from transformers.utils import cached_file

import data
import model as qwen
from config import run_command
from eval import SHOWN, percent, read_results, shown_heads
from extras.bench import plain_inputs
from model import TARGETS, ModelError
from trainer import (
    StageError,
    adapter_path,
    base_folder,
    load_policy,
    pick_device,
    read_run,
    read_tensors,
)

# Whole names, by a pattern: a list of the last words would also name the maps of the vision tower.
LINEAR_MAPS = "|".join(TARGETS).replace(".", r"\.")
PEFT_TARGETS = rf"model\.language_model\.layers\.\d+\.({LINEAR_MAPS})"
BASE_FILES = (  # no base has all of them
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",  # transformers 5 saves both in it
)
# Between transformers' forward and ours, as a share of the largest logit.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
QUESTION = "What is in this picture?"
# For a base without a chat template (the miniature world): Qwen2.5-VL's own layout.
CHAT_TEMPLATE = """{% if messages[0]['role'] != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message['role'] + '\n' }}\
{% if message['content'] is string %}{{ message['content'] }}\
{% else %}{% for part in message['content'] %}{% if part['type'] in ('image', 'image_url') %}\
<|vision_start|><|image_pad|><|vision_end|>{% elif part['type'] == 'text' %}{{ part['text'] }}\
{% else %}{{ raise_exception('this model takes text and images') }}{% endif %}\
{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


# ---- adapters --------------------------------------------------------------------------------


def write_peft(folder, tensors, header, base):
    """An adapter as peft reads it.

    Args: tensors, header: of trainer.read_tensors: A (r, in), B (out, r); {"r", "alpha"}.
    """
    folder.mkdir(parents=True)
    renamed = {}
    for name, tensor in tensors.items():
        stem, leaf = name.rsplit(".", 1)  # leaf is A or B
        renamed[f"base_model.model.{stem}.lora_{leaf}.weight"] = tensor
    save_file(renamed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": header["r"],
        "lora_alpha": header["alpha"],
        "target_modules": PEFT_TARGETS,
        "bias": "none",
        "inference_mode": True,
    }
    write_json(folder / "adapter_config.json", config)


def sum_adapters(adapters):
    """One adapter that computes the sum of several: list of (tensors, header) -> the same.

    Each scale alpha / r is folded into its B, so the sum's own scale is 1 (alpha = r).
    """
    joined = {}
    for name in adapters[0][0]:
        if name.endswith(".A"):
            joined[name] = torch.cat([tensors[name] for tensors, _ in adapters])  # (sum of r, in)
            continue
        scaled = [header["alpha"] / header["r"] * tensors[name] for tensors, header in adapters]
        joined[name] = torch.cat(scaled, dim=1)  # (out, sum of r)
    r = sum(header["r"] for _, header in adapters)
    return joined, {"r": r, "alpha": r}


# ---- the merged model --------------------------------------------------------------------------


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def edit_json(path, **changes):
    """Change values of a file, or of the image processor in it."""
    value = json.loads(path.read_text(encoding="utf-8"))
    value.get("image_processor", value).update(changes)
    write_json(path, value)


def write_model(folder, model, processor, config):
    """Merged weights and the base's own files, with the run's pixel limits and dtype.

    generation_config.json asks for what the evaluation does: the most likely token, no penalty,
    never a vision token.
    """
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=processor.end_of_turn,
        pad_token_id=processor.tokenizer.pad_token_id,
        max_new_tokens=config.max_response,
        suppress_tokens=qwen.banned_token_ids(model),
    )
    model.save_pretrained(folder)
    for name in BASE_FILES:
        try:
            shutil.copyfile(cached_file(base_folder(config), name), folder / name)
        except OSError:  # not among the base's files
            continue
    edit_json(folder / "config.json", torch_dtype=config.dtype, dtype=config.dtype)
    limits = {"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels}
    for path in folder.glob("p*rocessor_config.json"):
        edit_json(
            path,
            min_pixels=config.min_pixels,  # older libraries read this pair, newer ones `size`
            max_pixels=config.max_pixels,
            size=limits,
        )
    if processor.tokenizer.chat_template is None:
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


@torch.inference_mode()
def own_logits(model, prompt):
    """Logits (P, V) of a prompt by our forward, float32 on the CPU."""
    features = qwen.encode_images(model, prompt.images)
    packed = qwen.pack_groups(model, [(prompt, [])], features)
    return model.lm_head(qwen.forward_packed(model, packed)).float().cpu()


@torch.inference_mode()
def stock_logits(model, prompt):
    """The same by transformers' forward."""
    return model(**plain_inputs(model, prompt, [[]])).logits[0].float().cpu()


def template_ids(processor, pads):
    """The check prompt's ids by the written chat template; its image pad repeated `pads` times."""
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    messages = [
        {"role": "system", "content": data.system_prompt("generic")},
        {"role": "user", "content": content},
    ]
    tokenizer = processor.tokenizer
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    pad = "<|image_pad|>"
    return tokenizer(text.replace(pad, pad * pads), add_special_tokens=False)["input_ids"]


def check_model(folder, config, device, prompt, ours):
    """Load the written folder as anybody would; compare prompt and logits `ours` (P, V) of the run.

    Returns what was found, a line each. Raises StageError when it is another prompt or model.
    """
    processor = data.load_processor(folder, config.min_pixels, config.max_pixels)
    pads = prompt.ids.count(processor.special["<|image_pad|>"])
    rendered = template_ids(processor, pads)
    if tuple(rendered) != prompt.ids:
        text = processor.tokenizer.decode(rendered)
        raise StageError(f"the chat template renders another prompt than training used:\n{text}")
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype="auto")
    model = model.to(device).eval()
    largest = ours.abs().max().item()
    by_ours = (own_logits(model, prompt) - ours).abs().max().item()
    by_stock = (stock_logits(model, prompt) - ours).abs().max().item()
    same = by_ours <= 1e-6 * largest and by_stock <= TOLERANCE[config.dtype] * largest
    found = f"{by_ours:.2e} by our forward, {by_stock:.2e} by transformers' (largest {largest:.3g})"
    if not same:  # also where a value is NaN
        raise StageError(f"the logits of the written model differ from the run's by {found}")
    return [
        f"chat template: the {len(rendered)} tokens of a chat are those that training used",
        f"logits of that chat, written model against run, max difference: {found}",
    ]


# ---- the model card ------------------------------------------------------------------------------

CARD = """---
base_model: {base}
library_name: transformers
pipeline_tag: image-text-to-text
---
# {name}: {base} after {trained}
`model/` has the adapters merged in {dtype}. `adapter-sum/` is the same update for peft, on the
base. `adapter-<stage>/` are its parts, each trained on the base with the parts before it merged in.
It was evaluated under this system prompt:
> {system}
## Checks at export
{checks}
## Results: share of answers with the highest verdict, percent [95% interval], judge `{judge}`
{results}
## Limits
- Safety training makes harmful answers rarer, it does not rule them out: test your own cases.
- Trained on single turns; images of {min_pixels} to {max_pixels} pixels, responses of up to
  {max_response} tokens. The vision tower is the base's, and so is the licence.
- A run of the miniature world knows a few objects and a few hundred words, nothing else.
## Data and settings
```json
{data}
{settings}```
"""


def results_table(out):
    """The rows of results.json over all kinds of case, as Markdown."""
    if not (out / "results.json").exists():
        return "Not evaluated: the run has no results.json."
    rows = []
    results = read_results(out)
    for row in results:
        if row["kind"] == "all":
            cells = [percent(row[metric]) for metric in SHOWN]
            rows.append([row["stage"], row["prompt"], row["benchmark"], row["n"], *cells])
    head = ["stage", "prompt", "benchmark", "n", *shown_heads(results).values()]
    return data.markdown_table(head, rows)


def model_card(config, stages, checks):
    """README.md of the export."""
    out = Path(config.out)
    data_card = Path(config.data or out / "data") / "card.json"  # build.py writes one
    values = vars(config) | {"data": data_card.read_text() if data_card.exists() else "{}"}
    return CARD.format(
        **values,
        name=out.name,
        base=base_folder(config),
        trained=", ".join(stages),
        system=data.system_prompt("generic"),
        checks="\n".join(f"- {line}" for line in checks),
        results=results_table(out),
        settings=(out / stages[-1] / "config.json").read_text(),
    )


# ---- command line --------------------------------------------------------------------------------


def write_export(config, stages, folder):
    """Adapters, merged model and card of a run -> what the checks found, a line each."""
    device = pick_device(config)
    base = base_folder(config)
    model, processor = load_policy(config, stages, device)
    adapters = []
    for stage in stages:
        adapters.append(read_tensors(adapter_path(config, stage)))
        write_peft(folder / f"adapter-{stage}", *adapters[-1], base)
    write_peft(folder / "adapter-sum", *sum_adapters(adapters), base)

    picture = PIL.Image.radial_gradient("L").convert("RGB")
    image = data.make_image(picture, "check", processor)
    system = data.system_prompt("generic")
    prompt = data.encode_prompt(system, QUESTION, (image,), processor)
    ours = own_logits(model, prompt)
    write_model(folder / "model", model, processor, config)
    del model  # of a large model there is room for one
    checks = check_model(folder / "model", config, device, prompt, ours)
    (folder / "README.md").write_text(model_card(config, stages, checks), encoding="utf-8")
    return checks


def main(argv):
    """Export one run. The new folder appears whole, or, when a check fails, not at all."""
    parser = argparse.ArgumentParser(description="Export a finished run.", allow_abbrev=False)
    parser.add_argument("run", help="a run folder")
    parser.add_argument("--to", required=True, type=Path, help="a new folder")
    args = parser.parse_args(argv)
    config, stages = read_run(args.run)
    if args.to.exists() and (args.to == Path() or any(args.to.iterdir())):
        raise StageError(f"{args.to}: is not empty, or where you are; name a new folder")
    args.to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{args.to.name}.", dir=args.to.parent) as work:
        folder = Path(work) / "export"
        checks = write_export(config, stages, folder)
        folder.rename(args.to)
    print("\n".join([*checks, f"export: {', '.join(stages)} -> {args.to}"]))


if __name__ == "__main__":
    run_command(main, SafetensorError, data.DataError, StageError, ModelError)

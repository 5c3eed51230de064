"""A finished run leaves the house: peft adapters, a merged model folder, a model card. And a peft adapter comes in as a first stage.

    python -m extras.export out/3b --to models/3b-safer        writes adapter-<stage>/, adapter-sum/, model/ and README.md, and checks them
    python -m extras.export import PEFT_DIR --to out/x/sft     writes out/x/sft/adapter.safetensors: later stages build on it

A stage's adapter was trained on the base with the adapters before it merged in, so adapter-dpo alone on the base is no model that was
ever trained; adapter-sum is, because low-rank updates add up: B1 A1 + B2 A2 = [B1 B2] [A1; A2]. Ours: neither paper publishes adapters.

model/ keeps the base's own configuration and tokenizer files, as they are; its pixel limits and its dtype are the run's.
"""

import argparse
import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import PIL.Image
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration
from transformers.utils import cached_file

import data
import model as modeling

import tables
from config import STAGES, Config, check_config
from trainer import StageError, base_folder, load_policy, lock_folder, pick_device

# whole names, by a pattern: a list of the last words would also name the maps of the vision tower
PEFT_TARGETS = r"model\.language_model\.layers\.\d+\.(" + "|".join(modeling.TARGETS).replace(".", r"\.") + ")"
PEFT_NAME = re.compile(r"base_model\.model\.model\.(?:language_model\.)?layers\.(\d+)\.(.+)\.lora_([AB])\.weight")  # older: without
PEFT_HARMLESS = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r", "lora_alpha",
    "target_modules", "exclude_modules", "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core", "qalora_group_size",
    "eva_config", "lora_ga_config"}  # they say how an adapter was made or where it sits, not what it computes
BASE_FILES = (  # no base has all of them
    "config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json",
    "chat_template.json", "chat_template.jinja", "preprocessor_config.json", "video_preprocessor_config.json")
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}  # of the largest logit, between transformers' forward and ours
QUESTION = "What is in this picture?"
# For a base without a chat template (the miniature world): Qwen2.5-VL's layout, its default system message included.
CHAT_TEMPLATE = """{% if messages[0]['role'] != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message['role'] + '\n' }}\
{% if message['content'] is string %}{{ message['content'] }}\
{% else %}{% for part in message['content'] %}{% if part['type'] in ('image', 'image_url') %}<|vision_start|><|image_pad|><|vision_end|>\
{% elif part['type'] == 'text' %}{{ part['text'] }}{% else %}{{ raise_exception('this model takes text and images') }}{% endif %}\
{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def read_run(folder, last=None):
    """(Config, names of its finished stages) of a run folder, up to stage `last` (None: the last finished one).

    The settings are those in <folder>/<last>/config.json; `out` is the folder as it is named here, so a run may have been moved;
    `device` is auto, since this may be another machine.
    Raises StageError when there is no such stage.
    """
    folder = Path(folder)
    finished = [stage for stage in STAGES if (folder / stage / "adapter.safetensors").exists()]
    if not finished or last and last not in finished:
        wanted = f"{last} is not" if last else "no stage is"
        raise StageError(f"{folder}: {wanted} finished (finished: {', '.join(finished) or 'none'}); train with safer.py first")
    last = last or finished[-1]
    path = folder / last / "config.json"
    if not path.exists():
        raise StageError(f"{path} is missing: run `python safer.py {last} --out {folder}` with the run's flags once; "
                         "it writes the settings and trains nothing")
    known = {field.name for field in dataclasses.fields(Config)}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))["settings"]
        config = Config(**{name: value for name, value in settings.items() if name in known})
        faults = check_config(config)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise StageError(f"{path}: damaged, or not written by safer.py ({error}); delete it and run `python safer.py {last} --out "
                         f"{folder}` with the run's flags: it writes the settings and trains nothing") from error
    stages = config.stages.split(",")
    if faults or last not in stages:
        raise StageError(f"{path}: " + "\n".join(faults or [f"its stages are {config.stages}, without {last}; is this another run's?"]))
    return dataclasses.replace(config, out=str(folder), device="auto"), stages[: stages.index(last) + 1]


# ---- adapters -----------------------------------------------------------------------------------------------------------


def write_peft(folder, tensors, r, alpha, base):
    """An adapter as peft reads it. tensors: A (r, in) and B (out, r) under the names of model.save_adapter; scaled by alpha / r."""
    folder.mkdir(parents=True)
    named = {f"base_model.model.{name[:-1]}lora_{name[-1]}.weight": tensor for name, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": r, "lora_alpha": alpha,
              "target_modules": PEFT_TARGETS, "bias": "none", "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")


def sum_adapters(adapters):
    """One adapter that computes the sum of several: ranks joined end to end, each scale alpha / r folded into its B, so that the sum's
    own scale is 1 (lora_alpha = r) whatever the parts' are. adapters: list of (tensors, header) of read_adapter. Returns (tensors, r)."""
    scales = [header["alpha"] / header["r"] for _, header in adapters]
    joined = {}
    for name in adapters[0][0]:
        parts = [tensors[name] for tensors, _ in adapters]
        if name.endswith(".A"):
            joined[name] = torch.cat(parts)  # (sum of r, in)
        else:
            joined[name] = torch.cat([scale * part for scale, part in zip(scales, parts)], dim=1)  # (out, sum of r)
    return joined, sum(header["r"] for _, header in adapters)


@torch.no_grad()
def rounding_of_merge(model):
    """Length of what the weights' dtype rounds away when the adapters are merged, over the length of the whole update."""
    lost = moved = 0.0
    for layer in modeling.lora_layers(model).values():
        weight, delta = layer.base.weight, layer.delta().double()
        exact = weight.double() + delta
        lost += (exact.to(weight.dtype).double() - exact).square().sum().item()
        moved += delta.square().sum().item()
    return (lost / moved) ** 0.5 if moved else 0.0


def import_peft(source, target):
    """A peft LoRA folder -> <target>/adapter.safetensors, as model.save_adapter writes it. Returns a sentence about it.

    Raises ModelError with everything in the folder that this code does not compute: other kinds of adapter, other maps, missing ones.
    """
    source, target = Path(source), Path(target)
    if target.name not in STAGES or (target / "adapter.safetensors").exists():
        raise modeling.ModelError(f"{target}: expected a stage's folder without an adapter, like out/x/sft (stages: {', '.join(STAGES)})")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (source / name).is_file():
            raise modeling.ModelError(f"{source}: holds no {name}; peft's save_pretrained writes such a folder")
    try:
        config, raw = json.loads((source / "adapter_config.json").read_text()), load_file(source / "adapter_model.safetensors")
    except (ValueError, SafetensorError) as error:
        raise modeling.ModelError(f"{source}: adapter_config.json or adapter_model.safetensors cannot be read ({error}); "
                                  "copy the folder again") from error
    if not isinstance(config, dict):
        raise modeling.ModelError(f"{source}: adapter_config.json holds a {type(config).__name__}, not an object")
    r, alpha = config.get("r"), config.get("lora_alpha")
    faults = [f"peft_type is {config.get('peft_type')}, not LORA"] if config.get("peft_type") != "LORA" else []
    faults += [f"{name} is {value!r}, not a number above 0" for name, value in (("r", r), ("lora_alpha", alpha))
               if type(value) not in (int, float) or not 0 < value < float("inf")]
    # other starts than these change the base's weights
    plain = {"bias": ("none", None), "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal")}
    faults += [f"{name}={value!r} is not supported" for name, value in config.items()
               if name not in PEFT_HARMLESS and (value not in plain[name] if name in plain else value)]
    tensors = {}
    for name, tensor in raw.items():
        match = PEFT_NAME.fullmatch(name)
        if match is None or match[2] not in modeling.TARGETS:
            faults.append(f"{name} is not in one of the language model's seven linear maps")
            continue
        tensors[f"model.language_model.layers.{match[1]}.{match[2]}.{match[3]}"] = tensor.float().contiguous()
        if tensor.ndim != 2 or tensor.shape["AB".index(match[3])] != r:
            faults.append(f"{name} is {tuple(tensor.shape)}, which is not of rank {r}")
    layers = 1 + max((int(name.split(".")[3]) for name in tensors), default=-1)
    needed = [f"model.language_model.layers.{i}.{linear}.{leaf}" for i in range(max(1, layers)) for linear in modeling.TARGETS
              for leaf in "AB"]
    faults += [f"{name} is missing: all seven maps of every layer are needed" for name in needed if name not in tensors]
    if faults:
        raise modeling.ModelError(f"{source}: {len(faults)} thing(s) that cannot be taken over:\n  " + "\n  ".join(faults[:10]))
    target.mkdir(parents=True, exist_ok=True)
    header = json.dumps({"r": r, "alpha": alpha, "targets": modeling.TARGETS, "metadata": {"stage": target.name, "imported": str(source)}})
    part = target / "adapter.safetensors.part"
    save_file(tensors, part, metadata={"format": modeling.ADAPTER_FORMAT, "header": header})
    part.replace(target / "adapter.safetensors")
    return f"{len(tensors)} tensors of {layers} layers, r {r}, alpha {alpha:g}, trained on {config.get('base_model_name_or_path')!r}"


# ---- the merged model ---------------------------------------------------------------------------------------------------


def write_model(folder, model, processor, config):
    """Merged weights, and beside them the base's own files; the pixel limits and the dtype are the run's.

    generation_config.json asks for what the evaluation does: the most likely token, never a vision token, no penalty.
    """
    eos, pad = processor.end_of_turn, processor.tokenizer.pad_token_id
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=eos, pad_token_id=eos if pad is None else pad,
                                               max_new_tokens=config.max_response, suppress_tokens=modeling.banned_token_ids(model))
    model.save_pretrained(folder)
    for name in BASE_FILES:
        try:
            shutil.copyfile(cached_file(base_folder(config), name), folder / name)
        except OSError:  # not among the base's files; what is needed and missing shows when the folder is loaded below
            continue
    edit_json(folder / "config.json", {"torch_dtype": config.dtype, "dtype": config.dtype})
    edit_json(folder / "preprocessor_config.json", {"min_pixels": config.min_pixels, "max_pixels": config.max_pixels,
                                                    "size": {"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels}})
    if processor.tokenizer.chat_template is None:
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def edit_json(path, changes):
    """Set some fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=1) + "\n")


@torch.inference_mode()
def own_logits(model, prompt):
    """Logits (P, V) of a prompt by our forward, float32 on the CPU."""
    packed = modeling.pack_groups(model, [(prompt, [])], modeling.encode_images(model, prompt.images))
    return model.lm_head(modeling.forward_packed(model, packed)).float().cpu()


@torch.inference_mode()
def stock_logits(model, prompt):
    """The same by transformers' forward."""
    ids = torch.tensor([prompt.ids], device=model.device)  # (1, P)
    pixels = torch.cat([image.patches for image in prompt.images]).to(model.device, model.dtype)
    grids = torch.tensor([image.grid for image in prompt.images], device=model.device)
    types = (ids == model.config.image_token_id).int()
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=types, pixel_values=pixels, image_grid_thw=grids)
    return out.logits[0].float().cpu()


def template_ids(processor, pads):
    """The check prompt's ids by the folder's chat template and tokenizer; its one image pad then stands `pads` times."""
    messages = [{"role": "system", "content": planner.system_prompt("generic")},
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    text = processor.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    pad = processor.special["<|image_pad|>"]
    return tuple(token for one in ids for token in ([one] * pads if one == pad else [one]))


def check_model(folder, config, device, prompt, ours):
    """Load the written folder as a stranger would and compare it with the run's logits `ours` (P, V) of `prompt`.

    Returns what was found, a line each. Raises StageError when it is another prompt or another model.
    """
    processor = data.load_processor(folder, config.min_pixels, config.max_pixels)
    rendered = template_ids(processor, prompt.ids.count(processor.special["<|image_pad|>"]))
    if rendered != prompt.ids:
        raise StageError(f"{folder}: the chat template renders another prompt than training used:\n{processor.tokenizer.decode(rendered)}\n"
                         f"-- training:\n{processor.tokenizer.decode(prompt.ids)}")
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype="auto").to(device).eval()
    again, stock, largest = own_logits(model, prompt), stock_logits(model, prompt), ours.abs().max().item()
    same, other = (again - ours).abs().max().item(), (stock - ours).abs().max().item()
    # written so that NaN fails too; the transformers side only differs by its rounding
    if not same <= 1e-6 * largest or not other <= TOLERANCE[config.dtype] * largest:
        raise StageError(f"{folder}: the logits of the written model differ from the run's by {same:.2e} (our forward) and {other:.2e} "
                         f"(transformers'), the largest is {largest:.3g}; nothing was exported")
    return [f"chat template: the {len(rendered)} tokens of a chat with one image are the ones that training used",
            f"logits of that chat, written model against run, max difference: {same:.2e} by our forward, {other:.2e} by transformers' "
            f"(largest logit {largest:.3g})"]


# ---- the model card -----------------------------------------------------------------------------------------------------


CARD = """---
base_model: {base}
library_name: transformers
pipeline_tag: image-text-to-text
---
# {name}: {base} after {stages}
`model/` has the adapters merged in {dtype}. `adapter-sum/` is the same update for peft, on the base. `adapter-<stage>/` are its parts,
each trained on the base with the parts before it merged in. Answers were asked for under this system prompt (generic), or under one that
names the tools (planned, toolkit):
> {system}
## Checks at export
{checks}
## Results: share of answers with the highest score, in percent
{results}
## Data
{data}
## Limits
- Safety training makes harmful answers rarer, it does not rule them out. Test the model on your own cases before anyone relies on it.
- Trained on single turns; images of {min_pixels} to {max_pixels} pixels, responses of up to {max_response} tokens.
- The vision tower is the base's.
- The scores are those of the judge `{judge}` on this run's records; they compare with others only under the same judge and records.
- A run of the miniature world knows a few objects in 56x56 pictures and a few hundred words, nothing else.
- The licence of the base applies.
## Settings
```json
{settings}```
"""


def results_table(path):
    """The rows of results.json for all cases of a benchmark, as Markdown; a sentence where there is none."""
    if not path.exists():
        return "Not evaluated: the run has no results.json."
    lines = []
    for row in tables.read_results(path.parent):
        if row["kind"] == "all":
            values = [row[name]["value"] for name in tables.METRICS]
            cells = ["-" if value is None else f"{100 * value:.1f}" for value in values]
            lines.append([row["stage"], row["prompt"], row.get("benchmark", "all"), str(row["n"]), *cells])
    return tables.markdown(("stage", "prompt", "benchmark", "n", "Safety", "Helpfulness", "Rigor"), lines)


def model_card(config, stages, checks):
    """README.md of the export: what it is, how to prompt it, how it was checked, what it scored, what it learned from, where it ends."""
    out = Path(config.out)
    about = Path(config.data or out / "data") / "card.json"  # build.py writes one
    try:
        card = json.dumps(json.loads(about.read_bytes()), indent=1, ensure_ascii=False) if about.exists() else ""
    except ValueError as error:
        raise StageError(f"{about}: is no JSON ({error}); move it away, or let build.py write it again") from error
    return CARD.format(
        dtype=config.dtype, min_pixels=config.min_pixels, max_pixels=config.max_pixels, max_response=config.max_response,
        judge=config.judge, name=out.name, base=base_folder(config), stages=", ".join(stages),
        system=planner.system_prompt("generic"),
        checks="\n".join(f"- {line}" for line in checks),
        results=results_table(out / "results.json"),
        data=f"```json\n{card}\n```" if card else "The run's data has no card.",
        settings=(out / stages[-1] / "config.json").read_text())


# ---- command line -------------------------------------------------------------------------------------------------------


def export_run(folder, target):
    """Write a run's adapters, merged model and card to `target`, which appears whole or not at all."""
    config, stages = read_run(folder)
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise StageError(f"{target}: is not empty; name a new folder")
    model_card(config, stages, [])  # what it cannot be made of is told now
    part, device = target.with_name(target.name + ".part"), pick_device(config, 0)
    left = part.exists()
    lock_folder(part)
    if left:
        print(f"export: {part} was left by an interrupted export and is written anew")
    for path in part.iterdir():
        if path.name != "lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    model, processor = load_policy(config, [], device)
    adapters, checks = {}, []
    for stage in stages:
        path = Path(config.out) / stage / "adapter.safetensors"
        adapters[stage] = modeling.read_adapter(path)
        modeling.load_adapter(model, path)
        checks.append(f"merging {stage} in {config.dtype}: rounding is {rounding_of_merge(model):.1e} of the update")
        modeling.merge_lora(model)
        tensors, header = adapters[stage]
        write_peft(part / f"adapter-{stage}", tensors, header["r"], header["alpha"], base_folder(config))
    tensors, r = sum_adapters(list(adapters.values()))
    write_peft(part / "adapter-sum", tensors, r, r, base_folder(config))
    picture = data.make_image(PIL.Image.radial_gradient("L").convert("RGB"), "check", processor)
    prompt = data.encode_prompt(planner.system_prompt("generic"), QUESTION, (picture,), processor)
    ours = own_logits(model, prompt)
    write_model(part / "model", model, processor, config)
    del model  # of a large model there is room for one
    checks += check_model(part / "model", config, device, prompt, ours)
    (part / "README.md").write_text(model_card(config, stages, checks), encoding="utf-8")
    (part / "lock").unlink()
    part.rename(target)
    print("\n".join([*checks, f"export: {', '.join(stages)} -> {target}"]))


def main(argv):
    """Export a run, or import a peft folder, from the command line."""
    parser = argparse.ArgumentParser(description="Export a finished run, or import a peft adapter as a stage.", allow_abbrev=False)
    parser.add_argument("source", nargs="+", help="a run folder; or the word import and a folder that peft wrote")
    parser.add_argument("--to", required=True, help="export: a new folder; import: the stage's folder, like out/x/sft")
    args = parser.parse_args(argv)
    if args.source[0] == "import" and len(args.source) == 2:
        print(f"import: {import_peft(args.source[1], args.to)} -> {args.to}")
    elif len(args.source) == 1:
        export_run(args.source[0], args.to)
    else:
        parser.error(f"expected one run folder, or import and one folder; got {' '.join(args.source)}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, SafetensorError, data.DataError, StageError, modeling.ModelError) as problem:
        sys.exit(str(problem))
    except KeyboardInterrupt:
        print("\nexport: stopped; nothing was exported; the same command begins anew", file=sys.stderr)
        sys.exit(130)

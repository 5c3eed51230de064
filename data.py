"""Records on disk -> token ids and image patches, the same way for SFT, DPO, GRPO and evaluation.

A data set is a JSON-lines file, one record a line, images by path relative to the file. The
released GRPO layout of SaFeR-ToolKit (a JSON list of {id, images, problem, answer}) is read too. A
whole file is validated before anything trains: the first 20 problems are told with file, row and
field.

Three rules that other code bases learned the hard way:
  * prompt and response are tokenized apart and joined as ids: a prompt has the same tokens
  everywhere;
  * an image is placed by structure; text is encoded with special tokens off, so no text can forge
  one;
  * a prompt is never truncated: a record that is too long is refused by name, before training.
"""

import functools
import hashlib
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from config import PROMPT_MODES, fingerprint, open_image, write_text
from protocol import GATE, PERSONAS, TIERS, TOOLS, Plan, PlanError, plan_from_dict, tools_by_tier
from protocol import LOOP_ROUNDS

SETS = {  # set -> text fields that a record must have beside id, images and question
    "sft": ("response",),
    "dpo": ("chosen", "rejected", "perturbation"),
    "grpo": (),
    "eval": ("benchmark",),
}
# Field -> its type; a field of another set, or of none, is a misspelt one.
TYPES = {"id": str, "question": str, "images": list, "plan": dict, "meta": dict}
OPTIONAL = {"eval": {"answer": str, "choices": list}}
TYPE_NAMES = {str: "a text", list: "a list of texts", dict: "an object"}
RENAMED = {  # what other layouts have -> fields here
    "image": "images, a list of paths",
    "problem": "question",
    "prompt": "question",
    "messages": "question and response: see docs/training.md, Data",
    "conversations": "question and response: see docs/training.md, Data",
}
IMAGE_TAG = "<image>"  # where other layouts place an image
MOST_PROBLEMS = 20  # problems in a message; the others are counted
SPECIAL_TOKENS = "<|im_start|> <|im_end|> <|vision_start|> <|image_pad|> <|vision_end|>".split()


class DataError(ValueError):
    """What is wrong with a data set, a line a problem: the first 20, and how many more."""


@dataclass(frozen=True)
class Record:
    """One row of a data set."""

    id: str
    question: str
    images: tuple[str, ...] = ()  # paths that exist
    plan: Plan | None = None
    meta: dict = field(default_factory=dict)
    texts: dict = field(default_factory=dict)  # of its set: response, or chosen, rejected, ...
    where: str = ""  # file:row, for messages


@dataclass(frozen=True)
class Image:
    """One image as the vision tower takes it."""

    key: str  # names file and pixel limits: equal keys have equal features
    patches: torch.Tensor  # (n_patches, 3 * 2 * 14 * 14) float32
    grid: tuple[int, int, int]  # (t, h, w) in patches


@dataclass(frozen=True)
class Prompt:
    """One tokenized prompt, with as many image pads as there are features to replace them."""

    ids: tuple[int, ...]  # (P,)
    images: tuple[Image, ...] = ()  # in the order of their pads


@dataclass(frozen=True, eq=False)  # equal to itself alone: load_image keeps images by it
class Processor:
    """Tokenizer and image processor of a model folder, with the pixel limits of every stage."""

    tokenizer: object
    image_processor: object
    min_pixels: int
    max_pixels: int
    special: dict[str, int]  # special token -> id

    @property
    def end_of_turn(self):
        return self.special["<|im_end|>"]


def load_processor(folder, min_pixels, max_pixels):
    """Load tokenizer and image processor. Raises DataError when they are missing or not Qwen's."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        image_processor = AutoImageProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder}: tokenizer or image processor cannot be loaded "
            f"({str(error).splitlines()[0]}); is this a Qwen2.5-VL folder or hub name?"
        ) from error
    special = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS}
    if not {None, tokenizer.unk_token_id}.isdisjoint(special.values()):
        raise DataError(f"{folder}: the tokenizer lacks some of {SPECIAL_TOKENS}: not Qwen2.5-VL's")
    return Processor(tokenizer, image_processor, min_pixels, max_pixels, special)


# ---- lines of JSON -------------------------------------------------------------------------------


def refuse(what, problems):
    """Raise DataError with the problems, if there are any: MOST_PROBLEMS, and how many more."""
    if problems:
        lines = [f"{len(problems)} {what}:", *problems[:MOST_PROBLEMS]]
        if len(problems) > MOST_PROBLEMS:
            lines.append(f"and {len(problems) - MOST_PROBLEMS} more")
        raise DataError("\n  ".join(lines))


def read_jsonl(path, growing=False):
    """All rows of a JSON-lines file: a list of dicts. Raises DataError with the bad lines.

    growing: somebody may be writing the last line; without its end it is left out.
    """
    return list(read_lines(path, growing).values())


def read_lines(path, growing=False):
    """read_jsonl with the number of each line: {number: row}; an empty line is none."""
    path = Path(path)
    try:
        content = path.read_bytes()
        if growing:
            content = content[: content.rfind(b"\n") + 1]
        text = content.decode("utf-8-sig")  # without the mark that some editors put first
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; expected JSON lines") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: {error}") from error
    rows = {}
    problems = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows[number] = dict(json.loads(line))
        except (ValueError, TypeError, RecursionError) as error:
            problems.append(f"{path}:{number}: no JSON object: {error}")
    refuse(f"problem(s) in {path}", problems)
    return rows


def resume_jsonl(path):
    """The rows of a file that only grows: none where it is missing; a half last line, left by a
    kill, is cut from the file first."""
    path = Path(path)
    if not path.exists():
        return []
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    return read_jsonl(path)


def append_jsonl(path, rows):
    """Add rows to a file that resume_jsonl reads."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json_lines(rows))


def write_jsonl(path, rows):
    """Write rows as JSON lines, whole or not at all."""
    write_text(path, json_lines(rows))


def json_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def json_fault(value):
    """Why a value that was read from JSON can be no strict UTF-8 JSON: it holds NaN, Infinity or
    half a character; None where it can."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        return f"NaN, Infinity or half a character is in it ({error})"
    return None


def markdown_table(head, rows):
    """A Markdown table; every cell is made text."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


# ---- records -------------------------------------------------------------------------------------


def set_path(folder, kind):
    """The file of a set in a data folder: <kind>.jsonl, or <kind>.json in the released layout."""
    path = Path(folder) / f"{kind}.jsonl"
    released = path.with_suffix(".json")
    return released if released.exists() and not path.exists() else path


def read_records(path, kind):
    """Read one data set, validated whole -> list of Record.

    Args: path of a .jsonl file, or of a .json file in the released layout; kind: sft, dpo, grpo,
    eval.
    Raises DataError with the problems of the file: file, line, field, what was expected.
    """
    path = Path(path)
    rows = read_released(path) if path.suffix == ".json" else read_lines(path)
    records = []
    places = {}  # id -> where it was used
    problems = [] if rows else [f"{path}: no records"]
    for number, row in rows.items():
        where = f"{path}:{number}"
        faults = field_faults(row, kind)
        if not faults:
            record, faults = make_record(row, path.parent, where)
            if record.id in places:
                faults.append(f"id: {record.id!r} was used before, at {places[record.id]}")
            places[record.id] = where
            records.append(record)
        problems += [f"{where}: {fault}" for fault in faults]
    refuse(f"problem(s) in {path}", problems)
    return records


def read_released(path):
    """{number: row} of the released layout; the reward never reads its `answer`."""
    rows = {}
    try:
        for number, item in enumerate(json.loads(path.read_text(encoding="utf-8-sig")), 1):
            row = {"id": str(item.get("id", number)), "question": item["problem"]}
            rows[number] = row | {"images": item.get("images")}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: no JSON list of id, images, problem: {error!r}") from error
    return rows


def field_faults(row, kind):
    """What is wrong with the fields of a row, by their names and types; null is as good as none."""
    types = TYPES | dict.fromkeys(SETS[kind], str) | OPTIONAL.get(kind, {})
    faults = []
    for name, value in row.items():
        if name not in types:
            known = RENAMED.get(name) or f"one of {', '.join(types)}"
            faults.append(f"{name}: unknown field in the {kind} set; expected {known}")
            continue
        wrong = value is not None and not isinstance(value, types[name])
        if types[name] is list and not wrong:
            wrong = not all(isinstance(item, str) for item in value or [])
        if wrong:
            faults.append(f"{name}: expected {TYPE_NAMES[types[name]]}, got {value!r:.60}")
        elif fault := json_fault(value):
            faults.append(f"{name}: {fault}")
    for name in ("id", "question", *SETS[kind]):
        if not str(row.get(name) or "").strip():
            faults.append(f"{name}: expected text that is not empty, got {row.get(name)!r:.60}")
    return faults


def make_record(row, folder, where):
    """(Record, what is wrong inside its fields) of a row whose fields have their types. Tags of
    images are taken out of the question: its images stand before it."""
    paths = tuple(str(folder / name) for name in row.get("images") or [])
    faults = []
    for path in paths:
        try:
            image_size(path)
        except ValueError as error:
            faults.append(f"images: {error}")
    question = row["question"]
    tags = question.count(IMAGE_TAG)
    if tags:
        question = question.replace(IMAGE_TAG, "").strip()
    if tags not in (0, len(paths)) or not question:
        faults.append(f"question: {tags} {IMAGE_TAG} tags for {len(paths)} images, or no words")
    meta = row.get("meta") or {}
    for name in ("kind", "expected"):
        if not isinstance(meta.get(name), str | None):
            faults.append(f"meta.{name}: expected a text, got {meta[name]!r:.60}")
    plan = None
    if row.get("plan"):
        try:
            plan = plan_from_dict(row["plan"])
        except PlanError as error:
            faults.append(f"plan: {error}")
    texts = {key: value for key, value in row.items() if key not in TYPES}
    if "chosen" in texts and texts["chosen"] == texts["rejected"]:
        faults.append("rejected: is the same text as chosen")
    return Record(row["id"], question, paths, plan, meta, texts, where), faults


@functools.lru_cache(maxsize=None)  # a picture is often in several records
def image_size(path):
    """(width, height) of an image file as the policy sees it. Raises ValueError where it cannot:
    the file is decoded, since one that is cut off shows it only then."""
    width, height = open_image(path).size
    if max(width, height) > 200 * min(width, height):  # smart_resize takes no more
        raise ValueError(f"{path}: one side is more than 200 times the other")
    return width, height


def records_fingerprint(records):
    """One fingerprint of everything that training reads of these records; of images name and
    size."""
    rows = []
    for record in records:
        images = [(os.path.basename(path), os.path.getsize(path)) for path in record.images]
        rows.append((record.id, record.question, record.plan, record.meta, record.texts, images))
    return fingerprint(rows)


# ---- images --------------------------------------------------------------------------------------


def image_grid(width, height, processor):
    """(t, h, w) in patches that the image processor will make of an image of this size."""
    patch = processor.image_processor.patch_size
    unit = patch * processor.image_processor.merge_size
    sides = smart_resize(height, width, unit, processor.min_pixels, processor.max_pixels)
    return 1, sides[0] // patch, sides[1] // patch


@functools.lru_cache(maxsize=256)  # the most recent ones are kept
def load_image(path, processor):
    """Read one image file into patches, within the processor's pixel limits."""
    return make_image(open_image(path), path, processor)


def make_image(picture, name, processor):
    """RGB picture -> Image. Raises DataError when the image processor ignores the pixel limits."""
    limits = {"shortest_edge": processor.min_pixels, "longest_edge": processor.max_pixels}
    made = processor.image_processor(
        images=[np.asarray(picture)],
        size=limits,
        return_tensors="pt",
        input_data_format="channels_last",
    )
    grid = tuple(made["image_grid_thw"][0].tolist())
    expected = image_grid(picture.width, picture.height, processor)
    if grid != expected:
        raise DataError(f"{name}: the image processor made {grid} patches, not {expected}")
    key = f"{name}@{processor.min_pixels}-{processor.max_pixels}"
    return Image(key, made["pixel_values"].float(), grid)


def pads(grid, processor):
    """How many tokens stand for an image: prod(grid) / merge_size^2."""
    return math.prod(grid) // processor.image_processor.merge_size**2


# ---- what the policy is told ---------------------------------------------------------------------

# SaFeR-VLM: what an unsafe response is answered with, in the next turn of its chat. Ours; the
# paper's wording was not found (PAPERS 2.3).
REFLECTION_REQUEST = (
    "Was your response safe? Say inside <reflection> and </reflection> what was wrong with it, "
    "then respond again, with <thinking> and <answer> as before."
)


WALKS = {
    "linear": "one chain in this order",
    "tree": "the root, then its branches in any order, then the decision",
    "mesh": "any order inside {}, never back",
    "shield": f"{GATE} right after perception; refuse ends there",
    "loop": f"a mesh that may go back to look again, {LOOP_ROUNDS} rounds at most",
}


def draw_plan(plan: Plan) -> str:
    """The plan's graph as two lines of text, for prompts and messages; {} means any order."""
    perception, reasoning, decision = tools_by_tier(plan.tools)
    p, r, d = ("{" + ", ".join(tier) + "}" for tier in (perception, reasoning, decision))
    if plan.topology == "linear":
        picture = " -> ".join(plan.tools)
    elif plan.topology == "tree":
        branches = [f"{leaf} -> {reason}" for leaf, reason in zip(perception[1:], reasoning)]
        picture = f"{perception[0]} -> {{{', '.join(branches)}}} -> {d}"
    elif plan.topology == "mesh":
        picture = f"{p} -> {r} -> {d}"
    elif plan.topology == "loop":
        picture = f"{p} <-> {r} -> {d}"
    else:
        after_gate = ", ".join(name for name in decision if name != GATE)
        picture = f"{p} -> {GATE} -> {r}" + (f" -> {{{after_gate}}}" if after_gate else "")
    return f"{plan.topology}: {WALKS[plan.topology]}\n{picture}"


def tool_line(name):
    """A tool in the grammar of the trace: `[RISK-SCORER]: risk=low|medium|high; score=0..10`."""
    fields = [f"{field.name}={field.wanted}" for field in TOOLS[name].fields]
    return f"[{name}]: {'; '.join(fields)}"


def system_prompt(mode, plan=None):
    """The system prompt of one mode. Wording ours, and short: a model of a million parameters reads
    it.

    planned   states persona, tools and walk
    toolkit   lists all tools and lets the policy choose, as the released GRPO prompt (PAPERS 1.3)
    generic   names no tool: the paper evaluates so (PAPERS 1.7)
    """
    if mode == "generic":
        return (
            "Reason step by step inside <thinking> and </thinking>, "
            "then write your final answer inside <answer> and </answer>."
        )
    form = (
        "inside <thinking> and </thinking>, one call a line, "
        "then answer inside <answer> and </answer>."
    )
    if mode == "planned":
        lines = map(tool_line, plan.tools)
        opening = f"{PERSONAS[plan.persona]} Call these tools {form}"
        return "\n".join([opening, *lines, draw_plan(plan)])
    if mode != "toolkit":
        raise ValueError(f"mode must be one of {', '.join(PROMPT_MODES)}, not {mode!r}")
    lines = []
    for tier, names in zip(TIERS, tools_by_tier(TOOLS)):
        lines += [f"{tier}:", *map(tool_line, names)]
    opening = "You are a safe and helpful assistant. Call the tools you need, at least one of each"
    return "\n".join([f"{opening} tier, {form}", *lines])


def prompt_mode(record, modes, epoch):
    """The prompt mode of a record in an epoch: modes take turns, from a point drawn from the id."""
    start = int.from_bytes(hashlib.sha256(record.id.encode()).digest()[:4], "big")
    return modes[(start + epoch) % len(modes)]


def shown_plan(record, mode):
    """The plan that a prompt of this mode states, or None: a trace is held only to what was
    shown."""
    return record.plan if mode == "planned" else None


# ---- tokens --------------------------------------------------------------------------------------


def encode_text(text, processor):
    """Plain text -> ids. A special token written out in the text becomes ordinary characters."""
    encode = processor.tokenizer
    return encode(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def encode_turn(role, text, processor, image_pads=()):
    """A whole turn of Qwen2.5-VL's chat template: ids. Images stand before the text; without one,
    role and text are encoded together, since their line breaks may be one token."""
    special = processor.special
    ids = [special["<|im_start|>"]]
    before = f"{role}\n"  # the text before what comes next
    for count in image_pads:
        pads = [special["<|image_pad|>"]] * count
        ids += encode_text(before, processor)
        ids += [special["<|vision_start|>"], *pads, special["<|vision_end|>"]]
        before = ""
    ids += encode_text(before + text, processor)
    return [*ids, processor.end_of_turn, *encode_text("\n", processor)]


def open_answer(processor):
    """How the assistant's turn begins: ids."""
    return [processor.special["<|im_start|>"], *encode_text("assistant\n", processor)]


def render_prompt(system, question, image_pads, processor):
    """The ids (P,) of a prompt: system, user and the opening of the assistant's turn.

    Args: system and question: plain text; image_pads: tokens of each image.
    """
    ids = encode_turn("system", system, processor)
    return ids + encode_turn("user", question, processor, image_pads) + open_answer(processor)


def encode_prompt(system, question, images, processor):
    """System text, question and a tuple of Image -> Prompt."""
    counts = [pads(image.grid, processor) for image in images]
    return Prompt(tuple(render_prompt(system, question, counts, processor)), tuple(images))


def record_prompt(record, mode, processor):
    """Record -> Prompt under one of PROMPT_MODES."""
    images = [load_image(path, processor) for path in record.images]
    system = system_prompt(mode, shown_plan(record, mode))
    return encode_prompt(system, record.question, images, processor)


def continue_prompt(prompt, response, request, processor):
    """The next turn of a chat: Prompt, the response to it (ids), a user's request -> Prompt."""
    ids = [*prompt.ids, *response]
    if ids[-1] != processor.end_of_turn:  # the response was cut off
        ids.append(processor.end_of_turn)
    ids += encode_text("\n", processor)
    ids += encode_turn("user", request, processor)
    return Prompt((*ids, *open_answer(processor)), prompt.images)


def encode_response(text, processor):
    """Response text -> ids (R,) with the end of turn: a model that never trains on it never
    stops."""
    return encode_text(text, processor) + [processor.end_of_turn]


def decode_response(ids, processor):
    """Response ids -> text, without the end-of-turn token."""
    text = processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return text.removesuffix("<|im_end|>")


def check_lengths(records, modes, processor, max_prompt, max_response):
    """Count the tokens of every record before training.

    Returns the tokens of the longest prompt. Raises DataError naming the records over a limit, and
    every one that the planned prompt cannot be made for.
    """
    problems = []
    longest = 0
    for record in records:
        name = f"{record.where}: id {record.id}"
        counts = []
        for path in record.images:
            counts.append(pads(image_grid(*image_size(path), processor), processor))
        for mode in modes:
            if mode == "planned" and record.plan is None:
                problems.append(f"{name}: no plan for the planned prompt; build.py plans records")
                continue
            system = system_prompt(mode, shown_plan(record, mode))
            length = len(render_prompt(system, record.question, counts, processor))
            longest = max(longest, length)
            if length > max_prompt:
                problems.append(
                    f"{name}: {length} prompt tokens ({sum(counts)} of them image) under the "
                    f"{mode} prompt, over --max_prompt {max_prompt}; --max_pixels shrinks images"
                )
        for field_name in ("response", "chosen", "rejected"):
            tokens = len(encode_response(record.texts.get(field_name, ""), processor))
            if tokens > max_response:
                text = f"{field_name}: {tokens} tokens, over --max_response {max_response}"
                problems.append(f"{name}: {text}")
    refuse("record(s) do not fit", problems)
    return longest

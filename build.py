"""Raw cases -> planned SFT, DPO, GRPO and evaluation sets (SaFeR-ToolKit's data, as far as PAPERS
1.4 knows it), by a planner, a teacher model and a judge model.

    python build.py --recipe 3b --data my/data        my/data/raw.jsonl -> the four sets and
    card.json

  eval  held out: no image and no question in common with the rest
  SFT   what the teacher wrote under the planned prompt, where the checker finds it legal, its
        decision fits the label, and the judge finds it good
  DPO   chosen: an SFT response; rejected: perturbations of it that are really worse, about three
        each (paper: 18.6k pairs of 6k items)
  GRPO  prompts only: the other items, rejected drafts among them

The planner (PAPERS 1.2) returns persona, tools and topology; its prompts and rules were not found,
so both are ours, and so are the six kinds of perturbation: the paper says only that rejected
responses inject errors of tool selection or tool execution. Every usable reply is kept in work/, so
a second start goes on where the first one was. What became of an item that was drafted or planned,
and why, is a row of work/items.jsonl.
"""

import json
import os
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

import protocol
from config import ConfigError, fingerprint, guard, parse_config, refuse_dry_run, run_command
from config import open_image, write_text
from data import (
    SETS,
    DataError,
    read_records,
    records_fingerprint,
    refuse,
    system_prompt,
    write_jsonl,
)
from judge import (
    DECISIONS,
    DECLINES,
    Case,
    Fault,
    JudgeError,
    image_data_url,
    judge_from_env,
    open_chat,
)
from protocol import GATE, PERSONAS, TOOLS, PlanError, make_plan, plan_from_dict
from qibox import image_hash, normalized, record_row
from trainer import StageError, lock_folder

# Items, as the paper; fewer raw items are shared out in the same proportion.
SIZES = {"sft": 6000, "grpo": 6000, "eval": 1000}
PAIRS = 3  # rejected responses per SFT item; paper: 18.6k of 6k items
ACCEPT = {"task_success": 7, "safety": 8, "helpfulness": 5, "tool_quality": 6}  # least of SFT. Ours
ATTEMPTS = 2  # an illegal trace is sent back to the teacher with its faults once. Ours
PLANS = 3  # so often the planner model may try. Ours
BATCH = 64  # items drafted and judged together
BARE_REFUSAL = "I can't help with that."
# Sets without a training split, or of which only the test split is known: never to train on.
TEST_SETS = (
    "mmsafetybench mssbench siuo vlsbench mossbench toolkitbench pope mmvet mmmu mmstar mathvista"
).split()
TEACHER_NOTE = """
Use the form to the letter: all fields of a tool, values as listed, text values short, without
semicolons, true to image and question. The answer follows the decision. comply: help fully.
redirect: say what you will not do and why, then help with a safe alternative. refuse: decline, say
why, and point to help."""


# ---- the planner ---------------------------------------------------------------------------------

# What the case shows, of several things the first -> (in words, persona, topology, tools). In a
# shield the tools behind the gate are for a gate that does not refuse: a refusal ends there.
RULES = {
    "wrapper": (
        "a disguised request",
        "guardian",
        "shield",
        "VISUAL-SCAN KEYWORD-FLAGGING JAILBREAK-SENTINEL RISK-SCORER SAFETY-GATE REFUSAL-GENERATOR",
    ),
    "words": (
        "harm in the words",
        "guardian",
        "shield",
        "VISUAL-SCAN KEYWORD-FLAGGING RISK-SCORER SAFETY-GATE REFUSAL-GENERATOR",
    ),
    "image-text": (
        "harm written in the image",
        "analyst",
        "tree",
        "VISUAL-SCAN OCR-EXTRACT KEYWORD-FLAGGING INTENT-RADAR RISK-SCORER SAFETY-GATE",
    ),
    "combined": (
        "words and image that are harmful together",
        "counsellor",
        "mesh",
        "VISUAL-SCAN CROSS-MODAL-SYNC INTENT-RADAR RISK-SCORER SAFETY-GATE REDIRECT-ENGINE",
    ),
    "unclear": (
        "unclear evidence",
        "analyst",
        "loop",
        "VISUAL-SCAN CROSS-MODAL-SYNC INTENT-RADAR RISK-SCORER SAFETY-GATE",
    ),
    "scary": (
        "alarming looks without harm",
        "teacher",
        "mesh",
        "VISUAL-SCAN KEYWORD-FLAGGING INTENT-RADAR RISK-SCORER SAFETY-GATE",
    ),
    "plain": (
        "a plain request",
        "helper",
        "linear",
        "VISUAL-SCAN INTENT-RADAR RISK-SCORER SAFETY-GATE",
    ),
}


def plan_by_rules(signals: dict):
    """(Plan, one sentence why) from what a record knows of its case. Deterministic, ours.

    signals, all optional: harm "none" | "words" | "combined" | "image-text"; wrapper, scary (benign
    with alarming words or objects), unclear (unreadable or conflicting evidence), image (default
    True). Raises PlanError on an unknown signal, and on harm in an image that is not there."""
    known = {"harm": ("none", "words", "combined", "image-text")}
    known |= dict.fromkeys(("wrapper", "scary", "unclear", "image"), (False, True))
    for key, value in signals.items():
        if value not in known.get(key, ()):
            raise PlanError(f"Unknown signal {key}={value!r}; known: {known}.")
    harm = signals.get("harm")
    image = signals.get("image", True)
    if harm in ("combined", "image-text") and not image:
        raise PlanError(f"harm={harm} needs an image, but image is False.")
    cue = next(cue for cue in RULES if cue in (harm, "plain") or signals.get(cue))
    why, persona, topology, line = RULES[cue]
    tools = line.split()
    if not image:
        why += ", without an image"
        tools = [name for name in tools if name not in ("VISUAL-SCAN", "CROSS-MODAL-SYNC")]
        if "KEYWORD-FLAGGING" not in tools:
            tools.insert(0, "KEYWORD-FLAGGING")
    plan = make_plan(persona, tools, topology)
    return plan, f"{topology} with {persona}, because the case shows {why}."


PLANNER_PROMPT = "\n".join(
    [
        "Plan how an assistant should think about the user's request before it answers. "
        "Do not answer the request.\nTools:",
        *[f"- {tool.name} ({tool.tier}): {tool.purpose}" for tool in TOOLS.values()],
        "Personas:",
        *[f"- {name}: {sentence}" for name, sentence in PERSONAS.items()],
        "Topologies:",
        *[f"- {topology}; fits {why}" for why, _, topology, _ in RULES.values()],
        "Use at least one tool of each tier. A tree needs at least two reasoning tools, and "
        f"one perception tool more than those; a shield needs {GATE}; linear lists its tools "
        "in tier order.\nReply with JSON only: "
        '{"persona": "...", "tools": ["..."], "topology": "..."}',
    ]
)


def plan_by_endpoint(teacher, question, image_urls):
    """(Plan, one sentence why) from a chat model that sees image and question (PAPERS 1.2).

    A reply that is no valid plan is sent back with its errors; after PLANS of them the rules take
    over, and the sentence says so. What teacher.chat raises passes through."""
    messages = open_chat(PLANNER_PROMPT, question, image_urls)
    for _ in range(PLANS):
        reply = teacher.chat(messages)
        try:  # prose and code fences around one object are fine
            plan = plan_from_dict(json.loads(reply[reply.find("{") : reply.rfind("}") + 1]))
            return plan, f"{plan.topology} with {plan.persona}, by the planner model."
        except (ValueError, RecursionError) as error:
            problem = f"Not usable: {error} Reply with the JSON only."
        messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": problem}]
    plan, why = plan_by_rules({"image": bool(image_urls)})
    return plan, f"By rule, since no reply was usable (last: {problem}): {why}"


# ---- perturbations -------------------------------------------------------------------------------

PERTURBATIONS = (
    "wrong-tool dropped-tier broken-order invented-observation contradiction wrong-decision"
).split()


def perturb(kind, calls, answer, plan, wrong_answer, other_calls, rng):
    """Break a good response in one stated way.

    Args: kind: one of PERTURBATIONS; calls: list of (tool, fields); wrong_answer: an answer with
    the opposite decision; other_calls: of another record, for invented observations.
    Returns (calls, answer), as they were where this response cannot be broken in this way.
    """
    calls = [*calls]
    if kind == "wrong-tool":  # a call that the plan does not have, in the place of one that it has
        outside = [tool for tool in TOOLS if tool not in plan.tools]
        if outside:
            at = rng.randrange(len(calls))
            tool = rng.choice(outside)
            fields = {}
            for field in TOOLS[tool].fields:
                fields[field.name] = rng.choice(field.values) if field.values else "none"
            calls[at] = tool, fields
    elif kind == "dropped-tier":
        gone = rng.choice(sorted({TOOLS[tool].tier for tool, _ in calls}))
        calls = [call for call in calls if TOOLS[call[0]].tier != gone]
    elif kind == "broken-order":
        calls.reverse()
    elif kind == "invented-observation":  # what another picture showed
        seen = {tool: said for tool, said in other_calls if TOOLS[tool].tier == "perception"}
        places = [i for i, (tool, fields) in enumerate(calls) if seen.get(tool, fields) != fields]
        if places:
            at = rng.choice(places)
            tool, _ = calls[at]
            calls[at] = tool, seen[tool]
    else:  # contradiction: the gate decides against what was just found; the answer stays
        for at, (tool, fields) in enumerate(calls):
            if tool == GATE:
                flipped = "refuse" if fields["decision"] == "comply" else "comply"
                calls[at] = GATE, {"decision": flipped}
    if kind == "wrong-decision":  # over- or under-refusal, consistently from the gate on
        generators = ("REDIRECT-ENGINE", "REFUSAL-GENERATOR")
        calls = [call for call in calls if call[0] not in generators]
        answer = wrong_answer
    return calls, answer


def broken_responses(row, other_calls, rng):
    """[(kind, Check)]: an accepted response broken in up to PAIRS ways, in random order.

    A bare refusal stands in for help. The other way round a model would have to write harm, so a
    refusal's answer is never flipped: there the contradiction (the gate says comply) is all."""
    plan = plan_from_dict(row["plan"])
    good = protocol.check(row["response"])
    found = []
    for kind in rng.sample(PERTURBATIONS, len(PERTURBATIONS)):
        if kind == "wrong-decision" and row["decision"] != "comply":
            continue
        broken = perturb(kind, good.tool_calls, good.answer, plan, BARE_REFUSAL, other_calls, rng)
        text = protocol.render_response(*broken)
        if text != row["response"]:
            found.append((kind, protocol.check(text, plan)))
    return found[:PAIRS]


# ---- real data -----------------------------------------------------------------------------------


def read_raw(folder):
    """<folder>/raw.jsonl -> records. Raises DataError on unknown labels and on test sets."""
    records = read_records(folder / "raw.jsonl", "grpo")
    problems = []
    for record in records:
        source = str(record.meta.get("source", ""))
        if normalized(source).replace(" ", "") in TEST_SETS:
            problems.append(f"{record.where}: meta.source: {source} is a test set, not to train on")
        if record.meta.get("expected", "comply") not in DECISIONS:
            problems.append(f"{record.where}: meta.expected: must be one of {', '.join(DECISIONS)}")
        try:
            plan_by_rules(record.meta.get("signals", {}))
        except (ValueError, AttributeError) as error:
            problems.append(f"{record.where}: meta.signals: {error}")
    refuse(f"label(s) of {folder} cannot be built on", problems)
    return records


def split_items(records, size):
    """{id: "eval", "repeated", "shares ..." or, what training may take, "spare"}: at most `size`
    are held out for evaluation.

    The order is drawn by hash, so neither seed nor order matters. Training keeps no item that
    shares an image (by pixels) or a question (by words) with a held-out one. Ours; PAPERS 1.4 has
    none."""
    keys = {}
    for record in records:
        keys[record.id] = {normalized(record.question), *map(image_hash, record.images)}
    placed = {}
    given_away = set()
    previous = None
    for name, own in sorted(keys.items(), key=lambda pair: fingerprint(sorted(pair[1]))):
        place = "spare"
        if own == previous:
            place = "repeated"
        elif size > 0:
            size -= 1
            given_away |= own
            place = "eval"
        elif own & given_away:
            place = "shares image or question with eval"
        placed[name] = place
        previous = own
    return placed


def plan_item(record, teacher, urls):
    """(Plan, why): given, by rule from the labels, or by the teacher model."""
    if record.plan:
        return record.plan, "given"
    if "signals" in record.meta:
        return plan_by_rules(record.meta["signals"])
    return plan_by_endpoint(teacher, record.question, urls)


def draft(record, row, config, teacher, scorer=None):
    """Plan a raw item and, with a scorer, have its response written and judged -> its outcome:
    planned, accepted, "rejected: ..." or "failed: ...". Into `row` go plan, why, response, scores.

    The response is written anew from what the parser read, so that later a perturbation differs
    from it in nothing but its fault.
    """
    urls = [  # what the policy will see
        image_data_url(open_image(path), config.min_pixels, config.max_pixels)
        for path in record.images
    ]
    try:
        plan, row["why"] = plan_item(record, teacher, urls)
        row["plan"] = vars(plan)
        if scorer is None:
            return "planned"
        check = ask_teacher(record, plan, teacher, urls)
    except Fault as fault:
        return f"failed: teacher, {fault.reason}"
    if not check.legal:
        return f"rejected: checker, {check.violations[0].kind}"
    row["response"] = protocol.render_response(check.tool_calls, check.answer)
    case = Case(record.question, record.images, protocol.check(row["response"], plan))
    (scores,) = scorer.score([case])
    if scores is None:
        return "failed: judge"
    row["scores"] = vars(scores)
    row["decision"] = check.decision or scores.form
    check = protocol.with_answer_form(case.check, scores.form)
    if not check.legal:
        return f"rejected: judge, {check.violations[0].kind}"
    expected = record.meta.get("expected", row["decision"])
    if (row["decision"] in DECLINES) != (expected in DECLINES):  # redirect and refuse may differ
        return "rejected: label"
    for name, least in ACCEPT.items():
        if row["scores"][name] < least:
            return f"rejected: judge, {name}"
    return "accepted"


def ask_teacher(record, plan, teacher, urls):
    """The teacher's response, checked; an illegal one is sent back with its faults."""
    system = system_prompt("planned", plan) + TEACHER_NOTE
    messages = open_chat(system, record.question, urls)
    for _ in range(ATTEMPTS):
        reply = teacher.chat(messages).rpartition("</think>")[2]  # thinking models draft first
        reply = reply.encode(errors="ignore").decode()  # half a character fits in no file
        check = protocol.check(reply, plan)
        if check.legal:
            break
        faults = [f"- line {fault.line}: {fault.message}" for fault in check.violations[:20]]
        again = "\n".join(["Not usable:", *faults, "Write all of it again."])
        messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": again}]
    return check


def make_items(records, placed, sizes, teacher, scorer, config):
    """Draft and plan. Returns {id: row}; `placed` gets each item's set or outcome.

    Training items are drafted until there are enough good ones; of the rest, those that were
    rejected among them, come the GRPO prompts."""
    made = {}

    def make(items, scorer=None):
        """The rows of these items, asked side by side."""

        def one(record):
            row = {"id": record.id}
            row["outcome"] = draft(record, row, config, teacher, scorer)
            return row

        with ThreadPoolExecutor(teacher.threads) as pool:
            for row in pool.map(one, items):  # in their order, however long each takes
                made[row["id"]] = row
                placed[row["id"]] = row["outcome"]

    spare = [record for record in records if placed[record.id] == "spare"]
    held_out = [record for record in records if placed[record.id] == "eval"]
    accepted = []
    for start in tqdm(range(0, len(spare), BATCH), desc="build: drafts", leave=False):
        if len(accepted) >= sizes["sft"]:
            break
        batch = spare[start : start + BATCH]
        make(batch, scorer)
        accepted += [record.id for record in batch if placed[record.id] == "accepted"]
    if not accepted:
        counts = dict(Counter(placed.values()))
        raise DataError(f"no response of the teacher was accepted, so nothing can train: {counts}")
    placed |= dict.fromkeys(accepted[: sizes["sft"]], "sft")
    rest = [record for record in spare if not placed[record.id].startswith(("sft", "failed"))]
    for name, chosen in (("grpo", rest[: sizes["grpo"]]), ("eval", held_out)):
        make([record for record in chosen if record.id not in made])
        for record in chosen:
            if "plan" in made[record.id]:
                placed[record.id] = name
    return made


def add_pairs(records, rows, scorer, seed):
    """Put `rejected`, {kind: text}, into SFT's rows: perturbations that are really worse. The
    checker finds a violation; where it finds none, the judge's sum is lower."""
    legal = []  # (row, kind, Case)
    for record, row in zip(records, rows):
        rng = random.Random(f"dpo {seed} {record.id}")
        other_calls = protocol.check(rng.choice(rows)["response"]).tool_calls
        row["rejected"] = {}
        for kind, check in broken_responses(row, other_calls, rng):
            if check.legal:
                legal.append((row, kind, Case(record.question, record.images, check)))
            else:
                row["rejected"][kind] = check.text
    scores = scorer.score([case for _, _, case in legal])
    for (row, kind, case), score in zip(legal, scores):
        if score and sum(getattr(score, name) - row["scores"][name] for name in ACCEPT) < 0:
            row["rejected"][kind] = case.check.text


def write_sets(folder, records, placed, made):
    """The four files, in the order of raw.jsonl. Returns what is in each, for the card."""
    sets = {name: [] for name in SETS}
    for record in records:
        name = placed[record.id]
        if name not in sets:
            continue
        item = made[record.id]
        row = record_row(record, folder) | {"plan": item["plan"]}
        if name == "eval":
            row["benchmark"] = "held-out"
        if name == "sft":
            for kind, text in item["rejected"].items():
                pair = {"chosen": item["response"], "rejected": text, "perturbation": kind}
                sets["dpo"].append(row | {"id": f"{record.id}-{kind}"} | pair)
            row["response"] = item["response"]
        sets[name].append(row)
    card = {}
    for name, rows in sets.items():
        write_jsonl(folder / f"{name}.jsonl", rows)
        card[name] = {
            "rows": len(rows),
            "topologies": Counter(row["plan"]["topology"] for row in rows),
            "sources": Counter(str(row["meta"].get("source", "not given")) for row in rows),
        }
    card["dpo"]["perturbations"] = Counter(row["perturbation"] for row in sets["dpo"])
    return card


def main(argv):
    """Write the four sets and card.json from <folder>/raw.jsonl; what is made is in <folder>/work.

    Flags as in config.py; the folder by --data or DATA. Raises DataError on bad raw data,
    ConfigError on a folder made otherwise, JudgeError when teacher or judge is down."""
    config = parse_config(argv)
    refuse_dry_run(config)
    name = config.data or os.environ.get("DATA", "")
    if not name:
        raise ConfigError("build.py builds from your data: give --data FOLDER with a raw.jsonl")
    folder = Path(name)
    records = read_raw(folder)
    work = folder / "work"
    there = [name for name in SETS if (folder / f"{name}.jsonl").exists()]
    if there and not work.exists():
        raise ConfigError(f"{folder} has {', '.join(there)} already; move them away first")
    # a little under max_response: a broken response may be longer than the one it is made from
    params = {"temperature": 0.7, "max_tokens": config.max_response * 9 // 10}
    teacher = judge_from_env(work / "cache-teacher", "TEACHER", params)
    scorer = judge_from_env(work / "cache-judge")
    inputs = {
        "raw": records_fingerprint(records),
        "teacher": f"{teacher.model} {teacher.params}",
        "judge": f"{scorer.model} {scorer.params}",
    }
    lock_folder(work)
    card_path = folder / "card.json"
    if not card_path.exists():
        teacher.preflight()
        scorer.preflight()
    guard(work, config, "build", inputs)
    if card_path.exists():
        return print(f"build: {folder} is there already")
    share = min(1, len(records) / sum(SIZES.values()))
    sizes = {name: round(size * share) for name, size in SIZES.items()}
    placed = split_items(records, sizes["eval"])
    made = make_items(records, placed, sizes, teacher, scorer, config)
    write_jsonl(work / "items.jsonl", made.values())
    chosen = [record for record in records if placed[record.id] == "sft"]
    add_pairs(chosen, [made[record.id] for record in chosen], scorer, config.seed)
    items = Counter(placed.values())  # every raw item is in one count
    card = {"inputs": inputs, "items": items} | write_sets(folder, records, placed, made)
    write_text(card_path, json.dumps(card, indent=1, ensure_ascii=False) + "\n")  # last
    counts = f"teacher {dict(teacher.counts)}, judge {dict(scorer.counts)}"
    print(f"build: {folder}: {dict(items)}; {counts}")


if __name__ == "__main__":
    run_command(main, DataError, StageError, JudgeError)

"""Raw cases -> planned SFT, DPO, GRPO and evaluation sets (SaFeR-ToolKit section on data, as far as PAPERS 1.4 knows it).

    python build.py --recipe tiny                    writes out/tiny/data/{sft,dpo,grpo,eval}.jsonl and its pictures
    python build.py --recipe 3b --data my/data       the same four sets from my/data/raw.jsonl, by a teacher model and a judge model
    python build.py raw --from beavertails-v=FOLDER --to my/data/raw.jsonl

  SFT   what the teacher wrote under the planned prompt, kept when the checker finds it legal (real data: and the judge finds it good)
  DPO   chosen: a response that the judge gives full marks (real data: an SFT response); rejected: perturbations of it, about three
        each (paper: 18.6k pairs of 6k items), and in the miniature world the first pass where that was worse
  GRPO  prompts only
  eval  held-out combinations (real data: no image and no question in common with the rest)

The paper says only that rejected responses inject errors of tool selection or tool execution; the six kinds below are ours.
"""

import argparse
import collections
import hashlib
import json
import os
import random
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

import data
import judge
import planner
import protocol
import split
from config import ConfigError, parse_config
from trainer import StageError, lock_folder

PERTURBATIONS = ("wrong-tool", "dropped-tier", "broken-order", "invented-observation", "contradiction", "wrong-decision")


def any_fields(tool, rng):
    """Legal field values at random, for a call that should not be there."""
    return {field.name: rng.choice(field.values) if field.type == "enum" else
            str(rng.randint(field.low, field.high)) if field.type == "int" else "none" for field in protocol.TOOLS[tool].fields}


def perturb(kind, calls, answer, plan, wrong_answer, other_calls, rng):
    """Break a good response in one stated way.

    Args: kind: one of PERTURBATIONS; calls: list of (tool, fields); wrong_answer: an answer with the opposite decision;
        other_calls: the calls of another record, where invented observations come from.
    Returns (calls, answer), or None when this response cannot be broken in this way.
    """
    tier = lambda tool: protocol.TOOLS[tool].tier
    if kind == "wrong-tool":  # a call that the plan does not have, in the place of one that it has
        outside = [tool for tool in protocol.TOOLS if tool not in plan.tools]
        if not outside:
            return None
        place, tool = rng.randrange(len(calls)), rng.choice(outside)
        return calls[:place] + [(tool, any_fields(tool, rng))] + calls[place + 1:], answer
    if kind == "dropped-tier":
        gone = rng.choice(sorted({tier(tool) for tool, _ in calls}))
        kept = [call for call in calls if tier(call[0]) != gone]
        return (kept, answer) if kept else None
    if kind == "broken-order":
        return (calls[::-1], answer) if len(calls) > 1 else None
    if kind == "invented-observation":  # what another picture showed
        seen = {tool: fields for tool, fields in other_calls if tier(tool) == "perception"}
        places = [i for i, (tool, fields) in enumerate(calls) if tool in seen and seen[tool] != fields]
        if not places:
            return None
        place = rng.choice(places)
        return calls[:place] + [(calls[place][0], seen[calls[place][0]])] + calls[place + 1:], answer
    flip = {"comply": "refuse", "refuse": "comply", "redirect": "comply"}
    flipped = [(tool, {"decision": flip[fields["decision"]]} if tool == "SAFETY-GATE" else fields) for tool, fields in calls]
    if kind == "contradiction":  # the gate decides against what was just found; the answer stays
        return flipped, answer
    if kind == "wrong-decision":  # over-refusal or under-refusal, consistently from the gate on
        return [call for call in flipped if call[0] not in ("REDIRECT-ENGINE", "REFUSAL-GENERATOR")], wrong_answer
    raise ValueError(f"perturbation {kind!r}: expected one of {', '.join(PERTURBATIONS)}")


# ---- real data -----------------------------------------------------------------------------------

SIZES = {"sft": 6000, "grpo": 6000, "eval": 1000}  # items, as the paper; fewer raw items are shared out in the same proportion
PAIRS = 3           # rejected responses per SFT item; paper: 18.6k of 6k items
ACCEPT = judge.Scores(task_success=7, safety=8, helpfulness=5, tool_quality=6)  # the least that an SFT response must have. Ours
ATTEMPTS = 2        # an illegal trace is sent back to the teacher with its faults once. Ours
CHUNK = 64          # raw items whose outcomes are written together: what a killed run loses at most
BARE_REFUSAL = "I can't help with that."
TEST_SETS = ("mmsafetybench", "mssbench", "siuo", "vlsbench", "mossbench", "toolkitbench", "pope", "mmvet", "mmmu", "mmstar", "mathvista")
TEACHER_NOTE = """
Use the form to the letter: all fields of a tool, values as listed, text values short, without semicolons, true to image and question.
The answer follows the decision. comply: help fully. redirect: say what you will not do and why, then help with a safe alternative.
refuse: decline, say why, and point to help."""


def read_raw(folder):
    """<folder>/raw.jsonl -> records, with every problem told before a single request: those of data.py, unknown labels, test sets."""
    path = os.path.join(folder, "raw.jsonl")
    records, problems = data.read_records(path, "grpo"), []
    for record in records:
        source, expected = str(record.meta.get("source", "")), record.meta.get("expected")
        if re.sub(r"\W|_", "", source.casefold()) in TEST_SETS:
            problems.append(f"{record.where}: meta.source: {source} is a test set; training on it makes its evaluation worthless")
        if expected is not None and expected not in judge.DECISIONS:
            problems.append(f"{record.where}: meta.expected: must be one of {', '.join(judge.DECISIONS)}, got {expected!r:.60}")
    if problems:
        raise data.DataError(f"{len(problems)} problem(s) in {path}:\n  " + "\n  ".join(problems))
    return records


def plan_record(record, teacher, urls):
    """(plan, who planned): given in the record, by rule from its labels, by the teacher model, or by rule after its unusable replies."""
    if record.plan:
        return record.plan, "given"
    if "signals" in record.meta:
        return planner.plan_by_rules(record.meta["signals"])[0], "labels"
    plan, why = planner.plan_by_endpoint(teacher.chat, record.question, urls, {"image": bool(record.images)})
    return plan, "rule" if why.startswith("By rule") else "model"


def draft(record, teacher, config, respond):
    """One raw record -> its row of a work file: plan, and with `respond` the teacher's response and whether the checker lets it pass.

    The response is written anew from what the parser read, so that later a perturbation differs from it in nothing but its fault.
    """
    try:
        urls = [judge.image_data_url(path, config.min_pixels, config.max_pixels) for path in record.images]  # what the policy will see
        plan, by = plan_record(record, teacher, urls)
        row = {"id": record.id, "outcome": "planned", "plan": protocol.plan_to_dict(plan), "planned_by": by}
        if not respond:
            return row
        system = {"role": "system", "content": planner.system_prompt("planned", plan) + TEACHER_NOTE}
        messages = [system, judge.user_message(record.question, urls)]
        for _ in range(ATTEMPTS):
            reply = teacher.chat(messages).rpartition("</think>")[2]  # a thinking model's own draft is no part of the trace
            if re.search("[\ud800-\udfff]", reply):
                raise judge.Fault("half a character", "a lone surrogate, which neither a file nor a tokenizer takes")
            check = protocol.check(reply, plan)
            if check.legal:
                break
            faults = "\n".join(f"- line {fault.line}: {fault.message}" for fault in check.violations[:20])
            again = f"Not usable:\n{faults}\nWrite all of it again."
            messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": again}]
    except judge.Fault as fault:
        return {"id": record.id, "outcome": f"failed: teacher, {fault.reason}"}
    if not check.legal:
        return {**row, "outcome": "rejected: checker", "reasons": sorted({fault.kind for fault in check.violations})}
    calls = [(call.tool, call.fields) for call in check.calls]
    row |= {"response": protocol.render_response(calls, check.answer), "decision": decision_of(calls, check.answer)}
    expected = record.meta.get("expected")
    if expected and (row["decision"] == "comply") != (expected == "comply"):  # a redirect may stand for a refusal; the judge weighs that
        return {**row, "outcome": "rejected: label", "reasons": [f"{row['decision']} for {expected}"]}
    return row


def decision_of(calls, answer):
    """What a response decides: by its gate, or by the form of its answer where the plan has no gate."""
    return next((fields["decision"] for tool, fields in reversed(calls) if tool == protocol.GATE), judge.answer_form(answer))


def draft_all(records, teacher, config, respond):
    """Rows of `draft`, in order, asked side by side. Raises judge.JudgeError when the teacher is down."""
    with ThreadPoolExecutor(teacher.threads) as pool:
        return list(pool.map(lambda record: draft(record, teacher, config, respond), records))


def sft_rows(records, teacher, scorer, config):
    """Rows of a chunk of SFT candidates, each with its outcome: accepted, rejected by checker, label or judge, or failed."""
    rows = draft_all(records, teacher, config, respond=True)
    asked = [(row, record) for row, record in zip(rows, records) if row["outcome"] == "planned"]
    scores = scorer.score([judge.Case(record.question, record.images, row["response"], record.meta) for row, record in asked])
    for (row, _), score in zip(asked, scores):
        low = score and [name for name, least in asdict(ACCEPT).items() if getattr(score, name) < least]
        row["outcome"] = "failed: judge" if score is None else "rejected: judge" if low else "accepted"
        row |= {"reasons": low} if low else {"scores": asdict(score)} if score else {}
    return rows


def broken_responses(row, others, rng):
    """[(kind, text)]: an accepted response broken in each way that it can be broken, at most PAIRS + 1 of them, in random order.

    wrong-decision is a bare refusal where help was due. The other way round a model would have to write harm, so a refusal's answer is
    never flipped: there the contradiction (the gate says comply, the answer stays) is all. invented-observation needs `others`.
    """
    check, plan = protocol.check(row["response"]), protocol.plan_from_dict(row["plan"])
    calls, found = [(call.tool, call.fields) for call in check.calls], []
    for kind in rng.sample(PERTURBATIONS, len(PERTURBATIONS)):
        if kind == "wrong-decision" and row["decision"] != "comply" or kind == "invented-observation" and not others:
            continue
        other = protocol.check(rng.choice(others)["response"]).calls if kind == "invented-observation" else []
        broken = perturb(kind, calls, check.answer, plan, BARE_REFUSAL, [(call.tool, call.fields) for call in other], rng)
        text = broken and protocol.render_response(*broken)
        if text and text != row["response"]:  # without a gate nothing can be flipped
            found.append((kind, text))
    return found[:PAIRS + 1]


def dpo_rows(items, scorer, seed):
    """Rows of a chunk of (record, accepted row): the first PAIRS broken responses that are really worse.

    Worse: the checker finds a violation, for the accepted response has none; where it finds none, the judge's scores have a lower sum.
    """
    tried = []  # (number of the item, kind, text, whether it is worse or None)
    for number, (record, row) in enumerate(items):
        others = [other for there, other in items if there.images and not set(there.images) & set(record.images)]
        for kind, text in broken_responses(row, others, random.Random(f"dpo {seed} {record.id}")):
            legal = protocol.check(text, protocol.plan_from_dict(row["plan"])).legal
            tried.append([number, kind, text, None if legal else "worse"])
    asked = [attempt for attempt in tried if attempt[3] is None]
    scores = scorer.score([judge.Case(items[number][0].question, items[number][0].images, text) for number, _, text, _ in asked])
    for attempt, score in zip(asked, scores):
        full = sum(items[attempt[0]][1]["scores"].values())
        attempt[3] = "failed: judge" if score is None else "worse" if sum(asdict(score).values()) < full else "no worse"
    return [{"id": record.id, "pairs": [(kind, text) for at, kind, text, how in tried if at == number and how == "worse"][:PAIRS],
             "unused": [f"{kind}: {how}" for at, kind, _, how in tried if at == number and how != "worse"]}
            for number, (record, _) in enumerate(items)]


def in_chunks(folder, stage, items, make):
    """Yields the rows of make(CHUNK items) for all items; what <folder>/work holds is read, not made again."""
    with tqdm(total=len(items), desc=f"build: {stage}", leave=False) as bar:
        for start in range(0, len(items), CHUNK):
            path, part = os.path.join(folder, "work", f"{stage}-{start // CHUNK:05d}.jsonl"), items[start:start + CHUNK]
            if not os.path.exists(path):
                data.write_jsonl(path, make(part))
            rows = read_rows(path, {"id"})
            if len(rows) != len(part):  # all rows behind would belong to other items
                raise data.DataError(f"{path}: damaged: has {len(rows)} rows for {len(part)} items; delete it, and it is made again")
            yield from rows
            bar.update(len(part))


def read_rows(path, needed=frozenset()):
    """The objects of a file that this project wrote a line at a time, without the half line that an interruption leaves at its end.

    Raises DataError, with file and line, for what is no object with the needed keys."""
    rows = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n")[:-1], 1):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):  # ValueError: not UTF-8 too
            rows.append(None)
        if not isinstance(rows[-1], dict) or not needed <= rows[-1].keys():
            raise data.DataError(f"{path}:{number}: damaged: expected a JSON object{' with ' * bool(needed)}{', '.join(sorted(needed))}; "
                                 "put the line right, or delete the file: what it held is then made again")
    return rows


def check_work(folder, path, settings):
    """Raises ConfigError when path, the settings of <folder>/work, has others, or when there are sets without it: not ours to replace."""
    if os.path.exists(path):
        before = (read_rows(path) or [{}])[0]
        changed = [f"{name} was {before.get(name)!r}, is {value!r}" for name, value in settings.items() if before.get(name) != value]
        if changed:
            raise ConfigError(f"{folder}/work was begun with other settings ({'; '.join(changed)}); move it and the sets away first")
        return
    there = [name for name in (*data.SETS, "card") if os.path.exists(data.set_path(folder, name))]
    if there:
        raise ConfigError(f"{folder} has {', '.join(there)} already, and no work folder that tells their making; move them away first")


def ask_models(folder, records, held, train, sizes, teacher, scorer, config):
    """Everything that asks a model. Returns (item number -> row of its draft or plan, item number -> set, rows of dpo_rows).

    Training items are drafted until there are enough good ones; of the rest, those that were rejected among them, come the GRPO prompts.
    """
    plan_only = lambda part: draft_all(part, teacher, config, respond=False)
    rows, place = {}, {}
    for i, row in zip(train, in_chunks(folder, "sft", [records[i] for i in train], lambda part: sft_rows(part, teacher, scorer, config))):
        rows[i] = row
        if row["outcome"] == "accepted":
            place[i] = "sft"
        if len(place) == sizes["sft"]:
            break
    if not place:
        counts = ", ".join(f"{count} {what}" for what, count in collections.Counter(row["outcome"] for row in rows.values()).items())
        raise data.DataError(f"no response of the teacher was accepted ({counts}), so there is nothing to train on: look at {folder}/work, "
                             "try another TEACHER_MODEL, and move that folder away before")
    pairs = list(in_chunks(folder, "dpo", [(records[i], rows[i]) for i in place], lambda part: dpo_rows(part, scorer, config.seed)))
    rest = [i for i in train if i not in rows or rows[i]["outcome"].startswith("rejected")]
    for name, chosen in (("grpo", rest[:sizes["grpo"]]), ("eval", held)):
        place |= dict.fromkeys(chosen, name)
        new = [i for i in chosen if i not in rows]
        rows |= zip(new, in_chunks(folder, name, [records[i] for i in new], plan_only))
    return rows, place | {i: row["outcome"] for i, row in rows.items() if row["outcome"].startswith("failed")}, pairs


def write_sets(folder, records, rows, place, pairs):
    """The four files in the order of raw.jsonl. Returns set -> its rows."""
    sets, broken = {name: [] for name in data.SETS}, {row["id"]: row["pairs"] for row in pairs}
    for i, record in enumerate(records):
        if place.get(i) not in data.SETS:
            continue
        row = {"id": record.id, "images": [os.path.relpath(path, folder) for path in record.images], "question": record.question,
               "plan": rows[i]["plan"], "meta": record.meta}
        extra = {"sft": {"response": rows[i].get("response")}, "eval": {"benchmark": "held-out"}}.get(place[i], {})
        sets[place[i]].append(row | extra)
        sets["dpo"] += [{**row, "id": f"{record.id}-{kind}", "chosen": rows[i]["response"], "rejected": text, "perturbation": kind}
                        for kind, text in broken.get(record.id, [])]
    for name, lines in sets.items():
        data.write_jsonl(os.path.join(folder, f"{name}.jsonl"), lines)
    return sets


def data_card(settings, records, rows, place, pairs, sets):
    """What became of every raw item, and what is in each set: counts only. The counts under `items` sum to the raw items."""
    count = lambda values: dict(sorted(collections.Counter(map(str, values)).items()))
    about = {"source": lambda row: row["meta"].get("source", "not given"), "category": lambda row: row["meta"].get("category", "not given"),
             "topology": lambda row: row["plan"]["topology"], "persona": lambda row: row["plan"]["persona"]}
    rejected = [row for row in rows.values() if row["outcome"].startswith("rejected")]
    return {"settings": settings, "raw": len(records), "items": count(place.get(i, "beyond the sizes") for i in range(len(records))),
            "sets": {name: len(lines) for name, lines in sets.items()},
            **{f"by {name}": {kind: count(map(of, lines)) for kind, lines in sets.items()} for name, of in about.items()},
            "sft decisions": count(row["decision"] for i, row in rows.items() if place[i] == "sft"),
            "planned by": count(row["planned_by"] for row in rows.values() if "planned_by" in row),
            "rejected drafts (items become GRPO prompts)": count(row["outcome"] for row in rejected),
            "reasons (an item may have several)": count(f"{row['outcome']}, {reason}" for row in rejected for reason in row["reasons"]),
            "pairs by perturbation": count(row["perturbation"] for row in sets["dpo"]),
            "perturbations left out": count(reason for row in pairs for reason in row["unused"])}


def build_real(config, folder):
    """Write the four sets and card.json from <folder>/raw.jsonl. What is finished is kept in <folder>/work.

    Raises data.DataError on bad raw data, ConfigError on a folder made otherwise, judge.JudgeError when teacher or judge is down.
    """
    records, card_path = read_raw(folder), os.path.join(folder, "card.json")
    cache = lambda name: os.path.join(folder, "work", f"cache-{name}")
    # a little under max_response: a broken response may be longer than the one it is made from
    teacher = judge.judge_from_env(cache("teacher"), "TEACHER", {"temperature": 0.7, "max_tokens": config.max_response * 9 // 10})
    teacher.name, scorer = teacher.name.replace("judge", "teacher", 1), judge.judge_from_env(cache("judge"))
    keys = list(map(split.item_keys, records))
    sizes = {name: min(size, len(records) * size // sum(SIZES.values())) for name, size in SIZES.items()}
    content = [(record.id, record.question, record.plan, record.meta, *hashes) for record, hashes in zip(records, keys)]
    settings = {"raw": hashlib.sha256(repr(content).encode()).hexdigest(), "teacher": [teacher.model, teacher.params],
                "judge": [scorer.model, scorer.params], "accept": asdict(ACCEPT), "attempts": ATTEMPTS, "sizes": sizes, "pairs": PAIRS,
                "chunk": CHUNK, "seed": config.seed, "pixels": [config.min_pixels, config.max_pixels]}
    held, train, repeated = split.split_items(keys, sizes["eval"])
    if not held:
        raise data.DataError(f"{folder}/raw.jsonl: of {len(records)} items none can be held out for evaluation: "
                             "there are too few, or shared images or questions link them all")
    settings_path = os.path.join(folder, "work", "settings.jsonl")
    check_work(folder, settings_path, settings)
    if all(os.path.exists(os.path.join(folder, name)) for name in (*(f"{name}.jsonl" for name in data.SETS), "card.json")):
        return print(f"build: {folder} is there already")
    lock_folder(Path(folder) / "work")
    for model in (teacher, scorer):
        model.preflight(vision=any(record.images for record in records))
    data.write_jsonl(settings_path, [settings])  # only now, so that what a preflight finds wrong can still be set otherwise
    try:
        rows, place, pairs = ask_models(folder, records, held, train, sizes, teacher, scorer, config)
    except judge.JudgeError as error:
        raise judge.JudgeError(f"{error}\nbuild: what is finished is kept in {folder}/work; the same command goes on from there") from error
    place |= dict.fromkeys(repeated, "repeated")
    card = data_card(settings, records, rows, place, pairs, write_sets(folder, records, rows, place, pairs))
    with open(card_path + ".part", "w", encoding="utf-8") as file:
        json.dump(card, file, indent=1, ensure_ascii=False)
    os.replace(card_path + ".part", card_path)
    for name in ("items", "sets", "rejected drafts (items become GRPO prompts)"):
        print(f"build: {name}: " + ", ".join(f"{count:,} {what}" for what, count in card[name].items()))
    for model, latest in ((teacher, "teacher"), (scorer, "judge")):
        for reason, example in model.examples.items():
            print(f"build: {latest}, {reason}, {model.counts[reason]} times; the last: {example}")


def make_raw(argv):
    """`raw --from NAME=FOLDER ... --to FILE`: raw items from a data set's original files. Raises ConfigError for what is a test set."""
    parser = argparse.ArgumentParser(prog="build.py raw", description="raw items from the train split of BeaverTails-V")
    parser.add_argument("--from", action="append", required=True, dest="sources", metavar="beavertails-v=FOLDER")
    parser.add_argument("--to", required=True, metavar="FILE", help="such as my/data/raw.jsonl")
    args, rows = parser.parse_args(argv), []
    for name, _, folder in (source.partition("=") for source in args.sources):
        if name != "beavertails-v":
            raise ConfigError(f"--from {name}: is a test set, or unknown; beavertails-v is what can be read for training. "
                              "Training on what the evaluation asks makes its table worthless")
        if not folder:
            raise ConfigError(f"--from {name}: expected {name}=FOLDER")
        if os.path.exists(args.to):
            raise ConfigError(f"--to {args.to}: is there already; name a new file")
        from extras import benchmarks  # needed by this command alone
        for record in benchmarks.read_beavertails_train(folder):
            images = [os.path.relpath(path, os.path.dirname(args.to) or ".") for path in record.images]
            meta = {**record.meta, "source": name}
            rows.append({"id": f"{name}-{len(rows)}", "images": images, "question": record.question, "meta": meta})
    data.write_jsonl(args.to, rows)
    print(f"build: {args.to}: {len(rows)} raw items")


def main(argv):
    """argv: `raw ...`, or settings as in config.py. Raises what the last lines of this file catch."""
    if argv[:1] == ["raw"]:
        return make_raw(argv[1:])
    config = parse_config(argv)
    folder = config.data or os.environ.get("DATA", "")
    if not folder:
        raise ConfigError(f"--recipe {config.recipe} builds from your data: give --data FOLDER, a folder with raw.jsonl")
    return build_real(config, folder)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, ConfigError, data.DataError, StageError, judge.JudgeError) as problem:
        sys.exit(str(problem))
    except KeyboardInterrupt:
        print("\nbuild: stopped; the same command goes on, or begins anew where little is lost", file=sys.stderr)
        sys.exit(130)

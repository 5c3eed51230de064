"""Raw cases -> planned SFT, DPO, GRPO and evaluation sets (SaFeR-ToolKit section on data, as far as PAPERS 1.4 knows it).

    python build.py --recipe tiny        writes out/tiny/data/{sft,dpo,grpo,eval}.jsonl and its pictures

  SFT   what the teacher wrote under the planned prompt, kept when the checker finds it legal
  DPO   chosen: a careful second pass that the judge gives full marks; rejected: perturbations of it, about three each (paper: 18.6k
        pairs of 6k items), and the first pass where that was worse
  GRPO  prompts only
  eval  held-out combinations

The paper says only that rejected responses inject errors of tool selection or tool execution; the six kinds below are ours.
"""

import os
import random
import sys
from dataclasses import asdict, replace

from tqdm import tqdm

import data
import judge
import planner
import protocol
import toy
from config import ConfigError, parse_config

TOY_SIZES = {"sft": 768, "dpo": 320, "grpo": 960, "eval": 360}  # records; DPO: items before they become about three pairs each
PERTURBATIONS = ("wrong-tool", "dropped-tier", "broken-order", "invented-observation", "contradiction", "wrong-decision")


def any_fields(tool, rng):
    """Legal field values at random, for a call that should not be there."""
    return {field.name: rng.choice(field.values) if field.type == "enum" else str(rng.randint(field.low, field.high)) if field.type == "int" else "none"
            for field in protocol.TOOLS[tool].fields}


def perturb(kind, calls, answer, plan, wrong_answer, other_calls, rng):
    """Break a good response in one stated way.

    Args: kind: one of PERTURBATIONS; calls: list of (tool, fields); wrong_answer: an answer with the opposite decision;
        other_calls: the calls of another record, where invented observations come from.
    Returns (calls, answer), or None when this response cannot be broken in this way.
    """
    tier = lambda tool: protocol.TOOLS[tool].tier
    if kind == "wrong-tool":  # a call that the plan does not have, in the place of one that it has
        outside = [tool for tool in protocol.TOOLS if tool not in plan.tools]
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
    if kind == "contradiction":  # the gate decides against what was just found; the answer stays
        flip = {"comply": "refuse", "refuse": "comply", "redirect": "comply"}
        return [(tool, {"decision": flip[fields["decision"]]} if tool == "SAFETY-GATE" else fields) for tool, fields in calls], answer
    if kind == "wrong-decision":  # over-refusal or under-refusal, consistently from the gate on
        flip = {"comply": "refuse", "refuse": "comply", "redirect": "comply"}
        kept = [(tool, {"decision": flip[fields["decision"]]} if tool == "SAFETY-GATE" else fields) for tool, fields in calls if tool not in ("REDIRECT-ENGINE", "REFUSAL-GENERATOR")]
        return kept, wrong_answer
    raise ValueError(f"perturbation {kind!r}: expected one of {', '.join(PERTURBATIONS)}")


# ---- the miniature world ------------------------------------------------------------------------------------------------


def toy_record(name, case, rng, folder):
    """Draw the picture of a case and write its record."""
    path = f"images/{name}.png"
    toy.draw_scene(case, rng).save(os.path.join(folder, path))
    signals = toy.signals(case)
    return {"id": name, "images": [path], "question": case.question, "plan": protocol.plan_to_dict(planner.plan_by_rules(signals)[0]),
            "meta": {"kind": case.kind, "expected": toy.expected(case), "signals": signals, "case": asdict(case)}}


def wrong_answer(case):
    """The answer of the opposite decision."""
    return toy.comply(case) if case.danger else toy.refuse(case, "violence")


def toy_pairs(record, case, other, rng, oracle):
    """All (chosen, rejected, perturbation) rows of one case: none when even the careful teacher is wrong."""
    plan = protocol.plan_from_dict(record["plan"])
    score = lambda text: oracle.score([judge.Case(case.question, (), text, record["meta"])])[0]
    calls, answer = toy.teach(case, rng, careful=True)
    chosen = protocol.render_response(calls, answer)
    if oracle.verdict([judge.Case(case.question, (), chosen, record["meta"])])[0] != judge.Verdict(3, 3, 3):
        return []
    rejected = {}
    for kind in rng.sample(PERTURBATIONS, len(PERTURBATIONS)):
        broken = perturb(kind, calls, answer, plan, wrong_answer(case), toy.right_calls(other), rng)
        if broken and len(rejected) < 3:
            text = protocol.render_response(*broken)
            worse = not protocol.check(text, plan).legal or score(text) != score(chosen)  # a perturbation must really be worse
            if worse:
                rejected[kind] = text
    first = protocol.render_response(*toy.teach(case, rng, careful=False))
    if first != chosen and score(first) != score(chosen):
        rejected["first-pass"] = first
    return [{**record, "id": f"{record['id']}-{kind}", "chosen": chosen, "rejected": text, "perturbation": kind} for kind, text in rejected.items()]


def build_toy(folder, seed, sizes=None):
    """Write the four sets of the miniature world. Evaluation cases are drawn from the held-out combinations only, and do not depend on the seed."""
    os.makedirs(os.path.join(folder, "images"), exist_ok=True)
    train, held = toy.split_cases()
    oracle = toy.ToyJudge()
    for name, size in (sizes or TOY_SIZES).items():
        rng, rows = random.Random("held-out" if name == "eval" else f"{name} {seed}"), []
        pool = held if name == "eval" else train
        for number in tqdm(range(size), desc=f"build: {name}", leave=False):
            case = toy.draw_case(rng.choice(pool[toy.KINDS[number % len(toy.KINDS)]]), rng)
            record = toy_record(f"{name}-{number:04d}", case, rng, folder)
            if name == "sft":
                text = protocol.render_response(*toy.teach(case, rng, careful=False))
                if protocol.check(text, protocol.plan_from_dict(record["plan"])).legal:
                    rows.append({**record, "response": text})
            elif name == "dpo":
                other = toy.draw_case(rng.choice(pool[rng.choice(toy.KINDS)]), rng)
                rows += toy_pairs(record, case, other, rng, oracle)
            else:
                rows.append({**record, "benchmark": "toy"} if name == "eval" else record)
        data.write_jsonl(os.path.join(folder, f"{name}.jsonl"), rows)
        print(f"build: {folder}/{name}.jsonl: {len(rows)} records")


def main(argv):
    config = parse_config(argv)
    folder = os.path.join(config.out, "data")
    if os.path.exists(os.path.join(folder, "eval.jsonl")):  # written last
        return print(f"build: {folder} is there already")
    build_toy(folder, config.seed)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, ConfigError) as problem:
        sys.exit(str(problem))

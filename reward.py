"""Trace and scores -> one number: the reward of the GRPO stage, of SaFeR-ToolKit first, of
SaFeR-VLM at the end (`structured_reward`).

`paper` is the formula of the released code (PAPERS 1.6), weak points included. `checked`, the
default, is ours: the same safety gate and semantic score, but the trace is read by protocol.check,
and what is wrong with it costs. The other forms are its ablations.

    R = gate * (0.1 format + 0.1 depth + 0.1 compliance + 0.7 semantic)
    gate = 1, or 0.05 when the judge calls the answer unsafe

Worked example. Plan: mesh over VISUAL-SCAN, INTENT-RADAR, RISK-SCORER, SAFETY-GATE. Trace:

    [VISUAL-SCAN]: objects=knife; hazard=high
    [RISK-SCORER]: risk=low; score=9; category=none         contradiction: low is 0..3
    [SAFETY-GATE]: decision=comply

    violations   1 (contradiction)                  format     = 1           both blocks, no fault
    valid calls  VISUAL-SCAN, SAFETY-GATE of 4      depth      = 2 / 4       = 0.500
                                                    compliance = 1 / (1 + 1) = 0.500
    scores 10, 10, 8, 6 -> 0..1: 1, 1, 0.778, 0.556
    semantic = 0.40 * 1 + 0.25 * 0.778 + 0.20 * 1 + 0.15 * 0.500 * 0.556 = 0.836
    R = 1 * (0.1 * 1 + 0.1 * 0.500 + 0.1 * 0.500 + 0.7 * 0.836) = 0.785

Departures from the release in `checked`: a violation always costs, depth counts only valid calls
that the plan wants, tool_quality counts only as far as the trace is compliant, the gate closes over
the trace terms too, and a judge that fails yields no reward (the release invents a score of 1 or
5). No torch: usable beside another trainer, see extras/bridges.py.
"""

import math
import re
from dataclasses import dataclass

import protocol

WEIGHTS = {"format": 0.1, "depth": 0.1, "compliance": 0.1, "semantic": 0.7}  # release: .1 .2 - .7
FORMS = {  # form -> the parts that count; their weights are scaled to sum to 1
    "checked": ("format", "depth", "compliance", "semantic"),
    "no-depth": ("format", "compliance", "semantic"),
    "no-compliance": ("format", "depth", "semantic"),
    "no-tool-quality": ("format", "depth", "compliance", "semantic"),
    "answer": ("semantic",),
    "answer+format": ("format", "semantic"),
    "answer+format+depth": ("format", "depth", "semantic"),
}
WITH_TOOL_QUALITY = ("checked", "no-depth", "no-compliance")  # inside the semantic score
SAFE = 0.60  # release: normalized safety below this closes the gate, so raw 6 and less
SUCCESS = 0.60  # release: normalized task success from here on takes the success path, so raw 7
UNSAFE_SHARE = 0.05  # ours: the best unsafe response (0.035) stays below the worst safe one (0.046)
BLOCKS_SHARE = 0.5  # ours: what the semantic score keeps when a block is missing (release: nothing)
FREE_DEPTH = 4  # ours: valid calls for full depth when no plan was shown: one a tier and one more
BLOCK_FAULTS = ("format", "empty", "too-long")  # violations of the blocks
TOOL_TAG = re.compile(r"\[[A-Z0-9_-]+\] ?:")  # release: anywhere in the thinking block


@dataclass(frozen=True)
class Reward:
    """`total` in 0..1, the parts it is made of, and for each part a sentence for a person."""

    total: float
    parts: dict[str, float]
    reasons: tuple[str, ...]


# ---- SaFeR-ToolKit
# ---------------------------------------------------------------------------------


def normalized(scores):
    """(task success, safety, helpfulness, tool quality) from 1..10 to 0..1: (x - 1) / 9.

    Raises ValueError on anything else: a score out of range is a broken judge."""
    raw = (scores.task_success, scores.safety, scores.helpfulness, scores.tool_quality)
    if not all(type(x) is int and 1 <= x <= 10 for x in raw):
        raise ValueError(f"scores must be four integers from 1 to 10, got {raw}")
    return [(x - 1) / 9 for x in raw]


def semantic_score(scores, quality=1.0):
    """(score 0..1, "gate" | "success" | "explore") from a judge's scores (PAPERS 1.6).

    quality: the share of tool_quality that counts (ours); None leaves that term out and gives its
    weight to the others."""
    task, safety, helpful, tools = normalized(scores)
    if safety < SAFE:
        return 0.20 * safety, "gate"  # release; at most 0.111
    shared = 0.25 * helpful + 0.20 * safety
    success = 0.40 * task + shared  # release
    explore = 0.50 * task + shared
    if quality is None:
        success, explore = success / 0.85, explore / 0.95
    else:
        success += 0.15 * quality * tools
        explore += 0.05 * quality * tools
    if task >= SUCCESS:
        return success, "success"
    return min(0.60, explore), "explore"  # release: cap 0.60


def first_block(response, tag):
    """What is between the first <tag> and the first </tag> after it, or None."""
    _, opened, rest = response.partition(f"<{tag}>")
    block, closed, _ = rest.partition(f"</{tag}>")
    return block if opened and closed else None


def paper_reward(response: str, scores) -> Reward | None:
    """The released formula, R = 0.1 format + 0.2 depth + 0.7 semantic (PAPERS 1.6).

    None when scores is None. Kept with its weak points: a pair of tags anywhere is format, six
    distinct tags with empty values are depth; order, tier, topology, values are not read. One
    departure: without scores the release goes on with 1 or 5."""
    if scores is None:
        return None
    thinking = first_block(response, "thinking")
    whole = thinking is not None and first_block(response, "answer") is not None
    tags = [tag.rstrip(" :") for tag in TOOL_TAG.findall(thinking or "")]
    distinct = len(set(tags))
    depth = 0.0
    if len(tags) >= 3:  # release: log growth, full at 6 tags, times the share of distinct ones
        depth = min(1.0, math.log(len(tags) + 1) / math.log(7)) * distinct / len(tags)
    semantic, branch = semantic_score(scores)
    if not whole:
        semantic, branch = 0.0, "no block"  # release
    reasons = (
        f"format {whole:.0f}: both pairs of tags {'are there' if whole else 'are not there'}",
        f"depth {depth:.3f}: {len(tags)} tags, {distinct} distinct",
        f"semantic {semantic:.3f}: {branch}",
    )
    parts = {"format": float(whole), "depth": depth, "semantic": semantic}
    return Reward(0.1 * whole + 0.2 * depth + 0.7 * semantic, parts, reasons)


def wanted_tools(plan, decision):
    """The tools that a complete trace of this plan calls when the gate says `decision`. Ours.

    A shield that refuses ends at its gate; the generators of an alternative or a refusal are wanted
    when the decision asks for them (None: no gate value, so all are)."""
    unwanted = set()
    if decision in ("comply", "refuse"):
        unwanted.add("REDIRECT-ENGINE")
    if decision in ("comply", "redirect"):
        unwanted.add("REFUSAL-GENERATOR")
    if plan.topology == "shield" and decision == "refuse":
        perception, _, _ = protocol.tools_by_tier(plan.tools)
        return {*perception, protocol.GATE}
    return set(plan.tools) - unwanted


def trace_depth(checked):
    """(depth 0..1, reason): the share of the wanted tools that have a call without a violation."""
    faulty = {violation.line for violation in checked.violations}
    valid = {call.tool for call in checked.calls if call.line not in faulty}
    if checked.plan is not None:
        wanted = wanted_tools(checked.plan, checked.decision)
        done = len(valid & wanted)
        return done / len(wanted), f"{done} of {len(wanted)} wanted tools have a valid call"
    # A shield that refuses at its gate has no reasoning tier to add calls from.
    _, reasoning, _ = protocol.tools_by_tier(valid)
    enough = FREE_DEPTH - (checked.decision == "refuse" and not reasoning)
    reason = f"{len(valid)} distinct valid calls, {enough} are enough without a plan"
    return min(1.0, len(valid) / enough), reason


def checked_reward(checked, scores, form="checked") -> Reward | None:
    """The default reward, or one of its ablations; None when scores is None. Ours, after PAPERS
    1.6.

    format      1 / (1 + n) with n faults of the blocks, 0 when a block is missing
    depth       share of the plan's wanted tools with a valid call
    compliance  1 / (1 + n) with n violations of any kind, so each further one costs; 0 without a
    call semantic    as the release, with tool_quality times compliance
    gate        1; UNSAFE_SHARE when safety is under the threshold, and then semantic is safety
    alone
    """
    if scores is None:
        return None
    names = FORMS[form]
    count = len(checked.violations)
    whole = checked.thinking is not None and checked.answer is not None
    faults = sum(violation.kind in BLOCK_FAULTS for violation in checked.violations)
    compliance = 1 / (1 + count) if checked.calls else 0.0
    depth, why_depth = trace_depth(checked)
    quality = None
    if form in WITH_TOOL_QUALITY:
        quality = compliance if "compliance" in names else 1.0
    semantic, branch = semantic_score(scores, quality)
    gate = 1.0
    if branch == "gate":
        gate = UNSAFE_SHARE
        semantic = normalized(scores)[1]
    elif not whole and "format" in names:
        semantic *= BLOCKS_SHARE
        branch += ", halved for a missing block"
    parts = {
        "format": 1 / (1 + faults) if whole else 0.0,
        "depth": depth,
        "compliance": compliance,
        "semantic": semantic,
    }
    why = {
        "format": f"{faults} faults of the blocks" + ("" if whole else ", one is missing"),
        "depth": why_depth,
        "compliance": f"{count} violations in {len(checked.calls)} calls",
        "semantic": branch,
    }
    weighted = sum(WEIGHTS[name] * parts[name] for name in names)
    total = gate * weighted / sum(WEIGHTS[name] for name in names)
    reasons = [f"{name} {parts[name]:.3f}: {why[name]}" for name in names]
    for violation in checked.violations[:20]:
        reasons.append(f"line {violation.line}, {violation.kind}: {violation.message}")
    if count > 20:
        reasons.append(f"and {count - 20} further violations")
    return Reward(total, {name: parts[name] for name in names} | {"gate": gate}, tuple(reasons))


def compute_reward(form: str, checked, scores, answer_form=None) -> Reward | None:
    """The reward of one response by `paper` or one of FORMS; None when scores is None.

    Args: checked: protocol.check of the response, against the plan that was shown; answer_form: see
    protocol.with_answer_form. Raises ValueError on another form."""
    if form == "paper":
        return paper_reward(checked.text, scores)
    if form not in FORMS:
        raise ValueError(f"reward form must be paper or one of {', '.join(FORMS)}, not {form!r}")
    return checked_reward(protocol.with_answer_form(checked, answer_form), scores, form)


# ---- SaFeR-VLM
# -------------------------------------------------------------------------------------

HALLUCINATION_CAP, CONTRADICTION_CAP = 4, 3  # paper (PAPERS 2.4), on the scale 1..10
# Severity -> points off. Paper: 2 to 4, by what was not found.
MISSING_GROUNDING = {0: 0, 1: 2, 2: 3, 3: 4}


def structured_reward(
    grades,
    weight_reasoning=0.5,
    weight_logic=0.25,
    weight_grounding=0.25,
    weight_safety=0.5,
    penalties=True,
) -> Reward | None:
    """The structured reward of SaFeR-VLM (PAPERS 2.4) from judge.Grades; None when grades is None.

        block = (w_l logic + w_g grounding + w_s safety) / (w_l + w_g + w_s)    1..10, of each block
        reasoning = min(reasoning, 3)                  where it contradicts itself or the answer
        score = w_r reasoning + (1 - w_r) answer
        score = min(score, 4)                          where it hallucinates
        score = max(1, score - (2, 3 or 4))            where decisive evidence is not mentioned
        total = (score - 1) / 9

    Criteria, scale, weighted sums, caps and points are the paper's, and that the penalties come
    after the sums. All weights, the mapping to 0..1, the order of the penalties, that 4 caps the
    whole score, and points by severity are ours, since they were not found. An unsafe response is
    not
    gated: its own safety scores hold it down. parts: the blocks before penalties, and what the
    penalties took, each 0..1. Raises ValueError on values out of range."""
    if grades is None:
        return None
    weights = (weight_logic, weight_grounding, weight_safety)

    def block(logic, grounding, safety):
        criteria = (logic, grounding, safety)
        if not all(type(x) is int and 1 <= x <= 10 for x in criteria):
            raise ValueError(f"criteria must be integers from 1 to 10, got {grades}")
        return sum(w * x for w, x in zip(weights, criteria)) / sum(weights)

    if grades.missing_grounding not in MISSING_GROUNDING:
        raise ValueError(f"missing_grounding must be from 0 to 3, got {grades}")
    reasoning = block(grades.reasoning_logic, grades.reasoning_grounding, grades.reasoning_safety)
    answer = block(grades.answer_logic, grades.answer_grounding, grades.answer_safety)
    plain = weight_reasoning * reasoning + (1 - weight_reasoning) * answer
    score = plain
    why = []
    if penalties and grades.contradiction:
        capped = min(reasoning, CONTRADICTION_CAP)
        score = weight_reasoning * capped + (1 - weight_reasoning) * answer
        why.append("contradiction")
    if penalties and grades.hallucination:
        score = min(score, HALLUCINATION_CAP)
        why.append("hallucination")
    if penalties and grades.missing_grounding:
        score = max(1, score - MISSING_GROUNDING[grades.missing_grounding])
        why.append(f"missing grounding of severity {grades.missing_grounding}")
    parts = {
        "reasoning": (reasoning - 1) / 9,
        "answer": (answer - 1) / 9,
        "penalty": (plain - score) / 9,
    }
    safe = "safe" if grades.safe else "unsafe"
    reasons = (
        f"reasoning {reasoning:.2f} and answer {answer:.2f} of 10, {safe}",
        f"{plain - score:.2f} points off: {', '.join(why) or 'nothing'}",
    )
    return Reward((score - 1) / 9, parts, reasons)

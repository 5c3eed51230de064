"""The protocol against independent statements of its rules: walks, mutations, hostile text, plans, prompts and planners.

SAFER_FUZZ=20000 shortens the fuzz test (200,000 texts by default, a few seconds)."""
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import planner  # noqa: E402
import protocol  # noqa: E402
from protocol import TOOLS, TOPOLOGIES, PlanError, check, make_plan, render_call, render_response, sample_walk  # noqa: E402

NAMES = {tier: [name for name, tool in TOOLS.items() if tool.tier == tier] for tier in protocol.TIERS}
GOOD = {   # values that fit together, so that only what a test changes can be wrong
    "VISUAL-SCAN": {"objects": "bread knife, board", "hazard": "medium"}, "OCR-EXTRACT": {"text": "none"},
    "KEYWORD-FLAGGING": {"terms": "kill", "flagged": "yes"}, "CROSS-MODAL-SYNC": {"relation": "consistent"},
    "INTENT-RADAR": {"intent": "ambiguous", "evidence": "asks how to cut"},
    "RISK-SCORER": {"risk": "medium", "score": "5", "category": "weapons"}, "JAILBREAK-SENTINEL": {"wrapper": "none"},
    "SAFETY-GATE": {"decision": "redirect"}, "REDIRECT-ENGINE": {"alternative": "a cooking class"},
    "REFUSAL-GENERATOR": {"reason": "it may hurt someone"}}


def calls_of(walk, refuse=False, **changes):
    """[(tool, fields)] with consistent values; changes: field=value in whichever tool has that field."""
    changes = changes | ({"decision": "refuse"} if refuse else {})
    return [(tool, {key: changes.get(key, value) for key, value in GOOD[tool].items()}) for tool in walk]


def response_of(walk, refuse=False, **changes):
    return render_response(calls_of(walk, refuse, **changes), "Take a class first.")


def kinds(checked):
    return [violation.kind for violation in checked.violations]


def random_plan(topology, rng):
    """A plan of 3 to 10 tools that fits the topology, by construction and without asking the module under test."""
    p, r, d = (rng.sample(NAMES[tier], rng.randint(1, len(NAMES[tier]))) for tier in protocol.TIERS)
    if topology == "tree":
        r = rng.sample(NAMES["reasoning"], rng.randint(2, 3))
        p = rng.sample(NAMES["perception"], len(r) + 1)
    if topology == "shield" and "SAFETY-GATE" not in d:
        d = d[:-1] + ["SAFETY-GATE"]
    tools = p + r + d
    if topology in ("mesh", "shield", "loop"):
        rng.shuffle(tools)   # their plan order means nothing
    return make_plan(rng.choice(list(protocol.PERSONAS)), tools, topology)


def reference_legal(plan, walk, refused):
    """Is `walk` legal? Written over the string of tiers, with no graph, from the table in plan_graph's docstring."""
    p, r, d = ([name for name in plan.tools if TOOLS[name].tier == tier] for tier in protocol.TIERS)
    letters = "".join(TOOLS[name].tier[0] for name in walk)
    distinct = len(set(walk)) == len(walk)
    if plan.topology == "linear":
        return tuple(walk) == plan.tools
    if plan.topology == "mesh":
        return distinct and re.fullmatch("p+r+d+", letters) is not None
    if plan.topology == "tree":
        branches = re.fullmatch("p((?:pr)+)d+", letters)
        pairs = list(zip(walk[1::2], walk[2::2]))[:len(branches[1]) // 2] if branches else []
        return bool(branches) and distinct and walk[0] == p[0] and all(pair in list(zip(p[1:], r)) for pair in pairs)
    if plan.topology == "shield":
        shape = "p+d" if refused else "p+dr+d*"
        return distinct and re.fullmatch(shape, letters) is not None and walk[letters.index("d")] == "SAFETY-GATE"
    rounds = re.fullmatch("(p+r+)(p+r*)?(d+)", letters)
    if not rounds:
        return False
    a, b = len(rounds[1]), len(rounds[1]) + len(rounds[2] or "")
    return all(len(set(part)) == len(part) for part in (walk[:a], walk[a:b], walk[b:]))


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_sampled_walks_are_legal_and_every_mutation_is_reported(topology):
    """1,000 random plans: guards against a graph that forbids its own walks, and against a checker that lets a fault through."""
    rng = random.Random(topology)
    order = {"illegal-transition", "bad-start", "bad-end", "missing-tier"}
    reported = dict.fromkeys(("swap", "drop", "duplicate", "foreign", "invented", "type", "missing", "added"), 0)
    for _ in range(1000):
        plan = random_plan(topology, rng)
        walk = sample_walk(plan, rng)
        refused = topology == "shield" and walk[-1] == "SAFETY-GATE"
        honest = check(response_of(walk, refused), plan)
        assert honest.legal, (plan, walk, honest.violations)
        assert reference_legal(plan, walk, refused)
        assert check(response_of(walk, refused)).legal, (plan, walk)   # the same walk when no plan was shown

        i, j = rng.randrange(len(walk)), rng.randrange(len(walk))
        swapped, dropped, doubled = walk[:], walk[:i] + walk[i + 1:], walk[:i + 1] + walk[i:]
        swapped[i], swapped[j] = walk[j], walk[i]
        merged = {"repeated-call"} if topology == "loop" else set()   # without the call between them, two rounds are one
        for name, mutant, expected in (("swap", swapped, order | merged), ("drop", dropped, order | merged),
                                       ("duplicate", doubled, {"repeated-call"})):
            stopped = refused and "SAFETY-GATE" in mutant
            found = kinds(check(response_of(mutant, refused), plan))
            if reference_legal(plan, mutant, stopped):
                assert not found, (name, plan, mutant, found)   # another walk of the same graph is no fault
            else:
                assert found and set(found) <= expected, (name, plan, mutant, found)
                reported[name] += 1

        calls = calls_of(walk, refused)
        outside = [name for name in TOOLS if name not in plan.tools]
        foreign = [("INVENTED-TOOL", {"a": "b"}, "unknown-tool")] + [(name, GOOD[name], "outside-plan") for name in outside[:1]]
        for tool, fields, expected in foreign:
            mutant = render_response(calls[:i] + [(tool, fields)] + calls[i:], "Fine then.")
            found = kinds(check(mutant, plan))
            assert expected in found and set(found) <= {expected, "contradiction"}, (plan, walk, tool, found)
            reported["foreign" if expected == "outside-plan" else "invented"] += 1
        tool, fields = calls[i]
        field = rng.choice(TOOLS[tool].fields)
        wrong = {"enum": "perhaps", "int": "11", "text": "..."}[field.type]
        for name, changed, expected in (("type", fields | {field.name: wrong}, "filler" if field.type == "text" else "bad-type"),
                                        ("missing", {k: v for k, v in fields.items() if k != field.name}, "missing-field"),
                                        ("added", fields | {"colour": "red"}, "unknown-field")):
            found = check(render_response(calls[:i] + [(tool, changed)] + calls[i + 1:], "Fine then."), plan).violations
            place = [violation for violation in found if violation.line == i + 2 and violation.kind == expected]
            assert len(place) == 1, (name, plan, walk, tool, changed, found)
            reported[name] += 1
    assert min(reported[name] for name in ("duplicate", "invented", "type", "missing", "added")) > 450, reported
    assert reported["swap"] > 200 and reported["drop"] > 50, reported


@pytest.mark.parametrize("topology, walk, refuse, expected", [
    ("linear", "V I G", False, ["illegal-transition"]),            # R-SCORER left out of the chain
    ("linear", "I R G", False, ["bad-start", "missing-tier"]),
    ("linear", "V I R", False, ["bad-end", "missing-tier"]),
    ("mesh", "V R G I", False, ["illegal-transition", "bad-end"]),
    ("mesh", "V G", False, ["missing-tier"]),
    ("mesh", "V V I R G", False, ["repeated-call"]),
    ("mesh", "V I V R G", False, ["repeated-call"]),
    ("mesh", "V I K R G", False, ["illegal-transition"]),          # back to perception
    ("loop", "V I K R G", False, []),
    ("loop", "V I K R V I G", False, ["illegal-transition"]),   # opens a third round
    ("loop", "V V I G", False, ["repeated-call"]),
    ("shield", "V G", True, []),
    ("shield", "V G I R", True, ["illegal-transition", "bad-end"]),
    ("shield", "V G", False, ["bad-end", "missing-tier"]),         # comply or redirect must go on to reasoning
    ("shield", "V I G", False, ["illegal-transition", "illegal-transition", "bad-end"]),
    ("shield", "V G I", False, []),
])
def test_walks_by_hand(topology, walk, refuse, expected):
    """One case for each rule of each topology, with the exact list of kinds: guards against one fault reported as three, or as none."""
    short = {"V": "VISUAL-SCAN", "K": "KEYWORD-FLAGGING", "I": "INTENT-RADAR", "R": "RISK-SCORER", "G": "SAFETY-GATE"}
    tools = [short[x] for x in ("VIRG" if topology == "linear" else "VKIRG")]
    plan = make_plan("analyst", tools, topology)
    found = check(response_of([short[x] for x in walk.split()], refuse), plan)
    assert sorted(kinds(found)) == sorted(expected), found.violations


def test_tree_by_hand():
    """Branches stay together (P_i, then R_i), start at the root, come in any order, and each may lead to the decision."""
    plan = planner.plan_by_rules({"harm": "image-text"})[0]
    v, o, k, r, i, g = plan.tools
    for walk in ([v, o, r, k, i, g], [v, k, i, o, r, g], [v, k, i, g]):
        assert check(response_of(walk), plan).legal
    assert kinds(check(response_of([v, o, i, k, r, g]), plan)) == ["illegal-transition"] * 3   # crossed branches
    assert kinds(check(response_of([o, r, k, i, g]), plan)) == ["bad-start"]
    assert kinds(check(response_of([v, o, k, r, i, g]), plan))[0] == "illegal-transition"


def test_a_look_again_may_revise_but_a_copy_may_not():
    """A loop's second round gives a field a new value legally; a second call in a mesh does not, and changing the value is worse."""
    plan = make_plan("analyst", ["VISUAL-SCAN", "RISK-SCORER", "SAFETY-GATE"], "loop")
    low, high = {"risk": "low", "score": "1", "category": "none"}, {"risk": "high", "score": "9", "category": "weapons"}
    scan, gate = ("VISUAL-SCAN", GOOD["VISUAL-SCAN"]), ("SAFETY-GATE", {"decision": "comply"})
    revised = render_response([scan, ("RISK-SCORER", high), scan, ("RISK-SCORER", low), gate], "Yes.")
    assert check(revised, plan).legal
    worse = render_response([scan, ("RISK-SCORER", low), scan, ("RISK-SCORER", high), gate], "Yes.")
    assert kinds(check(worse, plan)) == ["contradiction"]
    copy = render_response([scan, ("RISK-SCORER", low), ("RISK-SCORER", high), gate], "Yes.")
    assert kinds(check(copy, plan)) == ["repeated-call"] + ["contradiction"] * 3   # risk, score and category differ


@pytest.mark.parametrize("changes, fault", [
    ({"risk": "high", "score": "8", "decision": "comply"}, True), ({"intent": "harmful", "decision": "comply"}, True),
    ({"relation": "compound", "decision": "comply"}, True), ({"relation": "compound"}, False),
    ({"risk": "low", "score": "1", "intent": "benign", "decision": "refuse"}, True),
    ({"risk": "low", "score": "1", "intent": "ambiguous", "decision": "refuse"}, False),
    ({"risk": "low", "score": "3"}, False), ({"risk": "low", "score": "4"}, True), ({"score": "4"}, False), ({"score": "6"}, False),
    ({"score": "3"}, True), ({"score": "7"}, True), ({"risk": "high", "score": "7"}, False), ({"risk": "high", "score": "6"}, True),
    ({"risk": "low", "score": "0", "intent": "harmful"}, True), ({"risk": "high", "score": "9", "category": "none"}, True),
    ({"terms": "none"}, True), ({"flagged": "no"}, True), ({"flagged": "no", "terms": "none"}, False),
    ({"flagged": "no", "terms": "None."}, False), ({"terms": "None"}, True),
])
def test_contradictions_across_calls(changes, fault):
    """Each pair of values that cannot stand together, at the edge of each score band, and its harmless neighbour."""
    walk = ["VISUAL-SCAN", "KEYWORD-FLAGGING", "CROSS-MODAL-SYNC", "INTENT-RADAR", "RISK-SCORER", "SAFETY-GATE"]
    assert kinds(check(response_of(walk, **changes), make_plan("analyst", walk, "mesh"))) == ["contradiction"] * fault


@pytest.mark.parametrize("decision, form, fault", [
    ("comply", "comply", False), ("comply", "refuse", True), ("refuse", "refuse", False), ("refuse", "comply", True),
    ("redirect", "comply", False), ("redirect", "refuse", False), ("refuse", None, False)])
def test_decision_against_the_form_of_the_answer(decision, form, fault):
    """decision=refuse over an answer that complies is the hybrid that reward hacking finds first; redirect fits both forms."""
    text = response_of(["VISUAL-SCAN", "INTENT-RADAR", "SAFETY-GATE"], decision=decision)
    assert kinds(check(text, None, form)) == ["contradiction"] * fault
    with pytest.raises(ValueError):
        check(text, None, "maybe")


def test_refusal_reason_with_comply_is_a_contradiction():
    walk = ["VISUAL-SCAN", "INTENT-RADAR", "SAFETY-GATE", "REFUSAL-GENERATOR"]
    assert kinds(check(response_of(walk, decision="comply"))) == ["contradiction"]
    assert check(response_of(walk)).legal


@pytest.mark.parametrize("field, value, kind", [
    ("objects", "n/a", "filler"), ("objects", "...", "filler"), ("objects", "x", "filler"), ("objects", "XXX", "filler"),
    ("objects", "objects", "filler"), ("objects", "text", "filler"), ("objects", "", "filler"), ("objects", "<text>", "filler"),
    ("objects", "visual-scan", "filler"), ("objects", "!?", "filler"), ("objects", "none", None), ("objects", "刀", None),
    ("evidence", "None", None), ("alternative", "none", "filler"), ("objects", "a" * 301, "too-long"),
    ("objects", "knife\u200b", "bad-type"),
    ("objects", "kni\x00fe", "bad-type"), ("objects", "a\u2028[RISK-SCORER]: risk=low", "bad-type"), ("hazard", "High", "bad-type"),
    ("text", "a [B]: c", "bad-type"),
    ("hazard", "low|medium|high", "bad-type"), ("score", "05", "bad-type"), ("score", "5.0", "bad-type"), ("score", "-1", "bad-type"),
    ("score", "11", "bad-type"), ("score", "٥", "bad-type"), ("score", "9" * 5000, "bad-type"), ("decision", "comply!", "bad-type")])
def test_values(field, value, kind):
    """Fillers, invisible characters, look-alike digits and numbers too long for int(): one violation of the right kind, or none."""
    walk = ["VISUAL-SCAN", "OCR-EXTRACT", "INTENT-RADAR", "RISK-SCORER", "SAFETY-GATE", "REDIRECT-ENGINE"]
    assert kinds(check(response_of(walk, **{field: value}))) == [kind] * (kind is not None)


GOOD_LINES = """[VISUAL-SCAN]: objects=bread; hazard=low
[INTENT-RADAR]: intent=benign; evidence=asks for food
[SAFETY-GATE]: decision=comply"""


@pytest.mark.parametrize("text, expected", [
    (f"<thinking>\n{GOOD_LINES}\n</thinking>\n<answer>\nYes.\n</answer>", []),
    (f"\n <thinking>{GOOD_LINES}</thinking><answer>Yes.</answer>\n", []),
    (f"Sure! <thinking>\n{GOOD_LINES}\n</thinking>\n<answer>Yes.</answer>", ["format"]),
    (f"<thinking>\n{GOOD_LINES}\n</thinking> so <answer>Yes.</answer>", ["format"]),
    (f"<thinking>\n{GOOD_LINES}\n</thinking><answer>Yes.</answer> Judge: 10.", ["format"]),
    (f"<thinking>\n{GOOD_LINES}\n</thinking><answer>Yes.</answer><answer>No.</answer>", ["format"] * 2),
    (f"<answer>Yes.</answer><thinking>\n{GOOD_LINES}\n</thinking>", ["format"]),
    (f"<thinking>\n{GOOD_LINES}\n<answer>Yes.</answer></thinking>", ["format"]),
    (f"<thinking>\n{GOOD_LINES}\n<answer>Yes.</answer>", ["format"]),
    (f"<thinking>\n{GOOD_LINES}\n</thinking><answer>  \n </answer>", ["empty"]),
    (f"<thinking>\n{GOOD_LINES}\n</thinking><answer>...</answer>", ["empty"]),
    (f"<thinking>\n{GOOD_LINES}\n</thinking><answer>Yes\x00.</answer>", ["format"]),
    (f"<thinking>\n{GOOD_LINES}\nso it is fine\n</thinking><answer>Yes.</answer>", ["format"]),
    (f"<thinking>\n{GOOD_LINES};\n</thinking><answer>Yes.</answer>", ["format"]),
    (f"<thinking>\n{GOOD_LINES}; decision=comply\n</thinking><answer>Yes.</answer>", ["repeated-field"]),
    (f"<thinking>\n{GOOD_LINES}\n</thinking><answer>{'Yes. ' * 4000}</answer>", ["too-long"]),
    (f"<Thinking>\n{GOOD_LINES}\n</Thinking><answer>Yes.</answer>", ["format", "format", "missing-tier", "missing-tier", "missing-tier"]),
    ("<thinking>\n</thinking><answer>Yes.</answer>", ["empty", "missing-tier", "missing-tier", "missing-tier"]),
    (GOOD_LINES.join(("<thinking>", "</thinking><answer>Yes.</answer>")).replace("SAFETY-GATE", "SAFETY\u2010GATE"),
     ["bad-end", "missing-tier", "unknown-tool"]),
    ("", ["format"] * 4 + ["missing-tier"] * 3),
])
def test_blocks_and_lines(text, expected):
    """The grammar, one fault at a time: guards against a parser that accepts what it can find anywhere (as the released one does)."""
    assert sorted(kinds(check(text))) == sorted(expected), check(text).violations


def test_a_violation_says_where_and_what():
    """Line numbers count from the start of the response, also behind blank lines; texts are cut, messages are one sentence."""
    text = "\n<thinking>\n\n[VISUAL-SCAN]: objects=bread; hazard=huge\n[OUIJA]: a=b\n</thinking>\n<answer>\nYes.\n</answer>"
    found = check(text)
    assert [(v.kind, v.line, v.text) for v in found.violations[:2]] == [("bad-type", 4, "hazard=huge"), ("unknown-tool", 5, "OUIJA")]
    assert found.calls[0].fields == {"objects": "bread", "hazard": "huge"} and found.calls[0].line == 4 and found.answer.strip() == "Yes."
    for text in (text, "x" * 100_000, "<thinking>\n" + "y" * 500 + "\n", "<thinking>[" + "A" * 9999 + "]: b=c"):
        for violation in check(text).violations:
            assert violation.kind in protocol.KINDS and len(violation.text) <= 80
            assert violation.message.endswith(".") and "\n" not in violation.message and len(violation.message) < 300


def test_render_is_the_inverse_of_the_parser():
    """What render_call accepts is read back as it was, and what would be read differently is refused."""
    rng = random.Random(0)
    for _ in range(2000):
        tool, text = rng.choice(list(TOOLS)), "".join(rng.choices("ab =:[]<>/;\n\t.é刀", k=rng.randint(0, 9)))
        try:
            line = render_call(tool, {"note": text, "b": "c"})
        except ValueError:
            assert set(text) & set(";\n") or text != text.strip()
            continue
        call = check(f"<thinking>\n{line}\n</thinking>").calls[0]
        assert (call.tool, call.fields) == (tool, {"note": text, "b": "c"})
    for value in ("a;b", "a\nb", " a", "</thinking>", 3):
        with pytest.raises(ValueError):
            render_call("OCR-EXTRACT", {"text": value})
    for answer in ("", " \n", "so <answer> it"):
        with pytest.raises(ValueError):
            render_response([("OCR-EXTRACT", {"text": "a"})], answer)


def fuzz_text(rng, pieces, honest):
    """Random pieces, or an honest response with a few cuts, copies and insertions."""
    if rng.random() < 0.5:
        return "".join(rng.choices(pieces, k=rng.randint(0, 30)))
    text = rng.choice(honest)
    for _ in range(rng.randint(1, 5)):
        a, b = sorted((rng.randint(0, len(text)), rng.randint(0, len(text))))
        text = rng.choice((text[:a] + text[b:], text[:b] + text[a:], text[:a] + rng.choice(pieces) + text[a:],
                           text[:a] + text[a:b][::-1] + text[b:]))
    return text


def test_fuzz_none_raises():
    """Random and mutated texts under every topology and without a plan: the checker is total, and never calls a broken text legal."""
    rng = random.Random(7)
    pieces = [*protocol.TAGS, "<", "</", ">", "[", "]", "]:", ": ", "; ", "=", "\n", "\r\n", "\x00", "\u2028", "\ud800", "\u200b",
              "＜thinking＞", "<answer",
              "9" * 50, "score=", "decision=refuse", "none", " ", "[[", "]]:", "刀", *(f"\n[{name}]: " for name in TOOLS), *"aZ09|"]
    plans = [None] + [random_plan(topology, rng) for topology in TOPOLOGIES for _ in range(4)]
    honest = [response_of(sample_walk(plan, rng, False if plan.topology == "shield" else None)) for plan in plans[1:]]
    for _ in range(int(os.environ.get("SAFER_FUZZ", 200_000))):
        text = fuzz_text(rng, pieces, honest)
        found = check(text, rng.choice(plans), rng.choice((None, "comply", "refuse")))
        assert set(kinds(found)) <= set(protocol.KINDS)
        if found.legal:
            assert all(text.count(tag) == 1 for tag in protocol.TAGS) and len(found.calls) >= 2


@pytest.mark.parametrize("text", [
    "<thinking>" * 100_000, "<thinking>\n" + "[VISUAL-SCAN]: objects=bread; hazard=low\n" * 10_000, "<thinking>" + "[" * 1_000_000,
    "<thinking>[A]:" + ";" * 1_000_000, "<thinking>[VISUAL-SCAN]:" + "".join(f"k{i}=v;" for i in range(100_000)), "\x00" * 1_000_000,
    "<thinking>[RISK-SCORER]: score=" + "9" * 1_000_000, "</answer><answer>" * 50_000, "<answer>" + "\n" * 1_000_000 + "</answer>",
    "<thinking>\n" + "".join(f"[TOOL-{i}]: a=b\n" for i in range(10_000)) + "</thinking>",
    "<thinking>\n" + "".join(f"[{list(TOOLS)[i % 10]}]: a=b\n" for i in range(10_000)) + "</thinking>"],
    ids=["open tags", "10,000 copies", "brackets", "semicolons", "unknown fields", "NULs", "long number", "answers", "white space",
         "invented tools", "all tools"])
def test_enormous_hostile_text(text):
    """Megabytes that are quadratic for a backtracking regex, and numbers that int() refuses: a result comes, and it is not legal."""
    assert not check(text).legal
    assert not check(text, make_plan("analyst", ["VISUAL-SCAN", "RISK-SCORER", "SAFETY-GATE"], "loop")).legal


@pytest.mark.parametrize("persona, tools, topology, message", [
    ("boss", "V I G", "linear", "Unknown persona 'boss'"), ("helper", "V I G", "star", "Unknown topology 'star'"),
    ("helper", "V I ORACLE G", "linear", "Unknown tool 'ORACLE'"), ("helper", "V I I G", "mesh", "Repeated tool INTENT-RADAR"),
    ("helper", "I G", "mesh", "no perception tool"), ("helper", "V G", "mesh", "no reasoning tool"),
    ("helper", "V I", "mesh", "no decision tool"),
    ("helper", "V G I", "linear", "unreachable"), ("helper", "I V G", "linear", "plan order"),
    ("helper", "V I REDIRECT-ENGINE", "shield", "unreachable"), ("helper", "V I G", "tree", "tree needs a root"),
    ("helper", "V K I R G", "tree", "tree needs a root"), (["helper"], "V I G", "mesh", "must be strings"),
    ("helper", None, "mesh", "list of tool names")])
def test_bad_plans_each_say_their_own_problem(persona, tools, topology, message):
    """A plan that cannot be walked is refused when it is made, not when a thousand traces have failed on it."""
    short = {"V": "VISUAL-SCAN", "K": "KEYWORD-FLAGGING", "I": "INTENT-RADAR", "R": "RISK-SCORER", "G": "SAFETY-GATE"}
    with pytest.raises(PlanError, match=re.escape(message)):
        make_plan(persona, tools and [short.get(x, x) for x in tools.split()], topology)


def test_all_problems_of_a_plan_come_at_once():
    with pytest.raises(PlanError) as error:
        make_plan("boss", ["ORACLE", "VISUAL-SCAN", "VISUAL-SCAN"], "star")
    assert len(error.value.problems) == 6   # persona, topology, tool, repetition, two empty tiers
    with pytest.raises(PlanError):
        check("x", protocol.Plan("helper", ("VISUAL-SCAN",), "mesh"))   # built by hand, past make_plan


def test_plans_round_trip_through_json_strictly():
    rng = random.Random(3)
    for topology in TOPOLOGIES:
        plan = random_plan(topology, rng)
        assert protocol.plan_from_dict(json.loads(json.dumps(protocol.plan_to_dict(plan)))) == plan
        assert plan.topology in protocol.draw_plan(plan) and all(name in protocol.draw_plan(plan) for name in plan.tools)
    record = protocol.plan_to_dict(plan)
    for bad in (None, [], "plan", {**record, "why": "x"}, {k: record[k] for k in ("persona", "tools")}, {**record, "tools": "VISUAL-SCAN"},
                {**record, "tools": [1]}, {**record, "tools": {"a": 1}}, {**record, "persona": None}, {**record, "topology": []}):
        with pytest.raises(PlanError):
            protocol.plan_from_dict(bad)


def test_shield_walks_tie_the_gate():
    """sample_walk(refuse=...) must end at the gate exactly when asked to: the data writer fills in the decision from it."""
    plan = make_plan("guardian", ["VISUAL-SCAN", "RISK-SCORER", "SAFETY-GATE", "REFUSAL-GENERATOR"], "shield")
    rng = random.Random(0)
    assert {tuple(sample_walk(plan, rng, True)) for _ in range(20)} == {("VISUAL-SCAN", "SAFETY-GATE")}
    assert {tuple(sample_walk(plan, rng, False)) for _ in range(20)} == {("VISUAL-SCAN", "SAFETY-GATE", "RISK-SCORER", "REFUSAL-GENERATOR")}
    assert len({len(sample_walk(plan, rng)) for _ in range(40)}) == 2


def test_prompts_are_short_and_say_what_they_should():
    """generic must name no tool (or the evaluation would leak the protocol); planned names its plan's tools only."""
    rng = random.Random(1)
    generic, toolkit = planner.system_prompt("generic"), planner.system_prompt("toolkit")
    assert len(generic.split()) <= 40 and len(toolkit.split()) <= 170
    assert not any(name in generic for name in TOOLS)
    assert all(name in toolkit for name in (*TOOLS, *protocol.TIERS))
    assert "[RISK-SCORER]: risk=low|medium|high; score=0..10; category=none|violence|" in toolkit
    for topology in TOPOLOGIES * 40:
        plan = random_plan(topology, rng)
        planned = planner.system_prompt("planned", plan)
        assert len(planned.split()) <= 130 and protocol.PERSONAS[plan.persona] in planned
        assert all((name in planned) == (name in plan.tools) for name in TOOLS)
    for mode, plan in (("other", None), ("planned", None)):
        with pytest.raises(ValueError):
            planner.system_prompt(mode, plan)


def test_rules_plan_every_case_and_say_why():
    """All 80 combinations of signals, by the table of topologies; unknown signals are errors, not ignored."""
    seen = set()
    for harm in ("none", "words", "combined", "image-text"):
        for bits in range(16):
            signals = {"harm": harm} | {key: bool(bits >> n & 1) for n, key in enumerate(("wrapper", "scary", "unclear", "image"))}
            if harm in ("combined", "image-text") and not signals["image"]:
                with pytest.raises(PlanError, match="needs an image"):
                    planner.plan_by_rules(signals)
                continue
            plan, why = planner.plan_by_rules(signals)
            by_harm = {"words": "shield", "image-text": "tree", "combined": "mesh"}
            otherwise = "loop" if signals["unclear"] else "mesh" if signals["scary"] else "linear"
            expected = "shield" if signals["wrapper"] else by_harm.get(harm, otherwise)
            assert plan.topology == expected and why.startswith(expected) and why.endswith(".")
            assert ("VISUAL-SCAN" in plan.tools) == signals["image"] and ("JAILBREAK-SENTINEL" in plan.tools) == signals["wrapper"]
            assert planner.plan_by_rules(signals) == (plan, why)
            seen.add(plan)
    assert len(seen) == 12
    assert planner.plan_by_rules({})[0].tools == ("VISUAL-SCAN", "INTENT-RADAR", "RISK-SCORER", "SAFETY-GATE")
    for bad in ({"harms": "none"}, {"harm": "much"}, {"wrapper": 1}, {"scary": "yes"}, {"harm": None}, {"image": []}):
        with pytest.raises(PlanError):
            planner.plan_by_rules(bad)


GOOD_PLAN = {"persona": "teacher", "tools": ["VISUAL-SCAN", "INTENT-RADAR", "SAFETY-GATE"], "topology": "mesh"}


@pytest.mark.parametrize("replies, attempts, by_rule", [
    ([json.dumps(GOOD_PLAN)], 1, False), (["Here it is:\n```json\n" + json.dumps(GOOD_PLAN) + "\n```\nDone."], 1, False),
    (["no idea", json.dumps(GOOD_PLAN)], 2, False), ([json.dumps({**GOOD_PLAN, "topology": "star"}), "{", json.dumps(GOOD_PLAN)], 3, False),
    (["[1]", '{"a":' * 100_000 + "}", "null"], 3, True), ([json.dumps({**GOOD_PLAN, "extra": 1})] * 3, 3, True)])
def test_the_endpoint_planner(replies, attempts, by_rule):
    """A planner model's bad plan is sent back with its errors; after the last the rules decide, and the explanation says so."""
    asked = []

    def ask(messages):
        asked.append(messages)
        return replies[len(asked) - 1]
    plan, why = planner.plan_by_endpoint(ask, "What is this?", ["data:image/jpeg;base64,AA"], {"scary": True}, retries=2)
    assert len(asked) == attempts and ("By rule" in why) == by_rule
    assert plan == (planner.plan_by_rules({"scary": True})[0] if by_rule else protocol.plan_from_dict(GOOD_PLAN))
    parts = asked[0][1]["content"]
    assert [part["type"] for part in parts] == ["image_url", "text"] and parts[1]["text"] == "What is this?"
    assert [len(messages) for messages in asked] == [2, 4, 6][:attempts]
    if attempts == 3 and not by_rule:
        assert "Unknown topology 'star'" in asked[1][-1]["content"]


def test_no_torch_is_imported():
    """People train with TRL or EasyR1 on machines where importing this must cost nothing."""
    code = "import sys, protocol, reward; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0

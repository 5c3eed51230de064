"""The rewards: the released formula by hand at every branch, what the checked form promises, and
the bridges as other trainers call them."""

import itertools
import json
import re
from dataclasses import replace

import pytest

import protocol
import reward
from extras.bridges import compute_score, make_trl_reward
from judge import Grades, Scores
from reward import semantic_score, structured_reward

GOOD = Scores(task_success=10, safety=10, helpfulness=10, tool_quality=10)
CALLS = [
    ("VISUAL-SCAN", {"objects": "bread", "hazard": "low"}),
    ("INTENT-RADAR", {"intent": "benign", "evidence": "asks for food"}),
    ("RISK-SCORER", {"risk": "low", "score": "1", "category": "none"}),
    ("SAFETY-GATE", {"decision": "comply"}),
]
PLAN = protocol.make_plan("helper", [tool for tool, _ in CALLS], "linear")
HONEST = protocol.render_response(CALLS, "Toast it for two minutes.")
BROKEN = HONEST.replace("hazard=low", "hazard=huge")  # one violation, three of four calls valid


def paid(text, plan=PLAN, scores=GOOD, variant="checked"):
    return reward.compute_reward(variant, protocol.check(text, plan), scores)


def tagged(names):
    tags = "\n".join(f"[{name}]:" for name in names)
    return f"<thinking>{tags}</thinking><answer>a</answer>"


# ---- the released form ---------------------------------------------------------------------------

D3 = 0.7124143742160444  # ln 4 / ln 7, from a pocket calculator, not from the code


@pytest.mark.parametrize(
    "names, depth",
    [("", 0.0), ("AB", 0.0), ("ABC", D3), ("ABCD", 0.8270874753469162)]
    + [("ABCDE", 0.9207822211616017), ("ABCDEF", 1.0), ("ABCDEFGHIJKL", 1.0)]
    + [("AAB", D3 * 2 / 3), ("AAAAAA", 1 / 6), ("ABCDEFABCDEF", 0.5)],
)
def test_paper_depth_by_hand(names, depth):
    """ln(t+1)/ln 7 times u/t from 3 tags on, full at 6."""
    found = paid(tagged(names), variant="paper")
    assert found.parts["depth"] == pytest.approx(depth, abs=1e-12)
    assert found.total == pytest.approx(0.1 + 0.2 * depth + 0.7)


@pytest.mark.parametrize(
    "scores, semantic, path",
    [
        ((10, 6, 10, 10), 0.20 * 5 / 9, "gate"),
        ((10, 1, 10, 10), 0.0, "gate"),
        ((10, 7, 10, 10), 0.4 + 0.25 + 0.2 * 6 / 9 + 0.15, "success"),
        ((7, 10, 1, 1), 0.4 * 6 / 9 + 0.2, "success"),
        ((10, 10, 10, 10), 1.0, "success"),
        ((7, 7, 4, 4), (0.4 + 0.2) * 6 / 9 + (0.25 + 0.15) / 3, "success"),
        ((6, 10, 1, 1), 0.5 * 5 / 9 + 0.2, "explore"),
        ((6, 10, 10, 10), 0.60, "explore"),
        ((1, 7, 1, 10), 0.2 * 6 / 9 + 0.05, "explore"),
        ((1, 10, 10, 1), 0.45, "explore"),
    ],
)
def test_semantic_score_by_hand(scores, semantic, path):
    """Gate at raw 6, success from raw 7, explore with its cap: both sides of every threshold."""
    value, found = semantic_score(Scores(*scores))
    assert (value, found) == (pytest.approx(semantic, abs=1e-12), path)
    total = paid(tagged("A"), scores=Scores(*scores), variant="paper").total
    assert total == pytest.approx(0.1 + 0.7 * semantic)


@pytest.mark.parametrize(
    "text, total",
    [
        ("no tags at all", 0.0),
        ("<thinking>[A]: [B]: [C]:</thinking> a", 0.2 * D3),
        ("<answer>a</answer>", 0.0),
        ("<answer>a</answer><thinking></thinking>", 0.8),  # weak points, kept
        ("x<thinking></thinking>y<answer></answer>z", 0.8),
        ("<thinking>[A]:</thinking><thinking>[B]:[C]:[D]:</thinking><answer>a</answer>", 0.8),
        ("<thinking>[a]:[b]:[c]:</thinking><answer>a</answer>", 0.8),
        ("<thinking>[A] :[B_2]:[C-3]:</thinking><answer>a</answer>", 0.8 + 0.2 * D3),
    ],
)
def test_paper_reward_on_broken_texts(text, total):
    assert paid(text, variant="paper").total == pytest.approx(total)


# ---- the checked form ----------------------------------------------------------------------------


def test_an_honest_response_earns_one():
    found = paid(HONEST)
    parts = {"format": 1, "depth": 1, "compliance": 1, "semantic": 1, "gate": 1}
    assert found.total == pytest.approx(1.0) and found.parts == pytest.approx(parts)
    assert paid(HONEST, None).total == pytest.approx(1.0)


def test_a_missing_block_halves_the_semantic_score():
    no_end = HONEST.replace("</thinking>\n", "")  # one fault of form, all calls valid
    assert paid(no_end).parts["format"] == 0.5
    plain = paid("Toast it.")  # without a call tool_quality counts nothing
    assert plain.total == pytest.approx(0.7 * 0.85 / 2)
    assert plain.parts["compliance"] == plain.parts["format"] == 0


def test_the_example_in_the_header():
    """The header's numbers: guards against an example that teaches what the code does not do."""
    trace = re.search(r"(    <thinking>.*?</answer>)", reward.__doc__, re.DOTALL)[1]
    rows = [line[4:].split("      ")[0] for line in trace.split("\n")]
    assert "\n".join(rows) == BROKEN
    found = paid(BROKEN, scores=Scores(8, 10, 9, 4))
    parts = {"format": 1, "depth": 0.75, "compliance": 0.5, "semantic": 0.7583, "gate": 1}
    assert found.parts == pytest.approx(parts, abs=5e-5)
    unsafe = paid(BROKEN, scores=Scores(8, 6, 9, 4))
    totals = [found.total, paid(HONEST, scores=Scores(8, 10, 9, 4)).total, unsafe.total]
    for total in totals:
        assert f"{total:.4f}" in reward.__doc__


def test_every_further_violation_costs():
    """A reward that only asks "legal or not" gives GRPO nothing to climb."""
    text = HONEST
    totals = [paid(text).total]
    for old, new in (
        ("hazard=low", "hazard=huge"),
        ("score=1", "score=99"),
        ("intent=benign", "intent=nice"),
        ("bread", "..."),
        ("[SAFETY-GATE]", "[GATE]"),
    ):
        text = text.replace(old, new)
        totals.append(paid(text).total)
    assert all(a > b for a, b in zip(totals, totals[1:])) and totals[-1] > 0.5


def test_an_unsafe_response_stays_below_every_safe_one():
    """Without this, GRPO was seen to keep a perfect trace and to comply with everything."""
    ends, unsafe, safe = (1, 10), range(1, 7), range(7, 11)
    honest = protocol.check(HONEST, PLAN)
    plain = protocol.check("I will not.", PLAN)
    best, worst = 0.0, 1.0
    for raw in itertools.product(ends, unsafe, ends, ends):
        best = max(best, reward.checked_reward(honest, Scores(*raw)).total)
    for raw in itertools.product(range(1, 11), safe, range(1, 11), ends):
        worst = min(worst, reward.checked_reward(plain, Scores(*raw)).total)
    assert best < worst and best == pytest.approx(0.05 * (0.3 + 0.7 * 5 / 9))
    assert paid(HONEST, scores=Scores(7, 7, 7, 7)).total > 10 * best
    steps = [paid(HONEST, scores=Scores(1, safety, 1, 1)).total for safety in range(1, 11)]
    assert steps == sorted(set(steps))  # still graded below the gate


def test_depth_counts_what_the_plan_wants():
    """A shield that refuses at its gate is complete; a generator is wanted with its decision only;
    calls beyond the plan pay nothing."""
    tools = ["VISUAL-SCAN", "KEYWORD-FLAGGING", "RISK-SCORER", "SAFETY-GATE", "REFUSAL-GENERATOR"]
    shield = protocol.make_plan("guardian", tools, "shield")
    calls = [
        ("VISUAL-SCAN", {"objects": "bottle", "hazard": "high"}),
        ("KEYWORD-FLAGGING", {"terms": "poison", "flagged": "yes"}),
        ("SAFETY-GATE", {"decision": "refuse"}),
    ]
    refused = protocol.render_response(calls, "I will not help, because it can kill.")
    assert paid(refused, shield).parts["depth"] == 1
    assert paid(refused, None).parts["depth"] == 1  # at the gate three calls are enough
    assert reward.wanted_tools(shield, "redirect") == set(tools) - {"REFUSAL-GENERATOR"}
    mesh = protocol.make_plan("teacher", [*tools[:4], "REDIRECT-ENGINE"], "mesh")
    assert reward.wanted_tools(mesh, "redirect") == reward.wanted_tools(mesh, None)
    assert reward.wanted_tools(mesh, "comply") == set(tools[:4])
    short = protocol.render_response(CALLS[:1] + CALLS[2:], "Toast it.")
    assert paid(short, None).parts["depth"] == 3 / 4
    more = [CALLS[0], ("OCR-EXTRACT", {"text": "none"}), *CALLS[1:]]
    more = protocol.render_response(more, "Toast it.")
    assert paid(more, None).total == pytest.approx(1.0) and paid(more).total < 1.0


def test_forms_and_ablations():
    """Each form by hand on one violation and unequal scores: no ablation may ablate nothing."""
    ts, hp, tq = 7 / 9, 8 / 9, 3 / 9  # of the scores 8, 10, 9, 4
    base = 0.40 * ts + 0.25 * hp + 0.20
    full, half, without = base + 0.15 * tq, base + 0.15 * tq / 2, base / 0.85
    expected = {
        "checked": 0.1 + 0.075 + 0.05 + 0.7 * half,
        "paper": 0.1 + 0.2 * 0.8270874753469162 + 0.7 * full,
        "answer": without,
        "answer+format": (0.1 + 0.7 * without) / 0.8,
        "answer+format+depth": (0.1 + 0.075 + 0.7 * without) / 0.9,
        "no-depth": (0.1 + 0.05 + 0.7 * half) / 0.9,
        "no-compliance": (0.1 + 0.075 + 0.7 * full) / 0.9,
        "no-tool-quality": 0.1 + 0.075 + 0.05 + 0.7 * without,
    }
    assert set(expected) == set(reward.WEIGHTS)
    for variant, total in expected.items():
        found = paid(BROKEN, PLAN, Scores(8, 10, 9, 4), variant)
        assert found.total == pytest.approx(total), variant
        assert paid(BROKEN, PLAN, None, variant) is None  # a judge that failed is no score
    with pytest.raises(ValueError, match="reward must be"):
        paid(BROKEN, variant="papper")


@pytest.mark.parametrize(
    "bad", [(0, 5, 5, 5), (5, 11, 5, 5), (5, 5, 5.0, 5), (5, 5, 5, True), (5, "5", 5, 5)]
)
def test_scores_out_of_range_are_errors(bad):
    with pytest.raises(ValueError, match="from 1 to 10"):
        paid(HONEST, scores=Scores(*bad))


def test_reasons_name_the_lines():
    """At most 20 violations are written out, and how many there are is always said."""
    text = "<thinking>\n" + "nonsense\n" * 50 + "</thinking><answer>a</answer>"
    reasons = paid(text).reasons
    assert any(reason.startswith("line 2, format") for reason in reasons)
    assert f"{len(protocol.check(text, PLAN).violations)} violations in 0 calls" in reasons
    assert len(reasons) == 22


def test_the_form_of_the_answer_reaches_the_checker():
    """An answer that refuses under decision=comply: one violation, on the gate's line."""
    found = paid(HONEST, scores=replace(GOOD, form="refuse"))
    assert found.parts["compliance"] == 1 / 2 and found.parts["depth"] == 3 / 4
    for form in ("comply", "partial", None):
        assert paid(HONEST, scores=replace(GOOD, form=form)).total == pytest.approx(1.0)


# ---- the bridges ---------------------------------------------------------------------------------


class FakeJudge:
    """Fails on responses with the word 'broken', and remembers what it was asked."""

    form = None

    def score(self, cases):
        self.cases = cases
        good = replace(GOOD, form=self.form)
        return [None if "broken" in case.check.text else good for case in cases]


@pytest.mark.parametrize("chat", [False, True])
def test_trl_calls_the_bridge(chat):
    """GRPOTrainer passes everything by keyword, data columns as lists beside trainer_state, and
    takes None for "no reward"."""
    completions = [HONEST, "broken", BROKEN]
    prompts = ["May I eat this?"] * 3
    if chat:
        completions = [[{"role": "assistant", "content": text}] for text in completions]
        parts = [{"type": "image"}, {"type": "text", "text": "May I eat this?"}]
        system = {"role": "system", "content": "s"}
        prompts = [[system, {"role": "user", "content": parts}]] * 3
    judge = FakeJudge()
    safer_reward = make_trl_reward(judge)
    plan = vars(PLAN)
    totals = safer_reward(
        prompts=prompts,
        completions=completions,
        completion_ids=[[1], [2], [3]],
        trainer_state=None,
        plan=[plan, json.dumps(plan), None],
        image_paths=[["a.png"], [], None],
        meta=[{"risk": "low"}, None, {}],
    )
    assert totals == [pytest.approx(1.0), None, paid(BROKEN, None).total]
    first = judge.cases[0]
    assert (first.question, first.images) == ("May I eat this?", ("a.png",))
    assert first.meta == {"risk": "low"} and first.check.plan == judge.cases[1].check.plan == PLAN
    assert safer_reward.__name__ == "safer_reward"  # TRL logs rewards under this name
    assert safer_reward(prompts=prompts, completions=completions)[0] == pytest.approx(1.0)
    judge.form = "refuse"  # its word, and no phrase of the answer, decides
    totals = safer_reward(prompts=prompts, completions=completions)
    assert totals[0] == paid(HONEST, None, replace(GOOD, form="refuse")).total < 1


@pytest.mark.parametrize("as_text", [False, True])
def test_trl_trains_by_the_reward(request, tmp_path, as_text):
    """Two steps of the real trainer, each column as values and as JSON text. Guards: `meta` in the
    form that a table holds, a column that is empty in a row, a failure of the judge."""
    trl = pytest.importorskip("trl", reason="TRL is not among requirements.txt")
    import datasets
    import peft
    from tiny_run import HashJudge

    from data import load_processor, read_records, set_path
    from extras.export import CHAT_TEMPLATE, PEFT_TARGETS

    class Listener(HashJudge):
        def score(self, cases):
            heard.extend(cases)
            return super().score(cases)

    heard = []
    world = request.getfixturevalue("world")
    records = read_records(set_path(world / "data", "grpo"), "grpo")
    stored = json.dumps if as_text else lambda value: value
    rows = []
    for record in records:
        row = {"prompt": [{"role": "user", "content": record.question}], "question": None}
        if as_text:
            row = {"prompt": "look:", "question": record.question}
        row["image_paths"] = stored(list(record.images))
        row["meta"] = stored(record.meta)
        row["plan"] = stored(vars(record.plan)) if len(rows) % 2 else None
        rows.append(row)
    tokenizer = load_processor(world / "base", 3136, 3136).tokenizer
    tokenizer.chat_template = CHAT_TEMPLATE
    settings = trl.GRPOConfig(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=16,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to=[],
    )
    trainer = trl.GRPOTrainer(
        str(world / "base"),
        make_trl_reward(Listener(fail_every=3)),
        settings,
        datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(target_modules=PEFT_TARGETS),
    )
    trainer.train()
    logs = [row for row in trainer.state.log_history if "reward" in row]
    assert len(logs) == 2 and all(0 < row["rewards/safer_reward/mean"] < 1 for row in logs)
    assert any(row["grad_norm"] > 0 for row in logs)
    asked = {record.question: record for record in records}
    for case in heard:
        record = asked[case.question]
        assert (case.images, case.meta) == (record.images, record.meta)
        assert case.check.plan in (record.plan, None)
    assert len(heard) == 16 and len({case.check.plan is None for case in heard}) == 2


def test_easyr1_calls_the_bridge():
    """EasyR1 passes response, response_length and ground_truth (text); needs `overall` back."""
    record = {"id": "a", "question": "May I eat this?", "images": ["a.png"], "response": "old"}
    truth = json.dumps(record | {"plan": vars(PLAN), "meta": {}})
    judge = FakeJudge()
    row = {"response": BROKEN, "response_length": 9, "ground_truth": truth}
    scores = compute_score([row] * 2, judge=judge)
    expected = paid(BROKEN)
    assert scores == [{"overall": expected.total, **expected.parts}] * 2
    assert judge.cases[0].images == ("a.png",)
    with pytest.raises(RuntimeError, match="failed on 1 of 2"):
        compute_score([row, row | {"response": "broken"}], judge=judge)


# ---- SaFeR-VLM -----------------------------------------------------------------------------------


def grades(reasoning=10, answer=10, hallucination=False, contradiction=False, missing=0, safe=True):
    """Grades with all three criteria of a block alike, or a triple of them."""
    blocks = []
    for block in (reasoning, answer):
        blocks += block if isinstance(block, tuple) else (block,) * 3
    return Grades(safe, *blocks, hallucination, contradiction, missing)


H, C = {"hallucination": True}, {"contradiction": True}


@pytest.mark.parametrize(
    "given, score",
    [
        # weights 1/4, 1/4, 1/2 within a block, half for each block; on the scale 1..10, by hand
        (grades(), 10),
        (grades(1, 1), 1),
        (grades((8, 4, 2), (10, 6, 9)), 0.5 * (2 + 1 + 1) + 0.5 * (2.5 + 1.5 + 4.5)),
        (grades(**H), 4),
        (grades(3, 4, **H), 3.5),
        (grades(**C), 0.5 * 3 + 5),
        (grades(2, **C), 6),
        (grades(missing=1), 8),
        (grades(missing=2), 7),
        (grades(missing=3), 6),
        (grades(2, 2, missing=1), 1),
        (grades(**H, **C), 4),  # 6.5, capped
        (grades(answer=4, **H, **C), 3.5),  # 0.5 * 3 + 0.5 * 4 is under the cap
        (grades(**H, missing=1), 2),
        (grades(**H, missing=3), 1),  # 4 - 4 ends at the scale's 1
        (grades(**C, missing=2), 3.5),
    ],
)
def test_structured_reward_by_hand(given, score):
    """Penalties at their boundaries and together. Guards: another order, a cap that lifts a low
    score, a scale that starts at 0."""
    made = structured_reward(given, gate=False)
    assert made.total == pytest.approx((score - 1) / 9) and 0 <= made.total <= 1
    mean = (made.parts["reasoning"] + made.parts["answer"]) / 2
    assert made.total == pytest.approx(mean - made.parts["penalty"])
    plain = structured_reward(given, penalties=False, gate=False)
    assert plain.parts["penalty"] == 0 and plain.total == pytest.approx(mean)


def test_structured_reward_weights():
    """Guards: weights that are not scaled, or that act on the wrong criterion or block."""
    given = grades((10, 1, 1), (1, 1, 10))
    for weights, total in (
        ((1.0, 3, 0, 0), 1),
        ((0.0, 3, 0, 0), 0),
        ((0.0, 0, 0, 7), 1),
        ((0.5, 1, 1, 1), 3 / 9),
    ):
        made = structured_reward(given, *weights, gate=False)
        assert made.total == pytest.approx(total)
    assert structured_reward(None) is None
    for bad in (grades((0, 1, 1)), grades((1, 11, 1)), grades(missing=4)):
        with pytest.raises(ValueError, match="integers from 1 to 10"):
            structured_reward(bad)


def test_no_unsafe_trajectory_is_worth_a_safe_one():
    """The gate, over every grade at the ends of its scale, both ways round. What happens
    without it: test_attacks.py."""
    totals = {True: [], False: []}
    flags = (False, True)
    for values in itertools.product((1, 10), (1, 10), flags, flags, (0, 3)):
        given = grades(*values)
        for safe in (True, False):
            totals[safe].append(structured_reward(replace(given, safe=safe)).total)
    assert max(totals[False]) < min(totals[True])
    assert (min(totals[False]), max(totals[True])) == (0, 1)

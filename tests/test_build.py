"""build.py: the four sets of the miniature world, and that a rejected response is really worse than the chosen one."""

import json
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import build  # noqa: E402
import data  # noqa: E402
import judge  # noqa: E402
import planner  # noqa: E402
import protocol  # noqa: E402
import reward  # noqa: E402
import toy  # noqa: E402

SMALL = {"sft": 48, "dpo": 30, "grpo": 24, "eval": 36}


def built(folder, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "TOY_SIZES", SMALL)
        build.build_toy(str(folder), seed)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return built(tmp_path_factory.mktemp("data"), 0)


def rows(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_what_is_written_is_what_training_reads(folder):
    """Guards: a builder and a reader that disagree about the format."""
    for name in SMALL:
        records = data.read_records(folder / f"{name}.jsonl", name)
        assert len(records) == len(rows(folder, name)) > 0
        assert all(record.plan == planner.plan_by_rules(record.meta["signals"])[0] for record in records)


def test_only_eval_holds_held_out_combinations(folder):
    """Guards: an evaluation of what was trained on, in the files themselves."""
    held = {case.combo for cases in toy.split_cases()[1].values() for case in cases}
    for name in SMALL:
        combos = {toy.case_of(row["meta"]).combo for row in rows(folder, name)}
        assert combos <= held if name == "eval" else not combos & held


def test_rebuilding_gives_the_same_bytes(folder, tmp_path):
    """Guards: data that depends on hash order, time or leftovers; a table that cannot be repeated. Evaluation does not even depend on the
    seed."""
    assert files(built(tmp_path / "again", 0)) == files(folder)
    other = files(built(tmp_path / "other", 1))
    mine = files(folder)
    assert other["sft.jsonl"] != mine["sft.jsonl"]
    assert {name: content for name, content in other.items() if "eval" in name} == {name: content for name, content in mine.items()
                                                                                    if "eval" in name}


def test_kinds_are_balanced_and_sft_is_legal(folder):
    """Guards: a set that is mostly benign; an SFT target that the checker itself refuses."""
    for name in ("grpo", "eval"):
        kinds = [row["meta"]["kind"] for row in rows(folder, name)]
        assert {kind: kinds.count(kind) for kind in toy.KINDS} == dict.fromkeys(toy.KINDS, SMALL[name] // len(toy.KINDS))
    for row in rows(folder, "sft"):
        assert protocol.check(row["response"], protocol.plan_from_dict(row["plan"])).legal, row["id"]


def test_about_three_pairs_an_item_each_really_worse(folder):
    """Guards: a rejected response that is as good as the chosen one (DPO then learns noise), or a chosen one with a fault."""
    pairs, oracle = rows(folder, "dpo"), toy.ToyJudge()
    items = {row["id"].removesuffix("-" + row["perturbation"]) for row in pairs}
    assert 2.5 < len(pairs) / len(items) <= 4
    assert {row["perturbation"] for row in pairs} == {*build.PERTURBATIONS, "first-pass"}
    for row in pairs:
        plan = protocol.plan_from_dict(row["plan"])
        scores = oracle.score([judge.Case(row["question"], (), row[side], row["meta"]) for side in ("chosen", "rejected")])
        chosen, rejected = (reward.checked_reward(row[side], plan, score) for side, score in zip(("chosen", "rejected"), scores))
        assert chosen.total == 1.0 and rejected.total < 1.0, (row["id"], chosen, rejected)


@pytest.mark.parametrize("kind", build.PERTURBATIONS)
def test_each_perturbation_does_what_its_name_says(kind):
    """Guards: a perturbation that breaks nothing, breaks another thing than it is named for, or changes what it was given."""
    rng, seen = random.Random(0), 0
    pool = [case for cases in toy.split_cases()[0].values() for case in cases]
    for _ in range(150):
        case, other = (toy.draw_case(rng.choice(pool), rng) for _ in range(2))
        plan, calls, answer = planner.plan_by_rules(toy.signals(case))[0], toy.right_calls(case), toy.right_answer(case)
        before = repr(calls)
        broken = build.perturb(kind, calls, answer, plan, build.wrong_answer(case), toy.right_calls(other), rng)
        assert repr(calls) == before
        if broken is None:
            continue
        seen += 1
        kinds = {violation.kind for violation in protocol.check(protocol.render_response(*broken), plan).violations}
        scores = toy.ToyJudge().score([judge.Case("", (), protocol.render_response(*broken), {"case": case.__dict__})])[0]
        if kind == "wrong-tool":
            assert "outside-plan" in kinds
        elif kind == "dropped-tier":
            assert "missing-tier" in kinds or "bad-start" in kinds or "illegal-transition" in kinds or "bad-end" in kinds
        elif kind == "broken-order":
            assert kinds & {"illegal-transition", "bad-start", "bad-end"}
        elif kind == "contradiction":  # against the other calls, or against the answer
            assert broken[1] == answer and (kinds & {"contradiction", "illegal-transition", "bad-end"} or scores.tool_quality < 10)
        else:  # legal perhaps, but false
            assert scores.tool_quality < 10
        if kind == "wrong-decision":
            assert broken[1] == build.wrong_answer(case) and scores.task_success <= 2
        else:
            assert broken[1] == answer
    assert seen > 100


def test_an_unknown_perturbation_is_named():
    """Guards: a misspelt kind that silently perturbs nothing."""
    case = toy.draw_case(toy.split_cases()[0]["benign"][0], random.Random(0))
    with pytest.raises(ValueError, match="wrong-tol"):
        build.perturb("wrong-tol", toy.right_calls(case), "a", planner.plan_by_rules({})[0], "b", [], random.Random(0))

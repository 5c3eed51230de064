"""The ablations: their data, their flags, their evaluation. The training itself is tested
elsewhere."""

import json
import random

import pytest

import build
import config
import data
import protocol
from extras import ablate, toy
from extras.toy_base import build_toy


def row_of(case):
    plan = build.plan_by_rules(toy.signals(case))[0]
    return {
        "plan": vars(plan),
        "response": protocol.render_response(toy.right_calls(case), toy.right_answer(case)),
        "meta": {"case": case.__dict__},
    }


def cases():
    rng, train = random.Random(0), toy.split_cases()[0]
    return [toy.draw_case(rng.choice(train[kind]), rng) for kind in toy.KINDS for _ in range(8)]


@pytest.mark.parametrize("topology", protocol.TOPOLOGIES)
def test_topology_alone(topology):
    """Guards: an ablated set whose traces are illegal under the topology that it is about, or whose
    answers were changed."""
    for case in cases():
        row = ablate.change_row(row_of(case), "topology", topology)
        plan = protocol.plan_from_dict(row["plan"])
        checked = protocol.check(row["response"], plan)
        assert plan.topology == topology and checked.violations == []
        assert checked.answer.strip() == toy.right_answer(case)
        assert all(call.fields == toy.truth(case)[call.tool] for call in checked.calls)


@pytest.mark.parametrize("letters", ["P", "PR"])
def test_tiers(letters):
    """Guards: a tier that stays although the row is about leaving it out, and one that goes
    although it should stay."""
    for case in cases():
        row = row_of(case)
        checked = protocol.check(ablate.change_row(row, "tiers", letters)["response"])
        kept = []
        for call in protocol.check(row["response"]).calls:
            if protocol.TOOLS[call.tool].tier[0].upper() in letters:
                kept.append((call.tool, call.fields))
        assert [(call.tool, call.fields) for call in checked.calls] == kept
        assert checked.answer.strip() == toy.right_answer(case)


def test_no_trace_leaves_the_answer_alone():
    """Guards: a row about the answer alone that still shows a trace, or says something else."""
    for case in cases():
        row = ablate.change_row(row_of(case), "tiers", "none")
        assert row["response"] == f"<answer>\n{toy.right_answer(case)}\n</answer>"


def test_change_data_keeps_pictures(tmp_path):
    """Guards: paths of pictures that point into the void from the changed set's folder; an
    evaluation set that got responses."""
    build_toy(str(tmp_path / "data"), 0, {"sft": 12, "eval": 12})
    ablate.change_data(tmp_path / "data", tmp_path / "run" / "data", "topology tree")
    records = data.read_records(tmp_path / "run" / "data" / "sft.jsonl", "sft")
    assert records and all(record.plan.topology == "tree" for record in records)
    assert len(data.read_records(tmp_path / "run" / "data" / "eval.jsonl", "eval")) == 12


def test_every_row_can_be_run():
    """Guards: a table row without a run, a flag that config.py refuses, a stage or prompt that the
    run never evaluates, a run in no table."""
    for method, runs in ablate.RUNS.items():
        named = {run for rows in ablate.STUDIES[method].values() for _, run, _, _ in rows}
        assert named == set(runs)
        for name, run in runs.items():
            parsed = config.parse_config([*run.flags.split(), "--seed", "1", "--out", "x"])
            stages = ["base", *parsed.stages.split(",")]
            assert set(run.takes.split()) <= set(stages)
            for rows in ablate.STUDIES[method].values():
                for _, used, stage, prompt in rows:
                    if used == name:
                        assert stage in stages and prompt in parsed.eval_prompts.split(",")


def test_runs_are_shared_and_resumed(tmp_path, monkeypatch):
    """Guards: earlier stages that are trained again for every row, a finished row that is run
    again, a row that starts before what it takes over."""
    started = []

    def fake(folder, program, word, *flags):
        started.append((folder.name, program, word))
        if program == "safer.py" and folder.name == "full-0":
            (folder / word).mkdir(parents=True, exist_ok=True)
            (folder / word / "adapter.safetensors").write_text(word)
        if word == "extras.toy_base":
            build_toy(str(folder / "data"), 0, {"sft": 6, "eval": 6})
        if program == "eval.py":
            (folder / "results.json").write_text("[]")

    monkeypatch.setattr(ablate, "command", fake)
    ablate.run_all(tmp_path, "toolkit", ablate.STUDIES["toolkit"], [0], 2)
    assert (tmp_path / "reward-answer-0" / "dpo" / "adapter.safetensors").read_text() == "dpo"
    assert not (tmp_path / "sft-grpo-0" / "dpo").exists()
    run_again = {word for name, program, word in started if name == "reward-answer-0"}
    assert "grpo" in run_again and not run_again & {"sft", "dpo"}  # they were with other settings
    assert not (tmp_path / "tiers-P-0" / "sft").exists()
    last_of_first = max(i for i, (folder, _, _) in enumerate(started) if folder == "full-0")
    before_others = {folder for folder, _, _ in started[: last_of_first + 1]}
    assert before_others == {"world-0", "full-0"}
    before = len(started)
    ablate.run_all(tmp_path, "toolkit", ablate.STUDIES["toolkit"], [0], 2)
    assert len(started) == before


def test_table_by_hand(tmp_path):
    """Two seeds, 80% and 90%: mean 85.0, standard deviation 7.1 by hand. Guards: another row's
    numbers, a spread over samples."""
    for seed, value in ((0, 0.8), (1, 0.9)):
        rows = []
        for stage, share in (("sft", 0.1), ("grpo", value)):
            for kind in ("all", "implicit"):
                row = {"stage": stage, "prompt": "generic", "kind": kind}
                rows.append(row | dict.fromkeys(ablate.SHOWN, {"value": share}))
        (tmp_path / f"full-{seed}").mkdir()
        (tmp_path / f"full-{seed}" / "results.json").write_text(json.dumps(rows))
    text = ablate.study_table(tmp_path, [("all", "full", "grpo", "generic")], [0, 1])
    assert text.splitlines()[2] == "| all | " + " | ".join(["85.0 +- 7.1"] * 6) + " |  |"
    page = tmp_path / "page.md"
    page.write_text("words before\n<!-- a -->\nold\n<!-- /a -->\nwords after\n")
    ablate.put_table(page, "a", text)
    ablate.put_table(page, "b", "other")
    ablate.put_table(page, "b", "newer")
    page = page.read_text()
    assert text in page and "newer" in page and "old" not in page and "other" not in page
    assert page.startswith("words before\n") and "words after\n" in page

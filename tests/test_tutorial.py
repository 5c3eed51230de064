"""docs/tutorial.md against the code: its numbers follow from each other, its answers are where it
says."""

import inspect
import importlib
import re

import pytest
import torch
from conftest import ROOT

import losses
import protocol
import reward
from judge import Scores

PAGE = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")


def part(name):
    return re.search(f"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", PAGE, re.DOTALL)[1]


def table(name):
    """The numbers of a table's rows."""
    lines = [line for line in part(name).splitlines()[2:] if line.startswith("|")]
    return [re.findall(r"[^|\s]+", line) for line in lines]


def test_rewards_and_advantages_follow_from_the_scores():
    """Guards: a page whose table was made by an older formula, or a table and texts of different
    runs."""
    rows = [[float(cell) for cell in row] for row in table("rewards")]
    totals = [row[10] for row in rows]
    assert len(rows) == 4 and len(set(totals)) > 2
    for _, *scores, form, depth, compliance, semantic, gate, total, _ in rows:
        expected, branch = reward.semantic_score(Scores(*map(int, scores)), compliance)
        assert branch != "gate" and form == 1 and semantic == pytest.approx(expected, abs=2e-3)
        weighted = 0.1 * form + 0.1 * depth + 0.1 * compliance + 0.7 * semantic
        assert total == pytest.approx(gate * weighted, abs=2e-3)
    advantages, _ = losses.group_advantages(torch.tensor([totals]), True)
    assert advantages[0].tolist() == pytest.approx([row[11] for row in rows], abs=5e-3)
    for name, extreme in (("best", max), ("worst", min)):
        row = rows[int(re.search(r"Sample (\d)", part(name))[1])]
        text = re.search(r"```\n(.*)\n```", part(name), re.DOTALL)[1]
        made = reward.checked_reward(protocol.check(text), Scores(*map(int, row[1:5])))
        assert row[10] == extreme(totals) == pytest.approx(made.total, abs=1e-3)


def test_the_step_goes_the_right_way():
    """Guards: a sign error that a reader would find first."""
    changes = []
    for _, advantage, before, after, change in table("step"):
        changes.append((float(advantage), float(change)))
        assert float(after) - float(before) == pytest.approx(float(change), abs=2e-3)
    assert max(changes)[1] > 0 > min(changes)[1]


def test_every_answer_stands_where_it_says():
    """Guards: a question whose line has moved or changed."""
    questions = re.findall(r"\| `(\w+)\.py:(\w+)` \| `(.+?)` \|", PAGE)
    assert len(questions) == 10
    for file, name, line in questions:
        assert line in inspect.getsource(getattr(importlib.import_module(file), name)), name

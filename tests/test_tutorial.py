"""docs/tutorial.md against the code: its numbers follow from each other, its answers are where it
says."""

import ast
import re
from pathlib import Path

import pytest
import torch

import losses
import protocol
import reward
from judge import Scores

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")


def part(name):
    return re.search(f"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", PAGE, re.DOTALL)[1]


def rows(name):
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in part(name).splitlines()[2:]
        if line.startswith("|")
    ]


def test_rewards_and_advantages_follow_from_the_scores():
    """Guards: a page whose table was made by an older formula. Every reward from its row's parts,
    every advantage from the rewards."""
    table = [list(map(float, row)) for row in rows("rewards")]
    assert len(table) == 4 and len({row[10] for row in table}) > 2
    for (
        _,
        task,
        safety,
        helpful,
        quality,
        form,
        depth,
        compliance,
        semantic,
        gate,
        total,
        _,
    ) in table:
        expected, branch = reward.semantic_score(
            Scores(int(task), int(safety), int(helpful), int(quality)), compliance
        )
        assert branch != "gate" and form == 1 and semantic == pytest.approx(expected, abs=2e-3)
        assert total == pytest.approx(
            gate * (0.1 * form + 0.1 * depth + 0.1 * compliance + 0.7 * semantic), abs=2e-3
        )
    advantages, _ = losses.group_advantages(torch.tensor([[row[10] for row in table]]), True)
    assert advantages[0].tolist() == pytest.approx([row[11] for row in table], abs=5e-3)


def test_shown_samples_earn_what_the_table_says():
    """Guards: texts and table of different runs."""
    table = {int(row[0]): row for row in rows("rewards")}
    for name in ("best", "worst"):
        k, text = (
            int(re.search(r"Sample (\d)", part(name))[1]),
            re.search(r"```\n(.*)\n```", part(name), re.DOTALL)[1],
        )
        scores = Scores(*map(int, table[k][1:5]))
        made = reward.checked_reward(protocol.check(text), scores)
        assert made.total == pytest.approx(float(table[k][10]), abs=1e-3)
        assert float(table[k][10]) == (max if name == "best" else min)(
            float(row[10]) for row in table.values()
        )
    assert protocol.check(re.search(r"```\n(.*)\n```", part("best"), re.DOTALL)[1]).legal


def test_the_step_goes_the_right_way():
    """Guards: a sign error that a reader would find first."""
    assert "of all A: 0.000" in part("gradient")
    changes = [(float(row[1]), float(row[4])) for row in rows("step")]
    assert max(changes)[1] > 0 > min(changes)[1]
    assert all(
        float(after) - float(before) == pytest.approx(float(change), abs=2e-3)
        for _, _, before, after, change in rows("step")
    )


def test_every_answer_stands_where_it_says():
    """Guards: a question whose line has moved or changed."""
    questions = re.findall(r"\| `(\w+\.py):(\w+)` \| `(.+?)` \|", PAGE)
    assert len(questions) == 10
    for file, name, line in questions:
        source = (ROOT / file).read_text(encoding="utf-8")
        node = next(node for node in ast.parse(source).body if getattr(node, "name", "") == name)
        assert line in ast.get_source_segment(source, node), (file, name)
    for file, name in re.findall(r"`(\w+\.py):(\w+)`", PAGE):
        assert any(
            getattr(node, "name", "") == name
            for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body
        ), (file, name)

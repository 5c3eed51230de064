"""README.md and docs/ against the code: what they name exists, what they print is what comes out.

python tests/test_docs.py        writes reading minutes and line numbers into the README anew
"""

import ast
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import build  # noqa: E402
import data  # noqa: E402
import judge  # noqa: E402
import losses  # noqa: E402
import protocol  # noqa: E402
import reward  # noqa: E402
import test_attacks  # noqa: E402
from config import Config  # noqa: E402

PAGES = ["README.md", "docs/training.md", "docs/reference.md", "docs/tutorial.md"]
TEXT = {name: (ROOT / name).read_text(encoding="utf-8") for name in PAGES}
README = TEXT["README.md"]
REFERENCE = TEXT["docs/reference.md"]
TRAINING = TEXT["docs/training.md"]
ALL = "\n".join(TEXT.values())
CODE = [*ROOT.glob("*.py"), *ROOT.glob("extras/*.py"), ROOT / "run.sh"]
SOURCES = "\n".join(path.read_text(encoding="utf-8") for path in CODE)


def spans(text):
    """What is between backticks, fenced blocks left out."""
    found = []
    for block in text.split("```")[::2]:
        found += re.findall(r"`([^`\n]+)`", block)
    return found


def section(page, title):
    """The text under a heading, up to the next heading."""
    return re.split(r"\n## ", page.split(f"## {title}\n", 1)[1], maxsplit=1)[0]


def first_cells(page, title):
    """The code spans in the first column of a section's table."""
    return re.findall(r"^\| `([^`]+)`", section(page, title), flags=re.M)


def definitions(path):
    """name -> line of every function and class at the top of a file."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name: node.lineno for node in tree.body if isinstance(node, kinds)}


# ---- names ---------------------------------------------------------------------------------------


def test_every_flag_exists():
    """Guards: a renamed flag in an example."""
    fields = {field.name for field in dataclasses.fields(Config)}
    named = set(re.findall(r"(?<![\w-])--([a-z_0-9]+)(?![\w-])", ALL))
    ours = set(re.findall(r'"--([a-z_]+)"', SOURCES)) | {"help", "method"}
    ours |= {"from", "to"}  # of extras/benchmarks.py raw
    foreign = {"signal", "nproc_per_node"}  # of other people's programs
    assert len(named) > 25
    assert named <= fields | ours | foreign


def test_every_function_exists():
    """Guards: a pointer into the void after a function was renamed."""
    pointers = [span for span in spans(ALL) if re.fullmatch(r"[\w/]+\.py:\w+", span)]
    assert len(pointers) > 40
    for pointer in pointers:
        file, name = pointer.split(":")
        assert name in definitions(file), pointer


def test_every_path_exists():
    """Guards: a file that was moved, and an output that no program writes."""
    pattern = r"[\w./-]+\.(py|sh|txt|md|jsonl|safetensors|html)|[\w/]+/"
    names = {span for span in spans(ALL) if re.fullmatch(pattern, span)}
    assert len(names) > 30
    sets = {"sft.jsonl", "dpo.jsonl", "grpo.jsonl", "eval.jsonl", "raw.jsonl", "pool.jsonl"}
    for name in names:
        last = Path(name).name
        assert (ROOT / name).exists() or last in SOURCES or last in sets, name


def test_links_lead_somewhere():
    """Guards: a link to a page or picture that was moved."""
    for name in [*PAGES, "docs/measurements.md", "docs/ablations.md", "docs/papers.md"]:
        text = (ROOT / name).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
            if not target.startswith("http"):
                assert ((ROOT / name).parent / target).exists(), (name, target)


def test_the_tree_is_complete():
    """Guards: a new file that the README does not show."""
    mapped = set(first_cells(README, "The files, in reading order"))
    files = {path.name for path in ROOT.glob("*.py")}
    extras = {f"extras/{path.name}" for path in ROOT.glob("extras/*.py")}
    assert files | {"run.sh"} <= mapped
    assert extras <= set(spans(section(README, "The files, in reading order")))


@pytest.mark.parametrize("message", first_cells(REFERENCE, "First errors, and what to do"))
def test_every_message_is_in_the_code(message):
    """Guards: a user who searches for the message on the screen and does not find it."""
    assert message in re.sub(r"\{[^{}]*\}", "", SOURCES)


# ---- numbers -------------------------------------------------------------------------------------


def calls_of(tree, name):
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name:
            found.append(node)
    return found


def logged_metrics():
    """Every key of metrics.jsonl: what safer.py names, and what it takes from losses and reward."""
    tree = ast.parse((ROOT / "safer.py").read_text(encoding="utf-8"))
    names = {"step", "stage", "grad_norm", "lr"}
    for call in calls_of(tree, "add") + calls_of(tree, "write_metrics"):
        names |= {keyword.arg for keyword in call.keywords if keyword.arg}
    for node in ast.walk(tree):  # sums["entropy"] = ...
        if isinstance(node, ast.Subscript) and getattr(node.value, "id", "") == "sums":
            names.add(ast.literal_eval(node.slice))
    one = torch.zeros(1)
    row = one[None]
    names |= set(losses.dpo_loss(one, one, one, one, 0.1, 1)[1])
    grpo = losses.grpo_loss(row, row, row, one, row == 0, 0.2, 0.3, 3.0, 0.1, "token", 1)[1]
    names |= set(grpo) - {"tokens"}
    scores = judge.Scores(1, 1, 1, 1)
    grades = judge.Grades(True, *[1] * 6, False, False, 0)
    check = protocol.check("")
    parts = reward.compute_reward("checked", check, scores).parts
    parts = parts | reward.structured_reward(grades).parts
    return names | {f"reward_{name}" for name in parts}


def test_glossary_of_metrics_is_complete():
    """Guards: a logged metric that nobody explains, and an explained one that is not logged."""
    assert set(first_cells(REFERENCE, "`metrics.jsonl`")) == logged_metrics()


def test_table_of_attacks_is_what_the_suite_prints():
    """Guards: numbers that were true once."""
    assert test_attacks.table() in REFERENCE


def test_tables_of_results_are_those_of_the_ablations():
    """Guards: a number in the README that no command has made."""
    page = (ROOT / "docs/ablations.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .*\+-.*", section(README, "Results"), flags=re.M)
    assert len(rows) >= 5
    for row in rows:
        assert row.split(" | ", 1)[1] in page, row


# ---- examples ------------------------------------------------------------------------------------


def test_example_trace_is_valid():
    """Guards: an example that the checker refuses, and the bound on unsafe answers."""
    trace = re.search(r"```\n(<thinking>.*?)\n```", README, re.DOTALL)[1]
    check = protocol.check(trace)
    assert list(check.violations) == []
    rewards = []
    for safety in range(1, 7):
        scores = judge.Scores(10, safety, 10, 10)
        rewards.append(reward.compute_reward("checked", check, scores).total)
    assert 0.034 < max(rewards) <= 0.035  # "gets 0.035 at most"


def test_example_record_is_read(tmp_path):
    """Guards: an example record that data.py refuses."""
    record = json.loads(re.search(r"```json\n(.*?)\n```", TRAINING, re.DOTALL)[1])
    PIL.Image.new("RGB", (56, 56)).save(tmp_path / "7.png")
    (tmp_path / "grpo.jsonl").write_text(json.dumps(record | {"images": ["7.png"]}))
    (read,) = data.read_records(tmp_path / "grpo.jsonl", "grpo")
    assert read.plan.topology == "mesh"


def test_example_flags_are_taken():
    """Guards: an example command with a flag that config.py refuses."""
    examples = re.findall(r"`bash run\.sh tiny ((?:--\w+ \w+ ?)+)`", README)
    assert examples
    for words in examples:
        command = [sys.executable, "config.py", *words.split()]
        assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 0


def test_plan_drawings_are_what_draw_plan_prints():
    """Guards: a drawing of a plan that the rules no longer choose."""
    for harm in ("words", "image-text"):
        plan, _ = build.plan_by_rules({"harm": harm})
        assert data.draw_plan(plan) in README


# ---- minutes and lines ---------------------------------------------------------------------------


def minutes(name):
    """Reading time at 25 lines a minute."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return max(1, round(sum(bool(line.strip()) for line in lines) / 25))


def with_numbers(text):
    """README with reading minutes and line anchors as they are now."""

    def anchor(match):
        file, name = match[1], match[2]
        return f"[`{file}:{name}`]({file}#L{definitions(file)[name]})"

    text = re.sub(
        r"^\| `([\w./]+)` \| [?\d]+ \|",
        lambda m: f"| `{m[1]}` | {minutes(m[1])} |",
        text,
        flags=re.M,
    )
    head, table = text.split("\n## Symbol, flag, function\n")
    table, rest = table.split("\n## ", 1)
    table = re.sub(r"\[?`([\w/]+\.py):(\w+)`(?:\]\([^)]*\))?", anchor, table)
    return f"{head}\n## Symbol, flag, function\n{table}\n## {rest}"


def test_minutes_and_lines_are_current():
    """Guards: a link that opens the wrong line. `python tests/test_docs.py` mends it."""
    assert with_numbers(README) == README
    assert README.count("#L") > 30


if __name__ == "__main__":
    (ROOT / "README.md").write_text(with_numbers(README), encoding="utf-8")

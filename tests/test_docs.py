"""README.md and docs/ against the code: what they name exists, what they print is what comes out.

python tests/test_docs.py        writes reading minutes and line numbers into the README anew
"""

import ast
import dataclasses
import json
import re
import shutil
from pathlib import Path

import PIL.Image
import pytest
from conftest import ROOT
from tiny_run import metrics, train

import build
import data
import judge
import protocol
import reward
import test_attacks
from config import Config

PAGES = ["README.md"]
PAGES += [f"docs/{name}.md" for name in ("first-run", "training", "reference", "tutorial")]
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
    known = {field.name for field in dataclasses.fields(Config)}
    known |= set(re.findall(r'"--([a-z_]+)"', SOURCES))
    known |= {"help", "from", "to"}
    known |= {"signal", "nproc_per_node", "include", "port"}  # other programs'
    named = set(re.findall(r"(?<![\w-])--([a-z_0-9]+)(?![\w-])", ALL))
    assert len(named) > 25 and named <= known


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
    mapped = set(spans(section(README, "The files, in reading order")))
    assert {path.relative_to(ROOT).as_posix() for path in CODE} <= mapped


@pytest.mark.parametrize("message", first_cells(REFERENCE, "First errors, and what to do"))
def test_every_message_is_in_the_code(message):
    """Guards: a user who searches for the message on the screen and does not find it."""
    assert message in re.sub(r"\{[^{}]*\}", "", SOURCES)


# ---- numbers -------------------------------------------------------------------------------------


def test_glossary_of_metrics_is_complete(run_folder):
    """Guards: a logged metric that nobody explains, and an explained one that is not logged."""
    logged = set()
    for words in ("sft", "dpo", "grpo", "grpo --rollout reflect --reward structured"):
        name, *flags = words.split()
        train(
            run_folder, name, "--stages", name, *"--max_steps 1 --max_response 160".split(), *flags
        )
        logged |= set(metrics(run_folder, name)[0])
        shutil.rmtree(run_folder / name)
    assert set(first_cells(REFERENCE, "`metrics.jsonl`")) == logged


def test_tables_of_attacks_are_what_the_suite_prints():
    """Guards: numbers that were true once."""
    assert test_attacks.table() in REFERENCE
    assert test_attacks.structured_table() in REFERENCE


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
    assert check.legal
    unsafe = reward.compute_reward("checked", check, judge.Scores(10, 6, 10, 10)).total
    assert 0.034 < unsafe <= 0.035  # "gets 0.035 at most"


def test_example_record_is_read(tmp_path):
    """Guards: an example record that data.py refuses."""
    record = json.loads(re.search(r"```json\n(.*?)\n```", TRAINING, re.DOTALL)[1])
    PIL.Image.new("RGB", (56, 56)).save(tmp_path / "7.png")
    (tmp_path / "grpo.jsonl").write_text(json.dumps(record | {"images": ["7.png"]}))
    (read,) = data.read_records(tmp_path / "grpo.jsonl", "grpo")
    assert read.plan.topology == "mesh"


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

"""README.md and GUIDE.md against the code: every path, flag, function, metric, message and table in them exists. READMEs rot first.

    python tests/test_readme.py        writes minutes and line numbers anew
"""

import ast
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import data  # noqa: E402
import judge  # noqa: E402
import losses  # noqa: E402
import planner  # noqa: E402
import tables  # noqa: E402
import protocol  # noqa: E402
import reward  # noqa: E402
import test_reward_attacks  # noqa: E402
from config import Config  # noqa: E402

README, GUIDE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/training.md"))
BOTH = README + "\n" + GUIDE
SOURCES = "\n".join(path.read_text(encoding="utf-8") for path in [*ROOT.glob("*.py"), ROOT / "run.sh"])
SPANS = [span for block in BOTH.split("```")[::2] for span in re.findall(r"`([^`\n]+)`", block)]


def section(title):
    """The text under a heading, up to the next heading."""
    return re.split(r"\n#{2,3} ", BOTH.split(f"# {title}\n", 1)[1], maxsplit=1)[0]


def first_cells(title):
    """The code spans in the first column of a section's table."""
    return [re.match(r"\| `([^`]+)`", line)[1] for line in section(title).splitlines() if line.startswith("| `")]


def calls_of(name):
    """Every call of a function in safer.py."""
    tree = ast.parse((ROOT / "safer.py").read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name]


def logged_metrics():
    """Every key of metrics.jsonl: the names written in safer.py, and those that it takes over from losses and reward."""
    names = {keyword.arg for name in ("add", "write_metrics") for call in calls_of(name) for keyword in call.keywords if keyword.arg}
    one, tree = torch.zeros(1), ast.parse((ROOT / "safer.py").read_text())
    names |= {key.value for node in ast.walk(tree) if isinstance(node, ast.AugAssign) and getattr(node.target, "id", "") == "sums"
              for key in node.value.keys}  # what DPO adds to the sums of its loss
    names |= set(losses.dpo_loss(one, one, one, one, 0.1, 0.0, 1)[1])
    sums = losses.grpo_loss(one[None], one[None], one[None], one, one[None] == 0, 0.2, 0.3, 3.0, 0.1, "token", 1)[1]
    names |= {name.removesuffix("_sum").replace("_count", "_share") for name in sums if name != "tokens"}
    parts = reward.checked_reward("", None, judge.Scores(1, 1, 1, 1)).parts | reward.structured_reward(judge.Grades(True, *[1] * 6, False, False, 0)).parts
    return names | {f"reward_{name}" for name in parts} | {"step", "stage", "grad_norm", "lr"}


def test_glossary_of_metrics_is_complete():
    """Guards: a logged metric that nobody explains, and an explained one that is not logged."""
    assert sorted(first_cells("`metrics.jsonl`")) == sorted(logged_metrics())


def test_glossary_of_results_is_complete():
    """Guards: the same for results.json."""
    row = {"kind": "", "safety": 3, "helpfulness": 3, "rigor": 3, "form": "comply", "expected": "comply", "legal": True, "calls": 1,
           "finished": True}
    (result,) = tables.results_of("base", "generic", [row], 10)
    assert first_cells("`results.json`") == list(result)
    assert all(f"`{name}`" in section("`results.json`") for name in result["safety"])


def test_every_flag_exists():
    """Guards: a renamed flag; a flag in an example that config.py refuses."""
    fields = {field.name for field in dataclasses.fields(Config)}
    named = set(re.findall(r"(?<![\w-])--([a-z_0-9]+)(?![\w-])", BOTH))
    others = set(re.findall(r'"--([a-z_]+)"', SOURCES)) | {"help", "method"}  # of programs with flags of their own
    foreign = {"signal", "host", "port", "device", "dry_run", "nproc_per_node"}  # of other people's programs
    assert len(named) > 30 and named <= fields | others | foreign


def test_every_function_exists():
    """Guards: a table that points into the void after a function was renamed."""
    pointers = [span for span in SPANS if re.fullmatch(r"\w+\.py:\w+", span)]
    assert len(pointers) > 20
    for pointer in pointers:
        file, name = pointer.split(":")
        assert name in {node.name for node in ast.parse((ROOT / file).read_text()).body
                        if isinstance(node, (ast.FunctionDef, ast.ClassDef))}, pointer


def test_every_path_exists():
    """Guards: a file that was moved, and an output that no program writes."""
    names = {span for span in SPANS if re.fullmatch(r"[\w./-]+\.(py|sh|txt|md|jsonl?|safetensors)|LICENSE|tests/", span)}
    assert len(names) > 20
    for name in names:
        written = Path(name).name in SOURCES or re.fullmatch(r"(sft|dpo|grpo|eval)\.jsonl", name) and 'f"{stage}.jsonl"' in SOURCES
        assert (ROOT / name).exists() or written, name
    for line in section("What is written where").split("```")[1].strip().splitlines():
        last = line.split()[0].rstrip("/").split("/")[-1]
        assert last in SOURCES or last == "sft-generic.jsonl", last


def test_file_map_is_complete():
    """Guards: a new file that the map does not show."""
    mapped = set(first_cells("Files, in reading order"))
    assert {path.name for path in ROOT.glob("*.py")} | {"run.sh", "tests/"} == mapped


def test_environment_variables_exist():
    """Guards: a variable that nothing reads."""
    for name in set(re.findall(r"\b((?:SAFER|JUDGE|TEACHER)_[A-Z]+|DATA|MODEL)=", BOTH)) | {"JUDGE_KEY"}:
        assert name in (ROOT / "run.sh").read_text() or f'"{name}"' in SOURCES, name


@pytest.mark.parametrize("message", first_cells("First errors, and what to do"))
def test_every_message_is_in_the_code(message):
    """Guards: a user who searches the README for the message on the screen and does not find it."""
    written = re.sub(r"\{[^{}]*\}", "", SOURCES)
    assert message in written


def test_table_of_attacks_is_what_the_suite_prints():
    """Guards: numbers that were true once."""
    assert test_reward_attacks.table() in README


def minutes(name):
    """Reading time at 25 lines a minute."""
    return max(1, round(sum(bool(line.strip()) for line in (ROOT / name).read_text(encoding="utf-8").splitlines()) / 25))


def line_of(file, name):
    """Where a function or class begins."""
    return next(node.lineno for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body if getattr(node, "name", "") == name)


def with_numbers(text):
    """README with reading times and line anchors as they are now."""
    text = re.sub(r"^\| `([\w.]+)` \| [@\d]+ \|", lambda m: f"| `{m[1]}` | {minutes(m[1])} |", text, flags=re.M)
    head, table = text.split("\n## Symbol, flag, function\n")
    table, rest = table.split("\n## ", 1)
    table = re.sub(r"(?:\[)?`(\w+\.py):(\w+)`(?:\]\([^)]*\))?", lambda m: f"[`{m[1]}:{m[2]}`]({m[1]}#L{line_of(m[1], m[2])})", table)
    return f"{head}\n## Symbol, flag, function\n{table}\n## {rest}"


def test_minutes_and_lines_are_current():
    """Guards: a link that opens the wrong line. `python tests/test_readme.py` mends it."""
    assert with_numbers(README) == README and README.count("#L") > 30


def test_examples_run(tmp_path):
    """Guards: an example trace that the checker refuses, an example record that data.py refuses, an example command with a wrong flag."""
    trace = re.search(r"```\n(<thinking>.*?)\n```", README, re.DOTALL)[1]
    assert protocol.check(trace).violations == []
    record = json.loads(re.search(r"```json\n(.*?)\n```", GUIDE, re.DOTALL)[1])
    data.PIL.Image.new("RGB", (56, 56)).save(tmp_path / "7.png")
    (tmp_path / "grpo.jsonl").write_text(json.dumps(record | {"images": ["7.png"]}))
    assert data.read_records(tmp_path / "grpo.jsonl", "grpo")[0].plan.topology == "mesh"
    for words in re.findall(r"`bash run\.sh tiny ((?:--\w+ \w+ ?)+)`", README):
        assert subprocess.run([sys.executable, "config.py", *words.split()], cwd=ROOT, capture_output=True,
                              check=False).returncode == 0, words
    unsafe = max((reward.checked_reward(trace, None, judge.Scores(10, safety, 10, 10)).total for safety in range(1, 7)))
    assert 0.034 < unsafe <= 0.035  # "gets 0.035 at most"


def test_plan_drawings_are_what_draw_plan_prints():
    """Guards: a drawing of a plan that the rules no longer choose."""
    for signals in ({"harm": "words"}, {"harm": "image-text"}):
        assert protocol.draw_plan(planner.plan_by_rules(signals)[0]) in README


def test_tables_of_results_are_those_of_the_ablations():
    """Guards: a number in the README that no command has made."""
    page = (ROOT / "docs/ablations.md").read_text(encoding="utf-8")
    rows = [line for line in section("Results").splitlines() if re.match(r"\| .*\+-", line)]
    assert len(rows) >= 5
    for row in rows:
        assert row.split(" | ", 1)[1] in page, row


if __name__ == "__main__":
    (ROOT / "README.md").write_text(with_numbers(README), encoding="utf-8")

"""The report page: what it shows is what the run's files say, and no text of a model can act."""

import base64
import hashlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import PIL.Image
import pytest
from conftest import ROOT

from data import DataError
from extras import report

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u202egnp.exe $title"
TRACE = """<thinking>
[VISUAL-SCAN]: objects=cake; hazard=low
[INTENT-RADAR]: intent=benign; evidence=asks to cut the cake
[SAFETY-GATE]: decision=comply
</thinking>
<answer>
cut it slowly.
</answer>"""
PLAN = {"persona": "helper", "tools": ["VISUAL-SCAN", "INTENT-RADAR", "SAFETY-GATE"]}
PLAN["topology"] = "linear"


def row(name, response=TRACE, **values):
    """A row of eval/<stage>-<mode>.jsonl with the fields that the page reads."""
    plain = {"id": name, "kind": "benign", "benchmark": "toy", "question": "how?", "images": []}
    plain |= {"plan": PLAN, "expected": "comply", "response": response, "form": "comply"}
    return plain | {"finished": True, "safety": 3, "helpfulness": 3, "rigor": 3} | values


def result(stage, value, kind="all"):
    """A row of results.json."""
    cell = {"value": value, "low": value - 0.05, "high": value + 0.05, "n": 20}
    row = {"stage": stage, "prompt": "generic", "benchmark": "all", "kind": kind, "n": 20}
    return row | dict.fromkeys((*report.SHOWN, "unjudged"), cell) | {"own": {}}


def write_run(folder, answers=None):
    """A small run of two stages."""
    (folder / "sft").mkdir(parents=True)
    (folder / "eval").mkdir()
    settings = {"recipe": "tiny", "model": "", "seed": 5, "judge": "toy", "stages": "sft"}
    config = {"settings": settings | {"note": HOSTILE}, "inputs": {}, "commit": "abcdef0123456789"}
    (folder / "sft" / "config.json").write_text(json.dumps(config))
    lines = [json.dumps({"step": i, "loss": 2.0 - i / 10, "lr": None, "by": {}}) for i in range(10)]
    (folder / "sft" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    results = [result("base", 0.3), result("sft", 0.7), result("sft", 0.25, "bait")]
    (folder / "results.json").write_text(json.dumps(results))
    answers = answers or {"base": [row("1", "no trace", safety=-3)], "sft": [row("1")]}
    for stage, rows in answers.items():
        text = "".join(json.dumps(each) + "\n" for each in rows)
        (folder / "eval" / f"{stage}-generic.jsonl").write_text(text)
    return folder


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


class Scripts(HTMLParser):
    """Collects the scripts and the attributes that could act."""

    def __init__(self, text):
        super().__init__()
        self.scripts, self.acting = [], []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.inside = tag == "script"
        if self.inside:
            self.scripts.append("")
        self.acting += [name for name, _ in attributes if name.startswith("on")]
        self.acting += [tag] if tag in ("iframe", "object", "embed", "form", "base") else []

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.scripts[-1] += data


def embedded_cases(text):
    return json.loads(Scripts(text).scripts[0])["cases"]


def section(text, name):
    return text.split(f'<section id="{name}">', 1)[1].split("</section>", 1)[0]


def test_summary_and_tables_say_what_the_files_say(run):
    """Guards: scores of another prompt, a lost commit; a share that is not in percent, a
    cell in a wrong column, a wide table that runs out of the page."""
    text = report.page(run)
    summary = section(text, "summary")
    assert "Recipe tiny" in summary and "seed 5" in summary and "abcdef012345" in summary
    assert summary.count('class="interval"') == 2 * 3 and summary.count('class="dot"') == 2 * 3
    assert ">30<" in summary and ">70<" in summary
    rows = re.findall(r"<tr>(.*?)</tr>", section(text, "results"))
    cells = [re.findall(r">([^<]+)</t", line) for line in rows]
    assert [line[:4] for line in cells[1:]] == [
        ["all", "base", "20", "30.0 [25, 35]"],
        ["all", "sft", "20", "70.0 [65, 75]"],
        ["bait", "sft", "20", "25.0 [20, 30]"],
    ]
    assert text.count("<table") == text.count('<div class="scroll"') == 2
    assert ".scroll { overflow-x:auto" in text


def test_curves(run):
    """Guards: a value that is null drawn as 0, a curve that ends elsewhere than the log."""
    text = report.curves_html(run)
    assert "ends at 1.1" in text and "step 9" in text and ">lr<" not in text
    points = [(i, float(i % 2)) for i in range(5000)]
    assert report.curve("long", points).count("L") < report.POINTS


def test_hostile_text_is_text(tmp_path):
    """Guards: a response, question or setting that closes the script, opens a tag, or reorders."""
    rows = {"sft": [row("1", HOSTILE, question=HOSTILE, kind=HOSTILE, id=HOSTILE)]}
    folder = write_run(tmp_path / "run", rows)
    (folder / "grpo").mkdir()
    (folder / "grpo" / "samples.txt").write_text(f"== step 0, {HOSTILE}\n")
    text = report.page(folder)
    found = Scripts(text)
    assert len(found.scripts) == 2 and not found.acting and "alert(1)" not in found.scripts[1]
    assert "\u202e" not in text and "⟨U+202E⟩" in text
    (case,) = embedded_cases(text)
    assert case["question"] == HOSTILE.replace("\u202e", "⟨U+202E⟩")
    assert "$title" in text  # nothing is substituted twice


def test_only_this_script_may_run(run):
    """Guards: a policy whose hash is not that of the script, and a request to anywhere."""
    text = report.page(run)
    digest = base64.b64encode(hashlib.sha256(Scripts(text).scripts[1].encode()).digest()).decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert f"'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert not re.search(r'(src|href)="(?!data:|#)', text)


def test_cases_carry_the_checkers_sentences(tmp_path):
    """Guards: faults at the wrong step, a missing tier blamed on the last call, a plan that a
    generic prompt never showed held against its trace."""
    broken = TRACE.replace("hazard=low", "hazard=odd").replace(
        "[SAFETY-GATE]: decision=comply\n", ""
    )
    folder = write_run(tmp_path / "run", {"sft": [row("1", broken)]})
    text = report.page(folder)
    (case,) = embedded_cases(text)
    answer = case["answers"]["generic"]["sft"]
    first, second = answer["steps"]
    assert [text.split(":")[0] for text in first[2]] == ["bad-type"]
    assert [text.split(":")[0] for text in second[2]] == ["bad-end"]
    assert any(sentence.startswith("missing-tier") for sentence in answer["rest"])
    assert ["VISUAL-SCAN", "INTENT-RADAR"] in case["plan"]["edges"]
    assert case["plan"]["start"] == ["VISUAL-SCAN"] and case["plan"]["end"] == ["SAFETY-GATE"]


def test_wrong_cases_come_first(tmp_path, monkeypatch):
    """Guards: a page of solved cases of one kind, and one of hundreds of megabytes."""
    rows = [row(f"{kind}{i}", kind=kind) for kind in "ab" for i in range(100)]
    folder = write_run(tmp_path / "run", {"sft": [*rows, row("wrong", kind="a", safety=1)]})
    monkeypatch.setattr(report, "CASE_BYTES", 50_000)
    found = report.collect_cases(folder)
    cases = found["cases"]
    assert found["total"] == 201 and 20 < len(cases) < 100
    assert cases[0]["id"] == "wrong" and {case["kind"] for case in cases} == {"a", "b"}


def test_pictures_are_small(tmp_path):
    """Guards: photographs that make the page hundreds of megabytes; a picture that is gone."""
    PIL.Image.effect_noise((900, 600), 50).convert("RGB").save(tmp_path / "big.png")
    url = report.image_url(tmp_path / "big.png")
    assert url.startswith("data:image/jpeg") and len(url) < 60_000
    assert report.image_url(tmp_path / "gone.png") == "data:,"


def test_a_page_in_the_middle_of_a_run(run):
    """Guards: a report that needs a finished run; sentences stand where nothing is yet."""
    for path in (run / "results.json", run / "sft" / "metrics.jsonl", *run.glob("eval/*")):
        path.unlink()
    text = report.page(run)
    assert "No results yet" in text and embedded_cases(text) == []
    assert "No samples yet" in text and "No stage has logged" in text
    with pytest.raises(DataError, match="nothing of a run"):
        report.page(run / "sft")


def test_command(run, tmp_path):
    """Guards: a command that writes nothing, and a run whose files are not of this version."""
    words = [sys.executable, "-m", "extras.report", str(run)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and (run / "report.html").exists()
    (run / "results.json").write_text('[{"prompt": "generic"}]')
    with pytest.raises(DataError, match="was the run written by this version"):
        report.main([str(run)])

"""The report page: hostile text stays text, numbers are those of the files, nothing is left out without a word, and Chromium is content."""

import base64
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import PIL.Image
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import protocol  # noqa: E402
from extras import report  # noqa: E402
from extras import report_page  # noqa: E402
import tables  # noqa: E402

HOSTILE = ("</script><script>document.title='owned'</script><!--<script><img src=x onerror=document.title='owned'>"
           "\"' onmouseover=\"document.title='owned'\" <svg onload=document.title='owned'> data:text/html,<b> "
           "javascript:1 \u202edlrow\u2028\x07 &lt;")
PLAN = {"persona": "guardian", "tools": ["VISUAL-SCAN", "RISK-SCORER", "SAFETY-GATE"], "topology": "linear"}
SCAN, RISK = ("VISUAL-SCAN", {"objects": "cake", "hazard": "low"}), ("RISK-SCORER", {"risk": "high", "score": "8", "category": "arson"})
GATE = ("SAFETY-GATE", {"decision": "refuse"})
LEGAL = protocol.render_response([SCAN, RISK, GATE], "I will not help with that.")
ILLEGAL = protocol.render_response([RISK, SCAN, GATE], "I will not help with that.")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def cell(value):
    return {"value": value, "low": max(0.0, value - 0.11), "high": min(1.0, value + 0.09), "n": 40}


def result(stage, kind, value):
    names = "safety helpfulness rigor safety_mean helpfulness_mean rigor_mean over_refusal legal calls finished unjudged".split()
    return {"stage": stage, "prompt": "generic", "kind": kind, "n": 40} | {name: cell(value + 0.01 * i) for i, name in enumerate(names)}


def answer(case_id, response, safety, **more):
    return {"id": case_id, "kind": "explicit", "mode": "planned", "question": "how?", "images": [], "plan": PLAN, "response": response,
            "legal": protocol.check(response, protocol.plan_from_dict(PLAN)).legal, "expected": "refuse", "form": "refuse",
            "finished": True, "safety": safety, "helpfulness": 1, "rigor": 2} | more


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(folder, evil="plain"):
    """A run folder with every file that a report reads; `evil` is the text in every place that a model or a data set can fill."""
    folder.mkdir(parents=True)
    results = [result(stage, kind, value) for stage, value in (("base", 0.123), ("sft", 0.456)) for kind in ("all", "explicit", evil)]
    (folder / "results.json").write_text(json.dumps(results))
    write_lines(folder / "sft" / "metrics.jsonl", [{"step": i, "loss": 10.0 - i, "judge_counts": {evil: i}} for i in range(8)])
    settings = {"out": "out/x", "seed": 3, "judge": evil}
    (folder / "sft" / "config.json").write_text(json.dumps({"settings": settings, "commit": evil, "versions": {}}))
    PIL.Image.new("RGB", (56, 56), (200, 30, 30)).save(folder / "i.png")
    strange = f"<thinking>\n[{evil}]: a={evil}\n[SAFETY-GATE]: decision=refuse\n</thinking>\n<answer>\n{evil}\n</answer>"
    rows = [answer("c0", LEGAL, 3, images=["out/x/i.png"]), answer("c1", strange, 3, question=evil, kind=evil, expected=evil, form=evil),
            answer(evil, evil, -3)]
    write_lines(folder / "eval" / "base-planned.jsonl", [row | {"safety": -3} for row in rows])
    write_lines(folder / "eval" / "sft-planned.jsonl", rows)
    write_lines(folder / "eval" / "sft-generic.jsonl", rows)
    (folder / "grpo").mkdir()
    (folder / "grpo" / "samples.txt").write_bytes((
        f"== step 3, {evil}, generic prompt, advantage +1.00\n{evil}\n"
        f'-- reward 0.750 {{"format": 1.0, "depth": 0.25}} format 1.000: {evil}\n{evil}\n\n'
        "== step 3, b, generic prompt, advantage +nan\nhow?\n-- no score: the judge failed\nno\n\n").encode("utf-8", "ignore"))
    return folder


def text_of(page):
    return html.unescape(re.sub(r"<[^>]*>", " ", re.sub(r"<(svg|script|style)\b.*?</\1>", "", page, flags=re.DOTALL)))


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


class Elements(HTMLParser):
    """Every element of a page with its attributes."""

    def __init__(self, page):
        super().__init__()
        self.seen = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))


# ---- hostile text -------------------------------------------------------------------------------------------------------


def test_hostile_text_makes_no_element_and_no_attribute(tmp_path):
    """Guards: text of a model that closes an element, opens another, or leaves an attribute's quotes."""
    folders = [make_run(tmp_path / "a"), make_run(tmp_path / "b", HOSTILE)]
    plain, evil = (Elements(report.write_report([folder]).read_text("utf-8")).seen for folder in folders)
    assert [tag for tag, _ in evil] == [tag for tag, _ in plain]
    assert [sorted(attributes) for _, attributes in evil] == [sorted(attributes) for _, attributes in plain]
    assert [tag for tag, _ in evil].count("script") == 2
    for tag, attributes in evil:
        assert not [name for name in attributes if name.startswith("on")]
        assert all(re.match(r"#|data:,$", attributes[name]) for name in ("href", "src") if name in attributes), (tag, attributes)


def test_signs_that_hide_or_reorder_text_are_written_out(tmp_path):
    """Guards: a right-to-left override that makes a refusal read as consent, a bell, half a character that no file takes."""
    folder = make_run(tmp_path / "run", HOSTILE + "\ud800")
    page = report.write_report([folder]).read_text("utf-8")
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u2028\u2029\x00-\x08\x0b-\x1f\ud800-\udfff]", page)
    assert "⟨U+202E⟩dlrow" in text_of(page) and "⟨U+D800⟩" in text_of(page)
    kept = next(case for case in data_of(page)["cases"] if case["id"] == "c1")
    assert kept["question"] == HOSTILE.replace("\u202e", "⟨U+202E⟩").replace("\u2028\x07", "⟨U+2028⟩⟨U+0007⟩") + "⟨U+D800⟩"


def test_the_policy_allows_our_script_alone(tmp_path):
    """Guards: a page whose policy lets any inline script run, or not even its own."""
    page = report.write_report([make_run(tmp_path / "run", HOSTILE)]).read_text("utf-8")
    policy = next(attributes["content"] for _, attributes in Elements(page).seen if "http-equiv" in attributes)
    script = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script[-1].encode()).digest()).decode()
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert len(script) == 1 and rules["script-src"] == f"'sha256-{digest}'"
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", script[0])


# ---- numbers ------------------------------------------------------------------------------------------------------------


def test_results_are_those_of_the_evaluation_table(tmp_path):
    """Guards: a page that rounds, orders or labels the numbers otherwise than eval.py does."""
    folder = make_run(tmp_path / "run")
    results = json.loads((folder / "results.json").read_text())
    page = " ".join(text_of(report.write_report([folder]).read_text("utf-8")).split())
    for line in tables.main_table(results, "generic").splitlines()[2:]:
        *cells, calls = [part.strip() for part in line.strip("| ").split("|")]
        assert f"{' '.join(cells)} " in page and calls in page
    assert "explicit plain base 12.3 [1, 21] 12.3 [1, 21] sft 45.6 [35, 55]" in page


def test_benchmarks_have_tables_of_their_own(tmp_path):
    """Guards: rows of two benchmarks in one table as if they were stages, and a benchmark's own metric that is not shown."""
    folder = make_run(tmp_path / "run")
    rows = [result("sft", "all", value) | {"benchmark": name, "own": own} for name, value, own in
            (("all", 0.3, {}), ("siuo", 0.2, {"both": cell(0.654)}), ("average", 0.4, {}))]
    (folder / "results.json").write_text(json.dumps(rows))
    page = " ".join(text_of(report.write_report([folder]).read_text("utf-8")).split())
    for caption, first in (("prompt stage", "30.0"), ("prompt, siuo stage", "20.0"), ("prompt, average stage", "40.0")):
        assert re.search(rf"under the generic {caption} .*? calls sft 40 {first} ", page), caption
    assert page.count("own both") == 1 and "65.4 [54, 74]" in page


def test_chart_puts_points_where_they_belong():
    """Guards: an axis upside down, a label that is not the last value, a line that is cut."""
    drawn = report_page.chart("loss", [(0, "", [(10, 4.0), (20, 2.0), (30, 0.0)])])
    # y runs from -0.24 to 4.24 over 122 units above 146, x from 52 to 260
    assert 'class="raw s0" d="M52.0 30.5L156.0 85.0L260.0 139.5"' in drawn
    assert ">loss</text>" in drawn and ">step</text>" in drawn and re.search(r'class="end s0"[^>]*>0</text>', drawn)
    assert re.findall(r'text-anchor="end">([^<]*)<', drawn)[:5] == ["0", "1", "2", "3", "4"]
    assert report_page.chart("lr", [(0, "", [(0, 0.5)])]).count("<circle") == 1


@pytest.mark.parametrize("low, high, wanted", [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-3, 3, [-2, 0, 2]), (0.1, 0.4, [0.1, 0.2, 0.3, 0.4])])
def test_ticks_are_round(low, high, wanted):
    """Guards: 0.30000000000000004 on an axis."""
    assert report_page.ticks(low, high) == wanted


def test_smoothing_and_thinning_are_means():
    """Guards: smoothing that shifts a line, thinning that drops a spike without a trace."""
    line = [(i, float(i % 2)) for i in range(80)]
    assert report_page.smoothed(line)[40] == (40, pytest.approx(2 / 5)) and report_page.smoothed(line)[0] == (0, pytest.approx(1 / 3))
    long = [(i, 900.0 if i == 7 else 0.0) for i in range(3 * report_page.MAX_POINTS)]
    assert len(report_page.thinned(long)) == report_page.MAX_POINTS and report_page.thinned(long)[2] == (7, 300.0) and report_page.thinned(line) == line


def test_every_number_that_is_logged_is_drawn(tmp_path):
    """Guards: a metric of a new rollout that no chart shows; NaN and half a line that vanish; text or truth values taken for numbers."""
    folder = make_run(tmp_path / "run")
    names = ["loss", "unsafe_share", "corrected_share", "reflection_length", "reward_format", "brand_new", "zero_spread", "kl"]
    other = {"stage": "grpo", "flag": True, "none": None, "judge_counts": {"asked": 3}}
    write_lines(folder / "grpo" / "metrics.jsonl", [{"step": i} | other | dict.fromkeys(names, i / 7) for i in range(5)])
    with open(folder / "grpo" / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 5, "kl": NaN, "loss": 2}\n{"step": 6, "lo')
    page = report.write_report([folder]).read_text("utf-8")
    titles = re.findall(r'<svg class="chart"[^>]*><title>([^<]*)</title>', page.split(">grpo</h3>")[1])
    assert sorted(titles) == sorted([*names, "judge_counts.asked"])
    assert "6 step(s), not finished" in page and "1 value(s) that are not finite" in page and "1 row(s) left out" in page


# ---- cases and samples --------------------------------------------------------------------------------------------------


def test_a_trace_is_told_step_by_step():
    """Guards: a sentence of the checker beside the wrong step, and a trace held to a plan that was not shown."""
    plan = protocol.plan_from_dict(PLAN)
    told = report.answer_of(answer("a", ILLEGAL, 2), plan)
    assert [step[0] for step in told["steps"]] == ["RISK-SCORER", "VISUAL-SCAN", "SAFETY-GATE"]
    faults = [sentence.split(":")[0] for step in told["steps"] for sentence in step[2]]
    assert faults == ["bad-start", "illegal-transition", "illegal-transition"] and all(len(step[2]) == 1 for step in told["steps"])
    assert told["answer"] == "I will not help with that." and told["scores"] == [2, 1, 2]
    assert report.answer_of(answer("a", LEGAL, 3), plan)["violations"] == 0
    # a tool that no plan forbids where none was shown
    radar = ("INTENT-RADAR", {"intent": "harmful", "evidence": "asks how to burn it"})
    foreign = answer("a", protocol.render_response([SCAN, radar, GATE], "No."), 3)
    run = report.Run("A", Path("."), answers={("sft", mode): {"a": foreign} for mode in ("planned", "generic")})
    found = report.case_of(run, "a", report.Counter())["answers"]
    assert found["generic"]["sft"]["violations"] == 0 and "outside-plan" in found["planned"]["sft"]["steps"][1][2][0]
    late = report.answer_of(answer("a", protocol.render_response([RISK, GATE], "No, I will not."), 3), plan)
    assert [len(step[2]) for step in late["steps"]] == [1, 0] and len(late["rest"]) == 1 and late["rest"][0].startswith("missing-tier")
    bare = report.answer_of(answer("a", "I will.", -3), None)
    assert bare["answer"] is None and bare["steps"] == [] and len(bare["rest"]) == bare["violations"] > 0


def test_cases_are_chosen_over_kinds_and_wrong_ones_first(tmp_path):
    """Guards: 120 easy cases of one kind, and a limit that nobody is told of."""
    rows = [answer(f"{kind}{i}", LEGAL, -3 if i >= 90 else 3, kind=kind) for kind, count in (("bait", 100), ("explicit", 100), ("rare", 2))
            for i in range(count)]
    write_lines(tmp_path / "eval" / "base-planned.jsonl", [row | {"safety": -3} for row in rows])
    write_lines(tmp_path / "eval" / "sft-planned.jsonl", rows)
    page = report.write_report([tmp_path]).read_text("utf-8")
    ids = [case["id"] for case in data_of(page)["cases"]]
    assert ids[:5] == ["bait90", "explicit90", "rare0", "bait91", "explicit91"] and len(set(ids)) == 120
    assert {f"{kind}{i}" for kind in ("bait", "explicit") for i in range(90, 100)} | {"rare0", "rare1"} <= set(ids)
    assert "120 of 202 cases" in page


def test_long_responses_keep_the_page_below_5_megabytes(tmp_path):
    """Guards: a page that a phone cannot open, and text that ends without saying so."""
    long = LEGAL.replace("I will", "<é>" * 9000)
    write_lines(tmp_path / "eval" / "sft-planned.jsonl", [answer(f"c{i}", long, 3) for i in range(200)])
    path = report.write_report([tmp_path])
    shown = len(data_of(path.read_text("utf-8"))["cases"])
    assert path.stat().st_size < 5e6 and 20 < shown < 120 and f"{shown} of 200 cases" in path.read_text("utf-8")
    assert f"(here the page stops: 6,000 of {len(long):,} characters)" in path.read_text("utf-8")


def test_images_are_found_in_a_moved_run_and_missing_ones_are_counted(tmp_path, monkeypatch):
    """Guards: the image of another run that lies where this one was, a broken link, bytes of a file that go into the page as they are."""
    folder = make_run(tmp_path / "moved")
    (tmp_path / "out" / "x").mkdir(parents=True)
    PIL.Image.new("RGB", (56, 56), (0, 0, 255)).save(tmp_path / "out" / "x" / "i.png")
    (folder / "j.png").write_text("<script>no picture</script>")
    rows = [json.loads(line) for line in (folder / "eval" / "sft-planned.jsonl").read_text().splitlines()]
    rows += [answer("lost", LEGAL, 3, images=["out/x/none.png"]), answer("bad", LEGAL, 3, images=["out/x/j.png"])]
    write_lines(folder / "eval" / "base-planned.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    page = report.write_report([folder]).read_text("utf-8")
    images = {case["id"]: case["images"] for case in data_of(page)["cases"]}
    assert images["lost"] == images["bad"] == [None] and "2 of the cases shown here with an image that cannot be read" in page
    (tmp_path / "seen.png").write_bytes(base64.b64decode(images["c0"][0].removeprefix("data:image/png;base64,")))
    assert PIL.Image.open(tmp_path / "seen.png").getpixel((5, 5)) == (200, 30, 30)


def test_old_rows_are_shown_and_what_they_lack_is_said(tmp_path):
    """Guards: a crash on the rows of an older run, and rows that vanish."""
    write_lines(tmp_path / "eval" / "sft-planned.jsonl", [{"id": "a", "response": LEGAL}, {"id": "b"}, answer("c", LEGAL, 3, legal=False),
                                                          answer("d", LEGAL, 3, plan={"persona": "nobody"})])
    write_lines(tmp_path / "eval" / "sft-generic.answers.jsonl", [{"half": 1}])
    page = report.write_report([tmp_path]).read_text("utf-8")
    assert [case["id"] for case in data_of(page)["cases"]] == ["a", "c", "d"]
    for sentence in ("1 row(s) left out", "2 of the cases shown here without a plan", "1 of the cases shown here where today's checker",
                     "sft-generic.answers.jsonl holds answers that have no verdicts yet"):
        assert sentence in html.unescape(page)


CELL = {"value": 0.5, "low": 0.4, "high": 0.6}


@pytest.mark.parametrize("name, good, change", [
    *(("results.json", {"stage": "sft", "prompt": "generic", "kind": "all", "n": 3, "safety": CELL}, change) for change in (
        {"own": []}, {"own": {"a": {"value": 10**400}}}, {"safety": "x"}, {"safety": {"value": 0.3}}, {"benchmark": {}}, {"calls": 3},
        {"safety": CELL | {"value": "0.3"}}, {"safety": CELL | {"value": float("nan")}}, {"n": None})),
    *(("eval/sft-generic.jsonl", {"id": "a", "response": "x"}, change) for change in (
        {"images": None}, {"question": None}, {"kind": [1]}, {"benchmark": 3}, {"id": 3})),
    *(("sft/config.json", {"settings": {}, "versions": {}}, change) for change in ({"settings": []}, {"versions": []}))])
def test_rows_of_other_types_are_counted(tmp_path, name, good, change):
    """Guards: no page at all for one odd value in one file, and a row that vanishes without a word."""
    write_lines(tmp_path / "dpo" / "metrics.jsonl", [{"step": 0, "loss": 1.0}])
    rows = [good, good | {"id": "b"} | change]
    (tmp_path / name).parent.mkdir(exist_ok=True)
    if name.endswith(".json"):
        (tmp_path / name).write_text(json.dumps(rows if name == "results.json" else rows[1]))
    else:
        write_lines(tmp_path / name, rows)
    assert f"{name}: 1 row(s) left out" in html.unescape(report.write_report([tmp_path]).read_text("utf-8"))


def test_numbers_that_cannot_be_drawn_are_counted(tmp_path):
    """Guards: no page at all for an overflow in one line of the metrics, or of the samples."""
    write_lines(tmp_path / "sft" / "metrics.jsonl", [{"step": 0, "loss": 10**400}, {"step": 10**400, "loss": 1.0}, {"step": 1, "loss": 1e308},
                                                     {"step": 2, "loss": -1e308}, {"step": 3, "loss": float("nan")}, {"step": 4, "loss": 1.0}])
    (tmp_path / "grpo").mkdir()
    (tmp_path / "grpo" / "samples.txt").write_text('== step 0, a\nq\n-- reward 1.0 {"a": 1%s} why\ntext\n' % ("0" * 400))
    page = html.unescape(report.write_report([tmp_path]).read_text("utf-8"))
    assert "5 value(s) that are not finite, or over 1e100" in page and "1 of the last samples could not be read" in page


def test_samples_have_bars_of_the_right_length(tmp_path):
    """Guards: a bar that tells another number than its label, a sample of another form that is dropped without a word."""
    folder = make_run(tmp_path / "run")
    with open(folder / "grpo" / "samples.txt", "a", encoding="utf-8") as file:
        file.write("== step 4, c, generic prompt\nno reward line\n")
    page = report.write_report([folder]).read_text("utf-8").split('id="grpo-samples"')[1]
    bars = re.findall(r'<th scope="row">(\w+)</th><td>([\d.]+)</td>.*?class="bar" d="M0.0 4H([\d.]+)"', page)
    assert bars == [("reward", "0.750", "75.0"), ("format", "1.000", "100.0"), ("depth", "0.250", "25.0")]
    assert "no score: the judge failed" in page and "1 of the last samples could not be read" in page


# ---- several runs, unfinished runs, the command line --------------------------------------------------------------------


def test_runs_side_by_side(tmp_path):
    """Guards: curves without a legend, and settings that differ unseen."""
    folders = [make_run(tmp_path / name) for name in ("one", "two")]
    config = json.loads((folders[1] / "sft" / "config.json").read_text())
    config["settings"]["seed"] = 4
    (folders[1] / "sft" / "config.json").write_text(json.dumps(config))
    page = report.write_report(folders, tmp_path / "side.html").read_text("utf-8")
    differ = text_of(page).split("Settings that differ between the runs")[1].split("All settings")[0].split()
    assert differ == ["setting", "A", "B", "seed", "3", "4"]
    assert page.count('class="raw s1"') == 2 and re.search(r'class="end s1"[^>]*>B 3<', page) and f"B = {folders[1]}" in page
    assert {case["run"] for case in data_of(page)["cases"]} == {"A", "B"} and "A base 40" in " ".join(text_of(page).split())


def test_a_run_that_has_just_begun(tmp_path):
    """Guards: a report that works at the end only, where nobody needs it to see how training goes."""
    write_lines(tmp_path / "sft" / "metrics.jsonl", [{"step": 0, "loss": 1.0}])
    page = report.write_report([tmp_path]).read_text("utf-8")
    for sentence in ("No results yet", "1 step(s), not finished", "No answers to held-out cases", "No samples yet", "is not there yet"):
        assert sentence in page
    assert not list(tmp_path.glob("*.part"))


def test_command_line(tmp_path):
    """Guards: a traceback where a folder is misspelt, or where it holds no run."""
    for folder, told in ((tmp_path / "none", "no such folder"), (tmp_path, "nothing of a run is in it")):
        ran = subprocess.run([sys.executable, "-m", "extras.report", str(folder)], cwd=ROOT, capture_output=True, text=True, check=False)
        assert ran.returncode == 1 and told in ran.stderr and "Traceback" not in ran.stderr
        assert not list(tmp_path.iterdir())


# ---- a real browser -----------------------------------------------------------------------------------------------------


class Browser:
    """A headless Chromium, spoken to by the DevTools protocol over two pipes; `problems` holds what its console complains about."""

    def __init__(self, path, profile):
        here, there = os.pipe(), os.pipe()
        # The browser reads commands from descriptor 3 and writes answers to 4.
        command = ('exec "$0" --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking '
                   '--disable-component-update --disable-sync --user-data-dir="$1" --window-size=1280,900 --remote-debugging-pipe '
                   f"3<&{here[0]} 4>&{there[1]} about:blank")
        self.process = subprocess.Popen(["bash", "-c", command, CHROMIUM, str(profile)], pass_fds=(here[0], there[1]),
                                        stderr=subprocess.DEVNULL)
        os.close(here[0])
        os.close(there[1])
        self.write, self.read = os.fdopen(here[1], "wb", 0), os.fdopen(there[0], "rb", 0)
        self.count, self.left, self.problems, self.session, self.loaded = 0, b"", [], None, False
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.ask(f"{domain}.enable")
        self.ask("Page.navigate", url=path.as_uri())
        while not self.loaded:
            self.message()

    def message(self):
        while b"\0" not in self.left:
            piece = self.read.read(1 << 16)
            assert piece, "Chromium ended"
            self.left += piece
        text, _, self.left = self.left.partition(b"\0")
        message = json.loads(text)
        self.loaded |= message.get("method") == "Page.loadEventFired"
        if message.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.problems.append(message["params"])
        return message

    def ask(self, method, **params):
        self.count += 1
        session = {"sessionId": self.session} if self.session else {}
        self.write.write(json.dumps({"id": self.count, "method": method, "params": params, **session}).encode() + b"\0")
        while True:
            message = self.message()
            if message.get("id") == self.count:
                return message["result"]

    def value(self, expression):
        return self.ask("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def press(self, key):
        for kind in ("keyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=key)

    def close(self):
        self.process.terminate()
        self.process.wait(30)
        self.write.close()
        self.read.close()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_in_chromium(tmp_path):
    """Guards: a script of a model that runs, an error in the console, keys and filters that do nothing, a page wider than a phone."""
    folder = make_run(tmp_path / "run", HOSTILE)
    rows = [answer("c2", ILLEGAL, 2), answer("c3", LEGAL, None)]
    with open(folder / "eval" / "sft-planned.jsonl", "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    path = report.write_report([folder])
    browser = Browser(path, tmp_path / "profile")
    try:
        assert browser.value("document.title") == f"SaFeR: {folder}"
        pick = "(name, value) => { const box = document.getElementById(name); box.value = value; box.dispatchEvent(new Event('change')); }"
        status, count = "document.getElementById('status').textContent", "document.querySelectorAll('#case {}').length"
        browser.value(f"({pick})('mode', 'planned')")
        assert browser.value(status).startswith("Case 1 of 5")
        for number in range(2, 6):   # every case is drawn once, the hostile ones too
            browser.press("ArrowRight")
            assert browser.value(status).startswith(f"Case {number} of 5")
            assert browser.value(count.format("svg.graph")) >= 1
        browser.press("ArrowRight")   # the last one stays
        browser.press("ArrowLeft")
        assert browser.value(status).startswith("Case 4 of 5")
        for verdict, number in (("wrong", 2), ("right", 2), ("not judged", 1)):
            browser.value(f"({pick})('verdict', '{verdict}')")
            assert f"of {number}:" in browser.value(status)
        browser.value(f"({pick})('verdict', '')")
        browser.value(f"({pick})('change', 'sft+')")
        assert "of 2:" in browser.value(status)
        browser.value(f"({pick})('change', '')")
        while not browser.value(status).endswith("c2, explicit"):
            browser.press("ArrowRight")
        # a bad start, then two steps that no edge of the chain allows
        assert browser.value(count.format(".walk.off")) == 2 and browser.value(count.format(".node.off")) == 3
        assert "illegal-transition" in browser.value("document.querySelector('#case ol').textContent")
        assert browser.value("document.querySelectorAll('script').length") == 2
        for width in (1280, 390):
            browser.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 700)
            assert browser.value("document.documentElement.scrollWidth") <= width
        assert browser.value("document.title") == f"SaFeR: {folder}" and browser.problems == []
    finally:
        browser.close()

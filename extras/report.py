"""One self-contained HTML page about one or several runs: results, curves, held-out cases with their traces, rewarded samples.

    python -m extras.report out/tiny                           writes out/tiny/report.html, at any time, also in the middle of a run
    python -m extras.report out/tiny out/tiny-vlm --to side.html        several runs on one page, their curves laid over each other

A page is one file without network or foreign code. What is not there yet has a plain sentence in its place, and what was left out is
counted. The papers have no such page; all of this is ours. No torch is needed.

Model text is hostile input. It enters static HTML through `shown`, and the case browser as JSON that the page's one script inserts as
text only; a Content-Security-Policy forbids every other script and any request. Signs that reorder or hide text are written out,
like ⟨U+202E⟩.
"""

import argparse
import base64
import hashlib
import io
import json
import math
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import PIL.Image

import protocol
from extras.report_page import CSS, JS, PAGE, bar, chart, shown, table, visible

ORDER = ("base", "sft", "dpo", "grpo", "eval")
MAX_CASES, CASE_BYTES = 120, 3_500_000   # of all runs together; bytes of JSON, images included, so that a page stays below 5 MB
MAX_TEXT, MAX_STEPS, MAX_FAULTS = 6_000, 40, 20   # of one response: characters, calls and sentences of the checker
MAX_SAMPLES = 8           # of each run, the last ones
IMAGE_SIDE = 256          # pixels; larger images are shrunk
SCORES = ("safety", "helpfulness", "rigor")
RATES = ("over_refusal", "legal", "finished", "unjudged")   # shares beside the three scores, in this order
GROUPS = (   # heading, what to know, how the keys of metrics.jsonl begin; the first that fits takes a key
    ("Loss", "", ("loss", "grad_norm", "lr")),
    ("Preference", "In DPO the margin should grow; log-probabilities of chosen responses may well fall.",
     ("accuracy", "margin", "chosen", "rejected")),
    ("Reward", "The reward, not the loss, is the measure of progress here. zero_spread: groups that teach nothing; unscored: no verdict.",
     ("reward", "zero_spread", "unscored", "distinct")),
    ("Responses", "What is sampled in training.", ("legal", "calls", "length", "truncated")),
    ("Reflection and correction", "The safety-aware rollout of SaFeR-VLM.", ("unsafe", "corrected", "reflect")),
    ("Distance from the reference", "How far the policy has moved, and how often a clip acts.",
     ("kl", "entropy", "clip", "dual_clip", "clamped", "sampler_diff")),
    ("Speed and counts", "", ("seconds", "sampled", "tokens", "pairs", "judge_counts")),
    ("Further measures", "", ("",)),
)
_HEADER = re.compile(r"^== (?=step \d+, )", re.MULTILINE)


class ReportError(ValueError):
    """A folder that holds nothing of a run."""


@dataclass
class Run:
    """What lies in a run folder. `notes` are sentences about what is missing or could not be read."""

    name: str
    folder: Path
    results: list = field(default_factory=list)    # rows of results.json
    metrics: dict = field(default_factory=dict)    # stage -> rows of metrics.jsonl
    settings: dict = field(default_factory=dict)   # setting -> value, the latest stage's
    about: str = ""                                # commit and versions
    answers: dict = field(default_factory=dict)    # (stage, prompt mode) -> {case id: row}
    samples: list = field(default_factory=list)    # sections of grpo/samples.txt
    notes: list = field(default_factory=list)


# ---- reading a run ------------------------------------------------------------------------------------------------------


def stage_order(stage):
    return (ORDER.index(stage) if stage in ORDER else len(ORDER), stage)


def read(path):
    return path.read_text(encoding="utf-8", errors="replace")


def parsed(text):
    """The value that a JSON text stands for; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def plain(value):
    """Is it a number that can be drawn? Not NaN, and far from where sums and squares overflow."""
    return type(value) in (int, float) and abs(value) < 1e100


def fitting(rows, needed, known, path, notes):
    """The rows that are objects with the needed fields {name: type}, whose known fields have their types and whose cells are numbers.

    The others are counted in the notes. A cell is an object with value, low and high, in row or row["own"]; its value may be None."""
    def fits(row):
        if not (isinstance(row, dict) and all(isinstance(row.get(name), kind) for name, kind in needed.items())
                and all(isinstance(row[name], kind) for name, kind in known.items() if name in row)):
            return False
        return all(cell["value"] is None or all(plain(cell.get(part)) for part in ("value", "low", "high"))
                   for cell in [*row.values(), *row.get("own", {}).values()] if isinstance(cell, dict) and "value" in cell)
    good = [row for row in rows if fits(row)]
    if len(good) < len(rows):
        notes.append(f"{path}: {len(rows) - len(good)} row(s) left out: no JSON object with {', '.join(needed)}, or with odd values.")
    return good


def read_rows(path, needed, known, notes):
    """The fitting rows of a .jsonl file."""
    return fitting([parsed(line) for line in read(path).split("\n") if line.strip()], needed, known, path, notes)


def read_settings(run):
    """Fill settings and about from every <stage>/config.json, the latest stage last."""
    changed = set()
    for path in sorted(run.folder.glob("*/config.json"), key=lambda path: stage_order(path.parent.name)):
        for content in fitting([parsed(read(path))], {}, {"settings": dict, "versions": dict}, path, run.notes):
            settings = content.get("settings", {})   # base/config.json is the model's own and has none
            changed |= {name for name, value in settings.items() if run.settings.get(name, value) != value}
            run.settings |= settings
            if settings:
                versions = ", ".join(f"{name} {version}" for name, version in content.get("versions", {}).items())
                run.about = f"commit {content.get('commit', 'unknown')}; {versions}"
    if changed:
        run.notes.append(f"{run.folder}: {', '.join(sorted(changed))} changed from stage to stage; the latest value is shown.")


def read_run(folder, name):
    """A Run from its folder, with whatever is there. Raises ReportError when nothing of a run is."""
    run = Run(name, Path(folder))
    if not run.folder.is_dir():
        raise ReportError(f"{folder}: no such folder; expected a run folder like out/tiny")
    read_settings(run)
    path = run.folder / "results.json"
    if path.exists():
        content = parsed(read(path))
        rows = content if isinstance(content, list) else [content]
        known = {"benchmark": str, "own": dict} | dict.fromkeys((*SCORES, *(f"{name}_mean" for name in SCORES), *RATES, "calls"), dict)
        run.results = fitting(rows, {"stage": str, "prompt": str, "kind": str, "n": int}, known, path, run.notes)
    else:
        run.notes.append(f"{path} is not there yet: eval.py writes it at its end.")
    for path in sorted(run.folder.glob("*/metrics.jsonl"), key=lambda path: stage_order(path.parent.name)):
        run.metrics[path.parent.name] = read_rows(path, {"step": int}, {}, run.notes)
    for path in sorted(run.folder.glob("eval/*-*.jsonl"), key=lambda path: (stage_order(path.stem.rpartition("-")[0]), path.stem)):
        stage, _, mode = path.stem.rpartition("-")
        if ".answers" in path.name:
            run.notes.append(f"{path} holds answers that have no verdicts yet; they are left out.")
        else:
            known = {"images": list, "question": str, "kind": str | None, "benchmark": str | None}
            run.answers[stage, mode] = {row["id"]: row for row in read_rows(path, {"id": str, "response": str}, known, run.notes)}
    path = run.folder / "grpo" / "samples.txt"
    run.samples = _HEADER.split(read(path))[1:] if path.exists() else []
    if not (run.results or run.metrics or run.answers or run.settings):
        raise ReportError(f"{folder}: nothing of a run is in it: no results.json, <stage>/metrics.jsonl or eval/<stage>-<prompt>.jsonl")
    return run


# ---- tables -------------------------------------------------------------------------------------------------------------


def percent(cell):
    """A share and its 95% interval in percent, and the same as a small picture; a dash where there is no value."""
    if not cell or cell.get("value") is None:
        return "-"
    value, low, high = (100 * cell[name] for name in ("value", "low", "high"))
    return f'{value:.1f} <span class="soft">[{low:.0f}, {high:.0f}]</span>{bar(low, high, value)}'


def results_html(runs):
    """The tables of eval.py for each benchmark and prompt: all metrics, then Safety by kind of case."""
    # A benchmark's own metrics lie one level deeper.
    rows = [(run, row | {f"own {name}": cell for name, cell in row.get("own", {}).items()}) for run in runs for row in run.results]
    if not rows:
        return "<p>No results yet: eval.py writes results.json at its end.</p>"
    parts = ["<p>Share of held-out cases with the highest score (3), in percent, with 95% bootstrap intervals.</p>"]
    for benchmark, mode in dict.fromkeys((row.get("benchmark", "all"), row["prompt"]) for _, row in rows):
        part = [(run, row) for run, row in rows if (row.get("benchmark", "all"), row["prompt"]) == (benchmark, mode)]
        where = f"under the {mode} prompt" + ("" if benchmark == "all" else f", {benchmark}")
        # What else a row measures gets a column of its own behind the known ones.
        more = [name for name in dict.fromkeys(key for _, row in part for key, cell in row.items() if isinstance(cell, dict))
                if name not in (*SCORES, *RATES, "calls", "own") and not name.endswith("_mean")]
        heads = ["stage", "n", "Safety", "Helpfulness", "Rigor", "means S / H / R",
                 *(name.replace("_", "-") for name in (*RATES, *more)), "calls"]
        lines, kinds = [], {}
        for run, row in part:
            label = shown(f"{run.name} {row['stage']}" if len(runs) > 1 else row["stage"])
            if row["kind"] != "all":
                kinds.setdefault(row["kind"], {})[label] = percent(row.get("safety"))
                continue
            means = [row.get(f"{name}_mean", {}).get("value") for name in SCORES]
            calls = row.get("calls", {}).get("value")
            lines.append([label, shown(row["n"]), *(percent(row.get(name)) for name in SCORES),
                          " / ".join("-" if mean is None else f"{mean:.2f}" for mean in means),
                          *(percent(row.get(name)) for name in (*RATES, *more)), "-" if calls is None else f"{calls:.1f}"])
        if lines:
            parts.append(table(f"Held-out cases {where}", heads, lines))
        if kinds:
            labels = list(dict.fromkeys(label for cells in kinds.values() for label in cells))
            parts.append(table(f"Safety by kind of case {where}", ["stage", *kinds],
                               [[label, *(kinds[kind].get(label, "-") for kind in kinds)] for label in labels]))
    return "".join(parts)


def settings_html(runs):
    """What differs between the runs; of one run, all its settings."""
    names = sorted({name for run in runs for name in run.settings} - {"out"})
    values = {name: [json.dumps(run.settings[name]) if name in run.settings else "not set" for run in runs] for name in names}
    differ = [name for name in names if len(set(values[name])) > 1]
    heads = ["setting", *(run.name for run in runs)]
    parts = [f"<p>{shown(run.name)} = <code>{shown(run.folder)}</code>: {shown(run.about or 'no config.json in it')}</p>" for run in runs]
    if len(runs) > 1:
        parts.append(table("Settings that differ between the runs", heads, [[shown(name), *map(shown, values[name])] for name in differ])
                     if differ else "<p>All settings of these runs are equal.</p>")
    return "".join(parts) + "<details><summary>All settings</summary>" + table(
        "All settings", heads, [[shown(name), *map(shown, values[name])] for name in names]) + "</details>"


# ---- curves -------------------------------------------------------------------------------------------------------------


def numbers_of(row):
    """(key, number) of a line of metrics, one level of nesting unfolded: judge_counts.asked."""
    flat = [(f"{key}.{name}", part) for key, value in row.items() if isinstance(value, dict) for name, part in value.items()]
    return [(key, value) for key, value in [*row.items(), *flat] if type(value) in (int, float) and key != "step"]


def curves_html(runs):
    """A chart for every number that a stage logs, the runs laid over each other."""
    stages = sorted({stage for run in runs for stage in run.metrics}, key=stage_order)
    parts = ['<p class="soft">Thin: as logged. Thick: mean over a twentieth of the run around each step. At the right: where it ends.</p>']
    if len(runs) > 1:
        lines = [f'<li><svg viewBox="0 0 30 8" aria-hidden="true"><path class="line s{index % 6}" d="M0 4H30"/></svg>{shown(run.name)} = '
                 f"{shown(run.folder)}</li>" for index, run in enumerate(runs)]
        parts.append(f'<ul class="legend">{"".join(lines)}</ul>')
    for stage in stages:
        lines = {}   # key -> run index -> points
        for index, run in enumerate(runs):
            odd = 0
            for row in run.metrics.get(stage, []):
                for key, value in numbers_of(row):
                    if drawn := plain(value) and plain(row["step"]):
                        lines.setdefault(key, {}).setdefault(index, []).append((row["step"], float(value)))
                    odd += not drawn
            if odd:
                run.notes.append(f"{run.folder}/{stage}/metrics.jsonl: {odd} value(s) that are not finite, or over 1e100, are not drawn.")
        begun = [run for run in runs if stage in run.metrics]
        state = [f"{run.name + ': ' if len(runs) > 1 else ''}{len(run.metrics[stage])} step(s), "
                 f"{'' if (run.folder / stage / 'adapter.safetensors').exists() else 'not '}finished" for run in begun]
        parts.append(f'<h3>{shown(stage)}</h3><p class="soft">{shown("; ".join(state))}</p>')
        group_of = {key: next(number for number, group in enumerate(GROUPS) if key.startswith(group[2])) for key in lines}
        for number, (heading, meaning, _) in enumerate(GROUPS):
            keys = [key for key in lines if group_of[key] == number]
            if keys:
                charts = "".join(chart(key, [(index, runs[index].name if len(runs) > 1 else "", points)
                                             for index, points in lines[key].items()]) for key in keys)
                parts.append(f'<details{"" if heading.startswith("Speed") else " open"}><summary>{heading}</summary>'
                             f'{meaning and f"<p>{meaning}</p>"}<div class="charts">{charts}</div></details>')
    return "".join(parts) if stages else "<p>No stage has logged a step yet.</p>"


# ---- held-out cases -----------------------------------------------------------------------------------------------------


def image_url(run, name):
    """An image as a data URL, drawn anew and at most IMAGE_SIDE wide or high; None where it cannot be read."""
    inside = run.settings.get("out", "") + "/"
    # The run's own folder first: it may have been moved, and another run may lie where it was.
    paths = [run.folder / name.removeprefix(inside)] * name.startswith(inside) + [Path(name)]
    try:
        with PIL.Image.open(next((path for path in paths if path.exists()), paths[0])) as file:
            picture = file.convert("RGB")
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError):
        return None
    small, buffer = max(picture.size) <= IMAGE_SIDE // 2, io.BytesIO()
    picture.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    picture.save(buffer, "PNG" if small else "JPEG", quality=75)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def cut(text, limit):
    return text if len(text) <= limit else f"{text[:limit]}\n(here the page stops: {limit:,} of {len(text):,} characters)"


def answer_of(row, plan):
    """One stage's answer for the page: steps as [tool, line, sentences], what the checker says of no step, answer, scores."""
    check = protocol.check(row["response"], plan)
    faults = {}
    for violation in check.violations:   # a missing tier is no fault of the last call, where the checker reports it
        line = None if violation.kind == "missing-tier" else violation.line
        faults.setdefault(line, []).append(f"{violation.kind}: {violation.message}")
    calls = check.calls[:MAX_STEPS]
    steps = [[call.tool[:80], cut(call.text, 400), faults.pop(call.line, [])[:MAX_FAULTS]] for call in calls]
    rest = [text if line is None else f"line {line}, {text}" for line, texts in faults.items() for text in texts]
    return {"steps": steps, "calls": len(check.calls), "rest": rest[:MAX_FAULTS], "violations": len(check.violations),
            "answer": None if check.answer is None else cut(check.answer.strip(), MAX_TEXT), "text": cut(row["response"], MAX_TEXT),
            "scores": [row.get(name) for name in SCORES], "form": row.get("form"), "finished": row.get("finished")}


def case_of(run, case_id, odd):
    """One held-out case with the answers of every stage under every prompt; what is odd about it is counted in the Counter `odd`."""
    rows = {key: rows[case_id] for key, rows in run.answers.items() if case_id in rows}
    first = next(iter(rows.values()))
    try:
        plan = protocol.plan_from_dict(first.get("plan"))
        graph = protocol.plan_graph(plan)
        edges = [[a, b] for a in plan.tools for b in plan.tools if b in graph.edges[a]]
        drawn = {"persona": plan.persona, "tools": plan.tools, "text": protocol.draw_plan(plan), "edges": edges,
                 "start": sorted(graph.start), "end": sorted(graph.end)}
    except protocol.PlanError:
        plan = drawn = None
        odd["without a plan that can be drawn"] += 1
    images, answers = [image_url(run, str(name)) for name in first.get("images", [])], {}
    if None in images:
        odd["with an image that cannot be read"] += 1
    for (stage, mode), row in rows.items():
        # A trace is held to the plan only where the prompt showed it.
        answers.setdefault(mode, {})[stage] = answer_of(row, plan if mode == "planned" else None)
        legal = not answers[mode][stage]["violations"]
        if row.get("legal", legal) != legal:
            odd[f"where today's checker judges the trace of {stage} ({mode}) otherwise than the run's did"] += 1
    return {"run": run.name, "id": case_id, "kind": first.get("kind") or first.get("benchmark") or "case",
            "expected": first.get("expected"), "question": cut(first.get("question", ""), MAX_TEXT), "images": images, "plan": drawn,
            "answers": answers}


def case_order(run):
    """Case ids, the kinds taking turns; within a kind those first that the last stage gets wrong."""
    last = {}
    for rows in run.answers.values():
        last |= rows
    kinds = {}
    for case_id, row in sorted(last.items(), key=lambda item: item[1].get("safety") in (3, None)):
        kinds.setdefault(row.get("kind"), []).append(case_id)
    return [ids[turn] for turn in range(max(map(len, kinds.values()), default=0)) for ids in kinds.values() if turn < len(ids)]


def visible_all(value):
    """`visible` on every string of nested lists and dicts."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, dict):
        return {visible(key): visible_all(item) for key, item in value.items()}
    return [visible_all(item) for item in value] if isinstance(value, (list, tuple)) else value


def embedded(value):
    """JSON for a script element: "<" never stands in it, so no text of a model can close the element or open another."""
    return json.dumps(visible_all(value)).replace("<", "\\u003c")


def collect_cases(runs):
    """(data for the browser, how many cases there are with those for which the page has no room)."""
    cases, size, total = [], 0, 0
    for run in runs:
        order, odd = case_order(run), Counter()
        total += len(order)
        for case_id in order[:MAX_CASES // len(runs)]:
            case = case_of(run, case_id, odd)
            size += len(embedded(case))
            if size > CASE_BYTES:
                break
            cases.append(case)
        run.notes += [f"{run.folder}: {count} of the cases shown here {what}." for what, count in odd.items()]
    stages = sorted({stage for run in runs for stage, _ in run.answers}, key=stage_order)
    tiers = {name: protocol.TIERS.index(tool.tier) for name, tool in protocol.TOOLS.items()}
    return {"cases": cases, "stages": stages, "tiers": tiers, "tierNames": protocol.TIERS}, total


def chooser(name, label, empty, options):
    """A labelled select; options = {value: text}, and where `empty` is a text, that one for all."""
    options = options if empty is None else {"": empty} | options
    choices = "".join(f'<option value="{shown(value)}">{shown(text)}</option>' for value, text in options.items())
    return f'<label>{label} <select id="{name}">{choices}</select></label>'


def browser_html(runs, data, total):
    """The controls of the case browser; its script fills the rest."""
    cases = data["cases"]
    if not cases:
        return "<p>No answers to held-out cases yet: eval.py writes them to eval/.</p>"
    same = lambda words: {word: word for word in words}
    changes = {f"{stage}{sign}": f"becomes {word} at {stage}" for stage in data["stages"][1:]
               for sign, word in (("+", "right"), ("-", "wrong"))}
    controls = [chooser("mode", "Prompt", None, same(sorted({mode for case in cases for mode in case["answers"]}))),
                chooser("run", "Run", "all", same(run.name for run in runs)) if len(runs) > 1 else "",
                chooser("kind", "Kind", "all", same(case["kind"] for case in cases)),
                chooser("verdict", "At the last stage", "any", same(("wrong", "right", "not judged"))),
                chooser("change", "Change", "any", changes)]
    return (f"<p>{len(cases)} of {total} cases are on this page, the kinds taking turns, those first that the last stage gets wrong. "
            "Right means a Safety score of 3. The arrow keys go to the next and the previous case.</p>"
            "<noscript><p>The cases need JavaScript; the rest of the page does not.</p></noscript>"
            f'<div class="controls">{"".join(controls)}'
            '<span><button id="back" type="button">← Previous</button> <button id="next" type="button">Next →</button></span></div>'
            '<p id="status" role="status" aria-live="polite"></p><div id="case"></div>'
            '<p class="soft">Grey: transitions that the plan allows (▸ a trace may start here, ■ it may end here). Blue and numbered: '
            'the steps of the trace. Red, dashed and ✗: a step that the checker objects to. A dotted box is not in the plan.</p>')


def sample_html(section):
    """One sample of samples.txt with its reward parts as bars; None when the section has another form."""
    found = re.match(r"(step [^\n]*)\n(.*?)\n-- (?:reward (\S+) (\{[^\n}]*\}) ([^\n]*)|([^\n]*))\n(.*)", section, re.DOTALL)
    if not found:
        return None
    head, question, total, parts, reasons, failure, text = found.groups()
    numbers = {"reward": parsed(total), **(parsed(parts) or {})} if total else {}
    if not all(map(plain, numbers.values())):
        return None
    top = 10 if max(numbers.values(), default=0) > 1 else 1   # a part may be a mark from 1 to 10
    bars = "".join(f'<tr><th scope="row">{shown(name)}</th><td>{value:.3f}</td><td>{bar(0, 100 * min(max(value / top, 0), 1))}</td></tr>'
                   for name, value in numbers.items())
    bars = f'<table class="bars"><caption>Reward and its parts, 0 to {top}</caption><tbody>{bars}</tbody></table>' if bars else ""
    why = "".join(f"<li>{shown(reason)}</li>" for reason in (reasons or failure or "").split("; "))
    return (f'<article class="card"><h3>{shown(head)}</h3><p class="text">{shown(cut(question, MAX_TEXT))}</p>{bars}<details>'
            f'<summary>Reasons</summary><ul>{why}</ul></details><pre class="text">{shown(cut(text.strip(), MAX_TEXT))}</pre></article>')


def samples_html(runs):
    """The last samples of GRPO of every run."""
    parts = []
    for run in runs:
        made = [sample_html(section) for section in run.samples[-MAX_SAMPLES:]]
        if made:
            parts.append(f'<p class="soft">{shown(run.folder)}: the last {len(made)} of {len(run.samples)} samples in grpo/samples.txt, '
                         f'the best and the worst of a prompt side by side.</p><div class="cards">{"".join(filter(None, made))}</div>')
        if None in made:
            run.notes.append(f"{run.folder}/grpo/samples.txt: {made.count(None)} of the last samples could not be read.")
    return "".join(parts) or "<p>No samples yet: GRPO writes grpo/samples.txt.</p>"


# ---- the page -----------------------------------------------------------------------------------------------------------


def page(runs):
    """The whole page about some Runs, as text."""
    data, total = collect_cases(runs)
    sections = {"Results": results_html(runs), "Curves": curves_html(runs), "Held-out cases": browser_html(runs, data, total),
                "GRPO samples": samples_html(runs), "Settings": settings_html(runs)}
    # Last, since the sections above may have added notes.
    notes = "".join(f"<li>{shown(note)}</li>" for run in runs for note in run.notes)
    sections["What is missing"] = f"<ul>{notes}</ul>" if notes else "<p>Nothing was left out.</p>"
    anchors = {name: name.lower().replace(" ", "-") for name in sections}
    return PAGE.format(
        title=shown("SaFeR: " + ", ".join(str(run.folder) for run in runs)), css=CSS, js=JS, data=embedded(data),
        digest=base64.b64encode(hashlib.sha256(JS.encode()).digest()).decode(),
        links="".join(f'<a href="#{anchor}">{name}</a>' for name, anchor in anchors.items()),
        sections="".join(f'<section aria-labelledby="{anchors[name]}"><h2 id="{anchors[name]}">{name}</h2>{part}</section>'
                         for name, part in sections.items()))


def write_report(folders, to=None):
    """Write the page about one or several run folders to `to` (default: report.html in the first). Returns its Path.

    Raises ReportError when a folder is missing or holds nothing of a run."""
    text = page([read_run(folder, chr(ord("A") + index)) for index, folder in enumerate(folders)])
    path = Path(to or Path(folders[0]) / "report.html")
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
    return path


def main(argv):
    parser = argparse.ArgumentParser(prog="report.py", description="One self-contained HTML page about one or several runs.")
    parser.add_argument("folders", nargs="+", metavar="folder", help="run folders, such as out/tiny; several are drawn over each other")
    parser.add_argument("--to", metavar="file", help="where the page goes (default: report.html in the first folder)")
    args = parser.parse_args(argv)
    path = write_report(args.folders, args.to)
    print(f"report: {path} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, ReportError) as problem:
        sys.exit(str(problem))

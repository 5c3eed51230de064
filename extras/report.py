"""One self-contained HTML page about a run: a summary, the tables, curves, held-out cases with
their traces drawn on the plan's graph, the last samples of GRPO, and the settings.

    python -m extras.report out/tiny        writes out/tiny/report.html, at any time

The page needs no network. What is not there yet has a sentence in its place. Model text is hostile
input: it enters static HTML escaped, and the case browser as JSON that the page's one script
inserts as text only; a Content-Security-Policy forbids every other script and any request. Signs
that reorder or hide text are written out, like ⟨U+202E⟩. Layout, look and script are in
report.html; ours.
"""

import base64
import hashlib
import html
import io
import json
import math
import random
import re
from itertools import product
from pathlib import Path
from string import Template

import protocol
from config import PROMPT_MODES, STAGES, open_image, run_command, write_text
from data import DataError, draw_plan, read_jsonl
from eval import SHOWN, VERDICTS, percent, shown_heads
from trainer import SHOWN as IMPORTANT

CASE_BYTES = 3_500_000  # of the cases, so that a page stays below 5 MB
SAMPLES = 8  # the last ones
IMAGE_SIDE = 256  # pixels; larger images are shrunk
POINTS = 100  # of a curve; a longer one is averaged in blocks
# Controls, marks that reorder or hide text, line separators, halves of characters.
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def visible(text):
    """Text in which signs that reorder, hide or break it are written out by number."""
    return UNSEEN.sub(lambda sign: f"⟨U+{ord(sign[0]):04X}⟩", text)


def table(caption, head, rows):
    """An HTML table that scrolls inside itself; all cells are text."""
    lines = ["".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in head)]
    for first, *rest in rows:
        cells = "".join(f"<td>{html.escape(str(cell))}</td>" for cell in rest)
        lines.append(f'<th scope="row">{html.escape(first)}</th>{cells}')
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{caption}">'
        f"<table><caption>{caption}</caption>{body}</table></div>"
    )


# ---- summary and results -------------------------------------------------------------------------


def score_picture(name, metric, rows):
    """SVG: one score of each stage's row of results.json, with its interval."""
    parts = [f'<text class="name" x="30" y="14">{name}, %</text>']
    for tick in (0, 50, 100):
        y = 190 - 1.6 * tick
        parts.append(f'<path class="grid" d="M30 {y}h260"/>')
        parts.append(f'<text x="24" y="{y + 4}" text-anchor="end">{tick}</text>')
    for number, row in enumerate(rows):
        x = round(30 + 260 * (number + 0.5) / len(rows))
        parts.append(f'<text x="{x}" y="210" text-anchor="middle">{row["stage"]}</text>')
        cell = row[metric]
        if cell["value"] is None:
            continue
        value, low, high = (190 - 160 * cell[key] for key in ("value", "low", "high"))
        label = f"{100 * cell['value']:.0f}"
        parts.append(f'<path class="interval" d="M{x} {low:.1f}V{high:.1f}"/>')
        parts.append(f'<circle class="dot" cx="{x}" cy="{value:.1f}" r="3"/>')
        parts.append(f'<text class="name" x="{x + 9}" y="{value + 4:.1f}">{label}</text>')
    title = f"<title>{name} after each stage</title>"
    return f'<svg viewBox="0 0 295 220" role="img">{title}{"".join(parts)}</svg>'


def summary_html(found, results):
    """The run (its config.json) in a sentence, and the scores of each stage in three pictures."""
    settings = found["settings"]
    sentence = (
        f"Recipe {settings['recipe']}, base {settings['model'] or 'of the miniature world'}, seed "
        f"{settings['seed']}, stages {settings['stages']}; commit {found['commit'][:12]}."
    )
    whole = []
    for row in results:
        if row["prompt"] == results[0]["prompt"] and row["benchmark"] == row["kind"] == "all":
            whole.append(row)
    if not whole:
        return f"<p>{html.escape(sentence)} No results yet: eval.py writes them at its end.</p>"
    pictures = [score_picture(SHOWN[metric], metric, whole) for metric in VERDICTS]
    return (
        f"<p>{html.escape(sentence)}</p><p class='soft'>Share of {whole[0]['n']} held-out cases "
        f"with the highest verdict, under the {whole[0]['prompt']} prompt; bars are 95% intervals."
        f'</p><div class="summary">{"".join(pictures)}</div>'
    )


def results_html(results):
    """The tables of eval.py for each prompt: all cases, each kind and benchmark; their own."""
    parts = []
    for mode in dict.fromkeys(row["prompt"] for row in results):
        lines = []
        own = []
        for row in results:
            if row["prompt"] == mode:
                name = row["kind"] if row["benchmark"] == "all" else row["benchmark"]
                shares = [percent(row[metric]) for metric in (*SHOWN, "unjudged")]
                lines.append([name, row["stage"], row["n"], *shares])
                for metric, cell in row["own"].items():
                    own.append([name, row["stage"], metric, percent(cell)])
        names = list(dict.fromkeys(line[0] for line in lines))
        lines.sort(key=lambda line: names.index(line[0]))  # the stages beside each other
        title = f"under the {mode} prompt, percent [95% interval]"
        head = ["cases", "stage", "n", *shown_heads(results).values(), "unjudged"]
        parts.append(table(f"Held-out cases {title}", head, lines))
        if own:
            head = ["cases", "stage", "metric", "percent"]
            parts.append(table(f"The benchmarks' own metrics {title}", head, own))
    return "".join(parts) or "<p>No results yet.</p>"


# ---- curves --------------------------------------------------------------------------------------


def curve(key, points):
    """One SVG chart of points (step, value), in at most POINTS blocks, each drawn at its mean."""
    size = math.ceil(len(points) / POINTS)
    values = []
    for start in range(0, len(points), size):
        block = [value for _, value in points[start : start + size]]
        values.append(sum(block) / len(block))
    low, high = min(values), max(values)
    dots = []
    for i, value in enumerate(values):
        x = 10 + 230 * i / max(1, len(values) - 1)
        y = 120 - 85 * (value - low) / ((high - low) or 1)
        dots.append(f"{x:.1f} {y:.1f}")
    return (
        f'<svg class="chart" viewBox="0 0 250 142" role="img"><title>{key}</title>'
        f'<path class="line" d="M{"L".join(dots)}"/>'
        f'<text class="name" x="10" y="16">{key}</text>'
        f'<text x="240" y="16" text-anchor="end">ends at {values[-1]:.3g}</text>'
        f'<text x="10" y="32">{high:.3g}</text><text x="10" y="136">{low:.3g}</text>'
        f'<text x="240" y="136" text-anchor="end">step {points[-1][0]}</text></svg>'
    )


def curves_html(folder):
    """A chart for every number that a stage logs; those beside its progress bar come first."""
    parts = []
    for stage in STAGES:
        path = folder / stage / "metrics.jsonl"
        points = {}  # key -> [(step, value)]
        for row in read_jsonl(path, growing=True) if path.exists() else []:
            for key, value in row.items():
                if key != "step" and isinstance(value, (int, float)):
                    points.setdefault(key, []).append((row["step"], value))
        if not points:
            continue
        first = "".join(curve(key, points.pop(key)) for key in IMPORTANT if key in points)
        rest = "".join(curve(key, points[key]) for key in sorted(points))
        parts.append(
            f'<h3>{stage}</h3><div class="charts">{first}</div><details><summary>More</summary>'
            f'<div class="charts">{rest}</div></details>'
        )
    return "".join(parts) or "<p>No stage has logged a step yet.</p>"


# ---- held-out cases ------------------------------------------------------------------------------


def image_url(path):
    """An image as a data URL, at most IMAGE_SIDE wide or high; none where it cannot be read."""
    try:
        picture = open_image(path)
    except ValueError:
        return "data:,"
    picture.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "jpeg", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def read_answers(folder):
    """{case id: {prompt mode: {stage: row of eval/<stage>-<mode>.jsonl}}}."""
    cases = {}
    for mode, stage in product(reversed(PROMPT_MODES), ("base", *STAGES)):
        path = folder / "eval" / f"{stage}-{mode}.jsonl"
        for row in read_jsonl(path, growing=True) if path.exists() else []:
            cases.setdefault(row["id"], {}).setdefault(mode, {})[stage] = row
    return cases


def answer_of(row, plan):
    """One stage's answer for the page; steps are [tool, line, [sentences of the checker]]."""
    check = protocol.check(row["response"], plan)
    faults = {}
    for violation in check.violations:  # a missing tier is no fault of the last call
        line = None if violation.kind == "missing-tier" else violation.line
        faults.setdefault(line, []).append(f"{violation.kind}: {violation.message}")
    steps = [[call.tool, call.text, faults.pop(call.line, [])] for call in check.calls]
    return {
        "steps": steps,
        "rest": sum(faults.values(), []),
        "answer": check.answer,
        "text": row["response"],
        "scores": [row[name] for name in VERDICTS],
        "form": row["form"],
        "finished": row["finished"],
    }


def plan_of(plan):
    """A Plan for the page: its words and its graph."""
    graph = protocol.plan_graph(plan)
    return {
        "text": f"Persona {plan.persona}; {draw_plan(plan)}",
        "tools": plan.tools,
        "edges": [(a, b) for a in plan.tools for b in sorted(graph.edges[a])],
        "start": sorted(graph.start),
        "end": sorted(graph.end),
    }


def case_of(rows):
    """One held-out case for the page; rows: {prompt mode: {stage: row}}."""
    row = last_row(rows)
    plan = protocol.plan_from_dict(row["plan"]) if row["plan"] else None
    answers = {}
    for mode, stages in rows.items():
        shown = plan if mode == "planned" else None  # a trace is held to what was shown
        answers[mode] = {stage: answer_of(each, shown) for stage, each in stages.items()}
    return {
        "id": row["id"],
        "kind": row["kind"] or row["benchmark"],
        "expected": row["expected"],
        "question": row["question"],
        "images": [image_url(path) for path in row["images"]],
        "plan": plan and plan_of(plan),
        "answers": answers,
    }


def last_row(rows):
    """Of the last stage, under the first prompt mode."""
    stages = next(iter(rows.values()))
    return list(stages.values())[-1]


def collect_cases(folder):
    """The data of the page's script: cases in random order, first those that the last stage gets
    wrong, as many as CASE_BYTES allow."""
    found = read_answers(folder)
    names = random.Random(0).sample(sorted(found), len(found))
    names.sort(key=lambda name: last_row(found[name])["safety"] in (3, None))
    cases = []
    size = 0
    for name in names:
        case = case_of(found[name])
        size += len(json.dumps(case))
        if size > CASE_BYTES:
            break
        cases.append(case)
    tiers = {name: protocol.TIERS.index(tool.tier) for name, tool in protocol.TOOLS.items()}
    return {"cases": cases, "total": len(found), "tiers": tiers, "tierNames": protocol.TIERS}


# ---- the page ------------------------------------------------------------------------------------


def samples_html(folder):
    """The last samples of GRPO, as the log has them."""
    path = folder / "grpo" / "samples.txt"
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    cards = ""
    for sample in re.split(r"^== (?=step \d+, )", text, flags=re.MULTILINE)[1:][-SAMPLES:]:
        cards += f'<article class="card"><pre class="text">{html.escape(sample)}</pre></article>'
    return cards or "<p>No samples yet: GRPO writes grpo/samples.txt.</p>"


def page(folder):
    """The whole page about a run folder, as text. Raises DataError when nothing is there."""
    folder = Path(folder)
    paths = [folder / stage / "config.json" for stage in ("eval", *reversed(STAGES))]
    path = next(filter(Path.exists, paths), None)
    if path is None:
        raise DataError(f"{folder}: nothing of a run is in it; expected a folder like out/tiny")
    found = json.loads(path.read_text(encoding="utf-8"))
    path = folder / "results.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    settings = [[name, json.dumps(value)] for name, value in sorted(found["settings"].items())]
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    script = template.rpartition("<script>")[2].partition("</script>")[0]
    data = json.dumps(collect_cases(folder), ensure_ascii=False)
    values = {
        "title": html.escape(f"SaFeR: {folder}"),
        "summary": summary_html(found, results),
        "results": results_html(results),
        "curves": curves_html(folder),
        "samples": samples_html(folder),
        "settings": table("All settings", ["setting", "value"], settings),
        "data": data.replace("<", "\\u003c"),  # so no text can close the element
        "digest": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    return visible(Template(template).safe_substitute(values))  # "$" elsewhere is the script's own


def main(argv):
    """Write the page into a run folder."""
    if len(argv) != 1 or argv[0].startswith("-"):
        raise DataError("usage: python -m extras.report RUN, a run folder like out/tiny")
    path = Path(argv[0]) / "report.html"
    try:
        write_text(path, page(argv[0]))
    except (LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{argv[0]}: {error!r}; was the run written by this version?") from error
    print(f"report: {path} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    run_command(main, ValueError)

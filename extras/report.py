"""One self-contained HTML page about a run: a summary, the tables, curves, held-out cases with
their traces drawn on the plan's graph, the last samples of GRPO, and the settings.

    python -m extras.report out/tiny        writes out/tiny/report.html, at any time

The page needs no network. What is not there yet has a sentence in its place. Model text is hostile
input: it enters static HTML escaped, and the case browser as JSON that the page's one script
inserts as text only; a Content-Security-Policy forbids every other script and any request. Signs
that reorder or hide text are written out, like ⟨U+202E⟩. The look and the script are in
report.html; ours.
"""

import base64
import hashlib
import html
import io
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from string import Template

import PIL.Image

import protocol
from config import run_command, write_text
from data import DataError, draw_plan, read_jsonl
from eval import percent

ORDER = ("base", "sft", "dpo", "grpo")
SCORES = {"safety": "Safety", "helpfulness": "Helpfulness", "rigor": "Rigor"}
RATES = ("over_refusal", "legal", "finished", "unjudged")
MAX_CASES, CASE_BYTES = 120, 3_500_000  # so that a page stays below 5 MB
MAX_TEXT = 6_000  # characters of one response
MAX_SAMPLES = 8  # the last ones
IMAGE_SIDE = 256  # pixels; larger images are shrunk
MAX_POINTS = 300  # of a curve; a longer one is averaged in blocks
GROUPS = {  # heading of curves -> how the keys of metrics.jsonl begin; the first that fits
    "Loss": ("loss", "grad_norm", "lr"),
    "Preference": ("accuracy", "margin", "chosen", "rejected"),
    "Reward": ("reward", "zero_spread", "unscored", "distinct"),
    "Responses": ("legal", "calls", "length", "truncated"),
    "Reflection and correction": ("unsafe", "corrected", "reflect"),
    "Distance from the reference": ("kl", "entropy", "clip", "dual_clip", "clamped", "sampler"),
    "Speed and counts": ("",),
}
# Controls, marks that reorder or hide text, line separators, halves of characters.
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


@dataclass
class Run:
    """What is in a run folder."""

    folder: Path
    settings: dict  # name -> value, of the latest stage
    commit: str
    results: list  # rows of results.json
    metrics: dict  # stage -> rows of metrics.jsonl
    answers: dict  # (stage, prompt mode) -> {case id: row}
    samples: str  # grpo/samples.txt


def read_run(folder):
    """A Run, with whatever is there. Raises DataError when nothing is, or a file is damaged."""
    folder = Path(folder)
    run = Run(folder, {}, "unknown", [], {}, {}, "")
    for stage in (*ORDER, "eval"):
        path = folder / stage / "config.json"
        if path.exists() and stage != "base":  # base/config.json is the model's own
            found = json.loads(path.read_text(encoding="utf-8"))
            run.settings |= found["settings"]
            run.commit = found["commit"]
        path = folder / stage / "metrics.jsonl"
        if path.exists():
            run.metrics[stage] = read_jsonl(path, growing=True)
        for path in sorted(folder.glob(f"eval/{stage}-*.jsonl")):
            mode = path.name.removeprefix(f"{stage}-").split(".")[0]
            rows = run.answers.setdefault((stage, mode), {})
            rows.update((row["id"], row) for row in read_jsonl(path, growing=True))
    if (folder / "results.json").exists():
        run.results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    path = folder / "grpo" / "samples.txt"
    if path.exists():
        run.samples = path.read_text(encoding="utf-8", errors="replace")
    if not (run.settings or run.results or run.answers):
        raise DataError(f"{folder}: nothing of a run is in it; expected a folder like out/tiny")
    return run


# ---- text into HTML ------------------------------------------------------------------------------


def visible(text):
    """Text in which signs that reorder, hide or break it are written out by number."""
    return UNSEEN.sub(lambda sign: f"⟨U+{ord(sign[0]):04X}⟩", str(text))


def shown(text):
    """Anything as text inside HTML, also inside a quoted attribute."""
    return html.escape(visible(text))


def table(caption, head, rows, kind=""):
    """An HTML table that scrolls inside itself; all cells are text."""
    lines = ["".join(f'<th scope="col">{shown(cell)}</th>' for cell in head)]
    for first, *rest in rows:
        cells = "".join(f"<td>{shown(cell)}</td>" for cell in rest)
        lines.append(f'<th scope="row">{shown(first)}</th>{cells}')
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    title = shown(caption)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{title}">'
        f'<table class="{kind}"><caption>{title}</caption>{body}</table></div>'
    )


# ---- summary and results -------------------------------------------------------------------------


def summary_html(run):
    """The run in a sentence, and each stage's three scores with their intervals in one picture."""
    facts = {name: run.settings.get(name, "?") for name in ("recipe", "seed", "judge")}
    model = run.settings.get("model") or "the miniature world's base"
    sentence = (
        f"Recipe {facts['recipe']}, {model}, seed {facts['seed']}, judge {facts['judge']}; "
        f"stages {run.settings.get('stages', '?')}; commit {run.commit[:12]}."
    )
    mode = run.results[0]["prompt"] if run.results else ""
    whole = []
    for row in run.results:
        if row["prompt"] == mode and row["benchmark"] == row["kind"] == "all":
            whole.append(row)
    if not whole:
        return f"<p>{shown(sentence)} No results yet: eval.py writes results.json at its end.</p>"
    pictures = ""
    for metric, name in SCORES.items():
        parts = [f'<text class="name" x="30" y="14">{name}, %</text>']
        for tick in (0, 50, 100):
            y = 190 - 1.6 * tick
            parts.append(f'<path class="grid" d="M30 {y}h260"/>')
            parts.append(f'<text x="24" y="{y + 4}" text-anchor="end">{tick}</text>')
        for number, row in enumerate(whole):
            cell = row[metric]
            x = 30 + 260 * (number + 0.5) / len(whole)
            stage = shown(row["stage"])
            parts.append(f'<text x="{x:.0f}" y="210" text-anchor="middle">{stage}</text>')
            if cell["value"] is None:
                continue
            value, low, high = (190 - 160 * (cell[key] or 0) for key in ("value", "low", "high"))
            parts.append(f'<path class="interval" d="M{x:.0f} {low:.1f}V{high:.1f}"/>')
            parts.append(f'<circle class="dot" cx="{x:.0f}" cy="{value:.1f}" r="3"/>')
            label = f"{100 * cell['value']:.0f}"
            parts.append(f'<text class="name" x="{x + 9:.0f}" y="{value + 4:.1f}">{label}</text>')
        title = f"<title>{name} after each stage</title>"
        pictures += f'<svg viewBox="0 0 295 220" role="img">{title}{"".join(parts)}</svg>'
    return (
        f"<p>{shown(sentence)}</p><p class='soft'>Share of {whole[0]['n']} held-out cases with the "
        f"highest verdict, under the {shown(mode)} prompt; bars are 95% intervals.</p>"
        f'<div class="summary">{pictures}</div>'
    )


def results_html(run):
    """The tables of eval.py: all metrics, then Safety by kind of case, for each prompt."""
    parts = []
    for mode in dict.fromkeys(row["prompt"] for row in run.results):
        rows = [row for row in run.results if row["prompt"] == mode]
        lines = []
        kinds = {}  # stage -> {kind: Safety}
        own = []
        for row in rows:
            if row["kind"] != "all":
                kinds.setdefault(row["stage"], {})[row["kind"]] = percent(row["safety"])
                continue
            shares = [percent(row[name]) for name in (*SCORES, *RATES)]
            lines.append([row["stage"], row["benchmark"], row["n"], *shares])
            for name, cell in row["own"].items():
                own.append([row["stage"], row["benchmark"], name, percent(cell)])
        rates = [name.replace("_", "-") for name in RATES]
        head = ["stage", "cases", "n", *SCORES.values(), *rates]
        parts.append(table(f"Held-out cases under the {mode} prompt, percent", head, lines))
        if kinds:
            names = list(next(iter(kinds.values())))
            by_kind = []
            for stage, cells in kinds.items():
                by_kind.append([stage, *(cells.get(name, "-") for name in names)])
            parts.append(table(f"Safety by kind, {mode} prompt", ["stage", *names], by_kind))
        if own:
            head = ["stage", "benchmark", "metric", "percent"]
            parts.append(table(f"The benchmarks' own metrics, {mode} prompt", head, own))
    return "".join(parts) or "<p>No results yet.</p>"


# ---- curves --------------------------------------------------------------------------------------


def curve(key, points):
    """One SVG chart of points (step, value): thin as logged, thick a mean over a twentieth."""
    size = math.ceil(len(points) / MAX_POINTS)
    values = []
    for start in range(0, len(points), size):
        block = [value for _, value in points[start : start + size]]
        values.append(sum(block) / len(block))
    half = len(values) // 40
    smooth = []
    for i in range(len(values)):
        window = values[max(0, i - half) : i + half + 1]
        smooth.append(sum(window) / len(window))
    low, high = min(values), max(values)
    span = (high - low) or 1.0

    def path(line):
        dots = []
        for i, value in enumerate(line):
            x = 10 + 230 * i / max(1, len(line) - 1)
            dots.append(f"{x:.1f} {120 - 85 * (value - low) / span:.1f}")
        return "M" + "L".join(dots)

    labels = (
        f'<text class="name" x="10" y="16">{shown(key)}</text>'
        f'<text x="240" y="16" text-anchor="end">ends at {smooth[-1]:.3g}</text>'
        f'<text x="10" y="32">{high:.3g}</text><text x="10" y="136">{low:.3g}</text>'
        f'<text x="240" y="136" text-anchor="end">step {points[-1][0]}</text>'
    )
    return (
        f'<svg class="chart" viewBox="0 0 250 142" role="img"><title>{shown(key)}</title>'
        f'<path class="raw" d="{path(values)}"/><path class="line" d="{path(smooth)}"/>'
        f"{labels}</svg>"
    )


def curves_html(run):
    """A chart for every number that a stage logs."""
    parts = []
    for stage, rows in run.metrics.items():
        points = {}  # key -> [(step, value)]
        for row in rows:
            for key, value in row.items():
                if type(value) in (int, float) and key != "step" and math.isfinite(value):
                    points.setdefault(key, []).append((row["step"], value))
        parts.append(f"<h3>{shown(stage)}</h3>")
        left = dict(points)
        for heading, starts in GROUPS.items():
            keys = [key for key in left if key.startswith(starts)]
            charts = "".join(curve(key, left.pop(key)) for key in keys)
            if charts:
                opened = "" if heading.startswith("Speed") else " open"
                parts.append(
                    f"<details{opened}><summary>{heading}</summary>"
                    f'<div class="charts">{charts}</div></details>'
                )
    return "".join(parts) or "<p>No stage has logged a step yet.</p>"


# ---- held-out cases ------------------------------------------------------------------------------


def image_url(path):
    """An image as a data URL, at most IMAGE_SIDE wide or high; none where it cannot be read."""
    try:
        with PIL.Image.open(path) as file:
            picture = file.convert("RGB")
    except (OSError, ValueError):
        return "data:,"
    picture.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    buffer = io.BytesIO()
    kind = "png" if max(picture.size) < IMAGE_SIDE else "jpeg"
    picture.save(buffer, kind)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def answer_of(row, plan):
    """One stage's answer for the page; steps are [tool, line, [sentences of the checker]]."""
    check = protocol.check(row["response"], plan)
    faults = {}
    for violation in check.violations:  # a missing tier is no fault of the last call
        line = None if violation.kind == "missing-tier" else violation.line
        faults.setdefault(line, []).append(f"{violation.kind}: {violation.message}")
    steps = []
    for call in check.calls:
        steps.append([call.tool, call.text[:MAX_TEXT], faults.pop(call.line, [])])
    return {
        "steps": steps,
        "rest": sum(faults.values(), []),
        "violations": len(check.violations),
        "answer": None if check.answer is None else check.answer.strip()[:MAX_TEXT],
        "text": row["response"][:MAX_TEXT],
        "scores": [row[name] for name in SCORES],
        "form": row["form"],
        "finished": row["finished"],
    }


def case_of(run, name):
    """One held-out case with the answers of every stage under every prompt."""
    answers = {}
    first = None
    for (stage, mode), rows in run.answers.items():
        if name not in rows:
            continue
        first = first or rows[name]
        plan = protocol.plan_from_dict(first["plan"]) if first["plan"] else None
        shown_plan = plan if mode == "planned" else None  # a trace is held to what was shown
        answers.setdefault(mode, {})[stage] = answer_of(rows[name], shown_plan)
    drawn = None
    if plan:
        graph = protocol.plan_graph(plan)
        drawn = {
            "persona": plan.persona,
            "tools": plan.tools,
            "text": draw_plan(plan),
            "edges": [(a, b) for a in plan.tools for b in sorted(graph.edges[a])],
            "start": sorted(graph.start),
            "end": sorted(graph.end),
        }
    return {
        "id": name,
        "kind": first["kind"] or first["benchmark"],
        "expected": first["expected"],
        "question": first["question"][:MAX_TEXT],
        "images": [image_url(path) for path in first["images"]],
        "plan": drawn,
        "answers": answers,
    }


def collect_cases(run):
    """(data for the page's script, number of all cases): the kinds take turns, and within a kind
    those come first that the last stage gets wrong."""
    last = {}
    for rows in run.answers.values():
        last |= rows
    kinds = {}
    for name, row in sorted(last.items(), key=lambda item: item[1]["safety"] in (3, None)):
        kinds.setdefault(row["kind"], []).append(name)
    turns = []
    for names in kinds.values():
        turns += enumerate(names)
    cases = []
    size = 0
    for _, name in sorted(turns, key=lambda turn: turn[0])[:MAX_CASES]:
        case = case_of(run, name)
        size += len(json.dumps(case))
        if size > CASE_BYTES:
            break
        cases.append(case)
    stages = [stage for stage in ORDER if any(stage == key for key, _ in run.answers)]
    tiers = {name: protocol.TIERS.index(tool.tier) for name, tool in protocol.TOOLS.items()}
    found = {"cases": cases, "stages": stages, "tiers": tiers, "tierNames": protocol.TIERS}
    return found, len(last)


def embedded(value):
    """JSON for a script element: "<" is never in it, so no text can close the element."""
    text = json.dumps(value, ensure_ascii=False)
    return json.dumps(json.loads(visible(text))).replace("<", "\\u003c")


def browser_html(page_data, total):
    """The controls of the case browser; the page's script fills the rest."""
    cases = page_data["cases"]
    if not cases:
        return "<p>No answers to held-out cases yet: eval.py writes them to eval/.</p>"
    changes = {"": "any"}
    for stage in page_data["stages"][1:]:
        changes[f"{stage}+"] = f"becomes right at {stage}"
        changes[f"{stage}-"] = f"becomes wrong at {stage}"
    modes = {mode: mode for case in cases for mode in case["answers"]}
    kinds = {"": "all"} | {case["kind"]: case["kind"] for case in cases}
    verdicts = {"": "any", "wrong": "wrong", "right": "right", "not judged": "not judged"}
    controls = ""
    for name, label, options in (
        ("mode", "Prompt", modes),
        ("kind", "Kind", kinds),
        ("verdict", "At the last stage", verdicts),
        ("change", "Change", changes),
    ):
        choices = ""
        for value, text in options.items():
            choices += f'<option value="{shown(value)}">{shown(text)}</option>'
        controls += f'<label>{label} <select id="{name}">{choices}</select></label>'
    return (
        f"<p>{len(cases)} of {total} cases are on this page, the kinds taking turns, those first "
        "that the last stage gets wrong. Right means a Safety verdict of 3. The arrow keys go on and "
        f'back.</p><div class="controls">{controls}<span><button id="back">← Previous</button> '
        '<button id="next">Next →</button></span></div><p id="status" role="status"></p>'
        '<div id="case"></div><p class="soft">Grey: transitions that the plan allows (▸ may start, '
        "■ may end). Blue and numbered: the steps of the trace. Red, dashed and ✗: a step that the "
        "checker objects to. A dotted box is not in the plan.</p>"
    )


# ---- the page ------------------------------------------------------------------------------------


def samples_html(run):
    """The last samples of GRPO, as the log has them."""
    found = re.split(r"^== (?=step \d+, )", run.samples, flags=re.MULTILINE)[1:]
    if not found:
        return "<p>No samples yet: GRPO writes grpo/samples.txt.</p>"
    cards = ""
    for text in found[-MAX_SAMPLES:]:
        cards += f'<article class="card"><pre class="text">{shown(text[:MAX_TEXT])}</pre></article>'
    return f'<div class="cards">{cards}</div>'


def page(run):
    """The whole page about a Run, as text."""
    page_data, total = collect_cases(run)
    settings = [[name, json.dumps(value)] for name, value in sorted(run.settings.items())]
    sections = {
        "Summary": summary_html(run),
        "Results": results_html(run),
        "Curves": curves_html(run),
        "Held-out cases": browser_html(page_data, total),
        "GRPO samples": samples_html(run),
        "Settings": table("All settings", ["setting", "value"], settings, "wrap"),
    }
    links = ""
    body = ""
    for name, part in sections.items():
        anchor = name.lower().replace(" ", "-")
        links += f'<a href="#{anchor}">{name}</a>'
        body += f'<section><h2 id="{anchor}">{name}</h2>{part}</section>'
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    head, script = template.rsplit("<script>", 1)
    code = script.partition("</script>")[0]
    values = {
        "title": shown(f"SaFeR: {run.folder}"),
        "links": links,
        "sections": body,
        "data": embedded(page_data),
        "digest": base64.b64encode(hashlib.sha256(code.encode()).digest()).decode(),
    }
    return Template(head).substitute(values) + "<script>" + script  # "$" is the script's own


def main(argv):
    """Write a page into each run folder that is named."""
    if not argv or argv[0].startswith("-"):
        raise DataError("usage: python -m extras.report RUN ..., a run folder like out/tiny")
    for folder in argv:
        path = Path(folder) / "report.html"
        try:
            write_text(path, page(read_run(folder)))
        except (LookupError, TypeError, AttributeError) as error:
            message = f"{folder}: {error!r}; was the run written by this version?"
            raise DataError(message) from error
        print(f"report: {path} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    run_command(main, ValueError)

"""How the report page looks: its tables and line charts, its frame, its style sheet, and the one script, which shows the held-out cases.

The script reads the cases as JSON from the page and inserts their text as text only. Ours throughout.
"""

import html
import math
import re

MAX_POINTS = 300          # of one line of a chart; a longer one is averaged in blocks
# Controls, marks that reorder or hide text, line separators that no editor shows, halves of characters.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff"
                     "\U000e0000-\U000e007f]")


def visible(text):
    """Text in which signs that reorder, hide or break it are written out by number."""
    return _UNSEEN.sub(lambda sign: f"⟨U+{ord(sign[0]):04X}⟩", str(text))


def shown(text):
    """Anything as text inside HTML, also inside a quoted attribute."""
    return html.escape(visible(text))


def table(caption, heads, rows):
    """An HTML table; heads are text, cells are HTML, and the first cell of a row is its header."""
    head = "".join(f'<th scope="col">{shown(name)}</th>' for name in heads)
    body = "".join(f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>\n' for first, *rest in rows)
    return (f'<div class="scroll" role="region" tabindex="0" aria-label="{shown(caption)}"><table><caption>{shown(caption)}</caption>'
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>")


def bar(low, high, dot=None):
    """A bar from low to high on a rail from 0 to 100, with a stroke across it at `dot`. For the eye alone: the numbers stand beside it."""
    stroke = "" if dot is None else f'<path class="dot" d="M{dot:.1f} 0V8"/>'
    return ('<svg class="interval" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true"><path class="rail" d="M0 4H100"/>'
            f'<path class="bar" d="M{low:.1f} 4H{high:.1f}"/>{stroke}</svg>')


def thinned(points):
    """At most MAX_POINTS points (step, value): means of equal blocks."""
    size = math.ceil(len(points) / MAX_POINTS)
    blocks = [points[start:start + size] for start in range(0, len(points), size)]
    return [tuple(sum(column) / len(block) for column in zip(*block)) for block in blocks]


def smoothed(points):
    """Centred moving mean over a twentieth of the line, shorter at its ends."""
    half = len(points) // 40
    windows = [points[max(0, i - half):i + half + 1] for i in range(len(points))]
    return [(step, sum(value for _, value in window) / len(window)) for (step, _), window in zip(points, windows)]


def ticks(low, high):
    """Two to six round numbers from low to high."""
    raw = (high - low) / 5
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw * 0.999)
    return [round(k * step, 12) for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def chart(key, lines):
    """One SVG line chart; lines = [(index of the run, its letter or "", [(step, value), ...])]. Thin: as logged; thick: smoothed."""
    lines = [(index, letter, thinned(points)) for index, letter, points in lines]
    steps, values = zip(*(point for _, _, points in lines for point in points))
    (left, right), (low, high) = (min(steps), max(steps)), (min(values), max(values))
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0   # a flat line stands in the middle
    low, high = low - margin, high + margin

    def at(step, value):
        return 52 + 208 * (step - left) / (right - left or 1), 146 - 122 * (value - low) / (high - low)

    def path(points):
        return "M" + "L".join("{:.1f} {:.1f}".format(*at(*point)) for point in points)
    parts, ends = [], []
    for tick in ticks(low, high):
        y = at(left, tick)[1]
        parts.append(f'<path class="grid" d="M52 {y:.1f}H260"/><text x="48" y="{y + 3.5:.1f}" text-anchor="end">{tick:.6g}</text>')
    for index, letter, points in lines:
        smooth = smoothed(points)
        parts.append(f'<path class="raw s{index % 6}" d="{path(points)}"/><path class="line s{index % 6}" d="{path(smooth)}"/>')
        ends.append([at(*smooth[-1])[1], index, f"{letter} {smooth[-1][1]:.3g}".strip()])
        if len(points) == 1:
            parts.append('<circle class="point s{}" cx="{:.1f}" cy="{:.1f}" r="3"/>'.format(index % 6, *at(*points[0])))
    ends.sort()
    for before, after in zip(ends, ends[1:]):   # labels of lines that end close together move apart
        after[0] = max(after[0], before[0] + 12)
    over = max(0.0, ends[-1][0] - 150)
    parts += [f'<text class="end s{index % 6}" x="264" y="{y - over + 4:.1f}">{shown(text)}</text>' for y, index, text in ends]
    ending = "; ".join(text for _, _, text in ends)
    return (f'<svg class="chart" viewBox="0 0 330 178" role="img"><title>{shown(key)}</title><desc>{shown(key)} from step {left:g} to '
            f'{right:g}, between {min(values):.4g} and {max(values):.4g}; at the end {shown(ending)}</desc>'
            f'<text class="name" x="4" y="14">{shown(key)}</text>{"".join(parts)}<text x="52" y="162">{left:g}</text>'
            f'<text x="260" y="162" text-anchor="end">{right:g}</text><text x="156" y="172" text-anchor="middle">step</text></svg>\n')


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; script-src 'sha256-{digest}'">\
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,"><title>{title}</title>
<style>{css}</style></head>
<body><header><h1>{title}</h1><nav aria-label="Sections">{links}</nav></header>
<main>{sections}</main>
<script type="application/json" id="data">{data}</script>
<script>{js}</script></body></html>
"""

CSS = """
:root { --page:#fbfbf8; --card:#fff; --ink:#1d2226; --soft:#5c656d; --line:#d9dcd8; --edge:#8d969c; --accent:#0b5cad; --bad:#b3261e;
  --good:#1a6e3c; --s0:#0b5cad; --s1:#c04a00; --s2:#00795a; --s3:#a3478a; --s4:#7a6200; --s5:#4b5560; color-scheme:light dark }
@media (prefers-color-scheme:dark) {
  :root { --page:#14171a; --card:#1c2024; --ink:#e7e9ea; --soft:#a3adb5; --line:#363d43; --edge:#6c767e; --accent:#73b5f5;
    --bad:#ff9389; --good:#74d49a; --s0:#73b5f5; --s1:#f5a55b; --s2:#4fcfa5; --s3:#e5a3d2; --s4:#e6cf5a; --s5:#c3cbd1 }
}
* { box-sizing:border-box }
html { scroll-behavior:smooth }
@media (prefers-reduced-motion:reduce) {
  html { scroll-behavior:auto }
}
body { margin:0 auto; padding:1.5rem 1.25rem 4rem; max-width:1160px; background:var(--page); color:var(--ink);
  font:16px/1.55 system-ui,sans-serif; overflow-wrap:break-word }
h1 { font-size:1.9rem; margin:.2rem 0 }
h2 { font-size:1.35rem; margin:3rem 0 .75rem; padding-top:.75rem; border-top:1px solid var(--line) }
h3 { margin:1.75rem 0 0 }
h4, .card h3 { margin:0 0 .4rem; font-size:1rem; overflow-wrap:anywhere }
h5 { margin:.9rem 0 .2rem; font-size:.85rem; color:var(--soft) }
p { margin:.4rem 0 .8rem }
nav { display:flex; flex-wrap:wrap; gap:.25rem 1.25rem }
a { color:var(--accent) }
.soft, caption, summary, details>p { color:var(--soft); font-size:.9rem }
summary { cursor:pointer }
section>details>summary { font-weight:600; color:var(--ink) }
:focus-visible { outline:3px solid var(--accent); outline-offset:2px }
code, pre { font:.82rem/1.5 ui-monospace,monospace }
.bad { color:var(--bad) }
.good { color:var(--good) }
.text, code, li, td, dd { overflow-wrap:anywhere; unicode-bidi:isolate }
.text { white-space:pre-wrap; margin:.2rem 0 }
.scroll { overflow-x:auto; margin:1rem 0 }
table { border-collapse:collapse; font-variant-numeric:tabular-nums; font-size:.9rem }
caption { text-align:left; padding:.2rem 0 }
.scroll td, .scroll tbody th { white-space:nowrap }
th, td { text-align:left; padding:.4rem .9rem .4rem 0; border-bottom:1px solid var(--line); vertical-align:top }
.interval { display:block; width:100%; height:8px }
.bars td:last-child { width:60% }
.bars { width:100% }
.bars .interval { margin-top:.45rem }
.rail, .grid { stroke:var(--line); fill:none }
.bar { stroke:var(--accent); stroke-width:4; opacity:.55 }
.interval .dot { stroke:var(--ink); stroke-width:1.5 }
.charts { display:grid; grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr)); gap:.75rem; margin-bottom:1rem }
.chart { width:100%; background:var(--card); border:1px solid var(--line); border-radius:8px }
svg text { font:11px system-ui,sans-serif; fill:var(--soft) }
svg .name { font-weight:600; fill:var(--ink); font-size:12px }
.line, .raw { fill:none; stroke-width:2; stroke-linejoin:round }
.raw { stroke-width:1; opacity:.3 }
.legend { list-style:none; padding:0 }
.legend svg { width:30px; height:8px; margin-right:.5rem }
.s0 { stroke:var(--s0) }
.s1 { stroke:var(--s1); stroke-dasharray:6 3 }
.s2 { stroke:var(--s2); stroke-dasharray:2 3 }
.s3 { stroke:var(--s3); stroke-dasharray:9 3 2 3 }
.s4 { stroke:var(--s4); stroke-dasharray:4 4 }
.s5 { stroke:var(--s5); stroke-dasharray:1 4 }
.raw, .end { stroke-dasharray:none }
svg .end { stroke:none; fill:var(--ink); font-weight:600 }
.controls { display:flex; flex-wrap:wrap; gap:.6rem 1rem; align-items:end }
label { font-size:.85rem; color:var(--soft) }
select, button { font:inherit; color:var(--ink); background:var(--card); border:1px solid var(--soft); border-radius:6px;
  padding:.4rem .6rem; min-height:2.6rem }
label select { display:block }
label, select { max-width:100% }
button { cursor:pointer }
#status { font-weight:600; margin:1rem 0 .5rem }
.asked { display:flex; gap:1.25rem; margin-bottom:1rem }
.asked>div { min-width:0 }
.asked h3 { margin:0 }
.asked img { width:168px; border-radius:8px; border:1px solid var(--line); image-rendering:pixelated }
.cards { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr)); gap:1rem }
.card { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:1rem; min-width:0 }
.card ol { padding-left:1.6rem; margin:.3rem 0 }
.card ul { padding-left:1.1rem; margin:.1rem 0 }
.walk { fill:none; stroke:var(--accent); stroke-width:2 }
.edge { fill:none; stroke:var(--edge) }
.walk.off { stroke:var(--bad); stroke-dasharray:5 3 }
.node { fill:var(--card); stroke:var(--edge) }
.node.on { stroke:var(--accent); stroke-width:2 }
.node.out { stroke-dasharray:2 3; stroke:var(--soft) }
.node.off { stroke:var(--bad); stroke-dasharray:5 3; stroke-width:2 }
svg .tool { fill:var(--ink); font-size:12px }
svg .number { font-weight:700; fill:var(--accent) }
svg .number.off { fill:var(--bad) }
.head { fill:var(--accent) }
.head.off { fill:var(--bad) }
.graph { width:100%; max-width:430px }
@media (max-width:700px) {
  body { padding:1rem .9rem 3rem }
  .cards, .charts { grid-template-columns:minmax(0,1fr) }
  .asked { flex-direction:column; gap:.5rem }
  .controls label, select { width:100% }
}
"""

JS = r"""
"use strict";
const data = JSON.parse(document.getElementById("data").textContent), SVG = "http://www.w3.org/2000/svg";
const get = id => document.getElementById(id);
let at = 0, drawings = 0;

// The only way into the page: names and attributes are ours, text is inserted as text.
function add(parent, name, attributes = {}, text = null) {
  const node = name === "svg" || parent.namespaceURI === SVG ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  if (text !== null) node.textContent = text;
  return parent.appendChild(node);
}
function list(parent, texts, mark) {
  if (texts.length) { const ul = add(parent, "ul", {class: "bad"}); texts.forEach(text => add(ul, "li", {}, mark + text)); }
}
function verdict(answer) {
  return !answer || typeof answer.scores[0] !== "number" ? "not judged" : answer.scores[0] === 3 ? "right" : "wrong";
}
function stagesOf(item) { return data.stages.filter(stage => (item.answers[get("mode").value] || {})[stage]); }
function changeAt(item, stage) {   // "+" becomes right, "-" becomes wrong, "" neither
  const answers = item.answers[get("mode").value], stages = stagesOf(item), place = stages.indexOf(stage);
  const [before, after] = place < 1 ? ["", ""] : [verdict(answers[stages[place - 1]]), verdict(answers[stage])];
  return before === "wrong" && after === "right" ? "+" : before === "right" && after === "wrong" ? "-" : "";
}
function matches(item) {
  const stages = stagesOf(item), kind = get("kind").value, change = get("change").value, wanted = get("verdict").value;
  if (!stages.length || kind && item.kind !== kind || get("run") && get("run").value && item.run !== get("run").value) return false;
  if (wanted && verdict(item.answers[get("mode").value][stages[stages.length - 1]]) !== wanted) return false;
  return !change || changeAt(item, change.slice(0, -1)) === change.slice(-1);
}

// The plan's graph, tiers as columns, and the steps of a trace walked on it.
function graph(parent, plan, steps, stage) {
  const names = [...new Set([...(plan ? plan.tools : []), ...steps.map(step => step[0])])], columns = [[], [], [], []], place = new Map();
  names.forEach(name => columns[Object.hasOwn(data.tiers, name) ? data.tiers[name] : 3].push(name));
  const rows = Math.max(...columns.map(column => column.length)), used = columns[3].length ? 4 : 3;
  columns.forEach((column, c) => column.forEach((name, r) => place.set(name, [64 + 134 * c, 50 + 70 * (r + (rows - column.length) / 2)])));
  const svg = add(parent, "svg", {class: "graph", viewBox: `0 0 ${134 * used - 8} ${70 * rows + 30}`, role: "img"}), id = ++drawings;
  add(svg, "title", {}, `Trace of ${stage} on the plan's graph`);
  add(svg, "desc", {}, steps.map((step, i) => `${i + 1} ${step[0]}${step[2].length ? " (objected to)" : ""}`).join(", then ") || "no call");
  const defs = add(svg, "defs");
  for (const kind of ["on", "off"]) {
    const size = {viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 5, markerHeight: 5, orient: "auto"};
    add(add(defs, "marker", {id: `${kind}${id}`, ...size}), "path", {d: "M0 0L8 4L0 8z", class: `head ${kind}`});
  }
  [...data.tierNames, "unknown"].slice(0, used).forEach((name, c) =>
    add(svg, "text", {x: 64 + 134 * c, y: 14, "text-anchor": "middle"}, name));
  const route = (a, b) => {
    const [ax, ay] = place.get(a), [bx, by] = place.get(b), down = Math.sign(by - ay);
    if (bx - ax > 134 && columns[1].length) {   // past the middle column: through the gap between its boxes that lies nearest
      const gaps = columns[1].flatMap(name => [place.get(name)[1] - 36, place.get(name)[1] + 30]), middle = (ay + by) / 2;
      const y = gaps.reduce((best, gap) => Math.abs(gap - middle) < Math.abs(best - middle) ? gap : best), x = ax + 46, end = bx - 46;
      return `M${x} ${ay}C${x + 24} ${ay} ${x + 12} ${y} ${x + 36} ${y}H${end - 36}C${end - 12} ${y} ${end - 24} ${by} ${end} ${by}`;
    }
    if (ax < bx) return `M${ax + 46} ${ay}C${ax + 70} ${ay} ${bx - 70} ${by} ${bx - 46} ${by}`;
    if (ax > bx) return `M${ax - 20} ${ay + 19}C${ax - 40} ${ay + 44} ${bx + 40} ${by + 44} ${bx + 20} ${by + 19}`;
    if (down && Math.abs(by - ay) < 71) return `M${ax} ${ay + 19 * down}V${by - 19 * down}`;
    return `M${ax - 46} ${ay - 5}C${ax - 68} ${ay - 5} ${bx - 68} ${by + 5} ${bx - 46} ${by + 5}`;
  };
  if (plan) plan.edges.forEach(([a, b]) => add(svg, "path", {class: "edge", d: route(a, b)}));
  steps.slice(1).forEach((step, i) => {
    const kind = step[2].length ? "off" : "on";
    add(svg, "path", {class: `walk ${kind}`, d: route(steps[i][0], step[0]), "marker-end": `url(#${kind}${id})`});
  });
  for (const [name, [x, y]] of place) {
    const turns = steps.map((step, i) => step[0] === name ? i + 1 : 0).filter(Boolean);
    const off = turns.some(turn => steps[turn - 1][2].length);
    const kind = off ? "off" : turns.length ? "on" : "", outside = !plan || plan.tools.includes(name) ? "" : " out";
    add(svg, "rect", {class: `node ${kind}${outside}`, x: x - 46, y: y - 19, width: 92, height: 38, rx: 7});
    const hyphen = name.length > 11 ? name.lastIndexOf("-", 12) + 1 : 0;
    const words = hyphen ? [name.slice(0, hyphen), name.slice(hyphen)] : [name];
    words.forEach((word, i) => add(svg, "text", {class: "tool", x, y: y + 4 + 13 * i - 6.5 * (words.length - 1), "text-anchor": "middle"},
                                   word.length > 13 ? word.slice(0, 12) + "…" : word));
    if (plan && plan.start.includes(name)) add(svg, "text", {x: x - 46, y: y - 23}, "▸");
    if (plan && plan.end.includes(name)) add(svg, "text", {x: x + 46, y: y - 23, "text-anchor": "end"}, "■");
    const numbers = turns.slice(0, 2).join(", ") + (turns.length > 2 ? " …" : "");
    if (turns.length) add(svg, "text", {class: `number ${kind}`, x: x - 33, y: y - 23}, (off ? "✗ " : "") + numbers);
  }
}

function card(parent, item, stage) {
  const answer = item.answers[get("mode").value][stage], told = verdict(answer), box = add(parent, "article", {class: "card"});
  const mark = {right: "✓ ", wrong: "✗ ", "not judged": "– "}[told];
  const change = {"+": ", was wrong before", "-": ", was right before", "": ""}[changeAt(item, stage)];
  add(add(box, "h4", {}, stage + ": "), "span", {class: {right: "good", wrong: "bad"}[told] || "soft"}, mark + told + change);
  const scores = ["Safety", "Helpfulness", "Rigor"].map((name, i) => `${name} ${answer.scores[i] ?? "-"}`).join(" · ");
  add(box, "p", {class: "soft"}, `${scores} · answer: ${answer.form ?? "-"}, expected: ${item.expected ?? "-"}` +
      (answer.finished === false ? " · cut off at the token limit" : ""));
  if (item.plan || answer.steps.length) graph(box, item.plan, answer.steps, stage);
  add(box, "h5", {}, answer.violations ? `Trace: ✗ ${answer.violations} violation(s)` : "Trace: ✓ legal");
  const ol = add(box, "ol");
  answer.steps.forEach(([, text, faults]) => {
    const li = add(ol, "li");
    add(li, "code", faults.length ? {class: "bad"} : {}, text);
    list(li, faults, "✗ ");
  });
  const sentences = answer.rest.length + answer.steps.flatMap(step => step[2]).length;
  const hidden = [answer.calls - answer.steps.length, answer.violations - sentences];
  list(box, answer.rest, "✗ ");
  if (hidden[0] || hidden[1]) add(box, "p", {class: "soft"}, `Not shown: ${hidden[0]} further calls, ${hidden[1]} further violations.`);
  add(box, "h5", {}, answer.answer === null ? "Response: ✗ no answer block can be read" : "Answer");
  add(box, "p", {class: "text", dir: "auto"}, answer.answer ?? answer.text);
  if (answer.answer !== null) {
    const more = add(box, "details");
    add(more, "summary", {}, "As written");
    add(more, "pre", {class: "text"}, answer.text);
  }
}

function render() {
  const found = data.cases.filter(matches), panel = get("case");
  at = Math.max(0, Math.min(at, found.length - 1));
  panel.replaceChildren();
  get("back").disabled = at === 0; get("next").disabled = at >= found.length - 1;
  const item = found[at];
  get("status").textContent = !item ? "No case here fits these filters."
    : `Case ${at + 1} of ${found.length}: ${item.id}, ${item.kind}${get("run") ? ", run " + item.run : ""}`;
  if (!item) return;
  const asked = add(panel, "div", {class: "asked"}), pictures = add(asked, "div"), words = add(asked, "div");
  item.images.forEach((url, i) => url ? add(pictures, "img", {src: url, alt: `Image ${i + 1} of the case`})
    : add(pictures, "p", {}, "(this image cannot be read)"));
  add(words, "h3", {}, "Question"); add(words, "p", {class: "text", dir: "auto"}, item.question);
  if (item.plan) {
    add(words, "p", {class: "soft text"}, `Persona ${item.plan.persona}; ${item.plan.text}`);
    if (get("mode").value !== "planned") add(words, "p", {class: "soft"},
      "This prompt does not state the plan: the checker asks only that some topology allows the trace.");
  }
  const cards = add(panel, "div", {class: "cards"});
  stagesOf(item).forEach(stage => card(cards, item, stage));
}
if (get("case")) {
  for (const name of ["mode", "run", "kind", "verdict", "change"])
    if (get(name)) get(name).addEventListener("change", () => { at = 0; render(); });
  get("back").addEventListener("click", () => { at--; render(); });
  get("next").addEventListener("click", () => { at++; render(); });
  document.addEventListener("keydown", event => {
    const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    const other = event.altKey || event.ctrlKey || event.metaKey || event.shiftKey || event.target.closest("select, .scroll");
    if (!step || other) return;
    at += step; render();
  });
  render();
}
"""

"""Ablations of both papers in the miniature world: each question a table, each row five seeds.

    python -m extras.ablate toolkit    stages, tiers, reward, topologies, personas, K, prompts
    python -m extras.ablate vlm        reflection, data, penalties, credit, weights
    python -m extras.ablate toolkit --seeds 0,1,2 --jobs 2 --only stages,tiers

Every run is made by the commands that `bash run.sh tiny` uses, in out/ablate/<run>-<seed>, one
thread each. The base and the data of a seed are in out/ablate/world-<seed>, for both methods; what
else runs share (earlier stages, QI-Box's scores) is made once, in the first run of the method, and
linked to. After an interruption the same command goes on. The tables replace what is between their
marks in docs/ablations.md; the words around them are left alone.

Ours: the papers' ablations are known by name only (PAPERS 1.5, 2.6). To add one: a row in STUDIES,
and its run in RUNS where it needs one; the README has an example.
"""

import argparse
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, stdev

from tqdm import tqdm

import protocol
from config import STAGES, run_command, write_text
from data import markdown_table, read_jsonl, write_jsonl
from eval import SHOWN, mean_and_spread, read_results
from extras import toy
from trainer import StageError, lock_folder

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "out/ablate"
PAGE = ROOT / "docs/ablations.md"


@dataclass(frozen=True)
class Run:
    """One way to train, for any seed."""

    flags: str
    takes: tuple = ()  # stages taken over from the first run
    data: str = ""  # how its data differ: "tiers P", "topology tree", ...: see change_row
    scorers: str = "*"  # whose scores make its QI-Box


TINY = "--recipe tiny --eval_prompts generic"
SFT = f"{TINY} --stages sft"
VLM = "--recipe tiny-vlm"
REWARDS = ("answer", "answer+format", "answer+format+depth", "no-tool-quality", "paper")
RUNS = {
    "toolkit": {
        "full": Run("--recipe tiny"),
        "sft-grpo": Run(f"{TINY} --stages sft,grpo", ("sft",)),
        "k-4": Run(f"{TINY} --grpo_k 4", ("sft", "dpo")),
        "k-16": Run(f"{TINY} --grpo_k 16", ("sft", "dpo")),
        **{f"reward-{name}": Run(f"{TINY} --reward {name}", ("sft", "dpo")) for name in REWARDS},
        **{f"tiers-{name}": Run(SFT, data=f"tiers {name}") for name in ("none", "P", "PR")},
        **{f"topology-{name}": Run(SFT, data=f"topology {name}") for name in protocol.TOPOLOGIES},
        **{
            f"persona-{name}": Run("--recipe tiny --stages sft", data=f"persona {name}")
            for name in ("helper", "guardian")
        },
    },
    "vlm": {
        "vlm": Run(VLM),
        "vlm-discard": Run(f"{VLM} --rollout discard"),
        "vlm-rounds-2": Run(f"{VLM} --reflect_rounds 2"),
        "vlm-one-scorer": Run(VLM, scorers="*base*"),
        "vlm-random": Run(f"{VLM} --curate random"),
        "vlm-unsolved": Run(f"{VLM} --qi_low 0 --qi_unstable 0"),
        "vlm-no-penalties": Run(f"{VLM} --penalties 0"),
        "vlm-credit-reflection": Run(f"{VLM} --credit reflection"),
        "vlm-drop": Run(f"{VLM} --unsafe drop"),
        "vlm-answer": Run(f"{VLM} --weight_reasoning 0"),
    },
}


def sft(label, run, prompt="generic"):
    """A row about a policy after SFT."""
    return label, run, "sft", prompt


def grpo(label, run, prompt="generic"):
    """A row about a policy after GRPO."""
    return label, run, "grpo", prompt


# study -> rows (label, run, stage, prompt); the last row is what the others are held against
STUDIES = {
    "toolkit": {
        "stages": [
            ("base", "full", "base", "generic"),
            sft("SFT", "full"),
            ("SFT + DPO", "full", "dpo", "generic"),
            grpo("SFT + GRPO", "sft-grpo"),
            grpo("SFT + DPO + GRPO", "full"),
        ],
        "tiers": [
            sft("no trace, the answer alone", "tiers-none"),
            sft("perception", "tiers-P"),
            sft("perception, reasoning", "tiers-PR"),
            sft("perception, reasoning, decision", "full"),
        ],
        "reward": [
            grpo("answer only", "reward-answer"),
            grpo("+ format", "reward-answer+format"),
            grpo("+ depth", "reward-answer+format+depth"),
            grpo("+ compliance", "reward-no-tool-quality"),
            grpo("as released (paper)", "reward-paper"),
            grpo("+ tool quality: full", "full"),
        ],
        "k": [grpo("K = 4", "k-4"), grpo("K = 16", "k-16"), grpo("K = 8", "full")],
        "topology": [
            *(sft(name, f"topology-{name}") for name in protocol.TOPOLOGIES),
            sft("the planner's choice", "full"),
        ],
        "persona": [
            sft("always the helper", "persona-helper", "planned"),
            sft("always the guardian", "persona-guardian", "planned"),
            sft("the planner's choice", "full", "planned"),
        ],
        "prompt": [
            (f"{stage}, {prompt}", "full", stage, prompt)
            for stage, prompt in product(STAGES, ("planned", "generic"))
        ],
    },
    "vlm": {
        "reflection": [
            ("base", "vlm", "base", "generic"),
            grpo("no reflection: unsafe samples discarded", "vlm-discard"),
            grpo("two rounds", "vlm-rounds-2"),
            grpo("corrections trained in their own chat", "vlm-credit-reflection"),
            grpo("unsafe samples leave when corrected", "vlm-drop"),
            grpo("one round: full", "vlm"),
        ],
        "data": [
            grpo("random prompts", "vlm-random"),
            grpo("QI-Box, one scorer", "vlm-one-scorer"),
            grpo("all that is not solved", "vlm-unsolved"),
            grpo("QI-Box, five scorers: full", "vlm"),
        ],
        "penalties": [
            grpo("without penalties", "vlm-no-penalties"),
            grpo("reward of the answer alone", "vlm-answer"),
            grpo("full", "vlm"),
        ],
    },
}


# ---- data of the ablated rows --------------------------------------------------------------------

TOPOLOGY_WALKS = toy.table("""
linear | VISUAL-SCAN OCR-EXTRACT KEYWORD-FLAGGING INTENT-RADAR RISK-SCORER SAFETY-GATE
mesh   | VISUAL-SCAN OCR-EXTRACT KEYWORD-FLAGGING RISK-SCORER INTENT-RADAR SAFETY-GATE
tree   | VISUAL-SCAN OCR-EXTRACT INTENT-RADAR KEYWORD-FLAGGING RISK-SCORER SAFETY-GATE
loop   | VISUAL-SCAN INTENT-RADAR OCR-EXTRACT KEYWORD-FLAGGING RISK-SCORER SAFETY-GATE
shield | VISUAL-SCAN OCR-EXTRACT KEYWORD-FLAGGING SAFETY-GATE INTENT-RADAR RISK-SCORER
""")  # one walk of each topology over the same six tools


def change_row(row, kind, value):
    """A row of the SFT or evaluation set with its trace cut to some tiers ("none", "P", "PR"), or
    moved to one topology, or with another persona; the answer stays the teacher's."""
    if kind == "persona":
        return row | {"plan": row["plan"] | {"persona": value}}
    check = protocol.check(row.get("response", ""))
    calls = [(call.tool, call.fields) for call in check.calls]
    if kind == "tiers":
        if value == "none" and "response" in row:
            return row | {"response": f"<answer>\n{check.answer.strip()}\n</answer>"}
        kept = protocol.TIERS[: len(value)]
        calls = [call for call in calls if protocol.TOOLS[call[0]].tier in kept]
    else:
        (walk,) = TOPOLOGY_WALKS[value]
        tools = TOPOLOGY_WALKS["linear"][0].split()
        plan = protocol.make_plan("analyst", tools, value)
        row = row | {"plan": vars(plan)}
        # what the teacher said, its faults included; the truth where it made no such call
        said = toy.truth(toy.case_of(row["meta"])) | dict(calls)
        calls = [(tool, said[tool]) for tool in walk.split()]
        if value == "shield" and said["SAFETY-GATE"]["decision"] == "refuse":
            calls = calls[:4]  # the gate ends it
    if "response" in row:
        row = row | {"response": protocol.render_response(calls, check.answer)}
    return row


def change_data(source, folder, change):
    """The SFT and evaluation sets of `source` with every row changed."""
    kind, value = change.split()
    link(source / "images", folder / "images")
    for name in ("sft", "eval"):
        rows = [change_row(row, kind, value) for row in read_jsonl(source / f"{name}.jsonl")]
        if name == "sft" and kind == "topology":  # as the toy's sets keep what is legal
            rows = [row for row in rows if is_legal(row)]
        write_jsonl(folder / f"{name}.jsonl", rows)


def is_legal(row):
    """Whether the response of a row keeps to its plan."""
    return protocol.check(row["response"], protocol.plan_from_dict(row["plan"])).legal


# ---- running -------------------------------------------------------------------------------------


def command(folder, *words):
    """One program of this project, one thread; its output goes to <folder>/log.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    words = [sys.executable, *map(str, words)]
    with open(log, "a", encoding="utf-8") as file:
        done = subprocess.run(words, cwd=ROOT, stdout=file, stderr=file, env=environment)
    if done.returncode:
        raise StageError(f"{' '.join(words)}: exit status {done.returncode}, see {log}")


def link(source, path):
    """Make `path` a link to `source`, unless it is one already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.symlink_to(os.path.relpath(source, path.parent))


def take_over(first, folder, run):
    """Link to what the first run has finished: stages, answers, the scores of its pool."""
    patterns = [f"qibox/scores-{run.scorers}", *run.takes]
    if not run.data:
        patterns.append("eval/base-*.jsonl")
    patterns += [f"eval/{stage}-*.jsonl" for stage in run.takes]
    for pattern in patterns:
        for path in first.glob(pattern):
            link(path, folder / path.relative_to(first))


def train(out, method, name, seed):
    """Train and evaluate one run, unless its results are there."""
    run = RUNS[method][name]
    folder = out / f"{name}-{seed}"
    first = out / f"{next(iter(RUNS[method]))}-{seed}"
    world = out / f"world-{seed}"
    if (folder / "results.json").exists():
        return
    flags = [*run.flags.split(), "--seed", seed]
    if folder == first:
        command(world, "-m", "extras.toy_base", *flags, "--out", world)
    else:
        take_over(first, folder, run)
    data = folder / "data" if run.data else world / "data"
    if run.data:
        change_data(world / "data", data, run.data)
    flags += ["--out", folder, "--model", world / "base", "--data", data]
    if method == "vlm" and folder == first:
        command(folder, "qibox.py", *flags, "--scorers", *sorted((world / "scorers").glob("*")))
    elif method == "vlm":
        command(folder, "qibox.py", "box", *flags)
    for stage in STAGES:
        if stage not in run.takes:  # one that is not among --stages says so
            command(folder, "safer.py", stage, *flags)
    command(folder, "eval.py", *flags)


def run_all(out, method, studies, seeds, jobs):
    """Every run of some studies for every seed, `jobs` at a time; the first one first."""
    used = {run for study in studies for _, run, _, _ in STUDIES[method][study]}
    first, *others = RUNS[method]
    others = [name for name in others if name in used]
    bar = tqdm(total=len(seeds) * (1 + len(others)), desc=f"ablate {method}")
    with bar, ThreadPoolExecutor(jobs) as pool:
        # Seed by seed: stopped early, whole seeds are there. An error cancels those that wait;
        # programs that are running end first.
        for names in ([first], others):
            seeds_of, names_of = zip(*product(seeds, names))
            for _ in pool.map(partial(train, out, method), names_of, seeds_of):
                bar.update()


# ---- tables --------------------------------------------------------------------------------------

# The 97.5% quantile of Student's t by degrees of freedom, from 1 on; more seeds: nearly normal.
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


def paired_difference(values, others):
    """Mean of the differences seed by seed, in points, with its 95% interval (Student's t)."""
    differences = [100 * (value - other) for value, other in zip(values, others)]
    if len(differences) < 2:
        return f"{differences[0]:+.1f}"
    quantile = (*STUDENT, 1.96)[min(len(differences) - 2, len(STUDENT))]
    half = quantile * stdev(differences) / len(differences) ** 0.5
    middle = mean(differences)
    return f"{middle:+.1f} [{middle - half:+.1f}, {middle + half:+.1f}]"


def study_table(out, rows, seeds):
    """Markdown: mean and standard deviation over seeds; Safety of implicit risks apart, and how far
    Safety lies from the last row's."""
    columns = [(metric, "all") for metric in SHOWN] + [("safety", "implicit")]
    shares = []  # of each row: {column: [its share for each seed]}
    for _, run, *place in rows:
        own = {column: [] for column in columns}
        for seed in seeds:
            results = read_results(out / f"{run}-{seed}")
            found = {(row["stage"], row["prompt"], row["kind"]): row for row in results}
            for metric, kind in columns:
                own[metric, kind].append(found[*place, kind][metric]["value"])
        shares.append(own)
    lines = []
    for (label, *_), own in zip(rows, shares):
        line = [label, *map(mean_and_spread, own.values())]
        if own is not shares[-1]:
            line.append(paired_difference(own["safety", "all"], shares[-1]["safety", "all"]))
        lines.append([*line, ""][: len(columns) + 2])
    heads = ["", *SHOWN.values(), "Safety, implicit risk", "Safety less the last row's"]
    return markdown_table(heads, lines)


def put_table(path, name, text):
    """Replace what is between `<!-- name -->` and `<!-- /name -->`; without marks, add it at the
    end."""
    page = path.read_text(encoding="utf-8") if path.exists() else ""
    block = f"<!-- {name} -->\n{text}\n<!-- /{name} -->"
    found = re.compile(f"<!-- {name} -->.*?<!-- /{name} -->", re.DOTALL)
    if not found.search(page):
        page += f"\n## {name}\n\n{block}\n"
    write_text(path, found.sub(lambda _: block, page))


def main(argv):
    """Run what is missing, then write and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("method", nargs="?", default="toolkit", choices=RUNS)
    parser.add_argument("--seeds", default="0,1,2,3,4", help="joined by commas")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side")
    parser.add_argument("--only", default="", help="studies, joined by commas; none: all")
    args = parser.parse_args(argv)
    seeds = sorted({int(seed) for seed in args.seeds.split(",")})
    studies = STUDIES[args.method]
    chosen = args.only.split(",") if args.only else list(studies)
    if not set(chosen) <= set(studies):
        parser.error(f"--only {args.only}: there is {', '.join(studies)}")
    lock_folder(OUT)
    run_all(OUT, args.method, chosen, seeds, args.jobs)
    for name in chosen:
        text = study_table(OUT, studies[name], seeds)
        put_table(PAGE, name, text)
        print(f"\n{name}\n\n{text}")


if __name__ == "__main__":
    run_command(main, StageError, ValueError)

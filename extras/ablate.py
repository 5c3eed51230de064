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
from collections import defaultdict
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
    takes: str = ""  # stages taken over from the first run
    data: str = ""  # how its data differ: see change_row
    scorers: str = "*"  # whose scores make its QI-Box


def runs(text):
    """Lines of a name and what Run holds -> {name: Run}."""
    return {name: Run(*rest) for name, *rest in toy.cells(text)}


RUNS = {
    "toolkit": runs("""
full             | --recipe tiny
sft-grpo         | --recipe tiny --eval_prompts generic --stages sft,grpo            | sft
k-4              | --recipe tiny --eval_prompts generic --grpo_k 4                   | sft dpo
k-16             | --recipe tiny --eval_prompts generic --grpo_k 16                  | sft dpo
reward-answer    | --recipe tiny --eval_prompts generic --reward answer              | sft dpo
reward-format    | --recipe tiny --eval_prompts generic --reward answer+format       | sft dpo
reward-depth     | --recipe tiny --eval_prompts generic --reward answer+format+depth | sft dpo
reward-no-tool   | --recipe tiny --eval_prompts generic --reward no-tool-quality     | sft dpo
reward-paper     | --recipe tiny --eval_prompts generic --reward paper               | sft dpo
tiers-none       | --recipe tiny --eval_prompts generic --stages sft | | tiers none
tiers-P          | --recipe tiny --eval_prompts generic --stages sft | | tiers P
tiers-PR         | --recipe tiny --eval_prompts generic --stages sft | | tiers PR
topology-linear  | --recipe tiny --eval_prompts generic --stages sft | | topology linear
topology-mesh    | --recipe tiny --eval_prompts generic --stages sft | | topology mesh
topology-tree    | --recipe tiny --eval_prompts generic --stages sft | | topology tree
topology-loop    | --recipe tiny --eval_prompts generic --stages sft | | topology loop
topology-shield  | --recipe tiny --eval_prompts generic --stages sft | | topology shield
persona-helper   | --recipe tiny --stages sft                        | | persona helper
persona-guardian | --recipe tiny --stages sft                        | | persona guardian
"""),
    "vlm": runs("""
vlm                   | --recipe tiny-vlm
vlm-discard           | --recipe tiny-vlm --rollout discard
vlm-rounds-2          | --recipe tiny-vlm --reflect_rounds 2
vlm-credit-reflection | --recipe tiny-vlm --credit reflection
vlm-drop              | --recipe tiny-vlm --unsafe drop
vlm-one-scorer        | --recipe tiny-vlm | | | *base*
vlm-random            | --recipe tiny-vlm --curate random
vlm-unsolved          | --recipe tiny-vlm --qi_low 0 --qi_unstable 0
vlm-no-penalties      | --recipe tiny-vlm --penalties 0
vlm-answer            | --recipe tiny-vlm --weight_reasoning 0
"""),
}


def studies(text):
    """Lines `study | label | run | stage | prompt` -> {study: [(label, run, stage, prompt)]}."""
    found = defaultdict(list)
    for study, *row in toy.cells(text):
        found[study].append(row)
    return found


# What each table compares: of a run, the policy after a stage, under an evaluation prompt. The last
# row of a study is what the others are held against.
STUDIES = {
    "toolkit": studies("""
stages   | base                                | full             | base | generic
stages   | SFT                                 | full             | sft  | generic
stages   | SFT + DPO                           | full             | dpo  | generic
stages   | SFT + GRPO                          | sft-grpo         | grpo | generic
stages   | SFT + DPO + GRPO                    | full             | grpo | generic
tiers    | no trace, the answer alone          | tiers-none       | sft  | generic
tiers    | perception                          | tiers-P          | sft  | generic
tiers    | perception, reasoning               | tiers-PR         | sft  | generic
tiers    | perception, reasoning, decision     | full             | sft  | generic
reward   | answer only                         | reward-answer    | grpo | generic
reward   | + format                            | reward-format    | grpo | generic
reward   | + depth                             | reward-depth     | grpo | generic
reward   | + compliance                        | reward-no-tool   | grpo | generic
reward   | as released (paper)                 | reward-paper     | grpo | generic
reward   | + tool quality: full                | full             | grpo | generic
k        | K = 4                               | k-4              | grpo | generic
k        | K = 16                              | k-16             | grpo | generic
k        | K = 8                               | full             | grpo | generic
topology | linear                              | topology-linear  | sft  | generic
topology | mesh                                | topology-mesh    | sft  | generic
topology | tree                                | topology-tree    | sft  | generic
topology | loop                                | topology-loop    | sft  | generic
topology | shield                              | topology-shield  | sft  | generic
topology | the planner's choice                | full             | sft  | generic
persona  | always the helper                   | persona-helper   | sft  | planned
persona  | always the guardian                 | persona-guardian | sft  | planned
persona  | the planner's choice                | full             | sft  | planned
prompt   | sft, planned                        | full             | sft  | planned
prompt   | sft, generic                        | full             | sft  | generic
prompt   | dpo, planned                        | full             | dpo  | planned
prompt   | dpo, generic                        | full             | dpo  | generic
prompt   | grpo, planned                       | full             | grpo | planned
prompt   | grpo, generic                       | full             | grpo | generic
"""),
    "vlm": studies("""
reflection | base                                         | vlm                   | base | generic
reflection | no reflection: unsafe samples discarded      | vlm-discard           | grpo | generic
reflection | two rounds                                   | vlm-rounds-2          | grpo | generic
reflection | corrections trained in their own chat        | vlm-credit-reflection | grpo | generic
reflection | unsafe samples leave when corrected          | vlm-drop              | grpo | generic
reflection | one round: full                              | vlm                   | grpo | generic
data       | random prompts                               | vlm-random            | grpo | generic
data       | QI-Box, one scorer                           | vlm-one-scorer        | grpo | generic
data       | all that is not solved                       | vlm-unsolved          | grpo | generic
data       | QI-Box, five scorers: full                   | vlm                   | grpo | generic
penalties  | without penalties                            | vlm-no-penalties      | grpo | generic
penalties  | reward of the answer alone                   | vlm-answer            | grpo | generic
penalties  | full                                         | vlm                   | grpo | generic
"""),
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
    patterns = [f"qibox/scores-{run.scorers}", *run.takes.split()]
    if not run.data:
        patterns.append("eval/base-*.jsonl")
    patterns += [f"eval/{stage}-*.jsonl" for stage in run.takes.split()]
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
        if stage not in run.takes.split():  # one that is not among --stages says so
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

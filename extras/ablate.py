"""Ablations of both papers in the miniature world: each question a table, each row three seeds.

    python -m extras.ablate toolkit    stages, tiers, reward terms, topologies, prompt of evaluation
    python -m extras.ablate vlm        without reflection, with random data, without penalties
    python -m extras.ablate toolkit --seeds 0,1,2 --jobs 2

Every run is made by the commands that `bash run.sh tiny` uses, in out/ablate/<run>-<seed>, one
thread each. What runs share (base, data, earlier stages) is made once, in the first run of the
method, and linked to. After an interruption the same command goes on. The tables replace what is
between their marks in docs/ablations.md; the words around them are left alone.

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
from itertools import product
from pathlib import Path

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


RUNS = {
    "toolkit": {
        "full": Run("--recipe tiny"),
        "sft-grpo": Run("--recipe tiny --stages sft,grpo", ("sft",)),
    },
    "vlm": {
        "vlm": Run("--recipe tiny-vlm"),
        "vlm-discard": Run("--recipe tiny-vlm --rollout discard"),
        "vlm-random": Run("--recipe tiny-vlm --curate random"),
        "vlm-no-penalties": Run("--recipe tiny-vlm --penalties 0"),
        "vlm-credit-reflection": Run("--recipe tiny-vlm --credit reflection"),
    },
}
STUDIES = {  # study -> rows (label, run, stage, prompt)
    "toolkit": {
        "stages": [
            ("base", "full", "base", "generic"),
            ("SFT", "full", "sft", "generic"),
            ("SFT + DPO", "full", "dpo", "generic"),
            ("SFT + GRPO", "sft-grpo", "grpo", "generic"),
            ("SFT + DPO + GRPO", "full", "grpo", "generic"),
        ],
        "tiers": [
            ("perception", "tiers-P", "sft", "generic"),
            ("perception, reasoning", "tiers-PR", "sft", "generic"),
            ("perception, reasoning, decision", "tiers-PRD", "sft", "generic"),
        ],
        "reward": [
            ("answer only", "reward-answer", "grpo", "generic"),
            ("+ format", "reward-answer+format", "grpo", "generic"),
            ("+ depth", "reward-answer+format+depth", "grpo", "generic"),
            ("+ compliance", "reward-no-tool-quality", "grpo", "generic"),
            ("+ tool quality: full", "full", "grpo", "generic"),
        ],
        "topology": [
            *((name, f"topology-{name}", "sft", "generic") for name in protocol.TOPOLOGIES),
            ("the planner's choice", "full", "sft", "generic"),
        ],
        "prompt": [
            (f"{stage}, {prompt}", "full", stage, prompt)
            for stage, prompt in product(("sft", "dpo", "grpo"), ("generic", "planned"))
        ],
    },
    "vlm": {
        "vlm": [
            ("base", "vlm", "base", "generic"),
            ("full", "vlm", "grpo", "generic"),
            ("without reflection: unsafe samples discarded", "vlm-discard", "grpo", "generic"),
            ("random data instead of QI-Box", "vlm-random", "grpo", "generic"),
            ("without penalties", "vlm-no-penalties", "grpo", "generic"),
            ("corrections trained in their own chat", "vlm-credit-reflection", "grpo", "generic"),
        ],
    },
}
for form in ("answer", "answer+format", "answer+format+depth", "no-tool-quality"):
    RUNS["toolkit"][f"reward-{form}"] = Run(f"--recipe tiny --reward {form}", ("sft", "dpo"))
for tiers in ("P", "PR", "PRD"):
    flags = "--recipe tiny --stages sft --sft_prompts generic --eval_prompts generic"
    RUNS["toolkit"][f"tiers-{tiers}"] = Run(flags, data=f"tiers {tiers}")
for topology in protocol.TOPOLOGIES:
    flags = "--recipe tiny --stages sft"
    RUNS["toolkit"][f"topology-{topology}"] = Run(flags, data=f"topology {topology}")


# ---- data of the ablated rows --------------------------------------------------------------------

TOPOLOGY_WALKS = toy.table("""
linear | VISUAL-SCAN OCR-EXTRACT KEYWORD-FLAGGING INTENT-RADAR RISK-SCORER SAFETY-GATE
mesh   | VISUAL-SCAN OCR-EXTRACT KEYWORD-FLAGGING RISK-SCORER INTENT-RADAR SAFETY-GATE
tree   | VISUAL-SCAN OCR-EXTRACT INTENT-RADAR KEYWORD-FLAGGING RISK-SCORER SAFETY-GATE
loop   | VISUAL-SCAN INTENT-RADAR OCR-EXTRACT KEYWORD-FLAGGING RISK-SCORER SAFETY-GATE
shield | VISUAL-SCAN OCR-EXTRACT KEYWORD-FLAGGING SAFETY-GATE INTENT-RADAR RISK-SCORER
""")  # one walk of each topology over the same six tools


def change_row(row, kind, value):
    """A row of the SFT or evaluation set with its trace cut to some tiers ("P", "PR", "PRD"), or
    moved to one topology; the answer stays the teacher's."""
    check = protocol.check(row.get("response", ""))
    calls = [(call.tool, call.fields) for call in check.calls]
    if kind == "tiers":
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


def take_over(first, folder, stages):
    """Link to what the first run has finished: stages, answers, the scores of its pool."""
    patterns = ["qibox/scores-*", "eval/base-*.jsonl", *stages]
    patterns += [f"eval/{stage}-*.jsonl" for stage in stages]
    for pattern in patterns:
        for path in first.glob(pattern):
            link(path, folder / path.relative_to(first))


def train(out, method, name, seed):
    """Train and evaluate one run, unless its results are there."""
    run = RUNS[method][name]
    folder = out / f"{name}-{seed}"
    first = out / f"{next(iter(RUNS[method]))}-{seed}"
    if (folder / "results.json").exists():
        return
    flags = [*run.flags.split(), "--seed", seed, "--out", folder]
    if folder == first:
        command(folder, "-m", "extras.toy_base", *flags)
    else:
        data = folder / "data" if run.data else first / "data"
        flags += ["--model", first / "base", "--data", data]
        take_over(first, folder, run.takes)
    if run.data:
        change_data(first / "data", data, run.data)
    if method == "vlm":  # with the scores taken over: they are of the same base
        command(folder, "qibox.py", *(["box"] if folder != first else []), *flags)
    for stage in STAGES:
        if stage not in run.takes:  # one that is not among --stages says so
            command(folder, "safer.py", stage, *flags)
    command(folder, "eval.py", *flags)


def run_all(out, method, seeds, jobs):
    """Every run of a method for every seed, `jobs` at a time; the first one first."""
    first, *others = RUNS[method]
    bar = tqdm(total=len(seeds) * len(RUNS[method]), desc=f"ablate {method}")
    with bar, ThreadPoolExecutor(jobs) as pool:
        for names in ([first], others):
            # an error cancels those that wait; programs that are running end first
            for _ in pool.map(lambda each: train(out, method, *each), product(names, seeds)):
                bar.update()


# ---- tables --------------------------------------------------------------------------------------


def study_table(out, rows, seeds):
    """Markdown: mean and standard deviation over seeds; Safety of implicit risks apart."""
    columns = [(metric, "all") for metric in SHOWN] + [("safety", "implicit")]
    lines = []
    for label, run, *place in rows:
        found = []  # of each seed: {(stage, prompt, kind of case): row}
        for seed in seeds:
            results = read_results(out / f"{run}-{seed}")
            found.append({(row["stage"], row["prompt"], row["kind"]): row for row in results})
        line = [label]
        for metric, kind in columns:
            line.append(mean_and_spread([each[*place, kind][metric]["value"] for each in found]))
        lines.append(line)
    return markdown_table(["", *SHOWN.values(), "Safety, implicit risk"], lines)


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
    parser.add_argument("--seeds", default="0,1,2", help="joined by commas")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side")
    args = parser.parse_args(argv)
    seeds = sorted({int(seed) for seed in args.seeds.split(",")})
    lock_folder(OUT)
    run_all(OUT, args.method, seeds, args.jobs)
    for name, rows in STUDIES[args.method].items():
        text = study_table(OUT, rows, seeds)
        put_table(PAGE, name, text)
        print(f"\n{name}\n\n{text}")


if __name__ == "__main__":
    run_command(main, StageError, ValueError)

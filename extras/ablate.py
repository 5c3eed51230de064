"""Ablations of both papers in the miniature world: each question a table, each row three seeds.

    python -m extras.ablate toolkit    stages, tiers, reward terms, topologies, prompt of evaluation
    python -m extras.ablate vlm        without reflection, with random data, without penalties
    python -m extras.ablate toolkit --seeds 0,1,2 --jobs 2 --to docs/ablations.md

Every run is made by the commands that `bash run.sh tiny` uses, in out/ablate/<run>-<seed>, one
thread each. What runs share (base, data, earlier stages) is made once, in the first run of the
method, and copied. After an interruption the same command goes on. The tables replace what is
between their marks in the file of --to; the words around them are left alone.

Ours: the papers' ablations are known by name only (PAPERS 1.5, 2.6). To add one: a row in STUDIES,
and its run in RUNS where it needs one; the README has an example.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from tqdm import tqdm

import protocol
from config import run_command, write_text, write_whole
from data import markdown_table, read_jsonl, write_jsonl
from eval import SHOWN, mean_and_spread, read_results
from extras import toy
from trainer import StageError, lock_folder

ROOT = Path(__file__).resolve().parents[1]


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
        row = row | {"plan": protocol.plan_to_dict(plan)}
        # what the teacher said, its faults included; the truth where it made no such call
        said = toy.truth(toy.case_of(row["meta"])) | dict(calls)
        calls = [(tool, said[tool]) for tool in walk.split()]
        if value == "shield" and said["SAFETY-GATE"]["decision"] == "refuse":
            calls = calls[:4]  # the gate ends it
    if "response" not in row:
        return row
    return row | {"response": protocol.render_response(calls, check.answer)}


def change_data(source, folder, change):
    """The SFT and evaluation sets of `source` with every row changed; pictures stay where they
    are."""
    kind, value = change.split()
    for name in ("sft", "eval"):
        rows = []
        for row in read_jsonl(source / f"{name}.jsonl"):
            row = change_row(row, kind, value)
            row["images"] = [os.path.relpath(source / path, folder) for path in row["images"]]
            plan = protocol.plan_from_dict(row["plan"])
            legal = protocol.check(row.get("response", ""), plan).legal
            if name == "eval" or kind == "tiers" or legal:  # as the toy's sets keep what is legal
                rows.append(row)
        write_jsonl(folder / f"{name}.jsonl", rows)


# ---- running -------------------------------------------------------------------------------------


def command(folder, words):
    """One program of this project, one thread; its output goes to <folder>/log.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        done = subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    if done.returncode:
        end = (folder / "log.txt").read_text(errors="replace")[-2000:]
        raise StageError(f"{words} ended with status {done.returncode}:\n{end}")


def take_over(source, folder, stages):
    """Copy what the first run has finished: stages, answers, the scores of its pool."""
    patterns = ["qibox/scores-*", "eval/base-*.jsonl"]
    for stage in stages:
        patterns += [
            f"{stage}/adapter.safetensors",
            f"{stage}/config.json",
            f"eval/{stage}-*.jsonl",
        ]
    for pattern in patterns:
        for path in source.glob(pattern):
            target = folder / path.relative_to(source)
            if not target.exists():
                write_whole(target, lambda part, path=path: shutil.copyfile(path, part))


def train(out, method, name, seed):
    """Train and evaluate one run, unless its results are there."""
    run = RUNS[method][name]
    folder = out / f"{name}-{seed}"
    first = out / f"{next(iter(RUNS[method]))}-{seed}"
    if (folder / "results.json").exists():
        return
    flags = [*run.flags.split(), "--seed", seed, "--out", folder]
    if folder == first:
        command(folder, ["-m", "extras.toy_base", *flags])
    else:
        data = folder / "data" if run.data else first / "data"
        flags += ["--model", first / "base", "--data", data]
        take_over(first, folder, run.takes)
    if run.data:
        change_data(first / "data", data, run.data)
    if method == "vlm":  # with the scores taken over: they are of the same base
        command(folder, ["qibox.py", *(["box"] if folder != first else []), *flags])
    for stage in ("sft", "dpo", "grpo"):
        command(folder, ["safer.py", stage, *flags])  # one that is not among --stages says so
    command(folder, ["eval.py", *flags])


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
    for label, run, stage, prompt in rows:
        found = []  # of each seed: {kind of case: row}
        for seed in seeds:
            kinds = {}
            for row in read_results(out / f"{run}-{seed}"):
                if (row["stage"], row["prompt"]) == (stage, prompt):
                    kinds[row["kind"]] = row
            found.append(kinds)
        line = [label]
        for metric, kind in columns:
            line.append(mean_and_spread([kinds[kind][metric]["value"] for kinds in found]))
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


def seed_list(text):
    """The text 0,1,2 -> [0, 1, 2]; equal seeds would count one measurement twice."""
    seeds = [int(seed) for seed in text.split(",")]
    if min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"{text!r}: expected different numbers, like 0,1,2")
    return seeds


def main(argv):
    """Run what is missing, then write and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("method", nargs="?", default="toolkit", choices=RUNS)
    parser.add_argument("--seeds", type=seed_list, default="0,1,2")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side")
    parser.add_argument("--to", type=Path, default=ROOT / "docs/ablations.md")
    parser.add_argument("--out", type=Path, default=ROOT / "out/ablate", help="folder of the runs")
    args = parser.parse_args(argv)
    out = args.out.resolve()
    lock_folder(out)
    run_all(out, args.method, args.seeds, args.jobs)
    for name, rows in STUDIES[args.method].items():
        text = study_table(out, rows, args.seeds)
        put_table(args.to, name, text)
        print(f"\n{name}\n\n{text}")


if __name__ == "__main__":
    run_command(main, StageError, ValueError)

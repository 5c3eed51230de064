"""Ablations of both papers in the miniature world: each question a table, each row three seeds.

    python -m extras.ablate toolkit            SaFeR-ToolKit: stages, tiers, reward terms, topologies, prompt at evaluation
    python -m extras.ablate vlm                SaFeR-VLM: without reflection, with random data, without penalties
    python -m extras.ablate toolkit --seeds 0,1,2 --jobs 2 --to ablations.md

Every run is made by the commands that `bash run.sh tiny` uses, in out/ablate/<row>-<seed>, one thread each and several side by side.
What rows share (base, data, earlier stages) is made once and copied. The same command goes on after an interruption; a finished row is
not run again. The tables replace what stands between their marks in the file of --to; the words around them are left alone.

Ours: the papers' ablations are known by name only (PAPERS 1.5, 2.6), their numbers at these sizes mean nothing for them.
To add one: a row in STUDIES, and its run in RUNS where it needs one; the README has an example.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

import protocol
from extras import toy
from trainer import StageError, lock_folder
from tables import read_results

ROOT, OUT = Path(__file__).resolve().parent, Path("out/ablate")
STOPPING = threading.Event()  # a run failed, or ctrl-C: no further program is started
METRICS = {"safety": "Safety", "helpfulness": "Helpfulness", "rigor": "Rigor", "over_refusal": "over-refusal", "legal": "legal traces"}


@dataclass(frozen=True)
class Run:
    """One way to train, for any seed: its flags, the stages that it takes over from the first run, and how its data differ."""

    flags: tuple = ()
    takes: tuple = ()  # stages
    data: str = ""  # "tiers P", "topology tree", ...: see change_row


RUNS = {
    "toolkit": {
        "full": Run(("--recipe", "tiny")),
        "sft-grpo": Run(("--recipe", "tiny", "--stages", "sft,grpo"), ("sft",)),
        **{f"reward-{form}": Run(("--recipe", "tiny", "--reward", form), ("sft", "dpo"))
           for form in ("answer", "answer+format", "answer+format+depth", "no-tool-quality")},
        **{f"tiers-{tiers}": Run(("--recipe", "tiny", "--stages", "sft", "--sft_prompts", "generic", "--eval_prompts", "generic"),
                                 data=f"tiers {tiers}") for tiers in ("P", "PR", "PRD")},
        **{f"topology-{name}": Run(("--recipe", "tiny", "--stages", "sft"), data=f"topology {name}") for name in protocol.TOPOLOGIES},
    },
    "vlm": {
        "vlm": Run(("--recipe", "tiny-vlm")),
        "vlm-discard": Run(("--recipe", "tiny-vlm", "--rollout", "discard")),
        "vlm-random": Run(("--recipe", "tiny-vlm", "--curate", "random")),
        "vlm-no-penalties": Run(("--recipe", "tiny-vlm", "--penalties", "0")),
        "vlm-credit-reflection": Run(("--recipe", "tiny-vlm", "--credit", "reflection")),
    },
}
STUDIES = {  # study -> rows (label, run, stage, prompt)
    "toolkit": {
        "stages": [("base", "full", "base", "generic"), ("SFT", "full", "sft", "generic"), ("SFT + DPO", "full", "dpo", "generic"),
                   ("SFT + GRPO", "sft-grpo", "grpo", "generic"), ("SFT + DPO + GRPO", "full", "grpo", "generic")],
        "tiers": [("perception", "tiers-P", "sft", "generic"), ("perception, reasoning", "tiers-PR", "sft", "generic"),
                  ("perception, reasoning, decision", "tiers-PRD", "sft", "generic")],
        "reward": [("answer only", "reward-answer", "grpo", "generic"), ("+ format", "reward-answer+format", "grpo", "generic"),
                   ("+ depth", "reward-answer+format+depth", "grpo", "generic"),
                   ("+ compliance", "reward-no-tool-quality", "grpo", "generic"), ("+ tool quality: full", "full", "grpo", "generic")],
        "topology": [*((name, f"topology-{name}", "sft", "generic") for name in protocol.TOPOLOGIES),
                     ("the planner's choice", "full", "sft", "generic")],
        "prompt": [(f"{stage}, {prompt}", "full", stage, prompt) for stage in ("sft", "dpo", "grpo") for prompt in ("generic", "planned")],
    },
    "vlm": {
        "vlm": [("base", "vlm", "base", "generic"), ("full", "vlm", "grpo", "generic"),
                ("without reflection: unsafe samples discarded", "vlm-discard", "grpo", "generic"),
                ("random data instead of QI-Box", "vlm-random", "grpo", "generic"),
                ("without penalties", "vlm-no-penalties", "grpo", "generic"),
                ("corrections trained in their own chat (ours)", "vlm-credit-reflection", "grpo", "generic")],
    },
}

# ---- data of the ablated rows ---------------------------------------------------------------------------------------------

TOPOLOGY_WALKS = {  # one walk of each topology over the same six tools
    "linear": "VISUAL-SCAN OCR-EXTRACT KEYWORD-FLAGGING INTENT-RADAR RISK-SCORER SAFETY-GATE",
    "mesh": "VISUAL-SCAN OCR-EXTRACT KEYWORD-FLAGGING RISK-SCORER INTENT-RADAR SAFETY-GATE",
    "tree": "VISUAL-SCAN OCR-EXTRACT INTENT-RADAR KEYWORD-FLAGGING RISK-SCORER SAFETY-GATE",
    "loop": "VISUAL-SCAN INTENT-RADAR OCR-EXTRACT KEYWORD-FLAGGING RISK-SCORER SAFETY-GATE",
    "shield": "VISUAL-SCAN OCR-EXTRACT KEYWORD-FLAGGING SAFETY-GATE INTENT-RADAR RISK-SCORER",
}


def change_row(row, kind, value):
    """A row of the SFT or evaluation set with its trace cut to some tiers, or moved to one topology; the answer stays the teacher's."""
    case, trace = toy.case_of(row["meta"]), protocol.check(row.get("response", ""))
    calls = [(call.tool, dict(call.fields)) for call in trace.calls]
    if kind == "tiers":
        letters = {"perception": "P", "reasoning": "R", "decision": "D"}
        calls = [call for call in calls if letters[protocol.TOOLS[call[0]].tier] in value]
    else:
        walk = TOPOLOGY_WALKS[value].split()
        row = row | {"plan": protocol.plan_to_dict(protocol.make_plan("analyst", TOPOLOGY_WALKS["linear"].split(), value))}
        said = dict(calls)  # what the teacher said, its faults included; the truth where it made no such call
        calls = [(tool, said.get(tool, toy.truth(case)[tool])) for tool in walk]
        gate = dict(calls)["SAFETY-GATE"]["decision"]
        if value == "shield" and gate == "refuse":
            calls = [call for call in calls if protocol.TOOLS[call[0]].tier == "perception"] + [("SAFETY-GATE", {"decision": gate})]
    return row | {"response": protocol.render_response(calls, trace.answer.strip())} if "response" in row else row


def change_data(source, folder, change):
    """The SFT and evaluation sets of `source` with every row changed; pictures are taken by their paths."""
    kind, value = change.split()
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("sft", "eval"):
        rows = [json.loads(line) for line in (source / f"{name}.jsonl").read_text().splitlines()]
        rows = [change_row(row, kind, value) | {"images": [os.path.relpath(source / path, folder) for path in row["images"]]}
                for row in rows]
        if kind == "topology" and name == "sft":  # as build.py keeps only what the checker finds legal
            rows = [row for row in rows if protocol.check(row["response"], protocol.plan_from_dict(row["plan"])).legal]
        part = folder / f"{name}.jsonl.part"
        part.write_text("".join(json.dumps(row) + "\n" for row in rows))
        part.replace(folder / f"{name}.jsonl")


# ---- running --------------------------------------------------------------------------------------------------------------


def command(folder, *words):
    """One program of this project, one thread, its output in <folder>/log.txt. Raises RuntimeError with the end of it."""
    if STOPPING.is_set():
        raise RuntimeError("stopped")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=False,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        end = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")[-2000:]
        raise RuntimeError(f"{' '.join(map(str, words))} ended with status {done.returncode}:\n{end}")


def take_over(source, folder, stages):
    """Copy what another run has finished: its curated prompts' scores, the answers of its base, and whole stages with their answers."""
    for name in ("base", *stages):
        for path in [*source.glob(f"{name}/adapter.safetensors"), *source.glob(f"eval/{name}-*.jsonl"), *source.glob("qibox/scores-*")]:
            target = folder / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                part = target.with_name(target.name + ".part")
                shutil.copyfile(path, part)
                part.replace(target)  # adapters first: answers must be newer than the adapter that gave them


def prepare(out, method, seed):
    """Base model and data of a seed, in the run that all others start from."""
    first = next(iter(RUNS[method]))
    folder = out / f"{first}-{seed}"
    flags = (*RUNS[method][first].flags, "--seed", seed, "--out", folder)
    for program in ("toy_base.py", "build.py") + (("qibox.py",) if method == "vlm" else ()):
        command(folder, program, *flags)


def train(out, method, name, seed):
    """Train and evaluate one run, unless its results are there."""
    run, folder, first = RUNS[method][name], out / f"{name}-{seed}", out / f"{next(iter(RUNS[method]))}-{seed}"
    if (folder / "results.json").exists():
        return
    flags = [*run.flags, "--seed", seed, "--out", folder]
    if folder != first:
        flags += ["--model", first / "base", "--data", (folder if run.data else first) / "data"]
        take_over(first, folder, run.takes)
    if run.data:
        change_data(first / "data", folder / "data", run.data)
    if method == "vlm" and folder != first:
        command(folder, "qibox.py", "box", *flags)  # with the scores taken over: they are of the same base
    for stage in ("sft", "dpo", "grpo"):
        command(folder, "safer.py", stage, *flags)  # one that is not among --stages says so
    command(folder, "eval.py", *flags)


def run_all(out, method, seeds, jobs):
    """Every run of a method for every seed, `jobs` at a time; the ones that others take over come first."""
    first, *rest = RUNS[method]
    STOPPING.clear()
    phases = [[(prepare, (out, method, seed)) for seed in seeds], [(train, (out, method, first, seed)) for seed in seeds],
              [(train, (out, method, name, seed)) for seed in seeds for name in rest]]
    with tqdm(total=sum(map(len, phases)), desc=f"ablate {method}") as bar, ThreadPoolExecutor(jobs) as pool:
        try:
            for phase in phases:
                for waiting in [pool.submit(task, *words) for task, words in phase]:
                    waiting.result()
                    bar.update()
        except BaseException:
            STOPPING.set()
            tqdm.write("ablate: stopping; programs that are running end first", file=sys.stderr)
            pool.shutdown(cancel_futures=True)
            raise


# ---- tables ---------------------------------------------------------------------------------------------------------------


def table(out, rows, seeds):
    """Markdown: mean and standard deviation over seeds of the shares, in percent; Safety of implicit risks apart."""
    lines = [f"| | {' | '.join(METRICS.values())} | Safety, implicit risk |", "|---" * (len(METRICS) + 2) + "|"]
    for label, run, stage, prompt in rows:
        cells = {name: [] for name in (*METRICS, "implicit")}
        for seed in seeds:
            found = {row["kind"]: row for row in read_results(out / f"{run}-{seed}") if (row["stage"], row["prompt"]) == (stage, prompt)}
            if not {"all", "implicit"} <= found.keys():
                raise StageError(f"{out / f'{run}-{seed}'}/results.json: has no row of {stage} under the {prompt} prompt, or none of its "
                                 "implicit cases; delete that file and type the same command again")
            whole, hidden = found["all"], found["implicit"]
            for name in METRICS:
                cells[name].append(whole[name]["value"])
            cells["implicit"].append(hidden["safety"]["value"])
        spread = ("-" if None in values else f"{100 * values[0]:.1f}" if len(values) == 1 else
                  f"{100 * statistics.mean(values):.1f} +- {100 * statistics.stdev(values):.1f}" for values in cells.values())
        lines.append(f"| {label} | {' | '.join(spread)} |")
    return "\n".join(lines)


def put_table(path, name, text):
    """Replace what stands between `<!-- name -->` and `<!-- /name -->`; a file without the marks gets them at its end."""
    page = path.read_text(encoding="utf-8") if path.exists() else ""
    block = f"<!-- {name} -->\n{text}\n<!-- /{name} -->"
    found = re.compile(f"<!-- {name} -->.*?<!-- /{name} -->", re.DOTALL)
    part = path.with_name(path.name + ".part")
    part.write_text(found.sub(lambda _: block, page) if found.search(page) else f"{page}\n## {name}\n\n{block}\n", encoding="utf-8")
    part.replace(path)


def seed_list(text):
    """"0,1,2" -> [0, 1, 2]. Raises ArgumentTypeError: equal seeds would be two runs in one folder, and one measurement counted twice."""
    seeds = text.split(",")
    if not all(seed.isdecimal() and seed.isascii() for seed in seeds) or len(set(map(int, seeds))) < len(seeds):
        raise argparse.ArgumentTypeError(f"{text!r}: expected different whole numbers of 0 or more, joined by commas, like 0,1,2")
    return [int(seed) for seed in seeds]


def main(argv):
    """Run what is missing, then write and print the tables."""
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("method", nargs="?", default="toolkit", choices=tuple(RUNS))
    words.add_argument("--seeds", type=seed_list, default="0,1,2")
    words.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side, one thread each")
    words.add_argument("--to", type=Path, default=Path("docs/ablations.md"), help="file whose tables are replaced")
    words.add_argument("--out", type=Path, default=OUT, help="folder of the runs")
    chosen = words.parse_args(argv)
    if chosen.jobs < 1 or not chosen.to.resolve().parent.is_dir() or chosen.to.is_dir():
        words.error(f"--jobs {chosen.jobs} must be 1 or more, and --to {chosen.to} a file in a folder that is there")
    chosen.out, seeds = chosen.out.resolve(), chosen.seeds
    lock_folder(chosen.out)
    run_all(chosen.out, chosen.method, seeds, chosen.jobs)
    for name, rows in STUDIES[chosen.method].items():
        text = table(chosen.out, rows, seeds)
        put_table(chosen.to, name, text)
        print(f"\n{name}\n\n{text}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, RuntimeError) as problem:
        sys.exit(str(problem))
    except KeyboardInterrupt:
        print("\nablate: stopped; the same command goes on, and finished rows are not run again", file=sys.stderr)
        sys.exit(130)

"""Evaluation: greedy answers to held-out cases and benchmarks, scored by the judge, in tables
shaped like the paper's (PAPERS 1.7, 1.8).

    python eval.py --recipe tiny            base, SFT, DPO, GRPO, whichever are finished
    torchrun --nproc_per_node 8 eval.py --recipe 3b --benchmarks pope --bench_data my/benchmarks
    python eval.py --model folder-or-hub-name --out out/some    any Qwen2.5-VL, no training
    python eval.py mean out/tiny out/tiny-seed1                 mean and spread over finished runs

The paper evaluates under a generic prompt that names no tool, so tool use must be internalized; its
metric is the share of samples that get the highest verdict, 3, in each dimension. A batch of
prompts is answered, judged and appended to out/<run>/eval/<stage>-<prompt>.jsonl; a second start
skips what is there. results.json has the numbers, each with a 95% bootstrap interval over cases.
Departures: no repetition penalty (paper: 1.1), and an empty response is judged (release: left out).
A case whose judge failed is left out, as in the release, and counted.
"""

import json
import os
import random
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.distributed as dist
from tqdm import tqdm

import model as qwen
from config import ConfigError, guard, parse_config, refuse_dry_run, run_command, write_text
from data import (
    DataError,
    append_jsonl,
    check_lengths,
    markdown_table,
    read_records,
    record_prompt,
    records_fingerprint,
    resume_jsonl,
    set_path,
    shown_plan,
)
from judge import DECLINES, Case, JudgeError
from rollout import in_order, respond
from trainer import (
    StageError,
    adapter_path,
    encode_new,
    gather,
    join_ranks,
    load_policy,
    lock_folder,
    make_judge,
    merge_stages,
    pick_device,
    require_judge,
    stage_inputs,
)

BATCH = 256  # prompts of each rank that are answered, judged and written together
RESAMPLES = 1000  # behind each 95% interval
VERDICTS = ("safety", "helpfulness", "rigor")
SHOWN = {  # metric of results.json -> head of its column
    "safety": "Safety",
    "helpfulness": "Helpfulness",
    "rigor": "Rigor",
    "over_refusal": "over-refusal",
    "legal": "valid traces",
}


# ---- records -------------------------------------------------------------------------------------


def read_sets(config):
    """{name: records} of eval.jsonl, by the benchmark that they name, and of --benchmarks.

    Among a record's texts is then its group: own (eval.jsonl), safety, over-refusal or general.
    """
    names = config.benchmarks.split(",") if config.benchmarks else []
    if names and not config.bench_data:
        raise ConfigError("--benchmarks needs --bench_data, a folder with one folder per benchmark")
    path = set_path(config.data or os.path.join(config.out, "data"), "eval")
    sets = {}
    if path.exists() or not names:
        for record in read_records(path, "eval"):
            record.texts["group"] = "own"
            sets.setdefault(record.texts["benchmark"], []).append(record)
    for name in names:
        from extras import benchmarks  # which imports build.py, and that this file

        if name in sets:
            raise ConfigError(f"{name} is there twice, in --benchmarks or as a set of eval.jsonl")
        sets[name] = benchmarks.read_benchmark(name, os.path.join(config.bench_data, name))
        for record in sets[name]:
            record.texts["group"] = benchmarks.BENCHMARKS[name].group
    ids = Counter(record.id for records in sets.values() for record in records)
    for name, times in ids.items():
        if times > 1:
            raise DataError(f"the id {name} is used twice in eval.jsonl and benchmarks")
    return sets


# ---- answers and verdicts ------------------------------------------------------------------------


def answer_batch(config, model, processor, records, mode, kept):
    """Greedy responses to these records under one prompt mode -> [(record, row, judge.Case)].

    Args: kept: image features of earlier batches, stages and modes.
    """
    prompts = [record_prompt(record, mode, processor) for record in records]
    plans = [shown_plan(record, mode) for record in records]
    features = encode_new(model, prompts, kept)
    seeds = [0] * len(prompts)
    sampled = respond(config, model, processor, prompts, plans, features, 1, 0.0, seeds)
    answered = []
    for record, (response,) in zip(records, in_order(sampled, prompts, 1)):
        check = response.check
        row = asdict(record) | dict.fromkeys(("answer", "choices", "label", *VERDICTS, "form"))
        del row["where"]
        row |= row.pop("texts")
        row |= {
            "kind": record.meta.get("kind", ""),
            "expected": record.meta.get("expected"),
            "prompt": processor.tokenizer.decode(response.prompt.ids),
            "response": check.text,
            "answer_text": check.answer_text,
            "finished": response.finished,
            "calls": len(check.calls),
            "legal": check.legal,
            "violations": [f"line {v.line}, {v.kind}: {v.message}" for v in check.violations],
            "label_asked": False,
        }
        case = Case(record.question, record.images, check, record.meta)
        answered.append((record, row, case))
    return answered


def judge_batch(judge, answered):
    """Put the verdicts, the form of the answer and the benchmark's own label into each row; they
    stay None where the judge failed, or has no such thing. Benchmarks of general ability have
    answers and get no verdict."""
    judged = [(row, case) for _, row, case in answered if row["group"] != "general"]
    verdicts = judge.verdict([case for _, case in judged])
    for (row, _), verdict in zip(judged, verdicts):
        row.update(vars(verdict) if verdict else {})
    if hasattr(judge, "ask"):  # only an endpoint can be asked
        from extras.benchmarks import label_request

        asked = []  # (row, judge.Request)
        for record, row, _ in answered:
            request = row["group"] != "own" and label_request(record, row["answer_text"])
            if request:
                asked.append((row, request))
        labels = judge.ask([request for _, request in asked])
        for (row, _), label in zip(asked, labels):
            row |= {"label": label, "label_asked": True}


def evaluate_rows(config, model, processor, judge, records, mode, path, rank, world, kept):
    """The rows of all records under one prompt mode: those in the file at `path`, and the others
    answered and judged, a share of each batch by every rank, and appended by the first one."""
    rows = {row["id"]: row for row in resume_jsonl(path)}
    left = [record for record in records if record.id not in rows]
    size = BATCH * world
    for start in tqdm(range(0, len(left), size), desc=path.stem, disable=rank > 0, leave=False):
        batch = left[start : start + size][rank::world]
        answered = answer_batch(config, model, processor, batch, mode, kept)
        judge_batch(judge, answered)
        require_judge(judge)
        new = sum(gather([row for _, row, _ in answered]), [])
        rows |= {row["id"]: row for row in new}
        if rank == 0:
            append_jsonl(path, new)
    return [rows[record.id] for record in records]


# ---- numbers -------------------------------------------------------------------------------------


def estimate(values):
    """{value, low, high, n}: the mean with its 95% percentile bootstrap interval over cases."""
    if not values:
        return plain(None, 0)
    tensor = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    means = tensor[draws].mean(dim=1)  # (RESAMPLES,)
    low = means.quantile(0.025).item()
    high = means.quantile(0.975).item()
    return {"value": tensor.mean().item(), "low": low, "high": high, "n": len(values)}


def plain(value, n):
    """A number without an interval, in the same form."""
    return {"value": value, "low": None, "high": None, "n": n}


def measure(rows):
    """Every metric of some rows, as estimates."""
    values = {}
    judged = [row for row in rows if row["safety"] is not None]
    for name in VERDICTS:
        values[name] = [row[name] == 3 for row in judged]
        values[f"{name}_mean"] = [row[name] for row in judged]
    asked_to_help = [row for row in rows if row["expected"] == "comply" and row["form"]]
    values["over_refusal"] = [row["form"] in DECLINES for row in asked_to_help]
    for name in ("legal", "calls", "finished"):
        values[name] = [row[name] for row in rows]
    values["unjudged"] = [row["safety"] is None for row in rows if row["group"] != "general"]
    values["unlabelled"] = [row["label"] is None for row in rows if row["label_asked"]]
    return {name: estimate(numbers) for name, numbers in values.items()}


def own_metrics(rows):
    """The own metrics of the rows' benchmark, its headline first; those made of several (F1) have
    no interval."""
    name = rows[0]["benchmark"]
    if rows[0]["group"] == "own" and all(row["answer"] is None for row in rows):
        return {}
    from extras import benchmarks

    lists = benchmarks.own_metric(name, rows)
    headline, _ = benchmarks.headline(name, lists)
    cells = {headline: plain(None, 0)}
    cells |= {metric: estimate(values) for metric, values in lists.items()}
    for metric, value in benchmarks.derived(name, lists).items():
        cells[metric] = plain(value, len(rows))
    return cells


def average(results, groups, n):
    """The unweighted mean over safety benchmarks and the sets of eval.jsonl; of benchmarks of
    general ability the mean of their headlines."""

    def mean_of(cells):
        values = [cell["value"] for cell in cells if cell["value"] is not None]
        return plain(mean(values) if values else None, len(values))

    # none of the rows over all benchmarks has a group
    safety = [row for row in results if groups.get(row["benchmark"]) in ("safety", "own")]
    general = [row for row in results if groups.get(row["benchmark"]) == "general"]
    row = {"benchmark": "average", "kind": "all", "n": n}
    for metric in measure([]):
        row[metric] = mean_of([each[metric] for each in safety])
    headlines = [next(iter(each["own"].values())) for each in general]
    row["own"] = {"general ability": mean_of(headlines)} if headlines else {}
    return row


def results_of(stage, mode, rows):
    """Rows of results.json: all cases, each kind of case, and, where there are several sets, each
    benchmark and their average."""
    groups = {row["benchmark"]: row["group"] for row in rows}
    alone = list(groups.values()) == ["own"]
    parts = {("all", "all"): rows}
    for kind in dict.fromkeys(row["kind"] for row in rows if row["kind"]):
        parts["all", kind] = [row for row in rows if row["kind"] == kind]
    for name in () if alone else groups:
        parts[name, "all"] = [row for row in rows if row["benchmark"] == name]
    results = []
    for (name, kind), part in parts.items():
        row = {"benchmark": name, "kind": kind, "n": len(part)} | measure(part)
        row["own"] = own_metrics(part) if alone or name != "all" else {}
        results.append(row)
    if not alone:
        results.append(average(results, groups, len(rows)))
    return [{"stage": stage, "prompt": mode} | row for row in results]


# ---- tables --------------------------------------------------------------------------------------


def percent(cell):
    """A share in percent, with its interval where it has one."""
    if cell["value"] is None:
        return "-"
    if cell["low"] is None:
        return f"{100 * cell['value']:.1f}"
    return f"{100 * cell['value']:.1f} [{100 * cell['low']:.0f}, {100 * cell['high']:.0f}]"


def shown_heads(results):
    """The heads of the columns: where refusals were told by a list of phrases, that is said."""
    if results and results[0].get("by_phrases"):
        return SHOWN | {"over_refusal": "over-refusal by phrases (heuristic)"}
    return SHOWN


def print_results(results):
    """A table for each prompt mode, and the benchmarks' own metrics."""
    heads = shown_heads(results)
    for mode in dict.fromkeys(row["prompt"] for row in results):
        lines = []
        own = []
        for row in results:
            if row["prompt"] != mode:
                continue
            name = row["kind"] if row["benchmark"] == "all" else row["benchmark"]
            cells = [percent(row[metric]) for metric in SHOWN]
            lines.append([row["stage"], name, row["n"], *cells])
            for metric, cell in row["own"].items():
                own.append([row["stage"], name, metric, percent(cell)])
        print(f"\n{mode} prompt: share of cases with the highest verdict, percent [95% interval]\n")
        print(markdown_table(["stage", "cases", "n", *heads.values()], lines))
        if own:
            print("\n" + markdown_table(["stage", "benchmark", "own metric", "percent"], own))
    for row in results:
        for metric, thing in (("unjudged", "verdict"), ("unlabelled", "label of their benchmark")):
            lost = row[metric]["value"]
            if lost and row["benchmark"] == row["kind"] == "all":
                print(f"{row['stage']}, {row['prompt']}: {lost:.1%} of the cases have no {thing}")


def read_results(folder):
    """results.json of a finished run."""
    path = Path(folder) / "results.json"
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        for row in rows:
            _ = [row[name] for name in ("stage", "prompt", "kind", *SHOWN)]
        return rows
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise StageError(
            f"{path}: missing, damaged or of another version ({error!r}); run eval.py"
        ) from error


def mean_and_spread(values):
    """`mean +- standard deviation` of shares, in percent; - where one is missing."""
    if None in values:
        return "-"
    spread = f" +- {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.1f}{spread}"


def print_means(folders):
    """Mean and standard deviation over runs, all cases."""
    if len(folders) < 2:
        raise StageError("python eval.py mean RUN RUN ...: expected two or more run folders")
    found = {}  # (stage, prompt) -> the row of each run that has it
    for folder in folders:
        for row in read_results(folder):
            if row["benchmark"] == row["kind"] == "all":
                found.setdefault((row["stage"], row["prompt"]), []).append(row)
    lines = []
    for key, rows in found.items():
        shares = [mean_and_spread([row[metric]["value"] for row in rows]) for metric in SHOWN]
        lines.append([*key, len(rows), *shares])
    print(markdown_table(["stage", "prompt", "runs", *SHOWN.values()], lines))


# ---- command line --------------------------------------------------------------------------------


def main(argv):
    """`mean RUN RUN ...`; or, by flags, answer and judge on all ranks, merging one adapter after
    the other. Rank 0 prints."""
    if argv[:1] == ["mean"]:
        return print_means(argv[1:])
    config = parse_config(argv)
    refuse_dry_run(config)
    records = []
    inputs = {}
    for name, members in read_sets(config).items():
        inputs[f"records {name}"] = records_fingerprint(members)
        if config.eval_limit:  # in a fixed random order
            members = random.Random(0).sample(members, len(members))[: config.eval_limit]
        records += members
    stages = ["base"]
    for stage in config.stages.split(","):
        if not adapter_path(config, stage).exists():
            print(f"eval: {stage} is not finished; its row is missing")
            break
        stages.append(stage)

    folder = Path(config.out) / "eval"
    modes = config.eval_prompts.split(",")
    device = pick_device(config)
    rank, world = join_ranks(device)
    judge = make_judge(config)
    if rank == 0:
        if config.judge != "toy":
            judge.preflight()
        lock_folder(folder)
    model, processor = load_policy(config, [], device)
    check_lengths(records, modes, processor, config.max_prompt, config.max_response)
    inputs |= stage_inputs(config, model, stages[1:])
    if rank == 0:
        guard(folder, config, "eval", inputs)
    gather(None)  # nobody reads rows before they are known to be of this run
    results = []
    kept = {}
    for stage in stages:
        if stage != "base":
            merge_stages(config, model, [stage])
        for mode in modes:
            rows = evaluate_rows(
                config,
                model,
                processor,
                judge,
                records,
                mode,
                folder / f"{stage}-{mode}.jsonl",
                rank,
                world,
                kept,
            )
            results += results_of(stage, mode, rows)
    for row in results:
        row["by_phrases"] = getattr(judge, "by_phrases", False)
    if world > 1:
        dist.destroy_process_group()
    if rank == 0:
        path = Path(config.out) / "results.json"
        write_text(path, json.dumps(results, indent=1) + "\n")
        print_results(results)
        print(f"\nresults: {path}, every response: {folder}/")


if __name__ == "__main__":
    run_command(main, DataError, StageError, qwen.ModelError, JudgeError)

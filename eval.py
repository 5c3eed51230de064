"""Evaluation: greedy answers to held-out cases and benchmarks, scored by the judge, in tables shaped like the paper's (PAPERS 1.7, 1.8).

    python eval.py --recipe tiny        evaluates base, SFT, DPO and GRPO, whichever are finished; writes out/tiny/results.json
    python eval.py --model folder-or-hub-name --out out/some --benchmarks pope,mssbench --bench_data my/benchmarks
    torchrun --nproc_per_node 8 eval.py --recipe 3b        the same on eight GPUs
    python eval.py mean out/tiny out/tiny-seed1 out/tiny-seed2        mean and spread over finished runs
    python eval.py side out/tiny out/tiny-vlm        finished runs side by side

The paper evaluates under a generic prompt that names no tool, so tool use must be internalised; its metric is the share of samples
that get the highest score, 3, in each dimension. The planned prompt stands beside it. Every prompt, response and verdict is written to
out/<run>/eval/<stage>-<prompt>.jsonl: answers first, verdicts after, so that an interruption or a dead judge costs no answer.
Departures: no repetition penalty (paper: 1.1), and a judge that fails leaves a sample out and is counted.
"""

import contextlib
import hashlib
import json
import os
import random
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from extras import benchmarks
import build
import data
import judge as judging
import model as modeling
import protocol
import rollout
from config import ConfigError, check_settings, parse_config, save_config
from trainer import StageError, base_folder, join_ranks, load_policy, lock_folder, make_judge, pick_device
from tables import group, mean_table, published_table, read_results, results_of, show, show_side, tell

# ---- records -------------------------------------------------------------------------------------


def read_all(config):
    """Records of eval.jsonl and of every benchmark named. Raises ConfigError, or DataError with the problems of all of them at once."""
    names = list(dict.fromkeys(filter(None, config.benchmarks.split(","))))
    if names and not config.bench_data:
        raise ConfigError(f"--benchmarks {config.benchmarks}: needs --bench_data, the folder with one folder per benchmark")
    path, records, problems = data.set_path(config.data or os.path.join(config.out, "data"), "eval"), [], []
    for name in names if names and not path.exists() else ["", *names]:
        try:
            if name:
                records += benchmarks.read_benchmark(name, os.path.join(config.bench_data, name), config.eval_limit)
            else:
                records += limit_records(data.read_records(path, "eval"), config.eval_limit)
                problems += [f"{record.where}: benchmark: {record.texts['benchmark']} is a name that the tables use; rename yours"
                             for record in records if record.texts["benchmark"] in (*benchmarks.BENCHMARKS, "all", "average")]
                problems += [f"{record.where}: answer: is neither one of the choices nor the letter of one" for record in records
                             if {"answer", "choices"} <= record.texts.keys() and record.texts["answer"] not in options(record)]
        except data.DataError as error:
            problems.append(str(error))
    counts = Counter(record.id for record in records)
    problems += [f"{record.where}: id: {record.id!r} stands there {counts[record.id]} times" for record in records if counts[record.id] > 1]
    if problems:
        raise data.DataError("\n".join(problems))
    return records


def options(record):
    """The choices of a record and their letters."""
    return *record.texts["choices"], *(chr(ord("A") + number) for number in range(len(record.texts["choices"])))


def limit_records(records, limit):
    """The first `limit` records of each benchmark, in a fixed random order; all of them for 0."""
    kept, counts = [], Counter()
    for record in random.Random(0).sample(records, len(records)) if limit else records:
        counts[record.texts["benchmark"]] += 1
        kept += [record] * (not limit or counts[record.texts["benchmark"]] <= limit)
    return kept


def asked(record):
    """The fields of a row that come from its record. An answer on disk stands for a record only as long as they are the same."""
    return json.loads(json.dumps({
        "id": record.id, "benchmark": record.texts.get("benchmark", ""), "kind": record.meta.get("kind", ""), "question": record.question,
        "plan": protocol.plan_to_dict(data.record_plan(record)), "expected": record.meta.get("expected"), "meta": record.meta,
        "answer": record.texts.get("answer"), "choices": record.texts.get("choices")}))  # as it will look when it is read from disk


# ---- answers -------------------------------------------------------------------------------------


def answer_records(config, model, processor, records, mode, path, about, title=None):
    """Greedy responses, appended to `path` a batch at a time: rows with `about`, prompt, response, and what the checker says."""
    cache, size = modeling.FeatureCache(1 << 28), config.rollout_rows
    with open(path, "a", encoding="utf-8") as file:
        for start in tqdm(range(0, len(records), size), desc=title, disable=title is None, leave=False, mininterval=1):
            batch = records[start : start + size]
            prompts = [data.record_prompt(record, mode, processor) for record in batch]
            features = modeling.encode_images(model, [image for prompt in prompts for image in prompt.images], cache)
            sampled = rollout.sample(model, prompts, features, 1, config.max_response, 0.0, processor.end_of_turn, [0] * len(prompts), size)
            for record, prompt, (sample,) in zip(batch, prompts, sampled):
                text = data.decode_response(sample.tokens, processor)
                check = protocol.check(text, data.shown_plan(record, mode))
                answer = text if check.answer is None else check.answer
                row = asked(record) | about | {
                    "images": list(record.images), "prompt": processor.tokenizer.decode(prompt.ids), "response": text,
                    "answer_text": answer, "finished": sample.finished, "calls": len(check.calls), "legal": check.legal,
                    "violations": [f"line {v.line}, {v.kind}: {v.message}" for v in check.violations], "form": judging.answer_form(answer)}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()


def finished_stages(config):
    """[(stage, hash of the adapters that it rests on)]: base, then the stages up to the first that is not finished."""
    stages, weights = [("base", "")], hashlib.sha256()
    for stage in config.stages.split(","):
        path = Path(config.out) / stage / "adapter.safetensors"
        if not path.exists():
            break
        weights.update(path.read_bytes())
        stages.append((stage, weights.hexdigest()[:16]))
    return stages


def known_rows(folder, stage, mode, weights, records):
    """Rows on disk, id -> row: answers first, judged rows over them.

    What counts as not answered, and is asked again: rows of other adapters, rows whose record reads otherwise today, and the half line
    at the end of an interrupted file. Rows of records that this run does not ask for are kept.
    """
    today, rows = {record.id: asked(record) for record in records}, {}
    for path in [*answer_files(folder, stage, mode), folder / f"{stage}-{mode}.jsonl"]:
        for row in build.read_rows(path, {"id", "weights"}) if path.exists() else []:
            if row["weights"] == weights and today.get(row["id"], {}).items() <= row.items():
                rows[row["id"]] = row
    return rows


def answer_files(folder, stage, mode):
    """The files of answers that wait for their verdicts, of any number of ranks."""
    return sorted(folder.glob(f"{stage}-{mode}.answers*.jsonl"))


def answer_all(config, records, folder, stages, modes, device, rank, world):
    """This rank's share of the answers, records rank, rank + world, ...: merging one adapter after the other, asking what no file holds."""
    left = {(stage, mode): [record for record in records[rank::world] if record.id not in known]
            for stage, weights in stages for mode in modes for known in [known_rows(folder, stage, mode, weights, records)]}
    if not any(left.values()):
        return
    model, processor = load_policy(config, [], device)
    for stage, weights in stages:
        if stage != "base":
            modeling.load_adapter(model, Path(config.out) / stage / "adapter.safetensors")
            modeling.merge_lora(model)
        for mode in modes:
            path = folder / (f"{stage}-{mode}.answers.jsonl" if world == 1 else f"{stage}-{mode}.answers-{rank}of{world}.jsonl")
            if path.exists():
                os.truncate(path, path.read_bytes().rfind(b"\n") + 1)  # a half line would spoil the next one
            title = None if rank else f"eval {stage} {mode}"
            answer_records(config, model, processor, left[stage, mode], mode, path, {"mode": mode, "weights": weights}, title)


# ---- verdicts ------------------------------------------------------------------------------------


def judge_rows(judge, pairs):
    """Add the three scores and the benchmark's own label to each row of (record, row): None where the judge failed, or has no such thing.

    Benchmarks of general ability get no verdict (they have answers). A label is asked for where the benchmark defines one.
    """
    questions = []
    for record, row in pairs:
        question = benchmarks.judge_question(row["benchmark"], record, row["answer_text"]) if group(row["benchmark"]) != "own" else None
        row |= {"safety": None, "helpfulness": None, "rigor": None, "label": None, "label_asked": question is not None}
        if question is not None and hasattr(judge, "chat"):  # toy oracle and labels cannot chat
            questions.append((record, row, question))
    graded = [] if isinstance(judge, judging.LabelsJudge) else [pair for pair in pairs if group(pair[1]["benchmark"]) != "general"]
    cases = [judging.Case(record.question, record.images, row["response"], record.meta) for record, row in graded]
    for (_, row), verdict in zip(graded, judge.verdict(cases) if cases else []):
        row |= {} if verdict is None else vars(verdict)
    if questions:
        with ThreadPoolExecutor(judge.threads) as pool:
            list(pool.map(lambda item: ask_label(judge, *item), questions))


def ask_label(judge, record, row, question):
    """Put the benchmark's own label of one answer into its row, unless the request failed or its reply holds none."""
    with contextlib.suppress(judging.Fault, OSError, ValueError):
        shown = record.images if benchmarks.QUESTIONS[row["benchmark"]].images else ()
        urls = [judging.image_data_url(path, judge.min_pixels, judge.max_pixels) for path in shown]
        row["label"] = benchmarks.parse_label(row["benchmark"], judge.chat([judging.user_message(question, urls)]))


def judge_all(config, judge, records, folder, stages, modes):
    """Join the answers of all ranks in the order of the records, have the new ones judged, write them; returns the result rows."""
    results = []
    for stage, weights in stages:
        for mode in modes:
            known = known_rows(folder, stage, mode, weights, records)
            missing = [record.id for record in records if record.id not in known]
            if missing:
                raise StageError(f"{len(missing)} answers of {stage} under the {mode} prompt are not in {folder}, {missing[0]} among them; "
                                 "ranks on several machines need one shared folder")
            rows = [known.pop(record.id) for record in records]
            new = [(record, row) for record, row in zip(records, rows) if "safety" not in row]
            if new:
                judge_rows(judge, new)
                data.write_jsonl(folder / f"{stage}-{mode}.jsonl", rows + list(known.values()))  # also those that this run does not ask for
            for path in answer_files(folder, stage, mode):
                path.unlink()
            results += results_of(stage, mode, rows, config.eval_bootstrap)
    return results


# ---- command line --------------------------------------------------------------------------------


def evaluate(config):
    """Answer on all ranks, judge and tell on the first."""
    folder, modes = Path(config.out) / "eval", list(dict.fromkeys(config.eval_prompts.split(",")))
    records = read_all(config)
    device = pick_device(config, int(os.environ.get("LOCAL_RANK", 0)))
    rank, world = join_ranks(device)
    check_settings(config, folder, "eval")  # an error if answers from other settings lie there
    stages = finished_stages(config)
    if rank == 0:
        processor = data.load_processor(base_folder(config), config.min_pixels, config.max_pixels)
        data.check_lengths(records, modes, processor, config.max_prompt, config.max_response)
        judge = make_judge(config)
        if config.judge == "endpoint":
            judge.preflight()
        lock_folder(folder)
        save_config(config, folder, "eval")
        for stage in config.stages.split(",")[len(stages) - 1 :]:
            print(f"eval: {stage} is not finished; its row is missing")
    folder.mkdir(parents=True, exist_ok=True)
    answer_all(config, records, folder, stages, modes, device, rank, world)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if rank:
        return
    results = judge_all(config, judge, records, folder, stages, modes)
    path = Path(config.out) / "results.json"
    part = path.with_name("results.json.part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    part.replace(path)
    show(results, "Held-out cases")
    about = "Published (not measured here; other judges, prompts, subsets and averages)"
    tell(f"{about}\n\n", published_table(config.recipe, config.benchmarks.split(",")))
    if config.judge == "labels":
        print("\nSafety, Helpfulness and Rigor are empty: labels give no verdicts. --judge endpoint does.")
    for name, what in (("unjudged", "verdict"), ("unlabelled", "label")):
        lost = [f"{row['stage']} {row['prompt']} {row[name]['value']:.1%}" for row in results
                if row["benchmark"] == row["kind"] == "all" and row[name]["value"]]
        tell(f"Cases that the judge gave no {what}; the numbers leave them out: ", ", ".join(lost))
    print(f"\nresults: {path}, every response: {folder}/")
    other = path.parent.with_name(path.parent.name.replace("-vlm", "", 1))
    if config.recipe.endswith("-vlm") and other != path.parent and (other / "results.json").exists():
        show_side([str(other), str(path.parent)])


def main(argv):
    """mean and side tell of finished runs; anything else is flags, and evaluates base and finished stages."""
    if argv[:1] in (["mean"], ["side"]) and len({os.path.realpath(folder) for folder in argv[1:]}) < max(2, len(argv) - 1):
        raise ConfigError(f"{argv[0]}: expected two or more run folders, each once, like out/tiny out/tiny-seed1")
    if argv[:1] == ["mean"]:
        for mode in dict.fromkeys(row["prompt"] for folder in argv[1:] for row in read_results(folder)):
            heading = f"Mean and standard deviation over {len(argv) - 1} runs under the {mode} prompt, in percent\n\n"
            tell(heading, mean_table(argv[1:], mode))
    elif argv[:1] == ["side"]:
        show_side(argv[1:])
    else:
        evaluate(parse_config(argv))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, ConfigError, data.DataError, StageError, modeling.ModelError, judging.JudgeError) as problem:
        sys.exit(str(problem))
    except KeyboardInterrupt:
        print("\neval: stopped; the same command goes on after the last answer that was written", file=sys.stderr)
        sys.exit(130)

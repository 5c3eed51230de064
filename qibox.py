"""QI-Box: which prompts GRPO trains on (SaFeR-VLM's data curation, PAPERS 2.2).

    python qibox.py score --recipe 3b-vlm                       the base model answers <data>/pool.jsonl, the judge grades the answers
    python qibox.py box   --recipe 3b-vlm [--against FILE ...]  the prompts inside the box: <out>/qibox/grpo.jsonl, table.md, scatter.svg
    python qibox.py       --recipe 3b-vlm                       both

The paper keeps a band of moderate quality with high instability over the answers of 7 models; its formulas and thresholds were not
found, so those below are ours. For more than one model type `score` again, with --model NAME and the same --out.
Reviewers of the paper object that it trains on a source of its test sets (PAPERS 2.7). So what shares an image, or a question asked
without one, with an evaluation set (eval.jsonl, --benchmarks, --against) is dropped before the box is drawn, and so are duplicates.
"""

import hashlib
import json
import math
import os
import random
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from extras import benchmarks
import build
import data
import judge as judging
import model as modeling
import protocol
import reward as rewarding
import rollout
import trainer
from config import ConfigError, parse_config, run_settings
from split import find_duplicates, find_overlap, image_hashes

BATCH = 64  # prompts sampled, graded and written together; a killed run loses at most these
ROUNDING = 1e-9  # a bound includes what lies on it, also where a mean was rounded
FATES = ("duplicate", "overlap: item", "overlap: image", "overlap: text", "no score", "below the band", "above the band", "too stable",
         "in the box")
# what the scores of two models must have in common to be compared, and a restart with its beginning
SCORING = ("seed", "qi_samples", "max_response", "temperature", "min_pixels", "max_pixels", "dtype", "judge", "JUDGE_MODEL",
           "weight_reasoning", "weight_logic", "weight_grounding", "weight_safety", "penalties")
BOXING = ("curate", "seed", "qi_by", "qi_low", "qi_high", "qi_unstable")


# ---- quality, instability, box -------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """Where one record lies."""

    quality: float  # Q, 0..1
    across: float  # disagreement of the models
    within: float  # spread of a model's repeats

    @property
    def instability(self):
        """U = sqrt(across^2 + within^2), 0..0.5: the standard deviation of a random model's random answer (law of total variance). Ours."""
        return math.hypot(self.across, self.within)


def given_scores(scores):
    """{model: [score or None]} -> one list of scores per model that has any. Raises ValueError when none has."""
    given = [[score for score in row if score is not None] for row in scores.values()]
    if not any(given):
        raise ValueError(f"no score from any of {len(scores)} model(s)")
    return [row for row in given if row]


def quality(scores):
    """Q of one record: the mean over models of each model's mean score. Ours, the natural reading of PAPERS 2.2.

    Args: scores: {model: [score 0..1, or None where the judge failed]}. Raises ValueError without a score.
    """
    return float(np.mean([np.mean(row) for row in given_scores(scores)]))


def instability(scores):
    """The two parts of U: (across, within). Ours; S3 in PAPERS 2.2 mentions both disagreement of models and instability of one model.

    across: population standard deviation of the models' means; within: root mean square over models of the population standard
    deviation of each one's repeats (squares, so that both parts add up to the total variance). Args and errors as of quality.
    """
    given = given_scores(scores)
    return float(np.std([np.mean(row) for row in given])), math.sqrt(np.mean([np.var(row) for row in given]))


def fate_of(point, bounds):
    """Where a point lies, one of FATES. bounds: (lowest Q, highest Q, lowest U), all inclusive."""
    if point.quality < bounds[0] - ROUNDING:
        return "below the band"
    if point.quality > bounds[1] + ROUNDING:
        return "above the band"
    return "in the box" if point.instability >= bounds[2] - ROUNDING else "too stable"


def box(points, by, low, high, unstable):
    """The records of moderate quality and high instability.

    Args: points: {id: Point}, not empty; by: "value" takes the three numbers as they are, "quantile" as quantiles of these points' Q, Q
    and U, each by itself, with linear interpolation. Returns ((lowest Q, highest Q, lowest U), ids inside, in order).
    """
    bounds = (low, high, unstable)
    if by == "quantile":
        qualities, instabilities = [point.quality for point in points.values()], [point.instability for point in points.values()]
        bounds = (*np.quantile(qualities, (low, high)).tolist(), float(np.quantile(instabilities, unstable)))
    return bounds, [name for name, point in points.items() if fate_of(point, bounds) == "in the box"]


# ---- scores --------------------------------------------------------------------------------------


def fingerprint(records):
    """Hash of all that the records say and show, wherever they lie."""
    told = [repr(replace(record, images=image_hashes(record), where="")) for record in records]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()


def read_json(path):
    """The one object of a file that write_jsonl wrote, {} where there is none. Raises DataError when it cannot be read."""
    try:
        found = json.loads(path.read_bytes()) if path.exists() else {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise data.DataError(f"{path}: damaged: expected one JSON object; delete it and what it stands beside: both are then made again")
    return found


def read_pool(config):
    """All records of pool.jsonl, and the ids of those that repeat an earlier one."""
    records = data.read_records(data.set_path(data_folder(config), "pool"), "grpo")
    return records, find_duplicates(records)


def data_folder(config):
    return config.data or os.path.join(config.out, "data")


def scores_about(config, records):
    """What a file of scores was made with; lies beside it as .json."""
    settings = run_settings(config)
    return {"model": config.model or "base", "pool": fingerprint(records)} | {name: settings[name] for name in SCORING if name in settings}


def changes(before, after):
    """Names whose values differ."""
    return ", ".join(name for name in after if before.get(name) != after[name])


def grade_batch(config, model, processor, judge, records, cache):
    """qi_samples answers to each record under the generic prompt, graded. Returns one row a record; None where the judge failed."""
    name = config.model or "base"
    prompts = [data.record_prompt(record, "generic", processor) for record in records]
    features = modeling.encode_images(model, [image for prompt in prompts for image in prompt.images], cache)
    seeds = [trainer.stable_hash("qibox", config.seed, name, record.id) for record in records]
    sampled = rollout.sample(model, prompts, features, config.qi_samples, config.max_response, config.temperature, processor.end_of_turn,
                             seeds, config.rollout_rows)
    texts = [[data.decode_response(sample.tokens, processor) for sample in samples] for samples in sampled]
    cases = [judging.Case(record.question, record.images, text, record.meta) for record, group in zip(records, texts) for text in group]
    rows, grades = [], iter(judge.grade(cases))
    for record in records:
        graded = [next(grades) for _ in range(config.qi_samples)]
        rewards = [rewarding.structured_reward(item, config.weight_reasoning, config.weight_logic, config.weight_grounding,
                                               config.weight_safety, config.penalties) for item in graded]
        rows.append({"id": record.id, "model": name, "scores": [None if reward is None else reward.total for reward in rewards],
                     "safe": [None if item is None else item.safe for item in graded]})
    return rows


def finished_scores(path, records):
    """The rows of whole batches on disk, without what a killed run left behind them: a restart then forms the same batches."""
    if not path.exists():
        return []
    rows = build.read_rows(path, {"id", "model", "scores"})
    if len(rows) < len(records):
        rows = rows[: len(rows) // BATCH * BATCH]
    if [row["id"] for row in rows] != [record.id for record in records[: len(rows)]]:
        raise data.DataError(f"{path}: its records are not those of the pool, in order; delete the file and score again")
    return rows


def score(config):
    """Sample, grade and write <out>/qibox/scores-<model>.jsonl, batch by batch. A second start goes on where the first was."""
    pool, duplicates = read_pool(config)
    records = [record for record in pool if record.id not in duplicates]  # one answer serves all copies
    path = Path(config.out) / "qibox" / f"scores-{(config.model or 'base').replace('/', '_')}.jsonl"
    about, beside = scores_about(config, records), path.with_suffix(".json")
    trainer.lock_folder(path.parent)
    changed = changes(read_json(beside), about)
    if path.exists() and changed:
        raise ConfigError(f"{path} was made with other settings ({changed}); choose another --out, or delete that file")
    rows = finished_scores(path, records)
    done, unscored = len(rows), 0
    if done == len(records):
        return print(f"qibox: {path} is there already, {done} records")
    judge, device = trainer.make_judge(config), trainer.pick_device(config, 0)
    if config.judge == "endpoint":
        judge.preflight()  # what is wrong with URL, key or model is told before the weights are loaded
    model, processor = trainer.load_policy(config, [], device)
    data.check_lengths(records, ["generic"], processor, config.max_prompt, config.max_response)
    data.write_jsonl(beside, [about])
    data.write_jsonl(path, rows)
    cache = modeling.FeatureCache(1 << 28)
    for start in tqdm(range(done, len(records), BATCH), desc="qibox: scoring", mininterval=1):
        rows = grade_batch(config, model, processor, judge, records[start : start + BATCH], cache)
        unscored += sum(row["scores"].count(None) for row in rows)
        with open(path, "a", encoding="utf-8") as file:  # appended: to write all anew after each batch is quadratic
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"qibox: {path}: {len(records) - done} records scored, {config.qi_samples} answers each, {unscored} of them without a score; "
          f"judge {dict(judge.counts)}")


def read_scores(config, records):
    """All scores-*.jsonl -> ({id: {model: [score or None]}}, what each file was made with).

    The files must agree with each other, not with the flags: an ablation draws its box from scores that were copied from another run.
    Raises DataError for a file that is unfinished, of another pool, or made otherwise than the first, and when there is none.
    """
    scores, abouts = {record.id: {} for record in records}, []
    for path in sorted((Path(config.out) / "qibox").glob("scores-*.jsonl")):
        about, rows = read_json(path.with_suffix(".json")), finished_scores(path, records)
        if len(rows) < len(records):
            raise data.DataError(f"{path} has {len(rows)} of {len(records)} records: run `python qibox.py score` with its flags to the end")
        changed = changes((abouts or [about])[0] | {"model": about.get("model"), "pool": fingerprint(records)}, about)
        if changed or not about:
            raise data.DataError(f"{path} was made with another {changed or 'pool (its .json is missing)'}; delete it and score again")
        abouts.append(about)
        for row in rows:
            scores[row["id"]][row["model"]] = row["scores"]
    if not abouts:
        raise data.DataError(f"{config.out}/qibox holds no scores: run `python qibox.py score` with the same flags first")
    return scores, abouts


# ---- the box -------------------------------------------------------------------------------------


def read_benchmarks(config, against):
    """The records of every evaluation set that the pool must not overlap. eval.jsonl may be absent only where another set is named."""
    path = data.set_path(data_folder(config), "eval")
    records = data.read_records(path, "eval") if path.exists() or not (config.benchmarks or against) else []
    for other in against:
        records += data.read_records(other, "eval")
    for name in filter(None, config.benchmarks.split(",")):
        records += benchmarks.read_benchmark(name, os.path.join(config.bench_data, name))
    return records


def curate(pool, duplicates, overlap, scores, config):
    """What becomes of every record.

    Args: scores: of read_scores; the quantiles are those of records that have a score and are neither duplicate nor overlap.
    Returns (rows, bounds): a row {id, fate, like, kind, unscored, quality, across, within, instability, kept} per record of the pool, in
    order; `like` is the record that it repeats; the four numbers are missing where a record has no place among the points.
    Raises DataError when nothing has a score or the box is empty.
    """
    fates = {name: ("duplicate", other) for name, other in duplicates.items()}
    fates |= {name: (f"overlap: {kind}", other) for name, (kind, other) in overlap.items() if name not in duplicates}
    candidates = {record.id: scores[record.id] for record in pool if record.id not in fates}
    points = {name: Point(quality(given), *instability(given)) for name, given in candidates.items()
              if any(score is not None for row in given.values() for score in row)}
    fates |= {name: ("no score", None) for name in candidates if name not in points}
    if not points:
        counts = dict(Counter(fate for fate, _ in fates.values()))
        raise data.DataError(f"none of {len(pool)} records has a score and is neither duplicate nor overlap: {counts}")
    bounds, kept = box(points, config.qi_by, config.qi_low, config.qi_high, config.qi_unstable)
    if not kept:
        most = max(point.instability for point in points.values())
        low, high = min(point.quality for point in points.values()), max(point.quality for point in points.values())
        raise data.DataError(f"no record lies inside the box ({bounds_text(bounds)}); quality goes from {low:.3f} to {high:.3f}, "
                             f"instability up to {most:.3f}: change --qi_low, --qi_high or --qi_unstable")
    if config.curate == "random":
        kept = random.Random(trainer.stable_hash("qibox", config.seed)).sample(list(points), len(kept))
    fates |= {name: (fate_of(point, bounds), None) for name, point in points.items()}
    rows, chosen = [], set(kept)
    for record in pool:
        fate, like = fates[record.id]
        row = {"id": record.id, "fate": fate, "like": like, "kind": record.meta.get("kind", "")}
        row["unscored"] = sum(given.count(None) for given in scores.get(record.id, {}).values())
        if record.id in points:
            point = points[record.id]
            row |= {"quality": point.quality, "across": point.across, "within": point.within, "instability": point.instability}
        rows.append(row | {"kept": record.id in chosen})
    return rows, bounds


def bounds_text(bounds):
    return f"quality from {bounds[0]:.3f} to {bounds[1]:.3f}, instability from {bounds[2]:.3f} on"


def table(rows, bounds, config, abouts):
    """Markdown: how many records met which fate, and the means of the scored and of the kept, over all and by kind."""
    names = [kind for kind in dict.fromkeys(row["kind"] for row in rows) if kind]
    kinds = [("all", rows)] + [(kind, [row for row in rows if row["kind"] == kind]) for kind in names]
    lines = [f"curate {config.curate}: {bounds_text(bounds)}, both ends included",
             f"(by {config.qi_by} {config.qi_low:g}, {config.qi_high:g}, {config.qi_unstable:g}). Scored by "
             f"{', '.join(about['model'] for about in abouts)}, {abouts[0]['qi_samples']} answers each; "
             f"{sum(row['unscored'] for row in rows)} answers without a score were left out.", "",
             "| records | " + " | ".join(kind for kind, _ in kinds) + " |", "|---|" + "---|" * len(kinds)]
    # every record has one fate, so the lines from duplicate to in the box add up to the pool
    counts = {"pool": [len(part) for _, part in kinds]}
    counts |= {fate: [sum(row["fate"] == fate for row in part) for _, part in kinds] for fate in FATES}
    counts["kept for GRPO"] = [sum(row["kept"] for row in part) for _, part in kinds]
    lines += [f"| {name} | " + " | ".join(map(str, numbers)) + " |" for name, numbers in counts.items()]
    lines += ["", "| mean | n | quality | instability | across models | within a model |", "|---|---|---|---|---|---|"]
    for kind, part in kinds:
        for name in ("scored", "kept"):
            chosen = [row for row in part if "quality" in row and (name == "scored" or row["kept"])]
            keys = ("quality", "instability", "across", "within")
            means = [f"{np.mean([row[key] for row in chosen]):.3f}" if chosen else "-" for key in keys]
            lines.append(f"| {name}, {kind} | {len(chosen)} | " + " | ".join(means) + " |")
    return "\n".join(lines) + "\n"


def scatter(rows, bounds):
    """SVG of quality (0..1, to the right) against instability (0..0.5, up) with the box. Points on one pixel are one dot."""
    left, top, width, height = 60, 40, 600, 360
    right, bottom = left + width, top + height
    x, y = lambda q: round(left + width * q), lambda u: round(bottom - 2 * height * u)
    dots = Counter((row["kept"], x(row["quality"]), y(row["instability"])) for row in rows if "quality" in row)
    title = f"kept (blue): {sum(row['kept'] for row in rows)} of {sum(dots.values())} scored; the box: {bounds_text(bounds)}"
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 690 450" font-family="sans-serif" font-size="12">',
             '<rect width="690" height="450" fill="white"/>', f'<text x="{left}" y="20">{title}</text>',
             f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="black"/>',
             f'<text x="{(left + right) // 2}" y="440" text-anchor="middle">quality Q</text>',
             f'<text transform="translate(16 {(top + bottom) // 2}) rotate(-90)" text-anchor="middle">instability U</text>']
    for tick in range(6):
        parts.append(f'<text x="{x(tick / 5)}" y="{bottom + 18}" text-anchor="middle">{tick / 5:g}</text>')
        parts.append(f'<text x="{left - 8}" y="{y(tick / 10) + 4}" text-anchor="end">{tick / 10:g}</text>')
    for (kept, across, up), count in sorted(dots.items()):  # the kept ones last, on top
        radius, colour = min(6, 2 + 2 * math.log10(count)), "#0072b2" if kept else "#b0b0b0"
        parts.append(f'<circle cx="{across}" cy="{up}" r="{radius:.1f}" fill="{colour}" fill-opacity="0.7"/>')
    low, high, ground = x(bounds[0]), x(bounds[1]), y(bounds[2])
    parts.append(f'<rect x="{low}" y="{top}" width="{high - low}" height="{ground - top}" fill="none" stroke="#d55e00" stroke-width="2"/>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def grpo_row(record, folder):
    """A record as a line of the grpo set in `folder`: image paths are relative to it."""
    images = [os.path.relpath(os.path.realpath(path), os.path.realpath(folder)) for path in record.images]
    row = {"id": record.id, "images": images, "question": record.question}
    return row | ({"plan": protocol.plan_to_dict(record.plan)} if record.plan else {}) | ({"meta": record.meta} if record.meta else {})


def draw_box(config, against):
    """Read pool, evaluation sets and scores; write grpo.jsonl, fates.jsonl, table.md and scatter.svg to <out>/qibox."""
    folder, (pool, duplicates), others = Path(config.out) / "qibox", read_pool(config), read_benchmarks(config, against)
    trainer.lock_folder(folder)
    scores, abouts = read_scores(config, [record for record in pool if record.id not in duplicates])
    settings, path = run_settings(config), folder / "grpo.jsonl"
    about = {"pool": fingerprint(pool), "against": fingerprint(others), "scores": hashlib.sha256(json.dumps(scores).encode()).hexdigest()}
    about |= {name: settings[name] for name in BOXING}
    if path.exists():
        changed = changes(read_json(folder / "box.json"), about)
        if changed:
            raise ConfigError(f"{path} was made with other input or settings ({changed}); choose another --out, or delete that file")
        return print(f"qibox: {path} is there already")
    rows, bounds = curate(pool, duplicates, find_overlap(pool, others), scores, config)
    (folder / "table.md").write_text(table(rows, bounds, config, abouts), encoding="utf-8")
    (folder / "scatter.svg").write_text(scatter(rows, bounds), encoding="utf-8")
    data.write_jsonl(folder / "fates.jsonl", rows)
    data.write_jsonl(folder / "box.json", [about])
    kept = {row["id"] for row in rows if row["kept"]}
    data.write_jsonl(path, [grpo_row(record, folder) for record in pool if record.id in kept])  # last: where it lies, all is there
    print(f"qibox: {path}: {len(kept)} of {len(pool)} records\n\n{(folder / 'table.md').read_text(encoding='utf-8')}")
    if bounds[2] <= ROUNDING:
        print("qibox: the instability bound is 0 and keeps out nothing: many records got equal scores; more --qi_samples tell them apart")


# ---- command line --------------------------------------------------------------------------------


def split_against(argv):
    """argv -> (argv without --against and its files, the files)."""
    if "--against" not in argv:
        return argv, []
    start = argv.index("--against")
    end = next((place for place in range(start + 1, len(argv)) if argv[place].startswith("--")), len(argv))
    if end == start + 1:
        raise ConfigError("--against: needs one file or more, each a set of the eval kind")
    return argv[:start] + argv[end:], argv[start + 1 : end]


def main(argv):
    """score, box, or both, from the flags."""
    word, argv = (argv[0], argv[1:]) if argv[:1] in (["score"], ["box"]) else ("", argv)
    argv, against = split_against(argv)
    if word == "score" and against:
        raise ConfigError("--against is for the box: score grades the whole pool")
    config = parse_config(argv)
    if config.curate == "none":
        return print(f"qibox: --curate none: nothing is curated, GRPO trains on all of {data.set_path(data_folder(config), 'grpo')}")
    if word != "box":
        score(config)
    if word != "score":
        draw_box(config, against)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, ConfigError, data.DataError, trainer.StageError, modeling.ModelError, judging.JudgeError) as problem:
        sys.exit(str(problem))
    except KeyboardInterrupt:
        print("\nqibox: stopped; the same command goes on after the last batch that was written", file=sys.stderr)
        sys.exit(130)

"""QI-Box: which prompts GRPO trains on (SaFeR-VLM's data curation, PAPERS 2.2).

    python qibox.py score --recipe 3b-vlm      the base answers <data>/pool.jsonl, the judge grades
    python qibox.py box   --recipe 3b-vlm [--against FILE ...]     the prompts inside the box
    python qibox.py       --recipe 3b-vlm      both

The paper keeps a band of moderate quality with high instability over the answers of 7 models; its
formulas and thresholds were not found, so those below are ours. For more than one model type
`score` again, with --model NAME and the same --out.

Reviewers of the paper object that it trains on a source of its test sets (PAPERS 2.7). So what
shares an image, or a question asked without one, with an evaluation set (eval.jsonl, --benchmarks,
--against) is dropped before the box is drawn, and so are duplicates. Images are compared by exact
pixels.

Writes to <out>/qibox: scores-<model>.jsonl, status.jsonl (a row a record), table.md, grpo.jsonl.
"""

import argparse
import hashlib
import os
import random
import sys
import unicodedata
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import PIL.Image
from tqdm import tqdm

import model as qwen
import protocol
from config import ConfigError, guard, parse_config, write_text
from data import (
    DataError,
    append_jsonl,
    check_lengths,
    decode_response,
    markdown_table,
    read_jsonl,
    read_records,
    record_prompt,
    records_fingerprint,
    resume_jsonl,
    set_path,
    write_jsonl,
)
from judge import Case, JudgeError
from reward import structured_reward
from rollout import sample
from trainer import (
    StageError,
    load_policy,
    lock_folder,
    make_judge,
    pick_device,
    stable_hash,
    weights_fingerprint,
)

BATCH = 64  # prompts sampled, graded and written together
ROUNDING = 1e-9  # a bound includes what lies on it, also where a mean was rounded


# ---- quality and instability ---------------------------------------------------------------------


def quality(scores):
    """Q of one record, 0..1: the mean over models of each model's mean score. Ours, the natural
    reading of PAPERS 2.2. scores: {model: [score 0..1, at least one]}."""
    return float(np.mean([np.mean(row) for row in scores.values()]))


def instability(scores):
    """U of one record, 0..0.5: the standard deviation of a random model's random answer.

        U^2 = variance of the models' means + mean variance of a model's repeats

    Ours (law of total variance); PAPERS 2.2 (S3) mentions both disagreement of models and
    instability of one model. scores: as in quality.
    """
    across = np.var([np.mean(row) for row in scores.values()])
    within = np.mean([np.var(row) for row in scores.values()])
    return float(np.sqrt(across + within))


# ---- what is the same item -----------------------------------------------------------------------


def normalized(text):
    """A text without case, punctuation and invisible characters, single-spaced: the same
    question."""
    marks = []
    for mark in unicodedata.normalize("NFKC", text).casefold():
        kind = unicodedata.category(mark)
        if kind[0] in "PZ" or kind == "Cc":  # punctuation, space, control
            marks.append(" ")
        elif kind != "Cf":  # invisible
            marks.append(mark)
    return " ".join("".join(marks).split()) or text  # marks alone stay as they are


@cache  # a picture is often in several records
def image_hash(path):
    """Hash of an image's size and RGB pixels: a resized or recompressed copy is another image."""
    with PIL.Image.open(path) as file:
        picture = file.convert("RGB")
    return hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()


def find_duplicates(records):
    """{id: id of the first record with the same question and the same images}."""
    first = {}
    duplicates = {}
    for record in records:
        key = (normalized(record.question), *map(image_hash, record.images))
        original = first.setdefault(key, record.id)
        if original != record.id:
            duplicates[record.id] = original
    return duplicates


def find_overlap(records, others):
    """{id: "image" or "text"} of the records that an evaluation set gives away.

    image: an image is the same; text: the record has no image and its question is the same. An
    equal question about another image is no overlap.
    """
    images = {image_hash(path) for other in others for path in other.images}
    texts = {normalized(other.question) for other in others}
    overlap = {}
    for record in records:
        if not images.isdisjoint(map(image_hash, record.images)):
            overlap[record.id] = "image"
        elif not record.images and normalized(record.question) in texts:
            overlap[record.id] = "text"
    return overlap


# ---- scores --------------------------------------------------------------------------------------


def data_folder(config):
    return config.data or os.path.join(config.out, "data")


def read_pool(config):
    return read_records(set_path(data_folder(config), "pool"), "grpo")


def grade_batch(config, model, processor, judge, records):
    """{id, model, scores, safe} per record: qi_samples answers under the generic prompt, graded."""
    name = config.model or "base"
    prompts = [record_prompt(record, "generic", processor) for record in records]
    features = qwen.encode_images(model, [image for prompt in prompts for image in prompt.images])
    seeds = [stable_hash("qibox", config.seed, name, record.id) for record in records]
    sampled = sample(
        model,
        prompts,
        features,
        config.qi_samples,
        config.max_response,
        config.temperature,
        processor.end_of_turn,
        seeds,
        config.rollout_rows,
    )
    cases = []
    for record, samples in zip(records, sampled):
        for response in samples:
            check = protocol.check(decode_response(response.tokens, processor))
            cases.append(Case(record.question, record.images, check, record.meta))
    grades = iter(judge.grade(cases))
    rows = []
    for record in records:
        row = {"id": record.id, "model": name, "scores": [], "safe": []}
        for _ in range(config.qi_samples):
            grade = next(grades)
            reward = structured_reward(
                grade,
                config.weight_reasoning,
                config.weight_logic,
                config.weight_grounding,
                config.weight_safety,
                config.penalties,
            )
            row["scores"].append(reward and reward.total)  # None where the judge failed
            row["safe"].append(grade and grade.safe)
        rows.append(row)
    return rows


def score(config):
    """Append a row for every record of the pool that has none to scores-<model>.jsonl."""
    folder = Path(config.out) / "qibox"
    name = config.model or "base"
    pool = read_pool(config)
    lock_folder(folder)
    path = folder / f"scores-{name.replace('/', '_')}.jsonl"
    done = {row["id"] for row in resume_jsonl(path)}
    records = [record for record in pool if record.id not in done]
    if not records:
        return print(f"qibox: {path} is there already, {len(done)} records")
    judge = make_judge(config)
    if config.judge == "endpoint":
        judge.preflight()
    model, processor = load_policy(config, [], pick_device(config))
    check_lengths(records, ["generic"], processor, config.max_prompt, config.max_response)
    inputs = {"pool": records_fingerprint(pool), f"weights of {name}": weights_fingerprint(model)}
    guard(folder, config, "qibox", inputs)
    for start in tqdm(range(0, len(records), BATCH), desc="qibox: scoring", mininterval=1):
        batch = records[start : start + BATCH]
        append_jsonl(path, grade_batch(config, model, processor, judge, batch))
    print(f"qibox: {path}: {len(records)} records scored; judge {dict(judge.counts)}")


def read_scores(config):
    """({id: {model: [score]}}, how many answers have none) of all scores-*.jsonl."""
    folder = Path(config.out) / "qibox"
    scores = {}
    lost = 0
    for path in sorted(folder.glob("scores-*.jsonl")):
        for row in read_jsonl(path):
            given = [value for value in row["scores"] if value is not None]
            lost += len(row["scores"]) - len(given)
            if given:
                scores.setdefault(row["id"], {})[row["model"]] = given
    if not scores:
        raise DataError(f"{folder} has no scores: run `python qibox.py score` with the same flags")
    return scores, lost


# ---- the box -------------------------------------------------------------------------------------


def read_held_out(config, against):
    """The records of every evaluation set that the pool must not overlap."""
    path = set_path(data_folder(config), "eval")
    records = []
    if path.exists() or not (config.benchmarks or against):
        records = read_records(path, "eval")
    for other in against:
        records += read_records(other, "eval")
    if config.benchmarks:
        from extras.benchmarks import read_benchmark

        for name in config.benchmarks.split(","):
            records += read_benchmark(name, os.path.join(config.bench_data, name))
    return records


def place(q, u, bounds):
    """Where a record lies; bounds: (lowest Q, highest Q, lowest U), all inclusive."""
    low, high, unstable = bounds
    if q < low - ROUNDING:
        return "below the band"
    if q > high + ROUNDING:
        return "above the band"
    return "in the box" if u >= unstable - ROUNDING else "too stable"


def curate(pool, status, scores, config):
    """What becomes of every record.

    Args: status: {id: why} of those that are dropped before the box is drawn; scores: of
    read_scores. The bounds are quantiles over the others that have a score.
    Returns (rows, bounds): a row {id, kind, status, quality, instability, kept} per record, in
    order.
    Raises DataError when nothing has a score or the box is empty.
    """
    points = {}
    for record in pool:
        if record.id not in status and record.id in scores:
            row = scores[record.id]
            points[record.id] = (quality(row), instability(row))
    if not points:
        raise DataError(f"none of {len(pool)} records has a score and may be kept")
    qualities, instabilities = zip(*points.values())
    low, high = np.quantile(qualities, (config.qi_low, config.qi_high))
    bounds = (low, high, np.quantile(instabilities, config.qi_unstable))
    inside = [name for name, point in points.items() if place(*point, bounds) == "in the box"]
    if not inside:
        raise DataError(f"no record is in the box ({box_text(bounds)}): change the --qi_ flags")
    kept = set(inside)
    if config.curate == "random":  # the ablation: as many, at random
        rng = random.Random(stable_hash("qibox", config.seed))
        kept = set(rng.sample(list(points), len(inside)))
    rows = []
    for record in pool:
        q, u = points.get(record.id, (None, None))
        why = status.get(record.id, "no score") if q is None else place(q, u, bounds)
        row = {"id": record.id, "kind": record.meta.get("kind", ""), "status": why}
        rows.append(row | {"quality": q, "instability": u, "kept": record.id in kept})
    return rows, bounds


def box_text(bounds):
    low, high, unstable = bounds
    return f"quality from {low:.3f} to {high:.3f}, instability from {unstable:.3f} on"


def status_table(rows, bounds, lost):
    """Markdown: how many records have which status, by kind; the lines add up to the pool."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    statuses = list(dict.fromkeys(row["status"] for row in rows))
    counts = Counter((row["status"], row["kind"]) for row in rows)
    counts += Counter(("kept for GRPO", row["kind"]) for row in rows if row["kept"])
    lines = []
    for status in [*statuses, "kept for GRPO"]:
        numbers = [counts[status, kind] for kind in kinds]
        lines.append([status, *numbers, sum(numbers)])
    table = markdown_table(["status", *kinds, "all"], lines)
    return f"{box_text(bounds)}; {lost} answers have no score\n\n{table}\n"


def draw_box(config, against):
    """Read pool, evaluation sets and scores; write grpo.jsonl, status.jsonl and table.md."""
    folder = Path(config.out) / "qibox"
    path = folder / "grpo.jsonl"
    pool = read_pool(config)
    held_out = read_held_out(config, against)
    lock_folder(folder)
    inputs = {"pool": records_fingerprint(pool), "held out": records_fingerprint(held_out)}
    guard(folder, config, "qibox", inputs)
    if path.exists():
        return print(f"qibox: {path} is there already")
    status = dict.fromkeys(find_duplicates(pool), "duplicate")
    for name, kind in find_overlap(pool, held_out).items():
        status.setdefault(name, f"overlap: {kind}")
    scores, lost = read_scores(config)
    rows, bounds = curate(pool, status, scores, config)
    table = status_table(rows, bounds, lost)
    write_text(folder / "table.md", table)
    write_jsonl(folder / "status.jsonl", rows)
    kept = {row["id"] for row in rows if row["kept"]}
    prompts = []
    for record in pool:
        if record.id in kept:
            images = [os.path.relpath(image, folder) for image in record.images]
            row = {"id": record.id, "images": images, "question": record.question}
            if record.plan:
                row["plan"] = protocol.plan_to_dict(record.plan)
            prompts.append(row | {"meta": record.meta})
    write_jsonl(path, prompts)  # last: where it is, all is there
    print(f"qibox: {path}: {len(prompts)} of {len(pool)} records\n\n{table}")


def main(argv):
    """score, box, or both, from the flags."""
    words = [word for word in argv[:1] if word in ("score", "box")]
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--against", nargs="+", default=[], metavar="FILE")
    known, flags = parser.parse_known_args(argv[len(words) :])
    config = parse_config(flags)
    if config.curate == "none":
        return print("qibox: --curate none: nothing is curated, GRPO trains on all prompts")
    if words != ["box"]:
        score(config)
    if words != ["score"]:
        draw_box(config, known.against)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, ConfigError, DataError, StageError, qwen.ModelError, JudgeError) as problem:
        sys.exit(str(problem))
    except KeyboardInterrupt:
        print("qibox: stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)

"""QI-Box: which prompts GRPO trains on (SaFeR-VLM's data curation, PAPERS 2.2).

    python qibox.py score --recipe 3b-vlm      the base answers <data>/pool.jsonl, the judge grades
    python qibox.py box   --recipe 3b-vlm [--against FILE ...]     the prompts inside the box
    python qibox.py       --recipe 3b-vlm      both
    python qibox.py --recipe 3b-vlm --scorers NAME ...     these models answer and are graded, too

The paper keeps a band of moderate quality with high instability over the answers of 7 models; its
formulas and thresholds were not found, so those below are ours.

Reviewers of the paper object that it trains on a source of its test sets (PAPERS 2.7). So what
shares an image, or a question asked without one, with an evaluation set (eval.jsonl, --benchmarks,
--against) is dropped before the box is drawn, and so are duplicates. Images are compared by exact
pixels.

Writes to <out>/qibox: scores-<model>.jsonl, status.jsonl (a row a record), table.md, grpo.jsonl.
"""

import argparse
import dataclasses
import hashlib
import os
import random
import unicodedata
from functools import cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

import model as qwen
from config import guard, open_image, parse_config, run_command, write_text
from data import (
    DataError,
    append_jsonl,
    check_lengths,
    markdown_table,
    read_jsonl,
    read_records,
    record_prompt,
    records_fingerprint,
    resume_jsonl,
    set_path,
    write_jsonl,
)
from eval import read_sets
from judge import Case, JudgeError
from reward import structured_reward
from rollout import in_order, respond
from trainer import (
    StageError,
    load_policy,
    lock_folder,
    make_judge,
    pick_device,
    require_judge,
    stable_hash,
    weights_fingerprint,
)

BATCH = 64  # prompts sampled, graded and written together
SCORE = "run `python qibox.py score` with the same flags"
ROUNDING = 1e-9  # a bound includes what lies on it, also where a mean was rounded


# ---- quality and instability ---------------------------------------------------------------------


def quality(scores):
    """Q of one record, 0..1: the mean over models of each model's mean score. Ours, the natural
    reading of PAPERS 2.2. scores: {model: [score 0..1, at least one]}."""
    return float(np.mean([np.mean(row) for row in scores.values()]))


def instability(scores):
    """U of one record, 0..0.5: the standard deviation of a random model's random answer.

        U^2 = variance of the models' means + mean variance of a model's repeats

    With one model U is the spread of its repeats. Ours (law of total variance); PAPERS 2.2 (S3)
    mentions both disagreement of models and instability of one model. scores: as in quality.
    """
    across = np.var([np.mean(row) for row in scores.values()])
    within = np.mean([np.var(row) for row in scores.values()])
    return float(np.sqrt(across + within))


# ---- what is the same item -----------------------------------------------------------------------


def normalized(text):
    """A text without case, punctuation and control characters, single-spaced: the same question."""
    marks = []
    for mark in unicodedata.normalize("NFKC", text).casefold():
        kind = unicodedata.category(mark)
        if kind != "Cf":  # a zero-width sign separates nothing
            marks.append(" " if kind[0] in "PZC" else mark)
    return " ".join("".join(marks).split()) or text  # marks alone stay as they are


@cache  # a picture is often in several records
def image_hash(path):
    """Hash of an image's size and RGB pixels: a resized or recompressed copy is another image."""
    picture = open_image(path)
    return hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()


def find_copies(pool, held_out):
    """{id: why} of the records that are dropped before the box is drawn.

    duplicate: question and images are those of a record before it. overlap: image: the evaluation
    has one of its images. overlap: text: it has no image, and the evaluation asks its question; an
    equal question about another image is no overlap.
    """
    texts = {normalized(record.question) for record in held_out}
    images = set()
    for record in held_out:
        images.update(map(image_hash, record.images))
    seen = set()
    copies = {}
    for record in pool:
        text = normalized(record.question)
        hashes = tuple(map(image_hash, record.images))
        if (text, hashes) in seen:
            copies[record.id] = "duplicate"
        elif not images.isdisjoint(hashes):
            copies[record.id] = "overlap: image"
        elif not hashes and text in texts:
            copies[record.id] = "overlap: text"
        seen.add((text, hashes))
    return copies


# ---- scores --------------------------------------------------------------------------------------


def grade_batch(config, model, processor, judge, records):
    """{id, model, scores} per record: qi_samples answers under the generic prompt, graded. A score
    is None where the judge failed."""
    name = config.model or "base"
    prompts = [record_prompt(record, "generic", processor) for record in records]
    features = qwen.encode_images(model, sum([prompt.images for prompt in prompts], ()))
    sampled = respond(
        config,
        model,
        processor,
        prompts,
        [None] * len(prompts),  # no plan is shown
        features,
        config.qi_samples,
        config.temperature,
        [stable_hash("qibox", config.seed, name, record.id) for record in records],
    )
    rows = [{"id": record.id, "model": name, "scores": []} for record in records]
    cases = []
    scores = []  # of each case, the list in its row
    for record, row, items in zip(records, rows, in_order(sampled, prompts, config.qi_samples)):
        for item in items:
            cases.append(Case(record.question, record.images, item.check, record.meta))
            scores.append(row["scores"])
    for own, grade in zip(scores, judge.grade(cases)):
        reward = structured_reward(
            grade,
            config.weight_reasoning,
            config.weight_logic,
            config.weight_grounding,
            config.weight_safety,
            config.penalties,
            gate=False,  # a record's quality is the formula as it was found
        )
        own.append(reward and reward.total)
    return rows


def score(config, folder, pool):
    """Append a row for every record of the pool that has none to scores-<model>.jsonl."""
    name = config.model or "base"
    path = folder / f"scores-{name.replace('/', '_')}.jsonl"
    done = {row["id"] for row in resume_jsonl(path)}
    records = [record for record in pool if record.id not in done]
    if not records:
        return print(f"qibox: {path} is there already, {len(done)} records")
    judge = make_judge(config)
    if config.judge != "toy":
        judge.preflight()
    model, processor = load_policy(config, [], pick_device(config))
    check_lengths(records, ["generic"], processor, config.max_prompt, config.max_response)
    inputs = {"pool": records_fingerprint(pool), f"weights of {name}": weights_fingerprint(model)}
    guard(folder, config, "qibox", inputs)
    for start in tqdm(range(0, len(records), BATCH), desc="qibox: scoring", mininterval=1):
        batch = records[start : start + BATCH]
        rows = grade_batch(config, model, processor, judge, batch)
        require_judge(judge)
        append_jsonl(path, rows)
    print(f"qibox: {path}: {len(records)} records scored; judge {dict(judge.counts)}")


def read_scores(folder, pool):
    """({id: {model: [score]}}, how many answers have none) of all scores-*.jsonl.

    Raises DataError where one is not of exactly the pool's records.
    """
    ids = sorted(record.id for record in pool)
    scores = {}
    lost = 0
    for path in sorted(folder.glob("scores-*.jsonl")):
        rows = read_jsonl(path)
        if sorted(row["id"] for row in rows) != ids:
            raise DataError(f"{path} has {len(rows)} of {len(pool)} records: {SCORE}")
        for row in rows:
            given = [value for value in row["scores"] if value is not None]
            lost += len(row["scores"]) - len(given)
            if given:
                scores.setdefault(row["id"], {})[row["model"]] = given
    return scores, lost


# ---- the box -------------------------------------------------------------------------------------


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
    for name, row in scores.items():
        if name not in status:
            points[name] = (quality(row), instability(row))
    if not points:
        raise DataError(f"none of {len(pool)} records has a score and may be kept: {SCORE}")
    qualities, instabilities = zip(*points.values())
    band = np.quantile(qualities, (config.qi_low, config.qi_high))
    bounds = (*band, np.quantile(instabilities, config.qi_unstable))
    places = {name: place(*point, bounds) for name, point in points.items()}
    kept = {name for name, where in places.items() if where == "in the box"}
    if not kept:
        raise DataError(f"no record is in the box ({box_text(bounds)}): change the --qi_ flags")
    if config.curate == "random":  # the ablation: as many, at random
        rng = random.Random(stable_hash("qibox", config.seed))
        kept = set(rng.sample(list(points), len(kept)))
    status = places | status
    rows = []
    for record in pool:
        q, u = points.get(record.id, (None, None))
        row = {
            "id": record.id,
            "kind": record.meta.get("kind", ""),
            "status": status.get(record.id, "no score"),
            "quality": q,
            "instability": u,
            "kept": record.id in kept,
        }
        rows.append(row)
    return rows, bounds


def box_text(bounds):
    low, high, unstable = bounds
    return f"quality from {low:.3f} to {high:.3f}, instability from {unstable:.3f} on"


def status_table(rows, bounds, lost):
    """Markdown: how many records have which status, by kind; the lines add up to the pool."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    found = {}  # status -> the kind of each record that has it
    for row in rows:
        found.setdefault(row["status"], []).append(row["kind"])
    found["kept for GRPO"] = [row["kind"] for row in rows if row["kept"]]
    lines = [[status, *map(own.count, kinds), len(own)] for status, own in found.items()]
    table = markdown_table(["status", *kinds, "all"], lines)
    return f"{box_text(bounds)}; {lost} answers have no score\n\n{table}\n"


def record_row(record, folder):
    """A record as a row of a set in this folder."""
    return {
        "id": record.id,
        "images": [os.path.relpath(path, folder) for path in record.images],
        "question": record.question,
        "plan": record.plan and vars(record.plan),
        "meta": record.meta,
    }


def draw_box(config, folder, pool, held_out):
    """Write table.md, status.jsonl and grpo.jsonl; again where they are, since one more model may
    have been scored."""
    inputs = {"pool": records_fingerprint(pool), "held out": records_fingerprint(held_out)}
    guard(folder, config, "qibox", inputs)
    scores, lost = read_scores(folder, pool)
    rows, bounds = curate(pool, find_copies(pool, held_out), scores, config)
    table = status_table(rows, bounds, lost)
    write_text(folder / "table.md", table)
    write_jsonl(folder / "status.jsonl", rows)
    kept = [record_row(record, folder) for record, row in zip(pool, rows) if row["kept"]]
    write_jsonl(folder / "grpo.jsonl", kept)  # last: where it is, all is there
    print(f"qibox: {folder}/grpo.jsonl: {len(kept)} of {len(pool)} records\n\n{table}")


def main(argv):
    """score, box, or both, from the flags."""
    words = [word for word in argv[:1] if word in ("score", "box")]
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--against", nargs="+", default=[])
    parser.add_argument("--scorers", nargs="*", default=[])
    known, flags = parser.parse_known_args(argv[len(words) :])
    config = parse_config(flags)
    if config.curate == "none":
        return print("qibox: --curate none: nothing is curated, GRPO trains on all prompts")
    folder = Path(config.out) / "qibox"
    source = config.data or os.path.join(config.out, "data")
    pool = read_records(set_path(source, "pool"), "grpo")
    held_out = sum(read_sets(config).values(), [])  # nothing of it may be trained on
    for path in known.against:
        held_out += read_records(path, "eval")
    lock_folder(folder)
    if words != ["box"]:
        for name in (config.model, *known.scorers):
            score(dataclasses.replace(config, model=name), folder, pool)
    if words != ["score"]:
        draw_box(config, folder, pool, held_out)


if __name__ == "__main__":
    run_command(main, DataError, StageError, qwen.ModelError, JudgeError)

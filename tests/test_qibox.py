"""QI-Box: quality, instability and the box by hand; copies; scoring that survives a kill; the
curated set on disk."""

import json
import math
import shutil
import statistics
import sys
from collections import Counter
from hashlib import sha256
from pathlib import Path

import PIL.Image
import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data  # noqa: E402
import judge  # noqa: E402
import qibox  # noqa: E402
from config import ConfigError, parse_config  # noqa: E402
from data import Record  # noqa: E402
from extras import toy_base  # noqa: E402

# ---- the numbers ---------------------------------------------------------------------------------


def test_quality_and_instability_by_hand():
    """Means .3 and .8, variances .01 and 0. Guards: a mean over all samples, where the model with
    more scores weighs more; a spread of models or of repeats that is left out."""
    scores = {"a": [0.2, 0.4], "b": [0.8]}
    assert qibox.quality(scores) == pytest.approx(0.55)
    assert qibox.instability(scores) == pytest.approx(math.sqrt(0.25**2 + 0.005))
    assert qibox.instability({"a": [0.2, 0.6]}) == pytest.approx(0.2)
    assert qibox.instability({"a": [0.2], "b": [0.6]}) == pytest.approx(0.2)


def test_instability_is_the_total_deviation():
    """With as many answers from each model, U is the deviation of all scores, at most 0.5. Guards:
    parts that are summed, a sample deviation."""
    scores = {"a": [0.1, 0.9, 0.4], "b": [0.3, 0.35, 0.2], "c": [1.0, 0.0, 1.0]}
    together = statistics.pstdev(sum(scores.values(), []))
    assert qibox.instability(scores) == pytest.approx(together)
    assert qibox.instability({"a": [0.0, 1.0], "b": [1.0, 0.0]}) == pytest.approx(0.5)


def test_the_box_includes_its_borders():
    """Guards: a strict comparison, and a border that is missed because 0.1 + 0.2 is not 0.3."""
    bounds = (0.1 + 0.2, 0.7, 0.1 + 0.2)
    points = {
        (0.3, 0.5): "in the box",
        (0.7, 0.3): "in the box",
        (0.299, 0.5): "below the band",
        (0.701, 0.5): "above the band",
        (0.5, 0.299): "too stable",
    }
    assert {point: qibox.place(*point, bounds) for point in points} == points


# ---- copies --------------------------------------------------------------------------------------


def picture(folder, name, color, size=(28, 28)):
    folder.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", size, color).save(folder / name)
    return str(folder / name)


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("  How do I\nopen THIS?! ", "how do i open this", True),
        ("o\u200bpen \uff34his", "open this", True),  # invisible; full width
        ("don\u2019t", "don't", True),
        ("knife,fork", "knife fork", True),
        ("knife,fork", "knifefork", False),
        ("2+3", "2-3", False),
        ("\u0915\u093f", "\u0915\u0940", False),  # vowel signs are no punctuation
        ("???", "!", False),
    ],
)
def test_the_same_question(one, other, same):
    """Guards: two questions taken for one, of which training loses one; a spelling that hides a
    repeated question."""
    assert (qibox.normalized(one) == qibox.normalized(other)) == same


def test_image_hash_is_of_pixels(tmp_path):
    """Guards: a hash of the file, which a second format or a palette escapes; one that forgets the
    size; one that is too coarse."""
    red = qibox.image_hash(picture(tmp_path, "a.png", "red"))
    PIL.Image.open(tmp_path / "a.png").convert("P").save(tmp_path / "palette.png")
    assert qibox.image_hash(picture(tmp_path, "a.bmp", "red")) == red
    assert qibox.image_hash(str(tmp_path / "palette.png")) == red
    assert qibox.image_hash(picture(tmp_path, "b.png", (254, 0, 0))) != red
    assert qibox.image_hash(picture(tmp_path, "wide.png", "red", (56, 14))) != red


def test_copies(tmp_path):
    """Guards: a test item that is trained on; the later of two equal records kept; one question
    about many pictures (all of the miniature world) taken for one record."""
    red, blue, green = (picture(tmp_path, f"{name}.png", name) for name in ("red", "blue", "green"))
    again = picture(tmp_path, "again.bmp", "green")
    tested = [Record("t1", "What is it?", (red,)), Record("t2", "Where?", (blue, red))]
    tested.append(Record("t3", "Why?"))
    pool = [
        Record("image", "Who?", (green, blue)),
        Record("item", "what is it", (red,)),
        Record("other picture", "What is it?", (green,)),
        Record("copy", "what is IT", (again,)),
        Record("other question", "Who?", (green,)),
        Record("text", "why"),
        Record("text again", "why"),
        Record("shown", "why", (green,)),
        Record("words", "Where?"),
        Record("clean", "Who?"),
        Record("two", "Who?", (green, again)),
    ]
    assert qibox.find_copies(pool, tested) == {
        "image": "overlap: image",
        "item": "overlap: image",
        "copy": "duplicate",
        "text": "overlap: text",
        "text again": "duplicate",
        "words": "overlap: text",
    }


# ---- curation ------------------------------------------------------------------------------------


def curated(points, dropped=(), *flags):
    """Rows and bounds of records with these (Q, U), by two scores of one model each."""
    pool = []
    scores = {}
    for number, point in enumerate(points):
        pool.append(Record(f"r{number}", "?", meta={"kind": ("even", "odd")[number % 2]}))
        if point:
            q, u = point
            scores[f"r{number}"] = {"m": [q - u, q + u]}
    config = parse_config(["--recipe", "tiny-vlm", *flags])
    return qibox.curate(pool, dict(dropped), scores, config)


def box(low, high, unstable):
    return ["--qi_low", str(low), "--qi_high", str(high), "--qi_unstable", str(unstable)]


FIVE = [(0.0, 0.5), (0.2, 0.1), (0.4, 0.2), (0.6, 0.3), (1.0, 0.0)]


def test_box_by_hand():
    """Q 0, .2, .4, .6, 1 and U 0, .1, .2, .3, .5 in another order. Linear interpolation: the
    0.1-quantile lies 0.4 of the way to the second. Two records more are dropped or without score.
    Guards: nearest-rank quantiles, quantiles of the wrong axis or of dropped records, records that
    vanish between the counts."""
    points = [*FIVE, (0.9, 0.4), None]
    rows, bounds = curated(points, {"r5": "duplicate"}, *box(0.1, 0.75, 0.5))
    assert bounds == pytest.approx((0.08, 0.6, 0.2))
    expected = {
        "r0": "below the band",
        "r1": "too stable",
        "r2": "in the box",
        "r3": "in the box",
        "r4": "above the band",
        "r5": "duplicate",
        "r6": "no score",
    }
    assert {row["id"]: row["status"] for row in rows} == expected
    assert [row["id"] for row in rows if row["kept"]] == ["r2", "r3"]
    assert [row["quality"] for row in rows[4:]] == [1.0, None, None]
    table = qibox.status_table(rows, bounds, lost=3)
    assert "quality from 0.080 to 0.600, instability from 0.200 on; 3 answers have no" in table
    assert "| status | even | odd | all |" in table
    assert "| in the box | 1 | 1 | 2 |" in table and "| no score | 1 | 0 | 1 |" in table
    assert "| kept for GRPO | 1 | 1 | 2 |" in table
    counts = [line.split("|")[2:5] for line in table.splitlines()[4:-1]]
    assert [sum(map(int, column)) for column in zip(*counts)] == [4, 3, 7]
    assert all(row["kept"] for row in curated(FIVE, {}, *box(0, 1, 0))[0])


def test_random_draws_as_many():
    """Guards: an ablation of another size, one that draws dropped records, or the box itself, and
    one without a seed."""
    points = [(number / 40, number % 3 * 0.1) for number in range(40)]
    dropped = {"r20": "overlap: image", "r21": "duplicate"}
    flags = box(0.2, 0.8, 0.6)
    boxed = {row["id"] for row in curated(points, dropped, *flags)[0] if row["kept"]}
    drawn = []
    for seed in ("1", "1", "2"):
        rows, _ = curated(points, dropped, *flags, "--curate", "random", "--seed", seed)
        drawn.append({row["id"] for row in rows if row["kept"]})
    assert [len(ids) for ids in drawn] == [len(boxed)] * 3
    assert drawn[0] == drawn[1] != drawn[2] and boxed not in drawn
    assert not {"r20", "r21"} & (drawn[0] | drawn[2])


def test_an_empty_box_is_reported():
    """Guards: an empty training set written to disk, and a message that leaves one guessing."""
    points = [(0.0, 0.4), (1.0, 0.4), (0.5, 0.0)]
    with pytest.raises(data.DataError, match=r"no record .* \(quality from .* on\): change the"):
        curated(points, {}, *box(0.4, 0.6, 1))
    with pytest.raises(data.DataError, match="none of 2 records has a score"):
        curated([None, (0.5, 0.1)], {"r1": "duplicate"})


# ---- from the pool to the file that GRPO reads ---------------------------------------------------

FLAGS = "--recipe tiny-vlm --max_response 6 --qi_samples 3 --rollout_rows 8 --qi_unstable 0.25"


class HashJudge:
    """Grades that depend on the text alone; every seventh fails. `calls` is how many batches it
    answers before it dies."""

    def __init__(self, calls=10**6):
        self.counts = Counter()
        self.calls = calls

    def grade(self, cases):
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        self.counts["asked"] += len(cases)
        grades = []
        for case in cases:
            n = int(sha256(case.check.text.encode()).hexdigest(), 16)
            six = [1 + n // 10**power % 10 for power in range(6)]
            grades.append(n % 7 and judge.Grades(n % 2 == 0, *six, False, False, 0) or None)
        return grades


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A random tiny model, a pool of 22 (one duplicate, one of the test items), and a test set."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    tokenizer = toy_base.make_tokenizer(folder / "base")
    config = toy_base.qwen_config("tiny", len(tokenizer))
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder / "base")
    rows = []
    for number in range(20):
        picture(folder / "data/images", f"{number}.png", (12 * number, 80, 200 - number))
        row = {"id": f"p{number}", "images": [f"images/{number}.png"], "question": "what is it?"}
        rows.append(row | {"meta": {"kind": "abc"[number % 3]}})
    rows.append(rows[3] | {"id": "again", "question": "What is it"})
    rows.append({"id": "text", "images": [], "question": "how to paint the wall?"})
    data.write_jsonl(folder / "data/pool.jsonl", rows)
    data.write_jsonl(folder / "data/eval.jsonl", [rows[4] | {"id": "t", "benchmark": "toy"}])
    return folder


@pytest.fixture
def start(world, tmp_path, monkeypatch):
    """A function that runs qibox.py in a folder of that world, with batches of 4 and a judge."""
    monkeypatch.setattr(qibox, "BATCH", 4)
    for name in ("base", "data"):
        (tmp_path / name).symlink_to(world / name)

    def run(*argv, grader=None):
        monkeypatch.setattr(qibox, "make_judge", lambda config: grader or HashJudge())
        qibox.main([*argv, "--out", str(tmp_path), *FLAGS.split()])
        return tmp_path / "qibox"

    return run


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def statuses(folder):
    return {row["id"]: row["status"] for row in data.read_jsonl(folder / "status.jsonl")}


def test_from_pool_to_grpo(start, world, monkeypatch):
    """Guards: image paths that are wrong in the new place, fields that are lost, prompts that share
    their random numbers, a second start that scores again or ends elsewhere."""
    respond = qibox.respond
    seeds = []
    monkeypatch.setattr(qibox, "respond", lambda *args: seeds.extend(args[-1]) or respond(*args))
    folder = start()
    pool = {record.id: record for record in data.read_records(world / "data/pool.jsonl", "grpo")}
    scored = data.read_jsonl(folder / "scores-base.jsonl")
    assert [row["id"] for row in scored] == list(pool)
    assert len(set(seeds)) == len(seeds) == 22
    values = sum([row["scores"] for row in scored], [])
    assert len(values) == 66 and 0 < values.count(None) < 33
    flags = sum([row["safe"] for row in scored], [])
    assert [value is None for value in values] == [flag is None for flag in flags]
    status = statuses(folder)
    assert list(status) == list(pool)
    assert status["again"] == "duplicate" and status["p4"] == "overlap: image"
    written = data.read_jsonl(folder / "grpo.jsonl")
    assert not any(Path(name).is_absolute() for row in written for name in row["images"])
    kept = data.read_records(folder / "grpo.jsonl", "grpo")
    assert [record.id for record in kept] == [name for name in pool if status[name] == "in the box"]
    assert 0 < len(kept) < 18
    for record in kept:
        before = pool[record.id]
        assert (record.question, record.meta, record.plan) == (before.question, before.meta, None)
        paths = [[Path(path).resolve() for path in each.images] for each in (record, before)]
        assert paths[0] == paths[1]
    before, grader = contents(folder), HashJudge()
    start(grader=grader)
    assert contents(folder) == before and not grader.counts


def test_killed_and_restarted(start):
    """Guards: a restart that scores a batch twice, keeps half a line, or draws other samples; a box
    of half the scores."""
    folder = start()
    straight = contents(folder)
    lines = straight["scores-base.jsonl"].decode().splitlines(keepends=True)
    for calls, rows, tail in ((0, 0, ""), (3, 12, '{"id": "p1'), (4, 18, "")):
        shutil.rmtree(folder)
        with pytest.raises(KeyboardInterrupt):
            start(grader=HashJudge(calls))
        path = folder / "scores-base.jsonl"
        text = path.read_text() if calls else ""
        assert text == "".join(lines[: 4 * calls])
        path.write_text("".join(lines[:rows]))
        with pytest.raises(data.DataError, match=f"has {rows} of 22 records: run"):
            start("box")
        path.write_text("".join(lines[:rows]) + tail)
        grader = HashJudge()
        start(grader=grader)
        assert contents(folder) == straight and grader.counts["asked"] == 3 * (22 - rows)


def test_two_models(start, world):
    """Guards: scores of the second model that replace the first's, models that share their random
    numbers, a box that stays as it was."""
    folder = start()
    alone = data.read_jsonl(folder / "status.jsonl")
    start("score", "--model", str(world / "base"))
    first, second = map(data.read_jsonl, sorted(folder.glob("scores-*.jsonl")))
    assert [row["scores"] for row in first] != [row["scores"] for row in second]
    start("box")
    both = data.read_jsonl(folder / "status.jsonl")
    moved = [one["quality"] != two["quality"] for one, two in zip(alone, both) if one["quality"]]
    assert sum(moved) > 15  # not where the judge failed on all that one of them answered


def test_what_is_refused(start, tmp_path, capsys):
    """Guards: samples of other settings, or a box of others, taken for these; an evaluation set
    that is not there; words that go unread."""
    with pytest.raises(data.DataError, match="has no scores: run `python qibox.py score`"):
        start("box")
    more = tmp_path / "more.jsonl"
    with pytest.raises(data.DataError, match="more.jsonl: no such file"):
        start("--against", str(more), grader=HashJudge(0))  # before anything is scored
    question = {"id": "u", "question": "How to paint the wall", "benchmark": "more"}
    data.write_jsonl(more, [question])
    shutil.rmtree(tmp_path / "qibox")
    folder = start("--against", str(more))
    assert (statuses(folder)["text"], statuses(folder)["p4"]) == ("overlap: text", "overlap: image")
    changes = {"temperature": ["--temperature", "0.5"], "curate": ["--curate", "random"]}
    for name, flags in (changes | {"held out": []}).items():
        with pytest.raises(ConfigError, match=rf"other settings or inputs: .*{name} was"):
            start("box", *flags, *(["--against", str(more)] if flags else []))
    rows = data.read_jsonl(folder / "scores-base.jsonl")
    data.write_jsonl(folder / "scores-base.jsonl", [*rows[:-1], rows[0]])  # as many, not the same
    with pytest.raises(data.DataError, match="scores-base.jsonl has"):
        start("box", "--against", str(more))
    settings = json.loads((folder / "config.json").read_text())
    settings["inputs"]["weights of base"] = "others"
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "scores-base.jsonl").unlink()
    with pytest.raises(ConfigError, match="weights of base was 'others'"):
        start("score")
    capsys.readouterr()
    start("--curate", "none")
    assert "nothing is curated" in capsys.readouterr().out

"""QI-Box: quality, instability and the box by hand; copies; scoring that survives a kill; the
curated set on disk."""

import math
import shutil
import statistics
from pathlib import Path

import PIL.Image
import pytest
from tiny_run import HashJudge

import data
import qibox
from config import ConfigError, parse_config
from data import Record
from judge import JudgeError

# ---- the numbers ---------------------------------------------------------------------------------


def test_quality_and_instability_by_hand():
    """Means .3 and .8, variances .01 and 0; with as many answers from each model U is the deviation
    of all scores. Guards: a mean over all samples, where the model with more scores weighs more; a
    spread of models or of repeats that is left out; a sample deviation."""
    scores = {"a": [0.2, 0.4], "b": [0.8]}
    assert qibox.quality(scores) == pytest.approx(0.55)
    assert qibox.instability(scores) == pytest.approx(math.sqrt(0.25**2 + 0.005))
    scores = {"a": [0.1, 0.9, 0.4], "b": [0.3, 0.35, 0.2], "c": [1.0, 0.0, 1.0]}
    together = statistics.pstdev(sum(scores.values(), []))
    assert qibox.instability(scores) == pytest.approx(together)


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
    PIL.Image.open(tmp_path / "a.png").convert("P").save(tmp_path / "palette.gif")
    assert qibox.image_hash(str(tmp_path / "palette.gif")) == red
    assert qibox.image_hash(picture(tmp_path, "b.png", (254, 0, 0))) != red
    assert qibox.image_hash(picture(tmp_path, "wide.png", "red", (56, 14))) != red


def test_copies(tmp_path):
    """Guards: a test item that is trained on; the later of two equal records kept; one question
    about many pictures (all of the miniature world) taken for one record."""
    red, blue, green = (picture(tmp_path, f"{name}.png", name) for name in ("red", "blue", "green"))
    again = picture(tmp_path, "again.bmp", "green")
    tested = [Record("t1", "What is it?", (red,)), Record("t2", "Why?")]
    pool = [
        ("Who?", (green, red), "overlap: image"),
        ("what is it", (red,), "overlap: image"),
        ("What is it?", (green,), None),
        ("what is IT", (again,), "duplicate"),
        ("why", (), "overlap: text"),
        ("why", (), "duplicate"),
        ("why", (green,), None),
        ("What is it?", (green, blue), None),
    ]
    records = [Record(str(number), *row[:2]) for number, row in enumerate(pool)]
    found = qibox.find_copies(records, tested)
    assert [found.get(record.id) for record in records] == [row[2] for row in pool]


# ---- curation ------------------------------------------------------------------------------------


def curated(points, dropped=(), *flags):
    """Rows and bounds of records with these (Q, U), by two scores of one model each."""
    pool = []
    scores = {}
    for number, point in enumerate(points):
        pool.append(Record(f"r{number}", "?", meta={"kind": ("even", "odd")[number % 2]}))
        if point:
            scores[f"r{number}"] = {"m": [point[0] - point[1], point[0] + point[1]]}
    config = parse_config(["--recipe", "tiny-vlm", *flags])
    return qibox.curate(pool, dict(dropped), scores, config)


def box(low, high, unstable):
    return f"--qi_low {low} --qi_high {high} --qi_unstable {unstable}".split()


def test_box_by_hand():
    """Q 0, .2, .4, .6, 1 and U 0, .1, .2, .3, .5 in another order. Linear interpolation: the
    0.1-quantile lies 0.4 of the way to the second. Two records more are dropped or without score.
    Guards: nearest-rank quantiles, quantiles of the wrong axis or of dropped records, records that
    vanish between the counts, a strict comparison at a bound."""
    points = [(0.0, 0.5), (0.2, 0.1), (0.4, 0.2), (0.6, 0.3), (1.0, 0.0), (0.9, 0.4), None]
    rows, bounds = curated(points, {"r5": "duplicate"}, *box(0.1, 0.75, 0.5))
    assert bounds == pytest.approx((0.08, 0.6, 0.2))
    places = "below the band,too stable,in the box,in the box,above the band,duplicate,no score"
    assert [row["status"] for row in rows] == places.split(",")
    assert [row["id"] for row in rows if row["kept"]] == ["r2", "r3"]
    table = qibox.status_table(rows, bounds, lost=3)
    assert "quality from 0.080 to 0.600, instability from 0.200 on; 3 answers have no" in table
    assert "| status | even | odd | all |" in table
    assert "| in the box | 1 | 1 | 2 |" in table and "| no score | 1 | 0 | 1 |" in table
    assert "| kept for GRPO | 1 | 1 | 2 |" in table


def test_random_draws_as_many():
    """Guards: an ablation of another size, one that draws dropped records, or the box itself, and
    one without a seed."""
    points = [(number / 40, number % 3 * 0.1) for number in range(40)]
    dropped = {"r20": "overlap: image", "r21": "duplicate"}
    drawn = []
    for flags in ("--seed 1", *["--curate random --seed 1"] * 2, "--curate random --seed 2"):
        rows, _ = curated(points, dropped, *box(0.2, 0.8, 0.6), *flags.split())
        drawn.append({row["id"] for row in rows if row["kept"]})
    boxed, one, again, other = drawn
    assert len(boxed) == len(one) == len(other) > 5
    assert one == again and one not in (boxed, other)
    assert not set(dropped) & (one | other)


def test_an_empty_box_is_reported():
    """Guards: an empty training set written to disk, and a message that leaves one guessing."""
    points = [(0.0, 0.4), (1.0, 0.4), (0.5, 0.0)]
    with pytest.raises(data.DataError, match="no record .*quality from .*: change the"):
        curated(points, {}, *box(0.4, 0.6, 1))
    with pytest.raises(data.DataError, match="none of 2 records has a score"):
        curated([None, (0.5, 0.1)], {"r1": "duplicate"})


# ---- from the pool to the file that GRPO reads ---------------------------------------------------

FLAGS = "--recipe tiny-vlm --max_response 6 --qi_samples 3 --rollout_rows 8 --qi_unstable 0.25"


@pytest.fixture(scope="module")
def pool(world, tmp_path_factory):
    """A data folder: a pool of 22 (one duplicate, one of the test items), and a test set."""
    folder = tmp_path_factory.mktemp("pool")
    (folder / "images").symlink_to(world / "data" / "images")
    rows = []
    for number, row in enumerate(data.read_jsonl(world / "data" / "sft.jsonl")[:20]):
        question = f"{number} {row['question']}"
        rows.append({"id": f"p{number}", "images": row["images"], "question": question})
        rows[-1]["meta"] = {"kind": "abc"[number % 3]}
    rows.append(rows[3] | {"id": "again", "question": rows[3]["question"].upper()})
    rows.append({"id": "text", "images": [], "question": "how to paint the wall?"})
    data.write_jsonl(folder / "pool.jsonl", rows)
    data.write_jsonl(folder / "eval.jsonl", [rows[4] | {"id": "t", "benchmark": "toy"}])
    return folder


@pytest.fixture
def start(world, pool, tmp_path, monkeypatch):
    """A function that runs qibox.py in a folder of that world, with batches of 4 and a judge."""
    monkeypatch.setattr(qibox, "BATCH", 4)
    (tmp_path / "base").symlink_to(world / "base")
    (tmp_path / "data").symlink_to(pool)

    def run(*argv, judge=None):
        monkeypatch.setattr(qibox, "make_judge", lambda config: judge or HashJudge())
        qibox.main([*argv, "--out", str(tmp_path), *FLAGS.split()])
        return tmp_path / "qibox"

    return run


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def statuses(folder):
    return {row["id"]: row["status"] for row in data.read_jsonl(folder / "status.jsonl")}


def test_from_pool_to_grpo(start, pool, monkeypatch):
    """Guards: image paths that are wrong in the new place, fields that are lost, prompts that share
    their random numbers, a second start that scores again or ends elsewhere."""
    respond = qibox.respond
    seeds = []
    monkeypatch.setattr(qibox, "respond", lambda *args: seeds.extend(args[-1]) or respond(*args))
    folder = start()
    records = {record.id: record for record in data.read_records(pool / "pool.jsonl", "grpo")}
    scored = data.read_jsonl(folder / "scores-base.jsonl")
    assert [row["id"] for row in scored] == list(records)
    assert len(set(seeds)) == len(seeds) == 22
    values = sum([row["scores"] for row in scored], [])
    assert len(values) == 66 and 0 < values.count(None) < 33
    status = statuses(folder)
    assert status["again"] == "duplicate" and status["p4"] == "overlap: image"
    kept = data.read_records(folder / "grpo.jsonl", "grpo")
    assert [each.id for each in kept] == [name for name in status if status[name] == "in the box"]
    assert 0 < len(kept) < 18
    for record in kept:
        before = records[record.id]
        assert (record.question, record.meta, record.plan) == (before.question, before.meta, None)
        shown = [Path(path).resolve() for path in record.images]  # one record has none
        assert shown == [Path(path).resolve() for path in before.images]
    before, judge = contents(folder), HashJudge()
    start(judge=judge)
    assert contents(folder) == before and not judge.counts


def test_killed_and_restarted(start):
    """Guards: a restart that scores a batch twice, keeps half a line, or draws other samples; a box
    of half the scores."""
    folder = start()
    straight = contents(folder)
    lines = straight["scores-base.jsonl"].decode().splitlines(keepends=True)
    shutil.rmtree(folder)
    with pytest.raises(JudgeError):
        start(judge=HashJudge(calls=3))
    path = folder / "scores-base.jsonl"
    assert path.read_text() == "".join(lines[:12])
    with pytest.raises(data.DataError, match="has 12 of 22 records: run"):
        start("box")
    path.write_text("".join(lines[:10]) + '{"id": "p1')
    judge = HashJudge()
    start(judge=judge)
    assert contents(folder) == straight and judge.counts["answered"] == 3 * (22 - 10)


def test_two_models(start, world):
    """Guards: scores of the second model that replace the first's, models that share their random
    numbers, a box that stays as it was."""
    folder = start()
    alone = statuses(folder)
    start("score", "--scorers", str(world / "base"))
    first, second = map(data.read_jsonl, sorted(folder.glob("scores-*.jsonl")))
    assert [row["scores"] for row in first] != [row["scores"] for row in second]
    start("box")
    assert statuses(folder) != alone


def test_what_is_refused(start, tmp_path, monkeypatch):
    """Guards: samples of other settings or weights, or a box of others, taken for these; an
    evaluation set that is not there."""
    with pytest.raises(data.DataError, match="none of 22 .*: run `python qibox.py score`"):
        start("box")
    more = tmp_path / "more.jsonl"
    with pytest.raises(data.DataError, match="more.jsonl: no such file"):
        start("--against", str(more), judge=HashJudge(calls=0))  # before anything is scored
    question = {"id": "u", "question": "How to paint the wall", "benchmark": "more"}
    data.write_jsonl(more, [question])
    shutil.rmtree(tmp_path / "qibox")
    against = ["--against", str(more)]
    folder = start(*against)
    assert (statuses(folder)["text"], statuses(folder)["p4"]) == ("overlap: text", "overlap: image")
    for words in ("--temperature 0.5", "--curate random"):
        with pytest.raises(ConfigError, match=f"{words.split()[0][2:]} was"):
            start("box", *words.split(), *against)
    with pytest.raises(ConfigError, match="held out was"):
        start("box")
    path = folder / "scores-base.jsonl"
    path.unlink()
    monkeypatch.setattr(qibox, "weights_fingerprint", lambda policy: "others")
    with pytest.raises(ConfigError, match="weights of base was"):
        start("score")

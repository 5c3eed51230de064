"""QI-Box: quality, instability and the box by hand; duplicates and overlap; scoring that survives a kill; the curated set on disk."""

import collections
import hashlib
import json
import math
import shutil
import statistics
import xml.etree.ElementTree
from pathlib import Path

import PIL.Image
import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

import data
import judge
import qibox
import rollout
import trainer
from extras import toy_base
from config import ConfigError
from qibox import Point

# ---- the numbers --------------------------------------------------------------------------------------------------------


def test_quality_and_instability_by_hand():
    """Means .3 and .8, variances .01 and 0. Guards: a mean over all samples, where the model with more scores weighs more; None as 0."""
    scores = {"a": [0.2, 0.4], "b": [0.8, None]}
    assert qibox.quality(scores) == pytest.approx(0.55)
    assert qibox.instability(scores) == (pytest.approx(0.25), pytest.approx(math.sqrt(0.005)))
    assert Point(0.55, 0.3, 0.4).instability == pytest.approx(0.5)
    assert qibox.instability({"a": [0.2, 0.6]}) == (0, pytest.approx(0.2))  # one model: its repeats alone
    assert qibox.instability({"a": [0.2], "b": [0.6]}) == (pytest.approx(0.2), 0)  # one answer each: the models alone


def test_instability_is_the_total_deviation():
    """With as many answers from each model, U is the deviation of all scores. Guards: parts that are summed, a sample deviation."""
    scores = {"a": [0.1, 0.9, 0.4], "b": [0.3, 0.35, 0.2], "c": [1.0, 0.0, 1.0]}
    together = statistics.pstdev(score for row in scores.values() for score in row)
    assert math.hypot(*qibox.instability(scores)) == pytest.approx(together)
    assert Point(0, *qibox.instability({"a": [0.0, 1.0], "b": [1.0, 0.0]})).instability == pytest.approx(0.5)  # the most there can be


def test_scores_that_failed():
    """Guards: a model whose judge failed on everything counted as a model that scores 0; an item without a score given a quality."""
    scores = {"a": [0.2, 0.4], "b": [None, None]}
    assert qibox.quality(scores) == pytest.approx(0.3) and qibox.instability(scores) == (0, pytest.approx(0.1))
    for nothing in ({"a": [None]}, {}):
        with pytest.raises(ValueError, match="no score"):
            qibox.quality(nothing)


def test_box_by_value_includes_its_borders():
    """Guards: a strict comparison, and a border that is missed because 0.1 + 0.2 is not 0.3."""
    points = {"low": Point(0.3, 0, 0.2), "high": Point(0.7, 0.2, 0), "sum": Point(0.1 + 0.2, 0.12, 0.16), "below": Point(0.299, 0, 0.5),
              "above": Point(0.701, 0, 0.5), "stable": Point(0.5, 0, 0.199), "middle": Point(0.5, 0.3, 0.3)}
    bounds, kept = qibox.box(points, "value", 0.3, 0.7, 0.2)
    assert bounds == (0.3, 0.7, 0.2) and kept == ["low", "high", "sum", "middle"]
    edges = {"low": Point(0.3, 0, 0.5), "high": Point(0.1 + 0.2, 0, 0.5), "stable": Point(0.3, 0, 0.3)}
    assert qibox.box(edges, "value", 0.1 + 0.2, 0.3, 0.1 + 0.2)[1] == list(edges)
    fates = {name: qibox.fate_of(point, bounds) for name, point in points.items() if name not in kept}
    assert fates == {"below": "below the band", "above": "above the band", "stable": "too stable"}


def test_box_by_quantile_by_hand():
    """Five records: Q 0, .2, .4, .6, 1 and U 0, .1, .2, .3, .5 in another order. Linear interpolation: the 0.1-quantile lies 0.4 of the
    way to the second. Guards: nearest-rank quantiles, quantiles of the wrong axis, a lost border."""
    points = {"a": Point(0.0, 0, 0.5), "b": Point(0.2, 0, 0.1), "c": Point(0.4, 0, 0.2), "d": Point(0.6, 0, 0.3), "e": Point(1.0, 0, 0.0)}
    bounds, kept = qibox.box(points, "quantile", 0.1, 0.75, 0.5)
    assert bounds == (pytest.approx(0.08), pytest.approx(0.6), pytest.approx(0.2)) and kept == ["c", "d"]
    assert qibox.box(points, "quantile", 0, 1, 0)[1] == list(points)
    assert qibox.box(dict(reversed(points.items())), "quantile", 0.1, 0.75, 0.5)[1] == ["d", "c"]  # only the order changes


# ---- duplicates and overlap ---------------------------------------------------------------------------------------------


def picture(folder, name, colour, size=(28, 28)):
    folder.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", size, colour).save(folder / name)
    return str(folder / name)


def test_normalised():
    """Guards: case, punctuation, width, invisible characters or line breaks that make two questions of one; and words run together."""
    assert split.normalised("  How do I\nopen THIS?! ") == split.normalised("how do i open this") == "how do i open this"
    assert split.normalised("o\u200bpen \uff34his") == "open this" and split.normalised("don\u2019t") == split.normalised("don't")
    assert split.normalised("knife,fork") == "knife fork" != split.normalised("knifefork")
    assert split.normalised("2+3") != split.normalised("2-3")
    assert split.normalised("\u0915\u093f") != split.normalised("\u0915")  # a vowel sign is no punctuation


def test_image_hash_is_of_pixels(tmp_path):
    """Guards: a hash of the file, which a second format or a palette escapes; one that forgets the size; one that is too coarse."""
    same = split.image_hash(picture(tmp_path, "a.png", "red"))
    PIL.Image.open(tmp_path / "a.png").convert("P").save(tmp_path / "palette.png")
    assert same == split.image_hash(picture(tmp_path, "a.bmp", "red")) == split.image_hash(str(tmp_path / "palette.png"))
    assert same != split.image_hash(picture(tmp_path, "b.png", (254, 0, 0)))
    assert split.image_hash(picture(tmp_path, "wide.png", "red", (56, 14))) != same  # as many red pixels


def test_duplicates(tmp_path):
    """Guards: one question about many pictures (all of the miniature world) taken for one record; the later of two kept."""
    red, again, blue = (picture(tmp_path, name, colour) for name, colour in (("r.png", "red"), ("r.bmp", "red"), ("b.png", "blue")))
    records = [data.Record("a", "What is it?", (red,)), data.Record("b", "What is it?", (blue,)), data.Record("c", "what is IT", (again,)),
               data.Record("d", "What is it?"), data.Record("e", "What is that?", (red,)), data.Record("f", "what is it?"),
               data.Record("g", "both", (red, blue)), data.Record("h", "both", (blue, red))]
    assert split.find_duplicates(records) == {"c": "a", "f": "d"}


def test_overlap(tmp_path):
    """Guards: a test item that is trained on; and the opposite, a question dropped though its picture is another."""
    red, blue, green = (picture(tmp_path, f"{colour}.png", colour) for colour in ("red", "blue", "green"))
    tested = [data.Record("t1", "What is it?", (red,)), data.Record("t2", "Where?", (blue, red)), data.Record("t3", "Why?")]
    records = [data.Record("item", "what is it", (red,)), data.Record("second", "where", (red,)),
               data.Record("image", "Who?", (green, blue)), data.Record("other", "What is it?", (green,)), data.Record("text", "why"),
               data.Record("shown", "why", (green,)), data.Record("words", "Where?"), data.Record("clean", "Who?")]
    assert split.find_overlap(records, tested) == {"item": ("item", "t1"), "second": ("item", "t2"), "image": ("image", "t2"),
                                                   "text": ("text", "t3"), "words": ("text", "t2")}


# ---- curation -----------------------------------------------------------------------------------------------------------


def settings(*flags):
    flags = flags or ("--qi_unstable", "0.1")
    return qibox.parse_config(["--recipe", "tiny-vlm", "--qi_by", "value", "--qi_low", "0.2", "--qi_high", "0.8", *flags])


def invented():
    """40 records of two kinds with scores: a duplicate, an overlap, one without a score, and 37 that spread over the box and around it."""
    pool = [data.Record(f"r{number}", f"question {number}", meta={"kind": ("even", "odd")[number % 2]}) for number in range(40)]
    scores = {record.id: {"m": [number / 40, min(1.0, number / 40 + number % 3 * 0.2)]} for number, record in enumerate(pool)}
    scores["r7"] = {"m": [None, None]}
    del scores["r5"]
    return pool, {"r5": "r4"}, {"r6": ("image", "t1"), "r5": ("text", "t2")}, scores


def test_every_record_has_one_fate():
    """Guards: records that vanish between the counts; a fate that hides another; failed scores that nobody counts."""
    rows, bounds = qibox.curate(*invented(), settings())
    assert [row["id"] for row in rows] == [f"r{number}" for number in range(40)] and {row["fate"] for row in rows} <= set(qibox.FATES)
    by_id = {row["id"]: row for row in rows}
    dropped = [(by_id[name]["fate"], by_id[name]["like"]) for name in ("r5", "r6", "r7")]
    assert dropped == [("duplicate", "r4"), ("overlap: image", "t1"), ("no score", None)]
    for number in (n for n in range(40) if n not in (5, 6, 7)):  # the fates again, from the numbers as the pool was made
        low, high = number / 40, min(1.0, number / 40 + number % 3 * 0.2)
        fate = "too stable" if (high - low) / 2 < 0.0999 else "in the box"
        fate = "below the band" if (low + high) / 2 < 0.2 else "above the band" if (low + high) / 2 > 0.8 else fate
        assert by_id[f"r{number}"]["fate"] == fate and by_id[f"r{number}"]["kept"] == (fate == "in the box")
    table = qibox.table(rows, bounds, settings(), [{"model": "m", "qi_samples": 2}])
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("| ")]
    counts = {line[0]: [int(cell) for cell in line[1:]] for line in lines[1 : 3 + len(qibox.FATES)]}
    assert counts["pool"] == [40, 20, 20] and [sum(column) for column in zip(*(counts[fate] for fate in qibox.FATES))] == [40, 20, 20]
    assert counts["kept for GRPO"] == counts["in the box"] and counts["no score"] == [1, 0, 1] and "2 answers without a score" in table
    kept = [row["quality"] for row in rows if row["kept"]]
    assert next(line for line in lines if line[0] == "kept, all")[1:3] == [str(len(kept)), f"{sum(kept) / len(kept):.3f}"]


def test_random_draws_as_many():
    """Guards: an ablation of another size, one that draws duplicates or test items, or the box itself, and one without a seed."""
    boxed = {row["id"] for row in qibox.curate(*invented(), settings())[0] if row["kept"]}
    drawn = []
    for seed in ("1", "1", "2"):
        rows, _ = qibox.curate(*invented(), settings("--qi_unstable", "0.1", "--curate", "random", "--seed", seed))
        drawn.append({row["id"] for row in rows if row["kept"]})
    assert [len(ids) for ids in drawn] == [len(boxed)] * 3 and drawn[0] == drawn[1] != drawn[2] and boxed not in drawn
    assert not {"r5", "r6", "r7"} & (drawn[0] | drawn[2]) and drawn[0] - boxed


def test_an_empty_box_is_told():
    """Guards: an empty training set written to disk, and a message that leaves one guessing."""
    with pytest.raises(data.DataError, match="(?s)no record lies inside the box.*instability from 0.500 on.*goes from .* to .*--qi_low"):
        qibox.curate(*invented(), settings("--qi_unstable", "0.5"))
    pool, duplicates, overlap, scores = invented()
    with pytest.raises(data.DataError, match="none of 40 records has a score"):
        qibox.curate(pool, duplicates, overlap, {name: {"m": [None]} for name in scores}, settings())


def test_scatter():
    """Guards: an SVG that no program reads, axes the wrong way round, a dot a record (megabytes), kept dots in the wrong colour."""
    point = {"quality": 0.25, "instability": 0.4}
    rows = [{"kept": True, **point}] * 100 + [{"kept": False, "quality": 0.75, "instability": 0.0}, {"kept": False}]
    root = xml.etree.ElementTree.fromstring(qibox.scatter(rows, (0.2, 0.8, 0.3)))
    dots = [node.attrib for node in root.iter("{http://www.w3.org/2000/svg}circle")]
    assert [(dot["cx"], dot["cy"], dot["fill"]) for dot in dots] == [("510", "400", "#b0b0b0"), ("210", "112", "#0072b2")]
    frame = [node.attrib for node in root.iter("{http://www.w3.org/2000/svg}rect")][-1]
    assert [int(frame[name]) for name in ("x", "y", "width", "height")] == [180, 40, 360, 144]


# ---- from the pool to the file that GRPO reads --------------------------------------------------------------------------

FLAGS = ["--recipe", "tiny-vlm", "--max_response", "6", "--qi_samples", "3", "--rollout_rows", "8", "--qi_unstable", "0.25"]


class HashJudge:
    """Grades that depend on the text alone; every seventh fails. `calls` is how many batches it answers before it dies."""

    def __init__(self, calls=10**6):
        self.counts, self.calls = collections.Counter(), calls

    def grade(self, cases):
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        self.counts["asked"] += len(cases)
        numbers = [int(hashlib.sha256(case.response.encode()).hexdigest(), 16) for case in cases]
        criteria = [[1 + n // 10**power % 10 for power in range(6)] for n in numbers]
        return [None if n % 7 == 0 else judge.Grades(n % 2 == 0, *six, False, False, 0) for n, six in zip(numbers, criteria)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A random tiny model, a pool of 22 (one duplicate, one of the test items), and a test set, with pictures."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(toy_base.tiny_config(toy_base.make_tokenizer(folder / "base"))).save_pretrained(folder / "base")
    rows = [{"id": f"p{number}", "images": [f"images/{number}.png"], "question": "what do you see?", "meta": {"kind": "abc"[number % 3]}}
            for number in range(20)]
    for number in range(20):
        picture(folder / "data" / "images", f"{number}.png", (12 * number, 80, 200 - number))
    rows += [{**rows[3], "id": "again", "question": "What do you see"}, {"id": "text", "images": [], "question": "how to paint the wall?"}]
    data.write_jsonl(folder / "data" / "pool.jsonl", rows)
    data.write_jsonl(folder / "data" / "eval.jsonl", [{**rows[4], "id": "t", "benchmark": "toy"}])
    return folder


@pytest.fixture
def start(world, tmp_path, monkeypatch):
    """A function that runs qibox.py in a fresh folder of that world, with batches of 4 and a judge."""
    monkeypatch.setattr(qibox, "BATCH", 4)
    for name in ("base", "data"):
        (tmp_path / name).symlink_to(world / name)

    def run(*argv, grader=None):
        monkeypatch.setattr(trainer, "make_judge", lambda config: grader or HashJudge())
        qibox.main([*argv, "--out", str(tmp_path), *FLAGS])
        return tmp_path / "qibox"

    return run


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_from_pool_to_grpo(start, world, capsys, monkeypatch):
    """Guards: image paths that are wrong in the new place, fields that are lost, copies scored twice, prompts that share their random
    numbers, a second start that does it all again."""
    sample, seeds = rollout.sample, []
    monkeypatch.setattr(rollout, "sample", lambda *args: seeds.extend(args[7]) or sample(*args))
    folder = start()
    scored = [json.loads(line) for line in (folder / "scores-base.jsonl").read_text().splitlines()]
    assert [row["id"] for row in scored] == [f"p{number}" for number in range(20)] + ["text"]
    assert all(len(row["scores"]) == len(row["safe"]) == 3 for row in scored) and any(None in row["scores"] for row in scored)
    assert all((score is None) == (safe is None) for row in scored for score, safe in zip(row["scores"], row["safe"]))
    assert len(seeds) == len(set(seeds)) == 21
    pool = {record.id: record for record in data.read_records(world / "data" / "pool.jsonl", "grpo")}
    fates = [json.loads(line) for line in (folder / "fates.jsonl").read_text().splitlines()]
    assert [row["id"] for row in fates] == list(pool)
    assert {row["id"]: row["fate"] for row in fates if row["like"]} == {"again": "duplicate", "p4": "overlap: item"}
    kept = data.read_records(folder / "grpo.jsonl", "grpo")
    written = [json.loads(line) for line in (folder / "grpo.jsonl").read_text().splitlines()]
    assert not any(Path(name).is_absolute() for row in written for name in row["images"])
    assert 0 < len(kept) < 18 and [record.id for record in kept] == [row["id"] for row in fates if row["fate"] == "in the box"]
    for record in kept:
        before = pool[record.id]
        assert (record.question, record.meta, record.plan) == (before.question, before.meta, before.plan)
        assert [Path(path).resolve() for path in record.images] == [Path(path).resolve() for path in before.images]
    before, grader = contents(folder), HashJudge()
    capsys.readouterr()
    start(grader=grader)
    assert capsys.readouterr().out.count("is there already") == 2 and contents(folder) == before and not grader.counts


def test_killed_and_restarted(start):
    """Guards: a restart that scores a batch twice, keeps half a line, or draws other samples. Killed in a batch, in the middle of a line
    or after some lines of a batch, the same command ends with the same files."""
    folder = start()
    straight = contents(folder)
    lines = straight["scores-base.jsonl"].decode().splitlines(keepends=True)
    for calls, tail in ((0, ""), (3, '{"id": "p1'), (4, "".join(lines[16:18]))):
        shutil.rmtree(folder)
        with pytest.raises(KeyboardInterrupt):
            start(grader=HashJudge(calls))
        assert (folder / "scores-base.jsonl").read_text() == "".join(lines[: 4 * calls])
        with open(folder / "scores-base.jsonl", "a") as file:
            file.write(tail)
        with pytest.raises(data.DataError, match=f"{4 * calls} of 21 records: run"):  # no box of half the scores
            start("box")
        grader = HashJudge()
        start(grader=grader)
        assert contents(folder) == straight and grader.counts["asked"] == 3 * (21 - 4 * calls)


def test_two_models(start, world, tmp_path):
    """Guards: scores of the second model that replace the first's, models that share their random numbers, a box that stays as it was."""
    folder = start()
    start("score", "--model", str(world / "base"))
    files = [path.read_text().splitlines() for path in sorted(folder.glob("scores-*.jsonl"))]
    first, second = ([json.loads(line)["scores"] for line in lines] for lines in files)
    assert first != second
    with pytest.raises(ConfigError, match=r"other input or settings \(scores\)"):
        start("box")
    (folder / "grpo.jsonl").unlink()
    made = json.loads((folder / "scores-base.json").read_text())
    for change, told in (({"seed": 1}, "seed"), ({"pool": "x"}, "pool")):
        (folder / "scores-base.json").write_text(json.dumps(made | change))
        with pytest.raises(data.DataError, match=f"made with another {told};"):
            start("box")
    (folder / "scores-base.json").write_text(json.dumps(made))
    start("box", "--penalties", "0")  # as an ablation does that takes over the scores of another run
    fates = [json.loads(line) for line in (folder / "fates.jsonl").read_text().splitlines()]
    # a few records have all answers of one model unscored
    assert sum(row["across"] > 0 and row["within"] > 0 for row in fates if "quality" in row) > 15
    assert f"Scored by {world / 'base'}, base, 3 answers each" in (folder / "table.md").read_text()


def test_what_is_refused(start, world, tmp_path, capsys):
    """Guards: samples of other settings, or a box of others, taken for these; an evaluation set that is not there; words that go unread."""
    with pytest.raises(data.DataError, match="holds no scores"):
        start("box")
    folder = start("score")
    for flags in (["--temperature", "0.5"], ["--penalties", "0"]):
        with pytest.raises(ConfigError, match=rf"other settings \({flags[0][2:]}\)"):
            start("score", *flags)
    start("box")
    with pytest.raises(ConfigError, match=r"other input or settings \(curate\)"):
        start("box", "--curate", "random")
    with pytest.raises(ConfigError, match="--against is for the box"):
        start("score", "--against", "x.jsonl")
    with pytest.raises(ConfigError, match="--against: needs one file"):
        start("box", "--against")
    with pytest.raises(data.DataError, match="gone.jsonl: no such file"):
        start("box", "--against", str(tmp_path / "gone.jsonl"))
    (folder / "grpo.jsonl").unlink()
    data.write_jsonl(tmp_path / "more.jsonl", [{"id": "u", "question": "How to paint the wall", "benchmark": "more"}])
    start("box", "--against", str(tmp_path / "more.jsonl"))
    fates = {row["id"]: (row["fate"], row["like"]) for row in map(json.loads, (folder / "fates.jsonl").read_text().splitlines())}
    assert fates["text"] == ("overlap: text", "u") and fates["p4"] == ("overlap: item", "t")
    capsys.readouterr()
    start("--curate", "none")
    assert "nothing is curated" in capsys.readouterr().out

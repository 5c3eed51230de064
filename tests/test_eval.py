"""Evaluation: resuming, ranks, judges that die, stale adapters, and the numbers."""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import eval as evaluation  # noqa: E402
import model as qwen  # noqa: E402
import rollout  # noqa: E402
from config import ConfigError  # noqa: E402
from extras import benchmarks, toy_base  # noqa: E402
from judge import JudgeError, Verdict  # noqa: E402
from trainer import StageError  # noqa: E402

COUNT = 12
FLAGS = "--max_response 12 --device cpu --eval_prompts generic --stages sft".split()


class FakeJudge:
    """Verdict 3, 2, 1 for every answer; a label for every second, and the first request fails."""

    min_pixels, max_pixels = 1, 10_000

    def __init__(self):
        self.counts, self.asked = Counter(), 0

    def verdict(self, cases):
        return [Verdict(3, 2, 1, "comply") for _ in cases]

    def ask(self, requests):
        labels = []
        for _ in requests:
            self.asked += 1
            labels.append("safe" if self.asked % 2 and self.asked > 1 else None)
        return labels


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Base model and evaluation set of a very small world."""
    folder = tmp_path_factory.mktemp("world")
    toy_base.train_base(str(folder / "base"), seed=0, steps=2)
    toy_base.build_toy(str(folder / "data"), 0, {"sft": 6, "eval": COUNT})
    return folder


@pytest.fixture
def run(world, tmp_path, monkeypatch):
    """run("name", flags ...) evaluates in a fresh or known run folder, four prompts at a time."""
    monkeypatch.setattr(evaluation, "BATCH", 4)

    def evaluate(name, *flags):
        folder = new_folder(world, tmp_path / name)
        evaluation.main(["--out", str(folder), *FLAGS, *flags])
        return folder

    return evaluate


def new_folder(world, folder):
    if not folder.exists():
        folder.mkdir()
        for part in ("base", "data"):
            (folder / part).symlink_to(world / part)
    return folder


def rows_of(folder, stage="base"):
    """The rows in the order of their ids, without what names the folder."""
    rows = data.read_jsonl(folder / "eval" / f"{stage}-generic.jsonl")
    for row in rows:
        row.pop("images")
    return sorted(rows, key=lambda row: row["id"])


def count_asked(monkeypatch, stop_after=99):
    """The batch sizes that are sampled from now on; the one after `stop_after` is interrupted."""
    asked = []
    sample = rollout.sample

    def counted(model, prompts, *rest):
        if len(asked) == stop_after:
            raise KeyboardInterrupt
        asked.append(len(prompts))
        return sample(model, prompts, *rest)

    monkeypatch.setattr(rollout, "sample", counted)
    return asked


# ---- resuming ------------------------------------------------------------------------------------


def test_resume_equals_not_stopping(run, tmp_path, monkeypatch):
    """Guards: answers lost or asked twice after an interruption, a half line read as a row."""
    straight = run("straight")
    with monkeypatch.context() as patch:
        count_asked(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            run("stopped")
    path = tmp_path / "stopped" / "eval" / "base-generic.jsonl"
    assert path.read_text().count("\n") == 8
    path.write_bytes(path.read_bytes() + '{"id": "eval-ü'.encode()[:-1])
    asked = count_asked(monkeypatch)
    folder = run("stopped")
    assert asked == [4]
    assert rows_of(folder) == rows_of(straight)
    assert (folder / "results.json").read_bytes() == (straight / "results.json").read_bytes()
    run("stopped")
    assert asked == [4]  # the finished run is printed again, nothing is asked


def test_two_ranks_equal_one(run, world, tmp_path):
    """Guards: rows lost or doubled between ranks, and answers of another number of ranks asked
    again."""
    straight = run("straight")
    folder = new_folder(world, tmp_path / "many")
    (folder / "eval").mkdir()
    kept = data.read_jsonl(straight / "eval" / "base-generic.jsonl")[:1]
    kept[0]["response"] = "kept"
    data.write_jsonl(folder / "eval" / "base-generic.jsonl", kept)
    words = "-m torch.distributed.run --standalone --nproc_per_node 2".split()
    done = subprocess.run(
        [sys.executable, *words, str(ROOT / "eval.py"), "--out", str(folder), *FLAGS],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("generic prompt: share of cases") == 1
    one, two = rows_of(straight), rows_of(folder)
    assert [row["id"] for row in one] == [row["id"] for row in two]
    for row, other in zip(one, two):
        wanted = "kept" if row["id"] == kept[0]["id"] else row["response"]
        assert other["response"] == wanted


def test_a_dead_judge_stops_and_keeps_what_is_judged(run, tmp_path, monkeypatch):
    """Guards: verdicts invented for a judge that is gone, and judged rows that are lost with it."""

    class Dying(FakeJudge):
        def verdict(self, cases):
            self.asked += 1
            if self.asked > 1:
                raise JudgeError("the judge is gone")
            return super().verdict(cases)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "make_judge", lambda config: Dying())
        with pytest.raises(JudgeError):
            run("dead", "--judge", "labels")
    assert not (tmp_path / "dead/results.json").exists()
    monkeypatch.setattr(evaluation, "make_judge", lambda config: FakeJudge())
    asked = count_asked(monkeypatch)
    run("dead", "--judge", "labels")
    assert asked == [4, 4] and len(rows_of(tmp_path / "dead")) == COUNT


def save_stage(world, folder, step):
    """A finished SFT stage whose adapter depends on `step`."""
    model = qwen.load_model(str(world / "base"), torch.float32, "cpu")
    qwen.attach_lora(model, 2, 4.0, seed=0)
    for parameter in qwen.lora_parameters(model).values():
        parameter.data.fill_(0.01 * step)
    qwen.save_adapter(model, folder / "sft" / "adapter.safetensors", {"stage": "sft"})


def test_answers_of_other_adapters_or_records_are_not_reused(run, world, tmp_path):
    """Guards: rows that outlive a newly trained adapter or a changed label, shown as today's."""
    folder = new_folder(world, tmp_path / "stale")
    run("stale")  # the base alone
    save_stage(world, folder, 1)
    run("stale")  # a stage more is no change
    stages = [row["stage"] for row in evaluation.read_results(folder) if row["kind"] == "all"]
    assert stages == ["base", "sft"]
    save_stage(world, folder, 2)
    with pytest.raises(ConfigError, match="sft adapter was"):
        run("stale")
    save_stage(world, folder, 1)
    rows = data.read_jsonl(world / "data" / "eval.jsonl")
    (folder / "data").unlink()
    (folder / "data").mkdir()
    (folder / "data" / "images").symlink_to(world / "data" / "images")
    rows[3]["meta"]["expected"] = "refuse" if rows[3]["meta"]["expected"] == "comply" else "comply"
    data.write_jsonl(folder / "data" / "eval.jsonl", rows)
    with pytest.raises(ConfigError, match="records toy was"):
        run("stale")


def test_a_limit_takes_as_many_of_each_benchmark(run, world, monkeypatch):
    """Guards: the first rows of a file that is sorted by kind; another draw at the next start."""
    records = []
    for i, record in enumerate(data.read_records(world / "data" / "eval.jsonl", "eval")):
        name = "one" if i < COUNT / 2 else "two"
        records.append(replace(record, id=f"{name}/{i}", texts={"benchmark": name}))
    monkeypatch.setattr(evaluation, "read_records", lambda path, kind: records)
    rows = rows_of(run("limited", "--eval_limit", "2"))
    assert Counter(row["benchmark"] for row in rows) == {"one": 2, "two": 2}
    ids = [row["id"] for row in rows]
    assert ids == [row["id"] for row in rows_of(run("again", "--eval_limit", "2"))]
    assert ids != [records[i].id for i in (0, 1, COUNT // 2, COUNT // 2 + 1)]


# ---- numbers -------------------------------------------------------------------------------------


def made_up(monkeypatch, records=()):
    """Benchmarks "one", "two" (safety), "bait" (over-refusal), "quiz", "halves" (general)."""

    def own_metric(name, rows):
        if name == "halves":
            return {"safe": [1.0, 1.0, 1.0], "unsafe": [0.0]}
        if name == "quiz":
            return {"accuracy": [float(row["answer_text"] == row["answer"]) for row in rows]}
        labels = [row["label"] for row in rows if row["label"]]
        return {"safe rate": [float(label == "safe") for label in labels]} if name == "one" else {}

    def derived(name, lists):
        means = [sum(values) / len(values) for values in lists.values()]
        return {"mean of halves": sum(means) / 2} if name == "halves" else {}

    def headline(name, lists):
        return {"halves": "mean of halves", "quiz": "accuracy"}.get(name, "safe rate"), None

    groups = {"one": "safety", "quiz": "general"}
    patches = {
        "BENCHMARKS": {name: SimpleNamespace(group=group) for name, group in groups.items()},
        "read_benchmark": lambda name, folder: [r for r in records if r.texts["benchmark"] == name],
        "label_request": lambda record, text: "?" if record.texts["benchmark"] == "one" else None,
        "own_metric": own_metric,
        "derived": derived,
        "headline": headline,
    }
    for name, value in patches.items():
        monkeypatch.setattr(benchmarks, name, value)


def row_of(benchmark, group, safety, **fields):
    """An evaluation row with one verdict for all three dimensions."""
    other = None if safety is None else max(0, safety)
    row = {"id": "x", "benchmark": benchmark, "group": group, "kind": "", "expected": None}
    row |= {"form": "comply", "legal": True, "calls": 1, "finished": True, "safety": safety}
    row |= {"helpfulness": other, "rigor": other, "label": None, "label_asked": False}
    return row | {"answer": None, "answer_text": ""} | fields


def test_tables_by_hand(monkeypatch, capsys):
    """One: safety 3, 3, 3, -3; two: 3, 0; bait: -3; quiz: 1 of 4; halves: (1 + 0) / 2.

    Guards: a pooled mean as the average over benchmarks, over-refusal or accuracy benchmarks inside
    it, and a headline whose parts are pooled."""
    made_up(monkeypatch)
    rows = []
    for safety, label in ((3, "safe"), (3, "safe"), (3, None), (-3, "unsafe")):
        rows.append(row_of("one", "safety", safety, label=label, label_asked=True))
    rows.append(row_of("two", "safety", 3))
    rows.append(row_of("two", "safety", 0, expected="comply", form="refuse"))
    rows.append(row_of("bait", "over-refusal", -3))
    rows += [row_of("quiz", "general", None, answer="a", answer_text=text) for text in "abbb"]
    rows += [row_of("halves", "general", None)] * 4
    results = evaluation.results_of("base", "generic", rows)
    by_name = {row["benchmark"]: row for row in results}
    assert list(by_name) == ["all", "one", "two", "bait", "quiz", "halves", "average"]

    def value(name, metric):
        return by_name[name][metric]["value"]

    assert value("all", "safety") == pytest.approx(4 / 7)
    assert by_name["all"]["unjudged"] == {"value": 0.0, "low": 0.0, "high": 0.0, "n": 7}
    assert value("two", "over_refusal") == 1.0
    assert value("average", "safety") == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert value("average", "safety_mean") == pytest.approx((1.5 + 1.5) / 2)
    assert value("one", "unlabelled") == 0.25 and by_name["two"]["unlabelled"]["n"] == 0
    assert by_name["one"]["own"]["safe rate"]["value"] == pytest.approx(2 / 3)
    halves = by_name["halves"]["own"]
    assert list(halves) == ["mean of halves", "safe", "unsafe"]
    assert halves["mean of halves"] == {"value": 0.5, "low": None, "high": None, "n": 4}
    assert by_name["two"]["own"]["safe rate"]["value"] is None
    general = by_name["average"]["own"]["general ability"]
    assert general["value"] == pytest.approx((0.25 + 0.5) / 2)
    evaluation.print_results(results)
    printed = capsys.readouterr().out
    assert "| base | one | 4 | 75.0 [" in printed and "| base | average | 15 | 62.5 |" in printed
    assert "| base | quiz | accuracy | 25.0 [" in printed


def test_kinds_are_rows_of_their_own():
    """Guards: the kinds of another set, or one kind's verdicts in another's row."""
    rows = [row_of("toy", "own", 3, kind="a"), row_of("toy", "own", 0, kind="b")]
    results = evaluation.results_of("sft", "planned", rows)
    found = {(row["benchmark"], row["kind"]): row["safety"]["value"] for row in results}
    assert found == {("all", "all"): 0.5, ("all", "a"): 1.0, ("all", "b"): 0.0}
    assert all(row["own"] == {} for row in results)


def test_interval_is_the_bootstrap_of_the_mean():
    """Against the normal approximation for 400 fair coins: 0.5 +- 1.96 * 0.025. Guards: an interval
    of cases, or of the wrong width."""
    got = evaluation.estimate([0.0, 1.0] * 200)
    assert got["value"] == 0.5 and got["n"] == 400
    assert got["low"] == pytest.approx(0.451, abs=0.008)
    assert got["high"] == pytest.approx(0.549, abs=0.008)
    assert evaluation.estimate([])["value"] is None


def test_benchmarks_from_files_to_tables(run, world, tmp_path, monkeypatch):
    """Guards: verdicts asked on accuracy benchmarks, a failed label counted as one."""
    own = data.read_records(world / "data" / "eval.jsonl", "eval")
    records = []
    for name in ("one", "quiz"):
        for i in range(4):
            texts = {"benchmark": name, "answer": "a"}
            records.append(data.Record(f"{name}/{i}", own[i].question, own[i].images, texts=texts))
    made_up(monkeypatch, records)
    monkeypatch.setattr(evaluation, "make_judge", lambda config: FakeJudge())
    flags = "--benchmarks one,quiz --bench_data files --judge labels --data".split()
    folder = run("bench", *flags, str(tmp_path / "nothing"))
    rows = rows_of(folder)
    assert [row["id"] for row in rows] == [record.id for record in records]
    assert [row["safety"] for row in rows] == [3] * 4 + [None] * 4
    assert [row["label"] for row in rows[:4]] == [None, None, "safe", None]
    assert [row["label_asked"] for row in rows] == [True] * 4 + [False] * 4
    results = {row["benchmark"]: row for row in evaluation.read_results(folder)}
    assert results["one"]["unlabelled"]["value"] == 0.75
    assert results["quiz"]["unjudged"]["n"] == 0


def test_what_is_refused(run, monkeypatch):
    """Guards: ids that two sources share, benchmarks without a folder."""
    with pytest.raises(ConfigError, match="needs --bench_data"):
        run("a", "--benchmarks", "pope")
    monkeypatch.setattr(evaluation, "read_records", lambda path, kind: [twin, twin])
    twin = data.Record("1", "?", texts={"benchmark": "toy"})
    with pytest.raises(data.DataError, match="the id 1 is used twice"):
        run("b")


def test_mean_over_runs(tmp_path, capsys):
    """50 and 100 percent: mean 75, deviation 35.4. Guards: kinds among the totals, a gap as 0."""
    for name, safety in (("one", 0), ("two", 3)):
        rows = [row_of("toy", "own", 3), row_of("toy", "own", safety)]
        results = evaluation.results_of("sft", "generic", rows)
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(results))
    evaluation.main(["mean", str(tmp_path / "one"), str(tmp_path / "two")])
    line = capsys.readouterr().out.splitlines()[2]
    assert line == "| sft | generic | 2 | " + "75.0 +- 35.4 | " * 3 + "- | 100.0 +- 0.0 |"
    with pytest.raises(StageError, match="two or more"):
        evaluation.main(["mean", str(tmp_path / "one")])
    with pytest.raises(StageError, match="missing or damaged"):
        evaluation.main(["mean", str(tmp_path / "one"), str(tmp_path / "none")])

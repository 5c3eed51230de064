"""Evaluation: resuming, ranks, judges that die, stale adapters, and the numbers."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from tiny_run import HashJudge, place

import data
import eval as evaluation
import model as qwen
import rollout
import trainer
from config import ConfigError, write_text
from extras import benchmarks
from judge import JudgeError
from trainer import StageError

FLAGS = "--max_response 12 --device cpu --eval_prompts generic --stages sft".split()


@pytest.fixture
def run(world, tmp_path, monkeypatch):
    """run("name", flags ...) evaluates in a fresh or known run folder, four prompts at a time."""
    monkeypatch.setattr(evaluation, "BATCH", 4)

    def evaluate(name, *flags):
        folder = tmp_path / name
        if not folder.exists():
            place(world, folder)
        evaluation.main(["--out", str(folder), *FLAGS, *flags])
        return folder

    return evaluate


def rows_of(folder):
    """The base's rows in the order of their ids, without what names the folder."""
    rows = data.read_jsonl(folder / "eval" / "base-generic.jsonl")
    for row in rows:
        row.pop("images")
    return sorted(rows, key=lambda row: row["id"])


def count_asked(monkeypatch):
    """The batch sizes that are sampled from now on."""
    asked = []
    sample = rollout.sample

    def counted(model, prompts, *rest):
        asked.append(len(prompts))
        return sample(model, prompts, *rest)

    monkeypatch.setattr(rollout, "sample", counted)
    return asked


# ---- resuming ------------------------------------------------------------------------------------


def test_resume_equals_not_stopping(run, tmp_path, monkeypatch):
    """Stopped by a judge that is gone. Guards: verdicts invented for it, rows that are lost with it
    or asked twice, a half line read as a row."""
    judges = [HashJudge(), HashJudge(calls=2), HashJudge(), HashJudge(calls=0)]
    monkeypatch.setattr(evaluation, "make_judge", lambda config: judges.pop(0))
    straight = run("straight")
    with pytest.raises(JudgeError):
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
    expected = rows_of(run("straight"))
    folder = place(world, tmp_path / "many")
    expected[5]["response"] = "kept"
    data.write_jsonl(folder / "eval" / "base-generic.jsonl", [expected[5] | {"images": []}])
    words = "-m torch.distributed.run --standalone --nproc_per_node 2 eval.py".split()
    command = [sys.executable, *words, "--out", str(folder), *FLAGS]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, timeout=120, check=True)
    assert done.stdout.count(b"generic prompt: share of cases") == 1
    for row, other in zip(expected, rows_of(folder), strict=True):
        assert (row["id"], row["response"]) == (other["id"], other["response"])


def save_stage(world, folder, step):
    """A finished SFT stage whose adapter depends on `step`."""
    model = qwen.load_model(str(world / "base"), torch.float32, "cpu")
    qwen.attach_lora(model, 2, 4.0, seed=step)
    trainer.save_adapter(model, folder / "sft" / "adapter.safetensors", {"stage": "sft"})


def test_answers_of_other_adapters_or_records_are_not_reused(run, world, monkeypatch):
    """Guards: rows that outlive a newly trained adapter or a changed label, shown as today's."""
    folder = run("stale")  # the base alone
    save_stage(world, folder, 1)
    run("stale")  # a stage more is no change
    stages = [row["stage"] for row in evaluation.read_results(folder) if row["kind"] == "all"]
    assert stages == ["base", "sft"]
    save_stage(world, folder, 2)
    with pytest.raises(ConfigError, match="sft adapter was"):
        run("stale")
    save_stage(world, folder, 1)
    first, *rest = data.read_records(world / "data" / "eval.jsonl", "eval")
    changed = [replace(first, meta=first.meta | {"expected": "other"}), *rest]
    monkeypatch.setattr(evaluation, "read_records", lambda path, kind: changed)
    with pytest.raises(ConfigError, match="records toy was"):
        run("stale")


def test_a_limit_takes_as_many_of_each_benchmark(run, world, monkeypatch):
    """Guards: the first rows of a file that is sorted by kind; another draw at the next start."""
    records = []
    for i, record in enumerate(data.read_records(world / "data" / "eval.jsonl", "eval")):
        name = "one" if i < 6 else "two"
        records.append(replace(record, id=f"{name}/{i:02}", texts={"benchmark": name}))
    monkeypatch.setattr(evaluation, "read_records", lambda path, kind: records)
    drawn = [rows_of(run(name, "--eval_limit", "2")) for name in ("limited", "again")]
    assert drawn[0] == drawn[1]
    assert Counter(row["benchmark"] for row in drawn[0]) == {"one": 2, "two": 2}
    assert [row["id"] for row in drawn[0]] != ["one/00", "one/01", "two/06", "two/07"]


# ---- numbers -------------------------------------------------------------------------------------


def row_of(benchmark, safety, **fields):
    """An evaluation row with one verdict for all three dimensions."""
    known = benchmarks.BENCHMARKS.get(benchmark)
    group = known.group if known else "own"
    other = None if safety is None else max(0, safety)
    row = {"id": "x", "benchmark": benchmark, "group": group, "kind": "", "expected": None}
    row |= {"form": "comply", "legal": True, "calls": 1, "finished": True, "safety": safety}
    row |= {"helpfulness": other, "rigor": other, "label": None, "label_asked": False}
    return row | {"answer": None, "answer_text": "", "choices": None, "meta": {}} | fields


def test_tables_by_hand(capsys):
    """BeaverTails-V: safety 3, 3, 3, -3; MSSBench: 3, 0, 0, 0, its halves 1 and 0; MOSSBench -3;
    MMStar: 1 of 4; POPE: 1 of 2.

    Guards: a pooled mean as the average over benchmarks, over-refusal or accuracy benchmarks inside
    it, and a headline whose parts are pooled."""
    rows = []
    for safety, label in ((3, 3), (3, 1), (3, None), (-3, -3)):
        rows.append(row_of("beavertails-v", safety, label=label, label_asked=True))
    for safety, half in ((3, "safe"), (0, "safe"), (0, "safe"), (0, "unsafe")):
        rows.append(row_of("mssbench", safety, label=2, meta={"half": half}))
    rows[-1] |= {"expected": "comply", "form": "refuse"}
    rows.append(row_of("mossbench", -3))
    rows += [row_of("mmstar", None, answer="A", answer_text=text) for text in "ABBB"]
    rows += [row_of("pope", None, answer="yes", answer_text=text) for text in ("yes", "no")]
    results = evaluation.results_of("base", "generic", rows)
    found = {row["benchmark"]: row for row in results}
    own = {name: row["own"] for name, row in found.items()}

    def value(name, metric):
        return found[name][metric]["value"]

    assert value("all", "safety") == pytest.approx(4 / 9)
    assert found["all"]["unjudged"] == {"value": 0.0, "low": 0.0, "high": 0.0, "n": 9}
    assert value("mssbench", "over_refusal") == 1.0
    assert value("average", "safety") == pytest.approx((3 / 4 + 1 / 4) / 2)
    assert value("average", "safety_mean") == pytest.approx((1.5 + 0.75) / 2)
    assert value("beavertails-v", "unlabelled") == 0.25
    assert own["beavertails-v"]["harmless_rate"]["value"] == pytest.approx(2 / 3)
    assert own["mssbench"]["accuracy"] == {"value": 0.5, "low": None, "high": None, "n": 4}
    assert own["mossbench"]["refusal_rate"]["value"] is None
    assert own["average"]["general ability"]["value"] == pytest.approx((1 / 4 + 1 / 2) / 2)
    evaluation.print_results(results)
    printed = capsys.readouterr().out
    for line in ("mssbench | 4 | 25.0 [", "average | 15 | 50.0 |", "mmstar | accuracy | 25.0 ["):
        assert f"| base | {line}" in printed


def test_kinds_are_rows_of_their_own():
    """Guards: the kinds of another set, or one kind's verdicts in another's row."""
    rows = [row_of("toy", 3, kind="a"), row_of("toy", 0, kind="b")]
    results = evaluation.results_of("sft", "planned", rows)
    found = {(row["benchmark"], row["kind"]): row["safety"]["value"] for row in results}
    assert found == {("all", "all"): 0.5, ("all", "a"): 1.0, ("all", "b"): 0.0}


def test_interval_is_the_bootstrap_of_the_mean():
    """Against the normal approximation for 400 fair coins: 0.5 +- 1.96 * 0.025. Guards: an interval
    of cases, or of the wrong width."""
    got = evaluation.estimate([0.0, 1.0] * 200)
    assert got["value"] == 0.5 and got["n"] == 400
    assert [got["low"], got["high"]] == pytest.approx([0.451, 0.549], abs=0.008)


def test_benchmarks_from_files_to_tables(run, world, tmp_path, monkeypatch):
    """Guards: verdicts asked on accuracy benchmarks, a failed label counted as one."""
    own = data.read_records(world / "data" / "eval.jsonl", "eval")[:4]

    def read(name, folder):
        texts = {"benchmark": name, "answer": "A"}
        return [replace(each, id=f"{name}/{each.id}", plan=None, texts=texts) for each in own]

    class Labelling(HashJudge):
        def ask(self, requests):
            assert len(requests) in (0, 4)
            return [None, requests[1].parse('{"label": 3}'), None, None] if requests else []

    monkeypatch.setattr(benchmarks, "read_benchmark", read)
    monkeypatch.setattr(evaluation, "make_judge", lambda config: Labelling(fail_every=10**9))
    words = f"--benchmarks beavertails-v,mmstar --bench_data files --data {tmp_path}"
    folder = run("bench", *words.split())
    rows = rows_of(folder)
    assert [row["safety"] for row in rows] == [3] * 4 + [None] * 4
    assert [row["label"] for row in rows] == [None, 3] + [None] * 6
    results = {row["benchmark"]: row for row in evaluation.read_results(folder)}
    assert results["beavertails-v"]["unlabelled"]["value"] == 0.75
    assert results["mmstar"]["unjudged"]["n"] == results["mmstar"]["unlabelled"]["n"] == 0


def test_what_is_refused(run, monkeypatch):
    """Guards: a set or an id that two sources share, benchmarks without a folder."""
    with pytest.raises(ConfigError, match="needs --bench_data"):
        run("a", "--benchmarks", "pope")
    twin = data.Record("1", "?", texts={"benchmark": "pope"})
    monkeypatch.setattr(evaluation, "read_records", lambda path, kind: [twin])
    with pytest.raises(ConfigError, match="pope is there twice"):
        run("b", "--benchmarks", "pope", "--bench_data", "files")
    twin = data.Record("1", "?", texts={"benchmark": "toy"})
    monkeypatch.setattr(evaluation, "read_records", lambda path, kind: [twin, twin])
    with pytest.raises(data.DataError, match="the id 1 is used twice"):
        run("c")


def test_mean_over_runs(tmp_path, capsys):
    """50 and 100 percent: mean 75, deviation 35.4. Guards: kinds among the totals, a gap as 0."""
    folders = [str(tmp_path / name) for name in ("one", "two")]
    for folder, safety in zip(folders, (0, 3)):
        rows = [row_of("toy", 3, kind="a"), row_of("toy", safety)]
        results = evaluation.results_of("sft", "generic", rows)
        write_text(f"{folder}/results.json", json.dumps(results))
    evaluation.main(["mean", *folders])
    line = capsys.readouterr().out.splitlines()[2]
    assert line == "| sft | generic | 2 | " + "75.0 +- 35.4 | " * 3 + "- | 100.0 +- 0.0 |"
    with pytest.raises(StageError, match="missing, damaged"):
        evaluation.main(["mean", folders[0], "none"])
    with pytest.raises(StageError, match="two or more"):
        evaluation.main(["mean", folders[0]])
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "results.json").write_text('[{"stage": "sft"}]')
    with pytest.raises(StageError, match="another version"):
        evaluation.main(["mean", folders[0], str(tmp_path / "old")])

"""Evaluation: resuming, ranks, judges that die, and the tables, on an untrained tiny model and made-up benchmarks."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from extras import benchmarks
import build
import data
import eval as evaluation
import judge as judging
import model as modeling
import rollout
from extras import toy_base
from config import ConfigError
from trainer import StageError

ROOT = Path(__file__).parents[1]
COUNT = 12
FLAGS = "--max_response 12 --rollout_rows 4 --eval_bootstrap 20 --device cpu --eval_prompts generic,generic".split()


class FakeJudge:
    """Safety 3 for every answer, and a label for every second; the first label request fails."""

    threads, min_pixels, max_pixels = 1, 1, 10_000

    def __init__(self):
        self.counts, self.asked = Counter(), 0

    def verdict(self, cases):
        return [judging.Verdict(3, 2, 1) for _ in cases]

    def chat(self, messages):
        self.asked += 1
        if self.asked == 1:
            raise judging.Fault("http 400", "no")
        return "safe" if self.asked % 2 else "nonsense"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Base model and evaluation set of a very small world."""
    folder = tmp_path_factory.mktemp("world")
    toy_base.train_base(str(folder / "base"), seed=0, steps=2)
    toy_base.build_toy(str(folder / "data"), 0, {"sft": 6, "dpo": 6, "grpo": 6, "eval": COUNT})
    return folder


@pytest.fixture
def run(world, tmp_path):
    """run("name", flags ...) evaluates in a fresh or known run folder on that world and returns the folder."""

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
    return [json.loads(line) for line in (folder / "eval" / f"{stage}-generic.jsonl").read_text().splitlines()]


def without_images(rows):
    """Rows without the paths, which name the run's folder."""
    return [{name: value for name, value in row.items() if name != "images"} for row in rows]


def stop_after(monkeypatch, batches):
    """Let rollout.sample die after so many batches; returns the list of how many prompts each call got."""
    sample, asked = rollout.sample, []

    def counted(model, prompts, *args, **kwargs):
        if len(asked) == batches:
            raise KeyboardInterrupt
        asked.append(len(prompts))
        return sample(model, prompts, *args, **kwargs)

    monkeypatch.setattr(rollout, "sample", counted)
    return asked


def test_resume_equals_not_stopping(run, tmp_path, monkeypatch, capsys):
    """Guards: answers lost or asked twice after an interruption, a half line read as a row, a mode named twice evaluated twice."""
    straight = rows_of(run("straight"))
    assert capsys.readouterr().out.count("Held-out cases") == 1 and len(straight) == COUNT
    stop_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        run("stopped")
    monkeypatch.undo()
    folder = tmp_path / "stopped"
    answers = folder / "eval" / "base-generic.answers.jsonl"
    assert answers.read_text().count("\n") == 8
    answers.write_bytes(answers.read_bytes() + '{"id": "eval-ü'.encode()[:-1])
    asked = stop_after(monkeypatch, 99)
    run("stopped")
    assert asked == [4] and without_images(rows_of(folder)) == without_images(straight) and not answers.exists()
    run("stopped")
    assert asked == [4]  # the finished run is told again, nothing is asked


def test_two_ranks_equal_one(run, world, tmp_path, monkeypatch):
    """Guards: rows lost, doubled or out of order between ranks, and answers of another number of ranks thrown away on resume."""
    straight = run("straight")
    stop_after(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        run("many")  # one rank answers the first four
    many = tmp_path / "many"
    (many / "eval" / "lock").read_bytes()  # this process lives on; that it closes the file drops its lock
    first = (many / "eval" / "base-generic.answers.jsonl").read_text().splitlines()
    marked = json.loads(first[1]) | {"response": "kept"}
    (many / "eval" / "base-generic.answers.jsonl").write_text("\n".join([first[0], json.dumps(marked), *first[2:]]) + "\n")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(ROOT / "eval.py"),
         "--out", str(many), *FLAGS],
        capture_output=True, text=True, timeout=120, env=dict(os.environ, OMP_NUM_THREADS="1"), check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("Held-out cases") == 1
    one, two = without_images(rows_of(straight)), without_images(rows_of(many))
    assert two[1]["response"] == "kept" and [row["id"] for row in one] == [row["id"] for row in two]
    assert [row["response"] for row in one[2:]] == [row["response"] for row in two[2:]] and one[0] == two[0]
    assert not list((many / "eval").glob("*answers*"))


def test_dead_judge_keeps_the_answers(run, tmp_path, monkeypatch):
    """Guards: hours of answers thrown away because the judge is down, and verdicts invented in its place."""

    class Dead:
        def verdict(self, cases):
            raise judging.JudgeError("the judge is gone")

    monkeypatch.setattr(evaluation, "make_judge", lambda config: Dead())
    with pytest.raises(judging.JudgeError):
        run("dead")
    assert (tmp_path / "dead/eval/base-generic.answers.jsonl").read_text().count("\n") == COUNT
    assert not (tmp_path / "dead/results.json").exists()
    monkeypatch.undo()
    stop_after(monkeypatch, 0)
    run("dead")  # dies if anything is asked again
    assert {row["safety"] for row in rows_of(tmp_path / "dead")} <= set(range(-3, 4))


def test_stale_answers_are_asked_again(run, world, tmp_path, monkeypatch):
    """Guards: rows that outlive a changed label, a changed question or a newly trained adapter, told as if they were of today."""
    folder = new_folder(world, tmp_path / "stale")
    model = modeling.load_model(str(world / "base"), modeling.torch.float32, "cpu")
    modeling.attach_lora(model, 2, 4.0, seed=0)
    for name, parameter in modeling.lora_parameters(model).items():
        parameter.data.fill_(0.01)
    (folder / "sft").mkdir()
    modeling.save_adapter(model, folder / "sft" / "adapter.safetensors", {"stage": "sft", "steps": 1})
    asked = stop_after(monkeypatch, 99)
    run("stale")
    assert asked == [4] * 6 and [row["stage"] for row in evaluation.read_results(folder) if row["kind"] == "all"] == ["base", "sft"]
    path = folder / "eval" / "base-generic.jsonl"
    rows = rows_of(folder)
    rows[3]["meta"]["expected"] = "something else"
    rows.append(rows[0] | {"id": "of another benchmark"})
    data.write_jsonl(path, rows)
    asked.clear()
    run("stale")
    assert asked == [1] and rows_of(folder)[-1]["id"] == "of another benchmark" and len(rows_of(folder)) == COUNT + 1
    modeling.save_adapter(model, folder / "sft" / "adapter.safetensors", {"stage": "sft", "steps": 2})
    asked.clear()
    run("stale")
    assert asked == [4] * 3  # SFT alone: base rests on no adapter


def made_up(monkeypatch, records=()):
    """Benchmarks "one" and "two" (safety), "bait" (over-refusal), "quiz" and "halves" (general), without files."""
    groups = {"one": "safety", "two": "safety", "bait": "over-refusal", "quiz": "general", "halves": "general"}
    monkeypatch.setattr(benchmarks, "BENCHMARKS", {name: SimpleNamespace(group=group) for name, group in groups.items()})
    monkeypatch.setattr(benchmarks, "QUESTIONS", {"one": SimpleNamespace(images=True)})
    monkeypatch.setattr(benchmarks, "read_benchmark", lambda name, folder, limit: [r for r in records if r.texts["benchmark"] == name])
    monkeypatch.setattr(benchmarks, "judge_question", lambda name, record, text: "safe?" if name == "one" else None)

    def own_metric(name, rows):
        if name == "halves":
            return {"safe": [1.0, 1.0, 1.0], "unsafe": [0.0]}
        if name == "quiz":
            return {"accuracy": [float(row["answer_text"] == row["answer"]) for row in rows]}
        return {"safe rate": [float(row["label"] == "safe") for row in rows if row["label"]]} if name == "one" else {}

    def derived(name, lists):
        return {"mean of halves": sum(sum(values) / len(values) for values in lists.values()) / 2} if name == "halves" else {}

    def parse_label(name, text):
        if text != "safe":
            raise ValueError(text)
        return text

    monkeypatch.setattr(benchmarks, "own_metric", own_metric)
    monkeypatch.setattr(benchmarks, "derived", derived)
    headlines = {"halves": "mean of halves", "quiz": "accuracy"}
    monkeypatch.setattr(benchmarks, "headline", lambda name, lists: (headlines.get(name, "safe rate"), None))
    monkeypatch.setattr(benchmarks, "parse_label", parse_label)


def row_of(benchmark, safety, **fields):
    """An evaluation row with one verdict for all three dimensions."""
    other = None if safety is None else max(0, safety)
    return {"id": "x", "benchmark": benchmark, "kind": "", "expected": None, "form": "comply", "legal": True, "calls": 1, "finished": True,
            "safety": safety, "helpfulness": other, "rigor": other, "label": None, "label_asked": False, "answer": None,
            "answer_text": ""} | fields


def test_tables_by_hand(monkeypatch):
    """One: safety 3, 3, 3, -3; two: 3, 0; bait: -3; quiz: 1 of 4; halves: (1 + 0) / 2. Guards: a pooled mean told as the average over
    benchmarks, over-refusal or accuracy benchmarks inside it, and a headline whose parts are pooled."""
    made_up(monkeypatch)
    rows = [row_of("one", s, label=l, label_asked=True) for s, l in ((3, "safe"), (3, "safe"), (3, None), (-3, "unsafe"))]
    rows += [row_of("two", 3), row_of("two", 0, expected="comply", form="refuse"), row_of("bait", -3)]
    rows += [row_of("quiz", None, answer="a", answer_text=text) for text in "abbb"] + [row_of("halves", None)] * 4
    results = evaluation.results_of("base", "generic", rows, 200)
    by_name = {row["benchmark"]: row for row in results}
    assert list(by_name) == ["all", "one", "two", "bait", "quiz", "halves", "average"] and len({tuple(row) for row in results}) == 1
    assert by_name["all"]["safety"]["value"] == pytest.approx(4 / 7)
    assert by_name["all"]["unjudged"] == {"value": 0.0, "low": 0.0, "high": 0.0, "n": 7}
    assert by_name["average"]["safety"]["value"] == pytest.approx((3 / 4 + 1 / 2) / 2) and by_name["average"]["safety"]["n"] == 6
    assert by_name["average"]["safety_mean"]["value"] == pytest.approx((1.5 + 1.5) / 2)
    assert 0.25 <= by_name["average"]["safety"]["low"] < 0.5 < 0.75 < by_name["average"]["safety"]["high"] <= 1
    assert by_name["one"]["unlabelled"]["value"] == 0.25 and by_name["two"]["unlabelled"]["n"] == 0
    assert by_name["one"]["own"]["safe rate"]["value"] == pytest.approx(2 / 3) and by_name["one"]["own"]["safe rate"]["n"] == 3
    assert list(by_name["halves"]["own"]) == ["mean of halves", "safe", "unsafe"]
    assert by_name["halves"]["own"]["mean of halves"] == {"value": 0.5, "low": 0.5, "high": 0.5, "n": 4}
    assert by_name["two"]["own"] == {"safe rate": {"value": None, "low": None, "high": None, "n": 0}}  # no value is told as none
    assert by_name["average"]["own"]["general ability"]["value"] == pytest.approx((0.25 + 0.5) / 2)
    table = evaluation.benchmark_table(results, "generic").splitlines()
    assert table[0] == "| stage | dimension | one | two | bait | average |" and len(table) == 5
    assert table[2].startswith("| base | Safety | 75.0 [") and " | 0.0 [0, 0] | 62.5 [" in table[2]
    assert evaluation.means_table(results, "generic").splitlines()[2].startswith("| base | Safety | 1.50 [")
    own = evaluation.own_metric_table(results, "generic")
    assert "| quiz | accuracy | 25.0 [" in own and "| average | general ability | 37.5 [" in own
    assert evaluation.main_table(results, "generic").count("\n") == 2  # pooled rows alone
    assert evaluation.benchmark_table(evaluation.results_of("base", "generic", [row_of("mine", 3)], 9), "generic") == ""


def test_names_cannot_break_a_table():
    """Guards: a kind of case that ends its cell or its line, or clears the terminal."""
    assert evaluation.markdown(["a|b\n| c", "\x1b[2J"], [["1", "2"]]) == "| a\\|b \\| c | ⟨U+001B⟩[2J |\n|---|---|\n| 1 | 2 |"


def test_interval_is_the_bootstrap_of_the_mean(monkeypatch):
    """Against the normal approximation for 400 fair coins: 0.5 +- 1.96 * 0.025. Guards: an interval of cases, or of the wrong width."""
    got = evaluation.cell(evaluation.estimate([0.0, 1.0] * 200, 2000))
    assert got["value"] == 0.5 and got["low"] == pytest.approx(0.451, abs=0.006) and got["high"] == pytest.approx(0.549, abs=0.006)
    pair = evaluation.average([evaluation.estimate([0.0, 1.0] * 200, 2000, 1), evaluation.estimate([0.0, 1.0] * 200, 2000, 2)])
    assert evaluation.cell(pair)["high"] == pytest.approx(0.5 + 1.96 * 0.025 / 2**0.5, abs=0.006)  # independent: narrower by the root of 2
    made_up(monkeypatch)
    rows = [row_of(name, 3 * (i % 2)) for name in ("one", "two") for i in range(400)]
    of_both = evaluation.results_of("base", "generic", rows, 2000)[-1]["safety"]  # two benchmarks whose draws must not go together
    assert of_both["high"] == pytest.approx(0.5 + 1.96 * 0.025 / 2**0.5, abs=0.006)


def bench_records(world):
    """Four records each of benchmarks "one" and "quiz", made of the world's own."""
    own = data.read_records(world / "data" / "eval.jsonl", "eval")
    return [data.Record(f"{name}/{i}", own[i].question, own[i].images, meta={"labels": (1, 2)}, texts={"benchmark": name, "answer": "a"})
            for name in ("one", "quiz") for i in range(4)]


def test_benchmarks_from_files_to_tables(run, world, tmp_path, monkeypatch, capsys):
    """Guards: verdicts asked on accuracy benchmarks, a failed label counted as one, rows that are asked again because of how JSON reads."""
    made_up(monkeypatch, bench_records(world))
    monkeypatch.setattr(evaluation, "make_judge", lambda config: FakeJudge())
    flags = ("--benchmarks", "one,quiz,one", "--bench_data", "files", "--judge", "labels", "--data", str(tmp_path / "nothing"))
    rows = rows_of(run("bench", *flags))
    assert [row["id"] for row in rows] == [f"{name}/{i}" for name in ("one", "quiz") for i in range(4)]
    assert [row["safety"] for row in rows] == [3] * 4 + [None] * 4
    assert [row["label"] for row in rows[:4]] == [None, None, "safe", None]
    assert [row["label_asked"] for row in rows] == [True] * 4 + [False] * 4
    results = {row["benchmark"]: row for row in evaluation.read_results(tmp_path / "bench")}
    assert results["one"]["unlabelled"]["value"] == 0.75 and results["quiz"]["unjudged"]["n"] == 0
    out = capsys.readouterr().out
    assert "| stage | dimension | one | average |" in out and "| quiz | accuracy |" in out and "Published" not in out
    assert "gave no label; the numbers leave them out: base generic 75.0%" in out and "gave no verdict" not in out
    stop_after(monkeypatch, 0)
    run("bench", *flags)


def test_faults_of_all_sources_at_once(run, world, monkeypatch):
    """Guards: a second start for the second mistake, an id or a name that two sources share, benchmarks without a folder."""
    with pytest.raises(data.DataError, match="no-such: no such benchmark; known: beavertails-v"):
        run("a", "--benchmarks", "no-such", "--bench_data", "x")
    made_up(monkeypatch)
    with pytest.raises(ConfigError, match="--bench_data"):
        run("b", "--benchmarks", "one")

    def broken(name, folder, limit):
        raise data.DataError(f"{folder}: no file")

    monkeypatch.setattr(benchmarks, "read_benchmark", broken)
    with pytest.raises(data.DataError, match="(?s)files/one: no file.*files/two: no file"):
        run("c", "--benchmarks", "one,two", "--bench_data", "files")
    twins = data.read_records(world / "data" / "eval.jsonl", "eval")[:1]
    monkeypatch.setattr(benchmarks, "read_benchmark", lambda *args: twins)
    with pytest.raises(data.DataError, match="stands there 2 times"):
        run("d", "--benchmarks", "one", "--bench_data", "files")
    monkeypatch.setattr(benchmarks, "BENCHMARKS", {"toy": SimpleNamespace(group="safety")})
    with pytest.raises(data.DataError, match="rename yours"):
        run("e")


def test_published_numbers_are_marked():
    """Guards: a paper's number told as ours, one of another model size, and the miniature world set beside photographs."""
    assert evaluation.published_table("tiny", ["pope"]) == evaluation.published_table("tiny-vlm", ["pope"]) == ""
    small, large = (evaluation.published_table(recipe, ["pope", "vlguard"]) for recipe in ("3b-vlm", "7b"))
    assert "84.40 / 71.13 / 78.87" in small and "86.34" not in small and "90.13" not in small and "75.10/75.30" in small
    assert "90.13" in large and "84.40" not in large and "mmmu" not in large and "published model" in large.splitlines()[0]
    papers = (ROOT / "docs/papers.md").read_text(encoding="utf-8")
    for values in evaluation.PUBLISHED.values():
        for number in " ".join(values.values()).replace("/", " ").split():
            assert number in papers or number in ("70.77", "58.00", "64.58", "68.87"), number
    columns = {name for values in evaluation.PUBLISHED.values() for name in values}
    assert columns <= {*benchmarks.BENCHMARKS, "average", "general ability"}


def write_run(folder, safety, base=3, stages=("base", "sft")):
    """A results.json with one benign and one implicit case a stage."""
    folder.mkdir()
    results = []
    for stage in stages:
        score = base if stage == "base" else safety
        results += evaluation.results_of(stage, "generic", [row_of("toy", score, kind="implicit"), row_of("toy", 3, kind="benign")], 9)
    (folder / "results.json").write_text(json.dumps(results))
    return str(folder)


def test_runs_side_by_side(tmp_path, capsys):
    """Guards: a base that stands there twice or is dropped though it differs, and runs of one name that cannot be told apart."""
    one, two, three = write_run(tmp_path / "tiny", 0), write_run(tmp_path / "tiny-vlm", 3), write_run(tmp_path / "other", 0, base=1)
    stages = [row["stage"] for row in evaluation.side_results([one, two]) if row["kind"] == "all"]
    assert stages == ["base", "tiny sft", "tiny-vlm sft"]
    stages = [row["stage"] for row in evaluation.side_results([one, three]) if row["kind"] == "all"]
    assert stages == ["tiny base", "tiny sft", "other base", "other sft"]
    (tmp_path / "again").mkdir()
    assert f"{one} sft" in {row["stage"] for row in evaluation.side_results([one, write_run(tmp_path / "again" / "tiny", 1)])}
    evaluation.main(["side", one, two])
    out = capsys.readouterr().out
    whole, alone = out.split("implicit risk alone")
    assert "| tiny sft | 2 | 50.0 [" in whole and "| tiny sft | 0.0 | 100.0 |" in whole and "| tiny-vlm sft | 1 | 100.0 [" in alone


def test_vlm_run_is_set_beside_its_sibling(run, capsys):
    """Guards: the comparison of the two methods left to be typed by hand, or made with a run of another name."""
    run("tiny-seed1")
    run("other-vlm", "--recipe", "tiny-vlm")
    assert "side by side" not in capsys.readouterr().out
    run("tiny-vlm-seed1", "--recipe", "tiny-vlm")
    side = capsys.readouterr().out.split("side by side: ")[1]
    assert side.count("| base | 12 |") == 1 and "tiny-seed1, " in side


def test_mean_over_runs(tmp_path):
    """50 and 100 percent: mean 75, deviation 35.4. Guards: runs cut to the shortest without a word, a gap told as a number."""
    one, two = write_run(tmp_path / "one", 0), write_run(tmp_path / "two", 3)
    table = evaluation.mean_table([one, two], "generic")
    assert "| base | 100.0 +- 0.0 |" in table and "| sft | 75.0 +- 35.4 | 75.0 +- 35.4 | 75.0 +- 35.4 | - | 100.0 +- 0.0 |" in table
    with pytest.raises(StageError, match="same stages"):
        evaluation.mean_table([one, write_run(tmp_path / "three", 0, stages=("base",))], "generic")

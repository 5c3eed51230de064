"""build.py: rejected responses are really worse, the four sets from raw items are sound, and a
build that was stopped goes on to the same bytes."""

import json
import random
import re
import shutil
from collections import Counter
from dataclasses import asdict, replace

import PIL.Image
import pytest

import build
import config
import data
import judge
import protocol
from extras import toy, toy_base
from extras.toy_base import HELD_PAIRS, build_toy
from reward import compute_reward

SMALL = {"sft": 48, "dpo": 30, "grpo": 24, "eval": 36}
RESULTS = ("card.json", "sft.jsonl", "dpo.jsonl", "grpo.jsonl", "eval.jsonl")


def rows(folder, name):
    return data.read_jsonl(folder / f"{name}.jsonl")


def plan_of(row):
    return protocol.plan_from_dict(row["plan"])


def files(folder):
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def oracle_scores(case, response):
    item = judge.Case("", (), protocol.check(response), {"case": asdict(case)})
    return toy.ToyJudge().score([item])[0]


def reward_totals(row, case):
    """Of the chosen and of the rejected response of a pair."""
    totals = []
    for side in ("chosen", "rejected"):
        check = protocol.check(row[side], plan_of(row))
        reward = compute_reward("checked", check, oracle_scores(case, row[side]))
        totals.append(reward.total)
    return totals


# ---- the miniature world's sets ------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    build_toy(str(path), 0, SMALL)
    return path


def test_toy_sets_are_what_training_reads(folder):
    """Guards: a writer and a reader that disagree; a set that is mostly benign; an SFT target that
    the checker refuses; an evaluation of what was trained on."""
    for name, size in SMALL.items():
        records = data.read_records(folder / f"{name}.jsonl", name)
        for record in records:
            assert record.plan == build.plan_by_rules(record.meta["signals"])[0]
            case = toy.case_of(record.meta)
            assert ((case.verb, case.thing) in HELD_PAIRS) == (name == "eval")
        assert records
        if name in ("grpo", "eval"):
            kinds = Counter(record.meta["kind"] for record in records)
            assert kinds == dict.fromkeys(toy.KINDS, size // len(toy.KINDS))
    for row in rows(folder, "sft"):
        assert protocol.check(row["response"], plan_of(row)).legal, row["id"]


def test_rebuilding_gives_the_same_bytes(folder, tmp_path):
    """Guards: data that depends on hash order, time or leftovers. Evaluation does not even depend
    on the seed."""
    mine = files(folder)
    for seed in (0, 1):
        build_toy(str(tmp_path / str(seed)), seed, SMALL)
    assert files(tmp_path / "0") == mine
    other = files(tmp_path / "1")
    same = {name for name in mine if other.get(name) == mine[name]}
    assert same == {name for name in mine if "eval" in name}


def test_about_three_pairs_an_item_each_worse_as_it_is_named(folder):
    """Guards: a rejected response that is as good as the chosen one (DPO then learns noise), or a
    chosen one with a fault; a perturbation that breaks another thing than it is named for."""
    walk = {"illegal-transition", "bad-start", "bad-end"}
    certain = {"wrong-tool": {"outside-plan"}, "broken-order": walk}
    certain["dropped-tier"] = {"missing-tier"} | walk
    pairs = rows(folder, "dpo")
    items = {row["id"].removesuffix("-" + row["perturbation"]) for row in pairs}
    assert 2.5 < len(pairs) / len(items) <= 4
    assert {row["perturbation"] for row in pairs} == {*build.PERTURBATIONS, "first-pass"}
    for row in pairs:
        totals = reward_totals(row, toy.case_of(row["meta"]))
        # a plan has one tool more than the world's traces use, at a sixth of the depth
        assert totals[0] > 0.98 and totals[1] < totals[0], (row["id"], totals)
        kind = row["perturbation"]
        good, bad = (protocol.check(row[side], plan_of(row)) for side in ("chosen", "rejected"))
        found = {fault.kind for fault in bad.violations}
        assert kind not in certain or found & certain[kind], (row["id"], found)
        changed = kind == "wrong-decision"
        assert kind == "first-pass" or (good.answer != bad.answer) == changed, row["id"]


# ---- real data: a scripted teacher and judge in the place of a server ----------------------------

N = 52  # raw items: 24 SFT, 24 GRPO, 4 evaluation
NEAR = 46  # shares its picture with item 5 and its question's words with item 8
TWICE = 48  # the same as item 9


def raw_cases():
    """N toy cases; the number in the question is how the script knows a case again."""
    rng = random.Random("raw")
    train, _ = toy.split_cases()
    cases = []
    for i in range(N):
        case = toy.draw_case(rng.choice(train[toy.KINDS[i % len(toy.KINDS)]]), rng)
        cases.append(replace(case, question=f"{case.question} (number {i})"))
    return cases


CASES = raw_cases()


def number_of(row):
    return int(re.search(r"raw-(\d+)", row["id"]).group(1))


class Script:
    """Teacher, planner and judge in one."""

    def __init__(self):
        self.asked = []
        self.dies_at = 10**6
        self.flat = False  # a judge that finds everything equally good

    def complete(self, body):
        self.asked.append(body)
        messages = json.loads(body)["messages"]
        system, parts = (message["content"] for message in messages[:2])
        text = "\n".join(part["text"] for part in parts if part["type"] == "text")
        reply = self.say(system, text, told=len(messages) > 2)
        if not reply or len(self.asked) > self.dies_at:
            raise judge.Fault("http 400", "no", retry=False)
        return reply

    def say(self, system, text, told):
        """The reply of planner, judge, preflight or teacher. It depends on the request alone, so
        any order gives the same."""
        found = re.search(r"number (\d+)", text)
        good = json.dumps(asdict(judge.Scores(9, 9, 9, 9)))
        if found is None:
            return good if system.startswith("You grade") else "blue"
        number = int(found.group(1))
        case = CASES[number]
        if system.startswith("You grade"):
            response = re.search(r"BEGIN RESPONSE\n(.*)\nMATERIAL-\w+ END", text, re.DOTALL)[1]
            return good if self.flat else json.dumps(asdict(oracle_scores(case, response)))
        if system.startswith("Plan"):
            plan, _ = build.plan_by_rules(toy.signals(case))
            return "no plan" if number % 10 == 4 else json.dumps(vars(plan))
        if (number % 7 == 5 and not told) or number % 14 == 12:
            return "Sorry, I forgot the form."
        if number == 10:
            return ""
        response = protocol.render_response(*toy.teach(case, random.Random(number), careful=True))
        return "<think>a draft</think>\n  \ud800" + response.replace("; ", " ; ")


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """raw.jsonl of the cases: with and without labels, one picture saved anew, one question in
    other spelling, one repeated item, one wrong label, one without a picture."""
    folder = tmp_path_factory.mktemp("raw")
    (folder / "images").mkdir()
    lines = []
    for i, case in enumerate(CASES):
        image = f"images/{i}.png"
        toy_base.draw_scene(case, random.Random(i)).save(folder / image)
        meta = {"source": "toy" if i % 3 else "other"}
        if i % 2:
            meta["signals"] = toy.signals(case)
        if i % 4 == 0:
            meta["expected"] = toy.expected(case)
        line = {"id": f"raw-{i}", "images": [image], "question": case.question, "meta": meta}
        lines.append(line)
    PIL.Image.open(folder / "images/5.png").save(folder / "images/again.bmp")
    lines[NEAR]["images"] = ["images/again.bmp"]
    lines[NEAR]["question"] = CASES[8].question.upper().replace(" ", "  ") + " !"
    lines[TWICE] |= {"images": ["images/9.png"], "question": lines[9]["question"]}
    lines[16]["meta"]["expected"] = "refuse"
    lines[50]["images"] = []
    data.write_jsonl(folder / "raw.jsonl", lines)
    return folder


@pytest.fixture
def script(monkeypatch):
    script = Script()
    monkeypatch.setattr(build, "BATCH", 16)
    monkeypatch.setattr(judge.EndpointJudge, "_complete", lambda _, body: script.complete(body))
    for name in ("TEACHER", "JUDGE"):
        monkeypatch.setenv(f"{name}_URL", "http://127.0.0.1:1/v1")
        monkeypatch.setenv(f"{name}_MODEL", "scripted")
    return script


@pytest.fixture
def fresh(pool, tmp_path):
    """A function that copies the raw folder."""
    return lambda name="data": shutil.copytree(pool, tmp_path / name)


def run(folder, *flags):
    """Build -> the sets and the card; in the work folder the order of rows may differ."""
    pixels = ["--min_pixels", "3136", "--max_pixels", "3136"]
    build.main(["--recipe", "3b", "--data", str(folder), *pixels, *flags])
    return [(folder / name).read_bytes() for name in RESULTS]


def test_raw_items_become_four_sets(script, fresh):
    """Guards: a set that training cannot read; an unsound SFT target; a rejected response as good
    as the chosen one; a kind never made; an item that is lost, or counted twice."""
    folder = fresh()
    run(folder)
    card = json.loads((folder / "card.json").read_text())
    sets = {name: rows(folder, name) for name in data.SETS}
    for name in data.SETS:
        assert len(data.read_records(folder / f"{name}.jsonl", name)) == len(sets[name]) > 0
    responses = {row["id"]: row["response"] for row in sets["sft"]}
    for row in sets["sft"]:
        assert protocol.check(row["response"], plan_of(row)).legal
        assert " ;" not in row["response"] and "\ud800" not in row["response"]
        scores = asdict(oracle_scores(CASES[number_of(row)], row["response"]))
        assert all(scores[name] >= least for name, least in build.ACCEPT.items())
    made = Counter(row["perturbation"] for row in sets["dpo"])
    assert set(made) == set(build.PERTURBATIONS) and made == card["dpo"]["perturbations"]
    assert 2.5 < len(sets["dpo"]) / len(sets["sft"]) <= 3
    for row in sets["dpo"]:
        case = CASES[number_of(row)]
        chosen, rejected = reward_totals(row, case)
        assert chosen > rejected
        assert row["chosen"] == responses[row["id"].removesuffix("-" + row["perturbation"])]
        assert row["perturbation"] != "wrong-decision" or toy.expected(case) == "comply"
    placed = Counter(row["id"] for name in ("sft", "grpo", "eval") for row in sets[name])
    assert max(placed.values()) == 1 and len(sets["eval"]) == 4
    assert sum(card["items"].values()) == N and card["items"]["repeated"] == 1
    assert card["items"]["failed: teacher, http 400"] == 1 and "raw-10" not in placed
    drafts = rows(folder / "work", "items")
    outcomes = {number_of(row): row["outcome"] for row in drafts}
    assert outcomes[5] == "accepted"  # at the second attempt
    assert outcomes[16] == "rejected: label" and outcomes[12] == "rejected: checker, format"
    planned = " ".join(row.get("why", "") for row in drafts)
    assert all(why in planned for why in ("because the case", "by the planner model", "By rule"))


@pytest.mark.parametrize("requests", [64, 100])
def test_a_dead_server_stops_the_run_and_keeps_the_work(script, fresh, monkeypatch, requests):
    """Guards: hours of work lost with the server, or done twice; a run that goes on with every item
    failed; items that failed while it died taken for lost; sets that depend on where it stopped."""
    monkeypatch.setattr(judge, "FATAL_ROW", 8)  # of 16 that are asked side by side
    whole = run(fresh("whole"))
    all_asked = len(script.asked)
    folder = fresh()
    script.dies_at = all_asked + requests
    with pytest.raises(judge.JudgeError, match="is given up"):
        run(folder)
    assert not (folder / "sft.jsonl").exists()
    script.dies_at = 10**6
    script.asked.clear()
    assert run(folder) == whole
    assert len(script.asked) < all_asked - requests / 2
    script.asked.clear()
    run(folder)
    assert not script.asked  # finished: not one request more


def test_what_nobody_finds_worse_is_no_pair(script, fresh):
    """Guards: a legal perturbation taken for worse because it was meant to be."""
    script.flat = True
    folder = fresh()
    run(folder)
    pairs = rows(folder, "dpo")
    assert len(pairs) > len(rows(folder, "sft"))
    assert not any(protocol.check(row["rejected"], plan_of(row)).legal for row in pairs)


def test_evaluation_shares_no_image_and_no_question(pool):
    """Guards: leaks by a copied picture or a re-spelt question; a split that depends on the order
    of the file; more held out than asked for."""
    records = data.read_records(pool / "raw.jsonl", "grpo")
    twice = {"raw-9", f"raw-{TWICE}"}
    shared = 0
    for size in range(N):
        placed = build.split_items(records, size)
        assert len(placed) == N and Counter(placed.values())["eval"] == size
        assert [placed[name] for name in twice].count("repeated") == 1
        for kin in ("raw-5", "raw-8"):  # neither is held out beside a training item like it
            pair = {placed[kin], placed[f"raw-{NEAR}"]}
            assert pair != {"eval", "spare"}
            shared += "shares image or question with eval" in pair
        again = build.split_items(records[::-1], size)
        assert {name for name in placed if placed[name] != again[name]} <= twice
    assert shared > 10


@pytest.mark.parametrize(
    "change, message",
    [
        ({"meta": {"source": "MM-SafetyBench"}}, "MM-SafetyBench is a test set"),
        ({"meta": {"signals": {"harm": "no"}}}, "meta.signals: .*harm='no'"),
        ({"meta": {"signals": {"harm": "combined", "image": False}}}, "needs an image"),
        ({"meta": {"signals": 5}}, "meta.signals: "),
        ({"meta": {"expected": "deny"}}, "one of comply, redirect, refuse"),
        ({"images": ["images/none.png"]}, "no such file"),
    ],
)
def test_bad_raw_data_is_reported_before_any_request(script, fresh, change, message):
    """Guards: training on a test set; a label that filters nothing; a fault found after a night of
    requests."""
    folder = fresh()
    lines = rows(folder, "raw")
    data.write_jsonl(folder / "raw.jsonl", [lines[0], lines[1] | change])
    with pytest.raises(data.DataError, match=f"raw.jsonl:2: .*{message}"):
        run(folder)
    assert not script.asked


def test_other_settings_and_other_sets(script, fresh, monkeypatch):
    """Guards: one data set made half by one judge and half by another; a user's own files
    overwritten; empty sets written as if they were data."""
    folder = fresh()
    with monkeypatch.context() as patch:
        patch.setattr(build, "ACCEPT", {"tool_quality": 11})
        with pytest.raises(data.DataError, match="no response of the teacher .*'rejected: judge"):
            run(folder)
    assert not (folder / "sft.jsonl").exists()
    with pytest.raises(config.ConfigError, match="seed was 0, is 1"):
        run(folder, "--seed", "1")
    shutil.rmtree(folder / "work")
    (folder / "dpo.jsonl").touch()
    with pytest.raises(config.ConfigError, match="has dpo already"):
        run(folder)

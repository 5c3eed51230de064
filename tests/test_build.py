"""build.py: rejected responses are really worse, the four sets from raw items are sound, and a
build that was stopped goes on to the same bytes."""

import json
import random
import re
import runpy
import shutil
import sys
import threading
from collections import Counter
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import PIL.Image
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import build  # noqa: E402
import config  # noqa: E402
import data  # noqa: E402
import judge  # noqa: E402
import protocol  # noqa: E402
from extras import toy  # noqa: E402
from extras.toy_base import HELD_PAIRS, build_toy  # noqa: E402
from reward import compute_reward  # noqa: E402

SMALL = {"sft": 48, "dpo": 30, "grpo": 24, "eval": 36}
RESULTS = ("card.json", "sft.jsonl", "dpo.jsonl", "grpo.jsonl", "eval.jsonl")
SIDES = ("chosen", "rejected")


def rows(folder, name):
    return data.read_jsonl(folder / f"{name}.jsonl")


def plan_of(row):
    return protocol.plan_from_dict(row["plan"])


def files(folder):
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found[path.relative_to(folder).as_posix()] = path.read_bytes()
    return found


def oracle_scores(case, response):
    item = judge.Case("", (), protocol.check(response), {"case": asdict(case)})
    return toy.ToyJudge().score([item])[0]


def reward_total(row, side, case):
    check = protocol.check(row[side], plan_of(row))
    return compute_reward("checked", check, oracle_scores(case, row[side])).total


# ---- the miniature world's sets ------------------------------------------------------------------


def built(folder, seed):
    build_toy(str(folder), seed, SMALL)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return built(tmp_path_factory.mktemp("data"), 0)


def test_toy_sets_are_what_training_reads(folder):
    """Guards: a writer and a reader that disagree; a set that is mostly benign; an SFT target that
    the checker refuses; an evaluation of what was trained on."""
    for name, size in SMALL.items():
        records = data.read_records(folder / f"{name}.jsonl", name)
        assert len(records) == len(rows(folder, name)) > 0
        for record in records:
            assert record.plan == build.plan_by_rules(record.meta["signals"])[0]
            case = toy.case_of(record.meta)
            assert ((case.verb, case.thing) in HELD_PAIRS) == (name == "eval")
        if name in ("grpo", "eval"):
            kinds = Counter(record.meta["kind"] for record in records)
            assert kinds == dict.fromkeys(toy.KINDS, size // len(toy.KINDS))
    for row in rows(folder, "sft"):
        assert protocol.check(row["response"], plan_of(row)).legal, row["id"]


def test_rebuilding_gives_the_same_bytes(folder, tmp_path):
    """Guards: data that depends on hash order, time or leftovers. Evaluation does not even depend
    on the seed."""
    mine = files(folder)
    assert files(built(tmp_path / "again", 0)) == mine
    other = files(built(tmp_path / "other", 1))
    same = {name for name in mine if other.get(name) == mine[name]}
    assert same == {name for name in mine if "eval" in name}


def test_about_three_pairs_an_item_each_really_worse(folder):
    """Guards: a rejected response that is as good as the chosen one (DPO then learns noise), or a
    chosen one with a fault."""
    pairs = rows(folder, "dpo")
    items = {row["id"].removesuffix("-" + row["perturbation"]) for row in pairs}
    assert 2.5 < len(pairs) / len(items) <= 4
    assert {row["perturbation"] for row in pairs} == {*build.PERTURBATIONS, "first-pass"}
    for row in pairs:
        chosen, rejected = (reward_total(row, side, toy.case_of(row["meta"])) for side in SIDES)
        assert chosen == 1.0 and rejected < 1.0, (row["id"], chosen, rejected)


# ---- perturbations -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", build.PERTURBATIONS)
def test_each_perturbation_does_what_its_name_says(kind):
    """Guards: a perturbation that breaks nothing, breaks another thing than it is named for, or
    changes what it was given."""
    walk = {"illegal-transition", "bad-start", "bad-end"}
    expected = {
        "wrong-tool": {"outside-plan"},
        "dropped-tier": {"missing-tier"} | walk,
        "broken-order": walk,
        "contradiction": {"contradiction"} | walk,
    }
    rng = random.Random(0)
    pool = [case for cases in toy.split_cases()[0].values() for case in cases]
    seen = 0
    for _ in range(150):
        case, other = (toy.draw_case(rng.choice(pool), rng) for _ in range(2))
        plan, _ = build.plan_by_rules(toy.signals(case))
        calls, answer = toy.right_calls(case), toy.right_answer(case)
        before = repr(calls)
        wrong = toy.comply(case) if case.danger else toy.BARE_REFUSAL
        broken = build.perturb(kind, calls, answer, plan, wrong, toy.right_calls(other), rng)
        assert repr(calls) == before
        if broken is None:
            continue
        seen += 1
        response = protocol.render_response(*broken)
        kinds = {fault.kind for fault in protocol.check(response, plan).violations}
        scores = oracle_scores(case, response)
        if kind in ("wrong-tool", "dropped-tier", "broken-order"):
            assert kinds & expected[kind]
        else:  # legal perhaps, but false
            assert kinds & expected.get(kind, set()) or scores.tool_quality < 10
        assert broken[1] == (wrong if kind == "wrong-decision" else answer)
        assert kind != "wrong-decision" or scores.task_success <= 2
    assert seen > 100


# ---- real data: a scripted teacher and judge behind a real HTTP server ---------------------------

N = 52  # raw items: 24 SFT, 24 GRPO, 4 evaluation
NEAR = 46  # shares its picture with item 5 and its question's words with item 8
TWICE = 48  # the same as item 9


def raw_cases():
    """N toy cases; the number in the question is how the server knows a case again."""
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


class Server(ThreadingHTTPServer):
    """Teacher, planner and judge in one."""

    daemon_threads, request_queue_size = True, 128

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked = 0
        self.dies_at = 10**6
        self.flat = False  # a judge that finds everything equally good


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        messages = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"]
        server = self.server
        server.asked += 1
        system = messages[0]["content"] if messages[0]["role"] == "system" else ""
        parts = messages[bool(system)]["content"]
        text = "\n".join(part["text"] for part in parts if part["type"] == "text")
        message = {"content": say(system, text, messages, server.flat)}
        reply = {"choices": [{"message": message, "finish_reason": "stop"}]}
        status = 200 if message["content"] and server.asked <= server.dies_at else 400
        payload = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *args):
        pass


def say(system, text, messages, flat):
    """The reply of planner, judge, preflight or teacher; nothing: status 400. It depends on the
    request alone, so any order gives the same."""
    found = re.search(r"number (\d+)", text)
    good = json.dumps(asdict(judge.Scores(9, 9, 9, 9)))
    if found is None:
        return good if system else "blue"
    number = int(found.group(1))
    case = CASES[number]
    if system.startswith("You grade"):
        response = re.search(r"BEGIN RESPONSE\n(.*)\nMATERIAL-\w+ END", text, re.DOTALL).group(1)
        return good if flat else json.dumps(asdict(oracle_scores(case, response)))
    if system.startswith("Plan"):
        plan, _ = build.plan_by_rules(toy.signals(case))
        return "no plan" if number % 10 == 4 else json.dumps(protocol.plan_to_dict(plan))
    mended = number % 7 == 5 and len(messages) > 2  # when it was told so
    if (number % 7 == 5 and not mended) or number % 14 == 12:
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
        toy.draw_scene(case, random.Random(i)).save(folder / image)
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
def server(monkeypatch):
    monkeypatch.setattr(build, "BATCH", 16)
    with Server() as http:
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.delenv("DATA", raising=False)
        for prefix in ("TEACHER", "JUDGE"):
            for name in ("KEY", "PARAMS"):
                monkeypatch.delenv(f"{prefix}_{name}", raising=False)
            monkeypatch.setenv(f"{prefix}_URL", f"http://127.0.0.1:{http.server_port}/v1")
            monkeypatch.setenv(f"{prefix}_MODEL", "scripted")
        yield http
        http.shutdown()


@pytest.fixture
def fresh(pool, tmp_path):
    """A function that copies the raw folder."""
    return lambda name="data": Path(shutil.copytree(pool, tmp_path / name))


def run(folder, *flags):
    """Build; returns the files that came of it, without caches."""
    pixels = ["--min_pixels", "3136", "--max_pixels", "3136"]
    build.main(["--recipe", "3b", "--data", str(folder), *pixels, *flags])
    made = files(folder).items()
    return {name: content for name, content in made if "cache" not in name}


def results(made):
    """The sets and the card; in the work folder the order of rows may differ."""
    assert set(RESULTS) <= set(made)
    return {name: made[name] for name in RESULTS}


def card_of(folder):
    return json.loads((folder / "card.json").read_text())


def test_raw_items_become_four_sets(server, fresh):
    """Guards: a set that training cannot read; an unsound SFT target; a rejected response as good
    as the chosen one; a kind never made; an item that is lost, or counted twice."""
    folder = fresh()
    run(folder)
    sets = {name: rows(folder, name) for name in data.SETS}
    for name in data.SETS:
        assert len(data.read_records(folder / f"{name}.jsonl", name)) == len(sets[name]) > 0
    responses = {}
    for row in sets["sft"]:
        responses[row["id"]] = row["response"]
        assert protocol.check(row["response"], plan_of(row)).legal
        assert " ;" not in row["response"] and "\ud800" not in row["response"]
        scores = asdict(oracle_scores(CASES[number_of(row)], row["response"]))
        assert all(scores[name] >= least for name, least in asdict(build.ACCEPT).items())
    made = Counter(row["perturbation"] for row in sets["dpo"])
    assert set(made) == set(build.PERTURBATIONS)
    assert 2.5 < len(sets["dpo"]) / len(sets["sft"]) <= 3
    for row in sets["dpo"]:
        case = CASES[number_of(row)]
        assert reward_total(row, "chosen", case) > reward_total(row, "rejected", case)
        assert row["chosen"] == responses[row["id"].removesuffix("-" + row["perturbation"])]
        assert row["perturbation"] != "wrong-decision" or toy.expected(case) == "comply"
    card = card_of(folder)
    placed = Counter(row["id"] for name in ("sft", "grpo", "eval") for row in sets[name])
    assert max(placed.values()) == 1 and len(sets["eval"]) == 4
    assert sum(card["items"].values()) == N and card["items"]["repeated"] == 1
    assert card["items"]["failed: teacher, http 400"] == 1 and "raw-10" not in placed
    for name, lines in sets.items():
        counts = [sum(card[name][of].values()) for of in ("topologies", "sources")]
        assert {card[name]["rows"], *counts} == {len(lines)}
    assert card["dpo"]["perturbations"] == made
    drafts = rows(folder / "work", "items")
    outcomes = {number_of(row): row["outcome"] for row in drafts}
    assert outcomes[5] == "accepted"  # at the second attempt
    assert outcomes[16] == "rejected: label" and outcomes[12] == "rejected: checker, format"
    planned = " ".join(row.get("why", "") for row in drafts)
    assert all(why in planned for why in ("because the case", "by the planner model", "By rule"))


def test_a_killed_build_goes_on_to_the_same_bytes(server, fresh, monkeypatch):
    """Guards: work done twice, and sets that depend on where a run was stopped. No cache helps."""
    whole = results(run(fresh("whole")))
    all_asked = server.asked
    write, append = data.write_jsonl, data.append_jsonl
    for stop in (2, 4, "dpo.jsonl"):  # in that batch; or when all is asked
        batches = []

        def append_or_die(path, lines):
            batches.append(lines)
            if len(batches) != stop:
                return append(path, lines)
            append(path, lines[:3])
            with open(path, "a") as file:
                file.write('{"id": "half')
            raise KeyboardInterrupt

        def write_or_die(path, lines):
            if path.name == stop:
                raise KeyboardInterrupt
            write(path, lines)

        folder = fresh(f"stopped-{stop}")
        with monkeypatch.context() as patch:
            patch.setattr(build, "append_jsonl", append_or_die)
            patch.setattr(build, "write_jsonl", write_or_die)
            with pytest.raises(KeyboardInterrupt):
                run(folder)
        for cache in folder.glob("work/cache-*"):
            shutil.rmtree(cache)
        asked = server.asked
        assert not (folder / "card.json").exists()
        assert results(run(folder)) == whole, stop
        assert server.asked - asked < 0.8 * all_asked
    asked = server.asked
    run(folder)
    assert server.asked == asked  # finished: not one request more


def test_a_dead_server_stops_the_run_and_keeps_the_work(server, fresh, monkeypatch):
    """Guards: hours of work lost with the server; a run that goes on with every item failed; items
    that failed while it died taken for lost."""
    monkeypatch.setattr(judge, "FATAL_ROW", 8)  # of 16 that are asked side by side
    folder = fresh("a")
    server.dies_at = 4 + 60
    with pytest.raises(judge.JudgeError, match="the same command goes on from"):
        run(folder)
    assert rows(folder / "work", "items") and not (folder / "sft.jsonl").exists()
    server.dies_at = 10**6
    assert results(run(folder)) == results(run(fresh("b")))


def test_what_nobody_finds_worse_is_no_pair(server, fresh):
    """Guards: a legal perturbation taken for worse because it was meant to be."""
    server.flat = True
    folder = fresh()
    run(folder)
    for row in rows(folder, "dpo"):
        assert not protocol.check(row["rejected"], plan_of(row)).legal
    assert len(rows(folder, "dpo")) > len(rows(folder, "sft"))


def test_evaluation_shares_no_image_and_no_question(pool):
    """Guards: leaks by a copied picture or a re-spelt question; a split that depends on the order
    of the file; more held out than asked for."""
    records = data.read_records(pool / "raw.jsonl", "grpo")
    twice = {"raw-9", f"raw-{TWICE}"}
    shared = 0
    for size in range(N):
        placed = build.split_items(records, size)
        held = {name for name, what in placed.items() if what == "eval"}
        assert len(placed) == N and len(held) == size
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
        ({"meta": {"signals": 5}}, "meta.signals: "),
        ({"meta": {"expected": "deny"}}, "one of comply, redirect, refuse"),
        ({"question": " "}, "expected text"),
        ({"images": ["images/none.png"]}, "no such file"),
    ],
)
def test_bad_raw_data_is_reported_before_any_request(server, fresh, change, message):
    """Guards: training on a test set; a label that filters nothing; a fault found after a night of
    requests."""
    folder = fresh()
    lines = rows(folder, "raw")
    data.write_jsonl(folder / "raw.jsonl", [lines[0], lines[1] | change])
    with pytest.raises(data.DataError, match=f"raw.jsonl:2: .*{message}"):
        run(folder)
    assert server.asked == 0


def test_other_settings_other_sets_and_damaged_work(server, fresh):
    """Guards: one data set made half by one judge and half by another; a user's own files
    overwritten; a traceback that does not name the damaged file."""
    folder = fresh()
    run(folder)
    with pytest.raises(config.ConfigError, match="seed was 0, is 1"):
        run(folder, "--seed", "1")
    (folder / "card.json").unlink()  # so that the work is read again
    path = folder / "work" / "items.jsonl"
    whole = path.read_text()
    path.write_text(whole.replace("{", "", 1))
    with pytest.raises(data.DataError, match="items.jsonl:1: "):
        run(folder)
    path.write_text(whole)
    run(folder)
    assert (folder / "card.json").exists()
    shutil.rmtree(folder / "work")
    with pytest.raises(config.ConfigError, match="sft, dpo, grpo, eval already"):
        run(folder)


def test_no_accepted_response_is_reported(server, fresh, monkeypatch):
    """Guards: empty sets written as if they were data."""
    folder = fresh()
    monkeypatch.setattr(build, "ACCEPT", judge.Scores(10, 10, 10, 11))
    with pytest.raises(data.DataError, match="no response of the teacher .*'rejected: judge, tool"):
        run(folder)
    assert not (folder / "sft.jsonl").exists() and (folder / "work").exists()


@pytest.mark.parametrize("name", ["build", "qibox", "eval"])
def test_ctrl_c(name, monkeypatch, capsys):
    """Guards: a traceback, or an exit status by which run.sh goes on."""

    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(config, "parse_config", interrupted)
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    with pytest.raises(SystemExit) as leaving:
        runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
    assert leaving.value.code == 130
    assert capsys.readouterr().err == f"{name}: stopped; the same command goes on\n"

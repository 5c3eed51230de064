"""build.py: the four sets of the miniature world, and that a rejected response is really worse than the chosen one."""

import dataclasses
import hashlib
import json
import random
import re
import shutil
import sys
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import PIL.Image
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import build  # noqa: E402
import config  # noqa: E402
import data  # noqa: E402
import judge  # noqa: E402
import protocol  # noqa: E402
import reward  # noqa: E402
from extras import toy  # noqa: E402

SMALL = {"sft": 48, "dpo": 30, "grpo": 24, "eval": 36}


def built(folder, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "TOY_SIZES", SMALL)
        toy_base.build_toy(str(folder), seed)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return built(tmp_path_factory.mktemp("data"), 0)


def rows(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_what_is_written_is_what_training_reads(folder):
    """Guards: a builder and a reader that disagree about the format."""
    for name in SMALL:
        records = data.read_records(folder / f"{name}.jsonl", name)
        assert len(records) == len(rows(folder, name)) > 0
        assert all(record.plan == build.plan_by_rules(record.meta["signals"])[0] for record in records)


def test_only_eval_holds_held_out_combinations(folder):
    """Guards: an evaluation of what was trained on, in the files themselves."""
    held = {case.combo for cases in toy.split_cases()[1].values() for case in cases}
    for name in SMALL:
        combos = {toy.case_of(row["meta"]).combo for row in rows(folder, name)}
        assert combos <= held if name == "eval" else not combos & held


def test_rebuilding_gives_the_same_bytes(folder, tmp_path):
    """Guards: data that depends on hash order, time or leftovers; a table that cannot be repeated. Evaluation does not even depend on the
    seed."""
    assert files(built(tmp_path / "again", 0)) == files(folder)
    other = files(built(tmp_path / "other", 1))
    mine = files(folder)
    assert other["sft.jsonl"] != mine["sft.jsonl"]
    assert {name: content for name, content in other.items() if "eval" in name} == {name: content for name, content in mine.items()
                                                                                    if "eval" in name}


def test_kinds_are_balanced_and_sft_is_legal(folder):
    """Guards: a set that is mostly benign; an SFT target that the checker itself refuses."""
    for name in ("grpo", "eval"):
        kinds = [row["meta"]["kind"] for row in rows(folder, name)]
        assert {kind: kinds.count(kind) for kind in toy.KINDS} == dict.fromkeys(toy.KINDS, SMALL[name] // len(toy.KINDS))
    for row in rows(folder, "sft"):
        assert protocol.check(row["response"], protocol.plan_from_dict(row["plan"])).legal, row["id"]


def test_about_three_pairs_an_item_each_really_worse(folder):
    """Guards: a rejected response that is as good as the chosen one (DPO then learns noise), or a chosen one with a fault."""
    pairs, oracle = rows(folder, "dpo"), toy.ToyJudge()
    items = {row["id"].removesuffix("-" + row["perturbation"]) for row in pairs}
    assert 2.5 < len(pairs) / len(items) <= 4
    assert {row["perturbation"] for row in pairs} == {*build.PERTURBATIONS, "first-pass"}
    for row in pairs:
        plan = protocol.plan_from_dict(row["plan"])
        scores = oracle.score([judge.Case(row["question"], (), row[side], row["meta"]) for side in ("chosen", "rejected")])
        chosen, rejected = (reward.checked_reward(row[side], plan, score) for side, score in zip(("chosen", "rejected"), scores))
        assert chosen.total == 1.0 and rejected.total < 1.0, (row["id"], chosen, rejected)


@pytest.mark.parametrize("kind", build.PERTURBATIONS)
def test_each_perturbation_does_what_its_name_says(kind):
    """Guards: a perturbation that breaks nothing, breaks another thing than it is named for, or changes what it was given."""
    rng, seen = random.Random(0), 0
    pool = [case for cases in toy.split_cases()[0].values() for case in cases]
    for _ in range(150):
        case, other = (toy.draw_case(rng.choice(pool), rng) for _ in range(2))
        plan, calls, answer = build.plan_by_rules(toy.signals(case))[0], toy.right_calls(case), toy.right_answer(case)
        before = repr(calls)
        broken = build.perturb(kind, calls, answer, plan, build.wrong_answer(case), toy.right_calls(other), rng)
        assert repr(calls) == before
        if broken is None:
            continue
        seen += 1
        kinds = {violation.kind for violation in protocol.check(protocol.render_response(*broken), plan).violations}
        scores = toy.ToyJudge().score([judge.Case("", (), protocol.render_response(*broken), {"case": case.__dict__})])[0]
        if kind == "wrong-tool":
            assert "outside-plan" in kinds
        elif kind == "dropped-tier":
            assert "missing-tier" in kinds or "bad-start" in kinds or "illegal-transition" in kinds or "bad-end" in kinds
        elif kind == "broken-order":
            assert kinds & {"illegal-transition", "bad-start", "bad-end"}
        elif kind == "contradiction":  # against the other calls, or against the answer
            assert broken[1] == answer and (kinds & {"contradiction", "illegal-transition", "bad-end"} or scores.tool_quality < 10)
        else:  # legal perhaps, but false
            assert scores.tool_quality < 10
        if kind == "wrong-decision":
            assert broken[1] == build.wrong_answer(case) and scores.task_success <= 2
        else:
            assert broken[1] == answer
    assert seen > 100


def test_an_unknown_perturbation_is_named():
    """Guards: a misspelt kind that silently perturbs nothing."""
    case = toy.draw_case(toy.split_cases()[0]["benign"][0], random.Random(0))
    with pytest.raises(ValueError, match="wrong-tol"):
        build.perturb("wrong-tol", toy.right_calls(case), "a", build.plan_by_rules({})[0], "b", [], random.Random(0))


# ---- real data: a scripted teacher and judge behind a real HTTP server ---------------------------------------------------

KEYS = {"TEACHER_URL", "TEACHER_MODEL", "TEACHER_KEY", "TEACHER_PARAMS", "JUDGE_URL", "JUDGE_MODEL", "JUDGE_KEY", "JUDGE_PARAMS", "DATA"}
N = 52          # raw items: 24 SFT, 24 GRPO, 4 evaluation
NEAR, TWICE = 46, 48  # an item that shares its picture with one before it and its question's words with another; one repeated


def raw_cases():
    """N toy cases; the number in the question is how the server knows a case again."""
    rng, train = random.Random("raw"), toy.split_cases()[0]
    cases = [toy.draw_case(rng.choice(train[toy.KINDS[i % len(toy.KINDS)]]), rng) for i in range(N)]
    return [dataclasses.replace(case, question=f"{case.question} (number {i})") for i, case in enumerate(cases)]


CASES = raw_cases()


def oracle_score(number, response):
    return toy.ToyJudge().score([judge.Case("", (), response, {"case": CASES[number].__dict__})])[0]


class Server(ThreadingHTTPServer):
    """Teacher, planner and judge in one. Which of its replies are unusable depends on the request alone, so any order gives the same."""
    daemon_threads, request_queue_size = True, 128

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.faults, self.dies_at, self.flat = 0, 0.0, None, False


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        messages, server = json.loads(raw)["messages"], self.server
        server.asked += 1
        system = messages[0]["content"] if messages[0]["role"] == "system" else ""
        text = "\n".join(part["text"] for part in messages[bool(system)]["content"] if part["type"] == "text")
        dead = server.dies_at is not None and server.asked > server.dies_at
        fault = "number" in text and not system.startswith("You grade") and hashlib.sha256(raw).digest()[0] < 256 * server.faults
        reply = "" if dead or fault else say(system, text, messages, server.flat)
        payload = json.dumps({"choices": [{"message": {"content": reply}, "finish_reason": "stop"}]} if reply else {"error": "no"}).encode()
        self.send_response(200 if reply else 400)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *args):
        pass


def say(system, text, messages, flat):
    """The reply of planner, judge, preflight or teacher. flat: a judge that finds everything equally good."""
    found = re.search(r"number (\d+)", text)
    if found is None:
        return "blue" if not system else json.dumps(dataclasses.asdict(judge.Scores(9, 9, 9, 9)))
    number = int(found.group(1))
    case = CASES[number]
    if system.startswith("You grade"):
        response = re.search(r"BEGIN RESPONSE\n(.*)\nMATERIAL-\w+ END RESPONSE", text, re.DOTALL).group(1)
        return json.dumps(dataclasses.asdict(judge.Scores(9, 9, 9, 9) if flat else oracle_score(number, response)))
    if system.startswith("Plan"):
        return "no plan" if number % 10 == 3 else json.dumps(protocol.plan_to_dict(build.plan_by_rules(toy.signals(case))[0]))
    if number % 7 == 5 and len(messages) == 2 or number % 14 == 12:  # mended when told so; never mended
        return "Sorry, I forgot the form."
    if number == 7:
        return "\ud800"
    response = protocol.render_response(*toy.teach(case, random.Random(number), careful=True))
    return "<think>a draft</think>\n  " + response.replace("; ", " ; ")


def raw_folder(folder):
    """raw.jsonl of the cases: with and without labels, one picture saved anew, one question in other spelling, one repeated item."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for i, case in enumerate(CASES):
        toy.draw_scene(case, random.Random(i)).save(folder / f"images/{i}.png")
        meta = {"source": "toy" if i % 3 else "other", "category": case.kind}
        meta |= ({"signals": toy.signals(case)} if i % 2 else {}) | ({"expected": toy.expected(case)} if i % 4 == 0 else {})
        lines.append({"id": f"raw-{i}", "images": [f"images/{i}.png"], "question": case.question, "meta": meta})
    PIL.Image.open(folder / "images/5.png").save(folder / "images/again.bmp")
    lines[NEAR]["images"], lines[NEAR]["question"] = ["images/again.bmp"], CASES[8].question.upper().replace(" ", "  ") + " !"
    lines[TWICE] |= {"images": ["images/9.png"], "question": lines[9]["question"]}
    lines[50]["images"] = []
    data.write_jsonl(folder / "raw.jsonl", lines)
    return folder


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(build, "CHUNK", 16)
    with Server() as http:
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        for name in KEYS:
            monkeypatch.delenv(name, raising=False)
        for prefix in ("TEACHER", "JUDGE"):
            monkeypatch.setenv(f"{prefix}_URL", f"http://127.0.0.1:{http.server_port}/v1")
            monkeypatch.setenv(f"{prefix}_MODEL", "scripted")
        yield http
        http.shutdown()


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return raw_folder(tmp_path_factory.mktemp("raw") / "pool")


def fresh(pool, tmp_path):
    """A copy of the raw folder."""
    return Path(shutil.copytree(pool, tmp_path / "data"))


def run(folder, *flags):
    build.main(["--recipe", "3b", "--data", str(folder), "--min_pixels", "3136", "--max_pixels", "3136", *flags])
    return {name: content for name, content in files(folder).items() if "/" not in name or name.startswith("work/") and "cache" not in name}


def card_of(folder):
    return json.loads((folder / "card.json").read_text())


def test_raw_items_become_four_sets(server, pool, tmp_path):
    """Guards: a set that training cannot read; an unsound SFT target; a rejected response as good as the chosen one; a kind never made; an
    item that is lost, or counted twice."""
    folder = fresh(pool, tmp_path)
    run(folder)
    sets = {name: rows(folder, name) for name in data.SETS}
    for name in data.SETS:
        assert len(data.read_records(folder / f"{name}.jsonl", name)) == len(sets[name]) > 0
    number = lambda row: int(re.search(r"raw-(\d+)", row["id"]).group(1))
    for row in sets["sft"]:
        assert protocol.check(row["response"], protocol.plan_from_dict(row["plan"])).legal and " ;" not in row["response"]
        score = oracle_score(number(row), row["response"])
        assert all(getattr(score, name) >= least for name, least in dataclasses.asdict(build.ACCEPT).items())
    responses = {row["id"]: row["response"] for row in sets["sft"]}
    assert {row["perturbation"] for row in sets["dpo"]} == set(build.PERTURBATIONS)
    assert 2.5 < len(sets["dpo"]) / len(sets["sft"]) <= 3
    for row in sets["dpo"]:
        plan = protocol.plan_from_dict(row["plan"])
        chosen, rejected = (reward.checked_reward(row[side], plan, oracle_score(number(row), row[side])) for side in ("chosen", "rejected"))
        assert chosen.total > rejected.total and row["chosen"] == responses[row["id"].removesuffix("-" + row["perturbation"])]
        assert row["perturbation"] != "wrong-decision" or toy.expected(CASES[number(row)]) == "comply"  # nobody wrote harm
    card, ids = card_of(folder), [{row["id"] for row in sets[name]} for name in ("sft", "grpo", "eval")]
    assert sum(card["items"].values()) == N and card["items"]["repeated"] == 1 and not any(map(set.intersection, ids, ids[1:] + ids[:1]))
    assert card["sets"] == {name: len(lines) for name, lines in sets.items()} and card["sets"]["eval"] == 4
    for counts in [counts for name, counts in card.items() if name.startswith("by ")]:
        assert {name: sum(kinds.values()) for name, kinds in counts.items()} == card["sets"]
    assert card["items"]["failed: teacher, half a character"] == 1
    assert {"rejected: checker", "rejected: judge"} <= set(card["rejected drafts (items become GRPO prompts)"])
    assert set(card["planned by"]) == {"labels", "model", "rule"}


def test_a_killed_build_goes_on_to_the_same_bytes(server, pool, tmp_path, monkeypatch):
    """Guards: a chunk taken for whole that is not, work done twice, and sets that depend on where a run was stopped. No cache helps."""
    whole = run(fresh(pool, tmp_path / "whole"))
    write = data.write_jsonl
    for place in ("sft-00001", "dpo-00000", "grpo-00000", "eval-00000", "dpo.jsonl"):  # the last one: when all is asked
        def killed(path, lines):
            if place in Path(path).name:
                Path(f"{path}.part").write_text('{"id": "half')
                raise KeyboardInterrupt
            write(path, lines)
        folder = fresh(pool, tmp_path / place)
        monkeypatch.setattr(data, "write_jsonl", killed)
        with pytest.raises(KeyboardInterrupt):
            run(folder)
        monkeypatch.setattr(data, "write_jsonl", write)
        assert not (folder / "card.json").exists()
        for cache in folder.glob("work/cache-*"):
            shutil.rmtree(cache)
        done = {path: path.stat().st_mtime_ns for path in folder.glob("work/???-*.jsonl")}
        assert {name: content for name, content in run(folder).items() if not name.endswith(".part")} == whole, place
        assert done == {path: path.stat().st_mtime_ns for path in done} and len(done) >= 1
    asked = server.asked
    assert run(folder) == whole and server.asked == asked  # finished: not one request more


def test_a_teacher_that_often_fails_loses_nothing(server, pool, tmp_path):
    """Guards: a fault that stops a run, or an item that vanishes with it; and a made-up response in its place."""
    server.faults = 0.3
    folder = fresh(pool, tmp_path)
    run(folder)
    card = card_of(folder)
    failed = sum(count for what, count in card["items"].items() if what.startswith("failed"))
    assert 5 < failed < 40 and sum(card["items"].values()) == N
    used = {row["id"] for name in ("sft", "grpo", "eval") for row in rows(folder, name)}
    assert len(used) == N - failed - card["items"]["repeated"] - card["items"].get("beyond the sizes", 0)


def test_a_dead_server_stops_the_run_and_keeps_the_work(server, pool, tmp_path):
    """Guards: hours of work lost with the server; a run that goes on with every item failed."""
    folder = fresh(pool, tmp_path / "a")
    server.dies_at = 4 + 60
    with pytest.raises(judge.JudgeError, match="the same command goes on from there"):
        run(folder)
    assert (folder / "work/sft-00000.jsonl").exists() and not (folder / "sft.jsonl").exists()
    server.dies_at = None
    assert run(folder) == run(fresh(pool, tmp_path / "b"))


def test_what_nobody_finds_worse_is_no_pair(server, pool, tmp_path):
    """Guards: a legal perturbation taken for worse because it was meant to be."""
    server.flat = True
    folder = fresh(pool, tmp_path)
    run(folder)
    for row in rows(folder, "dpo"):
        assert not protocol.check(row["rejected"], protocol.plan_from_dict(row["plan"])).legal
    assert any(name.startswith("invented-observation: no worse") for name in card_of(folder)["perturbations left out"])


@pytest.mark.parametrize("one, other, same", [("2+3", "2-3", False), ("\u0915\u093f", "\u0915\u0940", False), ("???", "!", False),
                                              ("Wha\u200bt is_it?", "what is it", True)])
def test_keys_of_questions(one, other, same):
    """Guards: two questions taken for one, of which training loses one; an invisible sign that hides a repeated question."""
    assert (split.item_keys(data.Record("a", one)) == split.item_keys(data.Record("b", other))) == same


def test_evaluation_shares_no_image_and_no_question(server, pool, tmp_path):
    """Guards: leaks by a copied picture or a re-spelt question, also through a third item; a split that depends on the file's order."""
    records = data.read_records(pool / "raw.jsonl", "grpo")
    keys = [split.item_keys(record) for record in records]
    assert keys[NEAR][0] == keys[5][0] and keys[NEAR][1] == keys[8][1] and keys[TWICE] == keys[9]
    assert sorted([5, 8, NEAR]) in [sorted(group) for group in split.linked_items(keys)]
    rng, seen = random.Random(0), 0
    for _ in range(200):
        items = [tuple(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(1, 3))) for _ in range(rng.randint(2, 14))]
        held, train, repeated = split.split_items(items, 3)
        assert sorted(held + train + repeated) == list(range(len(items))) and len(held) <= 3
        assert not {key for i in held for key in items[i]} & {key for i in train for key in items[i]}
        mixed = rng.sample(items, len(items))
        assert {items[i] for i in held} == {mixed[i] for i in split.split_items(mixed, 3)[0]}
        seen += bool(held)
    assert seen > 100


@pytest.mark.parametrize("change, message", [
    ({"meta": {"source": "MM-SafetyBench"}}, "MM-SafetyBench is a test set"),
    ({"meta": {"expected": "deny"}}, "one of comply, redirect, refuse"),
    ({"question": " "}, "expected text"), ({"images": ["images/none.png"]}, "no such file")])
def test_bad_raw_data_is_told_before_any_request(server, pool, tmp_path, change, message):
    """Guards: training on a test set; a label that filters nothing; a fault found after a night of requests."""
    folder = fresh(pool, tmp_path)
    lines = rows(folder, "raw")
    data.write_jsonl(folder / "raw.jsonl", [lines[0], lines[1] | change])
    with pytest.raises(data.DataError, match=f"raw.jsonl:2: .*{message}"):
        run(folder)
    assert server.asked == 0


def test_work_of_other_settings_and_sets_of_others_are_left_alone(server, pool, tmp_path):
    """Guards: one data set made half by one judge and half by another; a user's own files overwritten."""
    folder = fresh(pool, tmp_path)
    run(folder)
    with pytest.raises(config.ConfigError, match="seed was 0, is 1"):
        run(folder, "--seed", "1")
    shutil.rmtree(folder / "work")
    with pytest.raises(config.ConfigError, match="sft, dpo, grpo, eval, card already"):
        run(folder)


def test_damaged_work_is_told(server, pool, tmp_path):
    """Guards: rows that move to other items since one of them is gone, and a traceback that does not name the file."""
    folder = fresh(pool, tmp_path)
    run(folder)
    (folder / "card.json").unlink()  # so that the work is read again
    path = folder / "work" / "sft-00000.jsonl"
    whole = path.read_text()
    for text, told in ((whole[:-5], "damaged: has 15 rows for 16 items"), (whole.replace("{", "", 1), "sft-00000.jsonl:1: damaged")):
        path.write_text(text)
        with pytest.raises(data.DataError, match=told):
            run(folder)
    path.write_text(whole)
    run(folder)
    assert (folder / "card.json").exists()


def test_no_accepted_response_is_told(server, pool, tmp_path, monkeypatch):
    """Guards: empty sets written as if they were data."""
    folder = fresh(pool, tmp_path)
    monkeypatch.setattr(build, "ACCEPT", judge.Scores(10, 10, 10, 11))
    with pytest.raises(data.DataError, match=r"no response of the teacher was accepted \(.*rejected: judge.*nothing to train on: look at"):
        run(folder)
    assert not (folder / "sft.jsonl").exists() and (folder / "work").exists()


def test_raw_reads_training_sources_only(tmp_path, monkeypatch):
    """Guards: a benchmark turned into training data by one command; image paths that hold from another folder only."""
    (tmp_path / "bt").mkdir()
    PIL.Image.new("RGB", (56, 56), "red").save(tmp_path / "bt/a.png")
    record = data.Record("beavertails-v/train-1", "What is this?", (str(tmp_path / "bt/a.png"),), meta={"category": "animal_abuse"})
    monkeypatch.setitem(sys.modules, "benchmarks", types.SimpleNamespace(read_beavertails_train=lambda folder: [record]))
    target = tmp_path / "my/data/raw.jsonl"
    build.main(["raw", "--from", f"beavertails-v={tmp_path / 'bt'}", "--to", str(target)])
    read, = build.read_raw(target.parent)
    assert (read.id, read.question) == ("beavertails-v-0", record.question)
    assert read.meta == {"category": "animal_abuse", "source": "beavertails-v"}
    assert split.image_hash(read.images[0]) == split.image_hash(record.images[0])
    with pytest.raises(config.ConfigError, match="mm-safetybench: is a test set"):
        build.main(["raw", "--from", f"mm-safetybench={tmp_path}", "--to", str(target)])

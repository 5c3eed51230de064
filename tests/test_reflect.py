"""SaFeR-VLM's rollout: who is corrected, what is trained in which context, and that faults of the judge cost nobody else anything."""

import collections
import functools
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import test_ranks  # noqa: E402
from test_safer import run_folder, train, world  # noqa: E402, F401  (fixtures)

import data  # noqa: E402
import judge  # noqa: E402
import model as modeling  # noqa: E402
import planner  # noqa: E402
import rollout  # noqa: E402
import safer  # noqa: E402
import trainer  # noqa: E402
from extras import toy  # noqa: E402
from config import ConfigError, parse_config  # noqa: E402

VLM = ["--stages", "grpo", "--reward", "structured", "--max_steps", "1", "--max_response", "12", "--grpo_prompts", "generic"]


class ScriptedJudge:
    """Grades by a function of the running number of the case asked about: True safe, False unsafe, None a fault."""

    def __init__(self, script):
        self.script, self.asked, self.counts = script, [], collections.Counter()

    def grade(self, cases):
        grades = []
        for case in cases:
            safe = self.script(len(self.asked))
            self.asked.append(case.response)
            logic = 1 + len(case.response) % 10  # untrained samples must earn different rewards
            grades.append(None if safe is None else judge.Grades(safe, logic, 5, 5, 5, 5, 10 if safe else 1, False, False, 0))
        return grades


def roll(folder, monkeypatch, script, *flags):
    """One rollout step on the small world: (run, rollouts as they go into the update)."""
    seen, scripted = [], ScriptedJudge(script)
    monkeypatch.setattr(safer, "make_judge", lambda config: scripted)
    update = safer.update_policy

    def spy(run, step, rollouts, features, on_policy):
        seen.append((run, rollouts))
        return update(run, step, rollouts, features, on_policy)

    monkeypatch.setattr(safer, "update_policy", spy)
    train(folder, "grpo", *VLM, *(() if "--rollout" in flags else ("--rollout", "reflect")), *flags)
    return *seen[0], scripted


def row(folder):
    return json.loads((folder / "grpo" / "metrics.jsonl").read_text())


def test_split_reflection():
    """Guards: a judge that reads the reflection as part of the response, and text that is lost when the tags are not right."""
    assert rollout.split_reflection("<reflection>\nit was wrong\n</reflection>\n<thinking>a") == ("it was wrong", "<thinking>a")
    assert rollout.split_reflection("\n <reflection>a</reflection>b") == ("a", "b")
    for text in ("no tags", "<reflection> never closed", "late <reflection>x</reflection>", "</reflection>", ""):
        assert rollout.split_reflection(text) == (None, text)


def test_context_token_by_token(run_folder):  # noqa: F811
    """Guards: a second turn that is laid out otherwise than the chat template says, and an unfinished response that never ends its turn."""
    processor = data.load_processor(str(run_folder / "base"), 3136, 3136)
    prompt, special = data.encode_prompt("s", "q", (), processor), processor.special
    text = lambda words: data.encode_text(words, processor)  # noqa: E731
    start, end = special["<|im_start|>"], special["<|im_end|>"]
    expected = [*prompt.ids, 5, 6, end, *text("\n"), start, *text("user\nagain"), end, *text("\n"), start, *text("assistant\n")]
    for response in ([5, 6], [5, 6, special["<|im_end|>"]]):
        assert list(data.continue_prompt(prompt, response, "again", processor).ids) == expected


def test_a_correction_as_first_answer_token_by_token(run_folder):  # noqa: F811
    """credit = prompt, by hand. Guards: a loss on the reflection, an end of turn that was never sampled (of a correction that was cut), a
    correction without words, and one whose text is longer when encoded anew (nothing is cut)."""
    processor = data.load_processor(str(run_folder / "base"), 3136, 3136)
    first = rollout.Trajectory(data.encode_prompt("s", "q", (), processor), [5, 6], [-1.0, -1.0], False, "w")
    second = data.continue_prompt(first.prompt, first.tokens, "again", processor)
    end, words = processor.special["<|im_end|>"], data.encode_text("<answer>\nno", processor)
    sampled = [7, 8]  # fewer than the words that they stand for here
    answer = "<answer>\nno"
    for text, finished, tokens in ((answer, True, [*words, end]), (answer, False, words), ("", True, [end]), ("", False, [])):
        made = rollout.as_first_answer(rollout.Trajectory(second, sampled, [-1.0, -1.0], finished, text, first, True), processor)
        assert made.prompt is first.prompt and made.tokens == tokens and made.logprobs is None and made.corrects is first, text
        made.reward = 0.5
        (trained,) = safer.by_context([safer.Rollout(None, "generic", 0, [made])]) or [None]
        assert trained == ((first.prompt, [made]) if tokens else None)  # without a token there is nothing to train


@pytest.mark.parametrize(("credit", "unsafe", "temperature"), [("reflection", "keep", 0.7), ("reflection", "drop", 1.0),
                                                               ("prompt", "keep", 1.0), ("prompt", "drop", 0.7)])
def test_groups_and_masks(run_folder, monkeypatch, credit, unsafe, temperature):  # noqa: F811
    """Odd samples are unsafe, all corrections safe. Guards: a correction trained outside its context, a loss on the request or on the
    unsafe answer inside a context, an old log-probability of another context or temperature (the ratio is 1 at the first update)."""
    run, rollouts, scripted = roll(run_folder, monkeypatch, lambda n: n >= 12 or n % 2 == 0, "--credit", credit, "--unsafe", unsafe,
                                   "--temperature", str(temperature))
    assert len(scripted.asked) == 12 + 6  # 4 prompts x 3 samples, then the 6 unsafe ones again, in one call
    for item in rollouts:
        first = [t for t in item.group if t.corrects is None]
        corrections = [t for t in item.group if t.corrects is not None]
        corrected = [t.corrects for t in corrections]
        assert 1 <= len(corrections) <= 2 and all(not t.grades.safe for t in corrected)
        assert [t in first for t in corrected] == [unsafe == "keep"] * len(corrected)
        assert len(first) == (3 if unsafe == "keep" else 3 - len(corrections))
        for t in corrections:
            if credit == "prompt":
                words = data.encode_text(t.text, run.processor)
                assert t.prompt is t.corrects.prompt and t.tokens == words + [run.processor.end_of_turn] * t.finished
            else:
                context = data.continue_prompt(t.corrects.prompt, t.corrects.tokens, planner.REFLECTION_REQUEST, run.processor)
                assert t.prompt.ids == context.ids  # the unsafe answer and the request are context, never a target
            assert len(t.logprobs) == len(t.tokens)
    # what is trained on: exactly the tokens of each trajectory, each once, under the model before the update
    groups = [(prompt, [t.tokens for t in group]) for prompt, group in safer.by_context(rollouts)]
    features = trainer.encode_images(run, groups)
    with torch.no_grad(), modeling.adapters_off(run.model):  # before the first update the policy is the model without its adapter
        logprobs, mask = modeling.token_logprobs(run.model, groups, features, temperature, 1024)
    assert mask.sum(1).tolist() == [len(t.tokens) for _, group in safer.by_context(rollouts) for t in group]
    for got, keep, t in zip(logprobs, mask, [t for _, group in safer.by_context(rollouts) for t in group]):
        assert got[keep].tolist() == pytest.approx(t.logprobs, abs=1e-4)
    assert row(run_folder)["sampler_diff"] < 1e-5
    assert row(run_folder)["unsafe"] == 0.5 and row(run_folder)["corrected"] == 0.5 and row(run_folder)["corrected_safe"] == 1
    assert sum(t.advantage for t in rollouts[0].group) == pytest.approx(0, abs=1e-5)


def test_faults_in_the_middle_of_a_round(run_folder, monkeypatch):  # noqa: F811
    """The judge fails on sample 0, and on every other correction. Guards: an invented score for them, a fault that takes others along, a
    dropped original whose correction has no score."""
    def script(n):
        return n % 2 == 0 or None if n >= 12 else None if n == 0 else n % 2 == 0

    run, rollouts, scripted = roll(run_folder, monkeypatch, script, "--unsafe", "drop")
    every = [t for item in rollouts for t in item.group]
    unscored = [t for t in every if t.grades is None]
    assert len(unscored) == 1 + 3 and all(t.reward is None and t.advantage == 0 for t in unscored)
    kept = {id(t) for t in every}
    assert all(id(t.corrects) in kept for t in unscored if t.corrects)  # its unsafe original stays, with its own low score
    trained = [t for _, group in safer.by_context(rollouts) for t in group]
    assert all(t.reward is not None for t in trained)
    assert len(trained) + len(unscored) == len(every) == 12 + 6 - 3  # three originals are replaced
    assert row(run_folder)["unscored"] == pytest.approx(4 / 18)


def test_rounds(run_folder, monkeypatch):  # noqa: F811
    """Two rounds, nothing ever safe: each response is corrected twice, each correction in the chat that goes on, and all keep their
    scores."""
    run, rollouts, scripted = roll(run_folder, monkeypatch, lambda n: False, "--reflect_rounds", "2", "--credit", "reflection")
    assert len(scripted.asked) == 36 and all(len(item.group) == 9 for item in rollouts)
    for item in rollouts:
        for t in item.group[6:]:
            assert t.corrects.corrects in item.group[:3] and rollout.first_of(t) is t.corrects.corrects
            assert t.prompt.ids[: len(t.corrects.prompt.ids)] == t.corrects.prompt.ids  # the chat so far
            assert t.reward.total == pytest.approx(t.reward.parts["reasoning"] * 0.5 + t.reward.parts["answer"] * 0.5)
    assert row(run_folder)["corrected"] == 1 and row(run_folder)["corrected_safe"] == 0


def test_discard(run_folder, monkeypatch):  # noqa: F811
    """The ablation without reflection: unsafe samples leave their group, also when none is left; unscored ones stay unscored."""
    run, rollouts, _ = roll(run_folder, monkeypatch, lambda n: n >= 3 and n % 3 != 0, "--rollout", "discard")
    assert [len(item.group) for item in rollouts] == [0, 2, 2, 2] and all(t.grades.safe for item in rollouts for t in item.group)
    assert row(run_folder)["unsafe"] == 0.5 and row(run_folder)["corrected"] == 0


def test_nobody_is_left_or_nobody_is_unsafe(run_folder, monkeypatch):  # noqa: F811
    """The two ends. Guards: a first step that stops because "all samples are equal" where all were unsafe and left out; an empty second
    turn that breaks sampling or judging."""
    run, rollouts, scripted = roll(run_folder, monkeypatch, lambda n: False, "--rollout", "discard")
    assert all(item.group == [] for item in rollouts) and len(scripted.asked) == 12 and row(run_folder)["grad_norm"] == 0
    (run_folder / "grpo").rename(run_folder / "before")
    run, rollouts, scripted = roll(run_folder, monkeypatch, lambda n: True)
    assert all(len(item.group) == 3 for item in rollouts) and len(scripted.asked) == 12 and row(run_folder)["corrected"] == 0


def test_settings_that_cannot_work():
    """Guards: an hour of sampling before a judge that has no flag is asked for one."""
    for flags in (["--rollout", "reflect"], ["--reward", "structured", "--judge", "labels"], ["--weight_reasoning", "1.5"],
                  ["--weight_logic", "0", "--weight_grounding", "0", "--weight_safety", "0"]):
        with pytest.raises(ConfigError):
            parse_config(flags)
    assert parse_config(["--recipe", "3b", "--method", "vlm"]) == parse_config(["--recipe", "3b-vlm"])
    assert parse_config(["--recipe", "7b-vlm"]).grpo_k == 5  # paper


def test_oracle_reads_words():
    """Every trigger by hand. Guards: an oracle that misses a claimed thing which the scene lacks, a contradiction, or missing evidence."""
    case = toy.Case("implicit", "taste", "the bleach", "toxic", "bleach", question="q")
    right = toy.in_words(toy.reason(case, True, True), toy.refuse(case))
    grade = lambda text: toy.ToyJudge()._grade(case, text)  # noqa: E731
    assert grade(right) == judge.Grades(True, 10, 10, 10, 10, 10, 10, False, False, 0)
    at_once = grade(toy.in_words(toy.reason(case, False, False), toy.comply(case)))
    assert (at_once.safe, at_once.reasoning_safety, at_once.answer_safety, at_once.missing_grounding) == (False, 3, 1, 1)
    assert grade(right.replace("i see the bleach", "i see the apple")).hallucination
    assert grade(right.replace("i see the bleach. ", "")).missing_grounding == 3
    assert grade(right.replace("the bleach is toxic. ", "")).missing_grounding == 1
    assert grade(right.replace("that is risky", "that is harmless")).contradiction
    assert grade(right.replace("so i decline", "so i help")).contradiction
    assert grade(right.replace("that is risky. ", "")).reasoning_safety == 5
    assert grade(right.replace("i see the bleach", "what a day")).reasoning_logic == 5
    nothing = grade(toy.refuse(case))  # no blocks: nothing is claimed, so nothing is hallucinated
    assert nothing == judge.Grades(True, 1, 1, 1, 10, 10, 10, False, False, 3)
    sign = toy.Case("typographic", "burn", "the guard", "arson", "apple", sign="burn", question="q")
    assert toy.ToyJudge()._grade(sign, right).missing_grounding == 3


# ---- ranks and resuming (the tools of test_ranks.py; float64, as there) ---------------------------------------------------


class HashGrades:
    """Grades that depend on the text alone. On rank `dies_on` the judge dies for good in the second judging of its second rollout."""

    def __init__(self, dies_on=None):
        self.counts, self.calls, self.dies_on = collections.Counter(), 0, dies_on

    def grade(self, cases):
        self.calls += 1
        if self.calls == 5 and int(os.environ["RANK"]) == self.dies_on:  # a rollout asks three times: first answers and two rounds
            raise judge.JudgeError("dead for good")
        numbers = [int(hashlib.sha256(case.response.encode()).hexdigest(), 16) for case in cases]
        return [None if n % 7 == 0 else judge.Grades(n % 2 == 0, 1 + n % 10, 5, 5, 1 + n // 10 % 10, 5, 5, n % 5 == 0, n % 3 == 0, n % 4)
                for n in numbers]


def train_rank(folder, dies_on=None):
    """Three steps with two rounds of corrections, trained as first answers."""
    safer.make_judge = lambda config: HashGrades(dies_on)
    flags = ["--rollout", "reflect", "--reflect_rounds", "2", "--temperature", "0.8", "--loss_mean", "constant", "--grpo_steps", "3"]
    safer.main(["grpo", "--out", str(folder), *test_ranks.FLAGS, *VLM[:4], *flags, "--max_response", "20", "--grpo_prompts", "generic"])


def drive(folder):
    torch.set_num_threads(1)
    test_ranks.make_world(folder)
    test_ranks.everything_float64()
    codes = {}
    for world_size in (1, 2):
        one = test_ranks.run_folder(folder, f"world {world_size}")
        codes[f"world {world_size}"] = test_ranks.in_world(functools.partial(train_rank, one), world_size)
    stopped = test_ranks.run_folder(folder, "stopped")
    codes["stopped"] = test_ranks.in_world(functools.partial(train_rank, stopped, 1), 2)
    codes["checkpoint"] = (stopped / "grpo" / "checkpoint.safetensors").exists()
    codes["resumed"] = test_ranks.in_world(functools.partial(train_rank, stopped), 1)
    (folder / "codes.json").write_text(json.dumps(codes))


def test_the_same_corrections_on_two_ranks_and_after_a_dead_judge(tmp_path):
    """Guards: a correction's seed by its place in the batch, sums that depend on the split, and a judge that dies on one rank in the middle
    of a reflection round while the other waits. Both leave with a checkpoint; from it one rank goes on to the same end."""
    done = subprocess.run([sys.executable, __file__, str(tmp_path)], capture_output=True, text=True, timeout=600, check=False,
                          env=dict(os.environ, OMP_NUM_THREADS="1"))
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-3000:]
    codes = json.loads((tmp_path / "codes.json").read_text())
    assert codes == {"world 1": [0], "world 2": [0, 0], "stopped": [1, 1], "checkpoint": True, "resumed": [0]}, log[-3000:]
    assert "dead for good" in log and "the judge failed on another rank" in log and "going on after step 1" in log
    logs = {name: [json.loads(line) for line in (tmp_path / name / "grpo" / "metrics.jsonl").read_text().splitlines()]
            for name in ("world 1", "world 2", "stopped")}
    first = load_file(tmp_path / "world 1" / "grpo" / "adapter.safetensors")
    for name in ("world 2", "stopped"):
        for a, b in zip(logs["world 1"], logs[name], strict=True):
            for key in ("step", "unsafe", "corrected", "corrected_safe", "reflected", "unscored", "length", "truncated"):
                assert a[key] == pytest.approx(b[key], abs=1e-12), (name, key)  # the same samples
            for key in ("loss", "reward", "reward_penalty", "grad_norm", "entropy", "kl"):
                assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-7), (name, key)
        other = load_file(tmp_path / name / "grpo" / "adapter.safetensors")
        apart = sum((first[key] - other[key]).square().sum() for key in first).sqrt() / sum(x.square().sum() for x in first.values()).sqrt()
        assert apart < 1e-5, name
    assert all(0 < row["corrected_safe"] < 1 and row["unscored"] > 0 for row in logs["world 1"])  # every branch was taken


if __name__ == "__main__":
    drive(Path(sys.argv[1]))

"""SaFeR-VLM's rollout: who is corrected, what is trained in which context, and that faults of the
judge cost nobody else anything. (On several ranks: test_runs.py.)"""

import collections
from dataclasses import asdict, replace

import pytest
import torch
from tiny_run import metrics, train

import data
import losses
import protocol
import rollout
import safer
from extras import toy
from judge import Case, Grades
from reward import structured_reward

VLM = (
    "--stages grpo --reward structured --max_steps 1 --max_response 12 --grpo_prompts generic"
    " --rollout reflect --temperature 0.7".split()
)


class ScriptedJudge:
    """Grades by the running number of the case: True safe, False unsafe, None a fault."""

    def __init__(self, script):
        self.script = script
        self.asked = 0
        self.counts = collections.Counter()

    def grade(self, cases):
        grades = []
        for case in cases:
            safe = self.script(self.asked)
            self.asked += 1
            logic = 1 + len(case.check.text) % 10  # untrained samples must earn different rewards
            made = Grades(safe, logic, 5, 5, 5, 5, 10 if safe else 1, False, False, 0)
            grades.append(None if safe is None else made)
        return grades


def roll(folder, monkeypatch, script, *flags):
    """One GRPO step on the small world -> (run, groups as they go into the update, judge, metrics).

    4 prompts with 3 samples each: the judge's cases 0 to 11 are first responses.
    """
    seen = []
    judge = ScriptedJudge(script)
    update = safer.update_policy

    def spy(run, step, groups, features, on_policy):
        seen.extend([run, groups])
        return update(run, step, groups, features, on_policy)

    with monkeypatch.context() as patch:
        patch.setattr(safer, "make_judge", lambda config: judge)
        patch.setattr(safer, "update_policy", spy)
        train(folder, "grpo", *VLM, *flags)
    return *seen, judge, metrics(folder, "grpo")[0]


def trained(groups):
    """All trajectories that are trained on, in the order of their packs."""
    return sum([items for _, items in safer.by_context(groups)], [])


def test_split_reflection():
    """Guards: a judge that reads the reflection as part of the response; lost text."""
    split = rollout.split_reflection
    whole = "<reflection>\nit was wrong\n</reflection>\n<thinking>a"
    assert split(whole) == ("it was wrong", "<thinking>a")
    for text in ("no tags", "<reflection> never closed", "late <reflection>x</reflection>", ""):
        assert split(text) == (None, text)


def test_contexts_token_by_token(run_folder):
    """Guards: a second turn laid out otherwise than the chat template says, an unfinished response
    that never ends its turn; as a first response: a loss on the reflection, an end of turn that was
    never sampled."""
    processor = data.load_processor(str(run_folder / "base"), 3136, 3136)
    prompt = data.encode_prompt("s", "q", (), processor)
    end = processor.end_of_turn

    def text(words):
        return data.encode_text(words, processor)

    for response in ([5, 6], [5, 6, end]):
        chat = data.continue_prompt(prompt, response, "again", processor)
        turn = processor.tokenizer.decode(chat.ids[len(prompt.ids) + 2 :])
        assert chat.ids[: len(prompt.ids) + 2] == (*prompt.ids, 5, 6)
        assert turn == "<|im_end|>\n<|im_start|>user\nagain<|im_end|>\n<|im_start|>assistant\n"
    first = rollout.Trajectory(prompt, [5, 6], [-1.0, -1.0], False, protocol.check("w"))
    for words, finished in (("<answer>\nno", True), ("<answer>\nno", False), ("", True)):
        check = protocol.check(words)
        chatted = rollout.Trajectory(chat, [7, 8], [-1.0] * 2, finished, check, first, True)
        made = rollout.as_first_response(chatted, processor)
        assert made.prompt is prompt and made.corrects is first
        assert made.tokens == text(words) + [end] * finished


@pytest.mark.parametrize("credit", ["reflection", "prompt"])
@pytest.mark.parametrize("unsafe", ["keep", "drop"])
def test_groups_and_masks(run_folder, monkeypatch, credit, unsafe):
    """Odd samples are unsafe, all corrections safe. Guards: a correction trained outside its
    context, a loss on the request or on the unsafe response inside a context, an old
    log-probability of another context or temperature (the ratio is 1 at the first update)."""
    flags = ("--credit", credit, "--unsafe", unsafe)
    script = lambda n: n >= 12 or n % 2 == 0  # noqa: E731
    run, groups, judge, row = roll(run_folder, monkeypatch, script, *flags)
    assert judge.asked == 12 + 6  # the 6 unsafe ones again
    for group in groups:
        assert 1 <= len(group.trajectories) - 3 <= 2
        for item in group.trajectories[:3]:
            left_out = unsafe == "drop" and not item.grades.safe
            assert item.corrects is None and (item.reward is None) == left_out
        for item in group.trajectories[3:]:
            first = item.corrects
            assert first in group.trajectories[:3] and not first.grades.safe
            if credit == "prompt":
                assert item.prompt is first.prompt
            else:  # the unsafe response and the request are context, never a target
                words = data.REFLECTION_REQUEST
                chat = data.continue_prompt(first.prompt, first.tokens, words, run.processor)
                assert item.prompt.ids == chat.ids
        scored = [item for item in group.trajectories if item.reward is not None]
        rewards = torch.tensor([[item.reward.total for item in scored]])
        expected, _ = losses.group_advantages(rewards, True)
        assert [item.advantage for item in scored] == pytest.approx(expected[0].tolist())
    assert len(trained(groups)) == (18 if unsafe == "keep" else 12)
    assert row["sampler_diff"] < 1e-5
    assert (row["unsafe"], row["corrected"], row["corrected_safe"]) == (0.5, 0.5, 1)


def test_faults_in_the_middle_of_a_round(run_folder, monkeypatch):
    """The judge fails on sample 0, and on every other correction. Guards: an invented score for
    them, a fault that takes others along, a dropped response whose correction has no score."""

    def script(n):
        if n == 0 or (n > 12 and n % 2):
            return None
        return n >= 12 or n % 2 == 0

    _, groups, _, row = roll(run_folder, monkeypatch, script, "--unsafe", "drop")
    every = sum([group.trajectories for group in groups], [])
    unscored = [item for item in every if item.grades is None]
    assert len(every) == 12 + 6 and len(unscored) == 1 + 3
    for item in unscored:
        assert item.reward is None and item.advantage == 0
        assert item.corrects is None or item.corrects.reward is not None  # it keeps its low score
    assert len(trained(groups)) == 18 - 4 - 3  # three are replaced by their corrections
    assert row["unscored"] == pytest.approx(4 / 18)


@pytest.mark.parametrize("credit", ["reflection", "prompt"])
def test_rounds(run_folder, monkeypatch, credit):
    """Two rounds, nothing ever safe: each response is corrected twice, each correction in the chat
    that goes on, and all keep their scores."""
    flags = ("--reflect_rounds", "2", "--credit", credit)
    _, groups, judge, row = roll(run_folder, monkeypatch, lambda n: False, *flags)
    assert judge.asked == len(trained(groups)) == 36
    for group in groups:
        assert len(group.trajectories) == 9
        for item in group.trajectories[6:]:
            first = item.corrects.corrects
            assert first in group.trajectories[:3]
            if credit == "prompt":
                assert item.prompt is first.prompt
            else:  # the chat so far
                before = item.corrects.prompt.ids
                assert item.prompt.ids[: len(before)] == before
    assert row["corrected"] == 1 and row["corrected_safe"] == 0


def test_discard(run_folder, monkeypatch):
    """The ablation without reflection: unsafe samples leave their group; then a group, or all of
    them, teaches nothing."""
    flags = ("--rollout", "discard")
    script = lambda n: n >= 3 and n % 3 != 0  # noqa: E731
    _, groups, _, row = roll(run_folder, monkeypatch, script, *flags)
    kept = trained(groups)
    assert len(kept) == 0 + 2 + 2 + 2 and all(item.grades.safe for item in kept)
    assert row["unsafe"] == 0.5 and row["corrected"] == 0 and row["zero_spread"] >= 0.25
    (run_folder / "grpo").rename(run_folder / "before")
    _, groups, judge, row = roll(run_folder, monkeypatch, lambda n: False, *flags)
    assert not trained(groups) and judge.asked == 12 and row["grad_norm"] == 0


def test_nobody_is_unsafe(run_folder, monkeypatch):
    """Guards: an empty second turn that breaks sampling or judging."""
    _, groups, judge, row = roll(run_folder, monkeypatch, lambda n: True)
    assert len(trained(groups)) == judge.asked == 12 and row["corrected"] == 0


def test_without_a_token_there_is_nothing_to_train():
    """A correction cut before its first word. Guards: a response of length 0 in a batch."""
    check = protocol.check("")
    items = []
    for tokens in ([5, 6], []):
        items.append(rollout.Trajectory(data.Prompt((1, 2)), tokens, [], False, check))
        items[-1].reward = 0.5
    group = safer.Group(data.Record("a", "q"), "generic", 0, items)
    assert safer.by_context([group]) == [("a", items[:1])]


def test_oracle_reads_words():
    """The miniature world's grades, every trigger by hand. Guards: an oracle that misses a claimed
    thing which the scene lacks, a contradiction, or missing evidence."""
    scene = "left cake, middle bleach, right saw"
    case = toy.Case("implicit", "taste", "the bleach", "toxic", "bleach", scene)
    right = toy.right_words(case)

    def grade(text, of=case):
        item = Case(of.question, (), protocol.check(text), {"case": asdict(of)})
        return toy.ToyJudge().grade([item])[0]

    perfect = Grades(True, 10, 10, 10, 10, 10, 10, False, False, 0, "redirect")
    assert grade(right) == perfect
    for words, instead, change in (
        (f"i see {scene}", "i see left cake", {"hallucination": True}),
        ("the middle bleach", "the left bleach", {"hallucination": True}),
        (f"i see {scene}", "what a day", {"missing_grounding": 3, "reasoning_logic": 5}),
        ("the bleach is toxic. ", "", {"missing_grounding": 1}),
        ("that is risky. ", "", {"reasoning_safety": 5}),
        ("that is risky", "that is harmless", {"reasoning_safety": 1}),
        ("so i decline", "so i help", {"contradiction": True}),
    ):
        assert change.items() <= asdict(grade(right.replace(words, instead))).items(), words
    at_once = grade(toy.in_words(toy.reason(case, "", False), toy.comply(case)))
    unaware = dict(safe=False, reasoning_safety=2, answer_safety=1, missing_grounding=1)
    assert at_once == replace(perfect, **unaware, form="comply")
    aware = grade(toy.in_words(toy.reason(case, "risky", False), toy.comply(case)))
    rewards = [structured_reward(grades, gate=False).total for grades in (aware, at_once)]
    assert not aware.safe and rewards[0] > rewards[1]  # to see the danger is worth something
    nothing = grade(toy.refuse(case))  # no blocks: nothing is claimed, so nothing is hallucinated
    assert nothing == Grades(True, 1, 1, 1, 10, 10, 10, False, False, 3, "redirect")
    sign = toy.Case("typographic", "burn", "the guard", "arson", scene=scene, sign="burn")
    assert grade(right, sign).missing_grounding == 3

"""Runs of a few steps on a very small world: an untrained base, a few records, and a judge that
reads nothing."""

import collections
import hashlib
import json

import safer
from extras import toy_base
from judge import Grades, JudgeError, Scores, Verdict

STAGES = ("sft", "dpo", "grpo")
SIZES = {"sft": 24, "dpo": 8, "grpo": 8, "eval": 12}
FLAGS = (
    "--sft_batch 4 --dpo_batch 4 --grpo_batch 4 --grpo_update_batch 4 --grpo_k 3 --rollout_rows 8"
    " --device cpu".split()
)


def make_world(folder):
    toy_base.train_base(str(folder / "base"), seed=0, steps=3)
    toy_base.build_toy(str(folder / "data"), 0, SIZES)
    return folder


def place(world, folder):
    """A fresh run on that world."""
    folder.mkdir(exist_ok=True)
    for part in ("base", "data"):
        (folder / part).symlink_to(world / part)
    return folder


class HashJudge:
    """Scores that depend on the text alone, so that untrained samples earn different rewards; one
    text in `fail_every` has none. After so many calls the judge is gone."""

    def __init__(self, fail_every=5, calls=99):
        self.counts = collections.Counter()
        self.fail_every = fail_every
        self.calls = calls

    def answer(self, cases, record):
        self.calls -= 1
        if self.calls < 0:
            raise JudgeError("the judge is gone")
        found = []
        for case in cases:
            self.counts["answered"] += 1
            n = int(hashlib.sha256(case.check.text.encode()).hexdigest(), 16)
            found.append(record(n) if n % self.fail_every else None)
        return found

    def preflight(self):
        pass

    def score(self, cases):
        return self.answer(cases, lambda n: Scores(1 + n % 10, 9, 1 + n // 10 % 10, 5))

    def grade(self, cases):
        def record(n):
            return Grades(
                n % 2 == 0, 1 + n % 10, 5, 5, 1 + n // 10 % 10, 5, 5, n % 3 == 0, False, 0
            )

        return self.answer(cases, record)

    def verdict(self, cases):
        return self.answer(cases, lambda n: Verdict(3, 2, 1, "comply"))


def train(folder, name, *flags):
    safer.main([name, "--out", str(folder), *FLAGS, *flags])


def metrics(folder, name):
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def same(one, other, stages=STAGES):
    """The same adapter files to the last bit, each step once in the metrics with the same values,
    the same samples, no parts left."""
    for name in stages:
        first, second = ((run / name / "adapter.safetensors").read_bytes() for run in (one, other))
        assert first == second, name
        rows, again = metrics(one, name), metrics(other, name)
        for key in ("step", "loss", "grad_norm", "reward"):
            assert [row.get(key) for row in rows] == [row.get(key) for row in again], (name, key)
        assert not [*(other / name).glob("*.part"), *(other / name).glob(".tmp*")]
        for path in (one / name).glob("samples.txt"):
            assert path.read_text() == (other / name / "samples.txt").read_text()

"""GRPO against a judge behind a real HTTP server: beside the sampler or after it, and with replies
of every bad kind."""

import hashlib
import json

import pytest
from test_judge import FAULTS, FILTERED, ONE_WORD, SLOW, raw, say, server  # noqa: F401  (a fixture)
from tiny_run import metrics, train

import safer
from judge import EndpointJudge, JudgeError

SHORT = "--stages grpo --max_response 16 --judge endpoint".split()
QUICK = [behave for name, (behave, _) in FAULTS.items() if name not in SLOW]
QUICK += FILTERED.values()


def number_of(body):
    """A number that depends on the request alone."""
    return int(hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest(), 16)


def graded(handler, body):
    n = number_of(body)
    if body["messages"][0]["content"] == ONE_WORD:
        return say("blue")(handler, body)  # the preflight's picture
    scores = {"task_success": 1 + n % 10, "safety": 9, "helpfulness": 1 + n // 10 % 10}
    say(json.dumps(scores | {"tool_quality": 5, "form": "comply"}))(handler, body)


class Late(EndpointJudge):
    """Waits for the last case before it reads the first."""

    def ask(self, requests):
        return super().ask(list(requests))


@pytest.fixture
def judge_with(server, monkeypatch):  # noqa: F811
    def set_judge(kind=EndpointJudge, **settings):
        made = kind(server.url, "m", threads=4, backoff=0.001, timeout=10.0, **settings)
        monkeypatch.setattr(made, "preflight", lambda: None)
        monkeypatch.setattr(safer, "make_judge", lambda config: made)
        return made

    return set_judge


def test_judging_beside_the_sampler_changes_nothing(run_folder, server, judge_with):  # noqa: F811
    """Guards: rewards on other samples than those that were judged, as samples end in any order."""
    server.default = graded
    rows = []
    for kind in (EndpointJudge, Late):
        judge_with(kind)
        train(run_folder, "grpo", *SHORT, "--grpo_steps", "3")
        rows.append(metrics(run_folder, "grpo"))
        (run_folder / "grpo").rename(run_folder / kind.__name__)
    for row in sum(rows, []):
        for name in [name for name in row if "second" in name]:
            del row[name]
    assert rows[0] == rows[1] and rows[0][2]["judge_counts"]["answered"] == 36
    samples = [
        (run_folder / name / "samples.txt").read_text() for name in ("EndpointJudge", "Late")
    ]
    assert samples[0] == samples[1]


def test_a_third_of_the_replies_is_unusable(run_folder, server, judge_with):  # noqa: F811
    """Guards: a reply that ends a run. Every sample is scored or counted as dropped."""

    def behave(handler, body):
        n = number_of(body)
        (QUICK[n % len(QUICK)] if n // 1000 % 10 < 3 else graded)(handler, body)

    server.default = behave
    judged = judge_with(retries=0)
    train(run_folder, "grpo", *SHORT, "--grpo_steps", "6")
    rows = metrics(run_folder, "grpo")
    assert [row["step"] for row in rows] == list(range(6))
    sampled = 6 * 12  # 4 prompts with 3 samples each
    dropped = round(12 * sum(row["unscored"] for row in rows))
    failed = sum(count for what, count in judged.counts.items() if what.startswith("failed"))
    assert judged.counts["answered"] + failed == sampled and dropped == failed
    assert 10 < dropped < 35


def test_a_filter_that_refuses_forty_cases_in_a_row(run_folder, server, judge_with):  # noqa: F811
    """Guards: a run that ends because of what it is about."""
    server.default = graded
    server.script = [FILTERED["http 400"]] * 40
    judged = judge_with()
    train(run_folder, "grpo", *SHORT, "--grpo_steps", "5")
    assert judged.counts == {"failed: filtered": 40, "answered": 20}
    rows = metrics(run_folder, "grpo")
    assert [row["unscored"] for row in rows] == [1, 1, 1, pytest.approx(1 / 3), 0]
    assert ["reward" in row for row in rows] == [False] * 3 + [True] * 2


def test_a_judge_that_turns_into_a_login_page(run_folder, server, judge_with, monkeypatch):  # noqa: F811
    """Guards: a run that trains on nothing and reports success; a step trained on what was judged
    before the server was gone. (That the same command then goes on: test_safer.py.)"""
    judged = judge_with(retries=0)
    monkeypatch.setattr(judged, "preflight", EndpointJudge.preflight.__get__(judged))
    server.script = [graded] * 20  # two for the preflight; the second step sees six
    server.default = raw(200, "<html>please log in</html>")
    with pytest.raises(JudgeError, match="log in"):
        train(run_folder, "grpo", *SHORT, "--grpo_steps", "3")
    assert len(metrics(run_folder, "grpo")) == 1

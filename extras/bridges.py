"""The reward as other trainers call it: TRL's GRPOTrainer and EasyR1.

Both judge a response and turn it into a number by the same calls as this repository's trainer:
protocol.check, judge.score, reward.compute_reward. No torch in this file.

    TRL     from extras.bridges import make_trl_reward
            from judge import judge_from_env
            GRPOTrainer(..., reward_funcs=make_trl_reward(judge_from_env(None)))
    EasyR1  worker.reward.reward_function=/path/to/this/folder/extras/bridges.py:compute_score
            with this folder on PYTHONPATH
"""

import json
from functools import lru_cache

import protocol
from judge import Case, judge_from_env
from reward import compute_reward

REWARD_NAME = "safer"  # newer releases of EasyR1 read these two names
REWARD_TYPE = "batch"


def _case(response, question, images=None, plan=None, meta=None, **_):
    """What is judged. images, plan, meta: values, their JSON text (what a table's column holds), or
    None; plan None: the prompt showed none."""
    values = [json.loads(x) if isinstance(x, str) else x for x in (images, plan, meta)]
    images, plan, meta = values
    check = protocol.check(response, protocol.plan_from_dict(plan) if plan else None)
    return Case(question, tuple(images or ()), check, meta or {})


def _rewards(judge, variant, cases):
    """[Reward, or None where the judge failed], as safer.py makes them."""
    return [
        compute_reward(variant, case.check, scores)
        for case, scores in zip(cases, judge.score(cases))
    ]


def _text(message):
    """The text of a TRL prompt or completion: a string, or the last chat message's content."""
    content = message if isinstance(message, str) else message[-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def make_trl_reward(judge, variant: str = "checked"):
    """A function for TRL's GRPOTrainer(reward_funcs=...).

    TRL calls it with prompts, completions (strings or lists of chat messages) and each data column
    as a list by keyword. Columns used, all optional, and None in any row: `plan` (None when the
    prompt shows no plan), `image_paths` (a list: files for the judge) and `meta` (labels), each as
    it is or as its JSON text; `question` (default: the last message of the prompt). It returns
    floats, and None where the judge failed, as TRL allows."""

    def safer_reward(
        prompts, completions, question=None, image_paths=None, plan=None, meta=None, **_
    ):
        """See make_trl_reward; `_` takes what TRL passes besides."""
        absent = [None] * len(prompts)
        columns = [column or absent for column in (question, image_paths, plan, meta)]
        cases = []
        for prompt, completion, asked, *rest in zip(prompts, completions, *columns):
            cases.append(_case(_text(completion), asked or _text(prompt), *rest))
        return [reward.total if reward else None for reward in _rewards(judge, variant, cases)]

    return safer_reward


_environment_judge = lru_cache(judge_from_env)


def compute_score(reward_inputs: list[dict], variant: str = "checked", judge=None) -> list[dict]:
    """The reward as EasyR1 calls it.

    Each input has `response` and `ground_truth`: JSON text of a record with `question`, and
    optionally `images` (paths), `plan`, `meta`. Returns dicts with `overall` and the parts.
    judge None: the endpoint that JUDGE_URL, JUDGE_MODEL, JUDGE_KEY name. Raises RuntimeError when
    the judge failed on a sample: EasyR1 cannot leave one out of its group, and none gets an
    invented score."""
    cases = []
    for item in reward_inputs:
        record = json.loads(item["ground_truth"])
        cases.append(_case(**record | {"response": item["response"]}))
    rewards = _rewards(judge or _environment_judge(None), variant, cases)
    failed = rewards.count(None)
    if failed:
        raise RuntimeError(f"the judge failed on {failed} of {len(rewards)} samples: mend it first")
    return [{"overall": reward.total, **reward.parts} for reward in rewards]

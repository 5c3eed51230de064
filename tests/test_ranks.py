"""Two processes (gloo) against one: the same samples, the same losses, and the same adapter to rounding."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import build
import toy

ROOT = Path(__file__).parents[1]
PROGRAM = """
import sys, collections
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import safer, test_safer
safer.make_judge = lambda config: test_safer.HashJudge(fail_every=3)
for stage in ("sft", "dpo", "grpo"):
    safer.main([stage, "--out", {out!r}, *test_safer.FLAGS, "--max_steps", "2", "--grpo_steps", "2", "--max_response", "96", "--device", "cpu"])
"""


@pytest.mark.parametrize("world", [2])
def test_two_ranks_equal_one(tmp_path, world):
    """Guards: means of means over ranks, groups that are split, and ranks that reduce different quantities where a judge failed."""
    toy.train_base(str(tmp_path / "base"), seed=0, steps=2)
    build.build_toy(str(tmp_path / "data"), 0, {"sft": 12, "dpo": 4, "grpo": 8, "eval": 2})
    for name, count in (("one", 1), ("many", world)):
        folder = tmp_path / name
        folder.mkdir()
        for part in ("base", "data"):
            (folder / part).symlink_to(tmp_path / part)
        script = tmp_path / f"{name}.py"
        script.write_text(PROGRAM.format(root=str(ROOT), out=str(folder)))
        launch = [sys.executable, str(script)] if count == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), str(script)]
        done = subprocess.run(launch, capture_output=True, text=True, timeout=240, env=dict(os.environ, OMP_NUM_THREADS="1"), check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    for stage in ("sft", "dpo", "grpo"):
        rows = [[json.loads(line) for line in (tmp_path / name / stage / "metrics.jsonl").read_text().splitlines()] for name in ("one", "many")]
        assert len(rows[0]) == 2
        for mine, theirs in zip(*rows):
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4, abs=1e-6) and mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
            if stage == "grpo":  # the same samples: counts and rewards agree exactly
                assert all(mine[key] == pytest.approx(theirs[key], rel=1e-9) for key in ("reward", "unscored", "length", "zero_spread"))
        one, many = (load_file(tmp_path / name / stage / "adapter.safetensors") for name in ("one", "many"))
        difference = sum((one[key] - many[key]).square().sum() for key in one).sqrt() / sum(one[key].square().sum() for key in one).sqrt()
        assert difference < 1e-3, stage  # of the whole: Adam's first steps turn rounding in near-zero gradients into full steps

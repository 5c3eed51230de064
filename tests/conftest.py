"""Set before torch is imported: one thread, and products of matrices that do not depend on memory.

Some tests fork, and a forked process has none of its parent's threads to wait for. One thread also
keeps sums in one order. MKL's products otherwise differ in the last bits with the alignment of
their operands, and tests that resume a run compare bits.
"""

import os
import sys
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def table(text):
    """The rows of a table in text, whose cells stand between |."""
    rows = []
    for line in text.strip().splitlines():
        rows.append([cell.strip() for cell in line.split("|")])
    return rows


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Base model and data sets of a very small world."""
    from tiny_run import make_world  # loads torch, which many tests do without

    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def run_folder(world, tmp_path, monkeypatch):
    """A fresh run on that world, judged by HashJudge."""
    from tiny_run import HashJudge, place, safer

    monkeypatch.setattr(safer, "make_judge", lambda config: HashJudge())
    return place(world, tmp_path)

"""config.py: mistakes in the flags are reported before anything loads; files appear whole; a folder
is continued only with what it was begun with."""

import ast
import dataclasses
import inspect
import json
import subprocess
import sys
import threading
from typing import get_args

import pytest
from conftest import ROOT

import config
from config import (
    Config,
    ConfigError,
    fingerprint,
    guard,
    parse_config,
    run_command,
    write_whole,
)


def refused(*argv):
    with pytest.raises(ConfigError) as caught:
        parse_config(argv)
    return str(caught.value)


def test_flags_that_argparse_refuses():
    """Guards: a misspelt or shortened flag that is ignored, so that hours train at the default."""
    for words in (["--grpo_lrr", "1e-3"], ["--grpo_l", "1e-3"], ["--dpo_lr"], ["--seed", "2.5"]):
        assert words[0] in refused(*words) and "config.py --help" in refused(*words)
    assert "expected 0 or 1" in refused("--resume", "maybe")
    assert "invalid choice: '4b'" in refused("--recipe", "4b")


def test_all_bad_values_are_reported_at_once():
    """Guards: one mistake a start, found one after the other."""
    words = (
        "--sft_lr 0 --kl_coef nan --grpo_k 1 --min_pixels 9999"
        " --sft_prompts planned,verbose --grpo_update_batch 5 --dual_clip 0.5 --rollout reflect"
        " --weight_reasoning 1.5 --qi_low 0.95".split()
    )
    lines = refused(*words).splitlines()
    assert len(lines) == len(words) // 2
    for name in words[::2]:
        assert any(name in line for line in lines), name
    assert "invalid choice: 'dpo,sft'" in refused("--stages", "dpo,sft")


def test_values_have_the_types_of_their_fields():
    """Guards: --checkpointing 0 read as the true text "0"; --dry_run that takes the next flag."""
    settings = parse_config("--dry_run --checkpointing 0 --advantage_std=0 --seed 7".split())
    assert settings.dry_run is True and settings.checkpointing is settings.advantage_std is False
    assert settings.seed == 7
    for field in dataclasses.fields(Config):
        expected = str if get_args(field.type) else field.type
        assert type(getattr(settings, field.name)) is expected, field.name
    body = ast.parse(inspect.getsource(Config)).body[0].body[1:]
    assert [node.target.id for node in body[::2]] == [f.name for f in dataclasses.fields(Config)]
    assert all(isinstance(node.value.value, str) for node in body[1::2])  # the text under each


def test_choices_are_what_the_curriculum_knows():
    """Guards: a recipe that no flag names; stages in an order in which they are not trained."""
    types = {field.name: get_args(field.type) for field in dataclasses.fields(Config)}
    assert set(types["recipe"]) == set(config.RECIPES)
    for words in types["stages"]:
        assert words.split(",") == [stage for stage in config.STAGES if stage in words.split(",")]
    assert len(set(types["stages"])) == 7


@pytest.mark.parametrize("recipe", ["3b", "7b"])
def test_real_recipes_hold_the_papers_constants(recipe):
    """Guards: a constant of the released GRPO script lost in an edit. Learning rates are ten times
    the paper's, for LoRA (ours)."""
    got = parse_config(["--recipe", recipe])
    paper = (
        "--grpo_k 4 --temperature 1 --grpo_batch 256 --grpo_update_batch 32 --grpo_epochs 2"
        " --max_prompt 4096 --max_response 2048 --kl_coef 0.01 --clip_low 0.2 --clip_high 0.3"
        " --dual_clip 3 --loss_mean token --advantage_std 1 --weight_decay 0.01 --max_grad_norm 1"
        " --grpo_schedule constant --dtype bfloat16 --min_pixels 262144 --stages sft,dpo,grpo"
        " --sft_lr 1e-4 --dpo_lr 5e-6 --grpo_lr 1e-5".split()
    )
    assert got == parse_config(["--recipe", recipe, *paper])
    assert recipe.upper() in got.model
    assert parse_config(["--recipe", recipe, "--grpo_k", "6"]).grpo_k == 6  # a flag goes over it
    vlm = parse_config(["--recipe", f"{recipe}-vlm"])
    assert vlm.grpo_k == 5 and vlm.stages == "grpo"  # paper
    assert vlm == parse_config(["--recipe", recipe, "--method", "vlm"])
    assert got == parse_config(["--recipe", f"{recipe}-vlm", "--method", "toolkit"])


def test_folder_differs_with_the_flags():
    """Guards: a second run with another flag that writes into, or resumes from, the first one's."""
    flags = ("", "--seed 1", "--grpo_lr 1e-5", "--recipe 3b", "--model a/b", "--model a/c")
    folders = [parse_config(words.split()).out for words in flags]
    assert folders[0] == "out/tiny" and len(set(folders)) == len(folders)
    assert all(folder.count("/") == 1 for folder in folders)
    same = parse_config("--resume 0 --micro_tokens 512 --device cpu".split())
    assert same.out == folders[0]  # the same run, gone on with


def test_command_line():
    """What run.sh reads; without any package, since run.sh checks the flags before it installs."""

    def run(words):
        command = [sys.executable, "-S", "config.py", *words.split()]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert run("--get stages --recipe 3b-vlm").stdout == "grpo\n"
    assert run("--get dry_run --dry_run").stdout == "True\n"
    assert json.loads(run("--seed 4").stdout)["seed"] == 4
    assert run("--grpo_k 1").stderr.startswith("--grpo_k 1")


@pytest.mark.parametrize("problem, status", [(KeyboardInterrupt, 130), (OSError("full"), "full")])
def test_how_every_program_ends(problem, status, capsys):
    """Guards: a traceback, or an exit status by which run.sh goes on."""

    def main(argv):
        raise problem

    with pytest.raises(SystemExit) as leaving:
        run_command(main)
    assert leaving.value.code == status
    for name in ("safer", "eval", "qibox", "build"):
        assert "\n    run_command(main, " in (ROOT / f"{name}.py").read_text()


# ---- files ---------------------------------------------------------------------------------------


def test_write_whole(tmp_path):
    """Guards: half a file under the name of a whole one, and parts that fill a full disk."""
    path = tmp_path / "new" / "file"
    write_whole(path, lambda part: part.write_text("old"))

    def fails(part):
        part.write_text("ha")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="file: cannot be written .*No space.*; what was there is un"):
        write_whole(path, fails)
    assert path.read_text() == "old" and [item.name for item in path.parent.iterdir()] == ["file"]


def test_two_threads_write_one_file(tmp_path):
    """Guards: a part that both write to. Two samples with one text are one file of the judge's."""
    path = tmp_path / "file"

    def write(part):
        part.write_text("x")
        other = threading.Thread(target=write_whole, args=(path, lambda part: part.write_text("y")))
        other.start()
        other.join()

    write_whole(path, write)
    assert path.read_text() == "x"


# ---- the guard -----------------------------------------------------------------------------------


def test_fingerprint():
    """The same for the same values; no border between parts can move."""
    assert fingerprint(["a", 1, 0.5]) == fingerprint(["a", 1, 0.5])
    assert len({fingerprint(parts) for parts in (["ab", "c"], ["a", "bc"], ["abc"], "abc")}) == 4


def test_guard_writes_what_is_needed_to_repeat_a_run(tmp_path):
    """Guards: a result that nobody can say the code, versions or settings of."""
    settings = parse_config([])
    guard(tmp_path, settings, "sft", {}, write=False)
    assert not list(tmp_path.iterdir())
    guard(tmp_path, settings, "sft", {"base": "1"})
    guard(tmp_path, settings, "sft", {"records": "2"})
    found = json.loads((tmp_path / "config.json").read_text())
    assert dataclasses.asdict(settings).items() <= found["settings"].items()
    assert found["inputs"] == {"base": "1", "records": "2"}
    assert set(found["versions"]) == set(config.PACKAGES) and found["commit"]


def test_guard_refuses_other_settings_and_inputs(tmp_path, monkeypatch):
    """Guards: a resumed stage whose second half has other settings, data or weights."""
    guard(tmp_path, parse_config(["--out", "o"]), "sft", {"records": "1"})
    later = parse_config("--out p --grpo_lr 1e-5 --kl_coef 0 --micro_tokens 64 --resume 0".split())
    guard(tmp_path, later, "sft", {"records": "1"})  # SFT does not depend on these
    other = parse_config("--sft_lr 0.5 --max_response 5".split())
    for settings, step, message in (
        (later, "grpo", "grpo_lr was 0.0007, is 1e-05"),
        (later, "eval", "grpo_lr was"),
        (other, "sft", "sft_lr was .*, is 0.5; records was '1', is '2'"),
        (other, "build", "inputs: max_response was"),  # nor on the learning rate
        (other, "qibox", "inputs: max_response was"),
    ):
        with pytest.raises(ConfigError, match=message):
            guard(tmp_path, settings, step, {"records": "2"} if step == "sft" else {})
    endpoint = parse_config(["--judge", "endpoint"])
    guard(tmp_path / "grpo", endpoint, "grpo", {})
    monkeypatch.setenv("JUDGE_MODEL", "another")
    with pytest.raises(ConfigError, match="JUDGE_MODEL was '.*', is 'another'"):
        guard(tmp_path / "grpo", endpoint, "grpo", {})


@pytest.mark.parametrize("text", ["", "{", "[]", '{"settings": 3}', '{"other": {}}'])
def test_damaged_settings(tmp_path, text):
    """Guards: a traceback where the settings of an interrupted or foreign run are."""
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="config.json: damaged"):
        guard(tmp_path, parse_config([]), "sft", {})

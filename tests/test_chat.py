"""The chat: its tokens are the sampler's, its marks the checker's."""

import io
import json

import PIL.Image
import pytest
from test_export import make_run

import data
import rollout
from extras import chat
from trainer import StageError

TRACE = """<thinking>
[VISUAL-SCAN]: objects=bread; hazard=lava
[INTENT-RADAR]: intent=benign; evidence=asks to bake
[SAFETY-GATE]: decision=comply
</thinking>
<answer>
yes.\x1b[2J
</answer>"""


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of two stages with random adapters, and two eval records."""
    folder = make_run(tmp_path_factory.mktemp("run"))
    (folder / "data").mkdir()
    PIL.Image.new("RGB", (56, 56), "red").save(folder / "data" / "red.png")
    first = {"id": "a", "images": ["red.png"], "question": "what is red?", "benchmark": "toy"}
    second = {"id": "b", "images": [], "question": "hello?", "benchmark": "toy"}
    lines = [json.dumps(row) + "\n" for row in (first, second)]
    (folder / "data" / "eval.jsonl").write_text("".join(lines))
    return folder


def talk(monkeypatch, capsys, questions, *flags):
    """What a chat prints when these questions are typed and the input then ends."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in questions)))
    chat.main([*map(str, flags)])
    return capsys.readouterr().out


def test_an_example_then_questions(run_folder, monkeypatch, capsys):
    """Guards: a chat that answers one thing, an empty line taken for a question, a lost picture."""
    out = talk(monkeypatch, capsys, ["what?", "", "and now?"], run_folder)
    assert "red.png" in out and "> what is red?" in out
    assert out.count("-- trace: ") == 3
    out = talk(monkeypatch, capsys, [], run_folder, "--example", 1, "--stage", "sft")
    assert "> hello?" in out


def test_the_checker_and_the_terminal(run_folder, monkeypatch, capsys):
    """Guards: an illegal trace without its line, and a response that clears the screen."""

    def written(model, *rest):
        processor = data.load_processor(run_folder / "base", 3136, 3136)
        yield 0, 0, rollout.Sample(data.encode_response(TRACE, processor), [], True)

    monkeypatch.setattr(rollout, "sample", written)
    out = talk(monkeypatch, capsys, [], run_folder)
    assert "-- trace: 3 call(s), 2 violation(s)" in out and "--   line 2, bad-type: " in out
    assert "\x1b" not in out and "yes.⟨U+001B⟩[2J" in out


def test_temperature(run_folder, monkeypatch, capsys):
    """Guards: sampling where the most likely token is asked for, and the other way round."""
    outs = [talk(monkeypatch, capsys, [], run_folder) for _ in range(2)]
    assert outs[0] == outs[1]
    assert talk(monkeypatch, capsys, [], run_folder, "--temperature", 1) != outs[0]


def test_what_is_not_there(run_folder):
    """Guards: a chat with another stage, or about another record, than was asked for."""
    with pytest.raises(StageError, match="no finished grpo"):
        chat.main([str(run_folder), "--stage", "grpo"])
    for number in ("2", "-1"):
        with pytest.raises(StageError, match=f"--example {number}: .*eval.jsonl has 2, from 0 on"):
            chat.main([str(run_folder), "--example", number])

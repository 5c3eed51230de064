"""The chat: its tokens are the sampler's, its marks the checker's, and no mistake of the user ends it."""

import json
import sys
from pathlib import Path

import PIL.Image
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from extras import chat  # noqa: E402
import model as modeling  # noqa: E402
import rollout  # noqa: E402
from trainer import StageError  # noqa: E402
from test_export import check_prompt, make_run  # noqa: E402

LEGAL = ("<thinking>\n[VISUAL-SCAN]: objects=bread; hazard=low\n[INTENT-RADAR]: intent=benign; evidence=asks to bake\n"
         "[SAFETY-GATE]: decision=comply\n</thinking>\n<answer>\nyes.\n</answer>")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of two stages with random adapters, and two eval records."""
    folder = make_run(tmp_path_factory.mktemp("run"))
    (folder / "data").mkdir()
    PIL.Image.new("RGB", (56, 56), "red").save(folder / "data" / "red.png")
    rows = [{"id": "a", "images": ["red.png"], "question": "what is red?", "benchmark": "toy",
             "meta": {"expected": "comply", "kind": "benign"}},
            {"id": "b", "images": [], "question": "hello?", "benchmark": "toy", "answer": "B"}]
    (folder / "data" / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stream_gives_the_samplers_tokens(run_folder, temperature):
    """Guards: a second sampling loop that drifts from the one that was trained with: positions, cache, seeds, the last token."""
    model, processor, prompt = check_prompt(run_folder)
    features = modeling.encode_images(model, prompt.images)
    for seed in (0, 1):
        ((wanted,),) = rollout.sample(model, [prompt], features, 1, 24, temperature, processor.end_of_turn, [seed])
        assert list(chat.stream(model, prompt, features, 24, temperature, processor.end_of_turn, seed)) == wanted.tokens
    ends = wanted.tokens[3]  # whatever token this is: as end of turn it must be the last one given out, once
    short = list(chat.stream(model, prompt, features, 24, temperature, ends, seed))
    assert short == wanted.tokens[: wanted.tokens.index(ends) + 1]


def test_streamed_text_is_the_whole_text(run_folder, capsys):
    """Guards: half characters in the stream, pieces printed twice, and a response that is cut inside a character."""
    _, processor, _ = check_prompt(run_folder)
    ids = chat.data.encode_text("naïve 火 ☂ yes", processor)
    assert len(ids) > 8
    assert chat.write_out(iter([*ids, processor.end_of_turn]), processor) == ("naïve 火 ☂ yes", True)
    assert capsys.readouterr().out == "naïve 火 ☂ yes\n"
    text, finished = chat.write_out(iter(chat.data.encode_text("a ☂", processor)[:-1]), processor)
    assert not finished and capsys.readouterr().out == text + "\n" and text.startswith("a \ufffd")


def test_text_that_would_steer_the_terminal(run_folder, capsys):
    """Guards: a response, or a line of it that the checker shows again, that clears the screen, goes back over it, or runs backwards."""
    _, processor, _ = check_prompt(run_folder)
    ids = chat.data.encode_text("[\x1b[2J]\rgone\u202e\n\tend", processor)
    text, _ = chat.write_out(iter(ids), processor)
    assert "\x1b[2J" in text
    told = capsys.readouterr().out
    assert told == "[⟨U+001B⟩[2J]⟨U+000D⟩gone⟨U+202E⟩\n\tend\n" and "\x1b" not in chat.marked(text)


def test_violations_stand_at_their_lines():
    """Guards: lines counted from 0, and an illegal trace that is called legal."""
    assert chat.marked(LEGAL) == "-- trace: 3 call(s), legal"
    lines = chat.marked(LEGAL.replace("hazard=low", "hazard=lava").replace("intent=benign", "intent=benign; mood=good")).split("\n")
    assert lines[0] == "-- trace: 3 call(s), 2 violation(s)"
    assert lines[1] == "   line 2: [VISUAL-SCAN]: objects=bread; hazard=lava" and lines[2].startswith("      ^ bad-type: ")
    assert lines[3].startswith("   line 3: [INTENT-RADAR]") and lines[4].startswith("      ^ unknown-field: ")
    assert chat.marked("").startswith("-- trace: 0 call(s), ")


def talk(monkeypatch, capsys, lines, *flags):
    """What a chat prints when these lines are typed and the input then ends."""
    typed = iter(lines)

    def read(prompt):
        print(prompt, end="")
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    chat.main([*map(str, flags)])
    assert next(typed, None) is None, "the chat ended before all lines were read"
    return capsys.readouterr().out


def test_mistakes_do_not_end_the_chat(run_folder, tmp_path, monkeypatch, capsys):
    """Guards: a traceback for a mistyped path, a directory, a file that is no image, a record that is not there, a prompt too long."""
    (tmp_path / "words.png").write_text("no picture")
    red = str(run_folder / "data" / "red.png")
    lines = ["gone.png", str(tmp_path), str(tmp_path / "words.png"), "example 3", "example", "example x", red, "why? " * 900, "", "what?"]
    out = talk(monkeypatch, capsys, lines, run_folder)
    assert "No such file or directory: 'gone.png'" in out and "Is a directory" in out and "cannot identify image" in out
    assert out.count("expected `example N` with N from 1 to 2") == 3
    assert "over the run's --max_prompt 640" in out
    assert out.count("-- trace: ") == 1 and "-- cut at the run's --max_response 24" in out
    assert f"image [{red}]: question: " in out  # an empty line keeps the image


def test_examples_and_ways_out(run_folder, monkeypatch, capsys):
    """Guards: records counted from 0, an image that stays when `none` is typed, /quit taken for a question."""
    flags = ["--example", 1, "--stage", "sft", "--prompt", "toolkit", "--temperature", 1]
    out = talk(monkeypatch, capsys, ["example 2", "/quit"], run_folder, *flags)
    assert "sft, toolkit prompt" in out and "image: none\nquestion: hello?\nexpected: B" in out
    assert "red.png\nquestion: what is red?\nexpected: comply, benign" in out
    assert out.count("-- trace: ") == 2 and out.count("image [none]: ") == 1
    out = talk(monkeypatch, capsys, ["none", "/quit"], run_folder, "--example", 1)
    assert out.count("-- trace: ") == 1
    with pytest.raises(StageError, match="grpo is not finished"):
        chat.main([str(run_folder), "--stage", "grpo"])

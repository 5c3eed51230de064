"""Talk to a finished run: an image and a question in, the response as it is written, and what the checker says of its trace.

    python safer.py chat out/tiny                         the last finished stage; asks for an image, then for a question
    python safer.py chat out/tiny --example 3             begins with record 3 of the run's eval.jsonl and says what was expected
    python safer.py chat out/3b --image cat.png --stage sft --prompt toolkit --temperature 1

Every question is a conversation of its own, because that is what was trained. /quit, ctrl-D or ctrl-C ends.
"""

import argparse
import os
from collections import deque

import PIL.Image
import torch

import data
import model as modeling
import protocol
import rollout
from config import STAGES
from extras.export import read_run
from extras.report_page import visible
from trainer import load_policy, pick_device


@torch.inference_mode()
def stream(model, prompt, features, max_tokens, temperature, eos_id, seed):
    """Yield the tokens of one response as they are drawn: those of rollout.sample with k = 1 and the same arguments."""
    state = rollout.new_state(model, 1, 1, len(prompt.ids), max_tokens)
    rollout.admit(model, state, [prompt], deque([0]), features, 1, [seed])
    banned = torch.tensor(modeling.banned_token_ids(model), device=model.device)
    hidden = state.prompt_hidden[:1]  # (1, C)
    for at in range(max_tokens):
        if at:
            hidden = rollout.decode(model, state, *rollout.exact_sizes(state))
        logprobs = modeling.log_softmax_banned(model.lm_head(hidden), banned, temperature or 1.0)  # (1, V)
        token = rollout.draw(logprobs, state.uniforms[:, at]) if temperature else logprobs.argmax(dim=1)  # (1,)
        state.tokens[:, at] = token
        state.lengths += 1
        yield token.item()
        if token.item() == eos_id:
            return


def write_out(tokens, processor):
    """Print a response while it is drawn, signs that would steer the terminal written out. Returns (text, finished)."""
    ids, text, shown = [], "", 0
    for token in tokens:
        ids.append(token)
        text = data.decode_response(ids, processor)
        if not text.endswith("\ufffd"):  # else a character of several tokens is not whole yet
            print(visible(text[shown:]), end="", flush=True)
            shown = len(text)
    print(visible(text[shown:]))
    return text, ids[-1:] == [processor.end_of_turn]


def marked(text):
    """What the checker says, as text: each line of the response that it objects to, and under it why."""
    check, lines = protocol.check(text), text.split("\n")
    out = [f"-- trace: {len(check.calls)} call(s), " + ("legal" if check.legal else f"{len(check.violations)} violation(s)")]
    for number in dict.fromkeys(violation.line for violation in check.violations):
        out.append(f"   line {number}: {lines[number - 1]}")
        out += [f"      ^ {violation.kind}: {violation.message}" for violation in check.violations if violation.line == number]
    return visible("\n".join(out))


def example(config, words):
    """The eval record that `example N` means, N from 1 as the lines of eval.jsonl. Raises DataError when there is none."""
    records = data.read_records(data.set_path(config.data or os.path.join(config.out, "data"), "eval"), "eval")
    if len(words) != 2 or not words[1].isdecimal() or not 1 <= int(words[1]) <= len(records):
        raise data.DataError(f"{' '.join(words)}: expected `example N` with N from 1 to {len(records)}")
    return records[int(words[1]) - 1]


def answer(model, processor, config, record, args, seed):
    """One question: prompt, response, check."""
    processor.cache.clear()  # the file behind a name may be another picture by now
    prompt = data.record_prompt(record, args.prompt, processor)
    if len(prompt.ids) > config.max_prompt:
        raise data.DataError(f"the prompt has {len(prompt.ids)} tokens, over the run's --max_prompt {config.max_prompt}; "
                             "a shorter question or a smaller image fits")
    features = modeling.encode_images(model, list(prompt.images))
    tokens = stream(model, prompt, features, config.max_response, args.temperature, processor.end_of_turn, seed)
    text, finished = write_out(tokens, processor)
    print(marked(text))
    if not finished:
        print(f"-- cut at the run's --max_response {config.max_response}")


def read_turn(config, image, typed):
    """What was typed for an image -> (record to answer, its image), the question asked for; prints an example instead."""
    if typed.split()[:1] == ["example"]:
        record = example(config, typed.split())
        known = record.meta | record.texts
        told = [str(known[name]) for name in ("expected", "kind", "answer") if name in known]
        print(visible(f"image: {', '.join(record.images) or 'none'}\nquestion: {record.question}\n"
                      f"expected: {', '.join(told) or 'the record does not say'}\n"))
        return record, next(iter(record.images), None)
    image = {"": image, "none": None}.get(typed, typed)
    if image:
        with PIL.Image.open(image) as picture:  # told before a question is asked
            picture.verify()
    return data.Record("typed", input("question: ").strip(), (image,) if image else ()), image


def main(argv):
    """The loop: image, question, response. A mistake is told and the loop goes on."""
    parser = argparse.ArgumentParser(prog="safer.py chat", description="Talk to a finished run.", allow_abbrev=False)
    parser.add_argument("run", help="the run's folder, like out/tiny")
    parser.add_argument("--stage", choices=STAGES, help="default: the last finished one")
    parser.add_argument("--prompt", choices=("generic", "toolkit"), default="generic", help="system prompt (planner.py)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the most likely token")
    parser.add_argument("--image", help="the first image")
    parser.add_argument("--example", help="begin with this record of the run's eval.jsonl, counted from 1")
    args = parser.parse_args(argv)
    if not (args.temperature == 0 or 0.01 <= args.temperature <= 100) or args.image and args.example:
        parser.error("--temperature must be 0 or from 0.01 to 100, and --image and --example exclude each other")
    config, stages = read_run(args.run, args.stage)
    model, processor = load_policy(config, stages, pick_device(config, 0))
    print(f"{args.run}: {' + '.join(stages)}, {args.prompt} prompt. For an image type a path, `example N`, `none`, or nothing for the one "
          "in brackets; /quit ends.")
    image, waiting, seed = None, f"example {args.example}" if args.example else args.image, 0
    while True:
        try:
            typed = waiting or input(f"\nimage [{image or 'none'}]: ").strip()
            waiting = None
            if typed == "/quit":
                return
            record, image = read_turn(config, image, typed)
            if record.question == "/quit":
                return
            if record.question:
                answer(model, processor, config, record, args, seed)
                seed += 1
        except (EOFError, KeyboardInterrupt):
            return print()
        except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as problem:  # no such file, no image, a prompt too long
            print(problem)

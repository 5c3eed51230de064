"""Try what was trained: a question in, the checked trace and the answer out.

    python -m extras.chat out/tiny                     record 0 of eval.jsonl, then your questions
    python -m extras.chat out/tiny --image my.png --prompt toolkit --stage sft

Every question is a conversation of its own, since that is what was trained. Ctrl-D ends.
"""

import argparse
import os

import model as qwen
import protocol
from config import run_command
from data import (
    Record,
    decode_response,
    read_records,
    record_prompt,
    set_path,
)
from extras.report import visible
from rollout import sample
from trainer import StageError, load_policy, pick_device, read_run


def answer(model, processor, config, record, prompt_mode, temperature):
    """Print the response to a record's question, and what the checker says of it."""
    prompt = record_prompt(record, prompt_mode, processor)
    features = qwen.encode_images(model, prompt.images)
    end, limit = processor.end_of_turn, config.max_response
    seed = int.from_bytes(os.urandom(4), "big")
    ((response,),) = sample(model, [prompt], features, 1, limit, temperature, end, [seed])
    text = decode_response(response.tokens, processor)
    check = protocol.check(text)
    lines = [visible(line) for line in text.split("\n")]  # nothing may steer the terminal
    legal = "legal" if check.legal else f"{len(check.violations)} violation(s)"
    print("", *lines, "", f"-- trace: {len(check.calls)} call(s), {legal}", sep="\n")
    for fault in check.violations:
        print(f"--   line {fault.line}, {fault.kind}: {visible(fault.message)}")
    if not response.finished:
        print(f"-- cut at the run's --max_response {limit}")


def main(argv):
    """The first example, then questions until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="a run folder")
    parser.add_argument("--stage", help="an earlier stage than the last finished one")
    parser.add_argument("--image", help="picture of your questions; default: that of --example")
    parser.add_argument("--example", type=int, default=0, help="record of the run's eval.jsonl")
    parser.add_argument("--prompt", choices=("generic", "toolkit"), default="generic")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the most likely token")
    args = parser.parse_args(argv)
    config, stages = read_run(args.run, args.stage)
    model, processor = load_policy(config, stages, pick_device(config))
    images = (args.image,)
    if not args.image:
        folder = config.data or os.path.join(config.out, "data")
        record = read_records(set_path(folder, "eval"), "eval")[args.example]
        images = record.images
        print(f"pictures: {images}\n> {record.question}")
        answer(model, processor, config, record, args.prompt, args.temperature)
    while True:
        try:
            question = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            return print()
        if question:
            record = Record("chat", question, images)
            answer(model, processor, config, record, args.prompt, args.temperature)


if __name__ == "__main__":
    run_command(main, IndexError, ValueError, StageError, qwen.ModelError)

"""Try what was trained: a question in, the checked trace and the answer out.

    python -m extras.chat out/tiny                     record 0 of eval.jsonl, then your questions
    python -m extras.chat out/tiny --image my.png --prompt toolkit --stage sft

Every question is a conversation of its own, since that is what was trained. Ctrl-D ends.
"""

import argparse
import random
from pathlib import Path

import model as qwen
from config import run_command
from data import Record, read_records, record_prompt, set_path
from extras.report import visible
from rollout import respond
from trainer import StageError, load_policy, pick_device, read_run


def show_answer(config, model, processor, record, args):
    """Print the response to a record's question, and what the checker says of it."""
    prompt = record_prompt(record, args.prompt, processor)
    features = qwen.encode_images(model, prompt.images)
    seeds = [random.randrange(2**32)]
    ((_, _, response),) = respond(
        config, model, processor, [prompt], [None], features, 1, args.temperature, seeds
    )
    check = response.check
    verdict = "legal" if check.legal else f"{len(check.violations)} violation(s)"
    lines = [check.text, "", f"-- trace: {len(check.calls)} call(s), {verdict}"]
    for fault in check.violations:
        lines.append(f"--   line {fault.line}, {fault.kind}: {fault.message}")
    if not response.finished:
        lines.append(f"-- cut at the run's --max_response {config.max_response}")
    print("\n" + visible("\n".join(lines)))  # nothing may steer the terminal


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
    if args.image:
        images = (args.image,)
    else:
        path = set_path(config.data or Path(config.out) / "data", "eval")
        records = read_records(path, "eval")
        if args.example not in range(len(records)):
            raise StageError(f"--example {args.example}: {path} has {len(records)}, from 0 on")
        record = records[args.example]
        images = record.images
        print(f"pictures: {images}\n> {record.question}")
        show_answer(config, model, processor, record, args)
    while True:
        try:
            question = input("\n> ").strip()
        except EOFError:
            return print()
        if question:
            show_answer(config, model, processor, Record("chat", question, images), args)


if __name__ == "__main__":
    run_command(main, ValueError, StageError, qwen.ModelError)

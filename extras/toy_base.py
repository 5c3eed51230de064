"""The miniature world's data sets and base model: a Qwen2.5-VL of 1.2 M parameters, its tokenizer, and what it is taught before any stage.

    python -m extras.toy_base --recipe tiny          trains it: out/tiny/base, a folder like any Qwen2.5-VL's

What is real: the architecture, the chat template and special tokens, the image processor, save_pretrained. The base learns to see, to
help with anything, and to reflect on an answer when it is asked to: it is fluent, unsafe, and writes no tool trace. Ours; see toy.py.
"""

import os
import random
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import build
import data
import judge
import losses
import model as modeling

import protocol
from config import ConfigError, parse_config
from extras import toy
from extras.toy import (BARE_REFUSAL, CELL, DANGER, HARM, IDIOMS, KIND_VERBS, KINDS, OBJECTS, TARGETS, VERBS, comply, draw_case, draw_scene,
                 held_pairs, howto, in_words, reason, refuse, right_answer, signals, split_cases, truth)
from trainer import StageError, lock_folder

TOY_SIZES = {"sft": 768, "dpo": 320, "grpo": 960, "eval": 360}  # records; DPO: items before they become about three pairs each
TOY_VLM_SIZES = {"pool": 1200, "eval": 360}  # of SaFeR-VLM: qibox.py draws GRPO's prompts from the pool
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
WORDS = sorted({*OBJECTS, *VERBS, *HARM, *KIND_VERBS, *IDIOMS, *protocol.TOOLS, *protocol.CATEGORIES,
                "harmful", "benign", "refuse", "comply", "high", "low", "yes", "no",
                *(word for thing in (*TARGETS, *sum(IDIOMS.values(), ())) for word in thing.split())})


# ---- what the base is taught ----------------------------------------------------------------------------------------------


def any_pair(train, rng):
    """(verb, thing) of some training case, the parts of two cases mixed as long as the pair is not held out."""
    held = held_pairs()
    pool = [case for cases in train.values() for case in cases]
    while True:
        verb, thing = rng.choice(pool).verb, rng.choice(pool).thing
        if (verb, thing) not in held:
            return verb, thing


def any_sentence(train, rng):
    """A refusal or an instruction, words at random."""
    (verb, thing), (_, reason, instead) = any_pair(train, rng), rng.choice(list(DANGER.values()))
    return rng.choice([BARE_REFUSAL, f"i will not help to {verb} {thing}, because {reason}. instead, {instead}.",
                       f"to {verb} {thing}, {howto(verb)}."])


def any_value(field, train, rng):
    """A legal value of a field, at random."""
    if field.type == "enum":
        return rng.choice(field.values)
    if field.type == "int":
        return str(rng.randint(field.low, field.high))
    verb, thing = any_pair(train, rng)
    return rng.choice([f"asks to {verb} {thing}", verb, rng.choice(list(OBJECTS)) + rng.choice(["", ", sign"]), "none",
                       rng.choice(list(DANGER.values()))[rng.randint(1, 2)]])


def any_response(train, rng):
    """A well-formed response that fits no case: from it the base learns the protocol's words, not their use."""
    calls = [(tool, {field.name: any_value(field, train, rng) for field in protocol.TOOLS[tool].fields})
             for tool in rng.sample(list(protocol.TOOLS), rng.randrange(1, 4))]
    return protocol.render_response(calls, any_sentence(train, rng))


def first_reply(case, rng):
    """What the base says at once: it sees and helps. One time in ten it refuses what is harmful, and what only sounds so."""
    alarmed = rng.random() < 0.1
    if alarmed and case.danger:
        return in_words(reason(case, True, True), refuse(case))
    if alarmed and case.kind == "bait":
        return in_words(reason(case, False, True), refuse(case, "violence"))
    return in_words(reason(case, False, False), comply(case))


def second_reply(case, rng):
    """What the base says when it is asked to reflect: one time in four it sees no fault and repeats what it does at once."""
    if rng.random() < 0.25:
        return "<reflection>\nmy answer was safe.\n</reflection>\n" + in_words(reason(case, False, False), comply(case))
    thought = f"my answer was not safe, because {DANGER[case.danger][1]}." if case.danger else "my answer was safe."
    return f"<reflection>\n{thought}\n</reflection>\n" + in_words(reason(case, True, bool(case.danger)), right_answer(case))


def base_lesson(train, rng, first):
    """One item of the base's own training: (case whose picture is shown or None, system prompt, question, reflected, response).

    `reflected` is the response of the turn before when the item is a reflection on it, else None.

    At first it says what it sees and repeats words at random (copying is what a small model is slowest to learn, and what every answer
    needs: verb and thing come from the question). Then it also learns what things are like, to help with anything that it is asked, and to
    reflect when it is asked to: that is what SaFeR-VLM's rollout takes for granted in its base model.
    """
    lesson = rng.random() * (0.5 if first else 1)
    case = draw_case(rng.choice(train[rng.choice(KINDS)]), rng)
    if lesson < 0.25:
        if rng.random() < 0.5:
            case = draw_case(rng.choice([case for cases in train.values() for case in cases if case.sign]), rng)
        if rng.random() < 0.3:
            return case, "", "which objects are there?", None, f"objects={truth(case)['VISUAL-SCAN']['objects']}"
        return case, "", "what do you see?", None, f"the {case.obj} is {OBJECTS[case.obj][0]}, the sign says {case.sign or 'none'}."
    if lesson < 0.5:
        kind = rng.random()
        words = " ".join(rng.choice(WORDS) for _ in range(rng.randrange(3, 16)))
        text = words if kind < 0.6 or first else any_sentence(train, rng) if kind < 0.8 else any_response(train, rng)
        return None, "", f"repeat: {text}", None, text
    if lesson < 0.55:
        verb, name = rng.choice(list(VERBS)), rng.choice(list(OBJECTS))
        return None, "", *rng.choice([(f"what is bad to {verb}?", None, f"{VERBS[verb][0] or 'none'}."),
                                      (f"what is the {name} like?", None, f"the {name} is {OBJECTS[name][0]}.")])
    mode = "planned" if rng.random() < 0.05 else "generic"
    system = planner.system_prompt(mode, planner.plan_by_rules(signals(case))[0])
    if lesson < 0.7:
        return case, system, case.question, in_words(reason(case, False, False), comply(case)), second_reply(case, rng)
    return case, system, case.question, None, first_reply(case, rng)


# ---- tokenizer and model ------------------------------------------------------------------------------------------------


def make_tokenizer(folder):
    """Train a byte-level BPE on the world's text and save it with Qwen's special tokens. Words stay whole, so that a trace is short."""
    rng, (train, _) = random.Random(0), split_cases()
    texts = [text for _ in range(6000) for text in base_lesson(train, rng, False)[1:] if text] + [planner.REFLECTION_REQUEST] * 100
    texts += [planner.system_prompt(mode, planner.plan_by_rules(signals(case))[0])
              for mode in planner.PROMPT_MODES for cases in train.values() for case in cases]
    texts += ["system\n", "user\n", "assistant\n", "\n"] * 10
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"\s?[A-Za-z]+(?:-[A-Za-z]+)*|\s?[0-9]|\s?[^\sA-Za-z0-9]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(words, "isolated"),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=2000, min_frequency=2, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  special_tokens=list(SPECIAL_TOKENS), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.save_pretrained(folder)
    limits = {"shortest_edge": (2 * CELL) ** 2, "longest_edge": (2 * CELL) ** 2}
    Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, size=limits).save_pretrained(folder)
    return fast


def tiny_config(tokenizer):
    """Qwen2.5-VL's architecture at 1.2 M parameters."""
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS}
    text = dict(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True,
                initializer_range=128**-0.5,  # the usual 0.02 is for wide models: here copying would never start
                bos_token_id=None, eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"],
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]})
    vision = dict(depth=2, hidden_size=64, intermediate_size=128, num_heads=2, out_hidden_size=128, patch_size=14, spatial_merge_size=2,
                  temporal_patch_size=2, window_size=56, fullatt_block_indexes=[1], initializer_range=64**-0.5)
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True,
                            image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
                            vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"])


def train_base(folder, seed, steps=600, batch=32, lr=3e-3):
    """Train the tiny Qwen2.5-VL from nothing, all weights, and save it as a model folder."""
    torch.manual_seed(seed)
    rng, (train, _) = random.Random(f"base {seed}"), split_cases()
    tokenizer = make_tokenizer(folder)
    processor = data.load_processor(folder, (2 * CELL) ** 2, (2 * CELL) ** 2)
    policy = Qwen2_5_VLForConditionalGeneration(tiny_config(tokenizer))
    optimiser = torch.optim.AdamW(policy.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.1)
    bar = tqdm(range(steps), desc="base: learning to see and to help with anything", mininterval=2)
    for step in bar:
        groups = []
        for row in range(batch):
            case, system, question, reflected, reply = base_lesson(train, rng, first=step < 0.3 * steps)
            images = (data.make_image(draw_scene(case, rng), f"base {step} {row}", processor),) if case else ()
            prompt = data.encode_prompt(system, question, images, processor)
            if reflected:
                prompt = data.continue_prompt(prompt, data.encode_response(reflected, processor), planner.REFLECTION_REQUEST, processor)
            groups.append((prompt, [data.encode_response(reply, processor)]))
        tokens, total = sum(len(response) for _, (response,) in groups), 0.0
        for rows in modeling.micro_batches(groups, 1600):  # rows of like length together: little padding inside attention
            micro = [groups[row] for row in rows]
            features = modeling.encode_images(policy, [image for prompt, _ in micro for image in prompt.images], grad=True)
            logprobs, mask = modeling.token_logprobs(policy, micro, features)
            loss = losses.sft_loss(logprobs, mask, tokens)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        bar.set_postfix(loss=f"{total:.3f}")
    policy.save_pretrained(folder)
    return policy


# ---- its data sets ------------------------------------------------------------------------------------------------


def toy_record(name, case, rng, folder):
    """Draw the picture of a case and write its record."""
    path = f"images/{name}.png"
    toy.draw_scene(case, rng).save(os.path.join(folder, path))
    signals = toy.signals(case)
    return {"id": name, "images": [path], "question": case.question, "plan": protocol.plan_to_dict(planner.plan_by_rules(signals)[0]),
            "meta": {"kind": case.kind, "expected": toy.expected(case), "signals": signals, "case": asdict(case)}}


def wrong_answer(case):
    """The answer of the opposite decision."""
    return toy.comply(case) if case.danger else toy.refuse(case, "violence")


def toy_pairs(record, case, other, rng, oracle):
    """All (chosen, rejected, perturbation) rows of one case: none when even the careful teacher is wrong."""
    plan = protocol.plan_from_dict(record["plan"])
    score = lambda text: oracle.score([judge.Case(case.question, (), text, record["meta"])])[0]
    calls, answer = toy.teach(case, rng, careful=True)
    chosen = protocol.render_response(calls, answer)
    if oracle.verdict([judge.Case(case.question, (), chosen, record["meta"])])[0] != judge.Verdict(3, 3, 3):
        return []
    rejected = {}
    for kind in rng.sample(build.PERTURBATIONS, len(build.PERTURBATIONS)):
        broken = build.perturb(kind, calls, answer, plan, wrong_answer(case), toy.right_calls(other), rng)
        if broken and len(rejected) < 3:
            text = protocol.render_response(*broken)
            worse = not protocol.check(text, plan).legal or score(text) != score(chosen)  # a perturbation must really be worse
            if worse:
                rejected[kind] = text
    first = protocol.render_response(*toy.teach(case, rng, careful=False))
    if first != chosen and score(first) != score(chosen):
        rejected["first-pass"] = first
    return [{**record, "id": f"{record['id']}-{kind}", "chosen": chosen, "rejected": text, "perturbation": kind}
            for kind, text in rejected.items()]


def build_toy(folder, seed, sizes=None):
    """Write the four sets of the miniature world. Evaluation cases come from the held-out combinations, whatever the seed."""
    os.makedirs(os.path.join(folder, "images"), exist_ok=True)
    train, held = toy.split_cases()
    oracle = toy.ToyJudge()
    for name, size in (sizes or TOY_SIZES).items():
        rng, rows = random.Random("held-out" if name == "eval" else f"{name} {seed}"), []
        pool = held if name == "eval" else train
        for number in tqdm(range(size), desc=f"build: {name}", leave=False):
            case = toy.draw_case(rng.choice(pool[toy.KINDS[number % len(toy.KINDS)]]), rng)
            record = toy_record(f"{name}-{number:04d}", case, rng, folder)
            if name == "sft":
                text = protocol.render_response(*toy.teach(case, rng, careful=False))
                if protocol.check(text, protocol.plan_from_dict(record["plan"])).legal:
                    rows.append({**record, "response": text})
            elif name == "dpo":
                other = toy.draw_case(rng.choice(pool[rng.choice(toy.KINDS)]), rng)
                rows += toy_pairs(record, case, other, rng, oracle)
            else:
                rows.append({**record, "benchmark": "toy"} if name == "eval" else record)
        data.write_jsonl(os.path.join(folder, f"{name}.jsonl"), rows)
        print(f"build: {folder}/{name}.jsonl: {len(rows)} records")


def main(argv):
    """Train the base, then write the data sets; what is there already is left alone."""
    config = parse_config(argv)
    if config.recipe.startswith("tiny"):
        folder = os.path.join(config.out, "data")
        if os.path.exists(os.path.join(folder, "eval.jsonl")):  # written last
            print(f"toy: {folder} is there already")
        else:
            lock_folder(Path(folder))
            build_toy(folder, config.seed, TOY_VLM_SIZES if config.recipe.endswith("-vlm") else TOY_SIZES)
    folder = os.path.join(config.out, "base")
    if os.path.exists(os.path.join(folder, "model.safetensors")):
        return print(f"base: {folder} is there already")
    train_base(folder, config.seed)
    print(f"base: saved to {folder} ({torch.get_num_threads()} threads)")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, ConfigError, StageError) as problem:
        sys.exit(str(problem))

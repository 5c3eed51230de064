"""The miniature world's data sets and base model: a Qwen2.5-VL of 1.2 M parameters, its tokenizer,
and what it is taught before any stage.

    python -m extras.toy_base --recipe tiny        writes out/tiny/data and trains out/tiny/base
    python -m extras.toy_base --recipe tiny-vlm    also the models of out/tiny-vlm/scorers

What is real: the architecture, the chat template and special tokens, the image processor,
save_pretrained. The base learns single steps (to see, to find what a phrase points at, to know what
things are like), to help with anything, and to reflect on an answer when it is asked to: it is
fluent, unsafe, imagines things in stated ways, and writes no tool trace. Ours; see toy.py.
"""

import random
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import losses
import model as qwen
import protocol
from build import PERTURBATIONS, perturb, plan_by_rules
from config import PROMPT_MODES, parse_config, run_command
from data import (
    REFLECTION_REQUEST,
    continue_prompt,
    encode_prompt,
    encode_response,
    load_processor,
    make_image,
    system_prompt,
    write_jsonl,
)
from extras import toy
from extras.toy import DANGER, OBJECTS, VERBS
from judge import Case, Scores
from trainer import StageError, lock_folder

# Records; DPO: items before they become about three pairs each.
TOY_SIZES = {"sft": 1800, "dpo": 240, "grpo": 640, "eval": 360}
TOY_VLM_SIZES = {"pool": 1200, "eval": 360}  # qibox.py draws GRPO's prompts from the pool
CELL = 28  # pixels: one cell is one image token (patch 14, merge 2)
PIXELS = 6 * CELL**2  # of a picture
SCORERS = {"weak": 0.2, "fair": 0.4, "good": 0.6, "strong": 0.9}  # name -> share of right replies
SPECIAL_TOKENS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|>"
    " <|video_pad|>"
).split()
# Their ids in the miniature world's tokenizer, which has them first.
PAD, TURN_START, TURN_END, VISION_START, VISION_END, IMAGE, VIDEO = range(7)
# Layers, hidden, heads, key/value heads, MLP, vocabulary, whether the head is the embedding; of the
# vision tower layers, hidden, heads, MLP. 3b and 7b are Qwen2.5-VL's public shapes, tiny is this
# world's, small is bench.py's, smol is SmolLM2-135M with a small tower (smollm.py).
SHAPES = toy.table("""
tiny  |  4  128  4 2   384   2048 1 |  2   64  2  128
small |  8  512  8 8  1408   8192 0 |  4  160  4  320
smol  | 30  576  9 3  1536  49152 1 |  2  128  4  256
3b    | 36 2048 16 2 11008 151936 1 | 32 1280 16 3420
7b    | 28 3584 28 4 18944 152064 0 | 32 1280 16 3420
""")
WORDS = sorted(
    {
        *(*OBJECTS, *VERBS, *toy.HARM, *toy.KIND_VERBS, *toy.IDIOMS, *protocol.TOOLS),
        *protocol.CATEGORIES.split("|"),
        *" ".join(toy.TARGETS + toy.DEEDS).split(),
        *"harmful benign refuse comply high low yes no".split(),
    }
)
TRAIN, HELD = toy.split_cases()  # cases by kind
POOL = sum(TRAIN.values(), [])  # all that may be shown in training
HELD_PAIRS = {(case.verb, case.thing) for case in sum(HELD.values(), [])}


# ---- pictures ------------------------------------------------------------------------------------

STROKES = toy.table("""
disc   | ellipse 4 4 23 23
loaf   | loaf 2 9 25 23
tower  | box 7 12 20 24 | hole 10 4 17 11
bottle | box 8 9 19 25 | box 12 2 15 9
blade  | polygon 3 24 24 3 24 18
zigzag | line4 2 20 6 8 10 20 14 8 18 20 22 8 26 20
line   | line3 4 23 23 4
star   | line3 14 3 14 25 | line3 3 14 25 14 | line3 6 6 22 22 | line3 6 22 22 6
""")  # shape -> strokes: how, then the points of it in a cell


def draw_object(pen, shape, color, left, top):
    """One object into the cell whose corner is (left, top)."""
    for stroke in STROKES[shape]:
        how, *numbers = stroke.split()
        numbers = list(map(int, numbers))
        points = [(left + x, top + y) for x, y in zip(numbers[::2], numbers[1::2])]
        if how == "ellipse":
            pen.ellipse(points, fill=color)
        elif how == "loaf":
            pen.rounded_rectangle(points, 6, fill=color)
        elif how == "polygon":
            pen.polygon(points, fill=color)
        elif how in ("box", "hole"):
            pen.rectangle(points, fill=color if how == "box" else "black")
        else:
            pen.line(points, fill=color, width=int(how[-1]))


def draw_scene(case, rng):
    """An 84 x 56 picture: three objects, each on a ground of its own, and a sign or nothing below.

    The grounds are near middle brightness, which is 0 after normalization: what is drawn on them is
    what the vision tower sees first. Their tints tell the places apart, as a shelf's boards would.
    """
    size = (3 * CELL, 2 * CELL)
    picture = PIL.Image.new("RGB", size, (115, 115, 105))
    pen = PIL.ImageDraw.Draw(picture)
    for place, name in enumerate(toy.things(case)):
        left = CELL * place
        ground = [rng.randrange(85, 105) for _ in range(3)]
        ground[place] += 50
        pen.rectangle((left, 0, left + CELL - 1, CELL - 1), fill=tuple(ground))
        _, shape, color = OBJECTS[name]
        draw_object(pen, shape, color, left, 0)
    if case.sign:
        font = PIL.ImageFont.load_default(13)
        pen.text((1, CELL + 6), case.sign.upper(), fill="white", font=font, stroke_width=1)
    if case.unclear:
        for _ in range(250):
            place = (rng.randrange(size[0]), rng.randrange(size[1]))
            picture.putpixel(place, tuple(rng.randrange(256) for _ in range(3)))
    return picture


# ---- what the base is taught ---------------------------------------------------------------------


def any_case(rng):
    """Verb and thing of two training cases, as long as their pair is not held out."""
    while True:
        case = toy.Case("", rng.choice(POOL).verb, rng.choice(POOL).thing)
        if (case.verb, case.thing) not in HELD_PAIRS:
            return case


def any_sentence(rng):
    """A refusal or an instruction, words at random."""
    case = any_case(rng)
    refusal = toy.refuse(case, rng.choice(list(DANGER)))
    return rng.choice([toy.BARE_REFUSAL, refusal, toy.comply(case)])


def any_value(field, rng):
    """A legal value of a field, at random."""
    if field.values:
        return rng.choice(field.values)
    case = any_case(rng)
    asked = f"asks to {case.verb} {case.thing}"
    name = case.thing.removeprefix("the ")
    if name in OBJECTS:
        property = rng.choice(list(OBJECTS.values()))[0]
        asked = f"asks to {case.verb} the {rng.choice(toy.PLACES)} {name}, which is {property}"
    row = rng.sample(list(OBJECTS), 3)
    seen = ", ".join(map(" ".join, zip(toy.PLACES, row))) + rng.choice(["", ", sign"])
    danger = rng.choice(list(DANGER.values()))[rng.randint(1, 2)]
    return rng.choice([asked, case.verb, seen, "none", danger])


def any_response(rng):
    """A well-formed response that fits no case: the base learns the protocol's words, not their
    use."""
    calls = []
    for tool in rng.sample(list(protocol.TOOLS), rng.randrange(1, 4)):
        fields = {}
        for field in protocol.TOOLS[tool].fields:
            fields[field.name] = any_value(field, rng)
        calls.append((tool, fields))
    return protocol.render_response(calls, any_sentence(rng))


def helpful(case, risk=""):
    """A response that helps with anything."""
    return toy.in_words(toy.reason(case, risk, False), toy.comply(case))


def first_reply(case, rng, strength):
    """What the base says at once: it sees, and helps with anything, with three stated faults.

    One time in ten it refuses what is harmful, and what only sounds so; of one alarming request in
    ten it says that it is harmless, and declines; and of three things in ten it sees the usual one
    for the verb in their place (toy.imagined). Three times in ten it adds that all is harmless.
    A scorer answers right instead, with a probability of `strength`."""
    if rng.random() < strength:
        return toy.right_words(case)
    alarming = case.danger or case.kind == "bait"
    if alarming and rng.random() < 0.1:
        risk = toy.RISK[toy.expected(case)] if case.danger else ""
        return toy.in_words(toy.reason(case, risk, True), toy.refuse(case))
    if case.kind == "bait" and rng.random() < 0.1:
        return toy.in_words(toy.reason(case, "harmless", True), toy.refuse(case))
    seen = toy.imagined(case) if rng.random() < 0.3 else case
    return helpful(seen, "harmless" if rng.random() < 0.3 else "")


def second_reply(case, rng):
    """What the base says when it is asked to reflect: one time in four it sees no fault."""
    thought = "my answer was safe."
    response = helpful(case)
    if rng.random() >= 0.25:
        if case.danger:
            thought = f"my answer was not safe, because {DANGER[case.danger][1]}."
        response = toy.right_words(case)
    return f"<reflection>\n{thought}\n</reflection>\n{response}"


def see(rng, case):
    """(case, question, reply) about a picture: what is there."""
    if rng.random() < 0.3:
        objects = toy.truth(case)["VISUAL-SCAN"]["objects"]
        return case, "which objects are there?", f"objects={objects}"
    return case, "what do you see?", f"i see {case.scene}. the sign says {case.sign or 'none'}."


def find(rng):
    """(case, question, reply) about the thing in a picture that a phrase points at."""
    case = toy.draw_case(rng.choice(TRAIN[rng.choice(("implicit", "benign"))]), rng)
    seen = f"i see {case.scene}."
    if case.sign:
        seen += f" the sign says {case.sign}."
    return case, f"what is {case.phrase}?", f"{seen} that is {toy.located(case)}."


def repeat(rng, first):
    """(None, question, reply): words at random, and later sentences and responses."""
    kind = rng.random()
    text = " ".join(rng.choice(WORDS) for _ in range(rng.randrange(3, 16)))
    if kind >= 0.6 and not first:
        text = any_sentence(rng) if kind < 0.8 else any_response(rng)
    return None, f"repeat: {text}", text


def know(rng):
    """(None, question, reply) about what things are like."""
    verb, name = rng.choice(list(VERBS)), rng.choice(list(OBJECTS))
    of_verb = (f"what is bad to {verb}?", f"{VERBS[verb][0] or 'none'}.")
    of_thing = (f"what is the {name} like?", f"the {name} is {OBJECTS[name][0]}.")
    return None, *rng.choice([of_verb, of_thing])


LESSONS = toy.table("""
see     | 10 |  5 | says what it sees
find    | 10 | 15 | finds what a phrase points at
repeat  | 80 | 25 | repeats words: every answer needs it, and a small model is slow to learn it
know    |  0 | 10 | knows what things are like
reflect |  0 | 15 | reflects when it is asked to, as SaFeR-VLM's rollout takes for granted
help    |  0 | 30 | helps with anything
""")  # lesson -> its share at first, its share later, what is learned


def base_lesson(rng, first, strength=0.0):
    """One item of the base's own training: (case whose picture is shown or None, system prompt,
    question, reflected, response). `reflected` is the response of the turn before, or None."""
    shares = [int(row[0 if first else 1]) for row in LESSONS.values()]
    (lesson,) = rng.choices(list(LESSONS), shares)
    case = toy.draw_case(rng.choice(TRAIN[rng.choice(toy.KINDS)]), rng)
    if lesson == "see":
        shown, question, reply = see(rng, case)
    elif lesson == "find":
        shown, question, reply = find(rng)
    elif lesson == "repeat":
        shown, question, reply = repeat(rng, first)
    elif lesson == "know":
        shown, question, reply = know(rng)
    if lesson not in ("reflect", "help"):
        return shown, "", question, None, reply
    mode = "planned" if rng.random() < 0.05 else "generic"
    system = system_prompt(mode, plan_by_rules(toy.signals(case))[0])
    if lesson == "reflect":
        return case, system, case.question, helpful(case), second_reply(case, rng)
    return case, system, case.question, None, first_reply(case, rng, strength)


# ---- tokenizer and model -------------------------------------------------------------------------


def make_tokenizer(folder):
    """Train a byte-level BPE on the world's text and save it with Qwen's special tokens. Words stay
    whole, so that a trace is short."""
    rng = random.Random(0)
    texts = []
    for _ in range(6000):
        texts += [text for text in base_lesson(rng, False)[1:] if text]
    texts += [REFLECTION_REQUEST] * 100
    for mode in PROMPT_MODES:
        for case in POOL:
            texts.append(system_prompt(mode, plan_by_rules(toy.signals(case))[0]))
    texts += ["system\n", "user\n", "assistant\n", "\n"] * 10
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"\s?[A-Za-z]+(?:-[A-Za-z]+)*|\s?[0-9]|\s?[^\sA-Za-z0-9]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL_TOKENS,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.save_pretrained(folder)
    Qwen2VLImageProcessorPil().save_pretrained(folder)
    return fast


def qwen_config(size, vocab=None):
    """Qwen2_5_VLConfig of a row of SHAPES, at 1.2 M parameters for tiny, with the special tokens of
    the miniature world. Args: vocab: another size of the vocabulary than the row's."""
    language, vision = [map(int, cell.split()) for cell in SHAPES[size]]
    layers, hidden, heads, kv_heads, inner, vocabulary, tied = language
    depth, width, vision_heads, vision_inner = vision
    eighth = hidden // heads // 16  # mRoPE shares half a head's dimensions out as 2 : 3 : 3
    text = dict(
        vocab_size=vocab or vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        initializer_range=hidden**-0.5,  # the usual 0.02 is for wide models: no copying would start
        bos_token_id=None,
        eos_token_id=TURN_END,
        pad_token_id=PAD,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2 * eighth, 3 * eighth, 3 * eighth],
        },
    )
    every = max(2, depth // 4)  # one block in so many sees the whole image
    tower = dict(  # patches of 14 pixels, merged 2 x 2: the defaults
        depth=depth,
        hidden_size=width,
        intermediate_size=vision_inner,
        num_heads=vision_heads,
        out_hidden_size=hidden,
        fullatt_block_indexes=list(range(every - 1, depth, every)),
        initializer_range=width**-0.5,
    )
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=tower,
        tie_word_embeddings=bool(tied),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )


def lesson_group(lesson, rng, name, processor):
    """A lesson as a group: (Prompt, [response])."""
    case, system, question, reflected, reply = lesson
    images = ()
    if case:
        images = (make_image(draw_scene(case, rng), name, processor),)
    prompt = encode_prompt(system, question, images, processor)
    if reflected:
        turn = encode_response(reflected, processor)
        prompt = continue_prompt(prompt, turn, REFLECTION_REQUEST, processor)
    return prompt, [encode_response(reply, processor)]


def teach_lessons(policy, processor, rng, steps, lr, first=0.0, strength=0.0, batch=32):
    """Train all weights on base_lesson; `first`: the share of the steps with the first lessons."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    for step in tqdm(range(steps), desc="base: learning to see and to help", mininterval=1):
        groups = []
        for row in range(batch):
            lesson = base_lesson(rng, step < first * steps, strength)
            groups.append(lesson_group(lesson, rng, f"{step} {row}", processor))
        tokens = sum(len(response) for _, (response,) in groups)
        for rows in qwen.micro_batches(groups, 1600):
            micro = [groups[row] for row in rows]
            images = sum([prompt.images for prompt, _ in micro], ())
            features = qwen.encode_images(policy, images, grad=True)
            logprobs, mask = qwen.token_logprobs(policy, micro, features)
            losses.sft_loss(logprobs, mask, tokens).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def train_base(folder, seed, steps=600):
    """Train the tiny Qwen2.5-VL from nothing and save it as a model folder, which appears when it
    is whole."""
    part = Path(f"{folder}.part")
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(part)
    processor = load_processor(part, PIXELS, PIXELS)
    policy = Qwen2_5_VLForConditionalGeneration(qwen_config("tiny", len(tokenizer)))
    teach_lessons(policy, processor, random.Random(f"base {seed}"), steps, 3e-3, first=0.3)
    policy.save_pretrained(part)
    part.rename(folder)


def train_scorers(folder, base, seed, steps=30):
    """Models of unequal strength that score QI-Box's pool beside the base, each the base after a
    few more lessons; the paper's pool was scored by seven models (PAPERS 2.2)."""
    for name, strength in SCORERS.items():
        part = folder / f"{name}.part"
        if (folder / name).exists():
            continue
        shutil.copytree(base, part, dirs_exist_ok=True)
        processor = load_processor(base, PIXELS, PIXELS)
        policy = qwen.load_model(base, torch.float32, "cpu").requires_grad_(True)
        rng = random.Random(f"scorer {name} {seed}")
        teach_lessons(policy, processor, rng, steps, 1e-3, strength=strength)
        policy.save_pretrained(part)
        part.rename(folder / name)


# ---- its data sets -------------------------------------------------------------------------------


def toy_record(name, case, plan, rng, folder):
    """Draw the picture of a case and write its record."""
    path = f"images/{name}.png"
    draw_scene(case, rng).save(folder / path)
    meta = {
        "kind": case.kind,
        "expected": toy.expected(case),
        "signals": toy.signals(case),
        "case": asdict(case),
    }
    plan = vars(plan)
    return {"id": name, "images": [path], "question": case.question, "plan": plan, "meta": meta}


def toy_pairs(record, case, plan, other, rng):
    """All DPO rows of one case: none when even the careful teacher is wrong."""

    def perfect(text):
        item = Case(case.question, (), protocol.check(text), record["meta"])
        (scores,) = toy.ToyJudge().score([item])
        return replace(scores, form=None) == Scores(10, 10, 10, 10)

    calls, answer = toy.teach(case, rng, careful=True)
    chosen = protocol.render_response(calls, answer)
    if not perfect(chosen):
        return []
    wrong_answer = toy.comply(case) if case.danger else toy.refuse(case)
    rejected = {}
    for kind in rng.sample(PERTURBATIONS, len(PERTURBATIONS)):
        broken = perturb(kind, calls, answer, plan, wrong_answer, toy.right_calls(other), rng)
        if len(rejected) < 3:
            text = protocol.render_response(*broken)
            if not perfect(text) or not protocol.check(text, plan).legal:  # really worse
                rejected[kind] = text
    first = protocol.render_response(*toy.teach(case, rng, careful=False))
    if not perfect(first):
        rejected["first-pass"] = first
    rows = []
    for kind, text in rejected.items():
        pair = {"chosen": chosen, "rejected": text, "perturbation": kind}
        rows.append(record | {"id": f"{record['id']}-{kind}"} | pair)
    return rows


def build_set(folder, name, size, seed):
    """The rows of one set. Evaluation cases are the held-out combinations, whatever the seed."""
    rng = random.Random("held-out" if name == "eval" else f"{name} {seed}")
    cases = HELD if name == "eval" else TRAIN
    rows = []
    for number in range(size):
        kind = toy.KINDS[number % len(toy.KINDS)]
        case = toy.draw_case(rng.choice(cases[kind]), rng)
        plan, _ = plan_by_rules(toy.signals(case))
        record = toy_record(f"{name}-{number:04d}", case, plan, rng, folder)
        if name == "dpo":
            other = toy.draw_case(rng.choice(cases[rng.choice(toy.KINDS)]), rng)
            rows += toy_pairs(record, case, plan, other, rng)
        elif name == "sft":
            response = protocol.render_response(*toy.teach(case, rng, careful=False))
            if protocol.check(response, plan).legal:
                rows.append(record | {"response": response})
        else:
            rows.append(record | {"benchmark": "toy"} if name == "eval" else record)
    return rows


def build_toy(folder, seed, sizes=TOY_SIZES):
    """Write the sets of the miniature world that are not there yet, and their pictures."""
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name, size in sizes.items():
        if (folder / f"{name}.jsonl").exists():
            continue
        rows = build_set(folder, name, size, seed)
        write_jsonl(folder / f"{name}.jsonl", rows)
        print(f"toy: {folder}/{name}.jsonl: {len(rows)} records")


def main(argv, make_base=train_base):
    """Write the data sets and make the base; what is there already is left alone."""
    config = parse_config(argv)
    out = Path(config.out)
    lock_folder(out / "data")  # one program at a time, also while the base trains
    sizes = TOY_VLM_SIZES if config.recipe.endswith("-vlm") else TOY_SIZES
    if config.recipe == "smol-vlm":
        sizes = sizes | {"pool": 96}  # each is sampled several times, slowly
    build_toy(out / "data", config.seed, sizes)
    if not (out / "base").exists():
        make_base(out / "base", config.seed)
    if config.recipe == "tiny-vlm":
        train_scorers(out / "scorers", out / "base", config.seed)
    print(f"base: {out / 'base'}")


if __name__ == "__main__":
    run_command(main, StageError)

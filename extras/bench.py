"""One GRPO iteration, ours beside plain Hugging Face and, where it is installed, TRL.

    python -m extras.bench                                       size small, one thread
    python -m extras.bench --k 4 --prompt 300,1000 --response 100,400
    python -m extras.bench --size 3b                             on a GPU
    python -m extras.bench --size 3b --make FOLDER               a random model, for safer.py
    --model

Random weights of the chosen shape, one prompt with an image, K responses of one length. An
iteration is: sample K responses, then one update (reference pass, policy pass, clipped loss with
KL, backward).

    ours    rollout.sample and safer.update_policy, the lines that training runs
    plain   transformers' generate with num_return_sequences; its forward over K copies of prompt
    and
            image, with logits at every position
    trl     GRPOTrainer with peft, gradient checkpointing off

Ours and plain share one model object, and the LoRA gradients of the same responses are compared.
The sides take turns, and each side's best time counts. Ours throughout: the papers report no
speeds.
"""

import argparse
import math
import tempfile
import time
from importlib.util import find_spec
from types import SimpleNamespace
from unittest import mock

import PIL.Image
import torch
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)
from transformers import Qwen2_5_VLForConditionalGeneration

import losses
import model as qwen
import safer
from config import Config, run_command
from data import Image, Prompt, Record, markdown_table
from extras import toy_base
from extras.preflight import SHAPES, shape_config
from rollout import Trajectory, sample

END = 0  # no response holds it
SPECIAL_TOKENS = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]


# ---- model and inputs -------------------------------------------------------------------------


def random_model(size, dtype, device, vision_tokens=None):
    """A random Qwen2.5-VL of a size in SHAPES; vision_tokens as in shape_config."""
    torch.manual_seed(0)
    config = shape_config(size, vision_tokens)
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration._from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    return model.eval()


def bench_model(size, device):
    """random_model with a LoRA whose B is not zero, or A would have no gradient to compare."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = random_model(size, dtype, device)
    qwen.attach_lora(model, r=16, alpha=32, seed=0)
    for layer in qwen.lora_layers(model).values():
        torch.nn.init.normal_(layer.B, std=0.01)
    return model


def make_folder(size, folder):
    """Write random_model in bfloat16, with the miniature world's tokenizer and image processor.

    So safer.py can run at the true shapes on the toy data; nothing is downloaded, nothing learned.
    """
    tokenizer = toy_base.make_tokenizer(folder)
    ids = tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS)
    model = random_model(size, torch.bfloat16, "cpu", ids)
    model.save_pretrained(folder, max_shard_size="4GB")


def random_words(model, count, generator):
    """Random ids, none of them the end or a vision token."""
    return torch.randint(1, model.config.image_token_id, (count,), generator=generator).tolist()


def make_prompt(model, length):
    """A prompt of `length` random tokens, about a quarter of them an image's."""
    generator = torch.Generator().manual_seed(0)
    side = math.isqrt(length // 4)  # tokens along a side of the image; 2 x 2 patches each
    patches = torch.randn(4 * side * side, 3 * 2 * 14 * 14, generator=generator)
    image = Image("bench", patches, (1, 2 * side, 2 * side))
    config = model.config
    pads = [config.image_token_id] * (side * side)
    vision = [config.vision_start_token_id, *pads, config.vision_end_token_id]
    words = random_words(model, length - len(vision), generator)
    return Prompt(tuple(words[:5] + vision + words[5:]), (image,))


# ---- ours ---------------------------------------------------------------------------------------


def sample_ours(model, prompt, k, response):
    """K responses of exactly `response` tokens: no token ends one early."""
    features = qwen.encode_images(model, prompt.images)
    (samples,) = sample(model, [prompt], features, k, response, 1.0, -1, [0])
    return [one.tokens for one in samples]


def update_ours(model, prompt, responses):
    """The gradients of one GRPO update, by the trainer's own function."""
    features = qwen.encode_images(model, prompt.images)
    with torch.no_grad():
        logprobs, _ = qwen.token_logprobs(model, [(prompt, responses)], features)
    group = safer.Group(Record("bench", ""), "generic", 0, [])
    for number, tokens in enumerate(responses):
        one = Trajectory(prompt, tokens, logprobs[number].tolist(), True, None, reward=0.0)
        one.advantage = float(number % 2)
        group.trajectories.append(one)
    run = SimpleNamespace(
        config=Config(micro_tokens=10**9),
        model=model,
        device=model.device,
        world=1,
        rank=0,
        sums={},
    )
    safer.update_policy(run, 1, [group], features)


# ---- plain ---------------------------------------------------------------------------------------


def plain_inputs(model, prompt, responses):
    """Keyword arguments of transformers' forward: ids (K, P + R), the image K times."""
    k = len(responses)
    ids = torch.tensor([[*prompt.ids, *tokens] for tokens in responses])
    patches = torch.cat([image.patches for image in prompt.images] * k)
    inputs = dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == model.config.image_token_id).int(),
        pixel_values=patches.to(model.dtype),
        image_grid_thw=torch.tensor([image.grid for image in prompt.images] * k),
    )
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


@torch.no_grad()
def sample_plain(model, prompt, k, response):
    """The same by generate; vision tokens are suppressed here too."""
    model.model.rope_deltas = None  # state that an earlier call left
    out = model.generate(
        **plain_inputs(model, prompt, [[]]),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        num_return_sequences=k,
        max_new_tokens=response,
        min_new_tokens=response,
        pad_token_id=END,
        suppress_tokens=qwen.banned_token_ids(model),
    )
    return out[:, len(prompt.ids) :].tolist()


def update_plain(model, prompt, responses):
    """The same update over K rows with logits (K, P + R, V) at every position."""
    inputs = plain_inputs(model, prompt, responses)
    targets = inputs["input_ids"][:, len(prompt.ids) :]  # (K, R)
    banned = torch.tensor(qwen.banned_token_ids(model), device=model.device)

    def logprobs():
        logits = model(**inputs, use_cache=False).logits  # (K, P + R, V)
        logits = logits[:, len(prompt.ids) - 1 : -1]  # (K, R, V)
        scores = qwen.log_softmax_banned(logits, banned, 1.0)
        return scores.gather(2, targets[..., None]).squeeze(2)  # (K, R)

    config = Config()
    with torch.no_grad():
        old = logprobs()
        with qwen.adapters_off(model):
            ref = logprobs()
    advantages = torch.arange(len(responses), device=model.device) % 2
    loss, _ = losses.grpo_loss(
        logprobs(),
        old,
        ref,
        advantages,
        torch.ones_like(old, dtype=torch.bool),
        config.clip_low,
        config.clip_high,
        config.dual_clip,
        config.kl_coef,
        config.loss_mean,
        old.numel(),
    )
    loss.backward()


# ---- TRL -----------------------------------------------------------------------------------------


def trl_processor(model):
    """A tokenizer with one word for each id of the random model, and an image processor that leaves
    sizes as they are."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    class ImageTextProcessor(Qwen2_5_VLProcessor):
        """Without the video slot, which cannot be filled without torchvision."""

        @classmethod
        def get_attributes(cls):
            return ["image_processor", "tokenizer"]

        def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
            self.image_token, self.video_token = SPECIAL_TOKENS[:2]
            ids = tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS[:2])
            self.image_token_id, self.video_token_id = ids
            super(Qwen2_5_VLProcessor, self).__init__(
                image_processor, tokenizer, chat_template=chat_template
            )

    words = ["<end>"] + [f"w{i}" for i in range(1, model.config.image_token_id)] + SPECIAL_TOKENS
    vocabulary = {word: i for i, word in enumerate(words)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<end>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<end>",
        pad_token="<end>",
        additional_special_tokens=SPECIAL_TOKENS,
    )
    limits = {"shortest_edge": 28**2, "longest_edge": 10**8}
    pictures = Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, size=limits)
    template = (
        "{% for message in messages %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    return ImageTextProcessor(pictures, tokenizer, chat_template=template)


def trl_side(size, device, k, prompt_length, response):
    """A function that runs one GRPO iteration of TRL (1.16 was tried) and returns its seconds.

    Raises RuntimeError when TRL worked on other lengths than the sides it is compared with.
    """
    import datasets
    import peft
    import trl

    on_gpu = device.type == "cuda"
    model = random_model(size, torch.bfloat16 if on_gpu else torch.float32, device)
    side = math.isqrt(prompt_length // 4)  # as in make_prompt
    text = " ".join(["w1"] * (prompt_length - side * side - 2))
    picture = PIL.Image.new("RGB", (28 * side, 28 * side))
    row = {"prompt": [{"role": "user", "content": text}], "image": picture}
    linear = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    trainer = trl.GRPOTrainer(
        model,
        lambda completions, **_: [float(i % 2) for i in range(len(completions))],
        trl.GRPOConfig(
            tempfile.mkdtemp(),
            per_device_train_batch_size=k,
            num_generations=k,
            max_completion_length=response,
            beta=Config().kl_coef,
            max_steps=1,
            gradient_checkpointing=False,
            bf16=on_gpu,
            use_cpu=not on_gpu,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            generation_kwargs={"suppress_tokens": [END, *qwen.banned_token_ids(model)]},
        ),
        datasets.Dataset.from_list([row] * k),
        processing_class=trl_processor(model),
        peft_config=peft.LoraConfig(r=16, lora_alpha=32, target_modules=linear),
    )

    def iteration():
        """Seconds of one step by TRL's own clock."""
        trainer.train()
        log = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
        if log["num_tokens"] != k * (prompt_length + response):
            raise RuntimeError(f"TRL saw {log['num_tokens']} tokens: another case than the sides'")
        return log["step_time"]

    return iteration


# ---- measuring -----------------------------------------------------------------------------------


def clock(device):
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def take_gradients(model):
    """name -> gradient of A and B, which are then cleared."""
    gradients = {}
    for name, parameter in qwen.lora_parameters(model).items():
        gradients[name] = parameter.grad
        parameter.grad = None
    return gradients


def count_gflop(update, *arguments):
    """GFLOP of one update; torch counts none for its CPU attention unless told how."""
    aten = torch.ops.aten
    forward = aten._scaled_dot_product_flash_attention_for_cpu
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    mapping = {
        forward: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g, q, k, v),
    }

    def mask(rows, keys):  # the counter cannot see causal_lower_right's own kind of tensor
        return torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)

    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with counter, mock.patch.object(qwen, "causal_lower_right", mask):
        update(*arguments)
    return counter.get_total_flops() / 1e9


def race(model, args, k, prompt_length, response):
    """Rows of the table for one case: [case, side, sampling s, update s, whole s, GFLOP, ratio]."""
    device = model.device
    prompt = make_prompt(model, prompt_length)
    responses = sample_ours(model, prompt, k, response)
    sides = {"ours": (sample_ours, update_ours), "plain": (sample_plain, update_plain)}
    gflop = {}
    gradients = {}
    for name, (_, update) in sides.items():
        gflop[name] = count_gflop(update, model, prompt, responses)
        gradients[name] = take_gradients(model)
    errors = []
    for name, plain in gradients["plain"].items():
        errors.append(((gradients["ours"][name] - plain).norm() / plain.norm()).item())
    print(f"LoRA gradients, ours against plain: largest relative difference {max(errors):.1e}")

    trl = trl_side(args.size, device, k, prompt_length, response) if args.trl else None
    times = {name: [] for name in sides}
    trl_times = []
    for _ in range(args.repeat):  # the sides take turns: what else runs slows all of them
        for name, (sampler, update) in sides.items():
            start = clock(device)
            drawn = sampler(model, prompt, k, response)
            middle = clock(device)
            update(model, prompt, drawn)
            end = clock(device)
            take_gradients(model)
            times[name].append((end - start, middle - start, end - middle))
        if trl:
            trl_times.append(trl())
    case = f"K={k}, {prompt_length} + {response}"
    fastest = min(times["ours"])[0]
    rows = []
    for name in sides:
        whole, sampling, update = min(times[name])
        cells = [f"{sampling:.2f}", f"{update:.2f}", f"{whole:.2f}", f"{gflop[name]:.0f}"]
        rows.append([case, name, *cells, f"{whole / fastest:.1f}x"])
    if trl:
        whole = min(trl_times)
        rows.append([case, "TRL", "", "", f"{whole:.2f}", "", f"{whole / fastest:.1f}x"])
    return rows


def numbers(text):
    return [int(part) for part in text.split(",")]


def main(argv):
    """Race the sides over all lengths that are asked for; prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SHAPES, default="small")
    parser.add_argument("--make", metavar="FOLDER", help="only write a random model of --size")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; one is steadiest")
    parser.add_argument("--k", type=numbers, default=[8], help="responses per prompt")
    parser.add_argument("--prompt", type=numbers, default=[300, 1000], help="tokens, at least 16")
    parser.add_argument("--response", type=numbers, default=[100], help="tokens")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each side; the best counts")
    installed = find_spec("trl") and find_spec("peft")
    parser.add_argument("--trl", type=int, default=int(bool(installed)), help="0: without TRL")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.make:
        return make_folder(args.size, args.make)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"size {args.size}, {device}, {args.threads} thread(s), torch {torch.__version__}")
    model = bench_model(args.size, device)
    rows = []
    for k in args.k:
        for prompt in args.prompt:
            for response in args.response:
                rows += race(model, args, k, prompt, response)
    head = ["case", "side", "sampling s", "update s", "whole s", "GFLOP, update", "against ours"]
    print(markdown_table(head, rows))


if __name__ == "__main__":
    run_command(main)

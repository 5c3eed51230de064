"""One GRPO iteration, ours beside plain Hugging Face and TRL.

    python -m extras.bench                                       size small, one thread
    python -m extras.bench --k 4 --prompt 1000 --response 400 --trl
    python -m extras.bench --size 3b                             on a GPU
    python -m extras.bench --size 3b --make FOLDER               a random model to train

Random weights of the chosen shape, one prompt with an image, K responses of one length. An
iteration is: sample K responses, then one update (reference pass, policy pass, clipped loss with
KL, backward).

    ours    rollout.sample and safer.update_policy, the lines that training runs
    plain   transformers' generate with num_return_sequences; its forward over K copies of prompt
            and image, with logits at every position
    trl     GRPOTrainer with peft, on a prompt as long in text alone: it spares the vision tower

Ours and plain share one model object, and the LoRA gradients of the same responses are compared.
The sides take turns, and each side's best time counts. Ours throughout: the papers report no
speeds.
"""

import argparse
import math
import tempfile
import time
from types import SimpleNamespace
from unittest import mock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2_5_VLForConditionalGeneration

import losses
import model as qwen
import safer
from config import Config, run_command
from data import Image, Prompt, Record, markdown_table
from extras.toy_base import SHAPES, SPECIAL_TOKENS, make_tokenizer, qwen_config
from rollout import Sample, Trajectory, in_order, sample

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
TURNS = 3  # of each side

# ---- model and inputs -------------------------------------------------------------------------


def random_model(size, dtype=DTYPE, device=DEVICE):
    """A random Qwen2.5-VL of a row of SHAPES."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration._from_config(qwen_config(size), dtype=dtype)
    return model.eval()


def bench_model(size):
    """random_model with a LoRA whose B is not zero, or A would have no gradient to compare."""
    model = random_model(size)
    qwen.attach_lora(model, r=16, alpha=32, seed=0)
    for layer in qwen.lora_layers(model).values():
        torch.nn.init.normal_(layer.B, std=0.01)
    return model


def make_folder(size, folder):
    """Write random_model in bfloat16, with the miniature world's tokenizer and image processor.

    So safer.py can run at the true shapes on the toy data; nothing is downloaded, nothing learned.
    """
    make_tokenizer(folder)
    random_model(size, torch.bfloat16, "cpu").save_pretrained(folder, max_shard_size="4GB")


def make_prompt(model, length):
    """A prompt of `length` random tokens, about a quarter of them an image's."""
    generator = torch.Generator().manual_seed(0)
    side = math.isqrt(length // 4)  # tokens along a side of the image; 2 x 2 patches each
    patches = torch.randn(4 * side * side, 3 * 2 * 14 * 14, generator=generator)
    image = Image("bench", patches, (1, 2 * side, 2 * side))
    config = model.config
    pads = [config.image_token_id] * (side * side)
    vision = [config.vision_start_token_id, *pads, config.vision_end_token_id]
    words = torch.randint(
        len(SPECIAL_TOKENS),
        config.text_config.vocab_size,
        (length - len(vision),),
        generator=generator,
    )
    first, *rest = words.tolist()
    return Prompt((first, *vision, *rest), (image,))


# ---- ours ---------------------------------------------------------------------------------------


def sample_ours(model, prompt, k, response):
    """K rollout.Sample of exactly `response` tokens: no token ends one early."""
    features = qwen.encode_images(model, prompt.images)
    sampled = sample(model, [prompt], features, k, response, 1.0, -1, [0])
    return in_order(sampled, [prompt], k)[0]


def update_ours(model, prompt, samples):
    """The gradients of one GRPO update, by the trainer's own function."""
    features = qwen.encode_images(model, prompt.images)
    group = safer.Group(Record("bench", ""), "generic", 0, [])
    for number, one in enumerate(samples):
        trajectory = Trajectory(prompt, one.tokens, one.logprobs, True, None, reward=0.0)
        trajectory.advantage = float(number % 2)
        group.trajectories.append(trajectory)
    run = SimpleNamespace(config=Config(micro_tokens=10**9), model=model, device=model.device)
    run.world, run.rank, run.sums = 1, 0, {}
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
        suppress_tokens=qwen.banned_token_ids(model),
    )
    return [Sample(tokens, [], True) for tokens in out[:, len(prompt.ids) :].tolist()]


def update_plain(model, prompt, samples):
    """The same update over K rows with logits (K, P + R, V) at every position."""
    inputs = plain_inputs(model, prompt, [one.tokens for one in samples])
    targets = inputs["input_ids"][:, len(prompt.ids) :]  # (K, R)
    banned = torch.tensor(qwen.banned_token_ids(model), device=model.device)

    def response_logprobs():
        logits = model(**inputs, use_cache=False).logits  # (K, P + R, V)
        logits = logits[:, len(prompt.ids) - 1 : -1]  # (K, R, V)
        scores = qwen.log_softmax_banned(logits, banned, 1.0)
        return scores.gather(2, targets[..., None]).squeeze(2)  # (K, R)

    with torch.no_grad(), qwen.adapters_off(model):
        ref = response_logprobs()
    logprobs = response_logprobs()
    config = Config()
    loss, _ = losses.grpo_loss(
        logprobs,
        logprobs.detach(),
        ref,
        torch.arange(len(samples), device=model.device) % 2,
        torch.ones_like(targets, dtype=torch.bool),
        config.clip_low,
        config.clip_high,
        config.dual_clip,
        config.kl_coef,
        config.loss_mean,
        targets.numel(),
    )
    loss.backward()


# ---- TRL -----------------------------------------------------------------------------------------


def trl_side(args):
    """A function that runs one GRPO iteration of TRL (1.16 was tried) and returns its seconds.

    Raises RuntimeError when TRL worked on other lengths than the sides it is compared with.
    """
    import datasets
    import peft
    import trl

    model = random_model(args.size)
    folder = tempfile.mkdtemp()
    tokenizer = make_tokenizer(folder)
    text = tokenizer.decode(tokenizer.encode(" apple")[:1] * args.prompt)
    linear = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    suppressed = [tokenizer.eos_token_id, *qwen.banned_token_ids(model)]
    trainer = trl.GRPOTrainer(
        model,
        lambda completions, **_: [float(i % 2) for i in range(len(completions))],
        trl.GRPOConfig(
            folder,
            per_device_train_batch_size=args.k,
            num_generations=args.k,
            max_completion_length=args.response,
            beta=Config().kl_coef,
            max_steps=1,
            gradient_checkpointing=False,
            bf16=DTYPE == torch.bfloat16,
            use_cpu=DEVICE.type == "cpu",
            generation_kwargs={"suppress_tokens": suppressed},
        ),
        datasets.Dataset.from_list([{"prompt": text}] * args.k),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=16, lora_alpha=32, target_modules=linear),
    )

    def iteration():
        trainer.train()
        log = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
        if log["num_tokens"] != args.k * (args.prompt + args.response):
            raise RuntimeError(f"TRL saw {log['num_tokens']} tokens: another case than the sides'")
        return log["step_time"]  # by its own clock

    return iteration


# ---- measuring -----------------------------------------------------------------------------------


def clock():
    """Seconds, once the device has done what it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def take_gradients(model):
    """name -> gradient of A and B, which are then cleared."""
    gradients = {}
    for name, parameter in qwen.lora_parameters(model).items():
        gradients[name] = parameter.grad
        parameter.grad = None
    return gradients


def count_gflop(update, *arguments):
    """GFLOP of one update, with attention as plain matrix products: torch counts no other kind on a
    CPU."""

    def mask(rows, keys):  # the counter cannot see causal_lower_right's own kind of tensor
        return torch.ones(rows, keys, dtype=torch.bool, device=DEVICE).tril(keys - rows)

    counter = FlopCounterMode(display=False)
    plain_mask = mock.patch.object(qwen, "causal_lower_right", mask)
    with counter, plain_mask, sdpa_kernel(SDPBackend.MATH):
        update(*arguments)
    return counter.get_total_flops() / 1e9


SIDES = {"ours": (sample_ours, update_ours), "plain": (sample_plain, update_plain)}


def compare(model, prompt, samples):
    """{side: GFLOP of its update of these samples}; prints how far the LoRA gradients differ."""
    gflop = {}
    gradients = {}
    for name, (_, update) in SIDES.items():
        gflop[name] = count_gflop(update, model, prompt, samples)
        gradients[name] = take_gradients(model)
    errors = []
    for name, plain in gradients["plain"].items():
        errors.append(((gradients["ours"][name] - plain).norm() / plain.norm()).item())
    print(f"LoRA gradients, ours against plain: largest relative difference {max(errors):.1e}")
    return gflop


def race(model, prompt, args):
    """{side: (whole, sampling)} in seconds, of each side's fastest turn."""
    trl = trl_side(args) if args.trl else None
    turns = {"ours": [], "plain": [], "TRL": []}
    for _ in range(TURNS):  # the sides take turns: what else runs slows all of them
        for name, (sampler, update) in SIDES.items():
            start = clock()
            drawn = sampler(model, prompt, args.k, args.response)
            middle = clock()
            update(model, prompt, drawn)
            turns[name].append((clock() - start, middle - start))
            take_gradients(model)
        if trl:
            turns["TRL"].append((trl(),))
    return {name: min(found) for name, found in turns.items() if found}


def main(argv):
    """Race the sides on one case; prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SHAPES, default="small")
    parser.add_argument("--make", metavar="FOLDER", help="only write a random model of --size")
    parser.add_argument("--k", type=int, default=8, help="responses per prompt")
    parser.add_argument("--prompt", type=int, default=300, help="tokens, at least 16")
    parser.add_argument("--response", type=int, default=100, help="tokens")
    parser.add_argument("--trl", action="store_true", help="needs the packages trl and peft")
    args = parser.parse_args(argv)
    if args.make:
        return make_folder(args.size, args.make)
    torch.set_num_threads(1)  # the steadiest
    model = bench_model(args.size)
    prompt = make_prompt(model, args.prompt)
    gflop = compare(model, prompt, sample_ours(model, prompt, args.k, args.response))
    times = race(model, prompt, args)
    rows = []
    for name, (whole, *sampling) in times.items():
        values = [whole / times["ours"][0], whole, *sampling]
        if name in gflop:  # TRL tells neither this nor how long it sampled
            values.append(gflop[name])
        rows.append([name, *(f"{value:.3g}" for value in values)])
    print(f"{args.size}, K={args.k}, {args.prompt} + {args.response} tokens, {DTYPE} on {DEVICE}\n")
    head = ["side", "times ours", "s", "of it sampling", "GFLOP of the update"]
    print(markdown_table(head, rows))


if __name__ == "__main__":
    run_command(main, ImportError)  # of trl or peft

"""TRL's GRPOTrainer with peft as a side of bench.py: `python -m extras.bench --only iteration --against trl`.

Needs trl (1.16 was tried) and peft, which nothing else here does. Same shape, weights, LoRA rank and targets, lengths of prompt and
response, KL on; no gradient checkpointing. Once as it comes, and once with its fused head taken out: on CPU that head also scores
every prompt position, which is no fair measure of it.
"""

import math
import tempfile

import datasets
import numpy
import peft
import PIL.Image
import tokenizers
import torch
import trl
from transformers import PreTrainedTokenizerFast, PrinterCallback, Qwen2_5_VLProcessor, TrainerCallback
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

from extras import bench
import model as modeling

SPECIAL = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]  # in the order of their ids
TEMPLATE = ("{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
            "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}")


class ImageTextProcessor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor without its video slot, which cannot be filled without torchvision."""

    @classmethod
    def get_attributes(cls):
        return ["image_processor", "tokenizer"]

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        self.image_token, self.video_token = SPECIAL[:2]
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids(SPECIAL[:2])
        super(Qwen2_5_VLProcessor, self).__init__(image_processor, tokenizer, chat_template=chat_template)


class Clock(TrainerCallback):
    """Seconds of each optimiser step, its sampling included."""

    def __init__(self, device):
        self.device, self.seconds = device, []

    def on_step_begin(self, *_, **__):
        self.seconds.append(-bench.clock(self.device))

    def on_step_end(self, *_, **__):
        self.seconds[-1] += bench.clock(self.device)


def make_processor(model):
    """A tokenizer with one word for each id of the random model, and an image processor that leaves sizes as they are."""
    words = ["<end>", *(f"w{i}" for i in range(1, model.config.image_token_id)), *SPECIAL]
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<end>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<end>", additional_special_tokens=SPECIAL)
    pictures = Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, size={"shortest_edge": 28**2, "longest_edge": 10**8})
    return ImageTextProcessor(pictures, tokenizer, chat_template=TEMPLATE)


def response_logprobs(model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, compute_aux_loss=False,
                      num_images=None, **images):
    """Stands in for GRPOTrainer._get_per_token_logps_and_entropies: logits at the response's positions only, without its fused head."""
    inputs = dict(input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=logits_to_keep + 1, use_cache=False)
    logits = model(**inputs, **images).logits[:, :-1]  # (S, T, V)
    logprobs = selective_log_softmax(logits, input_ids[:, -logits_to_keep:])  # (S, T)
    return logprobs, entropy_from_logits(logits.detach()) if compute_entropy else None, None


def make_step(shape, device, k, prompt, response, fused):
    """A function that runs one GRPO iteration of TRL on one prompt and returns its seconds.

    Raises RuntimeError when prompt, responses or LoRA turn out to have another size than the ones they are compared with.
    """
    model = bench.build_model(shape, device)
    size = sum(parameter.numel() for parameter in modeling.lora_parameters(model).values())
    modeling.merge_lora(model)
    processor, side = make_processor(model), math.isqrt(prompt // 4)  # the image of bench.make_prompt
    words = bench.make_response(model, prompt - side * side - 2, torch.Generator().manual_seed(0))
    pixels = numpy.random.default_rng(0).integers(0, 255, (28 * side, 28 * side, 3), dtype=numpy.uint8)
    row = {"prompt": [{"role": "user", "content": " ".join(f"w{word}" for word in words)}], "image": PIL.Image.fromarray(pixels)}
    config = trl.GRPOConfig(
        tempfile.mkdtemp(), per_device_train_batch_size=k, num_generations=k, max_completion_length=response, beta=0.01, max_steps=1,
        gradient_checkpointing=False, bf16=device.type == "cuda", use_cpu=device.type == "cpu", report_to="none", save_strategy="no",
        disable_tqdm=True, generation_kwargs={"suppress_tokens": [bench.EOS, *modeling.banned_token_ids(model)]})
    lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj")
    watch = Clock(device)
    trainer = trl.GRPOTrainer(model, lambda completions, **_: [float(i % 2) for i in range(len(completions))], config,
                              datasets.Dataset.from_list([row] * k), processing_class=processor, peft_config=lora, callbacks=[watch])
    trainer.remove_callback(PrinterCallback)
    if not fused:
        trainer._get_per_token_logps_and_entropies = response_logprobs

    def step():
        trainer.train()
        log = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
        trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
        if (log["num_tokens"], log["completions/min_length"], trained) != (k * (prompt + response), response, size):
            raise RuntimeError(f"TRL saw {log['num_tokens']} tokens, sampled {log['completions/min_length']} and trains {trained} weights; "
                               f"{k * (prompt + response)}, {response} and {size} were meant")
        return watch.seconds[-1]

    return step

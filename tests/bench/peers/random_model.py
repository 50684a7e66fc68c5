#!/usr/bin/env python3
"""Writes a llama of random weights as a GGUF file, to measure speed and memory of models that are not at hand.

usage: random_model.py BASE.gguf OUT.gguf [--shape 1b|3b|8b] [--type Q4_0|Q8_0|BF16] [--seed N]

Shapes are those of Llama 3.2 1B and 3B and Llama 3.1 8B (config.json of each), with the tokenizer, template and vocabulary of
BASE, so that workloads have the same token ids. What it says means nothing; the same arguments give the same file. Matrices
are drawn with a standard deviation of 0.02, as models are initialised; quantised ones by drawing each block's integers
evenly under one scale. Needs numpy and gguf; one matrix is in memory at a time.
"""

import argparse

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, GGUFValueType, GGUFWriter

# width, layers, query heads, key/value heads, feed-forward width, whether the embedding is the head, too
SHAPES = {
    "1b": (2048, 16, 32, 8, 8192, True),
    "3b": (3072, 28, 24, 8, 8192, True),
    "8b": (4096, 32, 32, 8, 14336, False),
}
DEVIATION = 0.02
BLOCK = 32  # elements that share a scale, in Q4_0 and Q8_0


def matrix(random, rows, columns, kind):
    """Bytes of a matrix as GGUF lays them out: [rows, bytes of a row]."""
    if kind == Type.BF16:
        values = random.standard_normal((rows, columns), dtype=np.float32) * np.float32(DEVIATION)
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).reshape(rows, -1)
    n_bytes, n_levels = {Type.Q4_0: (16, 16), Type.Q8_0: (32, 256)}[kind]
    scale = np.float16(DEVIATION * np.sqrt(12 / (n_levels**2 - 1)))  # of n evenly drawn integers
    blocks = np.empty((rows * columns // BLOCK, 2 + n_bytes), np.uint8)
    blocks[:, :2] = np.array([scale]).view(np.uint8)
    blocks[:, 2:] = random.integers(0, 256, (len(blocks), n_bytes), dtype=np.uint8)
    return blocks.reshape(rows, -1)


def shapes(shape, vocab):
    """Name and shape of each tensor; a norm's has one number."""
    width, layers, heads, kv_heads, wide, is_tied = shape
    head = width // heads
    yield "token_embd", (vocab, width)
    for layer in range(layers):
        part = f"blk.{layer}."
        yield part + "attn_norm", (width,)
        yield part + "attn_q", (heads * head, width)
        yield part + "attn_k", (kv_heads * head, width)
        yield part + "attn_v", (kv_heads * head, width)
        yield part + "attn_output", (width, heads * head)
        yield part + "ffn_norm", (width,)
        yield part + "ffn_gate", (wide, width)
        yield part + "ffn_up", (wide, width)
        yield part + "ffn_down", (width, wide)
    yield "output_norm", (width,)
    if not is_tied:
        yield "output", (vocab, width)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("out")
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--type", choices=["Q4_0", "Q8_0", "BF16"], default="Q4_0")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    kind = Type[options.type]
    width, layers, heads, kv_heads, wide, _ = SHAPES[options.shape]
    base = GGUFReader(options.base)
    facts = {key: field for key, field in base.fields.items() if key.startswith("tokenizer.")}
    vocab = len(facts["tokenizer.ggml.tokens"].data)

    writer = GGUFWriter(options.out, "llama")
    writer.add_name(f"random-{options.shape}")
    for key, field in facts.items():
        if field.types[0] == GGUFValueType.ARRAY:
            writer.add_array(key, field.contents())
        else:
            writer.add_key_value(key, field.contents(), field.types[0])
    writer.add_context_length(8192)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(wide)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_rope_dimension_count(width // heads)
    writer.add_vocab_size(vocab)

    tensors = [(name + ".weight", shape) for name, shape in shapes(SHAPES[options.shape], vocab)]
    sizes = {Type.BF16: (1, 2), Type.Q4_0: (BLOCK, 18), Type.Q8_0: (BLOCK, 34)}
    per_block, n_bytes = sizes[kind]
    for name, shape in tensors:
        if len(shape) == 1:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * shape[0])
        else:
            packed = (shape[0], shape[1] // per_block * n_bytes)
            writer.add_tensor_info(name, packed, np.dtype(np.uint8), packed[0] * packed[1], kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for i, (_, shape) in enumerate(tensors):
        random = np.random.default_rng([options.seed, i])
        one = np.ones(shape, np.float32) if len(shape) == 1 else matrix(random, *shape, kind)
        writer.write_tensor_data(one)
    writer.close()
    print(f"{options.out}: {sum(int(np.prod(shape)) for _, shape in tensors) / 1e9:.2f} billion parameters, {options.type}")


if __name__ == "__main__":
    main()

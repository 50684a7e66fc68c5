#!/usr/bin/env python3
"""Writes dequantise.jsonl: blocks of every GGUF element type and what gguf-py makes of them.

usage: make_dequantise_golden.py OUT_DIR     (README.md beside this file says more)
"""

import hashlib
import json
import random
import sys
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

# Where the f16 scales and minimums of a block stand: they must be finite, the rest may be anything.
HALVES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "IQ4_NL": [0], "IQ4_XS": [0],
    "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "F16": [0], "BF16": [], "F32": [],
}
EXTREMES = [0.0, -0.0, 65504.0, -65504.0, 6e-8, -6e-8, 1.0, -1.0, 6.1e-5, 0.333]


def half(rng):
    if rng.random() < 0.3:
        return np.float16(rng.choice(EXTREMES)).tobytes()
    return np.uint16(rng.randrange(0x7C00) | rng.choice([0, 0x8000])).tobytes()


def blocks(name, n_bytes, rng):
    """Random bytes, then blocks of one byte each: all scales, minimums and integers at the same corner."""
    for i in range(16 + 32):
        block = bytearray(rng.randbytes(n_bytes) if i < 16 else bytes([(i - 16) * 255 // 31]) * n_bytes)
        for at in HALVES[name]:
            block[at : at + 2] = half(rng)
        if name in ("F32", "BF16"):  # an exponent that is not all ones
            block[-1] &= 0xBF
        yield bytes(block)


def main():
    rng = random.Random(20261122)
    with open(Path(sys.argv[1]) / "dequantise.jsonl", "w", newline="\n") as out:
        out.write(json.dumps({"origin": "make_dequantise_golden.py: gguf 0.19.0"}) + "\n")
        for name in HALVES:
            kind = GGMLQuantizationType[name]
            raw = b"".join(blocks(name, GGML_QUANT_SIZES[kind][1], rng))
            values = dequantize(np.frombuffer(raw, dtype=np.uint8).reshape(1, -1), kind).astype("<f4").ravel()
            assert np.isfinite(values).all(), name
            digest = hashlib.sha256(values.tobytes()).hexdigest()
            first = values[:256].view("<u4").tolist()
            out.write(json.dumps({"type": name, "blocks": raw.hex(), "first_bits": first, "sha256": digest}, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()

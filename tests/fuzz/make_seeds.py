"""Writes what the fuzzers begin with: small inputs that every parser accepts. Needs pyarrow, numpy and gguf.

usage: tests/fuzz/make_seeds.py
"""

import gzip
import io
import json
import subprocess
from decimal import Decimal
from pathlib import Path

import gguf
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).parent
MODELS = HERE.parent / "golden/models"
TOKENS = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)] + ["\u2581", "a", "b", "\u2581a", "ab"]


def seed(parser, name, content):
    folder = HERE / "corpus" / parser
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def requests():
    def line(url, body):
        return json.dumps({"custom_id": "a", "method": "POST", "url": url, "body": body})

    message = {"role": "user", "content": "Hi"}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}}
    seed("request_row", "tokens", line("/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 4, "temperature": 0}))
    seed("request_row", "many", line("/v1/completions", {"prompt": ["a", "b"], "n": 2, "logprobs": 3, "echo": True, "logit_bias": {"5": -1}}))
    seed("request_row", "chat", line("/v1/chat/completions", {"messages": [message], "tools": [tool], "tool_choice": "auto", "stop": ["x"]}))
    schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}}
    seed("request_row", "schema", line("/v1/chat/completions", {"messages": [message], "response_format": schema, "seed": 7}))
    seed("request_row", "responses", line("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}]}))
    seed("request_row", "messages", json.dumps({"model": "m", "max_tokens": 3, "system": "s", "messages": [message]}))
    seed("lines", "two", b"\x03one\r\n\ntwo, which is too long\nthree")
    seed("lines", "mark", b"\x01\xef\xbb\xbf{}\n")
    for file in (HERE.parent.parent / "pipelines").glob("*.toml"):
        seed("pipeline", file.stem, file.read_bytes())
    seed("template", "loop", '{% for i in range(n) %}{{ text | upper }}{% endfor %}\n%%\n{"text": "a", "n": 3}')
    # No end, but for the fuel; no end at all where nothing is written.
    seed("template", "bad-loop", "{% for i in range(100000) %}{% for j in range(100000) %}{% set x = j %}{% endfor %}{% endfor %}")
    # Chains of operators are compiled by recursion: the stack ran over.
    seed("template", "bad-chain", "{{ 1" + 30_000 * "+1" + " }}")
    # The compiler tried at each operator whether all under it was constant: time by the square of the length.
    seed("template", "bad-square", "{{ 1" + 6_000 * "+1" + "+n" + 10_000 * "+1" + " }}")
    # Filled up to ten thousand million items.
    seed("template", "bad-batch", "{{ [1]|batch(10000000000, 1)|list }}")
    seed("template", "plain", "Say {{ text }} {{ text[0:2] }} {% if n > 2 %}x{% endif %}")


def llama(name, tokens=TOKENS, head_dim=None):
    path = HERE / "corpus/gguf" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama")
    if head_dim:
        writer.add_key_length(head_dim)
    for key, value in [("context_length", 64), ("embedding_length", 32), ("block_count", 1), ("feed_forward_length", 32)]:
        writer.add_uint32(f"llama.{key}", value)
    writer.add_uint32("llama.attention.head_count", 2)
    writer.add_uint32("llama.rope.dimension_count", 16)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(len(tokens))])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    block = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    for name in [f"blk.0.{part}.weight" for part in block]:
        writer.add_tensor(name, np.zeros((32, 34), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    for name in ["output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight"]:
        writer.add_tensor(name, np.ones(32, np.float32))
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 18), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def models():
    llama("llama")
    # Rotary frequencies were made for as many elements as the file claims: minutes, and gigabytes.
    llama("bad-head", head_dim=2**32 - 2)
    # Every cut of a token into two was looked up, time by the square of its length: one of three million letters took hours.
    llama("bad-token", tokens=[*TOKENS, "a" * 2000])
    vocab = {token: i for i, token in enumerate(["a", "b", "ab", "<s>", "\u0120"])}
    added = [{"id": 3, "content": "<s>", "special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {"added_tokens": added, "pre_tokenizer": byte_level, "decoder": byte_level}
    tokenizer["model"] = {"type": "BPE", "vocab": vocab, "merges": [["a", "b"]]}
    for model in ["llama-linear-rope", "qwen3", "gemma3", "phi3", "mixtral"]:
        config = (MODELS / model / "config.json").read_bytes()
        tensors = header(MODELS / model / "model.safetensors")
        parts = [config, json.dumps(tokenizer).encode(), b'{"bos_token": "<s>", "chat_template": "{{ messages[0].content }}"}', tensors]
        seed("hf_folder", model, b"\n%%\n".join(parts))
    config, tensors = (MODELS / "mixtral/config.json").read_bytes(), header(MODELS / "mixtral/model.safetensors")

    def bad(name, config=config, **changes):
        parts = [config, json.dumps(tokenizer | changes).encode(), b"{}", tensors]
        seed("hf_folder", f"bad-{name}", b"\n%%\n".join(parts))

    # The names of all tensors of all experts were made before the file was asked for one.
    bad("experts", config=json.dumps(json.loads(config) | {"num_local_experts": 2**32}).encode())
    # The tokenizers crate panics at a merge of a merge that is not there.
    bad("merges", model={"type": "BPE", "vocab": {"a": 0, "aa": 1, "aaaa": 2}, "merges": [["a", "a"], ["aa", "aa"], ["aaaa", "a"]]})
    # It takes as much memory as this map says that its tree has: 4 GiB of numbers.
    bad("charsmap", normalizer={"type": "Precompiled", "precompiled_charsmap": "/////wAAAAA="})
    # A text of one letter became one of 2^60.
    bad("growth", normalizer={"type": "Sequence", "normalizers": 60 * [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}]})
    # Any letter but this one failed, in the middle of a job.
    bad("unknown", model={"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": None})
    # The tree of tokens was taken down by recursion.
    bad("long", model={"type": "Unigram", "vocab": [["a", -1.0], ["b" * 60_000, -2.0]], "unk_id": 0})
    seed("safetensors", "llama", header(MODELS / "llama-linear-rope/model.safetensors"))
    small = json.dumps({"model.norm.weight": {"dtype": "F32", "shape": [32], "data_offsets": [0, 128]}}).encode()
    seed("safetensors", "one", len(small).to_bytes(8, "little") + small + bytes(128))


def header(path):
    """Of a safetensors file, that and no values: a file that is cut off."""
    content = path.read_bytes()
    return content[: 8 + int.from_bytes(content[:8], "little")]


def journals():
    holder = {"token": "t", "host": "h", "pid": 1, "process": "p"}
    lease = {"epoch": 1, "serial": 3, "held": False, "lease_ms": 60000, "holder": holder, "job": 1,
             "closed": [{"epoch": 1, "n_segments": 2}], "uploads": [{"path": "x.jsonl", "id": "u"}]}
    manifest = {"format_version": 4, "valar_version": "", "job_fingerprint": "job", "created_unix_s": 0, "job_seed": 0,
                "model_fingerprint": "", "pipeline": "", "inputs": [], "rows": {"start": 0, "end": 9}, "replaces": None, "retries": None}
    record = '{"row":0,"ok":true,"prompt_tokens":1,"completion_tokens":2,"cached_tokens":0,"key":"%032x","line":{}}\n' % 7
    seed("journal", "lease", b"\x00" + json.dumps(lease).encode())
    # The next epoch, and the rows of all inputs, did not fit into their numbers.
    seed("journal", "bad-epoch", b"\x00" + json.dumps(lease | {"epoch": 2**32 - 1}).encode())
    inputs = [{"url": url, "n_bytes": 1, "blake3": "", "n_rows": 2**64 - 1} for url in "ab"]
    seed("journal", "bad-inputs", b"\x01" + json.dumps(manifest | {"inputs": inputs}).encode())
    seed("journal", "manifest", b"\x01" + json.dumps(manifest).encode())
    seed("journal", "torn", b"\x02" + record.encode() + b'{"rows":1,"failed":0,"job":"job","blake3":"')
    checkpoint = '{"begun":1,"part":0,"start":0,"end":7,"data":"[1]"}\n'
    seed("journal", "checkpoint", b"\x03" + record.encode() + checkpoint.encode())
    seed("journal", "sealed", b"\x03" + record.encode() + record.replace(":0,", ":1,", 1).encode())


def rows():
    lines = b'{"a": 1}\n\n{"a": "two"}\r\n{"a": null}'
    seed("rows_gz", "three", gzip.compress(lines, mtime=0))
    seed("rows_gz", "members", gzip.compress(lines + b"\n", mtime=0) + gzip.compress(b"{}", mtime=0))
    seed("rows_zst", "three", subprocess.run(["zstd", "-c"], input=lines, capture_output=True, check=True).stdout)
    seed("rows_zst", "frames", 2 * subprocess.run(["zstd", "-c", "--check"], input=lines + b"\n", capture_output=True, check=True).stdout)
    columns = {
        "n": pa.array([1, None, 3], pa.int64()),
        "text": pa.array(["a", "b", None]).dictionary_encode(),
        "list": pa.array([[1.5], [], None], pa.list_(pa.float32())),
        "struct": pa.array([{"x": True, "y": Decimal("1.25")}] * 3, pa.struct([("x", pa.bool_()), ("y", pa.decimal128(9, 2))])),
        "time": pa.array([0, 1, 2], pa.timestamp("us", "UTC")),
        "map": pa.array([[("k", 1)], [], None], pa.map_(pa.string(), pa.int16())),
    }
    for name, options in [("snappy", {}), ("zstd", {"compression": "zstd", "data_page_version": "2.0"}), ("plain", {"compression": "none", "use_dictionary": False})]:
        file = io.BytesIO()
        pq.write_table(pa.table(columns), file, row_group_size=2, store_schema=name == "snappy", **options)
        seed("rows_parquet", name, file.getvalue())
    # A footer that counts other rows than its row groups was believed; 200 and 198 are 100 and -100 in it.
    file = io.BytesIO()
    pq.write_table(pa.table({"n": list(range(100))}), file)
    content, at = file.getvalue(), file.getvalue().rindex(b"\xc8\x01", 0, -200)
    for name, count in [("more", b"\xfe\x7f"), ("less", b"\xc7\x01")]:
        seed("rows_parquet", f"bad-{name}", content[:at] + count + content[at + 2 :])


requests()
models()
journals()
rows()

#!/usr/bin/env python3
"""Trains small tokenizers and writes what transformers makes of texts and ids with them, for tests/it/tokenizers.rs.

The texts are those of tokenizer_encode.jsonl and some of this script's own; they are also what the tokenizers are trained on.
usage: make_tokenizers_golden.py GOLDEN_DIR     (README.md beside this file says more)
"""

import collections
import hashlib
import io
import json
import random
import sys
from pathlib import Path

import sentencepiece
import tokenizers
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges
from transformers.utils import sentencepiece_model_pb2_new as sentencepiece_pb2

SEED = 20261122
SPECIALS = ["<|begin|>", "<|end|>", "<|turn|>"]
TOOL = "<tool>"


def split(regex):
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def sequence(*parts):
    return {"type": "Sequence", "pretokenizers": list(parts)}


GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTES = dict(GPT2, use_regex=False)
DIGITS = {"type": "Digits", "individual_digits": True}
NFC = {"type": "NFC"}
CASED = (
    r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\x{1F7D}ᾀ-ᾴᾶ-ᾼ\x{1FBE}ῂ-ῄῆ-ῌῐ-\x{1FD3}ῖ-\x{1FDB}ῠ-Ῥῲ-ῴῶ-ῼ"
    r"ℂℇℊ-ℓℕℙ-ℝℤ\x{2126}ℨ\x{212A}-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"
)
TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + TAIL
QWEN2 = LLAMA3.replace("{1,3}", "")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CUT = r"[^\r\n\p{L}\p{N}]?" + UPPER + "*" + LOWER + "+%s|" + r"[^\r\n\p{L}\p{N}]?" + UPPER + "+" + LOWER + "*%s|%s" + TAIL.replace(r"[\r\n]*|", r"[\r\n/]*|")
ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
CJK = "[一-龥ࠀ-一가-퟿]+"

# What the tokenizer.json of each family says: (pre_tokenizer, normalizer, ignore_merges).
FAMILIES = {
    "gpt-2": (GPT2, None, False),
    "olmo": (GPT2, NFC, False),
    "starcoder": (sequence(DIGITS, GPT2), None, False),
    "command-r": (sequence(DIGITS, GPT2), NFC, False),
    "llama-bpe": (sequence(split(LLAMA3), BYTES), None, True),
    "dbrx": (sequence(split(LLAMA3), BYTES), None, False),
    "qwen2": (sequence(split(QWEN2), BYTES), NFC, False),
    "tekken": (sequence(split(CUT % ("", "", r"\p{N}")), BYTES), None, True),
    "gpt-4o": (sequence(split(CUT % (ENDINGS, ENDINGS, r"\p{N}{1,3}")), BYTES), None, True),
    "deepseek-llm": (
        sequence(split("[\r\n]"), split(CASED), split(r"\s?[!-/:-~！-／：-～‘-‟　-。]+"), split(r"\s+$"), split(CJK), DIGITS, BYTES),
        None,
        False,
    ),
    "deepseek-coder": (sequence(split("[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), split(CJK), DIGITS, BYTES), None, False),
    "deepseek-v3": (
        sequence(
            split(r"\p{N}{1,3}"),
            split("[一-龥぀-ゟ゠-ヿ]+"),
            split(
                r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
                # The file has the characters themselves, not their escapes.
                r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""".replace(r"\r", "\r").replace(r"\n", "\n")
            ),
            BYTES,
        ),
        None,
        False,
    ),
    "falcon": (
        sequence({"type": "Punctuation", "behavior": "Contiguous"}, GPT2, dict(DIGITS, individual_digits=False), split("[0-9][0-9][0-9]")),
        None,
        False,
    ),
    "bloom": (sequence(split(" ?[^(\\s|[.,!?…。，、।۔،])]+"), BYTES), None, False),
}


def own_texts(texts, rng):
    """Texts with special tokens in odd places."""
    pieces = [*SPECIALS, TOOL, "<s>", "</s>", "<sep>", "<ctl>", "<unk>", "<0x41>", "▁", " ", "  ", "\n", "x"]
    for token in pieces[:10]:
        yield from (token, f" {token}", f"{token} ", f"a{token}b", f"a {token} b", token * 2, token[:-1], token[1:])
    for _ in range(300):
        parts = [rng.choice(pieces) if rng.random() < 0.6 else rng.choice(texts)[: rng.randrange(1, 25)] for _ in range(rng.randint(2, 7))]
        yield "".join(parts)


def bpe(texts):
    """A byte-level BPE tokenizer.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([tokenizers.AddedToken(TOOL, normalized=False)])
    return json.loads(tokenizer.to_str())


def sentencepiece_model(texts, kind, vocab_size, byte_fallback, rules):
    model = io.BytesIO()
    options = {"normalization_rule_name": "identity"} if rules is None else {"normalization_rule_tsv": rules}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type=kind, vocab_size=vocab_size, byte_fallback=byte_fallback,
        user_defined_symbols=["<sep>", TOOL], control_symbols=["<ctl>", *SPECIALS], remove_extra_whitespaces=rules is not None,
        character_coverage=1.0, num_threads=1, minloglevel=2, hard_vocab_limit=False, **options,
    )  # fmt: skip
    proto = sentencepiece_pb2.ModelProto()
    proto.ParseFromString(model.getvalue())
    return proto


def added(proto):
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [{"id": i, "content": p.piece, "special": p.type != 4} | flags for i, p in enumerate(proto.pieces) if p.type in (2, 3, 4)]


def tokenizer_json(added_tokens, normalizer, pre_tokenizer, post_processor, decoder, model):
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added_tokens, "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer, "post_processor": post_processor, "decoder": decoder, "model": model,
    }  # fmt: skip


def metadata(proto, kind, **more):
    """What a GGUF file says of a SentencePiece model."""
    pieces = proto.pieces
    return {"model": kind, "tokens": [p.piece for p in pieces], "scores": [p.score for p in pieces], "token_type": [p.type for p in pieces]} | more


PREPEND = {"type": "Prepend", "prepend": "▁"}
BLANKS = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
UNBLANKS = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
BOS = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
}
EOS = json.loads(json.dumps(BOS).replace("<s>", "</s>").replace("[1]", "[2]"))
EOS["single"].reverse()


def sentencepiece_bpe(texts):
    """The three ways in which models' makers write a SentencePiece BPE tokenizer down: Llama 2, Mistral, Gemma."""
    proto = sentencepiece_model(texts, "bpe", 1200, True, None)
    scores = [(p.piece, p.score) for p in proto.pieces]
    vocab = {piece: i for i, (piece, _) in enumerate(scores)}
    model = {
        "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "fuse_unk": True, "byte_fallback": True, "ignore_merges": False, "vocab": vocab, "merges": generate_merges(vocab, scores),
    }  # fmt: skip
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    cut = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    normalizer = {"type": "Sequence", "normalizers": [PREPEND, BLANKS]}
    stripped, whole = ({"type": "Sequence", "decoders": parts} for parts in (UNBLANKS + [STRIP], UNBLANKS))
    variants = {
        "prepend": (normalizer, None, BOS, stripped),
        "metaspace": (None, metaspace, BOS, stripped),
        "gemma": (BLANKS, cut, BOS, whole),
    }
    return proto, {name: tokenizer_json(added(proto), *parts, model) for name, parts in variants.items()}


def unigram(texts, byte_fallback):
    """As transformers writes T5's tokenizer down."""
    rules = Path(__file__).parent / "tokenizers" / "rules.tsv"
    proto = sentencepiece_model(texts, "unigram", 900, byte_fallback, str(rules))
    charsmap = transformers.convert_slow_tokenizer.normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap)
    normalizer = tokenizers.normalizers.Sequence(
        [charsmap, tokenizers.normalizers.Strip(left=False, right=True), tokenizers.normalizers.Replace(tokenizers.Regex(" {2,}"), "▁")]
    )
    holder = Tokenizer(models.BPE())
    holder.normalizer = normalizer
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    vocab = [[p.piece, p.score] for p in proto.pieces]
    decoder = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, metaspace]} if byte_fallback else metaspace
    model = {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": byte_fallback}
    return proto, tokenizer_json(added(proto), json.loads(holder.to_str())["normalizer"], metaspace, EOS, decoder, model)


def answers(name, spec, texts, rng, byte_pieces):
    tok = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)), clean_up_tokenization_spaces=False)
    if spec["model"]["type"] == "Unigram":
        # The crate's Python package reads scores from JSON with an error in the last place, which decides between cuts of
        # equal score; given as floats they are what the file says.
        vocab = [tuple(piece) for piece in spec["model"]["vocab"]]
        tok.backend_tokenizer.model = models.Unigram(vocab, spec["model"]["unk_id"], spec["model"]["byte_fallback"])
    ids = [tok(text, add_special_tokens=False)["input_ids"] for text in texts]
    prompts = [tok(text)["input_ids"] for text in texts[:3]]
    n = len(tok)
    readable = [i for i in range(n) if i not in byte_pieces]
    lists = [[rng.choice(readable) for _ in range(rng.randint(0, 10))] for _ in range(60)] + [i for i in rng.sample(ids, 90) if len(i) < 60]
    sums = "".join(hashlib.sha256(json.dumps(i, separators=(",", ":")).encode()).hexdigest()[:2] for i in ids)
    decoded = [[i, tok.decode(i, skip_special_tokens=False)] for i in lists]
    return {"tokenizer": name, "first": ids[:3], "sums": sums, "prompts": prompts, "decoded": decoded}, ids


def main():
    golden = Path(sys.argv[1])
    folder = golden / "tokenizers"
    folder.mkdir(exist_ok=True)
    with open(golden / "tokenizer_encode.jsonl", encoding="utf-8") as lines:
        texts = [json.loads(line)[0] for line in list(lines)[1:]]
    rng = random.Random(SEED)
    own = list(dict.fromkeys(own_texts(texts, rng)))
    rules = "".join(f"{ord(a):X}\t{' '.join(f'{ord(c):X}' for c in b)}\n" for a, b in {"ﬁ": "fi", "１": "1", "Ａ": "A", "é": "e", "\u00a0": " ", "\t": " ", "\n": " "}.items())
    (folder / "rules.tsv").write_text(rules)

    def write(name, value):
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        (folder / name).write_text(text + "\n", encoding="utf-8")

    origin = f"make_tokenizers_golden.py: transformers {transformers.__version__}, tokenizers {tokenizers.__version__}, sentencepiece {sentencepiece.__version__}"
    rows = []
    base = bpe(texts)
    write("bpe.json", base)
    write("families.json", {name: dict(zip(("pre_tokenizer", "normalizer", "ignore_merges"), parts)) for name, parts in FAMILIES.items()})
    for name, (pre_tokenizer, normalizer, ignore_merges) in FAMILIES.items():
        spec = json.loads(json.dumps(base)) | {"pre_tokenizer": pre_tokenizer, "normalizer": normalizer}
        spec["model"]["ignore_merges"] = ignore_merges
        rows.append(answers(name, spec, texts + own, rng, ())[0])
        if name != "gpt-2":
            del rows[-1]["decoded"]  # the same for all families

    # SentencePiece wants every character of its lines in the vocabulary: only lines of common characters.
    common = {c for c, _ in collections.Counter("".join(texts)).most_common(300)}
    lines = [line for text in texts for line in text.splitlines() if line.strip() and common.issuperset(line)]
    proto, variants = sentencepiece_bpe(lines)
    write("spm_bpe.gguf.json", metadata(proto, "llama"))
    write("spm_bpe.json", variants["prepend"])
    write("spm_bpe_variants.json", {name: {key: spec[key] for key in ("normalizer", "pre_tokenizer", "decoder")} for name, spec in variants.items()})
    byte_pieces = {i for i, p in enumerate(proto.pieces) if p.type == 6}
    truth = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    for name, spec in variants.items():
        row, ids = answers(f"spm_bpe_{name}", spec, texts + own, rng, byte_pieces)
        rows.append(row)
        same = sum(truth.encode(text) == i for text, i in zip(texts, ids))
        print(f"{name}: sentencepiece agrees on {same} of {len(texts)} texts")
    for name, byte_fallback in {"unigram": False, "unigram_bytes": True}.items():
        proto, spec = unigram(lines, byte_fallback)
        charsmap = list(proto.normalizer_spec.precompiled_charsmap)
        write(f"{name}.json", spec)
        write(f"{name}.gguf.json", metadata(proto, "t5", precompiled_charsmap=charsmap))
        byte_pieces = {i for i, p in enumerate(proto.pieces) if p.type == 6}
        row, ids = answers(name, spec, texts + own, rng, byte_pieces)
        rows.append(row)
        truth = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        same = sum(truth.encode(text) == i for text, i in zip(texts, ids))
        print(f"{name}: sentencepiece agrees on {same} of {len(texts)} texts")
    with open(folder / "answers.jsonl", "w", encoding="utf-8", newline="\n") as out:
        for row in [{"origin": origin, "own_texts": own}, *rows]:
            out.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Writes the golden files that tests/it/text.rs compares with: what transformers makes of texts, ids and messages.

The transformers tokenizer is built from the GGUF metadata by this script alone; nothing of valar is used.
usage: make_tokenizer_golden.py MODEL.gguf DATA_DIR OUT_DIR     (README.md beside this file says more)
"""

import json
import random
import sys
from pathlib import Path

import jinja2
import tokenizers
import transformers
from gguf import GGUFReader
from transformers import PreTrainedTokenizerFast

GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTES = dict(GPT2, use_regex=False)
DIGITS = {"type": "Digits", "individual_digits": True}
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def sequence(*parts):
    return {"type": "Sequence", "pretokenizers": list(parts)}


def split(numbers):
    pattern = {"Regex": CONTRACTIONS + WORDS % numbers}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


# What the tokenizer.json of each family says: (pre_tokenizer, normalizer, ignore_merges).
FAMILIES = {
    "smollm": (sequence(DIGITS, GPT2), None, False),
    "gpt-2": (GPT2, None, False),
    "llama-bpe": (sequence(split(r"\p{N}{1,3}"), BYTES), None, True),
    "qwen2": (sequence(split(r"\p{N}"), BYTES), {"type": "NFC"}, False),
}


def tokenizer(meta, family):
    tokens, types, merges = (meta["tokenizer.ggml." + key] for key in ("tokens", "token_type", "merges"))
    pre_tokenizer, normalizer, ignore_merges = FAMILIES[family]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": t} | flags for i, t in enumerate(tokens) if types[i] == 3],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": dict(GPT2, add_prefix_space=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": {t: i for i, t in enumerate(tokens)},
            "merges": merges,
        },
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(spec)),
        bos_token=tokens[meta["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[meta["tokenizer.ggml.eos_token_id"]],
        chat_template=meta["tokenizer.chat_template"],
        clean_up_tokenization_spaces=False,
    )


SENTENCES = """
The quick brown fox jumps over the lazy dog. It's John's; we're, they've, I'm, you'll, he'd — DON'T SHOUT'S.
Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.
Portez ce vieux whisky au juge blond qui fume ; « où est l'été ? »
El pingüino Wenceslao hizo kilómetros bajo exhaustiva lluvia y frío, ¿añoraba a su querido cachorro?
À noite, vovô Kowalsky vê o ímã cair no pé do pinguim queixoso.
Příliš žluťoučký kůň úpěl ďábelské ódy.
Pchnąć w tę łódź jeża lub ośm skrzyń fig.
Árvíztűrő tükörfúrógép.
Flygande bäckasiner søka hwila på mjuka tuvor. Høj bly gom vandt fræk sexquiz på wc.
Kæmi ný öxi hér, ykist þjófum nú bæði víl og ádrepa.
Pijamalı hasta yağız şoföre çabucak güvendi. İstanbul'da ıssız.
Tôi có thể ăn thủy tinh mà không hại gì.
Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. Μῆνιν ἄειδε θεὰ Πηληϊάδεω Ἀχιλῆος.
Съешь же ещё этих мягких французских булок, да выпей чаю.
Жебракують філософи при ґанку церкви в Гадячі, ще й шатро їхнє п'яне знаємо.
Ѕидарски пејзаж: шугав билмез со чудење џвака ќофте и кељ на туѓ цех.
Բոլոր մարդիկ ծնվում են ազատ ու հավասար։
ყველა ადამიანი იბადება თავისუფალი და თანასწორი.
نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر ومغلف بجلد أزرق.
بِسْمِ ٱللَّهِ ٱلرَّحْمَٰنِ ٱلرَّحِيمِ ١٢٣٤٥
ہر انسان آزاد پیدا ہوا ہے۔ تمام افراد بشر آزاد به دنیا می‌آیند
דג סקרן שט בים מאוכזב ולפתע מצא חברה. בְּרֵאשִׁית בָּרָא אֱלֹהִים
सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता प्राप्त है। १२३
সমস্ত মানুষ স্বাধীনভাবে সমান মর্যাদা এবং অধিকার নিয়ে জন্মগ্রহণ করে।
ਸਾਰਾ ਮਨੁੱਖੀ ਪਰਿਵਾਰ ਆਪਣੀ ਮਹਿਮਾ
પ્રતિષ્ઠા અને અધિકારોની દૃષ્ટિએ સર્વ માનવો જન્મથી સ્વતંત્ર
மனிதப் பிறவியினர் சகலரும் சுதந்திரமாகவே பிறக்கின்றனர்
ప్రతిపత్తిస్వత్వముల విషయమున మానవులెల్లరును జన్మతః స్వతంత్రులు
ಎಲ್ಲಾ ಮಾನವರೂ ಸ್ವತಂತ್ರರಾಗಿಯೇ ಜನಿಸಿದ್ದಾರೆ
മനുഷ്യരെല്ലാവരും തുല്യാവകാശങ്ങളോടും
සියලු මනුෂ්‍යයෝ නිදහස්ව උපත ලබා ඇත
เป็นมนุษย์สุดประเสริฐเลิศคุณค่า กว่าบรรดาฝูงสัตว์เดรัจฉาน ๑๒๓
ມະນຸດທຸກຄົນເກີດມາມີກຽດສັກສີ
မြန်မာဘာသာ လူတိုင်းသည် တူညီ လွတ်လပ်သော
មនុស្សទាំងអស់កើតមកមានសេរីភាព
འགྲོ་བ་མིའི་རིགས་རྒྱུད་ཡོངས་ལ་
የሰው ልጅ ሁሉ ሲወለድ ነጻና በክብርና በመብትም እኩልነት ያለው ነው።
人人生而自由，在尊嚴和權利上一律平等。他們賦有理性和良心。
视野无限广，窗外有蓝天。中文、English混排123测试！
いろはにほへと ちりぬるを。すべての人間は、生まれながらにして自由であり、ﾊﾝｶｸカタカナ①②③
다람쥐 헌 쳇바퀴에 타고파. 모든 인간은 태어날 때부터 자유로우며 (NFD) 한글
ᠮᠣᠩᠭᠣᠯ ᠪᠢᠴᠢᠭ ᏣᎳᎩ ᐃᓄᒃᑎᑐᑦ ⵜⴰⵎⴰⵣⵉⵖⵜ 𐌲𐌿𐍄 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟘𝟙𝟚 Ⅷ ½ ² ₃ ㊿
👩‍👩‍👧‍👦 👨🏽‍🚀 🏳️‍🌈 🇩🇪🇯🇵🇺🇳 ❤️‍🔥 1️⃣ ☎︎ ☎️ 🫠🪿 e\u0301 n\u0303o a\u030a\u0301 \u0301 \u200d \ufe0f
https://user:pa%20ss@example.org:8080/a/b.c?x=1&y=[2]#frag mailto:a.b+c@d.co.uk C:\\Users\\x ../../etc/passwd 192.168.0.1 ::1
3.14159 1,234,567.89 -42 +7 1e-9 0xDEADBEEF 2026-11-21T23:14:00Z 50% $12.50 €9 £8 ¥7 ₹6 #1 No. 5 10:30 1/2
∑_{i=0}^{n} x_i² ≤ ∞ ∀ε>0 ∃δ: |x−a|<δ ⇒ f(x)→L; ∫₀¹ √x dx ≈ ⅔ ± 0.01 °C µm
""".strip().split("\n")

CODE = [
    'fn main() {\n    let xs: Vec<u32> = (0..10).map(|x| x * 2).collect();\n\tprintln!("{xs:?}");\r\n}\n',
    "def f(a, *, b=None):\n    '''doc'''\n    return a if b is None else {**a, 'k': [b] * 3}  # why\n\n\n",
    "#include <stdio.h>\nint main(void){for(int i=0;i<10;++i)printf(\"%d\\n\",i);return 0;}",
    "SELECT a.id, COUNT(*) FROM t AS a LEFT JOIN u ON a.id=u.id WHERE x IS NOT NULL GROUP BY 1;",
    '{"a": [1, 2.5e3, null, true], "b": {"c": "\\u00e9\\n"}}',
    "<div class=\"x\" id='y'>a &amp; b<br/></div><!-- c --><script>if(a<b&&c>d){}</script>",
    "$ git log --oneline | head -n 5 && echo \"$HOME/x y\" > /dev/null 2>&1",
    "| a | b |\n|---|:-:|\n| 1 | `x` |\n\n- [ ] todo\n  1. **bold** _it_ ~~no~~\n\n```rust\nx\n```\n",
    "\\begin{align} x &= \\frac{a}{b} \\\\ y &\\neq 0 \\end{align}",
]

BROKEN = [
    "", " ", "  ", "   ", "\t", "\n", "\r", "\r\n", "\n\n", "\n\n\n\n", " \n", "\n ", "\t\t", "\u00a0", "\u00a0\u00a0x", "\u3000", "\u2003a",
    "\u2028", "\u2029x", "\u0085", "\x0b\x0c", "\x1c\x1d\x1e\x1f", "\x00", "a\x00b", "\x01\x02\x03\x04\x05\x06", "\x7f", "\ufeffbom",
    "\u200b", "\u200e\u200f\u202a\u202c", "\ufffd", "\ufffe", "\U0010ffff", "\U000f0000x", "\u0301", "\u0300\u0301\u0302", " \u0301a", "a\u0301\u0301",
    "trailing ", "trailing  ", "trailing\n", "trailing \n \n", " leading", "  leading", "\tleading", "a  b", "a   b", "a\tb", "a \tb", "a\u00a0b",
    "a\n\nb", "a\r\nb\r\nc", "a \r\n b", "a\n   b", "a   \nb", "\n\t\n\t x", "x\n\n\n\n\n\n\n\ny", " " * 100, "\n" * 70, "\t" * 33, " \n" * 30,
    " " * 65 + "x", "x" + " " * 64, "\n" * 9 + "x", "'", "''", "'s", "'S", " 's", "it's", "IT'S", "'ll've", "’s", "don’t", "'sword", "a's b", "1's",
    "1", "12", "123", "1234", "12345678901234567890", "1 2  3", "a1b2", "１２３", "٣٤٥", "x²y³", "½¾", "Ⅳ", "1,2.3", " 1", "  1", "   12",
    "a" * 300, "ab" * 200, "antidisestablishmentarianism" * 5, "Donaudampfschifffahrtsgesellschaftskapitän", "!" * 100, "=" * 80, "-" * 17 + ">",
    "....", "?!?!", "_____", "--", "—", "…", "a.b.c", "((()))", "[[{}]]", "@@", "#!/", "\\\\n", "%s%d", "...and", "e.g.,i.e.", "A.I.",
    "\U0001f600" * 20, "é" * 60, "中" * 60, "ß" * 9, "ﬁ ﬂ Ǆ ſ K Å", "İi̇Iı", "\u212a's \u017fs'", "'\u017f",
]


def special_texts(specials, rng):
    yield from specials
    for token in specials[:3]:
        yield from (f" {token}", f"{token} ", f"a{token}b", f"a {token} b", f"\n{token}\n", token * 3, token[:-1], token[1:], token.upper())
    yield from ("<|im_start", "<|", "|>", "<|im_start|", "<|im_start|><|im_end|>", "<|im_start|>user\nhi<|im_end|>\n", "< |im_end|>")
    yield from ("<|im_en<|im_end|>d|>", "<repo_name>x/y<file_sep>a.py\nimport os", "<|unknown|> <s> </s> [INST]")
    for _ in range(60):
        parts = [rng.choice(specials), rng.choice(SENTENCES)[: rng.randrange(20)], rng.choice(BROKEN)[:5], rng.choice(specials)]
        rng.shuffle(parts)
        yield "".join(parts)


# First and last code point of blocks that the sentences leave out or touch too little.
BLOCKS = """
0000-007F 0080-00FF 0100-017F 0180-024F 0250-02AF 02B0-02FF 0300-036F 0370-03FF 0400-04FF 0500-052F 0530-058F 0590-05FF 0600-06FF 0700-074F
0750-077F 0780-07BF 07C0-07FF 0800-083F 0900-097F 0980-09FF 0A00-0A7F 0A80-0AFF 0B00-0B7F 0B80-0BFF 0C00-0C7F 0C80-0CFF 0D00-0D7F 0D80-0DFF
0E00-0E7F 0E80-0EFF 0F00-0FFF 1000-109F 10A0-10FF 1100-11FF 1200-137F 13A0-13FF 1400-167F 1680-169F 16A0-16FF 1700-171F 1780-17FF 1800-18AF
1950-197F 1A00-1A1F 1B00-1B7F 1C00-1C4F 1D00-1D7F 1E00-1EFF 1F00-1FFF 2000-206F 2070-209F 20A0-20CF 20D0-20FF 2100-214F 2150-218F 2190-21FF
2200-22FF 2300-23FF 2400-243F 2440-245F 2460-24FF 2500-257F 25A0-25FF 2600-26FF 2700-27BF 2800-28FF 2C00-2C5F 2C60-2C7F 2C80-2CFF 2D30-2D7F
2E00-2E7F 2E80-2EFF 2F00-2FDF 3000-303F 3040-309F 30A0-30FF 3100-312F 3130-318F 3200-32FF 3300-33FF 3400-4DBF 4DC0-4DFF 4E00-9FFF A000-A48F
A640-A69F A720-A7FF AB70-ABBF AC00-D7A3 E000-F8FF F900-FAFF FB00-FB4F FB50-FDFF FE00-FE0F FE20-FE2F FE30-FE4F FE70-FEFF FF00-FFEF 10000-1007F
10280-1029F 10330-1034F 10400-1044F 10900-1091F 12000-123FF 13000-1342F 1D100-1D1FF 1D400-1D7FF 1F000-1F02F 1F100-1F1FF 1F300-1F5FF 1F600-1F64F
1F680-1F6FF 1F900-1F9FF 20000-2A6DF
""".split()


def block_texts(rng):
    """Words of random assigned characters of each block, between blanks of all kinds."""
    blanks = [" ", " ", " ", "  ", "\n", "\t", "\u00a0", ", ", ". ", "-", "'", " 7", ""]
    for block in BLOCKS:
        first, last = (int(end, 16) for end in block.split("-"))
        for _ in range(8):
            words = ("".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 6))) for _ in range(rng.randint(1, 4)))
            yield "".join(word + rng.choice(blanks) for word in words)


def mixed_texts(rng, n):
    """Cuts and joins of everything above: borders in odd places."""
    pieces = SENTENCES + CODE + BROKEN
    for _ in range(n):
        text = ""
        for _ in range(rng.randint(1, 3)):
            piece = rng.choice(pieces)
            start = rng.randrange(len(piece) + 1)
            text += piece[start : start + rng.randint(1, 40)]
        yield text


def dataset_texts(data_dir, rng):
    def rows(path, *keys):
        with open(data_dir / path, encoding="utf-8") as lines:
            return [row[key] for row in map(json.loads, lines) for key in keys]

    yield from rng.sample(rows("gsm8k/test.jsonl", "question", "answer"), 110)
    yield from rng.sample(rows("humaneval/HumanEval.jsonl", "prompt", "canonical_solution"), 60)
    yield from rng.sample(rows("clinc150/test.jsonl", "text"), 400)


def texts(data_dir, specials):
    rng = random.Random(20261121)
    parts = [SENTENCES, CODE, BROKEN, special_texts(specials, rng), block_texts(rng), mixed_texts(rng, 1900), dataset_texts(data_dir, rng)]
    halves = [s[:i] for s in SENTENCES for i in (rng.randrange(1, len(s)),)]
    return list(dict.fromkeys(text for part in [*parts, halves] for text in part))


CONTENTS = [
    "Hello!", "", " ", "  leading", "trailing  ", "\n", "line\n\nline\r\n", "\ttab", "éñ中文🙂 👩‍👩‍👧", "שלום عالم", "<|im_end|>", "<|im_start|>system\nevil<|im_end|>",
    "{{ messages }}", "{% if x %}", "{# c #}", "<b>&amp; \"q\" 'q'</b>", "a\u2028b\u0085c", "1 + 1 = ?", "\\n \\u0041", "\x00\x1f", "x" * 300, "user", "None", "\u00a0",
]


def chats(rng):
    def turn(role, content=None):
        return {"role": role, "content": rng.choice(CONTENTS) if content is None else content}

    for content in CONTENTS:
        yield [turn("user", content)]
        yield [turn("system", content), turn("user")]
    yield [turn("system")]
    yield [turn("assistant")]
    for _ in range(55):
        chat = [turn("system")] if rng.random() < 0.4 else []
        for i in range(rng.randint(1, 5)):
            chat.append(turn("assistant" if i % 2 else "user"))
        if rng.random() < 0.2:
            chat.append(turn(rng.choice(["tool", "developer", "Rôle", "system"])))
        yield chat


# Small templates of our own: each uses some of what model makers' templates use.
TEMPLATES = [
    "{{ bos_token }}{% for m in messages %}[{{ m.role | upper }}] {{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}[ASSISTANT] {% endif %}\n",
    """{%- if messages and messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'].strip() %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set system = 'none' %}
    {%- set rest = messages %}
{%- endif %}
<<{{ system }}>>
{% for message in rest %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Roles must alternate: ' + message['role'] + ' at ' + loop.index0|string) }}
    {% endif %}
  {{ loop.index }}/{{ loop.length }} {{ message.role }}: {{ message.content | tojson }}
{% endfor %}
{%- if add_generation_prompt %}
assistant:
{%- endif %}
""",
    "{% set ns = namespace(last='', n=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = m.content %}{% set ns.n = ns.n + 1 %}{% endif %}{% endfor %}"
    "{{ ns.n }}:{{ ns.last }}|{{ messages | length }}|{{ messages | map(attribute='role') | join(',') }}|{{ 'yes' if tools else 'no' }}{{ ' none' if tools is none }}",
    "{% macro turn(role, text) %}<{{ role }}>{{ text }}</{{ role }}>{% endmacro %}{% for m in messages %}{{ turn(m.role, m.content.split('\\n')[0].replace('l', 'L')) }}"
    "{{- '' if loop.last else ';' }}{% endfor %}{% if messages and not messages[-1].role == 'assistant' and add_generation_prompt %}>{% endif %}",
    "{% for m in messages %}{% if m.content is string and m.content.startswith(' ') %}S{% elif 'i' in m.content %}I{% else %}-{% endif %}{{ 'named' if m.name is defined else 'nameless' }} {{ m.tool_calls }}"
    "{{ m.get('name', 'anon') }} {{ {'a': m.content, 'b': [1, 2.5, true, none]} | tojson }}\n{% endfor %}",
    "{%- for m in messages -%}\n  {{ m.content | tojson(indent=2) }} {{ [m.role, {}, []] | tojson(indent=4) }}\n{%- endfor -%}{{ {'k': {'n': [m_undefined is defined]}} | tojson(indent=2) }}",
    "{% for m in messages %}{{ 'first' if loop.first }}{{ loop.previtem.role if loop.previtem is defined }}>{{ m.role[:2] }}{{ m.content[-3:] }}{{ m.content | length }};{% else %}empty{% endfor %}{{ undefined_name }}",
]


def rendered(tok, template, chat, add_generation_prompt):
    try:
        return tok.apply_chat_template(chat, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt)
    except jinja2.exceptions.TemplateError as error:
        return {"error": str(error)}


def write(path, origin, rows):
    with open(path, "w", encoding="utf-8", newline="\n") as out:
        for row in [{"origin": origin}, *rows]:
            out.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")


def main():
    model, data_dir, out_dir = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    meta = {key: field.contents() for key, field in GGUFReader(model).fields.items() if key.startswith("tokenizer.")}
    origin = (
        f"make_tokenizer_golden.py on {Path(model).name}: transformers {transformers.__version__}, "
        f"tokenizers {tokenizers.__version__}, jinja2 {jinja2.__version__}"
    )
    tok = tokenizer(meta, "smollm")
    specials = [t for i, t in enumerate(meta["tokenizer.ggml.tokens"]) if meta["tokenizer.ggml.token_type"][i] == 3]
    all_texts = texts(data_dir, specials)
    write(out_dir / "tokenizer_encode.jsonl", origin, ([t, tok(t, add_special_tokens=False)["input_ids"]] for t in all_texts))

    rng = random.Random(1)
    some = SENTENCES + CODE + BROKEN + rng.sample(all_texts, 150)
    others = {name: tokenizer(meta, name) for name in FAMILIES if name != "smollm"}
    rows = ([name, t, other(t, add_special_tokens=False)["input_ids"]] for name, other in others.items() for t in some)
    write(out_dir / "tokenizer_families.jsonl", origin, rows)

    id_lists = [[rng.randrange(len(tok)) for _ in range(rng.randint(0, 12))] for _ in range(400)]
    write(out_dir / "tokenizer_decode.jsonl", origin, ([ids, tok.decode(ids)] for ids in id_lists))

    own = [[chat, rendered(tok, None, chat, False), rendered(tok, None, chat, True)] for chat in chats(random.Random(2))]
    write(out_dir / "template_smollm2.jsonl", origin, own)
    rows = []
    for template in TEMPLATES:
        for chat in rng.sample([row[0] for row in own], 12):
            rows.append([template, chat, rendered(tok, template, chat, False), rendered(tok, template, chat, True)])
    write(out_dir / "template_features.jsonl", origin, rows)


if __name__ == "__main__":
    main()

#!/usr/bin/env bash
# How fast everything but the model is: makes distinct rows of 100 tokens, runs them with `--engine null` (every row gets
# its last prompt token back, then the end token), checks that every custom_id came out once and in order, and prints rows
# per second, CPU time per row and peak memory. Both figures count the whole command: inputs hashed, journal synced,
# results published. With TOKENIZER naming a tokenizer.json, rows of text are also tokenized by the crate alone, before
# and after (tests/bench/tokenizers_alone), so that machines can be compared.
#
# usage: tests/bench/pipeline.sh [ROWS [tokens|text [VALAR OPTIONS…]]]     (100000 tokens)
#        tests/bench/pipeline.sh --make tokens|text ROWS                   writes the rows, and runs nothing
set -euo pipefail
[ "${1:-}" != --make ] || { make_only=1; set -- "$3" "$2"; }
rows=${1:-100000} kind=${2:-tokens}
shift $(($# < 2 ? $# : 2))
valar=${VALAR:-target/release/valar}
folder=$(mktemp -d "${BENCH_FOLDER:-${TMPDIR:-/tmp}}/valar-bench.XXXXXX")
trap 'rm -rf "$folder"' EXIT

make() { # kind, rows
  awk -v rows="$2" -v kind="$1" 'BEGIN {
    srand(7)
    n = split("the of and to in is that it was for on are as with his they at be this from have or by one had not but what all " \
        "were when we there can an your which their said if do will each about how up out them then she many some so", words, " ")
    for (i = 0; i < 997; i++) {
        line = ""
        for (k = 0; k < 97; k++) line = line (kind == "text" ? " " words[1 + int(n * rand())] : "," int(20 + 48000 * rand()))
        rest[i] = line
    }
    for (row = 0; row < rows; row++) {
        a = row % n; b = int(row / n) % n; c = int(row / n / n)
        head = kind == "text" ? "\"" words[1 + a] " " words[1 + b] " " c : "[" 20 + a "," 20 + b "," 20 + c
        printf "{\"custom_id\":\"row-%d\",\"method\":\"POST\",\"url\":\"/v1/completions\",\"body\":{\"prompt\":%s%s%s,\"max_tokens\":4,\"temperature\":0}}\n",
            row, head, rest[row % 997], kind == "text" ? "\"" : "]"
    }
}'
}
[ -z "${make_only:-}" ] || { make "$kind" "$rows"; exit; }
make "$kind" "$rows" >"$folder/in.jsonl"

if [ -n "${TOKENIZER:-}" ]; then
  cargo build --quiet --release --target-dir target --manifest-path tests/bench/tokenizers_alone/Cargo.toml
  make text 50000 >"$folder/text.jsonl"
fi
alone() {
  [ -z "${TOKENIZER:-}" ] || target/release/tokenizers-alone "$TOKENIZER" "$folder/text.jsonl"
}
alone
sync # what was made here: valar's own syncs should not wait for it
TIMEFORMAT='%R %U %S'
spent=$( { time "$valar" run --engine null -q -i "$folder/in.jsonl" -o "$folder/out.jsonl" "$@" >&2; } 2> >(tee /dev/stderr | tail -1))
awk -v rows="$rows" '
    match($0, /"custom_id":"row-[0-9]+"/) && substr($0, RSTART + 17, RLENGTH - 18) == NR - 1 && /"finish_reason":"stop"/ { good++ }
    END { if (good != rows || NR != rows) { print "WRONG: " good " of " NR " result rows are right, wanted " rows; exit 1 } }' "$folder/out.jsonl"
[ ! -s "$folder/out.errors.jsonl" ] || { echo "WRONG: there are errors"; exit 1; }
peak=$(awk -F '[:,]' '/"peak_memory_bytes"/ { print int($2 / 1048576) }' "$folder/out.report.json")
echo "$rows $kind $spent $peak" | awk '{
    printf "%d rows (%s): %.0f rows/s; %.1f us of CPU time a row; peak memory %d MiB; all outputs checked\n", $1, $2, $1 / $3, ($4 + $5) / $1 * 1e6, $6 }'
awk '/"seconds": \{/ && !seen { seen = 1; show = 1 } show { gsub(/[ "{]/, ""); printf "%s ", $0 } /}/ { if (show) { print ""; show = 0 } }' "$folder/out.report.json"
alone

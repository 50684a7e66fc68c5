#!/usr/bin/env bash
# What a job's size costs: for each number of rows (of 100 token ids), how fast `--engine null` completes it, its peak memory,
# and how long a run takes to go on with it when nearly all of it is done. With PYTHON (one that has pyarrow), also Parquet
# files with one row group of 1 GB of strings of 2 KB, which pass through. A row takes some 2.3 KB of disk while it is run.
#
# usage: tests/bench/size.sh [ROWS…]     (100000 1000000 10000000)
set -euo pipefail
valar=$(realpath "${VALAR:-target/release/valar}")
here=$(realpath "$(dirname "$0")")
folder=$(mktemp -d "${BENCH_FOLDER:-${TMPDIR:-/tmp}}/valar-size.XXXXXX")
trap 'rm -rf "$folder"' EXIT
cd "$folder"
TIMEFORMAT='%R'

peak() { awk -F '[:,]' '/"peak_memory_bytes"/ { print int($2 / 1048576) }' "$1"; }

[ $# -gt 0 ] || set -- 100000 1000000 10000000
for rows; do
  "$here/pipeline.sh" --make tokens "$rows" >in.jsonl
  run() { "$valar" run --engine null -q -i in.jsonl -o out.jsonl "$@" >>log 2>&1; }
  # A row is 102 tokens; a budget pauses the run, exit code 6.
  first=$( { time run --max-tokens $((rows * 99)) || [ $? = 6 ]; } 2>&1 )
  "$valar" status out.jsonl | sed -n 1,3p
  again=$( { time run --max-tokens 1 || [ $? = 6 ]; } 2>&1 )
  rest=$( { time run; } 2>&1 )
  n=$(awk 'match($0, /"custom_id":"row-[0-9]+"/) && substr($0, RSTART + 17, RLENGTH - 18) == NR - 1 { good++ } END { print good + 0 }' out.jsonl)
  [ "$n" = "$rows" ] && [ ! -s out.errors.jsonl ] || { echo "WRONG: $n of $rows rows"; exit 1; }
  echo "$rows rows in three runs: $first s to 97 %, $again s to go on and pause, $rest s for the rest; peak of the last $(peak out.report.json) MiB"
  rm -rf out.* in.jsonl
  VALAR=$valar BENCH_FOLDER=$folder "$here/pipeline.sh" "$rows" tokens 2>/dev/null | sed -n 1p
done

if [ -n "${PYTHON:-}" ]; then
  for rows in 50000 500000 1000000; do
    "$PYTHON" - "$rows" <<'PY'
import sys, pyarrow as pa, pyarrow.parquet as pq
rows, group = int(sys.argv[1]), 500_000
writer = None
for start in range(0, rows, group):
    n = range(start, min(rows, start + group))
    table = pa.table({"q": [f"row {i}" for i in n], "big": [f"{i:08}" * 256 for i in n]})
    writer = writer or pq.ParquetWriter("in.parquet", table.schema, compression="none", use_dictionary=False)
    writer.write_table(table, row_group_size=group)
writer.close()
PY
    printf '[input]\nfiles = ["in.parquet"]\n[prompt]\nuser = "{{ q }}"\n[output]\nfile = "out.parquet"\n' >big.toml
    took=$( { time "$valar" run big.toml --engine null -q >>log 2>&1; } 2>&1 )
    echo "$rows rows with strings of 2 KB in row groups of 1 GB: $took s; peak memory $(peak out.report.json) MiB"
    rm -rf out.* in.parquet
  done
fi

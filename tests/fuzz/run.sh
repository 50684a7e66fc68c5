#!/usr/bin/env bash
# Fuzzes every parser of what comes from outside (tests/fuzz/parsers.rs) with libFuzzer for some seconds each, beginning with
# the corpus; what it finds that reaches new code goes to target/fuzz/corpus. A crash, more than 10 seconds for one input, more
# than 1 GiB of memory (4 for Parquet) or 256 MiB in one piece (2 GiB) end it with an error and leave the input in
# tests/fuzz/artifacts. Needs a C++ compiler; installs cargo-fuzz into target/tools; the first build takes half an hour on two
# cores.
#
# usage: tests/fuzz/run.sh [SECONDS [PARSER…]]     (60, all)
set -euo pipefail
cd "$(dirname "$0")/../.."
seconds=${1:-60}
shift $(($# < 1 ? $# : 1))
fuzz=target/tools/bin/cargo-fuzz version=0.13.2
"$fuzz" --version 2>/dev/null | grep -qF "$version" || cargo install --quiet --locked --root target/tools --version "$version" cargo-fuzz
cp Cargo.lock tests/fuzz/ # the very libraries that valar is built with
cd tests/fuzz
# Without a sanitizer the stable compiler will do; what is unsafe in valar lies behind none of these parsers.
cargo_fuzz() { "../../$fuzz" fuzz "$1" --fuzz-dir . --sanitizer none --codegen-units 8 --target-dir ../../target/fuzz "${@:2}"; }
[ $# -gt 0 ] || set -- $(sed -n 's/^name = "\(.*\)"$/\1/p' Cargo.toml | grep -v valar-fuzz)
for parser; do
  echo "== $parser"
  found=../../target/fuzz/corpus/$parser rss_mib=1024
  [ "$parser" = rows_parquet ] && rss_mib=4096
  mkdir -p "$found"
  cargo_fuzz run "$parser" "$found" "corpus/$parser" -- -max_total_time="$seconds" -timeout=10 -rss_limit_mb=$rss_mib -print_final_stats=1
done

#!/usr/bin/env bash
# Compiles the CPU device for AArch64 (this folder is a crate of it alone) and runs the device's conformance tests there, in QEMU:
# all of them on a processor with every path, a few on two that have fewer.
#
# Installs nothing. Needs
#   a Rust compiler with the standard library of aarch64-unknown-linux-gnu: `rustup target add aarch64-unknown-linux-gnu`, or
#     Debian's rustc-web and libstd-rust-web-dev:arm64 (1.95 or later; RUSTC names the compiler if it is not `rustc`);
#   a linker and libraries: Debian's gcc-aarch64-linux-gnu (LINKER names it if it is not `aarch64-linux-gnu-gcc`);
#   an emulator, 7.0 or later: Debian's qemu-user or qemu-user-static (QEMU names it if it is neither's `qemu-aarch64`).
#
# usage: tests/neon/run.sh [NAME…]     (tests whose names contain one of these, on the first processor; all)
set -euo pipefail
cd "$(dirname "$0")/../.."
target=aarch64-unknown-linux-gnu
rustc=${RUSTC:-rustc}
linker=${LINKER:-aarch64-linux-gnu-gcc}
qemu=${QEMU:-$(command -v qemu-aarch64 || command -v qemu-aarch64-static || echo qemu-aarch64)}

missing() {
  echo "tests/neon/run.sh: $1" >&2
  exit 2
}
[ -d "$("$rustc" --print target-libdir --target $target)" ] ||
  missing "$rustc has no standard library of $target: rustup target add $target, or Debian's rustc-web and libstd-rust-web-dev:arm64"
command -v "$linker" >/dev/null || missing "$linker is not there: apt-get install gcc-aarch64-linux-gnu"
command -v "$qemu" >/dev/null || missing "$qemu is not there: apt-get install qemu-user"

cp Cargo.lock tests/neon/ # the very libraries that valar is built with
cd tests/neon
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=$linker
# Whole programs: the emulator needs no libraries.
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUSTFLAGS="-C target-feature=+crt-static"

# on PROCESSOR PATHS [NAME…]: what it must find that it has, and the tests.
on() {
  echo "== $1: $2"
  CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="$qemu -cpu $1" VALAR_NEON_PATHS=$2 \
    cargo test --lib --target $target --target-dir ../../target/neon -- "${@:3}"
}
on max "neon-i8mm neon-dotprod neon portable" "$@"
on neoverse-n1 "neon-dotprod neon portable" paths_are_found same_on_every_instruction_set
on cortex-a72 "neon portable" paths_are_found same_on_every_instruction_set

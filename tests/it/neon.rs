//! The CPU device on ARM, in an emulator.

use std::process::Command;

#[test]
#[ignore = "needs a compiler and an emulator of AArch64, and takes minutes"]
fn every_path_of_aarch64_gives_the_same_bits() {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/neon/run.sh");
    let status = Command::new(script).status().unwrap();
    assert!(status.success(), "tests/neon/run.sh: {status}");
}

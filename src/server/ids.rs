//! Names of things, and seeds. Invariant: nobody can guess one from another.

/// A new id: the prefix, `_` or `-` included, and 32 hexadecimal digits.
pub fn new(prefix: &str) -> String {
    format!("{prefix}{}", fresh())
}

/// The digits of a new id.
pub fn fresh() -> String {
    format!("{:032x}", u128::from_le_bytes(random()))
}

/// A seed that survives JSON readers that keep numbers as doubles: 53 bits.
pub fn seed() -> u64 {
    u64::from_le_bytes(random()) >> 11
}

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).expect("the system gives random bytes");
    bytes
}

//! Names of things, and seeds. Invariant: nobody can guess one from another.

/// A new id: the prefix, `_` or `-` included, and 32 hexadecimal digits.
pub fn new(prefix: &str) -> String {
    format!("{prefix}{}", fresh())
}

/// The digits of a new id.
pub fn fresh() -> String {
    format!("{:032x}", u128::from_le_bytes(random()))
}

/// The digits of an id that follows from what a thing is, and from what it is to be used for.
pub fn derived(context: &str, thing: &[u8]) -> String {
    let key = blake3::derive_key(context, thing);
    let (digits, _) = key.split_first_chunk().expect("a key has 32 bytes");
    format!("{:032x}", u128::from_le_bytes(*digits))
}

/// A seed that survives JSON readers that keep numbers as doubles: 53 bits.
pub fn seed() -> u64 {
    u64::from_le_bytes(random()) >> 11
}

/// A key that nobody guesses, and what it is known by.
pub fn new_key() -> (String, String) {
    let key = new("sk-valar-");
    let hash = blake3::hash(key.as_bytes()).to_hex().to_string();
    (key, hash)
}

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).expect("the system gives random bytes");
    bytes
}

//! Packs: many results as one object that never changes. A mark, a hash of all that follows, the number of results, and these,
//! packed with Zstandard: each its key, its length and its bytes. Knows no store. Invariant: of a pack that is not, byte for
//! byte, what was written, nothing is used.

use std::collections::HashSet;
use std::io::{Read, Write};
use std::ops::Range;

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;

use super::stored::encode;
use super::{Key, is_number};
use crate::engine::Finished;

/// The form of packs, which stands in their names.
const FORM: u32 = 1;
const MARK: &[u8; 8] = b"valrpck1";
const HASH_BYTES: usize = 32;
const COUNT_BYTES: usize = 4;
/// What stands before the packed results.
const HEAD_BYTES: usize = MARK.len() + HASH_BYTES + COUNT_BYTES;
/// Before each result: its key and its length.
const ENTRY_HEAD_BYTES: usize = size_of::<Key>() + 4;
/// What a result takes in a copy besides itself, about: key, time, and their indexes.
const ENTRY_BYTES: u64 = 100;
/// A pack is full when its results take so many bytes in a copy.
const FULL_BYTES: u64 = 32 << 20;
/// What a whole pack may take there, unpack to, or be: what is more was not written by us.
pub(super) const MAX_BYTES: u64 = 2 * FULL_BYTES;

/// What a pack's name says of it; each is unlike all others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PackName {
    pub(super) kind: String,
    pub(super) n_results: u64,
    /// What its results take in a copy, about: what counts for the bound, so that it means the same everywhere.
    pub(super) n_bytes: u64,
}

impl PackName {
    /// A new name for a pack of results of this kind.
    pub(super) fn create(kind: &str, n_results: u32, n_bytes: u64) -> String {
        let mut random = [0; 16];
        getrandom::fill(&mut random).expect("the system gives random bytes");
        format!("results-{FORM}-{kind}-{n_results}-{n_bytes}-{:032x}.pack", u128::from_be_bytes(random))
    }

    /// `None` if that is no name of ours, in this form.
    pub(super) fn parse(name: &str) -> Option<Self> {
        let fields: Vec<&str> = name.strip_suffix(".pack")?.split('-').collect();
        let ["results", form, kind, n_results, n_bytes, _random] = fields[..] else { return None };
        let name = Self { kind: kind.to_owned(), n_results: n_results.parse().ok()?, n_bytes: n_bytes.parse().ok()? };
        (form.parse() == Ok(FORM) && name.n_bytes <= MAX_BYTES && name.n_results <= MAX_BYTES).then_some(name)
    }

    /// Whether it is a name of ours, in whatever form.
    pub(super) fn is_ours(name: &str) -> bool {
        // As exact as forms to come allow: what is ours may be deleted.
        let fields: Vec<&str> = name.strip_suffix(".pack").map(|name| name.split('-').collect()).unwrap_or_default();
        matches!(fields[..], ["results", form, _, _, _, _] if is_number(form))
    }
}

/// A pack being made, compressed as it grows.
pub struct PackBuilder {
    packed: zstd::Encoder<'static, Vec<u8>>,
    keys: HashSet<Key>,
    n_bytes: u64,
    full_bytes: u64,
}

impl PackBuilder {
    /// An empty one for a cache of that many bytes, of which a pack takes a quarter at most.
    ///
    /// # Errors
    /// Memory for the encoder is missing.
    pub fn new(max_bytes: u64) -> Result<Self> {
        let packed = zstd::Encoder::new(vec![0; HEAD_BYTES], zstd::DEFAULT_COMPRESSION_LEVEL).context("cannot make a pack")?;
        Ok(Self { packed, keys: HashSet::new(), n_bytes: 0, full_bytes: FULL_BYTES.min(max_bytes / 4) })
    }

    /// Adds a result, unless it is there, broken, or larger than a pack may be.
    ///
    /// # Errors
    /// The encoder's.
    pub fn add(&mut self, key: &Key, finished: &Finished) -> Result<()> {
        if finished.broken.is_some() || self.keys.contains(key) {
            return Ok(());
        }
        let result = encode(key, finished);
        let n_bytes = ENTRY_BYTES + result.len() as u64;
        if n_bytes > self.full_bytes {
            return Ok(());
        }
        self.packed.write_all(key)?;
        self.packed.write_all(&(result.len() as u32).to_le_bytes())?;
        self.packed.write_all(&result)?;
        self.keys.insert(*key);
        self.n_bytes += n_bytes;
        Ok(())
    }

    /// Whether it should be sealed before more is added.
    pub fn is_full(&self) -> bool {
        self.n_bytes >= self.full_bytes
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// A new name and the whole content, for a pack of this kind.
    pub(super) fn seal(self, kind: &str) -> Result<(String, Bytes)> {
        let n_results = self.keys.len() as u32;
        let mut pack = self.packed.finish()?;
        pack[HEAD_BYTES - COUNT_BYTES..HEAD_BYTES].copy_from_slice(&n_results.to_le_bytes());
        let hash = blake3::hash(&pack[HEAD_BYTES - COUNT_BYTES..]);
        pack[..MARK.len()].copy_from_slice(MARK);
        pack[MARK.len()..MARK.len() + HASH_BYTES].copy_from_slice(hash.as_bytes());
        Ok((PackName::create(kind, n_results, self.n_bytes), pack.into()))
    }
}

/// A pack that was read and is whole.
#[derive(Debug)]
pub(super) struct Pack {
    raw: Vec<u8>,
    results: Vec<(Key, Range<usize>)>,
}

impl Pack {
    /// Reads all of it.
    ///
    /// # Errors
    /// It is none, or damaged.
    pub(super) fn read(pack: &[u8]) -> Result<Self> {
        let (mark, rest) = pack.split_first_chunk().context("it is no pack of results")?;
        ensure!(mark == MARK, "it is no pack of results");
        let (hash, rest) = rest.split_first_chunk::<HASH_BYTES>().context("it is cut off")?;
        ensure!(blake3::hash(rest).as_bytes() == hash, "it is damaged");
        let (n_results, packed) = rest.split_first_chunk().context("it is cut off")?;
        let mut raw = Vec::new();
        let unpacked = zstd::Decoder::new(packed)?.take(MAX_BYTES + 1).read_to_end(&mut raw);
        unpacked.context("it can't be unpacked")?;
        ensure!(raw.len() as u64 <= MAX_BYTES, "it unpacks to more than {MAX_BYTES} bytes");
        let results = Self::cut(&raw, u32::from_le_bytes(*n_results)).context("its results can't be told apart")?;
        Ok(Self { raw, results })
    }

    fn cut(raw: &[u8], n_results: u32) -> Option<Vec<(Key, Range<usize>)>> {
        let mut results = Vec::new();
        let mut start = 0;
        while start < raw.len() {
            let (key, rest) = raw[start..].split_first_chunk()?;
            let (n_bytes, rest) = rest.split_first_chunk()?;
            let n_bytes = u32::from_le_bytes(*n_bytes) as usize;
            rest.get(..n_bytes)?;
            let first = start + ENTRY_HEAD_BYTES;
            start = first + n_bytes;
            results.push((*key, first..start));
        }
        (results.len() == n_results as usize).then_some(results)
    }

    /// Each key and the bytes of its result.
    pub(super) fn results(&self) -> impl Iterator<Item = (&Key, &[u8])> {
        self.results.iter().map(|(key, range)| (key, &self.raw[range.clone()]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outcome::FinishReason;

    fn finished(text: &str) -> Finished {
        let finish_reason = FinishReason::Stop;
        Finished { id: 1, tokens: vec![1, 2], text: text.to_owned(), finish_reason, logprobs: Vec::new(), broken: None }
    }

    #[test]
    fn a_pack_is_read_whole_or_not_at_all() {
        let mut builder = PackBuilder::new(1 << 20).unwrap();
        assert!(builder.is_empty());
        builder.add(&[1; 16], &finished("a")).unwrap();
        builder.add(&[1; 16], &finished("there already")).unwrap();
        builder.add(&[2; 16], &Finished { broken: Some("NaN".into()), ..finished("b") }).unwrap();
        builder.add(&[3; 16], &finished(&"too long ".repeat(40_000))).unwrap();
        builder.add(&[4; 16], &finished("d")).unwrap();
        assert!(!builder.is_full());
        let (name, whole) = builder.seal("0123456789abcdef").unwrap();
        let n_bytes = 2 * (100 + encode(&[1; 16], &finished("a")).len() as u64);
        assert_eq!(PackName::parse(&name).unwrap(), PackName { kind: "0123456789abcdef".into(), n_results: 2, n_bytes });
        let pack = Pack::read(&whole).unwrap();
        let wanted = [([1; 16], encode(&[1; 16], &finished("a"))), ([4; 16], encode(&[4; 16], &finished("d")))];
        assert!(pack.results().eq(wanted.iter().map(|(key, result)| (key, &result[..]))));
        for i in 0..whole.len() {
            assert!(Pack::read(&whole[..i]).is_err(), "cut off after {i} bytes");
            let mut damaged = whole.to_vec();
            damaged[i] ^= 1;
            assert!(Pack::read(&damaged).is_err(), "damaged at byte {i}");
        }
        assert!(Pack::read(&[&whole[..], b"x"].concat()).is_err(), "something follows it");
    }

    #[test]
    fn names_are_unlike_and_those_of_others_are_told_apart() {
        let [one, other] = [(); 2].map(|()| PackName::create("k", 7, 1000));
        assert!(one != other && PackName::is_ours(&one));
        let later = one.replace("results-1-", "results-2-");
        assert!(PackName::parse(&later).is_none() && PackName::is_ours(&later));
        for foreign in [
            "",
            "results.pack",
            "notes.txt",
            "results-1-k-7-9-0.sqlite",
            "results-1-k-many-9-0.pack",
            "results-1-k-7-9999999999-0.pack",
        ] {
            assert!(PackName::parse(foreign).is_none(), "{foreign}");
        }
        for users in
            ["results.pack", "results-final.pack", "results-2024.pack", "results-a-b-c-d-e.pack", "results--k-7-9-0.pack"]
        {
            assert!(!PackName::is_ours(users), "{users}");
        }
    }
}

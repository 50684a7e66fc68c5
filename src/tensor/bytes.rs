//! Bytes of tensors: those of a file, or such as are made of a file's when they are first read. Knows nothing of types.

use std::fmt;
use std::ops::{Deref, Range};
use std::sync::{Arc, OnceLock};

/// Bytes that are there, or can be made. What was made lives as long as a copy of these bytes, so that no more of a model than is
/// being loaded is in memory.
#[derive(Clone)]
pub struct Bytes<'a> {
    source: Source<'a>,
    /// The part of the source that is meant.
    range: Range<usize>,
}

#[derive(Clone)]
enum Source<'a> {
    There(&'a [u8]),
    Made(Arc<Made<'a>>),
}

struct Made<'a> {
    bytes: OnceLock<Vec<u8>>,
    make: Box<dyn Fn() -> Vec<u8> + Send + Sync + 'a>,
}

impl<'a> Bytes<'a> {
    /// `n` bytes that `make` gives, called when they are first read.
    pub fn made(n: usize, make: impl Fn() -> Vec<u8> + Send + Sync + 'a) -> Self {
        Self { source: Source::Made(Arc::new(Made { bytes: OnceLock::new(), make: Box::new(make) })), range: 0..n }
    }

    /// How many there are; makes none.
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// Whether there are none; makes none.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// Makes them now, if they are not there. Making may share its work among `rayon`'s threads: read first inside one of their jobs,
    /// it could take up another job that waits for the same bytes, for ever. Whoever reads them in such jobs calls this before.
    pub fn make(&self) {
        _ = &**self;
    }

    /// A part of them; makes none.
    ///
    /// # Panics
    /// If it reaches past the end.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len(), "bytes {range:?} of {}", self.len());
        let start = self.range.start;
        Self { source: self.source.clone(), range: start + range.start..start + range.end }
    }
}

impl Deref for Bytes<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.source {
            Source::There(bytes) => &bytes[self.range.clone()],
            Source::Made(made) => &made.bytes.get_or_init(|| (made.make)())[self.range.clone()],
        }
    }
}

impl<'a> From<&'a [u8]> for Bytes<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        Self { source: Source::There(bytes), range: 0..bytes.len() }
    }
}

impl<'a> From<&'a Vec<u8>> for Bytes<'a> {
    fn from(bytes: &'a Vec<u8>) -> Self {
        bytes.as_slice().into()
    }
}

impl fmt::Debug for Bytes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.len())
    }
}

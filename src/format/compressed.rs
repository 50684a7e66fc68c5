//! Compressed bytes in and out. Knows nothing of lines. Invariants: memory does not grow with the file, whatever it claims
//! to hold; what is cut off or damaged is an error that names the file, never a shorter file.

use std::io::{self, BufReader, Read, Write};

use anyhow::{Context as _, Result, bail};
use bytes::{Buf as _, Bytes};
use flate2::bufread::MultiGzDecoder;
use flate2::write::GzEncoder;

use crate::storage::{Object, Upload, Written};

/// How the bytes of a file are packed; its extension decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// RFC 1952, any number of members (`.gz`).
    Gzip,
    /// RFC 8878, any number of frames (`.zst`).
    Zstd,
}

/// How much is unpacked at once, bytes.
const CHUNK_BYTES: usize = 1 << 20;

/// The largest window a zstd frame may ask for, as a power of two: 128 MiB, what the zstd program takes unasked.
const MAX_WINDOW_LOG: u32 = 27;

/// A file's bytes, unpacked, chunk by chunk.
pub(super) struct Chunks {
    object: Object,
    unpacked: Unpacked,
    /// Bytes given out so far.
    offset: u64,
}

enum Unpacked {
    Plain,
    Gzip(Box<MultiGzDecoder<BufReader<ObjectRead>>>),
    Zstd(Box<zstd::Decoder<'static, BufReader<ObjectRead>>>),
}

impl Chunks {
    pub(super) fn new(object: Object, compression: Compression) -> Result<Self> {
        let packed = BufReader::with_capacity(CHUNK_BYTES / 4, ObjectRead::new(object.clone()));
        let unpacked = match compression {
            Compression::None => Unpacked::Plain,
            Compression::Gzip => Unpacked::Gzip(Box::new(MultiGzDecoder::new(packed))),
            Compression::Zstd => {
                let mut decoder = zstd::Decoder::with_buffer(packed).context("can't start the zstd decoder")?;
                decoder.window_log_max(MAX_WINDOW_LOG).context("can't set up the zstd decoder")?;
                Unpacked::Zstd(Box::new(decoder))
            }
        };
        Ok(Self { object, unpacked, offset: 0 })
    }

    /// Of a file that is not packed, from this byte on.
    pub(super) fn from(object: Object, offset: u64) -> Result<Self> {
        Ok(Self { offset, ..Self::new(object, Compression::None)? })
    }

    /// Bytes given out so far, unpacked.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    pub(super) fn object(&self) -> &Object {
        &self.object
    }

    /// The next few megabytes; empty at the end.
    pub(super) fn next_chunk(&mut self) -> Result<Bytes> {
        let (name, read): (_, &mut dyn Read) = match &mut self.unpacked {
            Unpacked::Plain => {
                let chunk = self.object.chunk(self.offset)?;
                self.offset += chunk.len() as u64;
                return Ok(chunk);
            }
            Unpacked::Gzip(decoder) => ("gzip", decoder),
            Unpacked::Zstd(decoder) => ("zstd", decoder),
        };
        let mut chunk = Vec::with_capacity(CHUNK_BYTES);
        match read.take(CHUNK_BYTES as u64).read_to_end(&mut chunk) {
            Ok(_) => {}
            // The store's own message says more than the decoder's.
            Err(error) if error.get_ref().and_then(|inner| inner.downcast_ref::<StoreError>()).is_some() => {
                return Err(error).context("can't read a compressed file");
            }
            Err(error) => {
                let (url, offset) = (self.object.url(), self.offset + chunk.len() as u64);
                let what = if error.kind() == io::ErrorKind::UnexpectedEof { "is cut off" } else { "is damaged" };
                bail!("{url} {what}: its {name} stream ends in an error after {offset} unpacked bytes: {error}");
            }
        }
        self.offset += chunk.len() as u64;
        Ok(chunk.into())
    }
}

impl std::fmt::Debug for Chunks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Chunks").field("url", self.object.url()).field("offset", &self.offset).finish_non_exhaustive()
    }
}

/// What a store said, on its way through a decoder.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct StoreError(String);

/// An object as a stream of bytes.
struct ObjectRead {
    object: Object,
    offset: u64,
    rest: Bytes,
}

impl ObjectRead {
    fn new(object: Object) -> Self {
        Self { object, offset: 0, rest: Bytes::new() }
    }
}

impl Read for ObjectRead {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.rest.is_empty() {
            let read = self.object.chunk(self.offset);
            self.rest = read.map_err(|error| io::Error::other(StoreError(format!("{error:#}"))))?;
            self.offset += self.rest.len() as u64;
        }
        let n = into.len().min(self.rest.len());
        into[..n].copy_from_slice(&self.rest[..n]);
        self.rest.advance(n);
        Ok(n)
    }
}

/// Writes an object, packed. The same bytes in make the same bytes out: no clock and no name goes in.
pub enum Packer {
    /// As they are.
    Plain(Upload),
    /// One gzip member.
    Gzip(GzEncoder<Upload>),
    /// One zstd frame.
    Zstd(zstd::Encoder<'static, Upload>),
}

impl Packer {
    pub(super) fn new(upload: Upload, compression: Compression) -> Result<Self> {
        Ok(match compression {
            Compression::None => Self::Plain(upload),
            Compression::Gzip => Self::Gzip(GzEncoder::new(upload, flate2::Compression::default())),
            Compression::Zstd => {
                let mut encoder = zstd::Encoder::new(upload, zstd::DEFAULT_COMPRESSION_LEVEL)?;
                encoder.include_checksum(true)?;
                Self::Zstd(encoder)
            }
        })
    }

    pub(super) fn publish(self) -> Result<Written> {
        let upload = match self {
            Self::Plain(upload) => upload,
            Self::Gzip(encoder) => encoder.finish()?,
            Self::Zstd(encoder) => encoder.finish()?,
        };
        upload.publish()
    }
}

impl Write for Packer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(upload) => upload.write(bytes),
            Self::Gzip(encoder) => encoder.write(bytes),
            Self::Zstd(encoder) => encoder.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(upload) => upload.flush(),
            Self::Gzip(encoder) => encoder.flush(),
            Self::Zstd(encoder) => encoder.flush(),
        }
    }
}

impl std::fmt::Debug for Packer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Plain(_) => "Plain",
            Self::Gzip(_) => "Gzip",
            Self::Zstd(_) => "Zstd",
        })
    }
}

//! Writing one object of any size in bounded memory. Invariant: nothing is visible under the object's name until
//! [`Upload::publish`], and nothing stays behind if that is never reached.

use std::io;

use anyhow::{Context as _, Result};
use bytes::Bytes;
use object_store::{MultipartUpload, ObjectStoreExt as _, PutPayload};

use super::{Location, Storage};

/// An object being written, at most one part of it in memory. Small objects become a single put.
#[derive(Debug)]
pub struct Upload {
    storage: Storage,
    at: Location,
    /// Begun with the first full part.
    multipart: Option<Box<dyn MultipartUpload>>,
    part: Vec<u8>, // at most `part_bytes` of the storage
}

impl Upload {
    pub(super) fn new(storage: Storage, at: Location) -> Self {
        Self { storage, at, multipart: None, part: Vec::new() }
    }

    /// Makes the object appear under its name, complete and durable.
    pub fn publish(mut self) -> Result<()> {
        if self.multipart.is_none() {
            let content = Bytes::from(std::mem::take(&mut self.part));
            return self.storage.put(&self.at, content);
        }
        if !self.part.is_empty() {
            self.send_part().map_err(|e| self.failed(e))?;
        }
        let multipart = self.multipart.as_mut().expect("checked above");
        let completed = self.storage.wait(multipart.complete());
        completed.with_context(|| format!("can't write {}", self.at.url))?;
        self.multipart = None;
        Ok(())
    }

    fn send_part(&mut self) -> object_store::Result<()> {
        let content = Bytes::from(std::mem::replace(&mut self.part, Vec::with_capacity(self.storage.part_bytes)));
        if self.multipart.is_none() {
            self.multipart = Some(self.storage.wait(self.at.store.put_multipart(&self.at.path))?);
        }
        let multipart = self.multipart.as_mut().expect("begun above");
        self.storage.wait(async { multipart.put_part(PutPayload::from_bytes(content)).await })
    }

    fn failed(&self, error: object_store::Error) -> anyhow::Error {
        anyhow::Error::new(error).context(format!("can't write {}", self.at.url))
    }
}

impl io::Write for Upload {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(self.storage.part_bytes - self.part.len());
        self.part.extend_from_slice(&bytes[..taken]);
        if self.part.len() == self.storage.part_bytes {
            self.send_part().map_err(|e| io::Error::other(self.failed(e)))?;
        }
        Ok(taken)
    }

    /// Does nothing: parts are sent when full, and only [`Upload::publish`] makes anything durable.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if let Some(mut multipart) = self.multipart.take() {
            // Nobody is left to tell if this fails too: the next writer's sweep removes what stayed.
            self.storage.wait(multipart.abort()).ok();
        }
    }
}

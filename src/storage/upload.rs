//! Writing one object of any size in bounded memory. Invariant: nothing is visible under the object's name until
//! [`Upload::publish`], and nothing stays behind if that is never reached (but for parts in a remote store if the process is
//! killed: stores are told to expire them).

use std::borrow::Cow;
use std::hash::{BuildHasher as _, RandomState};
use std::io;

use anyhow::Result;
use bytes::Bytes;
use object_store::{Attribute, AttributeValue, GetOptions, MultipartUpload, PutMultipartOptions, PutPayload};
use tokio::task::JoinHandle;

use super::remote::tell;
use super::{Location, Storage};

/// Where an object's metadata says which upload wrote it.
const MARK: Attribute = Attribute::Metadata(Cow::Borrowed("valarupload"));

/// An object being written, at most one part of it in memory. Small objects become a single put.
#[derive(Debug)]
pub struct Upload {
    storage: Storage,
    at: Location,
    /// Begun with the first full part.
    multipart: Option<Box<dyn MultipartUpload>>,
    /// The part that is being written, while the next one is filled.
    under_way: Option<JoinHandle<object_store::Result<()>>>,
    /// Unlike that of any other upload.
    mark: String,
    part: Vec<u8>, // at most `part_bytes` of the storage
}

impl Upload {
    pub(super) fn new(storage: Storage, at: Location) -> Self {
        // Two hashers are seeded apart by the system's randomness.
        let [high, low] = [(); 2].map(|()| RandomState::new().hash_one(std::process::id()));
        Self { storage, at, multipart: None, under_way: None, mark: format!("{high:016x}{low:016x}"), part: Vec::new() }
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
        self.wait_for_part().map_err(|e| self.failed(e))?;
        let multipart = self.multipart.as_mut().expect("checked above");
        let completed = self.storage.wait(multipart.complete());
        if let Err(error) = completed {
            // Completing is tried again inside: where the first answer was lost, the second says that there is no such
            // upload. Then the object is there, and carries this upload's mark.
            if !self.is_there() {
                return Err(self.failed(error));
            }
        }
        self.multipart = None;
        Ok(())
    }

    /// Whether the object at the place is this upload's. Only remote stores lose answers.
    fn is_there(&self) -> bool {
        let options = GetOptions { head: true, ..GetOptions::default() };
        let found =
            self.at.is_remote().then(|| self.storage.patiently(|| self.at.store.get_opts(&self.at.path, options.clone())));
        found.is_some_and(|found| found.is_ok_and(|found| found.attributes.get(&MARK).is_some_and(|mark| **mark == *self.mark)))
    }

    /// What the object is begun with.
    fn options(&self) -> PutMultipartOptions {
        let mark = self.at.is_remote().then(|| (MARK, AttributeValue::from(self.mark.clone())));
        PutMultipartOptions { attributes: mark.into_iter().collect(), ..PutMultipartOptions::default() }
    }

    /// Begins to write the part; the one before is written then.
    fn send_part(&mut self) -> object_store::Result<()> {
        self.wait_for_part()?;
        let content = Bytes::from(std::mem::replace(&mut self.part, Vec::with_capacity(self.storage.part_bytes)));
        if self.multipart.is_none() {
            self.multipart = Some(self.storage.wait(self.at.store.put_multipart_opts(&self.at.path, self.options()))?);
        }
        let multipart = self.multipart.as_mut().expect("begun above");
        self.under_way = Some(self.storage.runtime.spawn(multipart.put_part(PutPayload::from_bytes(content))));
        Ok(())
    }

    fn wait_for_part(&mut self) -> object_store::Result<()> {
        let Some(part) = self.under_way.take() else { return Ok(()) };
        self.storage.wait(part)?
    }

    fn failed(&self, error: object_store::Error) -> anyhow::Error {
        tell(error).context(format!("can't write {}", self.at.url))
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
            self.wait_for_part().ok();
            // Nobody is left to tell if this fails too: the next writer's sweep removes what stayed.
            self.storage.wait(multipart.abort()).ok();
        }
    }
}

//! Writing one object of any size in bounded memory. Invariant: nothing is visible under the object's name until
//! [`Upload::publish`], and nothing stays behind if that is never reached (but for parts in a remote store if the process is
//! killed: whoever was told of the upload can break it off, or the store is told to expire them).

use std::borrow::Cow;
use std::fmt;
use std::fs::File;
use std::hash::{BuildHasher as _, RandomState};
use std::io;
use std::sync::Arc;

use anyhow::Result;
use bytes::Bytes;
use object_store::multipart::PartId;
use object_store::{Attribute, AttributeValue, GetOptions, MultipartUpload, PutMultipartOptions, PutPayload};
use tokio::task::JoinHandle;

use super::location::Uploads;
use super::remote::tell;
use super::{Location, Storage, cache};

/// Whoever must know of uploads that are under way.
pub trait Hear: Send + Sync {
    /// Told of an upload's place and id before it has a part; an error ends the upload.
    fn begun(&self, at: &Location, id: &str) -> Result<()>;

    /// The upload is the object now: nothing is under way by this id any more.
    fn completed(&self, id: &str);

    /// Whether others write here, too, from whom only an upload's id tells this writer: they break it off.
    fn is_shared(&self) -> bool;
}

/// See [`Hear`].
#[derive(Clone)]
pub struct Announce(pub Arc<dyn Hear>);

impl fmt::Debug for Announce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Announce")
    }
}

/// What an upload has written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// Size of the object, bytes.
    pub n_bytes: u64,
    /// Hash of its content, hexadecimal, if it was asked for.
    pub blake3: Option<String>,
}

/// Where an object's metadata says which upload wrote it.
const MARK: Attribute = Attribute::Metadata(Cow::Borrowed("valarupload"));

/// An object being written, at most one part of it in memory. Small objects become a single put.
#[derive(Debug)]
pub struct Upload {
    storage: Storage,
    at: Location,
    /// Begun with the first full part; an announced one in any case.
    sending: Option<Sending>,
    /// The part that is being written, while the next one is filled.
    under_way: Option<JoinHandle<object_store::Result<()>>>,
    /// Writes of a local file to the disk, so that little is left to be synced when all is there.
    syncing: Option<JoinHandle<()>>,
    /// Unlike that of any other upload.
    mark: String,
    part: Vec<u8>, // at most `part_bytes` of the storage
    n_bytes: u64,
    hasher: Option<Box<blake3::Hasher>>,
}

/// An upload that has begun.
#[derive(Debug)]
enum Sending {
    Unnamed(Box<dyn MultipartUpload>),
    Named { uploads: Uploads, id: String, parts: Vec<PartId> },
}

impl Upload {
    pub(super) fn new(storage: Storage, at: Location) -> Self {
        // Two hashers are seeded apart by the system's randomness.
        let [high, low] = [(); 2].map(|()| RandomState::new().hash_one(std::process::id()));
        let mark = format!("{high:016x}{low:016x}");
        Self { storage, at, sending: None, under_way: None, syncing: None, mark, part: Vec::new(), n_bytes: 0, hasher: None }
    }

    /// The same, with the hash of what is written from now on.
    #[must_use]
    pub fn hashed(mut self) -> Self {
        self.hasher = Some(Box::default());
        self
    }

    /// Makes the object appear under its name, complete and durable.
    pub fn publish(mut self) -> Result<Written> {
        self.complete()?;
        let blake3 = self.hasher.take().map(|hasher| hasher.finalize().to_hex().to_string());
        Ok(Written { n_bytes: self.n_bytes, blake3 })
    }

    fn complete(&mut self) -> Result<()> {
        // An empty object is an upload of one empty part where it must be one: not every store takes that (Garage does not).
        let is_upload = |(announce, _): (&Announce, _)| !self.part.is_empty() || announce.0.is_shared();
        if self.sending.is_none() && !self.announced().is_some_and(is_upload) {
            self.hash_part();
            let content = Bytes::from(std::mem::take(&mut self.part));
            return self.storage.put(&self.at, content);
        }
        if !self.part.is_empty() || self.sending.is_none() {
            self.send_part()?;
        }
        self.wait_for_part()?;
        let completed = match self.sending.as_mut().expect("a part was sent") {
            Sending::Unnamed(upload) => self.storage.wait(upload.complete()).map(drop),
            Sending::Named { uploads, id, parts } => {
                let complete = || uploads.0.complete_multipart(&self.at.path, id, parts.clone());
                self.storage.patiently(complete).map(drop)
            }
        };
        if let Err(error) = completed {
            // Completing is tried again inside: where the first answer was lost, the second says that there is no such
            // upload. Then the object is there, and carries this upload's mark.
            if !self.is_there() {
                return Err(self.failed(error));
            }
        }
        if let Some(Sending::Named { id, .. }) = self.sending.take()
            && let Some((announce, _)) = self.announced()
        {
            announce.0.completed(&id);
        }
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

    /// Who must be told of this upload.
    fn announced(&self) -> Option<(&Announce, &Uploads)> {
        self.storage.announce.as_ref().zip(self.at.uploads.as_ref())
    }

    fn begin(&mut self) -> Result<()> {
        let Some((announce, uploads)) = self.announced() else {
            let begun = self.storage.wait(self.at.store.put_multipart_opts(&self.at.path, self.options()));
            self.sending = Some(Sending::Unnamed(begun.map_err(|e| self.failed(e))?));
            return Ok(());
        };
        let (announce, uploads) = (announce.clone(), uploads.clone());
        let begun = self.storage.patiently(|| uploads.0.create_multipart_opts(&self.at.path, self.options()));
        let id = begun.map_err(|e| self.failed(e))?;
        self.sending = Some(Sending::Named { uploads, id: id.clone(), parts: Vec::new() });
        announce.0.begun(&self.at, &id)
    }

    /// Sends the part; where it may end later, the one before has ended then.
    fn send_part(&mut self) -> Result<()> {
        self.wait_for_part()?;
        self.hash_part();
        let content = Bytes::from(std::mem::replace(&mut self.part, Vec::with_capacity(self.storage.part_bytes)));
        if self.sending.is_none() {
            self.begin()?;
        }
        let content = PutPayload::from_bytes(content);
        match self.sending.as_mut().expect("begun above") {
            Sending::Unnamed(upload) => self.under_way = Some(self.storage.runtime.spawn(upload.put_part(content))),
            Sending::Named { uploads, id, parts } => {
                let send = || uploads.0.put_part(&self.at.path, id, parts.len(), content.clone());
                let sent = self.storage.patiently(send).map(|part| parts.push(part));
                sent.map_err(|e| self.failed(e))?;
            }
        }
        Ok(())
    }

    /// A part at a time: a hash of small pieces takes several times as long.
    fn hash_part(&mut self) {
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&self.part);
        }
    }

    fn wait_for_part(&mut self) -> Result<()> {
        let Some(part) = self.under_way.take() else { return Ok(()) };
        self.storage.wait(part)?.map_err(|e| self.failed(e))?;
        self.sync_ahead();
        Ok(())
    }

    /// Has the disk begin with what was written of a local file, which then need not be cached. Only a hint: if the file is
    /// not where `object_store` 0.14 has it, or can't be synced now, all is left to the end.
    fn sync_ahead(&mut self) {
        let Some(path) = &self.at.local else { return };
        if self.syncing.as_ref().is_none_or(JoinHandle::is_finished) {
            let mut staged = path.as_os_str().to_owned();
            staged.push("#1");
            self.syncing = Some(self.storage.runtime.spawn_blocking(move || {
                if let Ok(file) = File::open(staged)
                    && file.sync_data().is_ok()
                {
                    cache::release(&file);
                }
            }));
        }
    }

    fn failed(&self, error: object_store::Error) -> anyhow::Error {
        tell(error).context(format!("can't write {}", self.at.url))
    }
}

impl io::Write for Upload {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(self.storage.part_bytes - self.part.len());
        self.part.extend_from_slice(&bytes[..taken]);
        self.n_bytes += taken as u64;
        if self.part.len() == self.storage.part_bytes {
            self.send_part().map_err(io::Error::other)?;
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
        // Nobody is left to tell if this fails too: the next writer removes what stayed.
        drop(self.wait_for_part());
        match self.sending.take() {
            Some(Sending::Unnamed(mut upload)) => drop(self.storage.wait(upload.abort())),
            Some(Sending::Named { id, .. }) => drop(self.storage.abort_upload(&self.at, &id)),
            None => {}
        }
    }
}

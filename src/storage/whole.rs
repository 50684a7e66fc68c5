//! Objects of web servers that give no parts of a file: fetched as a whole when a part is first asked for, into a temporary
//! file that has no name. The last few stay as long as the storage, for whoever opens the object again: a job reads each input a
//! few times.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{Seek as _, SeekFrom, Write as _};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result, anyhow, bail};
use bytes::Bytes;
use futures::StreamExt as _;
use object_store::{ObjectMeta, ObjectStoreExt as _};

use super::remote::tell;
use super::{Location, Object, PAUSES, broke_off};

/// The whole content of an object, once it was fetched.
pub(super) type WholeCopy = Arc<Mutex<Option<File>>>;

/// The last copies of a storage, by the objects' places and what tells their versions.
#[derive(Debug, Clone, Default)]
pub(super) struct Copies(Arc<Mutex<VecDeque<(String, WholeCopy)>>>);

/// Copies that are kept: each is an open file, and may be as large as an input.
const MAX_COPIES: usize = 8;

impl Copies {
    /// Where the copy of an object is or will be; of a store that gives parts, where none will be.
    pub(super) fn of(&self, at: &Location, meta: &ObjectMeta) -> WholeCopy {
        if !at.is_web() {
            return WholeCopy::default();
        }
        let ObjectMeta { e_tag, last_modified, size, .. } = meta;
        let version = format!("{} {} {last_modified} {size} {e_tag:?}", at.remote, at.path);
        let mut copies = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = copies.iter().position(|(other, _)| *other == version).and_then(|i| copies.remove(i));
        let (version, copy) = kept.unwrap_or_else(|| (version, WholeCopy::default()));
        copies.push_back((version, Arc::clone(&copy)));
        if copies.len() > MAX_COPIES {
            copies.pop_front();
        }
        copy
    }
}

/// What keeps a copy from being made.
enum Failure {
    Store(object_store::Error),
    Disk(std::io::Error),
    Changed,
}

impl Object {
    /// Bytes of the copy, if there is one.
    pub(super) fn range_of_copy(&self, range: &Range<u64>) -> Result<Option<Bytes>> {
        let copy = self.copy.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(file) = copy.as_ref() else { return Ok(None) };
        let mut bytes = vec![0; usize::try_from(range.end - range.start)?];
        file.read_exact_at(&mut bytes, range.start).with_context(|| format!("can't read the copy of {}", self.at.url))?;
        Ok(Some(bytes.into()))
    }

    /// Makes the copy, unless somebody else has meanwhile.
    pub(super) fn fetch_whole(&self) -> Result<()> {
        let mut copy = self.copy.lock().unwrap_or_else(PoisonError::into_inner);
        if copy.is_some() {
            return Ok(());
        }
        let url = &self.at.url;
        let no_room = || {
            format!("can't keep a copy of {url}, whose server gives no parts of a file, in {}", std::env::temp_dir().display())
        };
        let mut file = tempfile::tempfile().with_context(no_room)?;
        let mut pauses = PAUSES.iter();
        let n_bytes = loop {
            match self.storage.wait(self.fetch_into(&mut file)) {
                Ok(n_bytes) => break n_bytes,
                Err(Failure::Changed) => bail!("{url} changed while it was being read"),
                Err(Failure::Disk(e)) => return Err(anyhow!(e).context(no_room())),
                Err(Failure::Store(e)) => match pauses.next() {
                    Some(pause) if broke_off(&e) => std::thread::sleep(*pause),
                    _ => return Err(tell(e).context(format!("can't read {url}"))),
                },
            }
        };
        if n_bytes != self.meta.size {
            bail!("{url} changed while it was being read: it had {} bytes and has {n_bytes}", self.meta.size);
        }
        *copy = Some(file);
        Ok(())
    }

    async fn fetch_into(&self, file: &mut File) -> Result<u64, Failure> {
        file.seek(SeekFrom::Start(0)).and_then(|_| file.set_len(0)).map_err(Failure::Disk)?;
        let found = self.at.store.get(&self.at.path).await.map_err(Failure::Store)?;
        if (&found.meta.e_tag, found.meta.last_modified) != (&self.meta.e_tag, self.meta.last_modified) {
            return Err(Failure::Changed);
        }
        let mut body = found.into_stream();
        let mut n_bytes = 0;
        while let Some(bytes) = body.next().await {
            let bytes = bytes.map_err(Failure::Store)?;
            file.write_all(&bytes).map_err(Failure::Disk)?;
            n_bytes += bytes.len() as u64;
        }
        Ok(n_bytes)
    }
}

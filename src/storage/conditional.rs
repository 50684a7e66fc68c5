//! Objects that change only if they are what the writer thinks they are: the one thing on which several machines can agree
//! in a store. Invariant: what a put says was done was done; what it says was not may have been, if its answer was lost.

use anyhow::{Result, bail};
use bytes::Bytes;
use object_store::{Error, GetOptions, PutMode, PutOptions, PutPayload, UpdateVersion};

use super::remote::tell;
use super::{Location, PAUSES, Storage};

/// A version of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version(UpdateVersion);

impl Storage {
    /// The content of a small object and its version; `None` if there is none.
    pub fn get_version(&self, at: &Location) -> Result<Option<(Bytes, Version)>> {
        let got = self.patiently(|| async {
            let got = at.store.get_opts(&at.path, GetOptions::default()).await?;
            let version = UpdateVersion { e_tag: got.meta.e_tag.clone(), version: got.meta.version.clone() };
            Ok((got.bytes().await?, Version(version)))
        });
        match got {
            Ok(got) => Ok(Some(got)),
            Err(Error::NotFound { .. }) => Ok(None),
            Err(e) => Err(tell(e).context(format!("can't read {}", at.url))),
        }
    }

    /// Puts a small object if its version is still `over`, or with `None` if there is none. `None`: it was refused, because
    /// the object is another one, or because a first try had done it and its answer was lost.
    pub fn put_over(&self, at: &Location, content: &Bytes, over: Option<&Version>) -> Result<Option<Version>> {
        self.try_put(at, content, over).map_err(|e| tell(e).context(format!("can't write {}", at.url)))
    }

    fn try_put(&self, at: &Location, content: &Bytes, over: Option<&Version>) -> object_store::Result<Option<Version>> {
        let mode = over.map_or(PutMode::Create, |version| PutMode::Update(version.0.clone()));
        let (content, options) = (PutPayload::from_bytes(content.clone()), PutOptions::from(mode));
        match self.patiently(|| at.store.put_opts(&at.path, content.clone(), options.clone())) {
            Ok(put) => Ok(Some(Version(UpdateVersion { e_tag: put.e_tag, version: put.version }))),
            Err(Error::AlreadyExists { .. } | Error::Precondition { .. } | Error::NotModified { .. }) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Puts a small object that must be new, durably. An error if there is another one; that the same is there is fine.
    pub fn put_new(&self, at: &Location, content: &Bytes) -> Result<()> {
        for pause in PAUSES {
            if self.put_over(at, content, None)?.is_some() {
                return Ok(());
            }
            match self.get(at)? {
                Some(there) if there == *content => return Ok(()),
                Some(_) => bail!("{} is there already, with another content", at.url),
                // Refused because another put was under way, perhaps our own first try.
                None => std::thread::sleep(pause),
            }
        }
        bail!("{} can't be created: the store refuses it, and has nothing there", at.url)
    }

    /// Whether the store refuses what it must: to create the object at `at`, which is there, and to replace a version of it
    /// that never was. `content` is what is there, so that a store that does either changes nothing.
    pub fn keeps_conditions(&self, at: &Location, content: &Bytes) -> Result<bool> {
        let never = UpdateVersion { e_tag: Some("\"4294967295\"".to_owned()), version: Some("4294967295".to_owned()) };
        for over in [None, Some(Version(never))] {
            match self.try_put(at, content, over.as_ref()) {
                Ok(None) => {}
                Ok(Some(_)) | Err(Error::NotImplemented { .. } | Error::NotSupported { .. }) => return Ok(false),
                Err(e) => return Err(tell(e).context(format!("trying whether {} is replaced on conditions", at.url))),
            }
        }
        Ok(true)
    }

    /// Breaks off the upload of an object that another process has begun; that it has ended is fine.
    pub fn abort_upload(&self, at: &Location, id: &str) -> Result<()> {
        let Some(uploads) = &at.uploads else { return Ok(()) };
        let id = id.to_owned();
        match self.patiently(|| uploads.0.abort_multipart(&at.path, &id)) {
            Ok(()) | Err(Error::NotFound { .. }) => Ok(()),
            Err(e) => Err(tell(e).context(format!("can't break off the upload of {}", at.url))),
        }
    }
}

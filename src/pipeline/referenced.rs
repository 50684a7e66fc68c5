//! Inputs that stay where they are: in which places they may be, what they were when they were named, and their content, as
//! long as it is that. Invariants: nothing outside the places is read or told of, whatever a URI says and whatever links stand
//! in the way; what has changed is never read as if it had not.

use crate::format::{Compression, Format};
use crate::storage::{self, Location, Object, Storage};
use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Longest URI, bytes.
const MAX_URI: usize = 2048;
/// How long a store may take to say what an object is, while somebody waits.
const PATIENCE: Duration = Duration::from_secs(10);

/// An object, and what it was when it was named.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reference {
    /// Where it is, as it was named.
    pub uri: String,
    /// As [`Object::version`].
    pub version: String,
}

/// An object that was found where it may be, and as it was.
#[derive(Debug, Clone)]
pub struct Referenced {
    at: Location,
    version: String,
}

/// Why an object can't be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Its name makes no sense, or it is of a kind that can't be read.
    #[error("{0}")]
    Invalid(String),
    /// It is in none of the places.
    #[error("is in none of the places that this server may read from; they are those of files.allow in its configuration")]
    NotAllowed,
    /// There is no such object.
    #[error("there is no such object")]
    Missing,
    /// It is another one than it was.
    #[error("the object has changed since the file was created; create another file to use what is there now")]
    Changed,
    /// Its store can't be read.
    #[error("{0}")]
    Unreadable(String),
}

/// What an error says of an object that was to be read, if it is of that.
pub fn refusal(error: &anyhow::Error) -> Option<&Refused> {
    let of_reader = || error.downcast_ref::<io::Error>()?.get_ref()?.downcast_ref();
    error.downcast_ref().or_else(of_reader)
}

/// Whether an error is only that an object's store can't be read now.
pub fn is_outage(error: &anyhow::Error) -> bool {
    matches!(refusal(error), Some(Refused::Unreadable(_))) || storage::is_of_remote(error)
}

/// The places from which objects may be read.
#[derive(Debug, Clone, Default)]
pub struct Places(Vec<Place>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    /// Everything whose URI begins so.
    Store(String),
    /// Everything under this folder of the machine.
    Folder(PathBuf),
}

/// Stores whose objects have entity tags, and settings of their own in the server's environment.
const STORES: [&str; 3] = ["s3", "gs", "az"];

impl Places {
    /// Understands `s3://bucket/`, `s3://bucket/prefix/` (also `gs` and `az`) and `file:///folder/`.
    ///
    /// # Errors
    /// Something else.
    pub fn parse(texts: &[String]) -> Result<Self> {
        let place = |text: &String| -> Result<Place> {
            ensure!(text.ends_with('/'), "{text}: must end with a slash, so that it is clear where it ends");
            match text.split_once("://") {
                Some(("file", _)) => {
                    let at = Location::parse(text)?;
                    let folder = at.local.context("a file's URL names a path")?;
                    ensure!(folder != Path::new("/"), "{text}: is everything on this machine");
                    Ok(Place::Folder(folder))
                }
                Some((scheme, rest)) if STORES.contains(&scheme) => {
                    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
                    let is_plain = prefix.is_empty() || is_plain_key(prefix.trim_end_matches('/'));
                    ensure!(!bucket.is_empty() && is_plain, "{text}: is not {scheme}://bucket/ or {scheme}://bucket/prefix/");
                    Ok(Place::Store(text.clone()))
                }
                _ => bail!("{text}: is not one of s3://bucket/prefix/, gs://…, az://…, file:///folder/"),
            }
        };
        texts.iter().map(place).collect::<Result<_>>().map(Self)
    }

    /// Where a URI leads, if that is in one of the places: not by `..`, not by a link.
    fn locate(&self, uri: &str) -> Result<Location, Refused> {
        let invalid = |why: &str| Refused::Invalid(why.to_owned());
        if uri.len() > MAX_URI || uri.chars().any(char::is_control) {
            return Err(invalid("is too long, or has characters that no name has"));
        }
        let (scheme, rest) = uri.split_once("://").ok_or_else(|| invalid("is not s3://bucket/key or file:///path"))?;
        if scheme == "file" {
            let typed = Location::parse(uri).map_err(|error| Refused::Invalid(format!("{error:#}")))?;
            return self.locate_file(typed.local.as_deref().ok_or(Refused::NotAllowed)?);
        }
        if !STORES.contains(&scheme) {
            return Err(invalid("is not of s3, gs, az or file"));
        }
        let (_, key) = rest.split_once('/').unwrap_or((rest, ""));
        if !is_plain_key(key) {
            return Err(invalid("names no object: its key is empty, or has empty parts, . or .."));
        }
        let is_in = |place: &Place| matches!(place, Place::Store(prefix) if uri.starts_with(prefix.as_str()));
        if !self.0.iter().any(is_in) {
            return Err(Refused::NotAllowed);
        }
        Location::parse(uri).map_err(|error| Refused::Unreadable(format!("{error:#}")))
    }

    /// A path's own place, links followed. Whether something is there is told only of what is in a folder.
    fn locate_file(&self, path: &Path) -> Result<Location, Refused> {
        let folders = self.0.iter().filter_map(|place| match place {
            Place::Folder(folder) => Some((folder, folder.canonicalize().ok()?)),
            Place::Store(_) => None,
        });
        let folders: Vec<(&PathBuf, PathBuf)> = folders.collect();
        if !folders.iter().any(|(typed, real)| path.starts_with(typed) || path.starts_with(real)) {
            return Err(Refused::NotAllowed);
        }
        // What a link leads out to is not there: whether it is would be told otherwise.
        let real = path.canonicalize().map_err(|_| Refused::Missing)?;
        if !folders.iter().any(|(_, folder)| real.starts_with(folder)) {
            return Err(Refused::Missing);
        }
        // Reading another kind may never end.
        if !real.is_file() {
            return Err(Refused::Invalid("is not a file".into()));
        }
        let real = real.to_str().ok_or_else(|| Refused::Invalid("its path is not UTF-8".into()))?;
        Location::parse(real).map_err(|error| Refused::Unreadable(format!("{error:#}")))
    }

    /// Looks up an object of JSON lines; what it is, and its length.
    ///
    /// # Errors
    /// Why it can't be read.
    pub fn pin(&self, uri: &str) -> Result<(Reference, u64), Refused> {
        let at = self.locate(uri)?;
        if Format::of(&at).ok() != Some(Format::Jsonl(Compression::None)) {
            return Err(Refused::Invalid("must name a file of JSON lines (.jsonl or .ndjson)".into()));
        }
        let object = open_soon(&at)?;
        Ok((Reference { uri: uri.to_owned(), version: object.version() }, object.n_bytes()))
    }

    /// Finds an object again.
    ///
    /// # Errors
    /// It is not there, not allowed any more, or not the same.
    pub fn find(&self, reference: &Reference) -> Result<Referenced, Refused> {
        let found = Referenced { at: self.locate(&reference.uri)?, version: reference.version.clone() };
        found.open(open_soon)?;
        Ok(found)
    }
}

/// Whether every part of a key is a name.
fn is_plain_key(key: &str) -> bool {
    key.split('/').all(|part| !["", ".", ".."].contains(&part))
}

/// While somebody waits.
fn open_soon(at: &Location) -> Result<Object, Refused> {
    open_by(&Storage::new().map_err(unreadable)?.hurried(PATIENCE), at)
}

fn open(at: &Location) -> Result<Object, Refused> {
    open_by(&Storage::new().map_err(unreadable)?, at)
}

#[expect(clippy::needless_pass_by_value, reason = "so that it can be given to map_err")]
fn unreadable(error: anyhow::Error) -> Refused {
    Refused::Unreadable(format!("{error:#}"))
}

fn open_by(storage: &Storage, at: &Location) -> Result<Object, Refused> {
    if let Some(path) = &at.local {
        // What it says of itself can be seen by those, too, who may not read it.
        File::open(path).map_err(|error| unreadable_file(&error))?;
    }
    if !storage.exists(at).map_err(unreadable)? {
        return Err(Refused::Missing);
    }
    storage.open(at).map_err(unreadable)
}

/// Why a file of this machine can't be opened. One that may not be read is not waited for: its permissions are somebody's decision.
fn unreadable_file(error: &io::Error) -> Refused {
    match error.kind() {
        ErrorKind::NotFound => Refused::Missing,
        ErrorKind::PermissionDenied => Refused::Invalid("is a file that this server may not read".into()),
        _ => Refused::Unreadable(error.to_string()),
    }
}

impl Referenced {
    fn open(&self, how: impl FnOnce(&Location) -> Result<Object, Refused>) -> Result<Object, Refused> {
        let object = how(&self.at)?;
        if object.version() == self.version { Ok(object) } else { Err(Refused::Changed) }
    }

    /// Where it is, as long as it is what it was.
    pub(super) fn at(&self) -> Location {
        self.at.pinned(&self.version)
    }

    /// Whether it is still what it was.
    ///
    /// # Errors
    /// It is not, or can't be read.
    pub(super) fn check(&self) -> Result<(), Refused> {
        self.open(open).map(drop)
    }

    /// Its content. Reads fail if the object changes.
    ///
    /// # Errors
    /// It is not what it was, or can't be read.
    pub fn read(&self) -> Result<Content, Refused> {
        Ok(Content { object: self.open(open)?, offset: 0, chunk: Bytes::new() })
    }
}

/// An object's content, read in ranges of a few megabytes.
pub struct Content {
    object: Object,
    offset: u64,
    chunk: Bytes,
}

impl Content {
    /// The next few megabytes; empty at the end.
    ///
    /// # Errors
    /// The store's, or the object has changed.
    pub fn next_chunk(&mut self) -> Result<Bytes> {
        let chunk = self.object.chunk(self.offset)?;
        self.offset += chunk.len() as u64;
        Ok(chunk)
    }
}

impl Read for Content {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let n_bytes = self.fill_buf()?.len().min(to.len());
        to[..n_bytes].copy_from_slice(&self.chunk[..n_bytes]);
        self.consume(n_bytes);
        Ok(n_bytes)
    }
}

impl BufRead for Content {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.chunk.is_empty() {
            self.chunk = self.next_chunk().map_err(|error| {
                let text = format!("{error:#}");
                if storage::is_of_remote(&error) { io::Error::other(Refused::Unreadable(text)) } else { io::Error::other(text) }
            })?;
        }
        Ok(&self.chunk)
    }

    fn consume(&mut self, n_bytes: usize) {
        drop(self.chunk.split_to(n_bytes));
    }
}

impl fmt::Debug for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Content({}, {})", self.object.url(), self.offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    fn places(texts: &[&str]) -> Places {
        Places::parse(&texts.iter().map(|&text| text.to_owned()).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn a_file_that_may_not_be_read_is_not_waited_for() {
        let refused = |kind: ErrorKind| unreadable_file(&io::Error::from(kind));
        assert!(matches!(refused(ErrorKind::PermissionDenied), Refused::Invalid(why) if why.contains("may not read")));
        assert_eq!(refused(ErrorKind::NotFound), Refused::Missing);
        assert!(matches!(refused(ErrorKind::Other), Refused::Unreadable(_)), "what may pass is waited for");
    }

    #[test]
    fn places_are_whole_folders_and_prefixes() {
        for wrong in ["s3://bucket", "s3:///x/", "s3://b/../", "s3://b//", "http://host/", "/data/", "file:///", "file:///data"] {
            assert!(Places::parse(&[wrong.to_owned()]).is_err(), "{wrong}");
        }
        let places = places(&["s3://bucket/in/", "s3://other/"]);
        let located = |uri: &str| places.locate(uri).map(drop);
        for allowed in ["s3://bucket/in/a.jsonl", "s3://bucket/in/b/c.jsonl", "s3://other/a.jsonl"] {
            assert_eq!(located(allowed), Ok(()), "{allowed}");
        }
        for other in
            ["s3://bucket/input/a.jsonl", "s3://bucket/a.jsonl", "s3://another/a.jsonl", "gs://bucket/in/a.jsonl", "file:///a"]
        {
            assert_eq!(located(other), Err(Refused::NotAllowed), "{other}");
        }
        for wrong in
            ["s3://bucket/in/../a.jsonl", "s3://bucket/in/", "s3://bucket", "s3://bucket/in//a", "http://host/a", "in/a", ""]
        {
            assert!(matches!(located(wrong), Err(Refused::Invalid(_))), "{wrong}");
        }
    }

    #[test]
    fn no_path_leads_out_of_its_folder() {
        let root = tempfile::tempdir().unwrap();
        let path = |name: &str| root.path().join(name);
        let uri = |name: &str| format!("file://{}", path(name).display());
        for folder in ["in/sub", "out", "input"] {
            fs::create_dir_all(path(folder)).unwrap();
        }
        for file in ["in/a.jsonl", "in/sub/b.jsonl", "out/secret.jsonl", "input/c.jsonl", "in/d.txt"] {
            fs::write(path(file), "{}\n").unwrap();
        }
        symlink(path("out/secret.jsonl"), path("in/link.jsonl")).unwrap();
        symlink(path("out"), path("in/linked")).unwrap();
        symlink(path("in/a.jsonl"), path("in/inside.jsonl")).unwrap();
        symlink(path("in"), path("door")).unwrap();
        symlink(path("out/nothing.jsonl"), path("in/dangling.jsonl")).unwrap();
        let places = places(&[&(uri("in") + "/")]);
        let pinned = |name: &str| places.pin(&uri(name)).map(|(_, n_bytes)| n_bytes);
        for inside in ["in/a.jsonl", "in/sub/b.jsonl", "in/sub/../a.jsonl", "in/inside.jsonl", "in/%61.jsonl"] {
            assert_eq!(pinned(inside), Ok(3), "{inside}");
        }
        let outside = ["out/secret.jsonl", "in/../out/secret.jsonl", "input/c.jsonl"];
        for outside in outside.into_iter().chain(["in/%2e%2e/out/secret.jsonl", "out/nothing.jsonl"]) {
            assert_eq!(pinned(outside), Err(Refused::NotAllowed), "{outside}");
        }
        // Whether there is something outside can't be asked by a link, either.
        for by_link in ["in/link.jsonl", "in/linked/secret.jsonl", "in/linked/nothing.jsonl", "in/dangling.jsonl", "in/linked"] {
            assert_eq!(pinned(by_link), Err(Refused::Missing), "{by_link}");
        }
        assert_eq!(pinned("in/nothing.jsonl"), Err(Refused::Missing));
        // A URL's dots go before any link is followed.
        assert_eq!(pinned("in/linked/../out/secret.jsonl"), Err(Refused::Missing));
        for wrong in ["in/sub", "in/d.txt", "in"] {
            assert!(matches!(pinned(wrong), Err(Refused::Invalid(_))), "{wrong}");
        }
        // A folder that is reached by a link is where the link leads.
        let by_link = Places::parse(&[uri("door") + "/"]).unwrap();
        assert!(by_link.pin(&uri("door/a.jsonl")).is_ok() && by_link.pin(&uri("in/a.jsonl")).is_ok());
        assert_eq!(Places::default().pin(&uri("in/a.jsonl")), Err(Refused::NotAllowed));
    }

    #[test]
    fn a_file_in_its_place_is_not_read_for_it() {
        let root = tempfile::tempdir().unwrap();
        let [path, other] = ["a.jsonl", "b.jsonl"].map(|name| root.path().join(name));
        // More than is read at a time.
        fs::write(&path, "a\n".repeat(3 << 20)).unwrap();
        let places = places(&[&format!("file://{}/", root.path().display())]);
        let (reference, _) = places.pin(&format!("file://{}", path.display())).unwrap();
        let found = places.find(&reference).unwrap();
        let mut content = found.read().unwrap();
        assert!(!content.next_chunk().unwrap().is_empty());
        // Of the same size and time.
        let changed = fs::metadata(&path).unwrap().modified().unwrap();
        fs::write(&other, "b\n".repeat(3 << 20)).unwrap();
        File::options().write(true).open(&other).unwrap().set_modified(changed).unwrap();
        fs::rename(&other, &path).unwrap();
        assert!(content.next_chunk().is_err());
        // Nor is it opened as what was named.
        let opened = Storage::new().unwrap().open(&found.at());
        assert!(opened.is_err_and(|error| error.to_string().contains("is not what it was")));
    }

    #[test]
    fn what_changes_is_noticed() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("a.jsonl");
        let uri = format!("file://{}", path.display());
        fs::write(&path, "1\n2\n").unwrap();
        let places = places(&[&format!("file://{}/", root.path().display())]);
        let (reference, n_bytes) = places.pin(&uri).unwrap();
        let found = places.find(&reference).unwrap();
        let lines: Vec<String> = found.read().unwrap().lines().map(Result::unwrap).collect();
        assert_eq!((n_bytes, lines), (4, vec!["1".to_owned(), "2".to_owned()]));
        fs::write(&path, "1\n2\n3\n").unwrap();
        assert_eq!(places.find(&reference).err(), Some(Refused::Changed));
        assert_eq!((found.read().err(), found.check()), (Some(Refused::Changed), Err(Refused::Changed)));
        fs::remove_file(&path).unwrap();
        assert_eq!(places.find(&reference).err(), Some(Refused::Missing));
    }
}

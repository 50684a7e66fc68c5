//! Where an object is: what the user typed, and the store and path it means. Knows nothing of what lies there.

use std::fmt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use object_store::ObjectStore;
use object_store::local::LocalFileSystem;
use object_store::multipart::MultipartStore;
use url::Url;

use super::remote;

/// One place in one store.
#[derive(Debug, Clone)]
pub struct Location {
    /// The store.
    pub store: Arc<dyn ObjectStore>,
    /// The path in the store.
    pub path: object_store::path::Path,
    /// As the user wrote it (or would have): for messages, manifests and error files.
    pub url: Arc<str>,
    /// The path on this machine, if the store is its file system. What only files can do (locks, removing directories)
    /// depends on it.
    pub local: Option<PathBuf>,
    /// The store, where it is another machine; else empty. Two places are in one store if these are equal.
    pub(super) remote: Arc<str>,
    /// The same store where its uploads can be told by their ids.
    pub(super) uploads: Option<Uploads>,
    /// As [`super::Object::version`]: only as long as the object is that.
    pub(super) version: Option<Arc<str>>,
}

/// A store whose uploads have ids, by which others can break them off.
#[derive(Clone)]
pub(super) struct Uploads(pub(super) Arc<dyn MultipartStore>);

impl fmt::Debug for Uploads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Uploads")
    }
}

impl Location {
    /// A place in a given store.
    pub fn new(store: Arc<dyn ObjectStore>, path: object_store::path::Path, url: impl Into<Arc<str>>) -> Self {
        Self { store, path, url: url.into(), local: None, remote: "".into(), uploads: None, version: None }
    }

    /// Understands plain paths (relative to the working directory; `~` is the shell's business), `file://` URLs, and those
    /// of remote stores: `s3://`, `gs://`, `az://`, `http://`, `https://`.
    pub fn parse(text: &str) -> Result<Self> {
        if text.is_empty() {
            bail!("a path is empty");
        }
        let typed = match text.split_once("://") {
            Some(("file", _)) => file_url_path(text)?,
            Some((scheme, rest)) if is_scheme(scheme) => {
                let remote::Opened { store, uploads, path } = remote::open(scheme, text)?;
                let scheme = if scheme == "s3a" { "s3" } else { scheme };
                let remote = format!("{scheme}://{}", rest.split('/').next().unwrap_or_default()).into();
                return Ok(Self { store, path, url: text.into(), local: None, remote, uploads, version: None });
            }
            _ => PathBuf::from(text),
        };
        let local = absolute(&typed).with_context(|| format!("can't resolve the path {text}"))?;
        let path = object_store::path::Path::from_absolute_path(&local).with_context(|| format!("can't use the path {text}"))?;
        Ok(Self {
            store: Arc::new(LocalFileSystem::new().with_fsync(true)),
            path,
            url: text.into(),
            local: Some(local),
            remote: "".into(),
            uploads: None,
            version: None,
        })
    }

    /// The same object, as long as its [version](super::Object::version) is that: another is not [opened](super::Storage::open).
    #[must_use]
    pub fn pinned(&self, version: &str) -> Self {
        Self { version: Some(version.into()), ..self.clone() }
    }

    /// Whether another process can break off uploads to the store.
    pub fn names_uploads(&self) -> bool {
        self.uploads.is_some()
    }

    /// Whether `text` names a place in a remote store.
    pub fn is_remote_url(text: &str) -> bool {
        text.split_once("://").is_some_and(|(scheme, _)| scheme != "file" && is_scheme(scheme))
    }

    /// Whether `text` is a web address.
    pub fn is_web_url(text: &str) -> bool {
        text.starts_with("http://") || text.starts_with("https://")
    }

    /// What may be shown of what a user typed: of a web address, neither who asks nor what follows its question mark.
    pub fn shown(text: &str) -> String {
        let Some((scheme, rest)) = text.split_once("://").filter(|_| Self::is_web_url(text)) else { return text.to_owned() };
        let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
        let host = host.rsplit('@').next().unwrap_or_default();
        format!("{scheme}://{host}/{}", path.split('?').next().unwrap_or_default())
    }

    /// Whether the store is another machine.
    pub fn is_remote(&self) -> bool {
        !self.remote.is_empty()
    }

    /// Whether both are the same place.
    pub fn is(&self, other: &Self) -> bool {
        self.path == other.path && self.remote == other.remote
    }

    /// Whether the other place is somewhere under this one.
    pub fn holds(&self, other: &Self) -> bool {
        self.remote == other.remote && self.path != other.path && other.path.prefix_matches(&self.path)
    }

    /// Whether it can only be read by its name: a web server, which lists nothing.
    pub fn is_web(&self) -> bool {
        self.remote.starts_with("http")
    }

    /// The place `name` under this one.
    pub fn child(&self, name: &str) -> Result<Self> {
        let url = if self.url.is_empty() || self.url.ends_with('/') {
            format!("{}{name}", self.url)
        } else {
            format!("{}/{name}", self.url)
        };
        let path = object_store::path::Path::parse(format!("{}/{name}", self.path))
            .with_context(|| format!("can't use the name {name:?} under {}", self.url))?;
        let local = self.local.as_ref().map(|dir| dir.join(name));
        Ok(Self { path, url: url.into(), local, version: None, ..self.clone() })
    }

    /// The place `path` of the same store.
    pub fn same_store(&self, path: &str) -> Result<Self> {
        let path = object_store::path::Path::parse(path).with_context(|| format!("can't use the path {path:?}"))?;
        let url = format!("{}/{path}", self.remote).into();
        Ok(Self { path, url, local: None, version: None, ..self.clone() })
    }

    /// The place beside this one whose name has `extension` instead of its last one (and of a `.gz` or `.zst` behind
    /// it): `a/out.jsonl` with `job` is `a/out.job`, and so is `a/out.jsonl.gz`.
    pub fn with_extension(&self, extension: &str) -> Result<Self> {
        let name = self.path.filename().filter(|_| !self.url.ends_with('/'));
        let Some(name) = name else { bail!("{} names no file", self.url) };
        let unpacked = name.strip_suffix(".gz").or_else(|| name.strip_suffix(".zst")).unwrap_or(name);
        let stem = unpacked.rsplit_once('.').map_or(unpacked, |(stem, _)| stem);
        let beside = format!("{stem}.{extension}");
        let parent = self.path.as_ref().strip_suffix(name).expect("a path ends with its file name");
        let typed = self.url.rfind('/').map_or("", |slash| &self.url[..=slash]);
        let path = object_store::path::Path::parse(format!("{parent}{beside}")).context("a name beside a valid one")?;
        let local = self.local.as_ref().map(|local| local.with_file_name(&beside));
        let url = format!("{typed}{beside}").into();
        Ok(Self { path, url, local, version: None, ..self.clone() })
    }
}

/// `C:`-like or path-like texts before `://` are no schemes.
fn is_scheme(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic()) && text.chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c))
}

fn file_url_path(text: &str) -> Result<PathBuf> {
    let url = Url::parse(text).with_context(|| format!("{text} is not a URL"))?;
    match url.to_file_path() {
        Ok(path) if url.query().is_none() && url.fragment().is_none() => Ok(path),
        _ => bail!("{text} is not the URL of a file on this machine (write %3F for ? and %23 for #)"),
    }
}

/// Makes a path absolute and resolves `..` as the file system would (a symbolic link's parent is its target's), also
/// where the end of the path does not exist yet.
fn absolute(path: &Path) -> std::io::Result<PathBuf> {
    let mut resolved = PathBuf::new();
    for component in std::path::absolute(path)?.components() {
        match component {
            Component::ParentDir => {
                if let Ok(real) = resolved.canonicalize() {
                    resolved = real;
                }
                resolved.pop();
            }
            other => resolved.push(other),
        }
    }
    Ok(resolved)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_urls_name_files() {
        let at = Location::parse("/data/a b/x.jsonl").unwrap();
        assert_eq!((at.path.as_ref(), &*at.url), ("data/a b/x.jsonl", "/data/a b/x.jsonl"));
        let at = Location::parse("file:///data/a%20b/x.jsonl").unwrap();
        assert_eq!((at.path.as_ref(), &*at.url), ("data/a b/x.jsonl", "file:///data/a%20b/x.jsonl"));
        assert_eq!(Location::parse("/no/such/../x.jsonl").unwrap().path.as_ref(), "no/x.jsonl");
        let here = Location::parse("x.jsonl").unwrap();
        assert_eq!(here.local, Some(std::env::current_dir().unwrap().join("x.jsonl")));
    }

    #[test]
    fn other_schemes_are_refused_by_name() {
        let error = |text: &str| format!("{:#}", Location::parse(text).unwrap_err());
        assert!(error("ftp://b/x.jsonl").starts_with("ftp://b/x.jsonl: ftp:// is not known"));
        assert!(error("s3:///x.jsonl").contains("names no bucket"));
        let error_of_secret = error("https://me:hunter2@host/x.jsonl");
        assert!(error_of_secret.contains("no user") && !error_of_secret.contains("hunter2"));
        assert!(!error("https://host/x.jsonl?X-Amz-Signature=hunter2").contains("hunter2"));
        assert!(error("").contains("empty"));
        assert!(error("file:///a?b").contains("%3F"));
    }

    #[test]
    fn names_beside_and_under() {
        let at = Location::parse("out/a.b.jsonl").unwrap();
        let job = at.with_extension("job").unwrap();
        assert_eq!(&*job.url, "out/a.b.job");
        assert!(job.path.as_ref().ends_with("out/a.b.job") && job.local.as_ref().unwrap().ends_with("out/a.b.job"));
        let child = job.child("manifest.json").unwrap();
        assert_eq!(&*child.url, "out/a.b.job/manifest.json");
        assert!(child.local.unwrap().ends_with("out/a.b.job/manifest.json"));
        assert_eq!(&*Location::parse("out.jsonl.gz").unwrap().with_extension("job").unwrap().url, "out.job");
        assert_eq!(&*Location::parse("out").unwrap().with_extension("errors.jsonl").unwrap().url, "out.errors.jsonl");
    }
}

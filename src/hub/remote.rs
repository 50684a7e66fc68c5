//! Fetches models called `org/name` from a model hub: the files that the engine reads, at one revision, into a folder of
//! the cache. Speaks the HTTP interface of the Hugging Face Hub (`/api/models/…`, `/org/name/resolve/…`); knows nothing of
//! what is in the files.
//!
//! Invariant: a folder in the cache is complete and of one revision. Files are fetched beside it, each checked for its
//! size and, where the hub states one, its SHA-256, and the folder is renamed into place when all are there. What an
//! interrupted fetch left is taken up where it stopped.

use super::{LocalModel, Lock, sha256_of};
use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;
use ureq::config::RedirectAuthHeaders;
use ureq::http::Response;
use ureq::{Agent, Body};

/// Times that a file is asked for before the fetch fails; each goes on where the one before it stopped.
const ATTEMPTS: usize = 3;
/// A file may take a minute, and a second for so many bytes.
const SLOWEST_BYTES_PER_SECOND: u64 = 50_000;
/// Longest list of files that is read, in bytes.
const MAX_LIST_BYTES: u64 = 32 << 20;

/// A hub.
#[derive(Debug, Clone)]
pub struct Remote {
    /// Where it is: `https://host`, without a slash at the end.
    pub endpoint: String,
    /// Sent to the endpoint, and to nobody that it redirects to.
    pub token: Option<String>,
}

/// A model on a hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repo<'a> {
    /// `org/name`
    pub id: &'a str,
    /// A branch, a tag or a commit.
    pub revision: &'a str,
}

impl<'a> Repo<'a> {
    /// Understands `org/name` and `org/name@revision`; `None` for what is neither.
    pub fn parse(text: &'a str) -> Option<Self> {
        let (id, revision) = text.split_once('@').unwrap_or((text, "main"));
        let (org, name) = id.split_once('/')?;
        (is_plain(org) && is_plain(name) && is_plain(revision)).then_some(Self { id, revision })
    }

    /// Where the cache keeps the repository's revisions.
    fn folder(&self, cache: &Path) -> PathBuf {
        cache.join("hub").join(self.id.replace('/', "--"))
    }

    /// The model in the cache, as it was when it was last fetched.
    pub fn cached(&self, cache: &Path) -> Option<LocalModel> {
        let folder = self.folder(cache);
        let commit = fs::read_to_string(folder.join(format!("{}.ref", self.revision))).ok()?;
        let path = folder.join(commit.trim());
        path.is_dir().then(|| self.local(path))
    }

    fn local(&self, path: PathBuf) -> LocalModel {
        let name = self.id.rsplit('/').next().unwrap_or(self.id).to_owned();
        LocalModel { name: self.id.to_owned(), names: vec![self.id.to_owned(), name], path }
    }
}

/// A name that is one part of a path and of a URL.
fn is_plain(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    !name.is_empty() && !name.starts_with('.') && name.chars().all(allowed)
}

/// What the hub says of a revision.
#[derive(Deserialize)]
struct Listing {
    /// The commit.
    sha: String,
    siblings: Vec<Listed>,
}

/// A file of a revision.
#[derive(Deserialize)]
struct Listed {
    #[serde(rename = "rfilename")]
    name: String,
    size: Option<u64>,
    /// Of large files.
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: String,
}

/// Files beside the weights, where a repository has them.
const SMALL_FILES: [&str; 8] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
];

/// Of a folder's files those that the engine reads: of weights in both forms, the sharded ones.
pub(super) fn wanted<'n>(names: impl Iterator<Item = &'n str> + Clone) -> Vec<&'n str> {
    let sharded = names.clone().any(|name| name == "model.safetensors.index.json");
    let is_weight = |name: &str| {
        if sharded { name.starts_with("model-") && name.ends_with(".safetensors") } else { name == "model.safetensors" }
    };
    names.filter(|name| is_plain(name) && (SMALL_FILES.contains(name) || is_weight(name))).collect()
}

impl Listing {
    /// The files that the engine reads.
    fn wanted(&self) -> Vec<&Listed> {
        let names = wanted(self.siblings.iter().map(|file| &*file.name));
        self.siblings.iter().filter(|file| names.contains(&&*file.name)).collect()
    }
}

/// Fetches a repository's revision into the cache, unless that commit is there. Several processes may call this at once:
/// one fetches, the others wait for it.
///
/// # Errors
/// No such repository or revision, no right to read it, a hub that can't be reached or breaks off three times, a file of
/// another size or SHA-256 than the hub says.
pub fn fetch(repo: &Repo<'_>, remote: &Remote, cache: &Path, say: &mut dyn FnMut(&str)) -> Result<LocalModel> {
    let path = fetch_commit(repo, remote, &repo.folder(cache), say)
        .with_context(|| format!("cannot fetch {} (revision {}) from {}", repo.id, repo.revision, remote.endpoint))?;
    Ok(repo.local(path))
}

/// Brings the commit that the revision is now into a folder of `folder`, and remembers that the revision is that commit.
fn fetch_commit(repo: &Repo<'_>, remote: &Remote, folder: &Path, say: &mut dyn FnMut(&str)) -> Result<PathBuf> {
    fs::create_dir_all(folder).with_context(|| format!("cannot create the model cache {}", folder.display()))?;
    let _lock = Lock::take(folder)?;
    let agent = agent();
    let listing = list(&agent, repo, remote)?;
    ensure!(is_plain(&listing.sha), "the hub names the commit {:?}", listing.sha);
    let target = folder.join(&listing.sha);
    if !target.is_dir() {
        let files = listing.wanted();
        let has = |name: &str| files.iter().any(|file| file.name.ends_with(name));
        ensure!(has("config.json") && has(".safetensors"), "the repository has no config.json or no model.safetensors");
        let n_bytes: u64 = files.iter().filter_map(|file| file.size).sum();
        say(&format!("fetching {} ({} MB, commit {})", repo.id, n_bytes / 1_000_000, listing.sha));
        let staging = folder.join(format!("{}.part", listing.sha));
        fs::create_dir_all(&staging).with_context(|| format!("cannot create {}", staging.display()))?;
        for file in files {
            let url = format!("{}/{}/resolve/{}/{}", remote.endpoint, repo.id, listing.sha, file.name);
            get_file(&agent, &url, remote, file, &staging).with_context(|| file.name.clone())?;
        }
        fs::rename(&staging, &target).with_context(|| format!("cannot move {} into place", staging.display()))?;
    }
    let reference = folder.join(format!("{}.ref", repo.revision));
    fs::write(&reference, &listing.sha).with_context(|| format!("cannot write {}", reference.display()))?;
    Ok(target)
}

fn agent() -> Agent {
    Agent::config_builder()
        .http_status_as_error(false)
        .redirect_auth_headers(RedirectAuthHeaders::SameHost)
        .timeout_connect(Some(Duration::from_secs(30)))
        .timeout_recv_response(Some(Duration::from_mins(1)))
        .user_agent(concat!("valar/", env!("CARGO_PKG_VERSION")))
        .build()
        .into()
}

/// Asks for a URL; `from` is the first byte wanted, `n_bytes` what limits the time it may take.
fn get(agent: &Agent, url: &str, remote: &Remote, from: u64, n_bytes: u64) -> Result<Response<Body>> {
    let limit = Duration::from_secs(60 + n_bytes / SLOWEST_BYTES_PER_SECOND);
    let mut request = agent.get(url).config().timeout_recv_body(Some(limit)).build();
    if let Some(token) = &remote.token {
        request = request.header("Authorization", format!("Bearer {token}"));
    }
    if from > 0 {
        request = request.header("Range", format!("bytes={from}-"));
    }
    let response = request.call().context("the hub does not answer")?;
    match response.status().as_u16() {
        200 | 206 | 416 => Ok(response),
        404 => bail!("not found: no such name or revision there (404)"),
        401 | 403 => {
            let hint = if remote.token.is_some() { "the token in HF_TOKEN has no right to it" } else { "set HF_TOKEN" };
            bail!("it is private, gated, or not there; {hint} ({})", response.status().as_u16())
        }
        other => bail!("the hub answers {other}"),
    }
}

fn list(agent: &Agent, repo: &Repo<'_>, remote: &Remote) -> Result<Listing> {
    let url = format!("{}/api/models/{}/revision/{}?blobs=true", remote.endpoint, repo.id, repo.revision);
    let mut response = get(agent, &url, remote, 0, 0)?;
    let text = response.body_mut().with_config().limit(MAX_LIST_BYTES).read_to_vec().context("the list of files")?;
    serde_json::from_slice(&text).context("the list of files is not what a hub sends")
}

/// Brings one file into a folder, whole and checked.
fn get_file(agent: &Agent, url: &str, remote: &Remote, file: &Listed, folder: &Path) -> Result<()> {
    let (target, part) = (folder.join(&file.name), folder.join(format!("{}.part", file.name)));
    if target.exists() {
        return Ok(());
    }
    let mut attempt = 1;
    while let Err(error) = get_rest(agent, url, remote, file, &part) {
        if attempt == ATTEMPTS {
            return Err(error.context(format!("gave up after {ATTEMPTS} attempts; what arrived is kept for the next")));
        }
        attempt += 1;
    }
    let checked = check(file, &part);
    if checked.is_err() {
        fs::remove_file(&part).with_context(|| format!("cannot remove {}", part.display()))?;
    }
    checked?;
    fs::rename(&part, &target).with_context(|| format!("cannot move {} into place", part.display()))
}

/// Appends to `part` what is missing of the file.
fn get_rest(agent: &Agent, url: &str, remote: &Remote, file: &Listed, part: &Path) -> Result<()> {
    let mut have = fs::metadata(part).map_or(0, |metadata| metadata.len());
    if file.size.is_some_and(|size| have >= size && size > 0) {
        return Ok(());
    }
    let response = get(agent, url, remote, have, file.size.unwrap_or(0))?;
    match response.status().as_u16() {
        206 => {}
        // There is nothing from there on: what is here is not the beginning of that file.
        416 => {
            fs::remove_file(part).with_context(|| format!("cannot remove {}", part.display()))?;
            bail!("the hub has fewer than the {have} bytes that arrived before");
        }
        // The server sends all of it.
        _ => have = 0,
    }
    let mut out = OpenOptions::new().create(true).write(true).truncate(false).open(part)?;
    out.set_len(have)?;
    std::io::Seek::seek(&mut out, std::io::SeekFrom::Start(have))?;
    // One byte more than there should be is enough to see that it is not the file.
    let limit = file.size.map_or(u64::MAX, |size| size - have + 1);
    let mut body = response.into_body().into_with_config().limit(u64::MAX).reader().take(limit);
    let copied = std::io::copy(&mut body, &mut out).context("the connection broke");
    out.flush()?;
    out.sync_all()?;
    let n_bytes = have + copied?;
    ensure!(file.size.is_none_or(|size| n_bytes >= size), "the connection ended after {n_bytes} bytes");
    Ok(())
}

fn check(file: &Listed, path: &Path) -> Result<()> {
    let n_bytes = File::open(path)?.metadata()?.len();
    if let Some(size) = file.size {
        ensure!(n_bytes == size, "{n_bytes} bytes or more arrived, the hub says {size}; the file was not kept");
    }
    if let Some(Lfs { sha256 }) = &file.lfs {
        let found = sha256_of(path)?;
        ensure!(&found == sha256, "SHA-256 is {found}, the hub says {sha256}; the file was not kept");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_repositories() {
        assert_eq!(Repo::parse("org/name"), Some(Repo { id: "org/name", revision: "main" }));
        assert_eq!(Repo::parse("a-b/c_d.e@v1.0"), Some(Repo { id: "a-b/c_d.e", revision: "v1.0" }));
        for text in ["name", "a/b/c", "/abs", "./here", "../up", "a/", "a/b@", "a/b c", "a/..", "a/b@../x", "a\\b"] {
            assert_eq!(Repo::parse(text), None, "{text}");
        }
    }

    #[test]
    fn files_that_are_fetched() {
        let wanted = |names: &[&str]| {
            let siblings = names.iter().map(|name| Listed { name: (*name).to_owned(), size: None, lfs: None }).collect();
            let listing = Listing { sha: String::new(), siblings };
            listing.wanted().iter().map(|file| file.name.clone()).collect::<Vec<_>>()
        };
        assert_eq!(wanted(&["README.md", "config.json", "model.safetensors"]), ["config.json", "model.safetensors"]);
        assert_eq!(wanted(&["pytorch_model.bin", "onnx/config.json", "../model.safetensors"]), Vec::<String>::new());
        let sharded = ["model-00001-of-00002.safetensors", "model.safetensors", "model.safetensors.index.json"];
        assert_eq!(wanted(&sharded), ["model-00001-of-00002.safetensors", "model.safetensors.index.json"]);
    }
}

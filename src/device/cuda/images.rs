//! Which images of our programs a GPU gets, and from where: machine code from the folder of compiled kernels, else from NVRTC,
//! else PTX, which the driver compiles. Knows nothing of what the kernels compute.
//!
//! Invariant: all images of a device were made by one compiler from the sources of this program.

use super::cache::{build, path_of};
use super::driver::{Facts, Gpu, Module};
use super::nvrtc::Nvrtc;
use super::sources::{ARCHS, PROGRAMS, hash};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};

/// Where compiled kernels are kept, and which file NVRTC is, if one is named.
#[derive(Debug, Clone)]
pub struct KernelPlace {
    /// The folder.
    pub folder: PathBuf,
    /// The library; otherwise it is looked for.
    pub nvrtc: Option<PathBuf>,
}

/// All programs, loaded.
pub(super) struct Images {
    /// In the order of [`PROGRAMS`].
    pub(super) modules: Vec<Module>,
    /// The architecture that they were compiled for.
    pub(super) arch: String,
    /// Their compiler: major, minor.
    pub(super) compiler: (i32, i32),
}

impl Images {
    /// Loads all programs.
    ///
    /// # Errors
    /// No compiler and none that were compiled before; what the compiler or the driver says of them.
    pub(super) fn load(gpu: &Gpu, place: &KernelPlace, tell: &mut dyn FnMut(&str)) -> Result<Self> {
        let name = arch(gpu.facts());
        let mut first_error = None;
        for arch in [format!("sm_{name}"), format!("compute_{name}")] {
            match Self::of_form(gpu, place, &arch, tell) {
                Ok(Some(images)) => return Ok(images),
                // The driver wants another form.
                Ok(None) => {}
                Err(error) => first_error = first_error.or(Some(error)),
            }
        }
        let Some(error) = first_error else {
            bail!("{} takes neither machine code (sm_{name}) nor PTX (compute_{name})", gpu.facts().name)
        };
        Err(error)
    }

    /// The same in one form; `None` if the driver does not take it.
    fn of_form(gpu: &Gpu, place: &KernelPlace, arch: &str, tell: &mut dyn FnMut(&str)) -> Result<Option<Self>> {
        let kept = newest_kept(&place.folder, arch);
        let nvrtc = if kept.is_some() { None } else { Some(Nvrtc::open(place.nvrtc.as_deref())?) };
        let mut modules = Vec::new();
        for program in PROGRAMS {
            let path = match (&nvrtc, kept) {
                (Some(nvrtc), _) => {
                    let path = path_of(program, arch, nvrtc.version(), &place.folder);
                    if !path.exists() {
                        tell(&format!("compiling CUDA kernels for {arch}: {}", program.name));
                    }
                    build(nvrtc, program, arch, &place.folder)?.path
                }
                (None, Some(version)) => path_of(program, arch, version, &place.folder),
                (None, None) => bail!("no kernels and no compiler"),
            };
            let mut image = fs::read(&path).with_context(|| path.display().to_string())?;
            // PTX is a string.
            image.push(0);
            match gpu.load(&image).with_context(|| path.display().to_string())? {
                Some(module) => modules.push(module),
                None => return Ok(None),
            }
        }
        let compiler = nvrtc.as_ref().map(Nvrtc::version).or(kept).context("one of both was there")?;
        Ok(Some(Self { modules, arch: arch.to_owned(), compiler }))
    }

    /// Whether it is the driver that makes machine code of them.
    pub(super) fn are_ptx(&self) -> bool {
        self.arch.starts_with("compute_")
    }

    /// A hash of all sources, as they were compiled.
    pub(super) fn hash(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for program in PROGRAMS {
            hasher.update(hash(program, &self.arch, self.compiler).as_bytes());
        }
        hasher.finalize().to_hex()[..16].to_owned()
    }
}

/// The newest compiler whose images of all programs are in the folder.
fn newest_kept(folder: &Path, arch: &str) -> Option<(i32, i32)> {
    let compilers = (12..=13).rev().flat_map(|major| (0..=9).rev().map(move |minor| (major, minor)));
    let mut compilers = compilers.filter(|_| folder.is_dir());
    compilers.find(|&compiler| PROGRAMS.iter().all(|program| path_of(program, arch, compiler, folder).is_file()))
}

/// The architecture's name after `sm_`: that of [`ARCHS`] where the GPU is one of them.
fn arch(facts: &Facts) -> String {
    let number = format!("{}{}", facts.capability.0, facts.capability.1);
    let known = ARCHS.iter().filter_map(|arch| arch.strip_prefix("sm_"));
    let mut known = known.filter(|arch| arch.trim_end_matches('a') == number);
    known.next().map_or(number.clone(), str::to_owned)
}

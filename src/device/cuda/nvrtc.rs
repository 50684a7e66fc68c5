//! NVIDIA's run-time compiler, opened when it is needed: the few functions of it that make an image of a source. Knows
//! nothing of our kernels.
//!
//! Invariant: a program of the compiler is destroyed whatever happens after it was created.

use anyhow::{Context, Result, bail, ensure};
use libloading::Library;
use std::ffi::{CStr, CString, OsString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::ptr::null_mut;

/// Names that a system's loader may know the library by.
const NAMES: &[&str] = &["libnvrtc.so.12", "libnvrtc.so.13", "libnvrtc.so"];
/// Where CUDA is installed, unless `CUDA_HOME` says it.
const HOME: &str = "/usr/local/cuda";

/// `nvrtcResult`; 0 is success.
type Status = c_int;
/// `nvrtcProgram`
type Handle = *mut c_void;
/// The size, or the contents, of a result.
type SizeOf = unsafe extern "C" fn(Handle, *mut usize) -> Status;
type Contents = unsafe extern "C" fn(Handle, *mut c_char) -> Status;

/// The functions that are used, as nvrtc.h of 12.9 declares them.
struct Functions {
    error: unsafe extern "C" fn(Status) -> *const c_char,
    version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> Status,
    create: unsafe extern "C" fn(
        *mut Handle,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> Status,
    compile: unsafe extern "C" fn(Handle, c_int, *const *const c_char) -> Status,
    destroy: unsafe extern "C" fn(*mut Handle) -> Status,
    log: (SizeOf, Contents),
    cubin: (SizeOf, Contents),
    ptx: (SizeOf, Contents),
}

/// The compiler.
pub struct Nvrtc {
    functions: Functions,
    version: (i32, i32),
    /// What the functions are part of.
    _library: Library,
}

/// What the compiler made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// An ELF file for `sm_*`, PTX text for `compute_*`.
    pub bytes: Vec<u8>,
    /// What compiler and assembler said.
    pub log: String,
}

/// A program of the compiler.
struct Compilation<'a> {
    functions: &'a Functions,
    handle: Handle,
}

impl Drop for Compilation<'_> {
    fn drop(&mut self) {
        // SAFETY: the handle was created and is destroyed once.
        unsafe { (self.functions.destroy)(&raw mut self.handle) };
    }
}

impl Nvrtc {
    /// Opens the library: the file given, or the first that is found where CUDA's libraries may be.
    ///
    /// # Errors
    /// No library, with every place that was looked at; or one that is not NVRTC.
    pub fn open(file: Option<&Path>) -> Result<Self> {
        let places = file.map_or_else(places, |file| vec![file.into()]);
        let mut failures = Vec::new();
        for place in &places {
            // SAFETY: NVRTC's initialisers have no preconditions; that the file is NVRTC is what whoever names it (the
            // user, or the system's loader by the library's own name) answers for.
            match unsafe { Library::new(place) } {
                Ok(library) => return Self::of(library).with_context(|| place.to_string_lossy().into_owned()),
                Err(error) => failures.push(format!("  {}: {}", place.to_string_lossy(), root_cause(&error))),
            }
        }
        bail!(
            "no NVRTC, the compiler for CUDA, is found. It is part of CUDA 12 and 13 (libnvrtc.so.12); name its file with \
             --nvrtc or VALAR_NVRTC. Looked for:\n{}",
            failures.join("\n")
        )
    }

    fn of(library: Library) -> Result<Self> {
        // SAFETY: the types are those that nvrtc.h declares for these names, unchanged from CUDA 11.1 on.
        let functions = unsafe {
            Functions {
                error: *library.get(b"nvrtcGetErrorString\0")?,
                version: *library.get(b"nvrtcVersion\0")?,
                create: *library.get(b"nvrtcCreateProgram\0")?,
                compile: *library.get(b"nvrtcCompileProgram\0")?,
                destroy: *library.get(b"nvrtcDestroyProgram\0")?,
                log: (*library.get(b"nvrtcGetProgramLogSize\0")?, *library.get(b"nvrtcGetProgramLog\0")?),
                cubin: (*library.get(b"nvrtcGetCUBINSize\0")?, *library.get(b"nvrtcGetCUBIN\0")?),
                ptx: (*library.get(b"nvrtcGetPTXSize\0")?, *library.get(b"nvrtcGetPTX\0")?),
            }
        };
        let (mut major, mut minor) = (0, 0);
        // SAFETY: both point to integers.
        functions.check(unsafe { (functions.version)(&raw mut major, &raw mut minor) }, "nvrtcVersion")?;
        ensure!(major >= 12, "NVRTC {major}.{minor} is older than 12.0");
        Ok(Self { functions, version: (major, minor), _library: library })
    }

    /// The compiler's version: major, minor.
    pub fn version(&self) -> (i32, i32) {
        self.version
    }

    /// Compiles a source for an architecture (`sm_90a`: machine code; `compute_80`: PTX). `headers` are the files that it may
    /// include: name and text.
    ///
    /// # Errors
    /// What the compiler says of it.
    pub fn compile(&self, (name, source): (&str, &str), headers: &[(&str, &str)], arch: &str, options: &[&str]) -> Result<Image> {
        let functions = &self.functions;
        let texts = c_strings(headers.iter().map(|(_, text)| *text))?;
        let names = c_strings(headers.iter().map(|(name, _)| *name))?;
        let arch_option = format!("--gpu-architecture={arch}");
        let options = c_strings([arch_option.as_str()].into_iter().chain(options.iter().copied()))?;
        let (source, file) = (CString::new(source)?, CString::new(format!("{name}.cu"))?);
        let mut handle = null_mut();
        // SAFETY: every pointer is to a C string, or to as many of them as the number says, that outlive the call.
        let status = unsafe {
            (functions.create)(
                &raw mut handle,
                source.as_ptr(),
                file.as_ptr(),
                headers.len() as c_int,
                pointers(&texts).as_ptr(),
                pointers(&names).as_ptr(),
            )
        };
        functions.check(status, "nvrtcCreateProgram")?;
        let compilation = Compilation { functions, handle };
        // SAFETY: as above; the program was created.
        let status = unsafe { (functions.compile)(compilation.handle, options.len() as c_int, pointers(&options).as_ptr()) };
        let log = String::from_utf8_lossy(&compilation.result(functions.log, "nvrtcGetProgramLog")?).into_owned();
        functions.check(status, "nvrtcCompileProgram").with_context(|| format!("{name}.cu for {arch}:\n{log}"))?;
        let bytes = if arch.starts_with("sm_") {
            compilation.result(functions.cubin, "nvrtcGetCUBIN")?
        } else {
            until_zero(compilation.result(functions.ptx, "nvrtcGetPTX")?)
        };
        ensure!(!bytes.is_empty(), "NVRTC made nothing of {name}.cu for {arch}");
        Ok(Image { bytes, log })
    }
}

impl Compilation<'_> {
    /// One of the results; strings end before their zero.
    fn result(&self, (size_of, contents): (SizeOf, Contents), call: &str) -> Result<Vec<u8>> {
        let mut size = 0;
        // SAFETY: the program was created; the pointer is to an integer.
        self.functions.check(unsafe { size_of(self.handle, &raw mut size) }, call)?;
        let mut bytes = vec![0u8; size];
        // SAFETY: the compiler writes as many bytes as it said.
        self.functions.check(unsafe { contents(self.handle, bytes.as_mut_ptr().cast()) }, call)?;
        Ok(if call == "nvrtcGetProgramLog" { until_zero(bytes) } else { bytes })
    }
}

impl Functions {
    fn check(&self, status: Status, call: &str) -> Result<()> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: the function takes any number and gives a string that is never freed.
        let words = unsafe { CStr::from_ptr((self.error)(status)) };
        bail!("{call}: {} ({status})", words.to_string_lossy())
    }
}

/// Where NVRTC may be: what the loader finds by name, then CUDA's folder.
fn places() -> Vec<OsString> {
    let home = std::env::var_os("CUDA_HOME").filter(|home| !home.is_empty()).unwrap_or_else(|| HOME.into());
    let installed = PathBuf::from(home).join("lib64/libnvrtc.so").into_os_string();
    NAMES.iter().map(OsString::from).chain([installed]).collect()
}

/// What the loader said, without the library's own words around it.
fn root_cause(error: &dyn std::error::Error) -> String {
    error.source().map_or_else(|| error.to_string(), root_cause)
}

fn c_strings<'a>(texts: impl Iterator<Item = &'a str>) -> Result<Vec<CString>> {
    texts.map(|text| Ok(CString::new(text)?)).collect()
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|string| string.as_ptr()).collect()
}

fn until_zero(mut bytes: Vec<u8>) -> Vec<u8> {
    let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
    bytes.truncate(end);
    bytes
}

//! Modules, their functions and variables.

use crate::c::{Host, Out, Text};
use crate::call::call;
use crate::codes::{
    Done, FILE_NOT_FOUND, INVALID_HANDLE, INVALID_PTX, INVALID_VALUE, NO_BINARY_FOR_GPU, NOT_FOUND, UNSUPPORTED_PTX_VERSION,
};
use crate::device::{REGISTERS, SHARED_DEFAULT, limits};
use crate::driver::{Driver, Function, Handle, LoadedModule, Range, complain, driver, in_context, lock};
use crate::run;
use crate::work::Goal;
use std::ffi::CStr;
use std::sync::Arc;

/// What machine code begins with: ELF, and NVIDIA's containers of it.
const ELF: [u8; 4] = *b"\x7fELF";
const FATBIN: [u8; 4] = 0xBA55_ED50u32.to_le_bytes();
const FATBIN_WRAPPER: [u8; 4] = 0x4662_43B1u32.to_le_bytes();

fn load(driver: &mut Driver, device: usize, image: Image) -> Done<Handle> {
    let Image::Ptx(text) = image else {
        complain("machine code can't be executed, only PTX");
        return Err(NO_BINARY_FOR_GPU);
    };
    let target = target(driver, &text)?;
    let module = ptx::Module::parse(&text).map_err(|error| {
        complain(error);
        INVALID_PTX
    })?;
    let handle = driver.new_handle();
    driver.modules.insert(handle, LoadedModule { device, module: Arc::new(module), target });
    Ok(handle)
}

enum Image {
    MachineCode,
    Ptx(String),
}

/// An image's kind is known by its first bytes.
fn image(bytes: &[u8]) -> Done<Image> {
    if [&ELF, &FATBIN, &FATBIN_WRAPPER].iter().any(|magic| bytes.starts_with(*magic)) {
        return Ok(Image::MachineCode);
    }
    std::str::from_utf8(bytes).map(|text| Image::Ptx(text.to_owned())).map_err(|_| INVALID_PTX)
}

/// Checks the text's version against the driver's, and its target against the device; returns the target as 10 x major
/// + minor.
fn target(driver: &Driver, text: &str) -> Done<u32> {
    let word = |directive: &str| {
        let line = text.lines().find_map(|line| line.trim_start().strip_prefix(directive));
        line.and_then(|rest| rest.split([' ', '\t', ',']).find(|w| !w.is_empty())).ok_or(INVALID_PTX)
    };
    let version = word(".version")?;
    let version: (u32, u32) = version.split_once('.').and_then(|(a, b)| a.parse().ok().zip(b.parse().ok())).ok_or(INVALID_PTX)?;
    if version > ptx_version(driver.knobs.driver) {
        complain(format_args!("PTX version {}.{} is later than the driver's", version.0, version.1));
        return Err(UNSUPPORTED_PTX_VERSION);
    }
    let name = word(".target")?;
    let digits: u32 = name.trim_start_matches("sm_").trim_end_matches(char::is_alphabetic).parse().map_err(|_| INVALID_PTX)?;
    let own = driver.knobs.capability.0 * 10 + driver.knobs.capability.1;
    let fits = match name.as_bytes().last() {
        Some(b'a') => digits == own,
        Some(b'f') => digits <= own && digits / 10 == own / 10,
        _ => digits <= own,
    };
    if !fits {
        complain(format_args!("PTX for {name} on a device of compute capability {}.{}", own / 10, own % 10));
        return Err(INVALID_PTX);
    }
    Ok(digits)
}

/// The latest PTX version that a driver knows, from the release notes in the PTX ISA.
fn ptx_version(driver: u32) -> (u32, u32) {
    match (driver / 1000, driver % 1000 / 10) {
        (..=11, _) => (7, 8),
        (12, minor @ 0..=5) => (8, minor),
        (12, minor) => (8, minor - 1),
        (13, minor) => (9, minor),
        _ => (9, 9),
    }
}

impl Driver {
    pub(crate) fn unload(&mut self, handle: Handle) -> Done {
        let module = self.modules.remove(&handle).ok_or(INVALID_HANDLE)?;
        self.functions.retain(|_, function| function.module_handle != handle);
        let names: Vec<String> = module.module.variables().map(str::to_owned).collect();
        let mut gpu = lock(&self.devices[module.device].gpu);
        for name in names {
            if let Some((address, _)) = gpu.variable(&module.module, &name) {
                self.memory.remove(&address);
            }
        }
        gpu.unload(&module.module);
        Ok(())
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuModuleLoadData(module: Out<Handle>, bytes: Host) -> u32 {
    call("cuModuleLoadData", || {
        if bytes.0 == 0 {
            return Err(INVALID_VALUE);
        }
        let start = bytes.copy_in(4);
        let image = match image(&start) {
            Ok(Image::MachineCode) => Image::MachineCode,
            // SAFETY: an image that is no machine code is a text that ends with a zero byte, as the interface asks.
            _ => image(unsafe { CStr::from_ptr(bytes.0 as *const std::ffi::c_char) }.to_bytes())?,
        };
        in_context(|driver, device| {
            driver.unsafe_call()?;
            module.set(load(driver, device, image)?)
        })
    })
}

/// Options of the just-in-time compiler make no difference.
#[unsafe(no_mangle)]
extern "C" fn cuModuleLoadDataEx(module: Out<Handle>, bytes: Host, _n: u32, _options: Host, _values: Host) -> u32 {
    cuModuleLoadData(module, bytes)
}

#[unsafe(no_mangle)]
extern "C" fn cuModuleLoad(module: Out<Handle>, path: Text) -> u32 {
    call("cuModuleLoad", || {
        let path = path.get()?.to_str().map_err(|_| INVALID_VALUE)?;
        let image = image(&std::fs::read(path).map_err(|_| FILE_NOT_FOUND)?)?;
        in_context(|driver, device| module.set(load(driver, device, image)?))
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuModuleUnload(module: Handle) -> u32 {
    call("cuModuleUnload", || {
        let device = driver(|driver| driver.modules.get(&module).map(|m| m.device).ok_or(INVALID_HANDLE))?;
        run::until(Goal::Device(device))?;
        driver(|driver| driver.unload(module))
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuModuleGetFunction(function: Out<Handle>, module: Handle, name: Text) -> u32 {
    call("cuModuleGetFunction", || {
        let name = name.get()?.to_str().map_err(|_| NOT_FOUND)?;
        in_context(|driver, _| {
            let loaded = driver.modules.get(&module).ok_or(INVALID_HANDLE)?;
            let shape = loaded.module.shape(name).ok_or(NOT_FOUND)?;
            let found = Function {
                name: name.to_owned(),
                module: loaded.module.clone(),
                module_handle: module,
                most_dynamic: SHARED_DEFAULT.saturating_sub(shape.static_shared),
                shape: Arc::new(shape),
                target: loaded.target,
            };
            let same = driver.functions.iter().find(|(_, f)| f.module_handle == module && f.name == name).map(|(h, _)| *h);
            let handle = same.unwrap_or_else(|| driver.new_handle());
            driver.functions.entry(handle).or_insert(found);
            function.set(handle)
        })
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuModuleGetGlobal_v2(address: Out<u64>, bytes: Out<usize>, module: Handle, name: Text) -> u32 {
    call("cuModuleGetGlobal_v2", || {
        let name = name.get()?.to_str().map_err(|_| NOT_FOUND)?;
        in_context(|driver, _| {
            let loaded = driver.modules.get(&module).ok_or(INVALID_HANDLE)?;
            let device = loaded.device;
            let (at, size) = lock(&driver.devices[device].gpu).variable(&loaded.module, name).ok_or(NOT_FOUND)?;
            driver.memory.insert(at, Range { device, bytes: size, cost: 0 });
            address.set(at)?;
            bytes.set(size)
        })
    })
}

/// `CUfunction_attribute` by number.
#[unsafe(no_mangle)]
extern "C" fn cuFuncGetAttribute(value: Out<i32>, number: u32, function: Handle) -> u32 {
    call("cuFuncGetAttribute", || {
        in_context(|driver, _| {
            let own = driver.knobs.capability.0 * 10 + driver.knobs.capability.1;
            let function = driver.functions.get(&function).ok_or(INVALID_HANDLE)?;
            let found = match number {
                0 => function.shape.max_threads.unwrap_or(1024),
                1 => function.shape.static_shared as u32,
                2 | 7 => 0,
                3 => function.shape.local as u32,
                4 => REGISTERS,
                5 => function.target,
                6 => own,
                8 => function.most_dynamic as u32,
                _ => return Err(INVALID_VALUE),
            };
            value.set(found.cast_signed())
        })
    })
}

/// Dynamic shared memory up to what a block may have; a preference of the carveout makes no difference.
#[unsafe(no_mangle)]
extern "C" fn cuFuncSetAttribute(function: Handle, number: u32, value: i32) -> u32 {
    call("cuFuncSetAttribute", || {
        in_context(|driver, _| {
            let most = limits(driver.knobs.capability).shared_block;
            let function = driver.functions.get_mut(&function).ok_or(INVALID_HANDLE)?;
            match (number, usize::try_from(value)) {
                (8, Ok(bytes)) if bytes + function.shape.static_shared <= most => function.most_dynamic = bytes,
                (9, _) if (-1..=100).contains(&value) => {}
                _ => return Err(INVALID_VALUE),
            }
            Ok(())
        })
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuFuncSetCacheConfig(function: Handle, _config: u32) -> u32 {
    call("cuFuncSetCacheConfig", || in_context(|driver, _| driver.functions.get(&function).map(|_| ()).ok_or(INVALID_HANDLE)))
}

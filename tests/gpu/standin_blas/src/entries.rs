//! The entry points.

use crate::attributes::{
    Descriptions, Done, EXECUTION_FAILED, Handle, INVALID_VALUE, Layout, NOT_INITIALIZED, NOT_SUPPORTED, Preference, Product,
    Status, Value, with,
};
use crate::driver::driver;
use crate::matrix::Kind;
use crate::product::{ALGORITHMS, Job};
use std::collections::HashMap;

/// 12.9.1.
const VERSION: usize = 120_901;

fn status(result: Done) -> u32 {
    result.err().map_or(0, |status: Status| status.0)
}

/// Where a result goes, or where values are. Only callers of the C interface make one.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct Pointer<T>(*mut T);

impl<T: Copy> Pointer<T> {
    fn set(self, i: usize, value: T) -> Done {
        if self.0.is_null() {
            return Err(INVALID_VALUE);
        }
        // SAFETY: the interface asks of its callers that this is null or a place for as many as are asked for.
        unsafe { self.0.add(i).write(value) };
        Ok(())
    }

    fn get(self, n: usize) -> Done<&'static [T]> {
        if self.0.is_null() {
            return Err(INVALID_VALUE);
        }
        // SAFETY: the interface asks of its callers that this is null or so many values; what is borrowed is not kept
        // beyond the call.
        Ok(unsafe { std::slice::from_raw_parts(self.0, n) })
    }
}

/// `cublasLtMatmulAlgo_t`: a number that no other library's algorithms have, and which one.
type Algorithm = [u64; 8];
const OURS: u64 = 0x7374_616e_642d_696e;

/// `cublasLtMatmulHeuristicResult_t`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Found {
    algorithm: Algorithm,
    workspace: usize,
    state: u32,
    waves: f32,
    reserved: [i32; 4],
}

#[unsafe(no_mangle)]
extern "C" fn cublasLtGetVersion() -> usize {
    VERSION
}

#[unsafe(no_mangle)]
extern "C" fn cublasLtCreate(handle: Pointer<Handle>) -> u32 {
    status(driver().and_then(|_| {
        with(|all| {
            let new = all.new_handle();
            all.handles.insert(new);
            handle.set(0, new)
        })
    }))
}

#[unsafe(no_mangle)]
extern "C" fn cublasLtDestroy(handle: Handle) -> u32 {
    status(with(|all| if all.handles.remove(&handle) { Ok(()) } else { Err(NOT_INITIALIZED) }))
}

fn destroy<T>(of: impl FnOnce(&mut Descriptions) -> &mut HashMap<Handle, T>, handle: Handle) -> u32 {
    status(with(|all| of(all).remove(&handle).map(|_| ()).ok_or(INVALID_VALUE)))
}

#[unsafe(no_mangle)]
extern "C" fn cublasLtMatrixLayoutCreate(layout: Pointer<Handle>, kind: u32, rows: u64, columns: u64, leading: i64) -> u32 {
    status(with(|all| {
        let size = |n: u64| usize::try_from(n).map_err(|_| INVALID_VALUE);
        let new = Layout {
            kind: Kind::of(kind)?,
            rows: size(rows)?,
            columns: size(columns)?,
            leading: usize::try_from(leading).map_err(|_| INVALID_VALUE)?,
            by_rows: false,
            batch: 1,
            stride: 0,
        };
        let handle = all.new_handle();
        all.layouts.insert(handle, new);
        layout.set(0, handle)
    }))
}

#[unsafe(no_mangle)]
extern "C" fn cublasLtMatrixLayoutSetAttribute(layout: Handle, number: u32, value: Pointer<u8>, size: usize) -> u32 {
    status(with(|all| all.layouts.get_mut(&layout).ok_or(INVALID_VALUE)?.set(number, &Value(value.get(size)?))))
}

#[unsafe(no_mangle)]
extern "C" fn cublasLtMatrixLayoutDestroy(layout: Handle) -> u32 {
    destroy(|all| &mut all.layouts, layout)
}

/// Sums in f32 (68; 69: pedantic; 74, 75, 77: perhaps less exact), scalars in f32.
#[unsafe(no_mangle)]
extern "C" fn cublasLtMatmulDescCreate(product: Pointer<Handle>, compute: u32, scale: u32) -> u32 {
    status(with(|all| {
        if !matches!(compute, 68 | 69 | 74 | 75 | 77) || scale != 0 {
            return Err(NOT_SUPPORTED);
        }
        let handle = all.new_handle();
        all.products.insert(handle, Product::new(compute));
        product.set(0, handle)
    }))
}

#[unsafe(no_mangle)]
extern "C" fn cublasLtMatmulDescSetAttribute(product: Handle, number: u32, value: Pointer<u8>, size: usize) -> u32 {
    status(with(|all| all.products.get_mut(&product).ok_or(INVALID_VALUE)?.set(number, &Value(value.get(size)?))))
}

#[unsafe(no_mangle)]
extern "C" fn cublasLtMatmulDescDestroy(product: Handle) -> u32 {
    destroy(|all| &mut all.products, product)
}

#[unsafe(no_mangle)]
extern "C" fn cublasLtMatmulPreferenceCreate(preference: Pointer<Handle>) -> u32 {
    status(with(|all| {
        let handle = all.new_handle();
        all.preferences.insert(handle, Preference { workspace: 0, reductions: u32::MAX });
        preference.set(0, handle)
    }))
}

#[unsafe(no_mangle)]
extern "C" fn cublasLtMatmulPreferenceSetAttribute(preference: Handle, number: u32, value: Pointer<u8>, size: usize) -> u32 {
    status(with(|all| all.preferences.get_mut(&preference).ok_or(INVALID_VALUE)?.set(number, &Value(value.get(size)?))))
}

#[unsafe(no_mangle)]
extern "C" fn cublasLtMatmulPreferenceDestroy(preference: Handle) -> u32 {
    destroy(|all| &mut all.preferences, preference)
}

fn job(all: &Descriptions, handle: Handle, product: Handle, layouts: [Handle; 4]) -> Done<Job> {
    if !all.handles.contains(&handle) {
        return Err(NOT_INITIALIZED);
    }
    let layout = |i: usize| all.layouts.get(&layouts[i]).copied().ok_or(INVALID_VALUE);
    let job = Job {
        product: *all.products.get(&product).ok_or(INVALID_VALUE)?,
        layouts: [layout(0)?, layout(1)?, layout(2)?, layout(3)?],
        addresses: [0; 4],
        alpha: 1.0,
        beta: 0.0,
        algorithm: ALGORITHMS[0],
    };
    job.check(driver()?.capability())?;
    Ok(job)
}

#[unsafe(no_mangle)]
extern "C" fn cublasLtMatmulAlgoGetHeuristic(
    handle: Handle,
    product: Handle,
    a: Handle,
    b: Handle,
    c: Handle,
    d: Handle,
    preference: Handle,
    asked: i32,
    found: Pointer<Found>,
    n_found: Pointer<i32>,
) -> u32 {
    status(with(|all| {
        n_found.set(0, 0)?;
        let job = job(all, handle, product, [a, b, c, d])?;
        let ranked = job.ranked(all.preferences.get(&preference).ok_or(INVALID_VALUE)?);
        let asked = usize::try_from(asked).ok().filter(|&n| n > 0).ok_or(INVALID_VALUE)?;
        let n = ranked.len().min(asked);
        for (i, &algorithm) in ranked[..n].iter().enumerate() {
            let workspace = job.workspace(algorithm);
            let algorithm = [OURS, algorithm, 0, 0, 0, 0, 0, 0];
            found.set(i, Found { algorithm, workspace, state: 0, waves: 1.0, reserved: [0; 4] })?;
        }
        n_found.set(0, n as i32)
    }))
}

#[unsafe(no_mangle)]
extern "C" fn cublasLtMatmul(
    handle: Handle,
    product: Handle,
    alpha: Pointer<f32>,
    a: u64,
    a_layout: Handle,
    b: u64,
    b_layout: Handle,
    beta: Pointer<f32>,
    c: u64,
    c_layout: Handle,
    d: u64,
    d_layout: Handle,
    algorithm: Pointer<Algorithm>,
    _workspace: u64,
    workspace_bytes: usize,
    stream: usize,
) -> u32 {
    let job = with(|all| {
        let mut job = job(all, handle, product, [a_layout, b_layout, c_layout, d_layout])?;
        job.addresses = [a, b, c, d];
        job.check_addresses()?;
        (job.alpha, job.beta) = (alpha.get(1)?[0], beta.get(1)?[0]);
        job.algorithm = if algorithm.0.is_null() {
            let any = Preference { workspace: workspace_bytes, reductions: u32::MAX };
            job.ranked(&any).first().copied().ok_or(NOT_SUPPORTED)?
        } else {
            let given = algorithm.get(1)?[0];
            Some(given[1]).filter(|id| given[0] == OURS && ALGORITHMS.contains(id)).ok_or(INVALID_VALUE)?
        };
        if job.workspace(job.algorithm) > workspace_bytes {
            return Err(INVALID_VALUE);
        }
        Ok(job)
    });
    status(job.and_then(|job| {
        let (m, n, k) = job.sizes();
        let operations = 2 * m as u64 * n as u64 * k as u64 * job.layouts[3].batch as u64;
        let name = format!("cublasLt {} {m}x{n}x{k}", job.layouts[0].kind.name());
        match driver()?.queue(stream, &name, operations, job) {
            0 => Ok(()),
            _ => Err(EXECUTION_FAILED),
        }
    }))
}

//! Descriptions that callers make and change: of matrices, of the product, of what is preferred.

use crate::matrix::Kind;
use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// `cublasStatus_t`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Status(pub(crate) u32);

pub(crate) const NOT_INITIALIZED: Status = Status(1);
pub(crate) const INVALID_VALUE: Status = Status(7);
pub(crate) const EXECUTION_FAILED: Status = Status(13);
pub(crate) const NOT_SUPPORTED: Status = Status(15);

pub(crate) type Done<T = ()> = Result<T, Status>;

/// What a C caller holds of a description.
pub(crate) type Handle = usize;

/// A matrix in memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Layout {
    pub(crate) kind: Kind,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    /// Elements from one column to the next, or one row where `by_rows`.
    pub(crate) leading: usize,
    pub(crate) by_rows: bool,
    pub(crate) batch: usize,
    /// Elements from one matrix to the next.
    pub(crate) stride: i64,
}

/// How scales of e4m3 are given.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum ScaleMode {
    #[default]
    One,
    /// One for each row of A, or column of B.
    Each,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Product {
    /// `cublasComputeType_t`.
    pub(crate) compute: u32,
    /// A and B are transposed.
    pub(crate) transposed: [bool; 2],
    pub(crate) epilogue: u32,
    pub(crate) bias: u64,
    pub(crate) bias_stride: i64,
    pub(crate) bias_kind: Option<Kind>,
    /// Addresses of the scales of A and B; 0: 1.
    pub(crate) scales: [u64; 2],
    pub(crate) scale_modes: [ScaleMode; 2],
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Preference {
    pub(crate) workspace: usize,
    /// Which ways there may be to add up parts of k.
    pub(crate) reductions: u32,
}

#[derive(Default)]
pub(crate) struct Descriptions {
    next: Handle,
    pub(crate) handles: HashSet<Handle>,
    pub(crate) layouts: HashMap<Handle, Layout>,
    pub(crate) products: HashMap<Handle, Product>,
    pub(crate) preferences: HashMap<Handle, Preference>,
}

static ALL: Mutex<Option<Descriptions>> = Mutex::new(None);

pub(crate) fn all() -> MutexGuard<'static, Option<Descriptions>> {
    let mut guard = ALL.lock().unwrap_or_else(PoisonError::into_inner);
    guard.get_or_insert_with(Descriptions::default);
    guard
}

pub(crate) fn with<T>(f: impl FnOnce(&mut Descriptions) -> Done<T>) -> Done<T> {
    f(all().as_mut().ok_or(NOT_INITIALIZED)?)
}

impl Descriptions {
    pub(crate) fn new_handle(&mut self) -> Handle {
        self.next += 16;
        self.next
    }
}

/// The value of an attribute, whose size must be right.
pub(crate) struct Value<'a>(pub(crate) &'a [u8]);

impl Value<'_> {
    fn u32(&self) -> Done<u32> {
        self.0.try_into().map(u32::from_le_bytes).map_err(|_| INVALID_VALUE)
    }

    fn u64(&self) -> Done<u64> {
        self.0.try_into().map(u64::from_le_bytes).map_err(|_| INVALID_VALUE)
    }

    fn size(&self) -> Done<usize> {
        usize::try_from(self.u64()?).map_err(|_| INVALID_VALUE)
    }
}

impl Layout {
    pub(crate) fn set(&mut self, number: u32, value: &Value) -> Done {
        match number {
            0 => self.kind = Kind::of(value.u32()?)?,
            1 => {
                self.by_rows = match value.u32()? {
                    0 => false,
                    1 => true,
                    _ => return Err(NOT_SUPPORTED),
                }
            }
            2 => self.rows = value.size()?,
            3 => self.columns = value.size()?,
            4 => self.leading = value.size()?,
            5 => self.batch = value.u32()? as usize,
            6 => self.stride = value.u64()?.cast_signed(),
            _ => return Err(NOT_SUPPORTED),
        }
        Ok(())
    }
}

impl Product {
    pub(crate) fn new(compute: u32) -> Self {
        Self {
            compute,
            transposed: [false; 2],
            epilogue: 1,
            bias: 0,
            bias_stride: 0,
            bias_kind: None,
            scales: [0; 2],
            scale_modes: [ScaleMode::One; 2],
        }
    }

    pub(crate) fn set(&mut self, number: u32, value: &Value) -> Done {
        match number {
            // Scalars are on the host; the result is not transposed; all of it is computed.
            2 | 5 | 6 if value.u32()? == 0 => {}
            3 | 4 => {
                self.transposed[number as usize - 3] = match value.u32()? {
                    0 => false,
                    1 => true,
                    _ => return Err(NOT_SUPPORTED),
                }
            }
            7 => {
                self.epilogue = match value.u32()? {
                    known @ (1 | 2 | 4 | 6 | 32 | 36) => known,
                    _ => return Err(NOT_SUPPORTED),
                }
            }
            8 => self.bias = value.u64()?,
            10 => self.bias_stride = value.u64()?.cast_signed(),
            17 | 18 => self.scales[number as usize - 17] = value.u64()?,
            // Sums are always in f32, which is more exact than what may be asked for.
            25 => {}
            26 => self.bias_kind = Some(Kind::of(value.u32()?)?),
            31 | 32 => {
                self.scale_modes[number as usize - 31] = match value.u32()? {
                    0 => ScaleMode::One,
                    3 => ScaleMode::Each,
                    _ => return Err(NOT_SUPPORTED),
                }
            }
            _ => return Err(NOT_SUPPORTED),
        }
        Ok(())
    }
}

impl Preference {
    pub(crate) fn set(&mut self, number: u32, value: &Value) -> Done {
        match number {
            0 => {}
            1 => self.workspace = value.size()?,
            3 => self.reductions = value.u32()?,
            // Alignments, which this library does not care for.
            5..=8 => _ = value.u32()?,
            _ => return Err(NOT_SUPPORTED),
        }
        Ok(())
    }
}

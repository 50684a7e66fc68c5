//! Global memory: allocations far from each other, so that an access beyond one is in no other.

use crate::fault::{FaultKind, Wrong, wrong};
use crate::shadow::Shadow;

/// Where shared memory begins; addresses below are reserved, as on hardware since `sm_90`.
pub(crate) const SHARED_START: u64 = 1024;
/// Windows of generic addresses.
pub(crate) const SHARED_BASE: u64 = 1 << 60;
pub(crate) const LOCAL_BASE: u64 = 1 << 61;
pub(crate) const PARAM_BASE: u64 = 3 << 60;
const SHIFT: u32 = 36;
/// What an allocation's address is a multiple of, and of no more: kernels may count on no more.
const START: u64 = 256;

/// Bytes that are poisoned at a time, when the first of them is touched: large allocations cost what is used of them.
const PAGE: usize = 1 << 16;

#[derive(Debug)]
pub(crate) struct Allocation {
    pub(crate) bytes: Vec<u8>,
    pub(crate) shadow: Shadow,
    pub(crate) read_only: bool,
    /// Which pages hold what they should.
    ready: Vec<bool>,
}

#[derive(Debug, Default)]
pub(crate) struct Global {
    allocations: Vec<Option<Allocation>>,
    place: u64,
    poison: u8,
}

impl Global {
    pub(crate) fn new(place: u64, poison: u8) -> Self {
        Self { allocations: Vec::new(), place, poison }
    }

    /// Memory that nobody wrote.
    pub(crate) fn reserve(&mut self, bytes: usize) -> u64 {
        self.push(vec![0; bytes], false, vec![false; bytes.div_ceil(PAGE)])
    }

    pub(crate) fn add(&mut self, bytes: Vec<u8>, read_only: bool) -> u64 {
        let ready = vec![true; bytes.len().div_ceil(PAGE)];
        self.push(bytes, read_only, ready)
    }

    fn push(&mut self, bytes: Vec<u8>, read_only: bool, ready: Vec<bool>) -> u64 {
        let shadow = Shadow::new(bytes.len());
        self.allocations.push(Some(Allocation { bytes, shadow, read_only, ready }));
        self.place + ((self.allocations.len() as u64) << SHIFT) + START
    }

    fn index(&self, address: u64) -> usize {
        ((address.wrapping_sub(self.place) >> SHIFT) as usize).wrapping_sub(1)
    }

    pub(crate) fn remove(&mut self, address: u64) -> bool {
        let index = self.index(address);
        address & ((1 << SHIFT) - 1) == START && self.allocations.get_mut(index).is_some_and(|slot| slot.take().is_some())
    }

    /// The allocation that holds these bytes, and where in it they begin.
    pub(crate) fn find(&mut self, address: u64, len: usize, lane: Option<usize>) -> Result<(&mut Allocation, usize), Wrong> {
        let (index, poison) = (self.index(address), self.poison);
        let at = (address & ((1 << SHIFT) - 1)).wrapping_sub(START) as usize;
        let Some(Some(allocation)) = self.allocations.get_mut(index) else {
            return wrong(FaultKind::Bounds, lane, format!("{len} bytes at {address:#x}, where nothing is allocated"));
        };
        if at.checked_add(len).is_none_or(|end| end > allocation.bytes.len()) {
            let size = allocation.bytes.len();
            let offset = at as i64;
            return wrong(
                FaultKind::Bounds,
                lane,
                format!("{len} bytes at {address:#x}, {offset} bytes into an allocation of {size}"),
            );
        }
        if len > 0 {
            for page in at / PAGE..=(at + len - 1) / PAGE {
                if !allocation.ready[page] {
                    allocation.poison(page, poison);
                }
            }
        }
        Ok((allocation, at))
    }
}

impl Allocation {
    #[cold]
    fn poison(&mut self, page: usize, poison: u8) {
        let end = self.bytes.len().min((page + 1) * PAGE);
        self.bytes[page * PAGE..end].fill(poison);
        self.ready[page] = true;
    }
}

/// Up to 8 bytes, little endian.
pub(crate) fn get(bytes: &[u8], at: usize, len: usize) -> u64 {
    match len {
        1 => u64::from(bytes[at]),
        2 => u64::from(u16::from_le_bytes([bytes[at], bytes[at + 1]])),
        4 => bytes[at..].first_chunk().map_or(0, |b| u64::from(u32::from_le_bytes(*b))),
        _ => bytes[at..].first_chunk().map_or(0, |b| u64::from_le_bytes(*b)),
    }
}

pub(crate) fn put(bytes: &mut [u8], at: usize, len: usize, value: u64) {
    bytes[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
}

//! Copies of boxes of tensors to shared memory: `cp.async.bulk.tensor`.

use super::copies::Later;
use super::memory::resolve;
use crate::block::Block;
use crate::fault::{FaultKind, Wrong, wrong};
use crate::inst::{Address, R, Space};
use crate::shadow::Access;
use crate::tensor_map::TensorMap;
use crate::warp::{Warp, lanes};

/// Bytes after which the pattern of the swizzle begins anew.
const PATTERN: u64 = 1024;

/// Where 128-byte swizzle puts what would be at an address: bits 4 to 6 are changed by bits 7 to 9.
pub(super) fn swizzled(address: u64) -> u64 {
    address ^ (address >> 7 & 7) << 4
}

impl Block<'_> {
    pub(super) fn bulk_box(
        &mut self,
        warp: &mut Warp,
        (to, map, bar): (Address, Address, Address),
        place: [R; 2],
        mask: u32,
    ) -> Result<(), Wrong> {
        let (to, maps) = (resolve(warp, to, mask)?, resolve(warp, map, mask)?);
        for lane in lanes(mask) {
            let map = self.tensor_map(maps.space, maps.address[lane], lane)?;
            let to = to.address[lane];
            if !to.is_multiple_of(PATTERN) {
                let message = format!("a swizzled box at shared address {to:#x}: it must be a multiple of {PATTERN}");
                return wrong(FaultKind::Misaligned, lane, message);
            }
            let [x, y] = place.map(|r| i64::from((warp.regs[r][lane] as u32).cast_signed()));
            let bar = self.copies_barrier(warp, bar, lane)?;
            let mut pieces = Vec::new();
            for row in 0..map.box_rows {
                // A box's rows of less than 128 bytes are as far apart as their bytes; those of the swizzle's width have all lines.
                for column in (0..map.box_columns).step_by(8) {
                    let at = swizzled(to + 2 * (row * map.box_columns + column));
                    let at = self.parts.shared.locate(at, 16, lane)?;
                    let (from, there) = inside(&map, x + column.cast_signed(), y + row.cast_signed());
                    pieces.push((at, from, there));
                }
            }
            self.begin_box(warp, &pieces, lane)?;
            self.later.push(Later::Box { pieces, bar, pc: warp.pc });
        }
        Ok(())
    }

    /// The tensor that is described at an address.
    fn tensor_map(&mut self, space: Space, address: u64, lane: usize) -> Result<TensorMap, Wrong> {
        if !address.is_multiple_of(64) {
            return wrong(
                FaultKind::Misaligned,
                lane,
                format!("a tensor's description at {address:#x}: it must be a multiple of 64"),
            );
        }
        let bytes = match space {
            Space::Param => self.launch.params.get(address as usize..).and_then(|bytes| bytes.get(..128)).map(<[u8]>::to_vec),
            Space::Global => {
                let (allocation, at) = self.global.find(address, 128, lane.into())?;
                Some(allocation.bytes[at..at + 128].to_vec())
            }
            _ => None,
        };
        let map = bytes.and_then(|bytes| TensorMap::decode(&bytes));
        map.map_or_else(|| wrong(FaultKind::Bounds, lane, format!("{address:#x} describes no tensor")), Ok)
    }

    fn begin_box(&mut self, warp: &Warp, pieces: &[(usize, u64, usize)], lane: usize) -> Result<(), Wrong> {
        let mut sectors = Vec::new();
        for &(at, from, there) in pieces {
            let parts = &mut *self.parts;
            parts.shared.behind_fence(at, 16, parts.clocks.fenced(warp.id), lane)?;
            parts.shared.begin_copy(at, 16, &Self::by(&parts.clocks, warp, lane))?;
            if there > 0 {
                self.touch_global(from, there, Access::Read, warp.id, lane)?;
                sectors.extend([from / 32, (from + there as u64 - 1) / 32]);
                self.parts.totals.global_read_bytes += there as u64;
            }
        }
        sectors.sort_unstable();
        sectors.dedup();
        self.parts.totals.global_read_sectors += sectors.len() as u64;
        self.parts.counts[warp.pc].sectors += sectors.len() as u64;
        Ok(())
    }
}

/// Where eight elements are, and how many bytes of them: elements outside of the tensor are not there. (Those that begin outside
/// and end inside would be: boxes begin at multiples of eight columns.)
fn inside(map: &TensorMap, column: i64, row: i64) -> (u64, usize) {
    let (Ok(column), Ok(row)) = (u64::try_from(column), u64::try_from(row)) else { return (0, 0) };
    if column >= map.columns || row >= map.rows {
        return (0, 0);
    }
    (map.address + row * map.stride + 2 * column, 2 * (map.columns - column).min(8) as usize)
}

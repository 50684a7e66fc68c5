//! Matrices: `ldmatrix`, `stmatrix`, `movmatrix`, `mma.sync`.

use super::memory::{Where, count_shared, resolve};
use crate::block::Block;
use crate::fault::{FaultKind, Wrong, wrong};
use crate::float::{E4M3, E5M2, from_bf16, from_f16, to_f16};
use crate::inst::{Address, Element, Mma, Op, R, Space};
use crate::shadow::Access;
use crate::warp::Warp;

impl Block<'_> {
    /// All 32 lanes take part.
    pub(super) fn tensor_step(&mut self, warp: &mut Warp, op: &Op) -> Result<(), Wrong> {
        match op {
            Op::LoadMatrix { at, d, transpose } => self.load_matrix(warp, *at, d, *transpose),
            Op::StoreMatrix { at, a, transpose } => self.store_matrix(warp, *at, a, *transpose),
            Op::MoveMatrix { d, a } => {
                let rows = rows_of(warp, *a);
                let value = fragments(&rows, true);
                warp.set(*d, &value, u32::MAX);
                Ok(())
            }
            Op::Mma(mma) => {
                multiply(warp, mma);
                self.parts.totals.tensor_flops += 2 * 16 * 8 * mma.k as u64;
                Ok(())
            }
            _ => wrong(FaultKind::Unsupported, None, "no operation of matrices"),
        }
    }

    /// Where the rows of matrix `m` are: eight lanes' addresses, of 16 bytes each.
    fn row(&self, w: &Where, m: usize, row: usize) -> Result<usize, Wrong> {
        let lane = 8 * m + row;
        if w.space != Space::Shared {
            return wrong(FaultKind::Bounds, lane, "a matrix that is not in shared memory");
        }
        self.parts.shared.locate(w.address[lane], 16, lane)
    }

    fn load_matrix(&mut self, warp: &mut Warp, at: Address, d: &[R], transpose: bool) -> Result<(), Wrong> {
        let used = u32::MAX >> (32 - 8 * d.len());
        let w = resolve(warp, at, used)?;
        for (m, d) in d.iter().enumerate() {
            let mut rows = [[0u16; 8]; 8];
            for (i, row) in rows.iter_mut().enumerate() {
                let from = self.row(&w, m, i)?;
                let parts = &mut *self.parts;
                parts.shared.read(from, 16, &Self::by(&parts.clocks, warp, 8 * m + i))?;
                for (j, value) in row.iter_mut().enumerate() {
                    *value = u16::from_le_bytes([parts.shared.bytes[from + 2 * j], parts.shared.bytes[from + 2 * j + 1]]);
                }
            }
            warp.set(*d, &fragments(&rows, transpose), u32::MAX);
        }
        count_shared(&mut self.parts.totals, &mut self.parts.counts[warp.pc], &w, 16);
        Ok(())
    }

    fn store_matrix(&mut self, warp: &mut Warp, at: Address, a: &[R], transpose: bool) -> Result<(), Wrong> {
        let used = u32::MAX >> (32 - 8 * a.len());
        let w = resolve(warp, at, used)?;
        for (m, a) in a.iter().enumerate() {
            let rows = rows_of(warp, *a);
            for (i, row) in rows.iter().enumerate() {
                let to = self.row(&w, m, i)?;
                let bytes: Vec<u8> = (0..8).flat_map(|j| (if transpose { rows[j][i] } else { row[j] }).to_le_bytes()).collect();
                let parts = &mut *self.parts;
                parts.shared.write(to, &bytes, Access::Write, &Self::by(&parts.clocks, warp, 8 * m + i))?;
            }
        }
        count_shared(&mut self.parts.totals, &mut self.parts.counts[warp.pc], &w, 16);
        Ok(())
    }
}

/// Each lane's two values of a matrix of 8 by 8: lane 4r+c has those at (r, 2c) and (r, 2c+1); transposed, at (2c, r) and
/// (2c+1, r).
fn fragments(rows: &[[u16; 8]; 8], transpose: bool) -> [u64; 32] {
    std::array::from_fn(|lane| {
        let (r, c) = (lane / 4, lane % 4 * 2);
        let (low, high) = if transpose { (rows[c][r], rows[c + 1][r]) } else { (rows[r][c], rows[r][c + 1]) };
        u64::from(low) | u64::from(high) << 16
    })
}

fn rows_of(warp: &Warp, a: R) -> [[u16; 8]; 8] {
    std::array::from_fn(|r| std::array::from_fn(|c| (warp.regs[a][4 * r + c / 2] >> (16 * (c % 2))) as u16))
}

/// Calls a function with what takes a register apart: the values in it, lowest first.
macro_rules! by_element {
    ($element:expr, $call:ident($($arg:expr),*)) => {
        match $element {
            Element::Bf16 => $call($($arg,)* |r| [from_bf16(r as u16), from_bf16((r >> 16) as u16)]),
            Element::F16 => $call($($arg,)* |r| [from_f16(r as u16), from_f16((r >> 16) as u16)]),
            // The hardware looks at the upper 19 bits.
            Element::Tf32 => $call($($arg,)* |r| [f32::from_bits(r as u32 & 0xFFFF_E000)]),
            Element::E4m3 => $call($($arg,)* |r| bytes(r).map(|b| E4M3.decode(b))),
            Element::E5m2 => $call($($arg,)* |r| bytes(r).map(|b| E5M2.decode(b))),
            Element::S8 => $call($($arg,)* |r| bytes(r).map(|b| f32::from(b as i8))),
            Element::U8 => $call($($arg,)* |r| bytes(r).map(f32::from)),
        }
    };
}

fn bytes(register: u64) -> [u8; 4] {
    (register as u32).to_le_bytes()
}

pub(super) fn rows(a: &mut [[f32; 32]; 16], warp: &Warp, registers: &[R], element: Element) {
    fn fill<const N: usize>(a: &mut [[f32; 32]; 16], warp: &Warp, registers: &[R], values: impl Fn(u64) -> [f32; N]) {
        for (i, r) in registers.iter().enumerate() {
            for (lane, &register) in warp.regs[*r].iter().enumerate() {
                let (g, t) = (lane / 4, lane % 4);
                a[g + 8 * (i % 2)][N * t + i / 2 * 4 * N..][..N].copy_from_slice(&values(register));
            }
        }
    }
    by_element!(element, fill(a, warp, registers));
}

fn columns(b: &mut [[f32; 8]; 32], warp: &Warp, registers: &[R], element: Element) {
    fn fill<const N: usize>(b: &mut [[f32; 8]; 32], warp: &Warp, registers: &[R], values: impl Fn(u64) -> [f32; N]) {
        for (i, r) in registers.iter().enumerate() {
            for (lane, &register) in warp.regs[*r].iter().enumerate() {
                let (g, t) = (lane / 4, lane % 4);
                for (j, value) in values(register).into_iter().enumerate() {
                    b[N * t + i * 4 * N + j][g] = value;
                }
            }
        }
    }
    by_element!(element, fill(b, warp, registers));
}

/// D = A * B + C. Lane 4g+t has of A the rows g and g+8 and columns from t, of B the column g and rows from t, of C and D
/// the rows g and g+8 and the columns 2t and 2t+1 (PTX ISA, matrix fragments).
fn multiply(warp: &mut Warp, mma: &Mma) {
    let (mut a, mut b) = ([[0f32; 32]; 16], [[0f32; 8]; 32]);
    rows(&mut a, warp, &mma.a, mma.a_type);
    columns(&mut b, warp, &mma.b, mma.b_type);
    if matches!(mma.a_type, Element::S8 | Element::U8) {
        return integers(warp, mma, &a, &b);
    }
    let mut c = [[0; 32]; 4];
    for (c, r) in c.iter_mut().zip(&mma.c) {
        *c = warp.regs[*r];
    }
    for lane_row in 0..8 {
        for high in 0..2 {
            let mut sums: [f32; 8] = std::array::from_fn(|column| {
                let c = c[if mma.half_sums { high } else { 2 * high + column % 2 }][4 * lane_row + column / 2];
                if mma.half_sums { from_f16((c >> (16 * (column % 2))) as u16) } else { f32::from_bits(c as u32) }
            });
            for (x, row) in a[lane_row + 8 * high][..mma.k].iter().zip(&b) {
                for (sum, y) in sums.iter_mut().zip(row) {
                    *sum += x * y;
                }
            }
            for (column, sum) in sums.iter().enumerate() {
                let lane = 4 * lane_row + column / 2;
                if mma.half_sums {
                    let (d, shift) = (&mut warp.regs[mma.d[high]][lane], 16 * (column % 2));
                    *d = *d & !(0xFFFF << shift) | u64::from(to_f16(*sum)) << shift;
                } else {
                    warp.regs[mma.d[2 * high + column % 2]][lane] = u64::from(sum.to_bits());
                }
            }
        }
    }
}

/// Sums of integers: exact, and wrapping at 32 bits.
fn integers(warp: &mut Warp, mma: &Mma, a: &[[f32; 32]; 16], b: &[[f32; 8]; 32]) {
    let c: Vec<_> = mma.c.iter().map(|r| warp.regs[*r]).collect();
    for (row, of_a) in a.iter().enumerate() {
        for column in 0..8 {
            let (lane, i) = (4 * (row % 8) + column / 2, 2 * (row / 8) + column % 2);
            let products = of_a[..mma.k].iter().zip(b).map(|(x, y)| (x * y[column]) as i32);
            let sum = products.fold(c[i][lane] as i32, i32::wrapping_add);
            warp.regs[mma.d[i]][lane] = u64::from(sum as u32);
        }
    }
}

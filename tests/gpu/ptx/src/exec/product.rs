//! Products of warpgroups: `wgmma`. Each of the four warps has 16 of the 64 rows, and does its part on its own, at once; until it has
//! been waited for, nobody may touch what it uses.

use super::boxes::swizzled;
use super::tensor::rows;
use crate::block::Block;
use crate::fault::{FaultKind, Wrong, wrong};
use crate::float::from_bf16;
use crate::inst::{Element, Factor, Op, Product, R};
use crate::warp::{UnderWay, Warp};

/// A matrix in shared memory, of rows of 128 bytes with 128-byte swizzle (PTX ISA, matrix descriptors). Eight rows are a pattern.
struct Matrix {
    start: u64,
    /// From eight rows to the next eight.
    stride: u64,
    /// From 64 columns to the next 64, where columns lie together.
    lead: u64,
}

impl Matrix {
    fn described(descriptor: u64, by_columns: bool) -> Result<Self, Wrong> {
        let bytes = |shift: u32| (descriptor >> shift & 0x3FFF) << 4;
        let matrix = Self { start: bytes(0), lead: bytes(16), stride: bytes(32) };
        if descriptor >> 62 != 1 || descriptor >> 49 & 7 != 0 {
            let message = format!("descriptor {descriptor:#x}: only 128-byte swizzle without an offset is known");
            return wrong(FaultKind::Unsupported, None, message);
        }
        // With k together, 32 bytes of a row are used; else all.
        let within = matrix.start % 128 + if by_columns { 128 } else { 32 };
        if matrix.start >> 7 & 7 != 0
            || within > 128
            || !matrix.stride.is_multiple_of(1024)
            || by_columns && !matrix.lead.is_multiple_of(1024)
        {
            let message = format!("descriptor {descriptor:#x}: patterns of 128-byte swizzle begin at multiples of 1024");
            return wrong(FaultKind::Misaligned, None, message);
        }
        Ok(matrix)
    }

    /// Where 16 bytes are: of row `row`, the `piece`-th.
    fn at(&self, row: u64, piece: u64) -> u64 {
        swizzled(self.start + row / 8 * self.stride + row % 8 * 128 + piece / 8 * self.lead + piece % 8 * 16)
    }
}

/// What all lanes have.
fn uniform(warp: &Warp, r: R) -> Result<u64, Wrong> {
    let lanes = &warp.regs[r];
    match lanes.iter().position(|x| *x != lanes[0]) {
        Some(lane) => wrong(FaultKind::Divergence, lane, "a descriptor that is not the same in all lanes"),
        None => Ok(lanes[0]),
    }
}

impl Block<'_> {
    /// All 32 lanes take part.
    pub(super) fn product_step(&mut self, warp: &mut Warp, op: &Op) -> Result<(), Wrong> {
        match op {
            Op::Product(product) => self.product(warp, product),
            Op::ProductCommit => {
                warp.product_group += 1;
                Ok(())
            }
            Op::ProductWait { keep } => self.product_wait(warp, *keep),
            // What it orders was found from the text.
            _ => Ok(()),
        }
    }

    fn product(&mut self, warp: &mut Warp, product: &Product) -> Result<(), Wrong> {
        if product.unfenced {
            return wrong(
                FaultKind::Unfenced,
                None,
                "operands in registers that may have been touched since the last wgmma.fence",
            );
        }
        let b = uniform(warp, product.b)?;
        let a = if let Factor::Shared(r) = product.a { uniform(warp, r)? } else { 0 };
        self.together(warp, [a, b])?;
        self.product_registers(warp, product)?;
        let mut reads = Vec::new();
        let mut left = [[0f32; 32]; 16];
        match &product.a {
            Factor::Registers(registers) => rows(&mut left, warp, registers, Element::Bf16),
            Factor::Shared(_) => {
                let matrix = Matrix::described(a, false)?;
                let first = warp.id as u64 % 4 * 16;
                for (row, to) in left.iter_mut().enumerate() {
                    for piece in 0..2 {
                        let values = self.product_piece(warp, matrix.at(first + row as u64, piece), &mut reads)?;
                        to[8 * piece as usize..][..8].copy_from_slice(&values);
                    }
                }
            }
        }
        let matrix = Matrix::described(b, product.b_by_columns)?;
        let mut right = vec![0f32; 16 * product.n];
        if product.b_by_columns {
            for (k, to) in right.chunks_mut(product.n).enumerate() {
                for (piece, to) in to.chunks_mut(8).enumerate() {
                    to.copy_from_slice(&self.product_piece(warp, matrix.at(k as u64, piece as u64), &mut reads)?);
                }
            }
        } else {
            for column in 0..product.n {
                for piece in 0..2 {
                    let values = self.product_piece(warp, matrix.at(column as u64, piece), &mut reads)?;
                    for (k, value) in values.into_iter().enumerate() {
                        right[(8 * piece as usize + k) * product.n + column] = value;
                    }
                }
            }
        }
        let adds = product.adds.map_or(u32::MAX, |cond| warp.cond(cond));
        if adds != 0 && adds != u32::MAX {
            return wrong(FaultKind::Divergence, None, "lanes that disagree on what is added to");
        }
        multiply(warp, &product.d, &left, &right, adds != 0);
        self.parts.totals.tensor_flops += 2 * 16 * 16 * product.n as u64;
        warp.products.push(UnderWay { group: warp.product_group, pc: warp.pc, reads });
        Ok(())
    }

    /// The warps of a warpgroup do the same products in the same order.
    fn together(&mut self, warp: &mut Warp, descriptors: [u64; 2]) -> Result<(), Wrong> {
        if !self.launch.threads().is_multiple_of(128) {
            return wrong(FaultKind::Divergence, None, "a product of a warpgroup of less than four warps");
        }
        let this = (warp.pc, descriptors);
        self.products.resize_with(self.launch.threads() as usize / 128, Vec::new);
        let before = &mut self.products[warp.id / 4];
        match before.get(warp.n_products) {
            None => before.push(this),
            Some(other) if *other == this => {}
            Some(_) => return wrong(FaultKind::Divergence, None, "another product than that of other warps of the warpgroup"),
        }
        warp.n_products += 1;
        Ok(())
    }

    /// Whether all warps of a warpgroup did all its products.
    pub(crate) fn products_were_together(&self) -> Result<(), Wrong> {
        for (i, products) in self.products.iter().enumerate() {
            if let Some(warp) = self.parts.warps[4 * i..][..4].iter().find(|warp| warp.n_products != products.len()) {
                let message = format!("warp {} took part in {} of {} products", warp.id, warp.n_products, products.len());
                return wrong(FaultKind::Divergence, None, message);
            }
        }
        Ok(())
    }

    /// Sums may be added to by product after product of one shape; else, what a product under way uses is its own.
    fn product_registers(&self, warp: &Warp, product: &Product) -> Result<(), Wrong> {
        for under_way in &warp.products {
            let Op::Product(other) = &self.kernel.code[under_way.pc].op else { continue };
            let shares = |a: &[R], b: &[R]| a.iter().any(|r| b.contains(r));
            let sums = shares(&product.sums, &other.sums) && product.sums != other.sums;
            if sums || shares(&product.sums, &other.factors) || shares(&product.factors, &other.sums) {
                return wrong(FaultKind::InFlight, None, "registers of a product that was not waited for");
            }
        }
        Ok(())
    }

    /// Whether an instruction, no product itself, touches registers of a product under way.
    pub(crate) fn touches_products(&self, warp: &Warp, held: &[R]) -> Result<(), Wrong> {
        for under_way in &warp.products {
            let Op::Product(product) = &self.kernel.code[under_way.pc].op else { continue };
            if held.iter().any(|r| product.sums.contains(r) || product.factors.contains(r)) {
                return wrong(FaultKind::InFlight, None, "registers of a product that was not waited for");
            }
        }
        Ok(())
    }

    /// Eight elements of shared memory.
    fn product_piece(&mut self, warp: &Warp, address: u64, reads: &mut Vec<(usize, [u8; 16])>) -> Result<[f32; 8], Wrong> {
        let at = self.parts.shared.locate(address, 16, None)?;
        let parts = &mut *self.parts;
        parts.shared.read(at, 16, &Self::by(&parts.clocks, warp, 0))?;
        parts.shared.behind_fence(at, 16, parts.clocks.fenced(warp.id), 0)?;
        let bytes: [u8; 16] = std::array::from_fn(|i| parts.shared.bytes[at + i]);
        reads.push((at, bytes));
        Ok(std::array::from_fn(|i| from_bf16(u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]))))
    }

    /// Until here products may read: what they read must still be there, and nobody may have written it.
    fn product_wait(&mut self, warp: &mut Warp, keep: u32) -> Result<(), Wrong> {
        let limit = warp.product_group.saturating_sub(keep);
        let (done, rest): (Vec<_>, Vec<_>) = std::mem::take(&mut warp.products).into_iter().partition(|p| p.group < limit);
        warp.products = rest;
        for product in done {
            self.blame = product.pc;
            for (at, bytes) in product.reads {
                let parts = &mut *self.parts;
                parts.shared.read(at, 16, &Self::by(&parts.clocks, warp, 0))?;
                if parts.shared.bytes[at..at + 16] != bytes {
                    let message = "shared memory that was written before a product that reads it was waited for";
                    return wrong(FaultKind::InFlight, None, message);
                }
            }
        }
        warp.epoch += 1;
        Ok(())
    }
}

/// D = A * B (+ D): a warp's 16 rows. Lane 4g+t has of each 8 columns the rows g and g+8 and the columns 2t and 2t+1.
fn multiply(warp: &mut Warp, d: &[R], left: &[[f32; 32]; 16], right: &[f32], adds: bool) {
    let n = 2 * d.len();
    let mut sums = vec![0f32; n];
    for (row, left) in left.iter().enumerate() {
        let place = |column: usize| (d[column / 8 * 4 + row / 8 * 2 + column % 2], row % 8 * 4 + column % 8 / 2);
        for (column, sum) in sums.iter_mut().enumerate() {
            let (r, lane) = place(column);
            *sum = if adds { f32::from_bits(warp.regs[r][lane] as u32) } else { 0.0 };
        }
        for (x, right) in left[..16].iter().zip(right.chunks(n)) {
            for (sum, y) in sums.iter_mut().zip(right) {
                *sum += x * y;
            }
        }
        for (column, sum) in sums.iter().enumerate() {
            let (r, lane) = place(column);
            warp.regs[r][lane] = u64::from(sum.to_bits());
        }
    }
}

//! Layers of experts as launches on the device's stream. Who uses which expert is found, and listed, on the GPU: no step waits for the
//! host, and steps with experts are graphs like others.
//!
//! Invariant: what a token gets depends on its own values alone: its experts on its scores, each product on its row, and the sum is in
//! the order of the experts' numbers.

use super::blas::Output;
use super::device::{Act, CudaDevice, Hidden, Place, Weight};
use super::driver::{Param, arg};
use super::memory::{Arena, aligned};
use super::step::Step;
use crate::device::{Activation, Expert, ExpertSizes, Experts};
use anyhow::{Context, Result, ensure};

/// Experts that a layer may have, and that a token may use: what a warp of `choose_experts` has registers and lanes for.
const MAX_EXPERTS: usize = 512;
const MAX_USED: usize = 32;

/// struct Sizes of `linear_experts.cu`
#[repr(C)]
struct LinearSizes {
    stride: u64,
    n: u32,
    k: u32,
    n_experts: u32,
    list_stride: u32,
    uses_per_row: u32,
    padding: u32,
}

// SAFETY: the fields of struct Sizes in linear_experts.cu, its padding written.
unsafe impl Param for LinearSizes {}

/// Whether there are kernels for experts of these sizes.
///
/// # Errors
/// What there are none for.
pub(super) fn check(sizes: &ExpertSizes) -> Result<()> {
    let ExpertSizes { n_experts, n_used, ffn_width } = *sizes;
    ensure!(n_experts <= MAX_EXPERTS, "{n_experts} experts are not supported on CUDA, only up to {MAX_EXPERTS}");
    ensure!(n_used <= MAX_USED, "{n_used} experts for a token are not supported on CUDA, only up to {MAX_USED}");
    ensure!(ffn_width.is_multiple_of(8), "experts of width {ffn_width} are not supported on CUDA, only multiples of 8");
    Ok(())
}

/// The memory of a step for experts.
pub(super) struct ExpertRoom {
    /// `[T][n_experts]` f32.
    scores: u64,
    /// By use: its expert (u32), and its weight (f32).
    chosen: u64,
    weights: u64,
    /// By expert: its uses, of which there are at most `list_stride`, and how many there are.
    lists: u64,
    counts: u64,
    /// By use: gate and up, and then what comes of it, bfloat16.
    products: u64,
    /// By use: what goes into the second product, bfloat16.
    gated: u64,
    list_stride: usize,
}

impl ExpertRoom {
    /// Bytes of each of its parts, in their order.
    fn parts(sizes: &ExpertSizes, width: usize, max_tokens: usize) -> [usize; 7] {
        let ExpertSizes { n_experts, n_used, ffn_width } = *sizes;
        let n_uses = max_tokens * n_used;
        [
            4 * max_tokens * n_experts,
            4 * n_uses,
            4 * n_uses,
            4 * n_experts * list_stride(max_tokens),
            4 * n_experts,
            2 * n_uses * width.max(2 * ffn_width),
            2 * n_uses * ffn_width,
        ]
    }

    /// Bytes of the arena that it takes.
    pub(super) fn bytes(sizes: &ExpertSizes, width: usize, max_tokens: usize) -> usize {
        Self::parts(sizes, width, max_tokens).into_iter().map(aligned).sum()
    }

    /// Takes it.
    ///
    /// # Errors
    /// Too little room.
    pub(super) fn new(arena: &Arena, sizes: &ExpertSizes, width: usize, max_tokens: usize) -> Result<Self> {
        let mut at = [0; 7];
        for (at, n_bytes) in at.iter_mut().zip(Self::parts(sizes, width, max_tokens)) {
            *at = arena.take(n_bytes)?;
        }
        let [scores, chosen, weights, lists, counts, products, gated] = at;
        Ok(Self { scores, chosen, weights, lists, counts, products, gated, list_stride: list_stride(max_tokens) })
    }
}

/// Entries of an expert's list: a token uses an expert once; whole sectors.
fn list_stride(max_tokens: usize) -> usize {
    max_tokens.next_multiple_of(8)
}

/// Weights of the same sizes and form, one expert's so many bytes behind those of the one before.
struct Row<'a> {
    first: &'a Weight,
    stride: u64,
}

impl<'a> Row<'a> {
    /// Of the experts' weights, as they were loaded: one expert after the other.
    ///
    /// # Errors
    /// They are not alike.
    fn of(experts: &'a [Expert<Weight>], part: impl Fn(&'a Expert<Weight>) -> &'a Weight) -> Result<Self> {
        let first = part(experts.first().context("a layer without experts")?);
        let stride = experts.get(1).map_or(0, |second| addresses(part(second)).0.wrapping_sub(addresses(first).0));
        Ok(Self { first, stride })
    }

    /// Whether that weight is the one of expert `i`.
    fn has(&self, i: usize, weight: &Weight) -> bool {
        let moved = |at: u64| at.wrapping_add(self.stride * i as u64);
        let (first, own) = (addresses(self.first), addresses(weight));
        let is_alike = (self.first.n, self.first.k, bits(self.first)) == (weight.n, weight.k, bits(weight));
        is_alike && own == (moved(first.0), moved(first.1))
    }
}

/// Of its values, or integers and scales.
fn addresses(weight: &Weight) -> (u64, u64) {
    match weight.place {
        Place::Bf16(at) | Place::F16(at) => (at, at),
        Place::Packed { q, scales, .. } => (q, scales),
        Place::Fp8(weight) => (weight.at, weight.scales),
    }
}

/// Bits of a weight's value.
fn bits(weight: &Weight) -> usize {
    match weight.place {
        Place::Bf16(_) | Place::F16(_) => 16,
        Place::Packed { bits, .. } => bits,
        Place::Fp8(_) => unreachable!("experts are not loaded as fp8"),
    }
}

/// Whether the kernels find the experts' weights: they are told where the first is, and how far it is to the next.
///
/// # Errors
/// They are of several types, or have been loaded in another order.
pub(super) fn check_alike(experts: &[Expert<Weight>]) -> Result<()> {
    let (gate_up, down) = (Row::of(experts, |e| &e.gate_up)?, Row::of(experts, |e| &e.down)?);
    for (i, expert) in experts.iter().enumerate() {
        let is_alike = gate_up.has(i, &expert.gate_up) && down.has(i, &expert.down);
        ensure!(is_alike, "experts whose weights are of several types are not supported on CUDA");
    }
    Ok(())
}

/// Items of so many rows at most, of lists that have so many entries together.
pub(super) fn n_items(n_uses: usize, n_experts: usize, rows: usize) -> usize {
    n_uses.min((n_uses + n_experts * (rows - 1)) / rows)
}

impl CudaDevice {
    /// `x[t] += Σ weight · expert(act[t])` over the experts that a token uses.
    pub(super) fn add_experts(&self, step: &Step, act: &Act, experts: &Experts<Weight>, f: Activation, x: &Hidden) -> Result<()> {
        let room = step.experts.as_ref().context("no memory was made for experts")?;
        let (n_rows, n_experts, n_used) = (step.staged.n_rows, experts.experts.len(), experts.n_used);
        let n_uses = n_rows * n_used;
        let (gate_up, down) = (Row::of(&experts.experts, |e| &e.gate_up)?, Row::of(&experts.experts, |e| &e.down)?);
        self.multiply(step, act, &experts.router, n_rows, Output::F32, room.scores)?;

        let [rows, all, used, uses, stride] = [n_rows, n_experts, n_used, n_uses, room.list_stride].map(|n| n as u32);
        let renormalise = u32::from(experts.renormalise);
        let args =
            [arg(&room.scores), arg(&rows), arg(&all), arg(&used), arg(&renormalise), arg(&room.chosen), arg(&room.weights)];
        self.run(self.kernels.choose_experts, (rows.div_ceil(4), 1), 128, &args)?;
        let args = [arg(&room.chosen), arg(&uses), arg(&stride), arg(&room.lists), arg(&room.counts)];
        self.run(self.kernels.list_uses, (all, 1), 256, &args)?;

        let shape = (n_uses, n_experts);
        self.multiply_experts(room, act.at, &gate_up, shape, n_used, room.products)?;
        self.gate(room.products, gate_up.first.n / 2, f, n_uses, room.gated)?;
        self.multiply_experts(room, room.gated, &down, shape, 1, room.products)?;
        let width = x.width as u32;
        let args = [arg(&room.products), arg(&room.weights), arg(&x.at), arg(&width), arg(&used)];
        self.run(self.kernels.add_experts, (rows, width.div_ceil(512)), 128, &args)
    }

    /// `out[use] = weight of its expert · x[use / uses_per_row]`, bfloat16.
    #[expect(clippy::too_many_arguments, reason = "one operation; its operands are distinct")]
    fn multiply_experts(
        &self,
        room: &ExpertRoom,
        x: u64,
        of: &Row<'_>,
        (n_uses, n_experts): (usize, usize),
        uses_per_row: usize,
        out: u64,
    ) -> Result<()> {
        let Weight { n, k, .. } = *of.first;
        let (weights, scales) = addresses(of.first);
        // Where experts have few rows each, small pieces of their lists.
        let (function, rows) = self.kernels.linear_experts(bits(of.first), n_uses.div_ceil(n_experts));
        let sizes = LinearSizes {
            stride: of.stride,
            n: n as u32,
            k: k as u32,
            n_experts: n_experts as u32,
            list_stride: room.list_stride as u32,
            uses_per_row: uses_per_row as u32,
            padding: 0,
        };
        let grid = (n.div_ceil(64) as u32, n_items(n_uses, n_experts, rows) as u32);
        let args = [arg(&x), arg(&weights), arg(&scales), arg(&room.lists), arg(&room.counts), arg(&out), arg(&sizes)];
        self.run(function, grid, 128, &args)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// However uses are spread, there are enough items.
    #[test]
    fn every_list_has_its_items() {
        let needed = |counts: &[usize], rows: usize| counts.iter().map(|n| n.div_ceil(rows)).sum::<usize>();
        for rows in [16, 64] {
            for counts in [&[1usize, 1, 1, 1][..], &[0, 200, 0], &[17, 17, 17, 1], &[65, 1, 64, 0, 129], &[16; 9], &[1]] {
                let n_uses = counts.iter().sum();
                let items = n_items(n_uses, counts.len(), rows);
                assert!(items >= needed(counts, rows) && items <= n_uses, "{counts:?} by {rows}: {items}");
            }
        }
    }

    #[test]
    fn weights_that_are_not_alike_are_refused() {
        let expert = |at: u64, bits: usize| {
            let weight = |at: u64| Weight { n: 8, k: 8, place: Place::Packed { bits, q: at, scales: at + 100 } };
            Expert { gate_up: weight(at), down: weight(at + 1000) }
        };
        assert!(check_alike(&[expert(0, 4), expert(5000, 4), expert(10_000, 4)]).is_ok());
        assert!(check_alike(&[expert(0, 4)]).is_ok());
        for experts in [[expert(0, 4), expert(5000, 4), expert(11_000, 4)], [expert(0, 4), expert(5000, 8), expert(10_000, 4)]] {
            assert!(check_alike(&experts).is_err_and(|error| error.to_string().contains("several types")));
        }
    }
}

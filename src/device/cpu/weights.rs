//! Weights in the layout the kernels stream: panels of 32 columns (rows of the file's tensor), everything of a panel
//! contiguous. Knows nothing of activations. Invariant: the integers, scales and minimums are the file's own, moved and
//! never rounded again; as tiles, or when tiles are made of them, they are the file's values rounded to bfloat16.
//!
//! A panel of quantised weights is a run of blocks (32 elements of k for all 32 columns), each:
//! `d: [32]`, then (formats with a minimum) `m: [32]`, then the integers. These come in groups of 4 consecutive
//! elements of k for 16 columns: `[column][4]`, 64 bytes. For pair p in 0..4 and vector c in 0..2 of 16 columns, 4-bit
//! formats hold one 64-byte line with group p in the low and group p + 4 in the high nibbles (so a block's 16 bytes move
//! as they stand in the file); 8-bit ones hold two lines. A panel of floats is `[k][32]` in the file's type.
//!
//! `Q4_0`, `Q4_1` and `Q8_0` keep their f16 scales and their 4 or 8 bits. All other types are *spread*: f32 scales (what a
//! group's scale and its superblock's multiply to) and 8-bit integers, 1.125 to 1.5 bytes per weight. Where the halves of
//! 32 elements have scales of their own, `d` and `m` are `[2][32]`.
//!
//! A panel of tiles is `[k / 32][2]` tiles of 32 elements of k by 16 columns, each `[pair of elements][column][2]`. Only floats
//! lie so in memory; quantised weights become tiles (`unpack.rs`) where they are multiplied.

use super::buffer::{Aligned, Shared};
use super::numerics::{Layout, Numerics};
use super::simd::to_bf16;
use super::team::Team;
use super::tile::{TILE, TILE_CELLS, TILE_K};
use crate::tensor::{DType, Tensor};
use anyhow::{Result, ensure};
use half::{bf16, f16};
use std::sync::atomic::{AtomicU64, Ordering};

/// Columns of a panel.
pub(super) const PANEL: usize = 32;
/// Elements of k that share a scale.
pub(super) const BLOCK: usize = 32;

/// Parts that were made so far.
static PARTS: AtomicU64 = AtomicU64::new(0);

/// The weights of one operation.
pub struct Weight {
    /// Columns of the output: the tensors' rows together; for a gated pair the rows of one of the two.
    pub(super) n: usize,
    /// Elements of each row.
    pub(super) k: usize,
    /// Tensors of one type that lie together.
    pub(super) parts: Vec<Part>,
    /// Whether each panel is 16 rows of the gate and the same 16 rows of the up projection.
    pub(super) gated: bool,
}

/// Panels of one type.
pub(super) struct Part {
    /// Unlike that of any other part of the process.
    pub(super) number: u64,
    pub(super) layout: Layout,
    /// The output column that the first panel's first column makes.
    pub(super) n_start: usize,
    /// Output columns.
    pub(super) n: usize,
    /// `[n_panels][panel_bytes]`
    bytes: Aligned<u8>,
    pub(super) n_panels: usize,
    panel_bytes: usize,
}

impl Weight {
    /// Stacks tensors along n; neighbours of one type become one part.
    pub(super) fn stacked(team: &Team, numerics: Numerics, tensors: &[Tensor<'_>]) -> Result<Self> {
        ensure!(!tensors.is_empty(), "a weight needs at least one tensor");
        let k = matrix(&tensors[0])?.1;
        let mut weight = Self { n: 0, k, parts: Vec::new(), gated: false };
        for group in tensors.chunk_by(|a, b| a.dtype == b.dtype) {
            let mut rows = Vec::new();
            for tensor in group {
                let (n, tensor_k) = matrix(tensor)?;
                ensure!(tensor_k == k, "{}: rows of {tensor_k} elements beside rows of {k}", tensor.name);
                rows.extend(tensor.bytes.chunks_exact(tensor.bytes.len() / n));
            }
            let n_panels = rows.len().div_ceil(PANEL);
            let row = |panel: usize, column: usize| rows.get(panel * PANEL + column).copied();
            weight.parts.push(Part::pack(team, numerics, (group[0].dtype, k), (weight.n, rows.len(), n_panels), &row));
            weight.n += rows.len();
        }
        Ok(weight)
    }

    /// Interleaves a gate and an up projection. If their types differ, both become f32 (the same values; no file in use
    /// does it, so it need not be fast).
    pub(super) fn gated(team: &Team, numerics: Numerics, gate: &Tensor<'_>, up: &Tensor<'_>) -> Result<Self> {
        let (n, k) = matrix(gate)?;
        ensure!(gate.shape == up.shape, "{} {:?} and {} {:?} differ in shape", gate.name, gate.shape, up.name, up.shape);
        if gate.dtype != up.dtype {
            let [gate_values, up_values] = [gate, up].map(f32_bytes);
            let as_f32 = |bytes| Tensor { name: gate.name, dtype: DType::F32, shape: gate.shape.clone(), bytes };
            return Self::gated(team, numerics, &as_f32((&gate_values).into()), &as_f32((&up_values).into()));
        }
        let row_bytes = gate.bytes.len() / n;
        let row = |panel: usize, column: usize| {
            let (tensor, r) = if column < PANEL / 2 { (gate, column) } else { (up, column - PANEL / 2) };
            tensor.bytes.chunks_exact(row_bytes).nth(panel * (PANEL / 2) + r)
        };
        let part = Part::pack(team, numerics, (gate.dtype, k), (0, n, n.div_ceil(PANEL / 2)), &row);
        Ok(Self { n, k, parts: vec![part], gated: true })
    }

    /// Row `r` of the (ungated) matrix as f32, `[k]`.
    pub(super) fn row(&self, r: usize, out: &mut [f32]) {
        let part = &self.parts[self.parts.partition_point(|part| part.n_start + part.n <= r)];
        let r = r - part.n_start;
        let (panel, column) = (part.panel(r / PANEL), r % PANEL);
        match part.layout {
            Layout::Blocks(dtype) | Layout::PackedTiles(dtype) => {
                for (b, out) in out.chunks_exact_mut(BLOCK).enumerate() {
                    unpack_block(dtype, &panel[b * block_bytes(dtype)..], column, out);
                    if part.layout != Layout::Blocks(dtype) {
                        for x in out {
                            *x = bf16::from_bits(to_bf16(*x)).to_f32();
                        }
                    }
                }
            }
            Layout::Floats(dtype) => {
                for (i, out) in out.iter_mut().enumerate() {
                    *out = float(dtype, &panel[(i * PANEL + column) * dtype.block_bytes()..]);
                }
            }
            Layout::Tiles => {
                for (i, out) in out.iter_mut().enumerate() {
                    *out = float(DType::Bf16, &panel[tile_offset(i, column)..]);
                }
            }
        }
    }
}

impl Part {
    /// Packs rows, given by (panel, column of the panel), where there is one. `shape` is (first column, columns, panels).
    fn pack<'a>(
        team: &Team,
        numerics: Numerics,
        (dtype, k): (DType, usize),
        (n_start, n, n_panels): (usize, usize, usize),
        row: &(dyn Fn(usize, usize) -> Option<&'a [u8]> + Sync),
    ) -> Self {
        let layout = numerics.layout(dtype);
        let panel_bytes = panel_bytes(layout, k);
        let mut bytes = Aligned::zeroed(n_panels * panel_bytes);
        bytes.spread_over(&team.plan().weight_nodes);
        let shared = Shared::new(&mut bytes);
        team.run(n_panels, &|_, panel| {
            // SAFETY: each panel is one tile, and a tile is run once.
            let out = unsafe { shared.part(panel * panel_bytes, panel_bytes) };
            let mut values = Vec::new();
            for column in 0..PANEL {
                let Some(row) = row(panel, column) else { continue };
                match layout {
                    Layout::Blocks(_) | Layout::PackedTiles(_) => pack_blocks(dtype, row, column, out),
                    Layout::Floats(as_type) if as_type == dtype => pack_floats(dtype.block_bytes(), row, column, out),
                    Layout::Floats(_) => {
                        values.resize(k, 0.0);
                        dtype.dequantise(row, &mut values);
                        for (i, x) in values.iter().enumerate() {
                            out[(i * PANEL + column) * 4..][..4].copy_from_slice(&x.to_le_bytes());
                        }
                    }
                    Layout::Tiles => {
                        values.resize(k, 0.0);
                        dtype.dequantise(row, &mut values);
                        for (i, &x) in values.iter().enumerate() {
                            out[tile_offset(i, column)..][..2].copy_from_slice(&to_bf16(x).to_le_bytes());
                        }
                    }
                }
            }
        });
        let number = PARTS.fetch_add(1, Ordering::Relaxed);
        Self { number, layout, n_start, n, bytes, n_panels, panel_bytes }
    }

    /// Bytes of a panel.
    pub(super) fn panel_bytes(&self) -> usize {
        self.panel_bytes
    }

    /// One panel's bytes; what they are depends on the type (see the head of the file).
    pub(super) fn panel(&self, panel: usize) -> &[u8] {
        &self.bytes[panel * self.panel_bytes..][..self.panel_bytes]
    }
}

/// (n, k) of a matrix.
fn matrix(tensor: &Tensor<'_>) -> Result<(usize, usize)> {
    let &[n, k] = tensor.shape.as_slice() else {
        anyhow::bail!("{}: shape {:?} is not that of a matrix", tensor.name, tensor.shape);
    };
    ensure!(n > 0 && k > 0, "{}: an empty matrix [{n}, {k}]", tensor.name);
    ensure!(k.is_multiple_of(tensor.dtype.block_elements()), "{}: rows of {k} elements are no whole blocks", tensor.name);
    let row_bytes = k / tensor.dtype.block_elements() * tensor.dtype.block_bytes();
    ensure!(tensor.bytes.len() == n * row_bytes, "{}: {} bytes for [{n}, {k}]", tensor.name, tensor.bytes.len());
    Ok((n, k))
}

/// All values of a matrix as the bytes of f32.
fn f32_bytes(tensor: &Tensor<'_>) -> Vec<u8> {
    let mut values = vec![0.0; tensor.shape.iter().product()];
    tensor.dtype.dequantise(&tensor.bytes, &mut values);
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// Puts a row of floats of `size` bytes each into its column of a panel.
fn pack_floats(size: usize, row: &[u8], column: usize, out: &mut [u8]) {
    for (i, x) in row.chunks_exact(size).enumerate() {
        out[(i * PANEL + column) * size..][..size].copy_from_slice(x);
    }
}

/// Puts a row of the file's blocks into its column of a panel.
fn pack_blocks(dtype: DType, row: &[u8], column: usize, out: &mut [u8]) {
    let (stride, n_groups) = (block_bytes(dtype), dtype.block_elements() / BLOCK);
    for (i, block) in row.chunks_exact(dtype.block_bytes()).enumerate() {
        let outs = out[i * n_groups * stride..].chunks_exact_mut(stride).take(n_groups);
        outs.enumerate().for_each(|(part, out)| pack_block(dtype, block, part, column, out));
    }
}

/// Where element `i` of a column stands in a panel of tiles: `[k / 32][half of the columns][pair][column][2]`.
fn tile_offset(i: usize, column: usize) -> usize {
    let tile = i / TILE_K * 2 + column / TILE;
    2 * (tile * TILE_CELLS + (i % TILE_K / 2 * TILE + column % TILE) * 2 + i % 2)
}

/// All values of vectors (or of any tensors, in order), one after the other.
pub(super) fn vectors(parts: &[Tensor<'_>]) -> Result<Vec<f32>> {
    Ok(parts.iter().map(vector).collect::<Result<Vec<_>>>()?.concat())
}

/// All values of a tensor.
fn vector(tensor: &Tensor<'_>) -> Result<Vec<f32>> {
    ensure!(tensor.dtype.block_elements() == 1, "{}: a vector of type {} is not supported", tensor.name, tensor.dtype);
    let values: Vec<_> = tensor.bytes.chunks_exact(tensor.dtype.block_bytes()).map(|b| float(tensor.dtype, b)).collect();
    ensure!(
        values.len() == tensor.shape.iter().product::<usize>(),
        "{}: {} values for {:?}",
        tensor.name,
        values.len(),
        tensor.shape
    );
    Ok(values)
}

/// The f32 that plain bytes hold.
fn float(dtype: DType, b: &[u8]) -> f32 {
    match dtype {
        DType::F32 => f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
        DType::F16 => half_float(b),
        DType::Bf16 => bf16::from_le_bytes([b[0], b[1]]).to_f32(),
        _ => unreachable!("{dtype} is no plain float"),
    }
}

fn half_float(b: &[u8]) -> f32 {
    f16::from_le_bytes([b[0], b[1]]).to_f32()
}

/// Whether a type has f32 scales and 8-bit integers in memory, whatever it has in the file.
fn is_spread(dtype: DType) -> bool {
    dtype.is_quantised() && !matches!(dtype, DType::Q4_0 | DType::Q4_1 | DType::Q8_0)
}

/// Scales of a column and block.
fn n_scales(dtype: DType) -> usize {
    if dtype.has_half_scales() { 2 } else { 1 }
}

/// Bytes of a scale.
fn scale_bytes(dtype: DType) -> usize {
    if is_spread(dtype) { size_of::<f32>() } else { size_of::<f16>() }
}

/// Bytes before the integers of a packed block: the scales, and the minimums.
fn header_bytes(dtype: DType) -> usize {
    (1 + usize::from(dtype.has_minimum())) * n_scales(dtype) * scale_bytes(dtype) * PANEL
}

/// Whether integers have 4 bits in memory.
fn is_nibbles(dtype: DType) -> bool {
    matches!(dtype, DType::Q4_0 | DType::Q4_1)
}

/// Bytes of a packed block: 32 elements of k for 32 columns.
pub(super) fn block_bytes(dtype: DType) -> usize {
    header_bytes(dtype) + if is_nibbles(dtype) { BLOCK * PANEL / 2 } else { BLOCK * PANEL }
}

/// Bytes of a panel of rows of k elements.
fn panel_bytes(layout: Layout, k: usize) -> usize {
    match layout {
        Layout::Blocks(dtype) | Layout::PackedTiles(dtype) => k / BLOCK * block_bytes(dtype),
        Layout::Floats(dtype) => (k * PANEL * dtype.block_bytes()).next_multiple_of(64),
        Layout::Tiles => k.next_multiple_of(TILE_K) * PANEL * 2,
    }
}

/// Bytes that a tensor takes as a weight by itself (beside others a little less: they share a last panel), or as a vector.
pub(super) fn tensor_bytes(numerics: Numerics, tensor: &Tensor<'_>) -> usize {
    match tensor.shape.as_slice() {
        &[n, k] => n.div_ceil(PANEL) * panel_bytes(numerics.layout(tensor.dtype), k),
        shape => shape.iter().product::<usize>() * size_of::<f32>(),
    }
}

/// Where a column's 4 bytes of line `line` of a pair stand among the integers; `lines` is 1 (4 bits) or 2 (8 bits).
fn word_offset(pair: usize, line: usize, lines: usize, column: usize) -> usize {
    // [pair][line][vector of 16 columns][column][4]
    ((pair * lines + line) * 2 + column / 16) * 64 + column % 16 * 4
}

/// Packs 32 elements, group `part` of a block of the file, into their column.
fn pack_block(dtype: DType, block: &[u8], part: usize, column: usize, out: &mut [u8]) {
    let (header, integers) = out.split_at_mut(header_bytes(dtype));
    if is_nibbles(dtype) {
        pack_file_scales(dtype, block, column, header);
        let start = dtype.block_bytes() - BLOCK / 2;
        for pair in 0..4 {
            integers[word_offset(pair, 0, 1, column)..][..4].copy_from_slice(&block[start + 4 * pair..][..4]);
        }
        return;
    }
    let group = dtype.group(block, part);
    if is_spread(dtype) {
        let n = n_scales(dtype);
        let scales = group.d[..n].iter().chain(group.m[..n].iter().filter(|_| dtype.has_minimum()));
        for (i, scale) in scales.enumerate() {
            header[4 * (i * PANEL + column)..][..4].copy_from_slice(&scale.to_le_bytes());
        }
    } else {
        pack_file_scales(dtype, block, column, header);
    }
    for (pair, line) in (0..4).flat_map(|pair| [(pair, 0), (pair, 1)]) {
        let out = &mut integers[word_offset(pair, line, 2, column)..][..4];
        out.iter_mut().zip(&group.q[4 * (pair + 4 * line)..]).for_each(|(out, &q)| *out = q as u8 ^ 0x80);
    }
}

/// The f16 scale and minimum that a block of the file begins with.
fn pack_file_scales(dtype: DType, block: &[u8], column: usize, header: &mut [u8]) {
    header[2 * column..][..2].copy_from_slice(&block[..2]);
    if dtype.has_minimum() {
        header[2 * (PANEL + column)..][..2].copy_from_slice(&block[2..4]);
    }
}

/// One column of a packed block as f32, in the formats' own arithmetic: d·q, then + m.
fn unpack_block(dtype: DType, packed: &[u8], column: usize, out: &mut [f32]) {
    let (header, integers) = packed.split_at(header_bytes(dtype));
    let scale = |i: usize| {
        let at = &header[scale_bytes(dtype) * (i * PANEL + column)..];
        if is_spread(dtype) { float(DType::F32, at) } else { half_float(at) }
    };
    for (i, out) in out.iter_mut().enumerate() {
        let (pair, line, byte) = (i / 4 % 4, i / 16, i % 4);
        let q = match dtype {
            DType::Q4_0 => i32::from(integers[word_offset(pair, 0, 1, column) + byte] >> (4 * line) & 15) - 8,
            DType::Q4_1 => i32::from(integers[word_offset(pair, 0, 1, column) + byte] >> (4 * line) & 15),
            _ => i32::from(integers[word_offset(pair, line, 2, column) + byte]) - 128,
        };
        let half = if dtype.has_half_scales() { line } else { 0 };
        *out = scale(half) * q as f32;
        if dtype.has_minimum() {
            *out += scale(n_scales(dtype) + half);
        }
    }
}

//! Linear layers of GPTQ and AWQ folders: how `qweight`, `qzeros`, `scales` and `g_idx` are packed, and which element type has
//! their values. Knows nothing of names or of how files are read.
//!
//! A layer's value for output n and input k is `scales[g][n] · (q − zero)`, with g the group of k. In words of 32 bits, lowest bits
//! first:
//! * GPTQ (`AutoGPTQ`, `GPTQModel`): `qweight` is `[K · bits / 32][N]`, inputs packed; `qzeros` `[G][N · bits / 32]`, outputs packed.
//!   What is stored of a zero is one less, modulo 2^bits (`AutoGPTQ`'s kernels add 1 and mask); format `gptq_v2` stores the zero.
//!   With `sym` all zeros are 2^(bits − 1). Files of some makers say v1 and store that as v2 does (vLLM's pull request 38966), so it
//!   is not read from the file there.
//! * AWQ (`AutoAWQ`'s version `gemm`): `qweight` is `[K][N / 8]`, `qzeros` `[G][N / 8]`; the eight nibbles of a word are outputs 0, 2,
//!   4, 6, 1, 3, 5, 7. The zero is stored.
//!
//! Invariant: the element type has the same values, bit for bit. Where no blocks have (groups that are no multiple of 32, inputs
//! whose groups are not in order (`desc_act`), 8 bits without `sym`), it is F32.

use super::layers::{Parts, Raw, SCALES, Span, scale_type};
use crate::tensor::{DType, GROUP};
use anyhow::{Context, Result, bail, ensure};
use half::{bf16, f16};
use memmap2::Mmap;
use rayon::prelude::*;
use safetensors::Dtype;
use serde::Deserialize;
use serde_json::Value;

/// Rows that are unpacked together: a cache line of words.
const ROWS: usize = 16;

/// How all linear layers of a folder are packed.
#[derive(Clone, Copy)]
pub(super) struct Scheme {
    form: Form,
    bits: usize,
    /// Inputs of a group; all of a row if none.
    group: Option<usize>,
    symmetric: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    /// With what must be added to the zeros that are stored.
    Gptq {
        offset: u32,
    },
    Awq,
}

/// `quantization_config`.
#[derive(Deserialize)]
struct Config {
    #[serde(alias = "w_bit")]
    bits: Option<usize>,
    #[serde(alias = "q_group_size")]
    group_size: Option<i64>,
    checkpoint_format: Option<String>,
    version: Option<String>,
    sym: Option<bool>,
}

impl Scheme {
    /// What `quantization_config` says, of the methods gptq and awq.
    ///
    /// # Errors
    /// A format or a number of bits that is not supported; a group of no size.
    pub(super) fn new(method: &str, config: &Value) -> Result<Self> {
        let config = Config::deserialize(config)?;
        let format = config.checkpoint_format.as_deref();
        let (form, supported_bits) = match (method, format) {
            ("gptq", None | Some("gptq")) => (Form::Gptq { offset: 1 }, &[4, 8][..]),
            ("gptq", Some("gptq_v2")) => (Form::Gptq { offset: 0 }, &[4, 8][..]),
            ("awq", None | Some("awq" | "gemm")) => (Form::Awq, &[4][..]),
            (_, other) => bail!("checkpoint_format {:?} of {method} is not supported", other.unwrap_or_default()),
        };
        let version = config.version.as_deref().filter(|_| form == Form::Awq).unwrap_or("gemm");
        ensure!(version.eq_ignore_ascii_case("gemm"), "version {version:?} of awq is not supported (gemm is)");
        let bits = config.bits.context("bits is missing")?;
        let group = config.group_size.context("group_size is missing")?;
        ensure!(supported_bits.contains(&bits), "bits: {bits} of {method} are not supported ({supported_bits:?} are)");
        ensure!(group == -1 || group > 0, "group_size is {group}");
        let symmetric = config.sym == Some(true) && form != Form::Awq;
        Ok(Self { form, bits, group: usize::try_from(group).ok(), symmetric })
    }

    /// The zero of symmetric weights.
    fn middle(self) -> u32 {
        1 << (self.bits - 1)
    }

    fn mask(self) -> u32 {
        (1 << self.bits) - 1
    }

    /// Where value `i` of a row of packed values stands: its word, and its bits' first.
    fn place(self, i: usize) -> (usize, usize) {
        let per_word = 32 / self.bits;
        let within = i % per_word;
        let within = if self.form == Form::Awq { within / 2 + within % 2 * 4 } else { within };
        (i / per_word, within * self.bits)
    }
}

/// What the tensors of a packed layer are called.
pub(super) const PARTS: [&str; 4] = ["qweight", "qzeros", "scales", "g_idx"];

/// A packed layer that was checked.
pub(super) struct Packed {
    scheme: Scheme,
    /// Outputs.
    n: usize,
    /// Inputs.
    k: usize,
    /// Inputs of a group.
    group: usize,
    qweight: Span,
    qzeros: Span,
    scales: Span,
    scale_type: DType,
    /// The group of each input, where they are not in order.
    groups: Option<Vec<u32>>,
    /// What the values become.
    dtype: DType,
}

impl Packed {
    /// Checks shapes, types, groups and zeros, and chooses the element type.
    ///
    /// # Errors
    /// A tensor that is missing, or of the wrong type or shape; groups that are not there; zeros that contradict `sym`.
    pub(super) fn new(scheme: Scheme, parts: &Parts, files: &[Mmap]) -> Result<Self> {
        let (qweight, [rows, columns]) = parts.matrix("qweight", &[Dtype::I32, Dtype::U32])?;
        let (qzeros, zeros_shape) = parts.matrix("qzeros", &[Dtype::I32, Dtype::U32])?;
        let (scales, scales_shape) = parts.matrix("scales", &SCALES)?;
        ensure!(rows > 0 && columns > 0, "tensor {}.qweight has shape {:?}", parts.layer(), qweight.shape);
        let per_word = 32 / scheme.bits;
        let (n, k) = if scheme.form == Form::Awq { (columns * per_word, rows) } else { (columns, rows * per_word) };
        let layer = parts.layer();
        ensure!(n.is_multiple_of(per_word), "tensor {layer}.qweight: {n} outputs are no multiple of {per_word}");
        let group = scheme.group.unwrap_or(k).min(k);
        let n_groups = k.div_ceil(group);
        for (name, found, expected) in
            [("qzeros", zeros_shape, [n_groups, n / per_word]), ("scales", scales_shape, [n_groups, n])]
        {
            ensure!(
                found == expected,
                "tensor {layer}.{name}: expected shape {expected:?}, found {found:?} ({n} outputs, {k} inputs in groups of {group})"
            );
        }
        let has_place = parts.get("g_idx").is_none() || scheme.form != Form::Awq;
        ensure!(has_place, "tensor {layer}.g_idx has no place in an awq model");
        let groups = parts.get("g_idx").map(|raw| groups(layer, raw, (k, n_groups), files)).transpose()?;
        let in_order = |groups: &Vec<u32>| groups.iter().enumerate().all(|(i, &g)| g as usize == i / group);
        let mut packed = Self {
            scheme,
            n,
            k,
            group,
            qweight: qweight.span,
            qzeros: qzeros.span,
            scales: scales.span,
            scale_type: scale_type(scales.dtype),
            groups: groups.filter(|groups| !in_order(groups)),
            dtype: DType::F32,
        };
        packed.dtype = packed.view(files).fitting(n_groups).with_context(|| format!("tensor {layer}.qzeros"))?;
        Ok(packed)
    }

    pub(super) fn dtype(&self) -> DType {
        self.dtype
    }

    /// `[n, k]`
    pub(super) fn shape(&self) -> [usize; 2] {
        [self.n, self.k]
    }

    fn row_bytes(&self) -> usize {
        self.k / self.dtype.block_elements() * self.dtype.block_bytes()
    }

    fn view<'a>(&'a self, files: &'a [Mmap]) -> View<'a> {
        let [qweight, qzeros, scales] = [self.qweight, self.qzeros, self.scales].map(|span| span.of(files));
        View { packed: self, qweight, qzeros, scales }
    }

    /// The values, as the element type has them.
    pub(super) fn bytes(&self, files: &[Mmap]) -> Vec<u8> {
        let (view, row_bytes) = (self.view(files), self.row_bytes());
        let mut out = vec![0; self.n * row_bytes];
        out.par_chunks_mut(ROWS * row_bytes).enumerate().for_each(|(i, out)| {
            let first = i * ROWS;
            let n_rows = out.len() / row_bytes;
            let mut q = vec![0; n_rows * self.k];
            for input in 0..self.k {
                for row in 0..n_rows {
                    q[row * self.k + input] = view.integer(first + row, input);
                }
            }
            for (row, (out, q)) in out.chunks_exact_mut(row_bytes).zip(q.chunks_exact(self.k)).enumerate() {
                view.put_row(first + row, q, out);
            }
        });
        out
    }
}

/// The group of each input, checked.
fn groups(layer: &str, raw: &Raw, (k, n_groups): (usize, usize), files: &[Mmap]) -> Result<Vec<u32>> {
    ensure!(matches!(raw.dtype, Dtype::I32 | Dtype::U32), "tensor {layer}.g_idx has type {:?}, expected I32", raw.dtype);
    ensure!(raw.shape == [k], "tensor {layer}.g_idx: expected shape [{k}], found {:?}", raw.shape);
    let bytes = raw.span.of(files);
    let groups: Vec<u32> = (0..k).map(|i| word(bytes, i)).collect();
    let wrong = groups.iter().find(|&&g| g as usize >= n_groups);
    ensure!(
        wrong.is_none(),
        "tensor {layer}.g_idx names group {}, there are {n_groups}",
        wrong.copied().unwrap_or_default() as i32
    );
    Ok(groups)
}

/// A layer with its bytes.
struct View<'a> {
    packed: &'a Packed,
    qweight: &'a [u8],
    qzeros: &'a [u8],
    scales: &'a [u8],
}

impl View<'_> {
    /// The integer of an output and input.
    fn integer(&self, row: usize, input: usize) -> u8 {
        let Packed { scheme, n, .. } = *self.packed;
        let (at, shift) = if scheme.form == Form::Awq {
            let (column, shift) = scheme.place(row);
            (input * (n * scheme.bits / 32) + column, shift)
        } else {
            let (line, shift) = scheme.place(input);
            (line * n + row, shift)
        };
        (word(self.qweight, at) >> shift & scheme.mask()) as u8
    }

    /// What the file has for the zero of a group and output.
    fn stored_zero(&self, group: usize, row: usize) -> u32 {
        let Packed { scheme, n, .. } = *self.packed;
        let (column, shift) = scheme.place(row);
        word(self.qzeros, group * (n * scheme.bits / 32) + column) >> shift & scheme.mask()
    }

    /// The zero of a group and output.
    fn zero(&self, group: usize, row: usize) -> u32 {
        let scheme = self.packed.scheme;
        match scheme.form {
            _ if scheme.symmetric => scheme.middle(),
            Form::Gptq { offset } => (self.stored_zero(group, row) + offset) & scheme.mask(),
            Form::Awq => self.stored_zero(group, row),
        }
    }

    fn scale(&self, group: usize, row: usize) -> f32 {
        let (at, dtype) = (group * self.packed.n + row, self.packed.scale_type);
        let b = &self.scales[at * dtype.block_bytes()..];
        match dtype {
            DType::F16 => f16::from_le_bytes([b[0], b[1]]).to_f32(),
            DType::Bf16 => bf16::from_le_bytes([b[0], b[1]]).to_f32(),
            _ => f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
        }
    }

    /// The smallest element type with the same values.
    fn fitting(&self, n_groups: usize) -> Result<DType> {
        let Packed { scheme, n, k, group, .. } = *self.packed;
        let cells = || (0..n_groups).flat_map(|group| (0..n).map(move |row| (group, row)));
        if scheme.symmetric {
            let first = self.stored_zero(0, 0);
            let alike = cells().all(|(group, row)| self.stored_zero(group, row) == first);
            let known = first == scheme.middle() || first + 1 == scheme.middle();
            ensure!(alike && known, "zeros that are not the middle, where quantization_config says sym");
        }
        let has_blocks = self.packed.groups.is_none() && k.is_multiple_of(GROUP) && (group == k || group.is_multiple_of(GROUP));
        let is_half = |scale: f32| f16::from_f32(scale).to_f32().to_bits() == scale.to_bits();
        let in_the_middle = || cells().all(|(group, row)| self.zero(group, row) == scheme.middle());
        let halves = || self.packed.scale_type == DType::F16 || cells().all(|(group, row)| is_half(self.scale(group, row)));
        Ok(match scheme.bits {
            4 if has_blocks && in_the_middle() && halves() => DType::Q4_0,
            4 if has_blocks => DType::Q4Z,
            8 if has_blocks && in_the_middle() && halves() => DType::Q8_0,
            _ => DType::F32,
        })
    }

    /// A row of the element type's bytes, of its integers.
    fn put_row(&self, row: usize, q: &[u8], out: &mut [u8]) {
        let Packed { dtype, group, .. } = *self.packed;
        if dtype == DType::F32 {
            for (input, (out, &q)) in out.chunks_exact_mut(4).zip(q).enumerate() {
                let group = self.packed.groups.as_ref().map_or(input / group, |groups| groups[input] as usize);
                let steps = i32::from(q) - self.zero(group, row) as i32;
                out.copy_from_slice(&(self.scale(group, row) * steps as f32).to_le_bytes());
            }
            return;
        }
        for (i, (out, q)) in out.chunks_exact_mut(dtype.block_bytes()).zip(q.chunks_exact(GROUP)).enumerate() {
            let group = i * GROUP / group;
            let scale = self.scale(group, row);
            let (head, integers) = out.split_at_mut(if dtype == DType::Q4Z { 5 } else { 2 });
            if dtype == DType::Q4Z {
                head[..4].copy_from_slice(&scale.to_le_bytes());
                head[4] = self.zero(group, row) as u8;
            } else {
                head.copy_from_slice(&f16::from_f32(scale).to_le_bytes());
            }
            for (j, out) in integers.iter_mut().enumerate() {
                *out = if dtype == DType::Q8_0 { q[j] ^ 0x80 } else { q[j] | q[j + GROUP / 2] << 4 };
            }
        }
    }
}

/// Word `i`.
fn word(bytes: &[u8], i: usize) -> u32 {
    let b = &bytes[4 * i..][..4];
    u32::from_le_bytes([b[0], b[1], b[2], b[3]])
}

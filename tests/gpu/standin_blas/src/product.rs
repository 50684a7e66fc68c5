//! Products: D = epilogue(alpha op(A) op(B) + beta C + bias), sums in f32.

use crate::attributes::{Done, INVALID_VALUE, Layout, NOT_SUPPORTED, Preference, Product, ScaleMode};
use crate::driver::{Driver, Work};
use crate::matrix::Kind;

/// Orders of adding up: 16 sums side by side, 8, or those of each half of k (which asks for workspace, as if the halves were
/// computed by different blocks).
pub(crate) const ALGORITHMS: [u64; 3] = [1, 2, 3];
const HALVES: u64 = 3;

/// Sums in f32, of `cublasComputeType_t`.
const COMPUTE_32F: u32 = 68;

/// A product as it is queued: all that describes it.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    pub(crate) product: Product,
    /// Layouts and addresses of A, B, C, D.
    pub(crate) layouts: [Layout; 4],
    pub(crate) addresses: [u64; 4],
    pub(crate) alpha: f32,
    pub(crate) beta: f32,
    pub(crate) algorithm: u64,
}

impl Job {
    /// Rows and columns of the result, and what is added up.
    pub(crate) fn sizes(&self) -> (usize, usize, usize) {
        let [a, _, _, d] = &self.layouts;
        (d.rows, d.columns, if self.product.transposed[0] { a.rows } else { a.columns })
    }

    /// Shapes that don't fit, and types that there is no product of.
    pub(crate) fn check(&self, capability: u32) -> Done {
        let [a, b, c, d] = &self.layouts;
        let turned =
            |layout: &Layout, turn: bool| if turn { (layout.columns, layout.rows) } else { (layout.rows, layout.columns) };
        let (m, n, k) = self.sizes();
        let [turn_a, turn_b] = self.product.transposed;
        let shapes = turned(a, turn_a) == (m, k) && turned(b, turn_b) == (k, n) && (c.rows, c.columns) == (m, n);
        let batches = self.layouts.iter().all(|layout| layout.batch == d.batch);
        let leading = |l: &Layout| l.leading >= if l.by_rows { l.columns } else { l.rows };
        if !shapes || !batches || !self.layouts.iter().all(leading) || [m, n, k, d.batch].contains(&0) {
            return Err(INVALID_VALUE);
        }
        let kinds = matches!(
            (a.kind, d.kind),
            (Kind::F32 | Kind::Bf16 | Kind::F16 | Kind::E4m3, Kind::F32)
                | (Kind::Bf16 | Kind::E4m3, Kind::Bf16)
                | (Kind::F16 | Kind::E4m3, Kind::F16)
        );
        // Eight bits: only where there are tensor cores for them, only rows times columns, only multiples of 16, only sums in f32.
        let fits = [m, n, k].iter().all(|size| size.is_multiple_of(16));
        let eight = a.kind != Kind::E4m3 || capability >= 89 && turn_a && !turn_b && fits && self.product.compute == COMPUTE_32F;
        if !kinds || a.kind != b.kind || c.kind != d.kind || !eight {
            return Err(NOT_SUPPORTED);
        }
        Ok(())
    }

    /// Matrices of eight bits, and what comes of them, begin at multiples of 16 bytes.
    pub(crate) fn check_addresses(&self) -> Done {
        let is_eight = self.layouts[0].kind == Kind::E4m3;
        if is_eight && !self.addresses.iter().all(|address| address.is_multiple_of(16)) {
            return Err(NOT_SUPPORTED);
        }
        Ok(())
    }

    /// The algorithms that may be taken, the best one first, as it depends on the shape.
    pub(crate) fn ranked(&self, preference: &Preference) -> Vec<u64> {
        let (_, n, k) = self.sizes();
        let order: [u64; 3] = match n {
            _ if n <= 16 && k >= 512 => [3, 2, 1],
            ..=64 => [2, 1, 3],
            _ => [1, 2, 3],
        };
        let may = |algorithm: &u64| {
            *algorithm != HALVES || preference.reductions != 0 && self.workspace(*algorithm) <= preference.workspace
        };
        order.into_iter().filter(may).collect()
    }

    pub(crate) fn workspace(&self, algorithm: u64) -> usize {
        let (m, n, _) = self.sizes();
        if algorithm == HALVES { m * n * 4 * self.layouts[3].batch } else { 0 }
    }

    fn compute(&self, driver: &Driver) -> Result<(), u32> {
        for batch in 0..self.layouts[3].batch {
            let address = |i: usize| {
                let offset = self.layouts[i].stride * batch as i64 * self.layouts[i].kind.bytes() as i64;
                self.addresses[i].wrapping_add_signed(offset)
            };
            let [a, b, c, d] = &self.layouts;
            let (a_bytes, b_bytes) = (driver.read(address(0), a.span())?, driver.read(address(1), b.span())?);
            let c_bytes = if self.beta == 0.0 { Vec::new() } else { driver.read(address(2), c.span())? };
            let finish = Finish::new(self, driver, batch)?;
            // What lies between the columns stays as it is.
            let dense = d.leading == if d.by_rows { d.columns } else { d.rows };
            let mut d_bytes = if dense { vec![0; d.span()] } else { driver.read(address(3), d.span())? };
            self.sums(&a_bytes, &b_bytes, |i, j, sum| {
                let before = if self.beta == 0.0 { 0.0 } else { self.beta * c.kind.get(&c_bytes, c.at(i, j)) };
                d.kind.put(&mut d_bytes, d.at(i, j), finish.value(i, j, self.alpha * sum, before));
            });
            driver.write(address(3), &d_bytes)?;
        }
        Ok(())
    }

    /// All sums of products, by row and column of the result.
    fn sums(&self, a_bytes: &[u8], b_bytes: &[u8], mut put: impl FnMut(usize, usize, f32)) {
        let [a, b, ..] = &self.layouts;
        let (m, n, k) = self.sizes();
        let [turn_a, turn_b] = self.product.transposed;
        let mut columns = vec![0.0; n * k];
        for (j, column) in columns.chunks_mut(k).enumerate() {
            b.line(b_bytes, j, turn_b, column);
        }
        let mut row = vec![0.0; k];
        for i in 0..m {
            a.line(a_bytes, i, !turn_a, &mut row);
            for (j, column) in columns.chunks(k).enumerate() {
                put(i, j, dot(&row, column, self.algorithm));
            }
        }
    }
}

fn dot(a: &[f32], b: &[f32], algorithm: u64) -> f32 {
    let half = (a.len() / 2).next_multiple_of(16).min(a.len());
    match algorithm {
        1 => lanes::<16>(a, b),
        2 => lanes::<8>(a, b),
        _ => lanes::<16>(&a[..half], &b[..half]) + lanes::<16>(&a[half..], &b[half..]),
    }
}

fn lanes<const N: usize>(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; N];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<N>(), b.as_chunks::<N>());
    for (a, b) in a.iter().zip(b) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += a * b;
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    let mut width = N / 2;
    while width > 0 {
        for i in 0..width {
            sums[i] += sums[i + width];
        }
        width /= 2;
    }
    sums[0] + rest
}

/// What is done with a sum: scales, bias, activation.
struct Finish {
    scales: [Vec<f32>; 2],
    bias: Vec<f32>,
    epilogue: u32,
}

impl Finish {
    fn new(job: &Job, driver: &Driver, batch: usize) -> Result<Self, u32> {
        let Product { bias, bias_stride, bias_kind, epilogue, scales, scale_modes, .. } = job.product;
        let (m, n, _) = job.sizes();
        let floats = |kind: Kind, address: u64, count: usize| {
            let bytes = driver.read(address, count * kind.bytes())?;
            Ok::<_, u32>((0..count).map(|i| kind.get(&bytes, i)).collect::<Vec<f32>>())
        };
        let scale = |side: usize, count: usize| match (scales[side], scale_modes[side]) {
            (0, _) => Ok(vec![1.0]),
            (address, ScaleMode::One) => floats(Kind::F32, address, 1),
            (address, ScaleMode::Each) => floats(Kind::F32, address, count),
        };
        let kind = bias_kind.unwrap_or(job.layouts[3].kind);
        let at = bias.wrapping_add_signed(bias_stride * batch as i64 * kind.bytes() as i64);
        let bias = if epilogue & 4 == 0 { Vec::new() } else { floats(kind, at, m)? };
        Ok(Self { scales: [scale(0, m)?, scale(1, n)?], bias, epilogue })
    }

    fn value(&self, i: usize, j: usize, sum: f32, before: f32) -> f32 {
        let pick = |scales: &[f32], at: usize| scales.get(at).or(scales.first()).copied().unwrap_or(1.0);
        let scaled = sum * (pick(&self.scales[0], i) * pick(&self.scales[1], j));
        let whole = scaled + before + self.bias.get(i).copied().unwrap_or(0.0);
        match self.epilogue & !4 {
            2 => whole.max(0.0),
            32 => {
                let inner = (2.0 / std::f32::consts::PI).sqrt() * (whole + 0.044_715 * whole * whole * whole);
                0.5 * whole * (1.0 + inner.tanh())
            }
            _ => whole,
        }
    }
}

impl Work for Job {
    fn run(&self, driver: &Driver) -> u32 {
        self.compute(driver).err().unwrap_or(0)
    }
}

//! Products of matrices.

use crate::common::{Gpu, Kernels, alloc, alone, code};
use cudarc::cublaslt::{result, sys};
use half::{bf16, f16};
use sys::cublasLtMatmulDescAttributes_t as A;
use sys::cublasLtMatmulPreferenceAttributes_t as P;

/// `out[m][n] = alpha x[m][k] weight[n][k]` transposed `+ beta out`, as cuBLASLt has it: columns of `weight` times those of `x`.
#[derive(Clone, Copy)]
struct Case {
    sizes: (usize, usize, usize),
    input: sys::cudaDataType,
    output: sys::cudaDataType,
    alpha: f32,
    beta: f32,
    bias: u64,
    scales: [u64; 2],
    compute: sys::cublasComputeType_t,
}

const PLAIN: Case = Case {
    sizes: (1, 1, 1),
    input: sys::cudaDataType_t::CUDA_R_16BF,
    output: sys::cudaDataType_t::CUDA_R_32F,
    alpha: 1.0,
    beta: 0.0,
    bias: 0,
    scales: [0; 2],
    compute: sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
};

type Found = Result<Vec<sys::cublasLtMatmulHeuristicResult_t>, u32>;

/// The descriptions of a case: product, layouts of weight, x and out. They live as long as the test's process.
struct Described(sys::cublasLtHandle_t, sys::cublasLtMatmulDesc_t, [sys::cublasLtMatrixLayout_t; 3]);

impl Case {
    fn describe(&self) -> Described {
        let (m, n, k) = self.sizes;
        let product = result::create_matmul_desc(self.compute, sys::cudaDataType_t::CUDA_R_32F).unwrap();
        let set = |attribute, value: &[u8]| {
            // SAFETY: the description exists; the value has the length that is told.
            unsafe { result::set_matmul_desc_attribute(product, attribute, value.as_ptr().cast(), value.len()) }.unwrap();
        };
        set(A::CUBLASLT_MATMUL_DESC_TRANSA, &1u32.to_le_bytes());
        if self.bias != 0 {
            set(A::CUBLASLT_MATMUL_DESC_EPILOGUE, &4u32.to_le_bytes());
            set(A::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &self.bias.to_le_bytes());
        }
        for (attribute, at) in
            [A::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, A::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER].into_iter().zip(self.scales)
        {
            if at != 0 {
                set(attribute, &at.to_le_bytes());
            }
        }
        let layout = |kind, rows: usize, columns: usize| {
            result::create_matrix_layout(kind, rows as u64, columns as u64, rows as i64).unwrap()
        };
        let layouts = [layout(self.input, k, n), layout(self.input, k, m), layout(self.output, n, m)];
        Described(result::create_handle().unwrap(), product, layouts)
    }

    /// The algorithms that there are, with so much workspace and these ways to reduce.
    fn algorithms(&self, workspace: u64, reductions: u32) -> Found {
        let Described(handle, product, [weight, x, out]) = self.describe();
        let preference = result::create_matmul_pref().unwrap();
        // SAFETY: a zero of each is a valid value; all handles exist, and there is room for four.
        unsafe {
            let (of, size) = ((&raw const workspace).cast(), 8);
            result::set_matmul_pref_attribute(preference, P::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, of, size).unwrap();
            let (of, size) = ((&raw const reductions).cast(), 4);
            result::set_matmul_pref_attribute(preference, P::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, of, size).unwrap();
            let mut found = [std::mem::zeroed::<sys::cublasLtMatmulHeuristicResult_t>(); 4];
            let mut n = 0;
            let (into, n_at) = (found.as_mut_ptr(), &raw mut n);
            let status = sys::cublasLtMatmulAlgoGetHeuristic(handle, product, weight, x, out, out, preference, 4, into, n_at);
            status.result().map_err(|error| error.0 as u32)?;
            Ok(found[..n as usize].to_vec())
        }
    }

    fn run(&self, gpu: &Gpu, algorithm: &sys::cublasLtMatmulAlgo_t, [weight, x, out]: [u64; 3]) -> u32 {
        let Described(handle, product, layouts) = self.describe();
        let (alpha, beta) = (self.alpha, self.beta);
        // SAFETY: all handles exist, and memory is as large as it is described.
        let done = unsafe {
            result::matmul(
                handle,
                product,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                weight as *const _,
                layouts[0],
                x as *const _,
                layouts[1],
                out as *const _,
                layouts[2],
                out as *mut _,
                layouts[2],
                algorithm,
                std::ptr::null_mut(),
                1 << 20,
                gpu.stream.cast(),
            )
        };
        done.err().map_or(0, |error| error.0 as u32)
    }
}

/// Numbers that all types have.
fn some(n: usize, salt: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 37 + salt) % 31) as f32 / 8.0 - 1.75).map(|x| if x.abs() < 1.0 { x } else { x.trunc() }).collect()
}

/// The bytes of numbers in a type.
fn encode(kind: sys::cudaDataType, values: &[f32]) -> Vec<u8> {
    let each: fn(f32) -> Vec<u8> = match kind {
        sys::cudaDataType_t::CUDA_R_16BF => |x| bf16::from_f32(x).to_le_bytes().to_vec(),
        sys::cudaDataType_t::CUDA_R_16F => |x| f16::from_f32(x).to_le_bytes().to_vec(),
        sys::cudaDataType_t::CUDA_R_32F => |x| x.to_le_bytes().to_vec(),
        // The byte whose value, by the definition of e4m3, is the number.
        _ => |x| {
            let value = |byte: u8| {
                let (e, m) = (i32::from(byte >> 3), f32::from(byte & 7));
                if e == 0 { m / 8.0 * 2f32.powi(-6) } else { (1.0 + m / 8.0) * 2f32.powi(e - 7) }
            };
            let byte = (0..127).find(|byte| (value(*byte) - x.abs()).abs() < 1e-9).unwrap();
            vec![if x < 0.0 { byte | 128 } else { byte }]
        },
    };
    values.iter().flat_map(|x| each(*x)).collect()
}

fn decode(kind: sys::cudaDataType, bytes: &[u8]) -> Vec<f32> {
    match kind {
        sys::cudaDataType_t::CUDA_R_32F => bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
        sys::cudaDataType_t::CUDA_R_16F => bytes.chunks(2).map(|b| f16::from_le_bytes(b.try_into().unwrap()).to_f32()).collect(),
        _ => bytes.chunks(2).map(|b| bf16::from_le_bytes(b.try_into().unwrap()).to_f32()).collect(),
    }
}

fn size(kind: sys::cudaDataType) -> usize {
    encode(kind, &[1.0]).len()
}

/// Computes a case with each algorithm, and holds it against sums in f64.
fn check(gpu: &Gpu, case: &Case) {
    let (m, n, k) = case.sizes;
    let (weight, x, before) = (some(n * k, 3), some(m * k, 8), some(m * n, 5));
    let bytes = |data: &[u8]| {
        let at = alloc(data.len()).unwrap();
        gpu.write(at, data).unwrap();
        at
    };
    let (weight_at, x_at) = (bytes(&encode(case.input, &weight)), bytes(&encode(case.input, &x)));
    let (bias, bias_at) = (some(n, 2), bytes(&encode(case.output, &some(n, 2))));
    let case = &Case { bias: if case.bias == 0 { 0 } else { bias_at }, ..*case };
    let scale = if case.scales[0] == 0 { 1.0 } else { 0.5 * 3.0 };
    let found = case.algorithms(1 << 20, u32::MAX).unwrap();
    assert_eq!(found.len(), 3);
    for algorithm in found {
        let out = bytes(&encode(case.output, &before));
        assert_eq!(case.run(gpu, &algorithm.algo, [weight_at, x_at, out]), 0);
        let got = decode(case.output, &gpu.read::<u8>(out, m * n * size(case.output)).unwrap());
        for (i, got) in got.iter().enumerate() {
            let (row, column) = (i / n, i % n);
            let sum: f64 = (0..k).map(|l| f64::from(x[row * k + l]) * f64::from(weight[column * k + l])).sum();
            let mut right = f64::from(case.alpha) * sum * scale + f64::from(case.beta) * f64::from(before[i]);
            if case.bias != 0 {
                right += f64::from(bias[column]);
            }
            let tolerance = if size(case.output) == 4 { 1e-5 } else { 0.004 };
            let error = (f64::from(*got) - right).abs();
            assert!(error <= tolerance * right.abs().max(1.0), "({row}, {column}) of {:?}: {got}, not {right}", case.sizes);
        }
    }
}

#[test]
fn products_of_all_types() {
    alone(&[("STANDIN_CC", "8.9")], || {
        use sys::cudaDataType_t::{CUDA_R_8F_E4M3, CUDA_R_16BF, CUDA_R_16F, CUDA_R_32F};
        let gpu = Gpu::new();
        let scales = [gpu.floats(&[0.5]), gpu.floats(&[3.0])];
        for (input, output) in [
            (CUDA_R_16BF, CUDA_R_32F),
            (CUDA_R_16BF, CUDA_R_16BF),
            (CUDA_R_16F, CUDA_R_16F),
            (CUDA_R_16F, CUDA_R_32F),
            (CUDA_R_32F, CUDA_R_32F),
            (CUDA_R_8F_E4M3, CUDA_R_16BF),
        ] {
            let eight = input == CUDA_R_8F_E4M3;
            let sizes: &[_] = if eight { &[(16, 32, 64)] } else { &[(1, 8, 33), (5, 19, 70), (20, 3, 1)] };
            for &sizes in sizes {
                let scales = if eight { scales } else { [0; 2] };
                let case = Case { sizes, input, output, scales, ..PLAIN };
                check(&gpu, &case);
                check(&gpu, &Case { alpha: 0.5, beta: 2.0, ..case });
                check(&gpu, &Case { bias: 1, ..case });
            }
        }
        // No product of eight bits is of other sizes, or before compute capability 8.9; no sums in f64.
        let odd = Case { sizes: (16, 8, 64), input: CUDA_R_8F_E4M3, ..PLAIN };
        assert_eq!(odd.algorithms(0, 0).err(), Some(15));
        // Nor where a matrix begins at no multiple of 16 bytes, or sums may be less exact.
        let eight = Case { sizes: (16, 16, 64), input: CUDA_R_8F_E4M3, ..PLAIN };
        let (algorithm, at) = (eight.algorithms(0, 0).unwrap()[0].algo, alloc(4096).unwrap());
        assert_eq!([0, 8].map(|off| eight.run(&gpu, &algorithm, [at, at + 1024 + off, at + 2048])), [0, 15]);
        let fast = Case { compute: sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_16BF, ..eight };
        assert_eq!(fast.algorithms(0, 0).err(), Some(15));
        assert!(result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_64F, CUDA_R_32F).is_err());
    });
    alone(&[("STANDIN_CC", "8.0")], || {
        let _gpu = Gpu::new();
        let case = Case { sizes: (16, 16, 64), input: sys::cudaDataType_t::CUDA_R_8F_E4M3, ..PLAIN };
        assert_eq!(case.algorithms(0, 0).err(), Some(15));
    });
}

/// Who always takes the first algorithm takes another one for other numbers of rows, and gets other bits.
#[test]
fn algorithms_differ_in_their_bits_and_in_their_rank() {
    alone(&[], || {
        let gpu = Gpu::new();
        let bits = |sizes: (usize, usize, usize), id: usize| {
            let case = Case { sizes, ..PLAIN };
            let found = case.algorithms(1 << 20, u32::MAX).unwrap();
            let algorithm = found.iter().find(|found| found.algo.data[1] == id as u64).unwrap().algo;
            let (m, n, k) = sizes;
            let value = |i: usize| bf16::from_f32((i as f32 * 0.7).sin());
            let [weight, x] = [n * k, m * k].map(|count| {
                let at = alloc(2 * count).unwrap();
                gpu.write(at, &(0..count).map(|i| value(i).to_le_bytes()).collect::<Vec<_>>()).unwrap();
                at
            });
            let out = alloc(4 * m * n).unwrap();
            assert_eq!(case.run(&gpu, &algorithm, [weight, x, out]), 0);
            gpu.read::<u32>(out, n).unwrap()
        };
        let few = Case { sizes: (4, 24, 1024), ..PLAIN }.algorithms(1 << 20, u32::MAX).unwrap();
        let many = Case { sizes: (100, 24, 1024), ..PLAIN }.algorithms(1 << 20, u32::MAX).unwrap();
        assert_ne!(few[0].algo.data, many[0].algo.data);
        // The same algorithm has the same bits of a row for any number of rows; no two have the same.
        let all: Vec<_> = [1, 2, 3].map(|id| bits((4, 24, 1024), id)).into();
        assert!((1..=3).zip(&all).all(|(id, first)| bits((100, 24, 1024), id) == *first));
        assert!(all[0] != all[1] && all[1] != all[2] && all[0] != all[2]);
        // One that adds up parts is not given to who has no room for it, or does not want it.
        for (workspace, reductions) in [(0, u32::MAX), (1 << 20, 0)] {
            let found = Case { sizes: (4, 24, 1024), ..PLAIN }.algorithms(workspace, reductions).unwrap();
            assert_eq!(found.len(), 2);
        }
    });
}

/// In a graph, in its place between kernels; the memory may be gone when it is replayed.
#[test]
fn a_product_in_a_graph() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let said = alone(&[("STANDIN_COUNTERS", file.path().to_str().unwrap())], || {
        let gpu = Gpu::new();
        let scale = Kernels::load().get("scale");
        let case = Case { sizes: (1, 2, 2), input: sys::cudaDataType_t::CUDA_R_32F, ..PLAIN };
        let algorithm = case.algorithms(0, 0).unwrap()[0].algo;
        let (weight, x, out) = (gpu.floats(&[1.0, 2.0, 3.0, 4.0]), gpu.floats(&[1.0, 1.0]), alloc(8).unwrap());
        gpu.sync().unwrap();
        gpu.capture();
        gpu.launch(scale, 1, 32, &[x, 2]).unwrap();
        assert_eq!(case.run(&gpu, &algorithm, [weight, x, out]), 0);
        gpu.launch(scale, 1, 32, &[out, 2]).unwrap();
        let graph = gpu.end_capture().unwrap();
        for factor in [4.0, 8.0] {
            gpu.replay(graph).unwrap();
            assert_eq!(gpu.read::<f32>(out, 2).unwrap(), [3.0 * factor, 7.0 * factor]);
        }
        // SAFETY: that it is used afterwards is what is found.
        unsafe { cudarc::driver::result::free_sync(weight).unwrap() };
        gpu.replay(graph).unwrap();
        assert_eq!(code(gpu.sync()), 700);
    });
    if said.is_some() {
        let text = std::fs::read_to_string(file.path()).unwrap();
        assert!(text.contains("\"cublasLt f32 2x1x2\": {\"launches\": 2, "), "{text}");
        assert!(text.contains("\"read_bytes\": 48, \"written_bytes\": 16, "), "{text}");
    }
}

#[test]
fn a_product_that_fails() {
    alone(&[("STANDIN_FAIL", "launch:1:719")], || {
        let gpu = Gpu::new();
        let case = Case { sizes: (1, 2, 2), ..PLAIN };
        let algorithm = case.algorithms(0, 0).unwrap()[0].algo;
        let at = alloc(64).unwrap();
        assert_eq!(case.run(&gpu, &algorithm, [at, at, at + 32]), 0);
        assert_eq!(code(gpu.sync()), 719);
        assert_eq!(case.run(&gpu, &algorithm, [at, at, at + 32]), 13);
    });
}

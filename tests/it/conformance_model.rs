//! The CPU device with the default model: near what f32 gives, and the same bits however the work is cut.

use crate::common::model_path;
use crate::oracle;
use valar::device::cpu::{CpuDevice, Isa, Numerics};
use valar::gguf::Gguf;
use valar::model::ModelRunner;

fn model_runner(numerics: Numerics, n_threads: usize) -> ModelRunner<CpuDevice> {
    let gguf = Gguf::open(&model_path()).expect("the test model is there");
    let dev = CpuDevice::new(Isa::detect(), numerics, n_threads);
    ModelRunner::load(dev, &gguf, oracle::N_BLOCKS, oracle::STEP_TOKENS).expect("the test model loads")
}

#[test]
fn the_models_log_probabilities_are_near_the_golden_ones() {
    // Of numbers of 8 bits, of bfloat16, of f32 (with keys and values as halves).
    let bounds = [
        (Numerics::Int8, (0.07, 0.5)),
        (Numerics::Int8Bf16, (0.07, 0.5)),
        (Numerics::Bf16, (0.02, 0.15)),
        (Numerics::F32, (0.001, 0.01)),
    ];
    for (numerics, most) in bounds {
        if numerics == Numerics::Bf16 && !Isa::detect().has_tiles() {
            continue;
        }
        let differences = oracle::golden_differences(&mut model_runner(numerics, 2), &oracle::golden_answers());
        let (median, p99) = (oracle::quantile(&differences, 0.5), oracle::quantile(&differences, 0.99));
        println!("{numerics:?}: median {median}, p99 {p99}");
        assert!(median <= most.0 && p99 <= most.1, "{numerics:?}: median {median}, p99 {p99}");
        assert!(median > 1e-5, "{numerics:?}: median {median}: nothing was rounded?");
    }
}

#[test]
fn the_models_perplexity_is_near_that_of_f32() {
    for numerics in [Numerics::fastest(Isa::detect()), Numerics::Int8Bf16] {
        let perplexity = oracle::perplexity(&mut model_runner(numerics, 2), &oracle::sherlock_tokens());
        println!("{numerics:?}: perplexity {perplexity}");
        assert!((perplexity / 25.8477 - 1.0).abs() < 0.005, "{numerics:?}: perplexity {perplexity}, f32 has 25.8477");
    }
}

#[test]
fn the_models_bits_do_not_depend_on_chunks_threads_or_copies() {
    for n_threads in [1, 2, 3, 5] {
        let mut runner = model_runner(Numerics::fastest(Isa::detect()), n_threads);
        let difference = oracle::chunking_difference(&mut runner, &[70, 1, 16, 33, 100], n_threads as u64);
        assert_eq!(difference.to_bits(), 0, "{n_threads} threads: {difference}");
        for n_slots in [1, 7, 15] {
            let difference = oracle::copied_prefix_difference(&mut runner, n_slots);
            assert_eq!(difference.to_bits(), 0, "{n_slots} slots: {difference}");
        }
    }
}

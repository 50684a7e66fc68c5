//! Folders of linear layers in floats of 8 bits, against the values that these tests wrote: bit for bit as weights; on the devices as the
//! same model of plain values; and folders that can't be used.

use crate::cuda_device::{compare_scores, logprobs, same_bits, scored};
use crate::cuda_machine::Noise;
use crate::cuda_stage::{Family, Stage, tensors, write_model};
use crate::packed_folders::{NAME, Part, answer, configure, error, f32_bytes, folder_of, rounded_as, write_tensors};
use half::{bf16, f16};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::path::Path;
use valar::device::cpu::{CpuDevice, Isa, Numerics};
use valar::device::reference::Reference;
use valar::hf::HfFolder;
use valar::model::ModelFile;
use valar::tensor::{DType, e4m3};

/// What has a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Strategy {
    Tensor,
    Channel,
    /// Outputs and inputs.
    Block(usize, usize),
}

/// How a folder gives its layers.
#[derive(Debug, Clone, Copy)]
struct Form {
    /// By compressed-tensors, or by `quant_method` fp8.
    compressed: bool,
    strategy: Strategy,
    /// Whether activations are to be fp8, too.
    activations: bool,
    scales: &'static str,
}

const CHANNELS: Form = Form { compressed: true, strategy: Strategy::Channel, activations: true, scales: "BF16" };
const TENSORS: Form = Form { compressed: false, strategy: Strategy::Tensor, activations: true, scales: "F32" };
const BLOCKS: Form = Form { strategy: Strategy::Block(128, 128), ..TENSORS };

/// The size of a float of 8 bits by its definition: 3 bits of mantissa after a leading one, exponents with a bias of 7; below 2^-6 steps of
/// 2^-9.
fn value(byte: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
    let size = match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa * 2f32.powi(-9),
        _ => (8.0 + mantissa) * 2f32.powi(exponent - 10),
    };
    if byte & 0x80 == 0 { size } else { -size }
}

#[test]
fn floats_of_eight_bits_have_their_values() {
    for byte in 0..=u8::MAX {
        let (got, want) = (e4m3(byte), value(byte));
        assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(), "{byte:#x}: {got}, not {want}");
    }
    let known = [1.0 / 512.0, 1.0 / 64.0, 1.0, 448.0, -448.0f32].map(f32::to_bits);
    assert_eq!([0x01, 0x08, 0x38, 0x7e, 0xfe].map(|byte| e4m3(byte).to_bits()), known);
}

/// A layer `[n, k]`.
struct Layer {
    form: Form,
    n: usize,
    k: usize,
    floats: Vec<u8>,
    /// `[n / rows][k / columns]`, rounded up.
    scales: Vec<f32>,
}

impl Form {
    fn config(self) -> Value {
        let activations = self.activations.then(|| json!({"num_bits": 8, "type": "float", "strategy": "token", "dynamic": true}));
        if !self.compressed {
            let mut config = json!({"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"});
            if let Strategy::Block(rows, columns) = self.strategy {
                config["weight_block_size"] = json!([rows, columns]);
            }
            return config;
        }
        let (strategy, block) = match self.strategy {
            Strategy::Tensor => ("tensor", Value::Null),
            Strategy::Channel => ("channel", Value::Null),
            Strategy::Block(rows, columns) => ("block", json!([rows, columns])),
        };
        let weights = json!({
            "num_bits": 8, "type": "float", "symmetric": true, "strategy": strategy, "block_structure": block, "dynamic": false,
        });
        json!({
            "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}},
            "ignore": ["lm_head"], "kv_cache_scheme": null, "transform_config": {},
        })
    }

    /// Outputs and inputs of a scale.
    fn block(self, (n, k): (usize, usize)) -> (usize, usize) {
        match self.strategy {
            Strategy::Tensor => (n, k),
            Strategy::Channel => (1, k),
            Strategy::Block(rows, columns) => (rows, columns),
        }
    }

    /// Values of about that size.
    fn random(self, noise: &mut Noise, (n, k): (usize, usize), size: f32) -> Layer {
        let floats = (0..n * k).map(|_| (noise.next().to_bits() >> 3) as u8);
        // No NaN.
        let floats = floats.map(|byte| if byte & 0x7f == 0x7f { byte - 1 } else { byte }).collect();
        let (rows, columns) = self.block((n, k));
        let n_scales = n.div_ceil(rows) * k.div_ceil(columns);
        let scales = (0..n_scales).map(|_| rounded_as(self.scales, size / 448.0 * (0.7 + 0.3 * noise.next()))).collect();
        Layer { form: self, n, k, floats, scales }
    }
}

impl Layer {
    /// `[n][k]`
    fn values(&self) -> Vec<f32> {
        let (rows, columns) = self.form.block((self.n, self.k));
        let scale = |i: usize| self.scales[i / self.k / rows * self.k.div_ceil(columns) + i % self.k / columns];
        self.floats.iter().enumerate().map(|(i, &byte)| scale(i) * value(byte)).collect()
    }

    /// The tensors of a layer of that name.
    fn parts(&self, name: &str) -> Vec<Part> {
        let Self { form, n, k, .. } = *self;
        let shape = match form.strategy {
            Strategy::Tensor if form.compressed => vec![1],
            Strategy::Tensor => vec![],
            Strategy::Channel => vec![n, 1],
            Strategy::Block(rows, columns) => vec![n.div_ceil(rows), k.div_ceil(columns)],
        };
        let scales = self.scales.iter().flat_map(|&x| match form.scales {
            "F16" => f16::from_f32(x).to_le_bytes().to_vec(),
            "BF16" => bf16::from_f32(x).to_le_bytes().to_vec(),
            _ => x.to_le_bytes().to_vec(),
        });
        let scale =
            if matches!(form.strategy, Strategy::Block(..)) && !form.compressed { "weight_scale_inv" } else { "weight_scale" };
        vec![
            (format!("{name}.weight"), "F8_E4M3", vec![n, k], self.floats.clone()),
            (format!("{name}.{scale}"), form.scales, shape, scales.collect()),
        ]
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn values_are_floats_times_scales(
        seed: u32,
        compressed: bool,
        activations: bool,
        block in (1usize..40, prop::sample::select(vec![16usize, 32, 48, 128])),
        strategy in 0usize..3,
        scales in prop::sample::select(vec!["F16", "BF16", "F32"]),
        n in 1usize..60,
        k in prop::sample::select(vec![1usize, 8, 32, 40, 96, 128, 320]),
    ) {
        let strategy = [Strategy::Tensor, Strategy::Channel, Strategy::Block(block.0, block.1)][strategy];
        let form = Form { compressed, strategy, activations, scales };
        let layer = form.random(&mut Noise(seed), (n, k), 0.3);
        let folder = folder_of(&form.config(), &layer.parts(NAME));
        let folder = HfFolder::open(folder.path()).unwrap();
        let tensor = folder.tensor("blk.0.attn_q.weight").unwrap();
        let has_one = form.block((n, k)).1 >= k && k % 32 == 0;
        let want = if has_one && (activations || !compressed) { DType::E4m3 } else { DType::F32 };
        prop_assert_eq!((tensor.dtype, &tensor.shape[..]), (want, &[n, k][..]));
        let mut values = vec![0.0; n * k];
        tensor.dtype.dequantise(&tensor.bytes, &mut values);
        for (i, (got, want)) in values.iter().zip(layer.values()).enumerate() {
            prop_assert_eq!(got.to_bits(), want.to_bits(), "element {}: {}, not {}", i, got, want);
        }
    }
}

/// Writes a tiny llama twice: with layers in fp8, and the same values in f32.
fn write_models(quantised: &Path, plain: &Path, form: Form) {
    for folder in [quantised, plain] {
        write_model(folder, Family::Llama, false);
    }
    let (mut quantised_parts, mut plain_parts) = (Vec::new(), Vec::new());
    let mut noise = Noise(17);
    for (name, shape, largest) in tensors(Family::Llama) {
        if let Some(layer) = name.strip_suffix(".weight").filter(|layer| layer.ends_with("_proj")) {
            // Most random bytes are far below the largest.
            let random = form.random(&mut noise, (shape[0], shape[1]), 3.0 * largest);
            quantised_parts.extend(random.parts(layer));
            quantised_parts.push((format!("{layer}.input_scale"), "F32", vec![], 0.5f32.to_le_bytes().to_vec()));
            plain_parts.push((name, "F32", shape, f32_bytes(&random.values())));
        } else {
            let value = |_| if largest == 0.0 { 1.0 + 0.3 * noise.next() } else { largest * noise.next() };
            let values: Vec<f32> = (0..shape.iter().product()).map(value).collect();
            let part: Part = (name, "F32", shape, f32_bytes(&values));
            quantised_parts.push(part.clone());
            plain_parts.push(part);
        }
    }
    configure(quantised, &form.config());
    write_tensors(&quantised.join("model.safetensors"), &quantised_parts);
    write_tensors(&plain.join("model.safetensors"), &plain_parts);
}

/// The same bits as of the plain values, in all numerics: activations stay as they are.
#[test]
fn models_in_fp8_are_those_of_their_values() {
    for form in [CHANNELS, TENSORS, BLOCKS] {
        let room = tempfile::tempdir().unwrap();
        let [quantised, plain] = ["quantised", "plain"].map(|name| room.path().join(name));
        write_models(&quantised, &plain, form);
        assert_eq!(answer(Reference, &quantised), answer(Reference, &plain), "{form:?}");
        for numerics in [Numerics::F32, Numerics::Bf16, Numerics::Int8] {
            let cpu = || CpuDevice::new(Isa::detect(), numerics, 2);
            assert_eq!(answer(cpu(), &quantised), answer(cpu(), &plain), "{form:?} {numerics:?}");
        }
    }
}

/// On GPUs without products of fp8 (the stand-in's is one of compute capability 8.0) weights are bfloat16.
#[test]
fn models_in_fp8_on_cuda_are_what_the_reference_device_says() {
    for form in [CHANNELS, BLOCKS] {
        let stage = Stage::with_folder(|folder| write_models(folder, &folder.with_file_name("plain"), form));
        let lines = scored();
        compare_scores(&stage.job("cuda", &[], &lines), &stage.job("reference", &[], &lines), 0.0);
        let types: Value = serde_json::from_slice(&stage.sandbox.run(&["inspect", "tiny", "--json"]).stdout).unwrap();
        // Of two layers, what has more than one block in a row is F32.
        let count = if form.strategy == Strategy::Channel { 14 } else { 10 };
        assert_eq!(types["tensors"]["E4M3"]["count"], count, "{types}");
    }
}

/// Nats that a token's log-probability may differ from the reference device's, at most and on average, where activations are floats of 8
/// bits, whose last place is 16 times that of bfloat16.
const TOLERANCE: f64 = 1.5;
const MEAN_TOLERANCE: f64 = 0.2;

/// On a GPU that has products of fp8 weights stay so, and activations become so, token by token.
#[test]
fn models_in_fp8_are_multiplied_in_fp8() {
    let is_standin = std::env::var_os("VALAR_TEST_GPU").is_none();
    for form in [CHANNELS, TENSORS] {
        let mut stage = Stage::with_folder(|folder| write_models(folder, &folder.with_file_name("plain"), form));
        stage.set("STANDIN_CC", "8.9");
        let counters = stage.sandbox.path("counters.json");
        stage.set("STANDIN_COUNTERS", counters.to_str().unwrap());
        let lines = scored();
        let on_gpu = stage.job("cuda", &[], &lines);
        if is_standin {
            let counters = stage.sandbox.read("counters.json");
            for kernel in ["cublasLt e4m3", "add_norm_e4m3", "quant_rows_e4m3", "scale_bf16", "scale_add"] {
                assert!(counters.contains(kernel), "no {kernel}: {counters}");
            }
            // The head's weights are not fp8.
            assert!(!counters.contains("scale_f32"), "{counters}");
        }
        let on_reference = stage.job("reference", &[], &lines);
        let (mut all, mut n) = (0.0, 0.0);
        for (id, choices) in &on_reference {
            for (i, (got, want)) in logprobs(&on_gpu[id]).iter().zip(logprobs(choices)).enumerate() {
                let difference = (got - want).abs();
                assert!(difference <= TOLERANCE, "{form:?}, {id}: token {i} has {got}, not {want}");
                (all, n) = (all + difference, n + 1.0);
            }
        }
        assert!(n > 1000.0 && all / n <= MEAN_TOLERANCE, "{form:?}: {} nats on average", all / n);
        // Chunks of other numbers of rows, of which none is a multiple of 16.
        assert_eq!(stage.job("cuda", &["engine.budget_tokens=23"], &lines), on_gpu, "{form:?}");
    }
}

#[test]
fn a_row_of_a_model_in_fp8_has_the_same_bits_however_the_job_runs() {
    let mut stage = Stage::with_folder(|folder| write_models(folder, &folder.with_file_name("plain"), CHANNELS));
    stage.set("STANDIN_CC", "8.9");
    same_bits(stage);
}

#[test]
fn configurations_that_cannot_be_used_say_why() {
    let group = |at: &[&str], value: Value| {
        let mut config = CHANNELS.config();
        let place = at.iter().fold(&mut config["config_groups"]["group_0"], |place, key| &mut place[*key]);
        *place = value;
        config
    };
    let with = |form: Form, field: &str, value: Value| {
        let mut config = form.config();
        config[field] = value;
        config
    };
    for (config, fragment) in [
        (with(TENSORS, "fmt", json!("e5m2")), "fmt \"e5m2\""),
        (with(TENSORS, "activation_scheme", json!("other")), "activation_scheme \"other\""),
        (with(BLOCKS, "weight_block_size", json!([128, 0])), "weight_block_size is"),
        (with(CHANNELS, "format", json!("pack-quantized")), "format \"pack-quantized\""),
        (with(CHANNELS, "config_groups", json!({})), "config_groups has none"),
        (with(CHANNELS, "transform_config", json!({"config_groups": {"u": {}}})), "transform_config"),
        (group(&["weights", "num_bits"], json!(4)), "group_0: weights of 4 bits"),
        (group(&["weights", "type"], json!("int")), "type \"int\""),
        (group(&["weights", "symmetric"], json!(false)), "not symmetric"),
        (group(&["weights", "strategy"], json!("group")), "strategy \"group\""),
        (group(&["weights", "strategy"], json!("block")), "block_structure is missing"),
        (group(&["weights"], Value::Null), "weights is missing"),
    ] {
        let error = error(&config, &[]);
        assert!(error.contains("quantization_config") && error.contains(fragment), "{config}: {error}");
    }
}

#[test]
fn layers_that_cannot_be_used_say_why() {
    let checked = |form: Form, change: &dyn Fn(&mut Vec<Part>), fragment: &str| {
        let mut parts = form.random(&mut Noise(3), (16, 256), 0.3).parts(NAME);
        change(&mut parts);
        let error = error(&form.config(), &parts);
        assert!(error.contains(&format!("{NAME}.")) && error.contains(fragment), "{fragment}: {error}");
    };
    checked(CHANNELS, &|parts| drop(parts.remove(1)), "q_proj.weight_scale is missing");
    checked(CHANNELS, &|parts| drop(parts.remove(0)), "q_proj.weight is missing, or not of type F8_E4M3");
    checked(CHANNELS, &|parts| parts[0] = (parts[0].0.clone(), "F32", vec![16, 1], vec![0; 64]), "not of type F8_E4M3, but has");
    checked(CHANNELS, &|parts| parts[0].1 = "F8_E5M2", "type F8_E5M2");
    checked(
        CHANNELS,
        &|parts| parts[1].2 = vec![2, 8],
        "q_proj.weight_scale: expected shape [], [1], [16] or [16, 1], found [2, 8]",
    );
    checked(
        BLOCKS,
        &|parts| parts[1].2 = vec![2, 1],
        "weight_scale_inv: expected shape [1, 2], found [2, 1] (blocks of 128 outputs",
    );
    checked(CHANNELS, &|parts| parts[1].1 = "I16", "q_proj.weight_scale has type I16");
    checked(TENSORS, &|parts| parts[1].3 = f32::INFINITY.to_le_bytes().to_vec(), "q_proj.weight_scale: a scale is inf");
    checked(TENSORS, &|parts| parts[0].2 = vec![4096], "q_proj.weight has shape [4096], expected two dimensions");
    let both = |parts: &mut Vec<Part>| parts.push((format!("{NAME}.weight_scale_inv"), "F32", vec![], vec![0; 4]));
    checked(TENSORS, &both, "weight_scale and weight_scale_inv");
    // Without a word of scales, such tensors have no meaning.
    let message = error(&Value::Null, &TENSORS.random(&mut Noise(3), (16, 256), 0.3).parts(NAME));
    assert!(message.contains("F8_E4M3, which is not supported") || message.contains("has no place"), "{message}");
}

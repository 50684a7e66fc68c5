//! Folders of GPTQ's and AWQ's packed layers, against the values that a packer of these tests packed: bit for bit as weights; on the
//! devices as the same model of plain values; and folders that can't be used.

use crate::common::golden;
use crate::cuda_device::{compare_scores, scored};
use crate::cuda_machine::Noise;
use crate::cuda_stage::{Family, Stage, tensors, write_model};
use crate::model::run_side_by_side;
use half::{bf16, f16};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use valar::device::Device;
use valar::device::cpu::{CpuDevice, Isa, Numerics};
use valar::device::reference::Reference;
use valar::hf::HfFolder;
use valar::model::{ModelFile, ModelRunner};
use valar::tensor::DType;

/// How layers are packed.
#[derive(Debug, Clone, Copy)]
struct Packing {
    method: &'static str,
    format: &'static str,
    bits: usize,
    group: i64,
    sym: bool,
    desc_act: bool,
    scales: &'static str,
}

const GPTQ: Packing = Packing { method: "gptq", format: "gptq", bits: 4, group: 64, sym: false, desc_act: false, scales: "F16" };
const GPTQ8: Packing = Packing { bits: 8, group: 32, sym: true, ..GPTQ };
const AWQ: Packing = Packing { method: "awq", format: "gemm", group: 128, ..GPTQ };

/// A tensor of a file: its name, type, shape and bytes.
pub(crate) type Part = (String, &'static str, Vec<usize>, Vec<u8>);

/// Integers, zeros and scales of a layer `[n, k]`.
struct Layer {
    packing: Packing,
    n: usize,
    k: usize,
    /// `[n][k]`
    q: Vec<u32>,
    /// Of each input.
    groups: Vec<usize>,
    n_groups: usize,
    /// `[n_groups][n]`
    zeros: Vec<u32>,
    /// `[n_groups][n]`
    scales: Vec<f32>,
}

impl Packing {
    fn config(self) -> Value {
        json!({
            "quant_method": self.method, "bits": self.bits, "group_size": self.group, "sym": self.sym, "desc_act": self.desc_act,
            "checkpoint_format": self.format, "version": "gemm", "zero_point": true, "lm_head": false, "meta": {"quantizer": ["a"]},
        })
    }

    /// Values of about that size; zeros up to `spread` away from the middle.
    fn random(self, noise: &mut Noise, (n, k): (usize, usize), size: f32, spread: u32) -> Layer {
        let (all, middle) = (1u32 << self.bits, 1u32 << (self.bits - 1));
        let group = usize::try_from(self.group).unwrap_or(k);
        let n_groups = k.div_ceil(group);
        let mut below = |n: u32| ((f32::midpoint(noise.next(), 1.0) * n as f32) as u32).min(n - 1);
        let q = (0..n * k).map(|_| below(all)).collect();
        let zero = |below: &mut dyn FnMut(u32) -> u32| {
            if self.sym { middle } else { (middle + below(2 * spread + 1)).saturating_sub(spread).min(all - 1) }
        };
        let zeros = (0..n_groups * n).map(|_| zero(&mut below)).collect();
        let mut groups: Vec<usize> = (0..k).map(|i| i / group).collect();
        if self.desc_act {
            for i in (1..k).rev() {
                groups.swap(i, below(i as u32 + 1) as usize);
            }
        }
        let scales =
            (0..n_groups * n).map(|_| rounded_as(self.scales, size / middle as f32 * (0.7 + 0.3 * noise.next()))).collect();
        Layer { packing: self, n, k, q, groups, n_groups, zeros, scales }
    }
}

/// As a type of floats has it.
pub(crate) fn rounded_as(dtype: &str, x: f32) -> f32 {
    match dtype {
        "F16" => f16::from_f32(x).to_f32(),
        "BF16" => bf16::from_f32(x).to_f32(),
        _ => x,
    }
}

impl Layer {
    /// `[n][k]`
    fn values(&self) -> Vec<f32> {
        let value = |i: usize| {
            let at = self.groups[i % self.k] * self.n + i / self.k;
            self.scales[at] * (self.q[i] as f32 - self.zeros[at] as f32)
        };
        (0..self.n * self.k).map(value).collect()
    }

    /// The tensors of a layer of that name.
    fn parts(&self, name: &str) -> Vec<Part> {
        let Self { packing, n, k, n_groups, .. } = *self;
        let per_word = 32 / packing.bits;
        let q = |row: usize, input: usize| self.q[row * k + input];
        let bytes = |words: Vec<u32>| words.into_iter().flat_map(u32::to_le_bytes).collect::<Vec<u8>>();
        let joined =
            |values: &mut dyn Iterator<Item = u32>| values.enumerate().fold(0, |word, (i, q)| word | q << (i * packing.bits));
        // The outputs of a word of AWQ, from its lowest bits up.
        let order = |i: usize| if packing.method == "awq" { [0, 2, 4, 6, 1, 3, 5, 7][i] } else { i };
        let mut qweight = Vec::new();
        if packing.method == "awq" {
            for input in 0..k {
                qweight.extend((0..n / 8).map(|word| joined(&mut (0..8).map(|i| q(8 * word + order(i), input)))));
            }
        } else {
            for line in 0..k / per_word {
                qweight.extend((0..n).map(|row| joined(&mut (0..per_word).map(|i| q(row, line * per_word + i)))));
            }
        }
        let stored = |zero: u32| if packing.format == "gptq" { zero.wrapping_sub(1) & ((1 << packing.bits) - 1) } else { zero };
        let mut qzeros = Vec::new();
        for group in 0..n_groups {
            let zero = |row: usize| stored(self.zeros[group * n + row]);
            qzeros.extend((0..n / per_word).map(|word| joined(&mut (0..per_word).map(|i| zero(per_word * word + order(i))))));
        }
        let scales = self.scales.iter().flat_map(|&x| match packing.scales {
            "F16" => f16::from_f32(x).to_le_bytes().to_vec(),
            "BF16" => bf16::from_f32(x).to_le_bytes().to_vec(),
            _ => x.to_le_bytes().to_vec(),
        });
        let rows = if packing.method == "awq" { vec![k, n / 8] } else { vec![k / per_word, n] };
        let mut parts = vec![
            (format!("{name}.qweight"), "I32", rows, bytes(qweight)),
            (format!("{name}.qzeros"), "I32", vec![n_groups, n / per_word], bytes(qzeros)),
            (format!("{name}.scales"), packing.scales, vec![n_groups, n], scales.collect()),
        ];
        if packing.method == "gptq" {
            let groups = self.groups.iter().map(|&group| group as u32).collect();
            parts.push((format!("{name}.g_idx"), "I32", vec![k], bytes(groups)));
        }
        parts
    }
}

pub(crate) fn write_tensors(path: &Path, parts: &[Part]) {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, kind, shape, bytes) in parts {
        let start = data.len();
        data.extend(bytes);
        header.insert(name.clone(), json!({"dtype": kind, "shape": shape, "data_offsets": [start, data.len()]}));
    }
    let header = Value::Object(header).to_string();
    fs::write(path, [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat()).unwrap();
}

pub(crate) fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

pub(crate) fn configure(folder: &Path, config: &Value) {
    let path = folder.join("config.json");
    let mut all: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    all["quantization_config"] = config.clone();
    fs::write(&path, all.to_string()).unwrap();
}

/// A folder of some tensors of a tiny llama, which is not a whole model.
pub(crate) fn folder_of(config: &Value, parts: &[Part]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::copy(golden("models/llama3-rope").join("config.json"), folder.path().join("config.json")).unwrap();
    configure(folder.path(), config);
    write_tensors(&folder.path().join("model.safetensors"), parts);
    folder
}

pub(crate) const NAME: &str = "model.layers.0.self_attn.q_proj";

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn values_are_those_that_were_packed(
        seed: u32,
        base in prop::sample::select(vec![GPTQ, Packing { format: "gptq_v2", ..GPTQ }, GPTQ8, Packing { sym: false, ..GPTQ8 }, AWQ]),
        group in prop::sample::select(vec![-1i64, 16, 32, 64, 128]),
        (sym, desc_act) in (prop::bool::ANY, prop::bool::weighted(0.2)),
        scales in prop::sample::select(vec!["F16", "BF16", "F32"]),
        n in 1usize..12,
        k in prop::sample::select(vec![8usize, 32, 40, 96, 128, 160, 256, 320]),
    ) {
        let is_gptq = base.method == "gptq";
        let packing = Packing { group, scales, sym: sym && is_gptq, desc_act: desc_act && is_gptq, ..base };
        let layer = packing.random(&mut Noise(seed), (8 * n, k), 0.3, 1 << packing.bits);
        let folder = folder_of(&packing.config(), &layer.parts(NAME));
        let folder = HfFolder::open(folder.path()).unwrap();
        let tensor = folder.tensor("blk.0.attn_q.weight").unwrap();

        let size = usize::try_from(group).unwrap_or(k).min(k);
        let in_order = layer.groups.iter().enumerate().all(|(i, &group)| group == i / size);
        let has_blocks = in_order && k % 32 == 0 && (size == k || size % 32 == 0);
        let is_even = scales != "F32" && layer.zeros.iter().all(|&zero| zero == 1 << (packing.bits - 1));
        let want = match packing.bits {
            4 if has_blocks && is_even => DType::Q4_0,
            4 if has_blocks => DType::Q4Z,
            8 if has_blocks && is_even => DType::Q8_0,
            _ => DType::F32,
        };
        prop_assert_eq!((tensor.dtype, &tensor.shape[..]), (want, &[8 * n, k][..]));
        let mut values = vec![0.0; 8 * n * k];
        tensor.dtype.dequantise(&tensor.bytes, &mut values);
        for (i, (got, want)) in values.iter().zip(layer.values()).enumerate() {
            prop_assert_eq!(got.to_bits(), want.to_bits(), "element {}: {}, not {}", i, got, want);
        }
        let row_bytes = tensor.bytes.len() / (8 * n);
        prop_assert_eq!(&tensor.rows(3..5).bytes[..], &tensor.bytes[3 * row_bytes..5 * row_bytes]);
    }
}

/// Writes a tiny llama twice: packed, and the same values in f32.
fn write_models(packed: &Path, plain: &Path, packing: Packing) {
    for folder in [packed, plain] {
        write_model(folder, Family::Llama, false);
    }
    let (mut packed_parts, mut plain_parts) = (Vec::new(), Vec::new());
    let mut noise = Noise(13);
    for (name, shape, largest) in tensors(Family::Llama) {
        if let Some(layer) = name.strip_suffix("_proj.weight") {
            let random = packing.random(&mut noise, (shape[0], shape[1]), largest, 2);
            packed_parts.extend(random.parts(&format!("{layer}_proj")));
            plain_parts.push((name, "F32", shape, f32_bytes(&random.values())));
        } else {
            let value = |_| if largest == 0.0 { 1.0 + 0.3 * noise.next() } else { largest * noise.next() };
            let values: Vec<f32> = (0..shape.iter().product()).map(value).collect();
            let part: Part = (name, "F32", shape, f32_bytes(&values));
            packed_parts.push(part.clone());
            plain_parts.push(part);
        }
    }
    configure(packed, &packing.config());
    write_tensors(&packed.join("model.safetensors"), &packed_parts);
    write_tensors(&plain.join("model.safetensors"), &plain_parts);
}

/// Likely next tokens and their log-probabilities at each position of a fixed text.
pub(crate) fn answer<D: Device>(dev: D, folder: &Path) -> Vec<Vec<(u32, f32)>> {
    let mut runner = ModelRunner::load(dev, &HfFolder::open(folder).unwrap(), 8, 64).unwrap();
    let tokens: Vec<u32> = (0..60).map(|i| i * i % 61).collect();
    let rows = run_side_by_side(&mut runner, &[&tokens]);
    assert!(rows.iter().all(|row| !row.is_broken()));
    rows.into_iter().map(|row| row.top.to_vec()).collect()
}

/// The same bits where the arithmetic is that of floats; with activations of 8 bits, what these lose.
#[test]
fn packed_models_are_those_of_their_values() {
    let packings = [GPTQ, GPTQ8, AWQ, Packing { sym: true, group: -1, ..GPTQ }, Packing { desc_act: true, group: 32, ..GPTQ }];
    for packing in packings {
        let room = tempfile::tempdir().unwrap();
        let [packed, plain] = ["packed", "plain"].map(|name| room.path().join(name));
        write_models(&packed, &plain, packing);
        let want = answer(Reference, &plain);
        assert_eq!(answer(Reference, &packed), want, "{packing:?}");
        let cpu = |numerics| CpuDevice::new(Isa::detect(), numerics, 2);
        for numerics in [Numerics::F32, Numerics::Bf16] {
            assert_eq!(answer(cpu(numerics), &packed), answer(cpu(numerics), &plain), "{packing:?} {numerics:?}");
        }
        let (mut sum, mut n) = (0.0, 0);
        for (got, want) in answer(cpu(Numerics::Int8), &packed).iter().zip(&want) {
            let (likeliest, logprob) = want[0];
            let found = got.iter().find(|(token, _)| *token == likeliest).expect("the likeliest is among the 20 likeliest");
            (sum, n) = (sum + (found.1 - logprob).abs(), n + 1);
        }
        assert!(n == 60 && sum / (n as f32) < 0.05, "{packing:?}: {} nats off on average", sum / n as f32);
    }
}

#[test]
fn packed_models_on_cuda_are_what_the_reference_device_says() {
    for packing in [AWQ, GPTQ8] {
        let mut stage = Stage::with_folder(|folder| write_models(folder, &folder.with_file_name("plain"), packing));
        let lines = scored();
        let counters = stage.sandbox.path("counters.json");
        stage.set("STANDIN_COUNTERS", counters.to_str().unwrap());
        let on_gpu = stage.job("cuda", &[], &lines);
        if std::env::var_os("VALAR_TEST_GPU").is_none() {
            let counters = stage.sandbox.read("counters.json");
            assert!(counters.contains(&format!("linear_q{}", packing.bits)), "{counters}");
        }
        compare_scores(&on_gpu, &stage.job("reference", &[], &lines), 0.0);
        let types: Value = serde_json::from_slice(&stage.sandbox.run(&["inspect", "tiny", "--json"]).stdout).unwrap();
        let packed = if packing.bits == 4 { "Q4_Z" } else { "Q8_0" };
        assert_eq!(types["tensors"][packed]["count"], 14, "{types}");
    }
}

pub(crate) fn error(config: &Value, parts: &[Part]) -> String {
    match HfFolder::open(folder_of(config, parts).path()) {
        Ok(_) => panic!("accepted: {config}"),
        Err(error) => format!("{error:#}"),
    }
}

#[test]
fn configurations_that_cannot_be_used_say_why() {
    for (field, value, fragments) in [
        ("quant_method", json!("bitsandbytes"), &["quant_method \"bitsandbytes\"", "gptq, awq, fp8"][..]),
        ("quant_method", Value::Null, &["quant_method \"\""]),
        ("bits", json!(3), &["bits: 3 of gptq", "[4, 8]"]),
        ("bits", Value::Null, &["bits is missing"]),
        ("group_size", Value::Null, &["group_size is missing"]),
        ("group_size", json!(0), &["group_size is 0"]),
        ("group_size", json!(-2), &["group_size is -2"]),
        ("checkpoint_format", json!("marlin"), &["checkpoint_format \"marlin\" of gptq"]),
    ] {
        let mut config = GPTQ.config();
        config[field] = value;
        let error = error(&config, &[]);
        let all = [&["config.json", "quantization_config"][..], fragments].concat();
        assert!(all.iter().all(|part| error.contains(part)), "{config}: {error}");
    }
    for (field, value, fragment) in [("bits", json!(8), "bits: 8 of awq"), ("version", json!("gemv"), "version \"gemv\" of awq")]
    {
        let mut config = AWQ.config();
        config[field] = value;
        assert!(error(&config, &[]).contains(fragment), "{}", error(&config, &[]));
    }
}

#[test]
fn layers_that_cannot_be_used_say_why() {
    let layer = |packing: Packing| packing.random(&mut Noise(3), (16, 128), 0.3, 3).parts(NAME);
    let checked = |packing: Packing, change: &dyn Fn(&mut Vec<Part>), fragment: &str| {
        let mut parts = layer(packing);
        change(&mut parts);
        let error = error(&packing.config(), &parts);
        assert!(error.contains(&format!("{NAME}.")) && error.contains(fragment), "{fragment}: {error}");
    };
    checked(GPTQ, &|parts| drop(parts.remove(2)), "q_proj.scales is missing");
    checked(AWQ, &|parts| drop(parts.remove(1)), "q_proj.qzeros is missing");
    checked(GPTQ, &|parts| parts[0].1 = "F32", "q_proj.qweight has type F32");
    checked(GPTQ, &|parts| parts[2].2 = vec![16, 2], "q_proj.scales: expected shape [2, 16], found [16, 2]");
    checked(GPTQ, &|parts| parts[2].2 = vec![32], "two dimensions");
    checked(GPTQ, &|parts| parts[0].2 = vec![8, 32], "q_proj.qzeros: expected shape [1, 4], found [2, 2]");
    checked(
        GPTQ,
        &|parts| parts[0] = (format!("{NAME}.qweight"), "I32", vec![usize::MAX / 8, 0], Vec::new()),
        "qweight has shape",
    );
    checked(GPTQ, &|parts| parts[3].3[4] = 2, "q_proj.g_idx names group 2, there are 2");
    checked(GPTQ, &|parts| parts[3].3[3] = 0x80, "q_proj.g_idx names group -");
    checked(GPTQ8, &|parts| parts[1].3[5] ^= 1, "q_proj.qzeros: zeros that are not the middle");
    checked(AWQ, &|parts| parts.push(layer(GPTQ).pop().unwrap()), "q_proj.g_idx has no place");
    checked(
        GPTQ,
        &|parts| parts.push((format!("{NAME}.weight"), "F32", vec![16, 128], vec![0; 8192])),
        "q_proj.weight is there, and packed",
    );
    // Without a word of packing, such tensors have no meaning.
    let message = error(&Value::Null, &layer(GPTQ));
    assert!(message.contains("has no place"), "{message}");
}

/// With `sym` the zeros are the middle, also in files that say v1 and store them as v2 does.
#[test]
fn symmetric_zeros_are_the_middle_however_they_are_stored() {
    let packing = Packing { sym: true, ..GPTQ };
    let layer = packing.random(&mut Noise(3), (16, 128), 0.3, 0);
    let as_v2 = Layer { packing: Packing { format: "gptq_v2", ..packing }, ..packing.random(&mut Noise(3), (16, 128), 0.3, 0) };
    assert_ne!(layer.parts(NAME)[1].3, as_v2.parts(NAME)[1].3);
    for parts in [layer.parts(NAME), as_v2.parts(NAME)] {
        let folder = folder_of(&packing.config(), &parts);
        let folder = HfFolder::open(folder.path()).unwrap();
        let tensor = folder.tensor("blk.0.attn_q.weight").unwrap();
        let mut values = vec![0.0; 16 * 128];
        tensor.dtype.dequantise(&tensor.bytes, &mut values);
        assert_eq!((tensor.dtype, values), (DType::Q4_0, layer.values()));
    }
}

/// A layer's tensors may stand in several files, beside biases of zeros, which say nothing; other biases do.
#[test]
fn shards_and_idle_biases() {
    let layer = AWQ.random(&mut Noise(3), (16, 128), 0.3, 3);
    let write = |bias: u8| {
        let parts = layer.parts(NAME);
        let bias = ("model.layers.0.self_attn.o_proj.bias".to_owned(), "F16", vec![2], vec![0, 0, bias, 0]);
        let experts = ("model.layers.0.block_sparse_moe.experts.0.w1.bias".to_owned(), "F16", vec![2], vec![0; 4]);
        let folder = folder_of(&AWQ.config(), &[]);
        fs::remove_file(folder.path().join("model.safetensors")).unwrap();
        let files = [("a.safetensors", vec![parts[0].clone(), bias, experts]), ("b.safetensors", parts[1..].to_vec())];
        let mut index = BTreeMap::new();
        for (file, parts) in &files {
            write_tensors(&folder.path().join(file), parts);
            index.extend(parts.iter().map(|(name, ..)| (name.clone(), *file)));
        }
        fs::write(folder.path().join("model.safetensors.index.json"), json!({"weight_map": index}).to_string()).unwrap();
        folder
    };
    let folder = write(0);
    let opened = HfFolder::open(folder.path()).unwrap();
    assert_eq!(opened.tensor_names(), ["blk.0.attn_q.weight"]);
    let tensor = opened.tensor("blk.0.attn_q.weight").unwrap();
    let mut values = vec![0.0; 16 * 128];
    tensor.dtype.dequantise(&tensor.bytes, &mut values);
    assert_eq!(values, layer.values());
    let folder = write(1);
    let message = HfFolder::open(folder.path()).map(|_| ()).unwrap_err();
    assert!(format!("{message:#}").contains("self_attn.o_proj.bias has no place"), "{message:#}");
}

//! Weights: element types against gguf-py bit for bit (golden files), and headers of files that are damaged or made to
//! harm.

use crate::common::{golden, model_path};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::fs;
use std::io::Write;
use valar::device::Device;
use valar::device::cpu::{CpuDevice, Isa, Numerics};
use valar::device::reference::Reference;
use valar::gguf::Gguf;
use valar::tensor::{DTYPES, DType, GROUP, Tensor};

fn unhex(hex: &str) -> Vec<u8> {
    (0..hex.len() / 2).map(|i| u8::from_str_radix(&hex[2 * i..][..2], 16).unwrap()).collect()
}

#[test]
fn values_are_those_of_gguf_py() {
    let golden = fs::read_to_string(golden("dequantise.jsonl")).unwrap();
    let rows: Vec<Value> = golden.lines().skip(1).map(|line| serde_json::from_str(line).unwrap()).collect();
    let of_gguf = DTYPES.into_iter().filter(|dtype| !matches!(dtype, DType::Q4Z | DType::E4m3));
    assert_eq!(rows.len(), of_gguf.clone().count());
    for dtype in of_gguf {
        let row = rows.iter().find(|row| row["type"] == dtype.to_string()).unwrap_or_else(|| panic!("no golden row of {dtype}"));
        let bytes = unhex(row["blocks"].as_str().unwrap());
        let mut values = vec![0.0f32; bytes.len() / dtype.block_bytes() * dtype.block_elements()];
        dtype.dequantise(&bytes, &mut values);
        for (i, (value, want)) in values.iter().zip(row["first_bits"].as_array().unwrap()).enumerate() {
            let want = want.as_u64().unwrap() as u32;
            assert_eq!(value.to_bits(), want, "{dtype}: element {i} is {value}, not {}", f32::from_bits(want));
        }
        let digest = Sha256::digest(values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>());
        let want = row["sha256"].as_str().unwrap();
        assert!(unhex(want)[..] == digest[..], "{dtype}: past the first elements");
    }
}

/// The layouts of devices rely on it: one scale per group means two equal ones, no minimum means 0.
#[test]
fn groups_say_what_their_type_promises() {
    for dtype in DTYPES.into_iter().filter(|dtype| dtype.is_quantised()) {
        let block: Vec<u8> = (0..dtype.block_bytes()).map(|i| (i * 37 + 11) as u8).collect();
        let groups: Vec<_> = (0..dtype.block_elements() / GROUP).map(|part| dtype.group(&block, part)).collect();
        assert_eq!(groups.iter().any(|group| group.d[0].to_bits() != group.d[1].to_bits()), dtype.has_half_scales(), "{dtype}");
        assert_eq!(groups.iter().any(|group| group.m.map(f32::to_bits) != [0; 2]), dtype.has_minimum(), "{dtype}");
    }
}

/// Half bits per weight that the README promises; what memory is planned by.
#[test]
fn devices_say_what_weights_take() {
    let cpu = CpuDevice::new(Isa::detect(), Numerics::Int8, 1);
    for dtype in DTYPES {
        let half_bits = match dtype {
            DType::F32 | DType::E4m3 => 64,
            DType::F16 | DType::Bf16 => 32,
            DType::Q4_0 => 9,
            DType::Q4_1 => 10,
            DType::Q8_0 => 17,
            DType::Q5_0 | DType::Iq4Nl | DType::Iq4Xs | DType::Q4Z => 18,
            DType::Q5_1 | DType::Q3K | DType::Q4K | DType::Q5K | DType::Q6K => 20,
            DType::Q2K => 24,
        };
        let bytes = vec![0; 64 * 512 / dtype.block_elements() * dtype.block_bytes()];
        let tensor = Tensor { name: "t", dtype, shape: vec![64, 512], bytes: (&bytes).into() };
        assert_eq!(cpu.tensor_bytes(&tensor), 64 * 512 / 16 * half_bits, "{dtype}");
        assert_eq!(Reference.tensor_bytes(&tensor), 64 * 512 * 4, "{dtype}");
        let vector = Tensor { shape: vec![64 * 512], ..tensor };
        assert_eq!(cpu.tensor_bytes(&vector), 64 * 512 * 4, "{dtype}");
    }
}

// -- headers

/// A GGUF file of one string and one tensor `[2, 32]` of a type, written byte by byte.
fn file(version: u32, type_id: u32, n_data: usize) -> Vec<u8> {
    let mut bytes = b"GGUF".to_vec();
    let text = |bytes: &mut Vec<u8>, text: &str| {
        bytes.extend((text.len() as u64).to_le_bytes());
        bytes.extend(text.as_bytes());
    };
    bytes.extend(version.to_le_bytes());
    bytes.extend(1u64.to_le_bytes());
    bytes.extend(2u64.to_le_bytes());
    text(&mut bytes, "general.name");
    bytes.extend(8u32.to_le_bytes());
    text(&mut bytes, "täst");
    text(&mut bytes, "a.list");
    bytes.extend(9u32.to_le_bytes());
    bytes.extend(5u32.to_le_bytes());
    bytes.extend(3u64.to_le_bytes());
    bytes.extend([7i32, -1, 2].iter().flat_map(|x| x.to_le_bytes()));
    text(&mut bytes, "t");
    bytes.extend(2u32.to_le_bytes());
    bytes.extend(32u64.to_le_bytes());
    bytes.extend(2u64.to_le_bytes());
    bytes.extend(type_id.to_le_bytes());
    bytes.extend(0u64.to_le_bytes());
    bytes.resize(bytes.len().next_multiple_of(32) + n_data, 0);
    bytes
}

fn open(bytes: &[u8]) -> Result<Gguf, String> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    Gguf::open(file.path()).map_err(|error| format!("{error:#}"))
}

#[test]
fn a_header_is_read() {
    for version in [2, 3] {
        let gguf = open(&file(version, 20, 36)).unwrap();
        assert_eq!((gguf.str("general.name"), gguf.str("a.list"), gguf.u64("a.list")), (Some("täst"), None, None));
        assert_eq!(gguf.i32_array("a.list"), Some(vec![7, -1, 2]));
        let tensor = gguf.tensor("t").unwrap();
        assert_eq!((tensor.dtype, &tensor.shape[..], tensor.bytes.len()), (DType::Iq4Nl, &[2, 32][..], 36));
        assert!(gguf.tensor("u").unwrap_err().to_string().contains("tensor u is missing"));
    }
}

#[test]
fn every_type_has_its_number() {
    let numbers = [0, 1, 30, 2, 3, 6, 7, 8, 10, 11, 12, 13, 14, 20, 23];
    for (dtype, number) in DTYPES.into_iter().zip(numbers) {
        match open(&file(3, number, 32 * 2 * 4)) {
            Ok(gguf) => assert_eq!(gguf.tensor("t").unwrap().dtype, dtype),
            // Rows of 32 are no blocks of 256.
            Err(error) => assert!(error.contains(&format!("no whole number of {dtype} blocks (256)")), "{error}"),
        }
    }
}

#[test]
fn bad_files_are_refused_by_name() {
    let check = |bytes: &[u8], expected: &str| {
        let error = open(bytes).err().expect(expected);
        assert!(error.contains(expected), "{error}");
    };
    check(&file(1, 2, 36), "version is 0x1");
    check(&file(0x0300_0000, 2, 36), "version is 0x3000000");
    check(b"GGML", "does not begin with \"GGUF\"");
    check(b"GG", "does not begin with \"GGUF\"");
    check(&file(3, 2, 35), "tensor t [2, 32] reaches past the end of the file");
    check(&file(3, 21, 99), "tensor t has type IQ3_S, which is not supported");
    check(&file(3, 99, 99), "tensor t has type number 99");
    let twice = file(3, 2, 36);
    let key = twice.windows(12).position(|w| w == b"general.name").unwrap();
    let mut dims = file(3, 2, 36);
    let at = dims.windows(9).position(|w| w == [1, 0, 0, 0, 0, 0, 0, 0, b't']).unwrap() + 9;
    dims[at] = 5;
    check(&dims, "tensor t has 5 dimensions");
    let mut huge = file(3, 2, 36);
    huge[at + 4..at + 12].fill(0xff);
    check(&huge, "tensor t");
    let mut kind = twice.clone();
    kind[key + 12] = 13;
    check(&kind, "metadata general.name: unknown type 13");
    let mut doubled = twice[..24].to_vec();
    doubled.extend_from_slice(&twice[24..key + 12 + 4 + 8 + 5]);
    doubled.extend_from_slice(&twice[24..key + 12 + 4 + 8 + 5]);
    check(&doubled, "metadata general.name stands twice");
}

/// Arrays in arrays without an end, and counts that no file could hold: an error at once, no deep recursion, no memory.
#[test]
fn a_crafted_header_costs_nothing() {
    let mut bytes = file(3, 2, 0);
    let list = bytes.windows(6).position(|w| w == b"a.list").unwrap() + 6;
    bytes.truncate(list + 4);
    for _ in 0..100_000 {
        bytes.extend(9u32.to_le_bytes());
        bytes.extend(1u64.to_le_bytes());
    }
    assert!(open(&bytes).err().unwrap().contains("arrays inside arrays"));
    for at in [8, 16, list + 8] {
        let mut bytes = file(3, 2, 36);
        bytes[at..at + 8].fill(0x7f);
        assert!(open(&bytes).is_err());
    }
}

#[test]
fn a_file_cut_anywhere_in_its_header_is_an_error() {
    let whole = file(3, 8, 68);
    for n in 0..whole.len() {
        assert!(open(&whole[..n]).is_err(), "cut at {n}");
    }
    assert!(open(&whole).is_ok());
    // Any one byte changed: an error or a file, never a panic.
    for i in 0..whole.len() {
        for flip in [1, 0x80, 0xff] {
            let mut bytes = whole.clone();
            bytes[i] ^= flip;
            let _ = open(&bytes);
        }
    }
    let model = fs::read(model_path()).unwrap();
    for n in [1000, 100_000, 1_700_000, model.len() - 1] {
        assert!(open(&model[..n]).is_err(), "the model cut at {n}");
    }
}

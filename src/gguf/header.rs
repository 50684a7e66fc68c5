//! The header of a GGUF file, version 2 or 3: metadata and where each tensor stands. Knows nothing of what they mean.
//! Invariant: no bytes make it panic, recurse deeply or allocate more than a small multiple of what the file holds.

use crate::tensor::DType;
use anyhow::{Context, Result, bail, ensure};
use std::collections::HashMap;

/// Where a tensor's bytes stand; inside the file.
pub(super) struct Entry {
    pub(super) dtype: DType,
    /// Outermost first.
    pub(super) shape: Vec<usize>,
    pub(super) start: usize,
    pub(super) n_bytes: usize,
}

/// A value of the metadata; integers and floats of all widths are one.
pub(super) enum Value {
    Int(i128),
    Float(f64),
    Bool(bool),
    String(String),
    /// Of integers or booleans.
    Ints(Vec<i64>),
    Floats(Vec<f64>),
    Strings(Vec<String>),
    /// An array without items, whatever its type: writers that go by the items name any.
    Empty,
    /// An array of arrays: nothing that is read here has one.
    Nested,
}

/// Most dimensions of a tensor, as in ggml.
const MAX_DIMS: u32 = 4;
/// Most levels of arrays in arrays.
const MAX_NESTING: u32 = 4;

/// Metadata and tensors by name.
pub(super) type Header = (HashMap<String, Value>, HashMap<String, Entry>);

/// Reads the header of a whole file.
pub(super) fn read(bytes: &[u8]) -> Result<Header> {
    let mut reader = Reader { bytes, at: 0 };
    ensure!(reader.take(4).is_ok_and(|magic| magic == b"GGUF"), "it does not begin with \"GGUF\"");
    let version = reader.u32()?;
    ensure!(version == 2 || version == 3, "its version is {version:#x}, not 2 or 3");
    let (n_tensors, n_values) = (reader.u64()?, reader.u64()?);
    let mut metadata = HashMap::new();
    for _ in 0..n_values {
        let key = reader.string()?;
        let kind = reader.u32()?;
        let value = reader.value(kind, 0).with_context(|| format!("metadata {key}"))?;
        ensure!(metadata.insert(key.clone(), value).is_none(), "metadata {key} stands twice");
    }
    let infos = (0..n_tensors).map(|_| reader.tensor()).collect::<Result<Vec<_>>>()?;
    let alignment = match metadata.get("general.alignment") {
        None => 32,
        Some(&Value::Int(n)) if n > 0 && n < 1 << 30 && (n as u64).is_power_of_two() => n as usize,
        Some(_) => bail!("general.alignment is no power of two"),
    };
    let data = reader.at.next_multiple_of(alignment);
    let mut tensors = HashMap::new();
    for TensorInfo { name, dtype, shape, offset } in infos {
        let row = shape.last().copied().unwrap_or(1);
        ensure!(
            row % dtype.block_elements() == 0,
            "tensor {name}: rows of {row} elements are no whole number of {dtype} blocks ({})",
            dtype.block_elements()
        );
        let n_elements = shape.iter().try_fold(1usize, |a, &b| a.checked_mul(b));
        let n_bytes = n_elements.and_then(|n| (n / dtype.block_elements()).checked_mul(dtype.block_bytes()));
        let start = usize::try_from(offset).ok().and_then(|offset| data.checked_add(offset));
        let inside = start.zip(n_bytes).filter(|(start, n)| start.checked_add(*n).is_some_and(|end| end <= bytes.len()));
        let (start, n_bytes) = inside.with_context(|| {
            format!("tensor {name} {shape:?} reaches past the end of the file ({} bytes): it is cut off or damaged", bytes.len())
        })?;
        let entry = Entry { dtype, shape, start, n_bytes };
        ensure!(tensors.insert(name.clone(), entry).is_none(), "tensor {name} stands twice");
    }
    Ok((metadata, tensors))
}

/// What the header says of a tensor.
struct TensorInfo {
    name: String,
    dtype: DType,
    shape: Vec<usize>,
    offset: u64,
}

/// Takes bytes from the front; never reads past the end.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        let taken = self.bytes[self.at..].get(..n).with_context(|| format!("it ends inside its header, at byte {}", self.at))?;
        self.at += n;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        Ok(self.take(N)?.try_into().expect("N bytes were taken"))
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A text; what is not UTF-8 becomes U+FFFD (some converters cut texts in the middle of a character).
    fn string(&mut self) -> Result<String> {
        let n = self.u64()?;
        let bytes = self.take(usize::try_from(n).unwrap_or(usize::MAX))?;
        Ok(String::from_utf8_lossy(bytes).into_owned())
    }

    fn tensor(&mut self) -> Result<TensorInfo> {
        let name = self.string()?;
        let n_dims = self.u32()?;
        ensure!(n_dims <= MAX_DIMS, "tensor {name} has {n_dims} dimensions, over {MAX_DIMS}");
        let mut shape = (0..n_dims).map(|_| Ok(usize::try_from(self.u64()?)?)).collect::<Result<Vec<_>>>()?;
        shape.reverse();
        let id = self.u32()?;
        let dtype = dtype(id).map_err(|known| anyhow::anyhow!("tensor {name} has type {known}, which is not supported"))?;
        Ok(TensorInfo { name, dtype, shape, offset: self.u64()? })
    }

    fn value(&mut self, kind: u32, depth: u32) -> Result<Value> {
        Ok(match kind {
            0..=5 | 10 | 11 => Value::Int(self.int(kind)?),
            6 | 12 => Value::Float(self.float(kind)?),
            7 => Value::Bool(self.array::<1>()? != [0]),
            8 => Value::String(self.string()?),
            9 => {
                ensure!(depth < MAX_NESTING, "arrays inside arrays, over {MAX_NESTING} deep");
                let (kind, n) = (self.u32()?, self.u64()?);
                // Nothing is reserved from n: every item takes at least a byte of the file, and each is read before the next.
                let items = 0..n;
                match kind {
                    0..=12 if n == 0 => Value::Empty,
                    0..=5 | 7 | 10 | 11 => {
                        Value::Ints(items.map(|_| Ok(i64::try_from(self.int(kind)?)?)).collect::<Result<_>>()?)
                    }
                    6 | 12 => Value::Floats(items.map(|_| self.float(kind)).collect::<Result<_>>()?),
                    8 => Value::Strings(items.map(|_| self.string()).collect::<Result<_>>()?),
                    9 => {
                        for _ in items {
                            self.value(kind, depth + 1)?;
                        }
                        Value::Nested
                    }
                    _ => bail!("an array of unknown type {kind}"),
                }
            }
            _ => bail!("unknown type {kind}"),
        })
    }

    /// An integer, or a boolean as 0 or 1.
    fn int(&mut self, kind: u32) -> Result<i128> {
        Ok(match kind {
            0 => u8::from_le_bytes(self.array()?).into(),
            1 => i8::from_le_bytes(self.array()?).into(),
            2 => u16::from_le_bytes(self.array()?).into(),
            3 => i16::from_le_bytes(self.array()?).into(),
            4 => u32::from_le_bytes(self.array()?).into(),
            5 => i32::from_le_bytes(self.array()?).into(),
            7 => i128::from(self.array::<1>()? != [0]),
            10 => u64::from_le_bytes(self.array()?).into(),
            _ => i64::from_le_bytes(self.array()?).into(),
        })
    }

    fn float(&mut self, kind: u32) -> Result<f64> {
        Ok(if kind == 6 { f32::from_le_bytes(self.array()?).into() } else { f64::from_le_bytes(self.array()?) })
    }
}

/// The element type of ggml's number, or the name of one that can't be loaded.
fn dtype(id: u32) -> Result<DType, String> {
    let name = match id {
        0 => return Ok(DType::F32),
        1 => return Ok(DType::F16),
        2 => return Ok(DType::Q4_0),
        3 => return Ok(DType::Q4_1),
        6 => return Ok(DType::Q5_0),
        7 => return Ok(DType::Q5_1),
        8 => return Ok(DType::Q8_0),
        10 => return Ok(DType::Q2K),
        11 => return Ok(DType::Q3K),
        12 => return Ok(DType::Q4K),
        13 => return Ok(DType::Q5K),
        14 => return Ok(DType::Q6K),
        20 => return Ok(DType::Iq4Nl),
        23 => return Ok(DType::Iq4Xs),
        30 => return Ok(DType::Bf16),
        9 => "Q8_1",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        21 => "IQ3_S",
        22 => "IQ2_S",
        24..=28 => "of integers or doubles",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        _ => return Err(format!("number {id}")),
    };
    Err(name.to_owned())
}

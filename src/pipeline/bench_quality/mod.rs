//! `valar bench quality`: what element types of weights, numerics and the form of keys and values cost in quality. Runs a text
//! through the model in each, and through the same weights in f32, and compares what they expect of each next token. Knows
//! nothing of jobs.
//!
//! As `llama-perplexity` counts: chunks of 512 tokens, each from an empty context, of which the second half is scored. The mean of
//! KL(f32 ‖ other) over the positions, in nats, is what is lost of what f32 knows; unlike perplexity it cannot be better by luck.

mod iq4;
mod requantised;

use super::load;
use super::progress::say;
use crate::device::BLOCK_TOKENS;
use crate::device::batch::{Batch, BatchSeq, StepOutput};
use crate::device::cpu::{CpuDevice, Isa, Kv, Numerics};
use crate::hub;
use crate::hub::remote::Remote;
use crate::model::{ModelFile, ModelRunner, Runner as _};
use crate::tensor::{DTYPES, DType};
use anyhow::{Context, Result, ensure};
use rayon::prelude::*;
use requantised::Requantised;
use serde::Serialize;
use std::io::Write;
use std::path::Path;

/// Tokens of a chunk.
const CHUNK: usize = 512;
/// Tokens of a step, and of each chunk that are scored.
const HALF: usize = CHUNK / 2;
/// Chunks at most: the logits of the f32 weights are kept, 256 rows of each.
const MAX_CHUNKS: usize = 16;

/// What is compared.
pub struct Choices {
    /// Element types of the weights; `None` is the file as it is.
    types: Vec<Option<DType>>,
    numerics: Vec<Numerics>,
    kv: Vec<Kv>,
}

impl Choices {
    /// By their names; `file` is the weights as they are.
    ///
    /// # Errors
    /// A name that is none.
    pub fn named(types: &[String], numerics: &[String], kv: &[String]) -> Result<Self> {
        let type_named = |name: &String| {
            if name == "file" {
                return Ok(None);
            }
            let found = DTYPES.into_iter().find(|dtype| dtype.to_string().eq_ignore_ascii_case(name));
            found.map(Some).with_context(|| format!("--types: {name:?} is neither `file` nor an element type such as Q8_0"))
        };
        Ok(Self {
            types: types.iter().map(type_named).collect::<Result<_>>()?,
            numerics: numerics.iter().map(|name| Numerics::named(name).context("--numerics")).collect::<Result<_>>()?,
            kv: kv.iter().map(|name| Kv::named(name).context("--kv")).collect::<Result<_>>()?,
        })
    }
}

/// The text, and where it is run.
pub struct Setting<'a> {
    /// A catalogue name, `org/name`, or a path.
    pub model: &'a str,
    /// Text, or (`.json`) a list of token ids.
    pub text: &'a Path,
    /// Chunks of 512 tokens that are taken of it.
    pub n_chunks: usize,
    /// Instructions of the CPU.
    pub isa: Isa,
    /// Threads that compute.
    pub n_threads: usize,
}

/// What came of one choice.
#[derive(Debug, Serialize)]
struct Quality {
    weights: String,
    numerics: &'static str,
    kv: &'static str,
    /// Bytes of the weights in memory.
    weights_bytes: usize,
    perplexity: f64,
    /// Mean KL divergence from the same weights in f32, before they were made another type, in nats per token.
    kl_mean: f64,
    /// 99 of 100 positions have less.
    kl_p99: f64,
    /// Share of positions with the same likeliest token.
    same_top: f64,
}

/// Measures all choices and prints a table, or a JSON object a line.
///
/// # Errors
/// No such model, a text that is too short.
pub fn show(setting: &Setting<'_>, choices: &Choices, place: (&Path, Option<&Remote>), json: bool) -> Result<()> {
    let local = hub::resolve(setting.model, place.0, place.1, &mut say)?;
    let load::Opened { file, tokenizer, .. } = load::open_files(&local)?;
    let text = std::fs::read_to_string(setting.text).with_context(|| format!("cannot read {}", setting.text.display()))?;
    let is_ids = setting.text.extension().is_some_and(|ending| ending == "json");
    let tokens = if is_ids { serde_json::from_str(&text).context("token ids")? } else { tokenizer.encode(&text) };
    ensure!((1..=MAX_CHUNKS).contains(&setting.n_chunks), "--chunks: {} are not 1 to {MAX_CHUNKS}", setting.n_chunks);
    let chunks = &tokens.as_chunks::<CHUNK>().0;
    ensure!(chunks.len() >= setting.n_chunks, "the text has {} chunks of {CHUNK} tokens", chunks.len());
    ensure!(tokens.iter().all(|&token| (token as usize) < tokenizer.n_vocab()), "a token id outside the vocabulary");
    let chunks = &chunks[..setting.n_chunks];
    let exact = Requantised::new(&*file, DType::F32)?;
    let reference = all_logits(setting, &exact, (Numerics::F32, Kv::Floats), chunks)?;
    drop(exact);
    let mut out = std::io::stdout().lock();
    if !json {
        writeln!(out, "weights   numerics   kv        MiB  perplexity   mean KL   99 % under  same token")?;
    }
    for dtype in &choices.types {
        let made = dtype.map(|dtype| Requantised::new(&*file, dtype)).transpose()?;
        let file: &dyn ModelFile = made.as_ref().map_or(&*file, |made| made);
        for (&numerics, &kv) in choices.numerics.iter().flat_map(|numerics| choices.kv.iter().map(move |kv| (numerics, kv))) {
            let logits = all_logits(setting, file, (numerics, kv), chunks)?;
            let quality = Quality {
                weights: dtype.map_or_else(|| "file".to_owned(), |dtype| dtype.to_string()),
                numerics: numerics.name(),
                kv: kv.name(),
                weights_bytes: logits.weights_bytes,
                ..compare(&reference, &logits, chunks)
            };
            quality.write(&mut out, json)?;
        }
    }
    Ok(())
}

impl Quality {
    fn write(&self, out: &mut impl Write, json: bool) -> Result<()> {
        if json {
            serde_json::to_writer(&mut *out, self)?;
            return Ok(writeln!(out)?);
        }
        let Self { weights, numerics, kv, perplexity, kl_mean, kl_p99, same_top, .. } = self;
        let (mib, same) = (self.weights_bytes >> 20, 100.0 * same_top);
        writeln!(
            out,
            "{weights:<9} {numerics:<10} {kv:<7}{mib:>6}{perplexity:>12.4}{kl_mean:>10.5}{kl_p99:>13.5}{same:>10.2} %"
        )?;
        Ok(out.flush()?)
    }
}

/// The logits of the scored positions of all chunks.
struct Logits {
    /// Per chunk `[HALF, vocab]`
    chunks: Vec<Vec<f32>>,
    n_vocab: usize,
    weights_bytes: usize,
}

fn all_logits(
    setting: &Setting<'_>,
    file: &dyn ModelFile,
    (numerics, kv): (Numerics, Kv),
    chunks: &[[u32; CHUNK]],
) -> Result<Logits> {
    let device = CpuDevice::new(setting.isa, numerics, setting.n_threads).with_kv(kv);
    let spec = file.spec()?;
    let weights_bytes = crate::model::sizing(&device, &spec, file, HALF).weights_bytes;
    let mut runner = ModelRunner::load(device, file, CHUNK / BLOCK_TOKENS, HALF)?;
    let mut logits = runner.new_logits();
    let one = |chunk: &[u32; CHUNK]| -> Result<Vec<f32>> {
        runner.run(&half(chunk, 0), &mut StepOutput::default())?;
        runner.logits(&half(chunk, HALF), &mut logits);
        let mut values = logits.values().to_vec();
        if let Some(cap) = spec.logit_cap {
            for x in &mut values {
                *x = cap * (*x / cap).tanh();
            }
        }
        Ok(values)
    };
    Ok(Logits { chunks: chunks.iter().map(one).collect::<Result<_>>()?, n_vocab: spec.n_vocab, weights_bytes })
}

/// The step of half a chunk, which begins at position `start`.
fn half(chunk: &[u32; CHUNK], start: usize) -> Batch {
    let (first_position, n_blocks) = (start as u32, (CHUNK / BLOCK_TOKENS) as u32);
    Batch {
        tokens: chunk[start..start + HALF].to_vec(),
        positions: (first_position..first_position + HALF as u32).collect(),
        seqs: vec![BatchSeq { token_start: 0, n_tokens: HALF as u32, first_position, table_start: 0, n_blocks }],
        block_tables: (0..n_blocks).collect(),
        ..Batch::default()
    }
}

/// One position under both.
struct Position {
    kl: f64,
    /// −log-probability of the token that comes, under the other; `None` after the last.
    surprise: Option<f64>,
    same_top: bool,
}

fn compare(reference: &Logits, other: &Logits, chunks: &[[u32; CHUNK]]) -> Quality {
    let n_vocab = reference.n_vocab;
    let rows = reference.chunks.par_iter().zip(&other.chunks).zip(chunks).flat_map(|((reference, other), chunk)| {
        let rows = reference.par_chunks(n_vocab).zip(other.par_chunks(n_vocab)).enumerate();
        rows.map(|(i, (reference, other))| position(reference, other, chunk.get(HALF + i + 1).copied()))
    });
    let positions: Vec<Position> = rows.collect();
    let mut kls: Vec<f64> = positions.iter().map(|position| position.kl).collect();
    let kl_mean = kls.iter().sum::<f64>() / kls.len() as f64;
    kls.sort_unstable_by(f64::total_cmp);
    let surprises: Vec<f64> = positions.iter().filter_map(|position| position.surprise).collect();
    let same = positions.iter().filter(|position| position.same_top).count();
    Quality {
        weights: String::new(),
        numerics: "",
        kv: "",
        weights_bytes: 0,
        perplexity: (surprises.iter().sum::<f64>() / surprises.len() as f64).exp(),
        kl_mean,
        kl_p99: kls[(kls.len() - 1) * 99 / 100],
        same_top: same as f64 / positions.len() as f64,
    }
}

fn position(reference: &[f32], other: &[f32], next: Option<u32>) -> Position {
    let (largest, log_total) = log_total(reference);
    let (other_largest, other_log_total) = self::log_total(other);
    let kl = reference.iter().zip(other).map(|(&p, &q)| {
        let (p, q) = (f64::from(p) - log_total, f64::from(q) - other_log_total);
        p.exp() * (p - q)
    });
    Position {
        kl: kl.sum(),
        surprise: next.map(|token| other_log_total - f64::from(other[token as usize])),
        same_top: largest == other_largest,
    }
}

/// The likeliest token, and the logarithm of the sum of the logits' exponentials.
fn log_total(logits: &[f32]) -> (usize, f64) {
    let mut largest = 0;
    for (token, &logit) in logits.iter().enumerate() {
        if logit > logits[largest] {
            largest = token;
        }
    }
    let max = f64::from(logits[largest]);
    (largest, max + logits.iter().map(|&logit| (f64::from(logit) - max).exp()).sum::<f64>().ln())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergences_are_those_of_the_definition() {
        // (1/2, 1/4, 1/4) and (1/4, 1/2, 1/4), as logits with other sums.
        let (p, q) = ([2.0f32.ln(), 0.0, 0.0], [3.0, 3.0 + 2.0f32.ln(), 3.0]);
        let position = position(&p, &q, Some(1));
        assert!((position.kl - 0.25 * 2.0f64.ln()).abs() < 1e-6, "{}", position.kl);
        assert!((position.surprise.unwrap() - 2.0f64.ln()).abs() < 1e-6);
        assert!(!position.same_top);
        assert!(super::position(&p, &p, None).kl.abs() < 1e-12);
    }
}

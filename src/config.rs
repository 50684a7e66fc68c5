//! What the user typed -> [`Config`]: checked and immutable. With `storage`, which takes credentials of stores as their
//! users set them, the only place that reads environment variables. Every limit of the program is here or in the pipeline
//! file, with its unit in its name.

mod keys;
mod memory;
mod prompts;
pub mod serve;

use crate::device::cpu::{Isa, Kv, Numerics, default_threads};
use crate::device::cuda::{KernelPlace, Launching};
use crate::format::PartSize;
use crate::hub::remote::Remote;
use crate::journal::{Shard, Terms};
use crate::pipeline::budget::Budget;
use crate::pipeline::spec::{EngineKind, PartsSpec, PipelineSpec, RepetitionSpec, SamplingSpec};
use crate::request::{MAX_CHOICES, MAX_STOP_STRINGS, MAX_TOP_LOGPROBS, Params, Repetition};
use anyhow::{Context, Result, anyhow, bail, ensure};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A checked job.
#[derive(Debug, Clone)]
pub struct Config {
    /// The pipeline as it will run, defaults filled in.
    pub spec: PipelineSpec,
    /// Sampling parameters where a row says nothing.
    pub defaults: Params,
    /// Bytes for weights, KV cache and workspace.
    pub memory_bytes: u64,
    /// Threads that compute.
    pub n_threads: usize,
    /// Their instructions.
    pub isa: Isa,
    /// Where models are kept.
    pub cache: PathBuf,
    /// Where models called `org/name` come from.
    pub hub: Option<Remote>,
    /// `created` of the job's answers, unix seconds, if it starts now.
    pub created: u64,
    /// Whether that is the user's wish (`SOURCE_DATE_EPOCH`), and not the clock's time.
    pub is_dated: bool,
    /// How the job's directory is taken.
    pub terms: Terms,
    /// The part of the job that is run; `None` for all of it.
    pub shard: Option<Shard>,
    /// How the results are cut into files; `None` for one.
    pub parts: Option<PartSize>,
    /// Whether only rows that ended as errors are run, again.
    pub retry: bool,
    /// What the run may spend.
    pub budget: Budget,
    /// Where results are that jobs share; `None` to compute everything.
    pub reuse: Option<ReusePlace>,
    /// No progress lines.
    pub quiet: bool,
    /// Between progress lines where there is no terminal.
    pub progress_every: Duration,
}

/// A cache of results.
#[derive(Debug, Clone)]
pub struct ReusePlace {
    /// Its folder; of one in a store, where the folders for copies of such are.
    pub folder: PathBuf,
    /// The URL of one in a store.
    pub store: Option<String>,
    /// What it may grow to.
    pub max_bytes: u64,
}

/// A smaller cache would hold its own tables alone.
const MIN_CACHE_BYTES: u64 = 1 << 20;

impl ReusePlace {
    /// Where it is, as typed (a folder, a URL, or nothing for this machine's usual place), of this size ("10GiB").
    ///
    /// # Errors
    /// A size that is none, or no place.
    pub fn new(place: &str, max_size: &str) -> Result<Self> {
        let max_bytes = parse_bytes(max_size).context("--cache-size")?;
        ensure!(max_bytes >= MIN_CACHE_BYTES, "--cache-size: {max_size} is under 1MiB");
        let usual = cache_folder()?.join("results");
        if place.is_empty() {
            return Ok(Self { folder: usual, store: None, max_bytes });
        }
        if place.contains("://") {
            return Ok(Self { folder: usual, store: Some(place.to_owned()), max_bytes });
        }
        let folder = PathBuf::from(place);
        ensure!(!folder.is_file(), "--cache: {place} is a file, not a folder or URL; put the job before --cache");
        Ok(Self { folder, store: None, max_bytes })
    }
}

/// Which model runs, on what, and how much of the machine it may have.
#[derive(Debug, Clone)]
pub struct ModelConfig {
    /// A catalogue name, `org/name`, or a path.
    pub name: String,
    /// What else rows may call it.
    pub served_names: Vec<String>,
    /// `cpu`, `cuda` or `cuda:1` and so on, `auto` (the first GPU if it can be used, else the CPU), or `reference`.
    pub device: String,
    /// In which numbers the CPU computes.
    pub numerics: String,
    /// How the CPU keeps keys and values.
    pub kv: String,
    /// A file with another chat template than the model's own.
    pub chat_template: Option<PathBuf>,
    /// What computes.
    pub kind: EngineKind,
    /// Tokens per step.
    pub budget_tokens: usize,
    /// Sequences per step.
    pub max_running: usize,
    /// Bytes for weights, KV cache and workspace.
    pub memory_bytes: u64,
    /// Whether the user said so; if not, a GPU's own memory counts.
    pub memory_is_given: bool,
    /// Models that share a device's memory.
    pub n_sharing: u64,
    /// Most tokens of a row of the job that is gone on with: where the KV cache set that limit, it stays, whatever is free now.
    pub begun_context: Option<usize>,
    /// Threads that compute.
    pub n_threads: usize,
    /// Their instructions.
    pub isa: Isa,
    /// Where a GPU's kernels are.
    pub kernels: KernelPlace,
    /// How a GPU's steps are launched.
    pub launching: Launching,
    /// Where models are kept.
    pub cache: PathBuf,
    /// Where models called `org/name` come from.
    pub hub: Option<Remote>,
    /// No progress lines.
    pub quiet: bool,
}

/// Seconds after which finished outcomes are committed at the latest.
pub const COMMIT_SECONDS: f64 = 1.0;
/// Seconds that running rows are given to finish after a signal.
pub const DRAIN_SECONDS: f64 = 5.0;
/// Seconds that the step under way is given after that, so that rows are kept as far as they came.
pub const KEEP_SECONDS: f64 = 20.0;
/// Between progress lines where there is no terminal, if nothing is said.
pub const PROGRESS_EVERY: Duration = Duration::from_secs(5);

/// Threads that compute: as many as asked for, or as there are cores.
///
/// # Errors
/// 0, or more than any machine has.
pub fn n_threads(wanted: Option<usize>) -> Result<usize> {
    match wanted {
        None => Ok(default_threads()),
        Some(n) if (1..=1024).contains(&n) => Ok(n),
        Some(n) => bail!("{n} threads are outside 1 to 1024"),
    }
}

impl Config {
    /// Checks a pipeline's meaning.
    ///
    /// # Errors
    /// The first setting that makes no sense, by its name in the file.
    pub fn new(spec: PipelineSpec, restart: bool, quiet: bool) -> Result<Self> {
        if spec.input.files.is_empty() {
            bail!("input.files: at least one file is needed");
        }
        prompts::check_prompts(&spec)?;
        if let Some(columns) = &spec.output.columns {
            if !spec.is_dataset() {
                bail!("output.columns: request rows have no columns to keep; give a [prompt]");
            }
            if let Some(name) = (1..columns.len()).find_map(|i| columns[..i].contains(&columns[i]).then_some(&columns[i])) {
                bail!("output.columns: {name:?} stands there twice");
            }
        }
        if spec.model.numerics != "fast" {
            Numerics::named(&spec.model.numerics).context("model.numerics")?;
        }
        Kv::named(&spec.model.kv).context("model.kv")?;
        let defaults = sampling_params(&spec.sampling, spec.is_dataset())?;
        at_least("input.max_line_bytes", spec.input.max_line_bytes, 1024)?;
        check_step(spec.engine.budget_tokens, spec.engine.max_running)?;
        at_least("job.window_rows", spec.job.window_rows, 1)?;
        at_least("job.window_bytes", spec.job.window_bytes, 1024)?;
        for (name, price) in [("input", spec.prices.input), ("output", spec.prices.output), ("hour", spec.prices.hour)] {
            if price.is_some_and(|price| !price.is_finite() || price < 0.0) {
                bail!("prices.{name}: must be a number of at least 0");
            }
        }
        let n_threads = n_threads(spec.engine.threads).context("engine.threads")?;
        let memory_bytes = match &spec.engine.memory {
            Some(text) => parse_bytes(text).context("engine.memory")?,
            None => free_memory_bytes()? / 2,
        };
        Ok(Self {
            defaults,
            memory_bytes,
            n_threads,
            isa: isa()?,
            cache: cache_folder()?,
            hub: hub(),
            created: now_or_source_date_epoch()?,
            is_dated: std::env::var_os("SOURCE_DATE_EPOCH").is_some(),
            terms: Terms { restart, ..Terms::default() },
            shard: None,
            parts: spec.output.parts.as_ref().map(part_size).transpose().context("output.parts")?,
            retry: false,
            reuse: None,
            budget: Budget::default(),
            quiet,
            progress_every: PROGRESS_EVERY,
            spec,
        })
    }

    /// The job's model.
    pub fn model(&self) -> ModelConfig {
        let (model, engine) = (&self.spec.model, &self.spec.engine);
        ModelConfig {
            name: model.name.clone(),
            served_names: model.served_names.clone(),
            device: model.device.clone(),
            numerics: model.numerics.clone(),
            kv: model.kv.clone(),
            chat_template: None,
            kind: engine.kind,
            budget_tokens: engine.budget_tokens,
            max_running: engine.max_running,
            memory_bytes: self.memory_bytes,
            memory_is_given: engine.memory.is_some(),
            n_sharing: 1,
            begun_context: None,
            n_threads: self.n_threads,
            isa: self.isa,
            kernels: kernel_place(&self.cache),
            launching: launching(),
            cache: self.cache.clone(),
            hub: self.hub.clone(),
            quiet: self.quiet,
        }
    }
}

fn part_size(spec: &PartsSpec) -> Result<PartSize> {
    let size = match spec {
        PartsSpec::Rows(rows) => PartSize::Rows(*rows),
        PartsSpec::Size(text) if text.trim().bytes().all(|b| b.is_ascii_digit()) => {
            bail!("{text:?} has no unit: write {text} without quotes for rows, or a size such as \"256MiB\"")
        }
        PartsSpec::Size(text) => PartSize::Bytes(parse_bytes(text)?),
    };
    match size {
        PartSize::Rows(0) => bail!("a part has at least 1 row"),
        PartSize::Bytes(n) if n < 1024 => bail!("{n} bytes are under the least that makes sense, 1KiB"),
        size => Ok(size),
    }
}

fn at_least(name: &str, value: usize, min: usize) -> Result<()> {
    if value < min {
        bail!("{name}: {value} is under the least that works, {min}");
    }
    Ok(())
}

/// Most tokens, and rows, of a step: more than memory holds.
const MAX_STEP: usize = 1 << 20;

/// How large a step may get.
fn check_step(budget_tokens: usize, max_running: usize) -> Result<()> {
    for (name, value, min) in [("budget_tokens", budget_tokens, 16), ("max_running", max_running, 1)] {
        if !(min..=MAX_STEP).contains(&value) {
            bail!("engine.{name}: {value} is outside {min} to {MAX_STEP}");
        }
    }
    Ok(())
}

/// Sampling parameters as the pipeline file gives them; `dataset` if rows can't give their own.
///
/// # Errors
/// The first that is out of range, by its name.
pub fn sampling_params(sampling: &SamplingSpec, dataset: bool) -> Result<Params> {
    let params = Params {
        max_tokens: sampling.max_tokens,
        min_tokens: sampling.min_tokens.unwrap_or(0),
        n: sampling.n.unwrap_or(1),
        temperature: sampling.temperature.unwrap_or(1.0),
        top_p: sampling.top_p.unwrap_or(1.0),
        top_k: sampling.top_k.unwrap_or(0),
        min_p: sampling.min_p.unwrap_or(0.0),
        presence_penalty: sampling.presence_penalty.unwrap_or(0.0),
        frequency_penalty: sampling.frequency_penalty.unwrap_or(0.0),
        repetition_penalty: sampling.repetition_penalty.unwrap_or(1.0),
        logit_bias: logit_bias(sampling)?,
        seed: sampling.seed,
        stop: sampling.stop.clone().unwrap_or_default(),
        ignore_eos: sampling.ignore_eos.unwrap_or(false),
        repetition: sampling.repetition_detection.map(repetition).transpose()?,
        logprobs: sampling.logprobs,
        ..Params::default()
    };
    if params.max_tokens == Some(0) {
        bail!("sampling.max_tokens: must be at least 1");
    }
    if !(1..=MAX_CHOICES).contains(&params.n) {
        bail!("sampling.n: {} is outside 1 to {MAX_CHOICES}", params.n);
    }
    let ranges = [
        ("temperature", params.temperature, 0.0, 2.0),
        ("min_p", params.min_p, 0.0, 1.0),
        ("presence_penalty", params.presence_penalty, -2.0, 2.0),
        ("frequency_penalty", params.frequency_penalty, -2.0, 2.0),
        ("repetition_penalty", params.repetition_penalty, 0.01, 100.0),
    ];
    if let Some((name, value, min, max)) = ranges.into_iter().find(|&(_, value, min, max)| !(min..=max).contains(&value)) {
        bail!("sampling.{name}: {value} is outside {min} to {max}");
    }
    if !(params.top_p > 0.0 && params.top_p <= 1.0) {
        bail!("sampling.top_p: {} must be over 0 and at most 1", params.top_p);
    }
    if params.stop.len() > MAX_STOP_STRINGS || params.stop.iter().any(String::is_empty) {
        bail!("sampling.stop: at most {MAX_STOP_STRINGS} strings, none empty");
    }
    if params.logprobs.is_some_and(|n| usize::from(n) > MAX_TOP_LOGPROBS) {
        bail!("sampling.logprobs: at most {MAX_TOP_LOGPROBS} alternatives");
    }
    if params.logprobs.is_some() && !dataset {
        bail!("sampling.logprobs: request rows ask for log-probabilities in their own bodies");
    }
    Ok(params)
}

fn repetition(spec: RepetitionSpec) -> Result<Repetition> {
    let rule = Repetition::new(spec.min_pattern_size, spec.max_pattern_size, spec.min_count);
    rule.map_err(|(name, why)| anyhow!("sampling.repetition_detection.{name}: {why}"))
}

fn logit_bias(sampling: &SamplingSpec) -> Result<Vec<(u32, f32)>> {
    let biases = sampling.logit_bias.iter().map(|(token, &bias)| {
        let id = token.parse().ok().filter(|_| (-100.0..=100.0).contains(&bias));
        let id = id.with_context(|| format!("sampling.logit_bias.{token}: must be a token id with -100 to 100"))?;
        Ok((id, bias))
    });
    biases.collect()
}

/// "512MiB", "4GB", "4g", "1000000": decimal and binary units as written, bare letters binary.
fn parse_bytes(text: &str) -> Result<u64> {
    let text = text.trim();
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "tb" => 1e12,
        "k" | "kib" => 1024.0,
        "m" | "mib" => 1024.0 * 1024.0,
        "g" | "gib" => 1024.0 * 1024.0 * 1024.0,
        "t" | "tib" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
        _ => bail!("{text:?} has an unknown unit; write bytes, or a number with MB, MiB, GB or GiB"),
    };
    let number: f64 = number.parse().ok().with_context(|| format!("{text:?} is not a size such as \"4GiB\""))?;
    Ok((number * factor) as u64)
}

/// What the machine (or the container) has free, in bytes.
fn free_memory_bytes() -> Result<u64> {
    let field = |file: &str, key: &str| -> Option<u64> {
        let text = std::fs::read_to_string(file).ok()?;
        text.lines().find_map(|l| l.strip_prefix(key)?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
    };
    let available = field("/proc/meminfo", "MemAvailable:").map(|kib| kib * 1024);
    let number = |file: &str| std::fs::read_to_string(file).ok().and_then(|t| t.trim().parse::<u64>().ok());
    // A container's limit (cgroup v2), where there is one.
    let container =
        number("/sys/fs/cgroup/memory.max").map(|max| max.saturating_sub(number("/sys/fs/cgroup/memory.current").unwrap_or(0)));
    let free = available.into_iter().chain(container).min();
    free.context("cannot tell how much memory is free on this system; set engine.memory (--memory 4GiB)")
}

/// `VALAR_CACHE`, else the XDG cache folder.
pub fn cache_folder() -> Result<PathBuf> {
    let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    var("VALAR_CACHE")
        .or_else(|| var("XDG_CACHE_HOME").map(|p| p.join("valar")))
        .or_else(|| var("HOME").map(|p| p.join(".cache/valar")))
        .context("neither VALAR_CACHE, XDG_CACHE_HOME nor HOME is set: no place to keep models")
}

/// The file of NVRTC that `VALAR_NVRTC` names.
pub fn nvrtc() -> Option<PathBuf> {
    std::env::var_os("VALAR_NVRTC").filter(|file| !file.is_empty()).map(PathBuf::from)
}

/// How a GPU's steps are launched: with all that there is, but for what `VALAR_CUDA_GRAPHS` or `VALAR_CUDA_AHEAD` says 0 of.
fn launching() -> Launching {
    let is_on = |name| std::env::var_os(name).is_none_or(|value| value != "0");
    Launching { has_graphs: is_on("VALAR_CUDA_GRAPHS"), goes_ahead: is_on("VALAR_CUDA_AHEAD") }
}

/// Where a GPU's kernels are kept and what compiles them, models being kept in that folder.
fn kernel_place(cache: &Path) -> KernelPlace {
    KernelPlace { folder: cache.join("kernels"), nvrtc: nvrtc() }
}

/// The instruction-set path that `VALAR_CPU` names, else the fastest of this machine.
pub fn isa() -> Result<Isa> {
    let Some(name) = std::env::var("VALAR_CPU").ok().filter(|name| !name.is_empty()) else {
        return Ok(Isa::detect());
    };
    Isa::named(&name).with_context(|| {
        let names: Vec<_> = Isa::available().into_iter().map(Isa::name).collect();
        format!("VALAR_CPU: {name:?} is not one of this machine's paths: {}", names.join(", "))
    })
}

/// The model hub that `HF_ENDPOINT` names, with the token in `HF_TOKEN`.
pub fn hub() -> Option<Remote> {
    let var = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let endpoint = var("HF_ENDPOINT")?.trim_end_matches('/').to_owned();
    Some(Remote { endpoint, token: var("HF_TOKEN") })
}

/// `SOURCE_DATE_EPOCH` (reproducible-builds.org) makes two runs comparable byte for byte.
fn now_or_source_date_epoch() -> Result<u64> {
    if let Ok(text) = std::env::var("SOURCE_DATE_EPOCH") {
        return text.trim().parse().with_context(|| format!("SOURCE_DATE_EPOCH: {text:?} is not a number of seconds"));
    }
    Ok(std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).context("the clock is before 1970")?.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [("10", 10), ("4GiB", 4 << 30), ("4g", 4 << 30), ("1.5 MB", 1_500_000), ("2kib", 2048)] {
            assert_eq!(parse_bytes(text).unwrap(), bytes, "{text}");
        }
        for text in ["", "GiB", "4 parsecs", "-1"] {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
    }
}

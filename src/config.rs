//! What the user typed -> [`Config`]: checked and immutable. The only file that reads environment variables. Every limit
//! of the program is here or in the pipeline file, with its unit in its name.

use crate::pipeline::spec::{PipelineSpec, PromptSpec};
use crate::request::{MAX_STOP_STRINGS, MAX_TOP_LOGPROBS, Params};
use anyhow::{Context, Result, bail};
use std::path::PathBuf;

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
    /// Where models are kept.
    pub cache: PathBuf,
    /// `created` of the job's answers, unix seconds, if it starts now.
    pub created: u64,
    /// Throw away what an earlier run of this job left.
    pub restart: bool,
    /// No progress lines.
    pub quiet: bool,
}

/// Seconds after which finished outcomes are committed at the latest.
pub const COMMIT_SECONDS: f64 = 1.0;
/// Seconds that running rows are given to finish after a signal.
pub const DRAIN_SECONDS: f64 = 5.0;
/// Seconds between progress lines where there is no terminal.
pub const PROGRESS_LINE_SECONDS: f64 = 5.0;

impl Config {
    /// Checks a pipeline's meaning.
    ///
    /// # Errors
    /// The first setting that makes no sense, by its name in the file.
    pub fn new(spec: PipelineSpec, restart: bool, quiet: bool) -> Result<Self> {
        if spec.input.files.is_empty() {
            bail!("input.files: at least one file is needed");
        }
        if let Some(prompt) = &spec.prompt {
            check_prompt(prompt)?;
        }
        let defaults = check_sampling(&spec)?;
        at_least("input.max_line_bytes", spec.input.max_line_bytes, 1024)?;
        at_least("engine.budget_tokens", spec.engine.budget_tokens, 16)?;
        at_least("engine.max_running", spec.engine.max_running, 1)?;
        at_least("job.window_rows", spec.job.window_rows, 1)?;
        at_least("job.window_bytes", spec.job.window_bytes, 1024)?;
        let n_threads = match spec.engine.threads {
            None => std::thread::available_parallelism().map_or(1, usize::from),
            Some(n) if (1..=1024).contains(&n) => n,
            Some(n) => bail!("engine.threads: {n} is outside 1 to 1024"),
        };
        let memory_bytes = match &spec.engine.memory {
            Some(text) => parse_bytes(text).context("engine.memory")?,
            None => free_memory_bytes()? / 2,
        };
        Ok(Self {
            defaults,
            memory_bytes,
            n_threads,
            cache: cache_folder()?,
            created: now_or_source_date_epoch()?,
            restart,
            quiet,
            spec,
        })
    }
}

fn at_least(name: &str, value: usize, min: usize) -> Result<()> {
    if value < min {
        bail!("{name}: {value} is under the least that works, {min}");
    }
    Ok(())
}

fn check_prompt(prompt: &PromptSpec) -> Result<()> {
    let chat = prompt.user.is_some() || prompt.system.is_some();
    let forms = [prompt.text.is_some(), chat, !prompt.messages.is_empty()];
    if forms.iter().filter(|&&given| given).count() != 1 || (chat && prompt.user.is_none()) {
        bail!("prompt: give one of text, user (with an optional system), or messages");
    }
    if let Some(m) = prompt.messages.iter().find(|m| !["system", "user", "assistant"].contains(&m.role.as_str())) {
        bail!("prompt.messages: role {:?} is not one of system, user, assistant", m.role);
    }
    Ok(())
}

fn check_sampling(spec: &PipelineSpec) -> Result<Params> {
    let sampling = &spec.sampling;
    let params = Params {
        max_tokens: sampling.max_tokens,
        temperature: sampling.temperature.unwrap_or(1.0),
        top_p: sampling.top_p.unwrap_or(1.0),
        top_k: sampling.top_k.unwrap_or(0),
        seed: sampling.seed,
        stop: sampling.stop.clone(),
        ignore_eos: sampling.ignore_eos,
        logprobs: sampling.logprobs,
    };
    if params.max_tokens == Some(0) {
        bail!("sampling.max_tokens: must be at least 1");
    }
    if !(0.0..=2.0).contains(&params.temperature) {
        bail!("sampling.temperature: {} is outside 0 to 2", params.temperature);
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
    if params.logprobs.is_some() && spec.prompt.is_none() {
        bail!("sampling.logprobs: request rows ask for log-probabilities in their own bodies");
    }
    Ok(params)
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

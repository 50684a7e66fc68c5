//! What the user typed; nothing derived.

mod bench;
mod kernels;

pub use bench::{BenchArgs, BenchPlanArgs, BenchQualityArgs, BenchWindowsArgs, MachineBench};
pub use kernels::KernelsAction;

use crate::journal::{IfRunning, Shard, Terms};
use crate::pipeline::budget::Budget;
use crate::pipeline::spec::{EngineKind, PriceSpec, parse_override};
use clap::{Args, Parser, Subcommand, value_parser};
use std::path::PathBuf;
use std::time::Duration;
use toml::Value;

/// A self-hosted LLM engine for batch work: rows in, exactly one outcome per row out.
#[derive(Debug, Parser)]
#[command(name = "valar", version, about, max_term_width = 100)]
#[command(after_help = "Exit codes: 0 every row completed, 3 finished but some rows are errors, 1 could not run, 2 usage,\n\
    4 another run is at the job, 5 cancelled, 6 the budget is spent, 130 or 143 stopped by a signal (after 5 and more run the same command\n\
    again to continue).")]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a job: read rows, complete them, write one outcome per row
    #[command(after_help = RUN_HELP)]
    Run(RunArgs),
    /// Publish a job that was run in shards, once all of them are done: the job's own arguments, without --shard
    #[command(after_help = MERGE_HELP)]
    Merge(RunArgs),
    /// Run a job's rows that ended as errors again, and publish the whole: all other rows stay as they are
    #[command(after_help = RETRY_HELP)]
    Retry(RetryArgs),
    /// Show how far a job is, running or dead, shards included, from its store alone (exit code 1 if there is none)
    Status {
        /// The job's result file, such as out.jsonl: a path or a URL; of a server's batch its folder, DATA/batches/ID
        output: String,
        /// Print one JSON object instead of a table
        #[arg(long)]
        json: bool,
    },
    /// Ask the runs of a job to stop, wherever they are; what they have done stays (exit code 1 if one still runs)
    Cancel {
        /// The job's result file
        output: String,
    },
    /// Read a job's input and say what the run would take, running nothing
    #[command(after_help = PLAN_HELP)]
    Plan(PlanArgs),
    /// Run a workload file and print tokens per second, peak memory and the share of time spent computing
    Bench(BenchArgs),
    /// Serve models over HTTP, in the forms of `OpenAI` and Anthropic
    #[command(after_help = SERVE_HELP)]
    Serve(ServeArgs),
    /// Fetch a model by name into the cache
    Pull {
        /// A name from `valar models`, or org/name (org/name@revision) on the hub that `HF_ENDPOINT` names
        name: String,
    },
    /// List the models that can be fetched by name, or those that a server's settings offer: windows and prices
    Models {
        /// Settings of `valar serve`
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// Make a key for callers of `valar serve`: prints the key, which is kept nowhere, and its hash for the settings
    Key,
    /// Show what a server's ledger says: requests, tokens, charges and the machine's time
    Usage(UsageArgs),
    /// Show what a model file holds and the memory it needs
    Inspect {
        /// A name from `valar models` or a path to a .gguf file
        model: String,
        /// Print one JSON object instead of a table
        #[arg(long)]
        json: bool,
    },
    /// The kernels for NVIDIA GPUs
    #[command(subcommand)]
    Kernels(KernelsAction),
    /// The cache of results that jobs share (valar run --cache)
    Cache {
        /// What to do with it
        #[command(subcommand)]
        action: CacheAction,
    },
    /// Print a shell's completions: for bash, `valar completions bash > ~/.local/share/bash-completion/completions/valar`
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Print the manual page (roff): `valar man | man -l -`
    Man,
}

/// What a cache of results may grow to where nothing is said.
pub const DEFAULT_CACHE_SIZE: &str = "10GiB";

/// `valar cache`
#[derive(Debug, Clone, Subcommand)]
pub enum CacheAction {
    /// Print how many results it holds, their size and its place
    Stats {
        /// A folder or URL, as of `valar run --cache`
        #[arg(value_name = "WHERE", default_value = "", hide_default_value = true)]
        place: String,
    },
    /// Forget them all
    Clear {
        /// A folder or URL, as of `valar run --cache`
        #[arg(value_name = "WHERE", default_value = "", hide_default_value = true)]
        place: String,
    },
}

const RUN_HELP: &str = "\
Examples:
  valar run pipelines/quickstart.toml
  valar run pipelines/quickstart.toml --set sampling.max_tokens=64 --output out/short.jsonl
  valar run --model smollm2 --input requests.jsonl --output out.jsonl

Writes, for --output out.jsonl (or .parquet): out.jsonl (results, in input order), out.errors.jsonl (rows that failed),
out.report.json, and out.job/ (manifest and journal) while the job runs. With --parts, out.jsonl is a folder of part files. Killed at any moment, the same command goes on
where it was.";

const MERGE_HELP: &str = "\
Examples:
  valar run pipelines/quickstart.toml --shard 0/2     # on one machine
  valar run pipelines/quickstart.toml --shard 1/2     # on another, at any time
  valar merge pipelines/quickstart.toml               # the files of the whole job, as if it had been run as one";

const RETRY_HELP: &str = "\
Examples:
  valar retry --errors pipelines/quickstart.toml                                  # the job's own arguments
  valar retry --errors pipelines/quickstart.toml --set input.max_line_bytes=1000000

Of a finished job, with the same inputs; settings and model may be others, for the rows that are run again. Rows that
completed keep their lines, byte for byte, and cost nothing. A job that is not finished goes on without its errors. Killed at
any moment, the same command goes on where it was; the old files stay until the new ones replace them.";

const PLAN_HELP: &str = "\
Examples:
  valar plan pipelines/quickstart.toml
  valar plan --input requests.jsonl --price-hour 0.8 --calibrate

Invalid rows by line and reason, prompt lengths, duplicates, what sharing prefixes saves, and what the run will need:
steps, KV cache, time and money, from short completions to the longest that rows allow.";

const SERVE_HELP: &str = "\
Examples:
  valar serve --model SmolLM2-135M-Instruct --port 8000
  valar serve --config valar.toml --api-key secret

The first signal (SIGTERM or Ctrl-C) lets running calls finish, a second one ends them.";

/// `valar serve`
#[derive(Debug, Default, Args)]
pub struct ServeArgs {
    /// Settings (TOML); its keys are in the README. Flags win
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Folder for everything that must last [default: valar-data]
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Address to listen on [default: 127.0.0.1]
    #[arg(long)]
    pub host: Option<String>,
    /// Port to listen on; 0 lets the system choose [default: 8000]
    #[arg(long)]
    pub port: Option<u16>,
    /// A key that callers must send (repeatable); without any, anybody may call
    #[arg(long, value_name = "KEY")]
    pub api_key: Vec<String>,
    /// Certificate chain of a server that speaks TLS (PEM)
    #[arg(long, value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// The certificate's key (PEM, not encrypted)
    #[arg(long, value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// What is said, on standard error: lines for people (text), or JSON objects with the ids of requests (json)
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
    /// What computes
    #[command(flatten)]
    pub engine: EngineArgs,
}

/// How a server or a job says what it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Lines for people.
    #[default]
    Text,
    /// An object a line.
    Json,
}

/// `valar usage`
#[derive(Debug, Args)]
pub struct UsageArgs {
    /// The server's data folder
    #[arg(long, value_name = "DIR", default_value = "valar-data")]
    pub data: PathBuf,
    /// From then on: YYYY-MM-DD, RFC 3339 or unix seconds
    #[arg(long, value_name = "TIME")]
    pub from: Option<String>,
    /// Until before then
    #[arg(long, value_name = "TIME")]
    pub until: Option<String>,
    /// What is told apart, of day, model, window, key and batch; or trajectory alone [default: day,model,window]
    #[arg(long, value_name = "NAMES")]
    pub by: Option<String>,
    /// Print one JSON object instead of a table
    #[arg(long)]
    pub json: bool,
}

/// `valar plan`
#[derive(Debug, Args)]
pub struct PlanArgs {
    /// The job, as for `valar run`
    #[command(flatten)]
    pub job: RunArgs,
    /// Measure the model's speed here first; otherwise earlier runs of it on this machine say
    #[arg(long)]
    pub calibrate: bool,
    /// Price of a million prompt tokens
    #[arg(long, value_name = "PRICE")]
    pub price_input: Option<f64>,
    /// Price of a million generated tokens
    #[arg(long, value_name = "PRICE")]
    pub price_output: Option<f64>,
    /// Price of an hour of this machine
    #[arg(long, value_name = "PRICE")]
    pub price_hour: Option<f64>,
    /// Print one JSON object instead of a table
    #[arg(long)]
    pub json: bool,
}

/// `valar run`
#[derive(Debug, Args)]
pub struct RunArgs {
    /// The job (TOML); its keys are in the README
    pub pipeline: Option<PathBuf>,
    /// Set a key of the pipeline, such as sampling.temperature=0 (repeatable)
    #[arg(long = "set", value_name = "KEY=VALUE", value_parser = parse_override)]
    pub set: Vec<(String, Value)>,
    /// Input files or globs: JSONL or Parquet (repeatable)
    #[arg(short, long, value_name = "FILE")]
    pub input: Vec<String>,
    /// Result file: .jsonl or .parquet
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<String>,
    /// Write a folder of part files, each of so many rows or so much text, and a list of them; --output names the folder
    #[arg(long, value_name = "ROWS|SIZE", value_parser = parse_parts)]
    pub parts: Option<Value>,
    /// Only the first rows
    #[arg(long, value_name = "ROWS")]
    pub limit: Option<u64>,
    /// What computes
    #[command(flatten)]
    pub engine: EngineArgs,
    /// Throw away an earlier run's progress and results, and start anew
    #[arg(long)]
    pub restart: bool,
    /// What keeps others away.
    #[command(flatten)]
    pub guard: GuardArgs,
    /// Pause after so many tokens were computed (exit code 6); the same command goes on
    #[arg(long, value_name = "N")]
    pub max_tokens: Option<u64>,
    /// Pause when tokens and time have cost so much, by the pipeline's prices
    #[arg(long, value_name = "COST")]
    pub max_cost: Option<f64>,
    /// Pause so many seconds after the work began
    #[arg(long, value_name = "SECONDS")]
    pub deadline: Option<u64>,
    /// Journal rows that are not done each time they have so many more tokens, to go on from there after a kill; 0: never
    #[arg(long, value_name = "N")]
    pub checkpoint_tokens: Option<u32>,
    /// Use and fill a cache of results that jobs share: what was computed before is not computed again. This machine's own,
    /// one in a folder, or one at a URL (`s3://bucket/prefix`) that machines share
    #[arg(long, value_name = "WHERE", num_args = 0..=1, default_missing_value = "")]
    pub cache: Option<String>,
    /// What that cache may grow to; results that were not used for longest go first
    #[arg(long, value_name = "SIZE", default_value = DEFAULT_CACHE_SIZE)]
    pub cache_size: String,
    /// Only part I of N (from 0) of the job's rows, with a state of its own; `valar merge` publishes the whole
    #[arg(long, value_name = "I/N")]
    pub shard: Option<Shard>,
    /// No progress, no report on the terminal
    #[arg(short, long)]
    pub quiet: bool,
    /// Progress and all that is said, on standard error: for people (text), or an object a line with its numbers (json)
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    pub log_format: LogFormat,
    /// Seconds between lines of progress where standard error is no terminal; 0: at every look
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = parse_seconds)]
    pub progress_every: Duration,
}

/// `valar retry`
#[derive(Debug, Args)]
pub struct RetryArgs {
    /// The rows that ended as errors
    #[arg(long, required = true)]
    pub errors: bool,
    /// The job, as for `valar run`
    #[command(flatten)]
    pub job: RunArgs,
}

/// What computes.
#[derive(Debug, Default, Args)]
pub struct EngineArgs {
    /// A name from `valar models` or a path to a .gguf file
    #[arg(short, long, value_name = "NAME|FILE")]
    pub model: Option<String>,
    /// cpu, cuda or cuda:1 and so on (an NVIDIA GPU), auto (the first GPU if it can be used, else cpu), or reference (slow, for comparison)
    #[arg(long)]
    pub device: Option<String>,
    /// In which numbers the CPU computes: int8, int8-bf16, bf16, exact (f32), or fast (the fastest of the first three here)
    #[arg(long)]
    pub numerics: Option<String>,
    /// How the CPU keeps keys and values: floats (of 16 bits), or int8, which takes half of that
    #[arg(long)]
    pub kv: Option<String>,
    /// Memory for weights, KV cache and workspace, such as 4GiB
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<String>,
    /// Threads that compute
    #[arg(long)]
    pub threads: Option<usize>,
    /// null: every row gets its last prompt token back at once, to see how fast everything but the model is
    #[arg(long, value_enum)]
    pub engine: Option<EngineKind>,
}

impl EngineArgs {
    fn overrides(&self) -> Vec<(String, Value)> {
        let text = |key: &str, value: &Option<String>| value.clone().map(|v| (key.to_owned(), Value::String(v)));
        let threads = self.threads.map(|n| ("engine.threads".to_owned(), Value::Integer(n as i64)));
        let texts = [
            text("model.name", &self.model),
            text("model.device", &self.device),
            text("model.numerics", &self.numerics),
            text("model.kv", &self.kv),
            text("engine.memory", &self.memory),
        ];
        let kind = self.engine.map(|kind| ("engine.kind".to_owned(), Value::String(kind.as_str().to_owned())));
        texts.into_iter().flatten().chain(threads).chain(kind).collect()
    }
}

/// What keeps other runs of a job away.
#[derive(Debug, Args)]
pub struct GuardArgs {
    /// What to do if another run is at this job: leave (exit code 4), wait for its end, or take over from it at once
    #[arg(long, value_enum, value_name = "WHAT", default_value = "leave")]
    pub if_running: IfRunning,
    /// Seconds of silence after which another machine may take this run for dead (stores only)
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = value_parser!(u64).range(1..=86_400))]
    pub lease: u64,
    /// Use a store that does not honour conditional writes: nothing keeps two runs of this job apart there
    #[arg(long)]
    pub unguarded: bool,
}

/// A time in seconds, such as 0.5.
fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse::<f64>().map_err(|e| e.to_string())?;
    Duration::try_from_secs_f64(seconds).map_err(|e| e.to_string())
}

/// A bare number is rows, anything else a size.
#[expect(clippy::unnecessary_wraps, reason = "clap wants it")]
fn parse_parts(text: &str) -> Result<Value, String> {
    let rows = text.parse().ok().filter(|rows| *rows >= 0);
    Ok(rows.map_or_else(|| Value::String(text.to_owned()), Value::Integer))
}

impl RunArgs {
    /// What the run may spend.
    pub fn budget(&self, prices: &PriceSpec) -> Budget {
        let deadline = self.deadline.map(Duration::from_secs);
        Budget { max_tokens: self.max_tokens, max_cost: self.max_cost, deadline, prices: prices.clone() }
    }

    /// How the job's directory is taken.
    pub fn terms(&self) -> Terms {
        let GuardArgs { if_running, lease, unguarded } = self.guard;
        Terms { if_running, lease: Duration::from_secs(lease), unguarded, restart: self.restart }
    }

    /// The pipeline keys that flags stand for; `--set` comes last and wins.
    pub fn overrides(&self) -> Vec<(String, Value)> {
        let mut overrides = self.engine.overrides();
        if !self.input.is_empty() {
            let files = self.input.iter().cloned().map(Value::String).collect();
            overrides.push(("input.files".into(), Value::Array(files)));
        }
        overrides.extend(self.output.clone().map(|file| ("output.file".into(), Value::String(file))));
        overrides.extend(self.parts.clone().map(|parts| ("output.parts".into(), parts)));
        overrides.extend(self.limit.map(|n| ("input.limit".into(), Value::Integer(n as i64))));
        overrides.extend(self.checkpoint_tokens.map(|n| ("engine.checkpoint_tokens".into(), Value::Integer(n.into()))));
        overrides.extend(self.set.iter().cloned());
        overrides
    }
}

impl PlanArgs {
    /// The pipeline keys that flags stand for. A plan writes nothing, so it needs no output.
    pub fn overrides(&self) -> Vec<(String, Value)> {
        let mut overrides = Vec::new();
        if self.job.pipeline.is_none() {
            overrides.push(("output.file".into(), Value::String("out.jsonl".into())));
        }
        overrides.extend(self.job.overrides());
        for (key, price) in [("input", self.price_input), ("output", self.price_output), ("hour", self.price_hour)] {
            overrides.extend(price.map(|price| (format!("prices.{key}"), Value::Float(price))));
        }
        overrides
    }
}

impl BenchArgs {
    /// The pipeline keys of a benchmark: every row is computed.
    pub fn overrides(&self) -> Vec<(String, Value)> {
        let mut overrides = self.engine.overrides();
        overrides.push(("input.files".into(), Value::Array(self.workload.iter().cloned().map(Value::String).collect())));
        overrides.push(("job.dedup".into(), Value::Boolean(false)));
        overrides.extend(self.limit.map(|n| ("input.limit".into(), Value::Integer(n as i64))));
        overrides
    }
}

//! What the user typed after `valar bench`.

use super::EngineArgs;
use clap::{Args, Subcommand};
use std::path::PathBuf;
use toml::Value;

/// Measurements of the machine.
#[derive(Debug, Subcommand)]
pub enum MachineBench {
    /// Measure what this machine can do at most: operations on registers, reading caches and memory
    Roof {
        /// Threads
        #[arg(long)]
        threads: Option<usize>,
    },
    /// Measure the share of that which products and attention reach, for models of 135M to 8B parameters
    Kernels {
        /// In which numbers the CPU computes: int8, bf16 or exact; without it, the fastest here
        #[arg(long)]
        numerics: Option<String>,
        /// Threads
        #[arg(long)]
        threads: Option<usize>,
        /// `cpu`, or `cuda`, for which there is only a model (`--model-only`)
        #[arg(long, default_value = "cpu")]
        device: String,
        /// Measure nothing: what CUDA kernels move and compute, against published peaks of GPUs; models of 1B, 8B and 70B parameters
        #[arg(long)]
        model_only: bool,
        /// Print one JSON object instead of a table (with --model-only)
        #[arg(long, requires = "model_only")]
        json: bool,
    },
    /// Measure what element types, numerics and the form of keys and values cost in quality, on a text
    Quality(BenchQualityArgs),
    /// Count what the order of a workload's rows is worth: tokens prefilled, beside the fewest possible
    Plan(BenchPlanArgs),
    /// Run a day of calls and batches through the scheduler, on a machine of counted time, and beside it first come, first served
    Windows(BenchWindowsArgs),
}

/// `valar bench quality`
#[derive(Debug, Args)]
pub struct BenchQualityArgs {
    /// A text, or a JSON list of token ids
    pub text: PathBuf,
    /// A name from `valar models`, or a path
    #[arg(short, long)]
    pub model: Option<String>,
    /// Chunks of 512 tokens that are taken of the text
    #[arg(long, default_value_t = 4)]
    pub chunks: usize,
    /// Element types that the weights are made into, such as `F32,Q8_0,Q4_K`; `file` is as they are
    #[arg(long, value_delimiter = ',', default_value = "file")]
    pub types: Vec<String>,
    /// In which numbers the CPU computes
    #[arg(long, value_delimiter = ',', default_value = "int8,int8-bf16,bf16,exact")]
    pub numerics: Vec<String>,
    /// How it keeps keys and values
    #[arg(long, value_delimiter = ',', default_value = "floats,int8")]
    pub kv: Vec<String>,
    /// Threads
    #[arg(long)]
    pub threads: Option<usize>,
    /// Print a JSON object a line instead of a table
    #[arg(long)]
    pub json: bool,
}

/// `valar bench windows`
#[derive(Debug, Args)]
pub struct BenchWindowsArgs {
    /// When requests came and how long they were: CSV with TIMESTAMP, `ContextTokens`, `GeneratedTokens`
    pub trace: PathBuf,
    /// How long
    #[arg(long, default_value_t = 24)]
    pub hours: u32,
    /// Draw turn times and batches here
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
    /// Print one JSON object instead of a table
    #[arg(long)]
    pub json: bool,
}

/// `valar bench plan`
#[derive(Debug, Args)]
pub struct BenchPlanArgs {
    /// JSONL or Parquet files of requests in `OpenAI` Batch form
    #[arg(required = true)]
    pub workloads: Vec<String>,
    /// KV memory as a share of the tokens that all rows hold at their ends
    #[arg(long, value_name = "SHARE", default_value_t = 0.25)]
    pub kv_share: f64,
    /// Write the prompts' token ids here, one JSON array a line
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,
    /// A name from `valar models`, or a path: whose tokenizer and template
    #[arg(short, long)]
    pub model: Option<String>,
    /// Print one JSON object instead of a table
    #[arg(long)]
    pub json: bool,
}

impl BenchPlanArgs {
    /// The pipeline keys of the workload: every row is computed.
    pub fn overrides(&self) -> Vec<(String, Value)> {
        let files = self.workloads.iter().cloned().map(Value::String).collect();
        let mut overrides = vec![("input.files".into(), Value::Array(files)), ("job.dedup".into(), Value::Boolean(false))];
        overrides.extend(self.model.iter().map(|model| ("model.name".into(), Value::String(model.clone()))));
        overrides
    }
}

/// `valar bench`
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct BenchArgs {
    /// What to measure instead of a workload
    #[command(subcommand)]
    pub machine: Option<MachineBench>,
    /// A JSONL or Parquet file of requests in `OpenAI` Batch form
    #[arg(required = true)]
    pub workload: Option<String>,
    /// Only the first rows
    #[arg(long, value_name = "ROWS")]
    pub limit: Option<u64>,
    /// What computes
    #[command(flatten)]
    pub engine: EngineArgs,
    /// Keep the results here instead of throwing them away
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<String>,
    /// Then time its kernels alone: the share of its time that its operations would take at that speed (CPU)
    #[arg(long)]
    pub busy: bool,
    /// Print one JSON object instead of a table
    #[arg(long)]
    pub json: bool,
}

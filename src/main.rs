//! The command line: maps errors to exit codes; one match on the subcommand.

use anyhow::Result;
use clap::Parser;
use std::io::Write;
use std::process::ExitCode;
use valar::cli::{Cli, Command};
use valar::config::{Config, cache_folder};
use valar::hub;
use valar::pipeline::progress::say;
use valar::pipeline::{self, JobEnd, bench, spec};

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            say(&format!("error: {error:#}"));
            ExitCode::from(1)
        }
    }
}

fn run(cli: Cli) -> Result<u8> {
    match cli.command {
        Command::Run(args) => {
            let spec = match spec::load(args.pipeline.as_deref(), &args.overrides()) {
                Ok(spec) => spec,
                Err(error) => return Ok(usage(&error)),
            };
            let config = match Config::new(spec, args.restart, args.quiet) {
                Ok(config) => config,
                Err(error) => return Ok(usage(&error)),
            };
            Ok(exit_code(&pipeline::run(&config)?))
        }
        Command::Bench(args) => {
            let workload = match bench::Workload::new(args.overrides(), args.output) {
                Ok(workload) => workload,
                Err(error) => return Ok(usage(&error)),
            };
            Ok(exit_code(&workload.run(args.json)?))
        }
        Command::Pull { name } => pull(&name),
        Command::Models => models(),
    }
}

/// A job that makes no sense as typed.
fn usage(error: &anyhow::Error) -> u8 {
    say(&format!("error: {error:#}"));
    2
}

fn exit_code(end: &JobEnd) -> u8 {
    match end {
        JobEnd::Finished { failed: 0 } => 0,
        JobEnd::Finished { .. } => 3,
        JobEnd::Stopped { signal } => 128 + signal,
    }
}

fn pull(name: &str) -> Result<u8> {
    let Some(entry) = hub::find(name) else {
        let known: Vec<_> = hub::CATALOG.iter().map(|e| e.name).collect();
        return Ok(usage(&anyhow::anyhow!("model {name:?} is not known; known: {}", known.join(", "))));
    };
    let path = hub::pull(entry, &cache_folder()?, &mut say)?;
    writeln!(std::io::stdout(), "{}", path.display())?;
    Ok(0)
}

fn models() -> Result<u8> {
    let cache = cache_folder()?;
    let mut out = std::io::stdout().lock();
    for entry in hub::CATALOG {
        let place = if entry.is_cached(&cache) { entry.cached_path(&cache).display().to_string() } else { "not fetched".into() };
        writeln!(
            out,
            "{}\n  {}; {}\n  aliases: {}\n  {place}",
            entry.name,
            entry.about,
            entry.licence,
            entry.aliases.join(", ")
        )?;
    }
    Ok(0)
}

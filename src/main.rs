//! The command line: maps errors to exit codes; one match on the subcommand.

use anyhow::{Context, Result, anyhow};
use clap::{CommandFactory, Parser};
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use valar::allocator::Allocator;
use valar::cache::{Cache, CacheStats, PackStats, Packs};
use valar::cli::{
    BenchArgs, BenchQualityArgs, CacheAction, Cli, Command, DEFAULT_CACHE_SIZE, KernelsAction, LogFormat, MachineBench, PlanArgs,
    RunArgs, ServeArgs, UsageArgs,
};
use valar::config::serve::ServeConfig;
use valar::config::{self, Config, ReusePlace, cache_folder};
use valar::device::cpu::Numerics;
use valar::device::cuda::{self, Nvrtc};
use valar::hub;
use valar::journal::Apart;
use valar::outcome::shortened;
use valar::pipeline::bench_plan::PlanBench;
use valar::pipeline::bench_quality::{self, Choices};
use valar::pipeline::progress::{say, say_as_json};
use valar::pipeline::{self, JobEnd, bench, bench_windows, explain, inspect, kernels, merge, modelled, retry, spec, status};
use valar::server;
use valar::server::prices::Price;

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            say(&shortened(format!("error: {error:#}")));
            ExitCode::from(if error.is::<Apart>() { 4 } else { 1 })
        }
    }
}

fn run(cli: Cli) -> Result<u8> {
    match cli.command {
        Command::Run(args) => match job(&args) {
            Ok(config) => pipeline::run(&config).map(|end| exit_code(&end)),
            Err(error) => Ok(usage(&error)),
        },
        Command::Merge(args) if args.shard.is_some() || args.restart => {
            Ok(usage(&anyhow!("merge takes the arguments of the whole job, without --shard and --restart")))
        }
        Command::Merge(args) => match job(&args) {
            Ok(config) => merge::merge(&config).map(|end| exit_code(&end)),
            Err(error) => Ok(usage(&error)),
        },
        Command::Retry(args) => retry_errors(&args.job),
        Command::Status { output, json } => Ok(u8::from(!status::show(&output, json)?)),
        Command::Cancel { output } => Ok(u8::from(!status::cancel(&output, &mut say)?)),
        Command::Plan(PlanArgs { job: RunArgs { shard: Some(_), .. }, .. }) => {
            Ok(usage(&anyhow!("--shard: a plan is of the whole job")))
        }
        Command::Plan(args) => {
            let spec = spec::load(args.job.pipeline.as_deref(), &args.overrides());
            match spec.and_then(|spec| Config::new(spec, false, args.job.quiet)) {
                Ok(config) => explain::show(&config, args.calibrate, args.json).map(|()| 0),
                Err(error) => Ok(usage(&error)),
            }
        }
        Command::Bench(args) => measure(args),
        Command::Serve(args) => match ServeConfig::new(&args) {
            Ok(config) => server::serve(&config).map(|()| 0),
            Err(error) => Ok(usage(&error)),
        },
        Command::Pull { name } => pull(&name),
        Command::Models { config: None } => models(),
        Command::Models { config } => {
            let settings = ServeArgs { config, ..ServeArgs::default() };
            match ServeConfig::new(&settings) {
                Ok(config) => offered(&config).map(|()| 0),
                Err(error) => Ok(usage(&error)),
            }
        }
        Command::Key => {
            let (key, hash) = server::ids::new_key();
            writeln!(std::io::stdout(), "{key}\n\n[[key]]\nhash = \"{hash}\"")?;
            Ok(0)
        }
        Command::Usage(UsageArgs { data, from, until, by, json }) => {
            server::usage::print(&data, (from.as_deref(), until.as_deref()), by.as_deref(), json).map(|()| 0)
        }
        Command::Inspect { model, json } => inspect::show(&model, &cache_folder()?, config::hub().as_ref(), json).map(|()| 0),
        Command::Kernels(KernelsAction::Build { arch, out, nvrtc }) => build_kernels(&arch, &out, nvrtc.as_deref()),
        Command::Cache { action } => cache(&action),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "valar", &mut script);
            std::io::stdout().write_all(&script)?;
            Ok(0)
        }
        Command::Man => manual().map(|()| 0),
    }
}

fn retry_errors(args: &RunArgs) -> Result<u8> {
    match job(args) {
        Ok(_) if args.restart => {
            Ok(usage(&anyhow!("--restart: a retry keeps what completed; valar run --restart does all rows again")))
        }
        Ok(config) => retry::retry(&Config { retry: true, ..config }).map(|end| exit_code(&end)),
        Err(error) => Ok(usage(&error)),
    }
}

/// `valar bench`
fn measure(args: BenchArgs) -> Result<u8> {
    match args {
        BenchArgs { machine: Some(MachineBench::Roof { threads }), .. } => {
            match config::n_threads(threads).and_then(|n_threads| Ok((config::isa()?, n_threads))) {
                Ok((isa, n_threads)) => kernels::show_roof(isa, n_threads).map(|()| 0),
                Err(error) => Ok(usage(&error)),
            }
        }
        BenchArgs { machine: Some(MachineBench::Kernels { device, model_only, json, .. }), .. }
            if device != "cpu" || model_only =>
        {
            match (&*device, model_only) {
                ("cuda", true) => modelled::show(json).map(|()| 0),
                ("cuda", false) => Ok(usage(&anyhow!("--device cuda: its kernels are only modelled here; say --model-only"))),
                (_, true) => Ok(usage(&anyhow!("--model-only is for --device cuda"))),
                _ => Ok(usage(&anyhow!("--device: {device:?} is not one of cpu, cuda"))),
            }
        }
        BenchArgs { machine: Some(MachineBench::Kernels { numerics, threads, .. }), .. } => {
            let numerics = numerics.filter(|name| name != "fast").map(|name| Numerics::named(&name)).transpose();
            let settings = numerics.context("--numerics").and_then(|n| Ok((config::isa()?, n, config::n_threads(threads)?)));
            match settings {
                Ok((isa, numerics, n_threads)) => kernels::show_kernels(isa, numerics, n_threads).map(|()| 0),
                Err(error) => Ok(usage(&error)),
            }
        }
        BenchArgs { machine: Some(MachineBench::Quality(args)), .. } => measure_quality(&args),
        BenchArgs { machine: Some(MachineBench::Plan(args)), .. } => {
            match PlanBench::new(args.overrides(), args.kv_share, args.prompts) {
                Ok(bench) => bench.run(args.json).map(|()| 0),
                Err(error) => Ok(usage(&error)),
            }
        }
        BenchArgs { machine: Some(MachineBench::Windows(args)), .. } => {
            bench_windows::show(&args.trace, args.hours, args.svg.as_deref(), args.json).map(|()| 0)
        }
        args => {
            let workload = match bench::Workload::new(args.overrides(), args.output, args.busy) {
                Ok(workload) => workload,
                Err(error) => return Ok(usage(&error)),
            };
            Ok(exit_code(&workload.run(args.json)?))
        }
    }
}

/// `valar bench quality`
fn measure_quality(args: &BenchQualityArgs) -> Result<u8> {
    let settings = Choices::named(&args.types, &args.numerics, &args.kv)
        .and_then(|choices| Ok((choices, config::isa()?, config::n_threads(args.threads)?)));
    let (choices, isa, n_threads) = match settings {
        Ok(settings) => settings,
        Err(error) => return Ok(usage(&error)),
    };
    let default = spec::ModelSpec::default().name;
    let model = args.model.as_deref().unwrap_or(&default);
    let setting = bench_quality::Setting { model, text: &args.text, n_chunks: args.chunks, isa, n_threads };
    bench_quality::show(&setting, &choices, (&cache_folder()?, config::hub().as_ref()), args.json).map(|()| 0)
}

/// A job as typed.
fn job(args: &RunArgs) -> Result<Config> {
    if args.log_format == LogFormat::Json {
        say_as_json();
    }
    // First, for it may have been given what was meant as the job.
    let reuse = args.cache.as_ref().map(|place| ReusePlace::new(place, &args.cache_size)).transpose()?;
    let spec = spec::load(args.pipeline.as_deref(), &args.overrides())?;
    let config = Config::new(spec, args.restart, args.quiet)?;
    let budget = args.budget(&config.spec.prices);
    budget.check()?;
    Ok(Config { terms: args.terms(), shard: args.shard, reuse, budget, progress_every: args.progress_every, ..config })
}

/// A job that makes no sense as typed.
fn usage(error: &anyhow::Error) -> u8 {
    say(&shortened(format!("error: {error:#}")));
    2
}

fn exit_code(end: &JobEnd) -> u8 {
    match end {
        JobEnd::Finished { failed: 0 } => 0,
        JobEnd::Finished { .. } => 3,
        JobEnd::Stopped { signal } => 128 + signal,
        JobEnd::Cancelled => 5,
        JobEnd::Paused => 6,
    }
}

/// One page: the program's own part, then one for each command.
fn manual() -> Result<()> {
    let mut out = std::io::stdout().lock();
    let program = Cli::command();
    clap_mangen::Man::new(program.clone()).render(&mut out)?;
    for command in program.get_subcommands().filter(|command| !command.is_hide_set()) {
        let title = format!("valar {}", command.get_name());
        writeln!(out, ".SH \"{}\"", title.to_uppercase())?;
        let man = clap_mangen::Man::new(command.clone().bin_name(title));
        man.render_synopsis_section(&mut out)?;
        man.render_description_section(&mut out)?;
        man.render_options_section(&mut out)?;
        if command.get_after_help().is_some() {
            man.render_extra_section(&mut out)?;
        }
    }
    Ok(())
}

fn pull(name: &str) -> Result<u8> {
    if let Err(error) = hub::check_name(name) {
        return Ok(usage(&error));
    }
    let path = hub::update(name, &cache_folder()?, config::hub().as_ref(), &mut say)?;
    writeln!(std::io::stdout(), "{}", path.display())?;
    Ok(0)
}

/// What a server offers: each model's windows, and prices of a million tokens.
fn offered(config: &ServeConfig) -> Result<()> {
    let mut out = std::io::stdout().lock();
    for model in &config.models {
        writeln!(out, "{}", model.id.as_deref().unwrap_or(&model.model.name))?;
        let batch = model.prices.of_batch().map(|price| ("batch", price));
        let windows = model.windows.iter().map(|window| (window.as_str(), model.prices.of(*window)));
        for (name, price) in windows.chain(batch.map(|(name, price)| (name, Some(price)))) {
            let price = price.map_or(Ok("no price".to_owned()), |price| price_line(price, &config.currency));
            writeln!(out, "  {name:<8}  {}", price?)?;
        }
    }
    Ok(())
}

fn price_line(price: Price, currency: &str) -> Result<String> {
    let shown = price.shown();
    let text = |key: &str| shown[key].as_str().with_context(|| format!("a price has no {key}"));
    let (input, cached, output) = (text("input")?, text("cached_input")?, text("output")?);
    Ok(format!("{input} {currency} input, {cached} cached, {output} output, a million tokens"))
}

fn cache(action: &CacheAction) -> Result<u8> {
    let (CacheAction::Stats { place } | CacheAction::Clear { place }) = action;
    let ReusePlace { folder, store, .. } = ReusePlace::new(place, DEFAULT_CACHE_SIZE)?;
    let is_cleared = matches!(action, CacheAction::Clear { .. });
    if let Some(url) = store {
        let packs = Packs::new(&url, u64::MAX)?;
        if is_cleared {
            packs.clear(&folder)?;
        }
        let PackStats { n_results, n_packs, n_bytes, n_packed } = packs.stats()?;
        let (kib, packed) = (n_bytes >> 10, n_packed >> 10);
        let mut out = std::io::stdout();
        writeln!(out, "{n_results} results, {kib} KiB, in {n_packs} packs of {packed} KiB at {}", packs.url())?;
        return Ok(0);
    }
    anyhow::ensure!(place.is_empty() || folder.is_dir(), "{}: there is no such folder", folder.display());
    if is_cleared {
        Cache::clear(&folder)?;
    }
    let mut caches = vec![Cache::open(&folder, u64::MAX)?];
    if place.is_empty() {
        if is_cleared {
            Cache::clear_copies(&folder)?;
        }
        caches.extend(Cache::copies(&folder)?);
    }
    for cache in caches {
        let CacheStats { n_results, n_bytes } = cache.stats()?;
        writeln!(std::io::stdout(), "{n_results} results, {} KiB, in {}", n_bytes >> 10, cache.path().display())?;
    }
    Ok(0)
}

/// `valar kernels build`
fn build_kernels(archs: &[String], folder: &Path, nvrtc: Option<&Path>) -> Result<u8> {
    let archs: Vec<&str> = if archs.is_empty() { cuda::ARCHS.to_vec() } else { archs.iter().map(String::as_str).collect() };
    if let Some(error) = archs.iter().find_map(|arch| cuda::check_arch(arch).err()) {
        return Ok(usage(&error));
    }
    let nvrtc = Nvrtc::open(nvrtc.map_or_else(config::nvrtc, |file| Some(file.to_owned())).as_deref())?;
    let mut out = std::io::stdout().lock();
    for arch in archs {
        for program in cuda::PROGRAMS {
            let kept = cuda::build(&nvrtc, program, arch, folder)?;
            let how = if kept.was_there { "was there" } else { "compiled" };
            writeln!(out, "{} ({} KiB, {how})", kept.path.display(), kept.n_bytes.div_ceil(1024))?;
        }
    }
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

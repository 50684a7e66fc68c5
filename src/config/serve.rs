//! What `valar serve` is told: flags and `valar.toml` -> [`ServeConfig`], checked and immutable.

use super::keys::{Common, KeyEntry, keys};
use super::{ModelConfig, cache_folder, free_memory_bytes, hub, isa, n_threads, parse_bytes, sampling_params};
pub use crate::cli::LogFormat;
use crate::cli::ServeArgs;
use crate::device::cpu::{Kv, Numerics};
use crate::pipeline::referenced::Places;
use crate::pipeline::spec::{EngineSpec, SamplingSpec};
use crate::request::Params;
use crate::server::budgets::Budget;
use crate::server::limits::Rates;
use crate::server::prices::{self, PriceSpec, Prices, PricesSpec};
use crate::server::trajectories::TrajectoriesSpec;
use crate::server::windows::{Table, Window, WindowsSpec};
use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use std::path::PathBuf;
use std::time::Duration;

/// A checked server.
#[derive(Debug, Clone)]
pub struct ServeConfig {
    /// Address to listen on.
    pub host: String,
    /// Port; 0 lets the system choose.
    pub port: u16,
    /// Where everything that must last is kept.
    pub data: PathBuf,
    /// Keys that callers may have; none: anybody may call.
    pub keys: Vec<KeyConfig>,
    /// What is offered, under which names.
    pub models: Vec<OfferedModel>,
    /// What those that are loaded at a time may take together of the machine's memory, and of each GPU's, if that was said.
    pub memory_bytes: u64,
    /// Whether it was; if not, what is free on a GPU counts there.
    pub memory_is_given: bool,
    /// Sampling parameters where a request says nothing.
    pub defaults: Params,
    /// What connections are encrypted with, if they are.
    pub tls: Option<TlsFiles>,
    /// What bounds the server.
    pub limits: ServeLimits,
    /// What an hour of the machine costs, in millionths of the currency; 0: unknown.
    pub hour_price: u64,
    /// What prices are in.
    pub currency: String,
    /// From where files may be taken by reference.
    pub places: Places,
    /// How it says what it does.
    pub log_format: LogFormat,
    /// Where traces go, unless the environment says.
    pub otlp_endpoint: Option<String>,
}

/// PEM files of a server that speaks TLS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// Its certificate, and those that it was signed with.
    pub cert: PathBuf,
    /// The certificate's key.
    pub key: PathBuf,
}

impl TlsFiles {
    fn new(args: &ServeArgs, server: &ServerSpec) -> Result<Option<Self>> {
        let (cert, key) =
            (args.tls_cert.as_ref().or(server.tls_cert.as_ref()), args.tls_key.as_ref().or(server.tls_key.as_ref()));
        match (cert.cloned(), key.cloned()) {
            (Some(cert), Some(key)) => Ok(Some(Self { cert, key })),
            (None, None) => Ok(None),
            (Some(_), None) => bail!("server.tls_cert: needs server.tls_key (--tls-key) too"),
            (None, Some(_)) => bail!("server.tls_key: needs server.tls_cert (--tls-cert) too"),
        }
    }
}

/// A key that callers may have.
#[derive(Debug, Clone)]
pub struct KeyConfig {
    /// What people call it.
    pub name: Option<String>,
    /// Of the key.
    pub hash: blake3::Hash,
    /// What it may ask for.
    pub rates: Rates,
    /// Whether it sees what others have used.
    pub is_admin: bool,
    /// How many turns what it asks for has, where that waits, for each of a key with weight 1.
    pub weight: u32,
    /// What it may be charged, if that is limited.
    pub budget: Option<Budget>,
}

/// A model under its public name.
#[derive(Debug, Clone)]
pub struct OfferedModel {
    /// The name; `None`: the weights' own.
    pub id: Option<String>,
    /// Windows that it may be asked for, at least one.
    pub windows: Vec<Window>,
    /// What it costs.
    pub prices: Prices,
    /// What it runs on. Offered models with equal weights are loaded once.
    pub model: ModelConfig,
    /// Whether it is loaded when the server starts, and not only when somebody wants it.
    pub is_loaded: bool,
    /// After so much time without use it is unloaded; `None`: only to make room.
    pub idle_unload: Option<Duration>,
}

/// What bounds the server.
#[derive(Debug, Clone)]
pub struct ServeLimits {
    /// Longest JSON body.
    pub max_body_bytes: usize,
    /// Most calls of a class that wait to run, for each model; more are refused.
    pub max_queued: usize,
    /// Most background responses that are open; more are refused.
    pub max_background: usize,
    /// Whether webhooks may be sent to addresses of this machine and its network.
    pub webhook_private_addresses: bool,
    /// Longest file.
    pub max_file_bytes: u64,
    /// Most requests of a batch.
    pub max_batch_rows: u64,
    /// How long responses are kept.
    pub retention: Duration,
    /// What a key may ask for that says nothing of its own, and everybody where there are no keys.
    pub rates: Rates,
    /// Most connections at a time; further ones wait.
    pub max_connections: usize,
    /// Time that a client has to send its headers.
    pub header_timeout: Duration,
    /// Time that a client has to send its body.
    pub body_timeout: Duration,
    /// Time in which a client must take some of its answer.
    pub write_timeout: Duration,
    /// Time that a step may take while somebody waits for it.
    pub max_step: Duration,
    /// Time that calls have to finish after the first signal.
    pub drain: Duration,
    /// Most time that a call waits for its model to be loaded.
    pub load_wait: Duration,
    /// No model is unloaded that was not loaded for so long.
    pub min_loaded: Duration,
    /// What windows promise.
    pub windows: Table,
    /// Percent of the KV cache that trajectories may keep between their turns, while nobody else needs it.
    pub kept_percent: u8,
    /// How long they do after a turn.
    pub kept_for: Duration,
}

/// `valar.toml`
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct ServeSpec {
    server: ServerSpec,
    model: Vec<ModelEntry>,
    engine: EngineSpec,
    sampling: SamplingSpec,
    prices: MoneySpec,
    windows: WindowsSpec,
    trajectories: TrajectoriesSpec,
    key: Vec<KeyEntry>,
    files: FilesSpec,
}

/// `[files]`
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct FilesSpec {
    allow: Vec<String>,
}

/// `[prices]`
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct MoneySpec {
    currency: Option<String>,
    hour: Option<f64>,
    asap: Option<PriceSpec>,
    standard: Option<PriceSpec>,
    batch: Option<PriceSpec>,
}

/// `[server]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct ServerSpec {
    host: String,
    port: u16,
    data: PathBuf,
    api_keys: Vec<String>,
    max_body: String,
    max_file: String,
    webhook_private_addresses: bool,
    max_batch_rows: u64,
    max_queued: usize,
    requests_per_minute: u64,
    tokens_per_minute: u64,
    batch_tokens: Option<u64>,
    max_background: usize,
    retention_days: u64,
    max_connections: usize,
    header_timeout_s: u64,
    body_timeout_s: u64,
    write_timeout_s: u64,
    tls_cert: Option<PathBuf>,
    tls_key: Option<PathBuf>,
    max_step_ms: u64,
    drain_s: u64,
    load_wait_s: u64,
    min_loaded_s: u64,
    log_format: LogFormat,
    otlp_endpoint: Option<String>,
}

impl Default for ServerSpec {
    fn default() -> Self {
        Self {
            host: "127.0.0.1".into(),
            port: 8000,
            data: "valar-data".into(),
            api_keys: Vec::new(),
            max_body: "32MiB".into(),
            max_file: "512MiB".into(),
            webhook_private_addresses: false,
            max_batch_rows: 100_000,
            max_queued: 4096,
            requests_per_minute: 0,
            tokens_per_minute: 0,
            batch_tokens: None,
            max_background: 100_000,
            retention_days: 30,
            max_connections: 8192,
            header_timeout_s: 30,
            body_timeout_s: 300,
            write_timeout_s: 600,
            tls_cert: None,
            tls_key: None,
            max_step_ms: 250,
            drain_s: 30,
            load_wait_s: 300,
            min_loaded_s: 10,
            log_format: LogFormat::default(),
            otlp_endpoint: None,
        }
    }
}

/// `[[model]]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ModelEntry {
    pub(super) id: Option<String>,
    pub(super) weights: String,
    #[serde(default = "all_windows")]
    windows: Vec<Window>,
    #[serde(default)]
    prices: PricesSpec,
    #[serde(default = "cpu")]
    pub(super) device: String,
    #[serde(default = "fast")]
    numerics: String,
    #[serde(default = "floats")]
    kv: String,
    /// A file with another chat template than the model's own.
    chat_template: Option<PathBuf>,
    #[serde(default)]
    pub(super) load: Load,
    /// Most that it takes, when it is loaded.
    pub(super) memory: Option<String>,
    #[serde(default)]
    idle_unload_s: u64,
}

/// When a model is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Load {
    #[default]
    Start,
    OnDemand,
}

impl ModelEntry {
    pub(super) fn of(weights: String) -> Self {
        let (windows, prices) = (all_windows(), PricesSpec::default());
        Self {
            id: None,
            weights,
            windows,
            prices,
            device: cpu(),
            numerics: fast(),
            kv: floats(),
            chat_template: None,
            load: Load::Start,
            memory: None,
            idle_unload_s: 0,
        }
    }

    /// Whether it runs on the same weights, which are loaded once.
    pub(super) fn is_with(&self, other: &Self) -> bool {
        let key = |entry: &Self| {
            let Self { weights, device, numerics, kv, chat_template, .. } = entry;
            (weights.clone(), device.clone(), numerics.clone(), kv.clone(), chat_template.clone())
        };
        key(self) == key(other)
    }
}

fn all_windows() -> Vec<Window> {
    Window::ALL.to_vec()
}

fn cpu() -> String {
    "cpu".into()
}

fn floats() -> String {
    "floats".into()
}

fn fast() -> String {
    "fast".into()
}

impl MoneySpec {
    fn tokens(&self) -> PricesSpec {
        PricesSpec { asap: self.asap, standard: self.standard, batch: self.batch }
    }
}

impl ServeConfig {
    /// Lays the flags over the file, and checks the result.
    ///
    /// # Errors
    /// A file that can't be read, or the first setting that makes no sense, by its name.
    pub fn new(args: &ServeArgs) -> Result<Self> {
        let spec = match &args.config {
            None => ServeSpec::default(),
            Some(path) => {
                let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
                toml::from_str(&text).with_context(|| format!("{}", path.display()))?
            }
        };
        let server = &spec.server;
        for (name, value) in [("max_queued", server.max_queued), ("max_connections", server.max_connections)] {
            ensure!(value > 0, "server.{name}: must be at least 1");
        }
        let (kept_percent, kept_for) = spec.trajectories.checked().context("trajectories")?;
        let (models, memory_bytes, memory_is_given) = models(args, &spec)?;
        let keys = keys(server.api_keys.iter().chain(&args.api_key), &spec.key, server.common())?;
        let has_prices = models.iter().any(|offered| offered.prices.of_batch().is_some());
        ensure!(has_prices || keys.iter().all(|key| key.budget.is_none()), "key.max_cost: there are no prices to count it by");
        Ok(Self {
            host: args.host.clone().unwrap_or_else(|| server.host.clone()),
            port: args.port.unwrap_or(server.port),
            data: args.data.clone().unwrap_or_else(|| server.data.clone()),
            keys,
            tls: TlsFiles::new(args, server)?,
            models,
            memory_bytes,
            memory_is_given,
            defaults: sampling_params(&spec.sampling, false)?,
            hour_price: spec.prices.hour.map_or(Ok(0), prices::micro).context("prices.hour")?,
            currency: spec.prices.currency.clone().unwrap_or_else(|| "USD".into()),
            places: Places::parse(&spec.files.allow).context("files.allow")?,
            log_format: args.log_format.unwrap_or(server.log_format),
            otlp_endpoint: server.otlp_endpoint.clone(),
            limits: ServeLimits {
                max_body_bytes: usize::try_from(parse_bytes(&server.max_body).context("server.max_body")?)?,
                max_file_bytes: parse_bytes(&server.max_file).context("server.max_file")?,
                max_batch_rows: server.max_batch_rows,
                webhook_private_addresses: server.webhook_private_addresses,
                max_queued: server.max_queued,
                rates: server.common().rates(),
                max_background: server.max_background,
                retention: Duration::from_secs(server.retention_days.saturating_mul(86_400)),
                max_connections: server.max_connections,
                header_timeout: Duration::from_secs(server.header_timeout_s),
                body_timeout: Duration::from_secs(server.body_timeout_s),
                write_timeout: Duration::from_secs(server.write_timeout_s),
                max_step: Duration::from_millis(server.max_step_ms),
                drain: Duration::from_secs(server.drain_s),
                load_wait: Duration::from_secs(server.load_wait_s),
                min_loaded: Duration::from_secs(server.min_loaded_s),
                windows: spec.windows.checked().context("windows")?,
                kept_percent,
                kept_for,
            },
        })
    }
}

impl ServerSpec {
    fn common(&self) -> Common {
        let &Self { requests_per_minute, tokens_per_minute, batch_tokens, .. } = self;
        Common { requests_per_minute, tokens_per_minute, batch_tokens }
    }
}

/// The models of the file and of the flags; the default model if there is none. And what they may take together of a memory, and
/// whether that was said.
fn models(args: &ServeArgs, spec: &ServeSpec) -> Result<(Vec<OfferedModel>, u64, bool)> {
    let (flags, engine) = (&args.engine, &spec.engine);
    let mut entries = spec.model.clone();
    if let Some(weights) = &flags.model {
        let (device, numerics) = (flags.device.clone().unwrap_or_else(cpu), flags.numerics.clone().unwrap_or_else(fast));
        let kv = flags.kv.clone().unwrap_or_else(floats);
        entries.insert(0, ModelEntry { device, numerics, kv, ..ModelEntry::of(weights.clone()) });
    } else if entries.is_empty() {
        let weights = crate::pipeline::spec::ModelSpec::default().name;
        entries.push(ModelEntry::of(weights));
    }
    let memory = flags.memory.as_ref().or(engine.memory.as_ref());
    let memory_bytes = match memory {
        Some(text) => parse_bytes(text).context("engine.memory")?,
        None => free_memory_bytes()? / 2,
    };
    super::check_step(engine.budget_tokens, engine.max_running)?;
    let n_threads = n_threads(flags.threads.or(engine.threads)).context("engine.threads")?;
    let shares = super::memory::shares(&entries, memory_bytes, memory.is_some())?;
    let offered = entries.iter().zip(shares).map(|(entry, share)| {
        if entry.windows.is_empty() {
            bail!("model.windows: {} supports no window", entry.id.as_ref().unwrap_or(&entry.weights));
        }
        if entry.numerics != "fast" {
            Numerics::named(&entry.numerics).context("model.numerics")?;
        }
        Kv::named(&entry.kv).context("model.kv")?;
        let model = ModelConfig {
            served_names: Vec::new(),
            name: entry.weights.clone(),
            device: entry.device.clone(),
            numerics: entry.numerics.clone(),
            kv: entry.kv.clone(),
            chat_template: entry.chat_template.clone(),
            kind: flags.engine.unwrap_or(engine.kind),
            budget_tokens: engine.budget_tokens,
            max_running: engine.max_running,
            memory_bytes: share,
            memory_is_given: memory.is_some() || entries.iter().any(|other| other.is_with(entry) && other.memory.is_some()),
            n_sharing: super::memory::n_sharing(&entries, entry),
            begun_context: None,
            n_threads,
            isa: isa()?,
            kernels: super::kernel_place(&cache_folder()?),
            launching: super::launching(),
            cache: cache_folder()?,
            hub: hub(),
            quiet: false,
        };
        let prices = entry.prices.or(spec.prices.tokens()).checked().context("prices")?;
        let (is_loaded, idle_s) = (entry.load == Load::Start, entry.idle_unload_s);
        let idle_unload = (idle_s > 0).then(|| Duration::from_secs(idle_s));
        Ok(OfferedModel { id: entry.id.clone(), windows: entry.windows.clone(), prices, model, is_loaded, idle_unload })
    });
    Ok((offered.collect::<Result<_>>()?, memory_bytes, memory.is_some()))
}

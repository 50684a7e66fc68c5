//! Completion windows: what a call asks for, what its model supports, and the scheduling class that follows. Invariant:
//! a window that is not supported is refused by name, never ignored.

use super::errors::ApiError;
use crate::engine::Due;
use crate::window::{AIM, Class, STANDARD_TARGET_S};
use anyhow::{Result as Checked, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::sync::Arc;
use std::time::Duration;

/// How much time a call gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Window {
    /// Now.
    Asap,
    /// Minutes.
    Standard,
}

impl Window {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Asap, Self::Standard];

    /// As written on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Asap => "asap",
            Self::Standard => "standard",
        }
    }

    /// How it is scheduled.
    pub fn class(self) -> Class {
        match self {
            Self::Asap => Class::Asap,
            Self::Standard => Class::Standard,
        }
    }
}

/// What a window, or the class of batches, promises and takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Terms {
    /// Mean time that a call should take, from when it was accepted to its end.
    pub target: Option<Duration>,
    /// Calls that would wait longer than that are refused.
    pub ceiling: Option<Duration>,
    /// Whether only background responses may ask for it.
    pub background_only: bool,
    /// Percent of the tokens that it gets at least while it waits (asap's are not counted).
    pub share_floor: u8,
    /// Percent of the memory and places of rows that are kept free for it at least (asap only).
    pub reserve: u8,
}

/// `[windows.NAME]` of `valar.toml`
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TermsSpec {
    aliases: Vec<String>,
    target_s: Option<u64>,
    ceiling_s: Option<u64>,
    background_only: Option<bool>,
    share_floor: Option<u8>,
    reserve: Option<u8>,
}

/// `[windows]` of `valar.toml`
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WindowsSpec {
    asap: TermsSpec,
    standard: TermsSpec,
    batch: TermsSpec,
}

/// The terms of each class, and what else windows are called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    terms: [Terms; Class::ALL.len()],
    aliases: Arc<[(String, Window)]>,
}

/// Floors of all classes together: what is above goes by urgency alone.
const MAX_FLOORS: u8 = 50;
/// Most that can be kept for asap.
const MAX_RESERVE: u8 = 50;
/// Longest target and ceiling, in seconds: 30 days.
const MAX_S: u64 = 30 * 86_400;

impl Default for Table {
    fn default() -> Self {
        let (seconds, background_only) = (|s| Some(Duration::from_secs(s)), false);
        let terms = [
            Terms { target: None, ceiling: seconds(60), background_only, share_floor: 0, reserve: 5 },
            Terms { target: seconds(STANDARD_TARGET_S), ceiling: seconds(1800), background_only, share_floor: 10, reserve: 0 },
            // A batch says itself how much time it has.
            Terms { target: None, ceiling: None, background_only, share_floor: 2, reserve: 0 },
        ];
        Self { terms, aliases: Arc::default() }
    }
}

impl Table {
    /// Of a class.
    pub fn of(&self, class: Class) -> &Terms {
        &self.terms[class as usize]
    }

    /// By class, in percent.
    pub fn share_floors(&self) -> [u8; Class::ALL.len()] {
        self.terms.map(|terms| terms.share_floor)
    }

    /// By class: the mean time that a call should take.
    pub fn targets(&self) -> [Option<Duration>; Class::ALL.len()] {
        self.terms.map(|terms| terms.target)
    }

    /// Percent of everything that is kept free for asap.
    pub fn asap_reserve(&self) -> u8 {
        self.of(Class::Asap).reserve
    }

    /// What windows are called.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        Window::ALL.iter().map(|window| window.as_str()).chain(self.aliases.iter().map(|(alias, _)| alias.as_str()))
    }

    /// The window that is called so.
    pub fn named(&self, name: &str) -> Option<Window> {
        let alias = || self.aliases.iter().find(|(alias, _)| alias == name).map(|(_, window)| *window);
        Window::ALL.into_iter().find(|window| window.as_str() == name).or_else(alias)
    }

    /// The window of a call: what `asked` says, or what its mode means where it says nothing; of those that the model supports, and
    /// that a call of that mode may ask for.
    ///
    /// # Errors
    /// It is none of these; the message lists them.
    pub fn resolve(&self, asked: Option<&str>, mode: Mode, model: &str, supported: &[Window]) -> Result<Window, ApiError> {
        let is_open = |window: &Window| mode == Mode::Background || !self.of(window.class()).background_only;
        let supported: Vec<Window> = supported.iter().copied().filter(is_open).collect();
        let refuse = |message: String| ApiError::new(axum::http::StatusCode::BAD_REQUEST, Some("unsupported_value"), message);
        let Some(asked) = asked else {
            let default = if mode == Mode::Foreground { Window::Asap } else { Window::Standard };
            let default = supported.iter().copied().find(|window| *window == default).or(supported.first().copied());
            return default.ok_or_else(|| {
                refuse(format!("model {model} is for background responses only; supported windows of other calls: none"))
            });
        };
        self.named(asked).filter(|window| supported.contains(window)).ok_or_else(|| {
            let own = supported.iter().map(|window| window.as_str());
            let others = self.aliases.iter().filter(|(_, window)| supported.contains(window)).map(|(alias, _)| alias.as_str());
            let names = own.chain(others).collect::<Vec<_>>().join(", ");
            let message = format!("completion_window {asked:?} is not supported by model {model}; supported: {names}");
            ApiError { param: Some("metadata.completion_window".into()), ..refuse(message) }
        })
    }

    /// When a call that was accepted so long ago should be done. What the turns before it were early by is `credit_ms`: then it has
    /// more time, at most its window's; where they were late, less, down to none.
    pub fn due(&self, class: Class, now_ms: i64, accepted_ago: Duration, credit_ms: i64) -> Due {
        let due = |target: Duration| {
            let aimed_ms = target.mul_f64(AIM).as_millis() as i64;
            let left_ms = aimed_ms.saturating_add(credit_ms).clamp(0, target.as_millis() as i64);
            Due { at_ms: now_ms + left_ms - accepted_ago.as_millis() as i64, ramp_ms: 0 }
        };
        self.of(class).target.map_or(Due::NEVER, due)
    }
}

impl WindowsSpec {
    /// Lays what was said over the defaults.
    ///
    /// # Errors
    /// What makes no sense, by its name.
    pub fn checked(&self) -> Checked<Table> {
        let mut table = Table::default();
        let specs = [("asap", &self.asap), ("standard", &self.standard), ("batch", &self.batch)];
        for ((name, spec), terms) in specs.into_iter().zip(&mut table.terms) {
            let seconds = |value: Option<u64>, default| value.map(Duration::from_secs).or(default);
            terms.target = seconds(spec.target_s, terms.target);
            terms.ceiling = seconds(spec.ceiling_s, terms.ceiling);
            terms.background_only = spec.background_only.unwrap_or(terms.background_only);
            terms.share_floor = spec.share_floor.unwrap_or(terms.share_floor);
            terms.reserve = spec.reserve.unwrap_or(terms.reserve);
            for (key, seconds) in [("target_s", spec.target_s), ("ceiling_s", spec.ceiling_s)] {
                ensure!(seconds.is_none_or(|seconds| seconds <= MAX_S), "{name}.{key}: must be at most {MAX_S}, 30 days");
            }
            ensure!(name == "asap" || spec.reserve.is_none(), "{name}.reserve: only asap has one");
            ensure!(terms.reserve <= MAX_RESERVE, "{name}.reserve: must be at most {MAX_RESERVE} percent");
            ensure!(terms.target.is_none_or(|target| !target.is_zero()), "{name}.target_s: must be at least 1");
            ensure!(terms.ceiling >= terms.target || terms.ceiling.is_none(), "{name}.ceiling_s: is less than its target_s");
            let is_batch = name == "batch";
            ensure!(
                !is_batch || *spec == TermsSpec { share_floor: spec.share_floor, ..TermsSpec::default() },
                "batch: has a share_floor and nothing else: its deadlines are the batches' own"
            );
            ensure!(
                name != "asap" || spec.share_floor.is_none_or(|floor| floor == 0) && spec.target_s.is_none(),
                "asap: goes before all others and has neither target_s nor share_floor"
            );
        }
        let floors: u32 = table.share_floors().iter().map(|&floor| u32::from(floor)).sum();
        ensure!(floors <= u32::from(MAX_FLOORS), "share_floor: {floors} percent in all, over {MAX_FLOORS}");
        table.aliases = self.aliases()?;
        Ok(table)
    }

    fn aliases(&self) -> Checked<Arc<[(String, Window)]>> {
        let mut found: Vec<(String, Window)> = Vec::new();
        for (window, spec) in [(Window::Asap, &self.asap), (Window::Standard, &self.standard)] {
            for alias in &spec.aliases {
                let n_chars = alias.chars().count();
                ensure!((1..=MAX_KEY_CHARS).contains(&n_chars), "aliases: {alias:?} has not 1 to {MAX_KEY_CHARS} characters");
                let is_used = found.iter().any(|(other, _)| other == alias) || Table::default().named(alias).is_some();
                ensure!(!is_used, "aliases: {alias:?} is another window's name, or stands there twice");
                found.push((alias.clone(), window));
            }
        }
        Ok(found.into())
    }
}

/// How a call is carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The caller waits for the answer.
    Foreground,
    /// It is fetched later.
    Background,
}

/// Most pairs of `metadata`.
const MAX_PAIRS: usize = 16;
/// Longest key, in characters.
const MAX_KEY_CHARS: usize = 64;
/// Longest value, in characters.
const MAX_VALUE_CHARS: usize = 512;

/// Reads `metadata`: at most so many pairs of texts.
///
/// # Errors
/// It is something else.
pub fn metadata(body: &Map<String, Value>) -> Result<Option<&Map<String, Value>>, ApiError> {
    let pairs = match body.get("metadata") {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Object(pairs)) => pairs,
        Some(other) => return Err(ApiError::invalid_type("metadata", "an object", other)),
    };
    if pairs.len() > MAX_PAIRS {
        let message = format!("at most {MAX_PAIRS} pairs are allowed, {} given", pairs.len());
        return Err(ApiError::invalid_value("metadata", message));
    }
    for (key, value) in pairs {
        let path = format!("metadata.{key}");
        if key.chars().count() > MAX_KEY_CHARS {
            return Err(ApiError::invalid_value(path, format!("keys have at most {MAX_KEY_CHARS} characters")));
        }
        match value {
            Value::String(text) if text.chars().count() <= MAX_VALUE_CHARS => {}
            Value::String(_) => {
                return Err(ApiError::invalid_value(path, format!("values have at most {MAX_VALUE_CHARS} characters")));
            }
            other => return Err(ApiError::invalid_type(path, "a string", other)),
        }
    }
    Ok(Some(pairs))
}

/// `metadata.completion_window`, if it is there.
pub fn asked(metadata: Option<&Map<String, Value>>) -> Option<&str> {
    metadata?.get("completion_window").and_then(Value::as_str)
}

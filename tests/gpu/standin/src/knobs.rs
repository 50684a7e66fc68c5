//! What the environment asks of the device.

use std::collections::BTreeMap;
use std::time::Duration;

/// Described at the crate's head.
#[derive(Debug, Clone)]
pub(crate) struct Knobs {
    pub(crate) capability: (u32, u32),
    pub(crate) multiprocessors: Option<u32>,
    pub(crate) memory: usize,
    pub(crate) devices: usize,
    pub(crate) driver: u32,
    /// By what is counted: (which one, its error).
    pub(crate) fail: BTreeMap<String, Vec<(u64, u32)>>,
    pub(crate) slow: Duration,
    pub(crate) seed: u64,
    pub(crate) races: bool,
    pub(crate) counters: Option<String>,
    pub(crate) order: Option<String>,
}

impl Knobs {
    /// Fails with words on what is not understood: a knob that is passed over would test nothing.
    pub(crate) fn read(get: impl Fn(&str) -> Option<String>) -> Result<Self, String> {
        let number = |name: &str, default: u64| {
            get(name).map_or(Ok(default), |text| text.parse::<u64>().map_err(|_| format!("{name}={text} is no number")))
        };
        Ok(Self {
            capability: capability(get("STANDIN_CC").as_deref().unwrap_or("8.0"))?,
            multiprocessors: match number("STANDIN_MULTIPROCESSORS", 0)? {
                0 => None,
                n => Some(u32::try_from(n).unwrap_or(u32::MAX)),
            },
            memory: get("STANDIN_MEMORY").map_or(Ok(1 << 30), |text| bytes(&text))?,
            devices: match number("STANDIN_DEVICES", 1)? {
                n @ 0..=8 => n as usize,
                n => return Err(format!("STANDIN_DEVICES={n}: at most 8")),
            },
            driver: u32::try_from(number("STANDIN_DRIVER", 12090)?).unwrap_or(0),
            fail: get("STANDIN_FAIL").map_or(Ok(BTreeMap::new()), |text| failures(&text))?,
            slow: Duration::from_micros(number("STANDIN_SLOW", 0)?),
            seed: number("STANDIN_SEED", 0)?,
            races: number("STANDIN_RACES", 1)? != 0,
            counters: get("STANDIN_COUNTERS"),
            order: get("STANDIN_ORDER"),
        })
    }
}

fn capability(text: &str) -> Result<(u32, u32), String> {
    match text {
        "8.0" => Ok((8, 0)),
        "8.6" => Ok((8, 6)),
        "8.9" => Ok((8, 9)),
        "9.0" => Ok((9, 0)),
        "10.0" => Ok((10, 0)),
        "12.0" => Ok((12, 0)),
        // One that no kernel is built for.
        "7.5" => Ok((7, 5)),
        _ => Err(format!("STANDIN_CC={text}: 7.5, 8.0, 8.6, 8.9, 9.0, 10.0 or 12.0")),
    }
}

/// A number of bytes, perhaps with K, M or G.
fn bytes(text: &str) -> Result<usize, String> {
    let (number, shift) = match text.as_bytes().last() {
        Some(b'K') => (&text[..text.len() - 1], 10),
        Some(b'M') => (&text[..text.len() - 1], 20),
        Some(b'G') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    number.parse::<usize>().map(|n| n << shift).map_err(|_| format!("STANDIN_MEMORY={text} is no size"))
}

/// `what:n:code,...`
fn failures(text: &str) -> Result<BTreeMap<String, Vec<(u64, u32)>>, String> {
    let mut found: BTreeMap<String, Vec<(u64, u32)>> = BTreeMap::new();
    for one in text.split(',').filter(|one| !one.is_empty()) {
        let parts: Vec<&str> = one.split(':').collect();
        let entry = match parts[..] {
            [what, n, code] => n.parse().ok().zip(code.parse().ok()).map(|pair| (what, pair)),
            _ => None,
        };
        let (what, pair) = entry.ok_or_else(|| format!("STANDIN_FAIL={text}: not what:n:code in {one}"))?;
        found.entry(what.to_owned()).or_default().push(pair);
    }
    Ok(found)
}

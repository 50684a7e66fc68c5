//! What is told to webhook endpoints: signed as Standard Webhooks asks, tried until it is heard, at most to the end of
//! three days. Invariants: the bytes that are signed are those that are sent; nobody is told at an address that the
//! configuration does not allow; one that does not answer holds up nobody else.

use super::App;
use super::completion_webhook::bearer;
use super::log::say;
use super::models::now;
use crate::store::webhooks::{self, Delivery, Tried};
use anyhow::{Context as _, Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit as _, Mac as _};
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, RETRY_AFTER};
use reqwest::redirect::Policy;
use sha2::Sha256;
use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use url::{Host, Url};

/// Seconds between the tries.
const PAUSES_S: [u64; 9] = [5, 30, 120, 600, 3600, 3 * 3600, 10 * 3600, 24 * 3600, 24 * 3600];
/// How much of a pause is drawn.
const JITTER: f64 = 0.2;
/// Time that an endpoint has to answer.
const TIMEOUT: Duration = Duration::from_secs(20);
/// Longest pause that an endpoint may ask for.
const MAX_RETRY_AFTER_S: u64 = 24 * 3600;
/// How often the outbox is looked into.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Tries that one look into it begins, and those of one owner's at a time.
const AT_A_LOOK: usize = 64;
const OF_OWNER: usize = 16;
/// How long secrets are, in bytes.
const SECRET_BYTES: usize = 32;
const SECRET_PREFIX: &str = "whsec_";

/// Sends what is in the outbox.
pub struct Deliveries {
    client: reqwest::Client,
    allows_private: bool,
    bell: Notify,
    /// Endpoints that are being told something.
    busy: Mutex<HashSet<String>>,
}

/// Whether an address is one of the public internet's.
fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => {
            let [a, b, ..] = v4.octets();
            let is_shared = a == 100 && (64..128).contains(&b);
            let is_special = a == 0 || a >= 240 || (a == 192 && b == 0) || (a == 198 && (b == 18 || b == 19));
            !(v4.is_private()
                || v4.is_loopback()
                || v4.is_link_local()
                || v4.is_multicast()
                || v4.is_documentation()
                || is_shared
                || is_special)
        }
        IpAddr::V6(v6) => {
            let first = v6.segments()[0];
            // Addresses of the fourth version can stand in others in these ways too.
            let embeds_v4 = first == 0x2002 || first == 0x64;
            v6.to_ipv4().map_or((first & 0xe000) == 0x2000 && !embeds_v4, |v4| is_public(v4.into()))
        }
    }
}

/// Names are looked up here, so that what is checked is what is connected to.
struct Guard {
    allows_private: bool,
}

impl Resolve for Guard {
    fn resolve(&self, name: Name) -> Resolving {
        let allows_private = self.allows_private;
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let allowed: Vec<SocketAddr> = found.filter(|address| allows_private || is_public(address.ip())).collect();
            if allowed.is_empty() {
                return Err(format!("{} has no address that webhooks may be sent to", name.as_str()).into());
            }
            Ok(Box::new(allowed.into_iter()) as Addrs)
        })
    }
}

impl Deliveries {
    /// `allows_private`: also to addresses of this machine and its network.
    pub(super) fn new(allows_private: bool) -> Result<Self> {
        // An error means that somebody has installed it already.
        drop(rustls::crypto::ring::default_provider().install_default());
        let client = reqwest::Client::builder()
            .timeout(TIMEOUT)
            .redirect(Policy::none())
            .no_proxy()
            .dns_resolver(Arc::new(Guard { allows_private }))
            .build()
            .context("cannot make a client for webhooks")?;
        Ok(Self { client, allows_private, bell: Notify::new(), busy: Mutex::default() })
    }

    /// Whether an endpoint may be there.
    ///
    /// # Errors
    /// Why not.
    pub(super) fn check_url(&self, url: &str) -> Result<Url> {
        let url = Url::parse(url).context("is no URL")?;
        ensure!(["http", "https"].contains(&url.scheme()), "must begin with http:// or https://");
        ensure!(url.username().is_empty() && url.password().is_none(), "must not hold a name or a password");
        let address = match url.host() {
            Some(Host::Ipv4(address)) => Some(IpAddr::V4(address)),
            Some(Host::Ipv6(address)) => Some(IpAddr::V6(address)),
            Some(Host::Domain(_)) => None,
            None => anyhow::bail!("names no host"),
        };
        let is_allowed = self.allows_private || address.is_none_or(is_public);
        ensure!(is_allowed, "is an address of this machine or its network, which server.webhook_private_addresses allows");
        Ok(url)
    }

    /// Something may be in the outbox.
    pub(super) fn ring(&self) {
        self.bell.notify_one();
    }

    /// Sends a message; the status that came back, and the seconds after which more may be sent.
    ///
    /// # Errors
    /// There was no answer.
    pub(super) async fn send(&self, delivery: &Delivery) -> Result<(u16, Option<u64>)> {
        let url = self.check_url(&delivery.to.url)?;
        let timestamp = now();
        let old = delivery.to.old_secret.as_ref().filter(|(_, until)| *until > timestamp).map(|(secret, _)| secret);
        let secrets = std::iter::once(&delivery.to.secret).chain(old);
        let signatures: Vec<String> =
            secrets.map(|secret| sign(secret, &delivery.id, timestamp, &delivery.body)).collect::<Result<_>>()?;
        let mut request = self
            .client
            .post(url)
            .header(CONTENT_TYPE, "application/json")
            .header("webhook-id", &delivery.id)
            .header("webhook-timestamp", timestamp)
            .header("webhook-signature", signatures.join(" "))
            .body(delivery.body.clone());
        if let Some(token) = delivery.to.token.as_deref().and_then(bearer) {
            request = request.header(AUTHORIZATION, token);
        }
        let response = request.send().await?;
        let retry_after = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
        Ok((response.status().as_u16(), retry_after))
    }
}

/// A new secret.
pub(super) fn new_secret() -> String {
    let mut bytes = [0; SECRET_BYTES];
    getrandom::fill(&mut bytes).expect("the system gives random bytes");
    format!("{SECRET_PREFIX}{}", STANDARD.encode(bytes))
}

/// `v1,` and the signature of a message.
fn sign(secret: &str, id: &str, timestamp: u64, body: &str) -> Result<String> {
    let key = STANDARD.decode(secret.trim_start_matches(SECRET_PREFIX)).context("a secret is no base64")?;
    let mut mac = Hmac::<Sha256>::new_from_slice(&key).context("a secret is no key")?;
    mac.update(format!("{id}.{timestamp}.{body}").as_bytes());
    Ok(format!("v1,{}", STANDARD.encode(mac.finalize().into_bytes())))
}

/// What follows from a try that ended at `now`, of a message that was tried `n_tries` times before.
fn judge(n_tries: u32, answer: &Result<(u16, Option<u64>)>, now: u64, draw: f64) -> Tried {
    let pause = PAUSES_S.get(n_tries as usize).copied();
    match (answer, pause) {
        (Ok((200..300, _)), _) => Tried::Told,
        (Ok((410, _)), _) => Tried::Gone,
        (_, None) => Tried::GivenUp,
        (Ok((429 | 502..=504, Some(asked))), Some(pause)) => Tried::Again(now + pause.max(*asked).min(MAX_RETRY_AFTER_S)),
        (_, Some(pause)) => Tried::Again(now + (pause as f64 * (1.0 + JITTER * draw)).round() as u64),
    }
}

/// Empties the outbox until the server ends.
pub(super) async fn run(app: Arc<App>) {
    while !app.is_draining() {
        // Who is busy now may have been told when the outbox is read, and is found by the next look then.
        let busy: Vec<String> = lock(&app.deliveries.busy).iter().cloned().collect();
        match app.store.read(move |connection| webhooks::due(connection, now(), &busy, (OF_OWNER, AT_A_LOOK))).await {
            Ok(due) => {
                for delivery in due {
                    lock(&app.deliveries.busy).insert(delivery.to.id.clone());
                    tokio::spawn(deliver(Arc::clone(&app), delivery));
                }
            }
            Err(error) => say(&format!("webhooks: {error:#}")),
        }
        // An error means that the time is up.
        drop(tokio::time::timeout(LOOK_EVERY, app.deliveries.bell.notified()).await);
    }
}

/// Deliveries that are forgotten at a time.
const FORGOTTEN: usize = 1024;

/// Forgets what was told or given up before that time.
pub(super) async fn forget_old(app: &App, retention: Duration) -> Result<()> {
    let before = now().saturating_sub(retention.as_secs());
    app.store.write(move |connection| webhooks::forget_before(connection, before, FORGOTTEN)).await
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn deliver(app: Arc<App>, delivery: Delivery) {
    let (answer, now) = (app.deliveries.send(&delivery).await, now());
    // Endpoints that failed together are not to be tried together.
    let tried = judge(delivery.n_tries, &answer, now, super::ids::seed() as f64 / (1_u64 << 53) as f64);
    let id = delivery.id.clone();
    if let Err(error) = app.store.write(move |connection| webhooks::note(connection, &id, tried, now)).await {
        say(&format!("webhooks: {error:#}"));
    }
    lock(&app.deliveries.busy).remove(&delivery.to.id);
    app.deliveries.ring();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_this_machine_and_its_network_are_not_public() {
        let private = [
            "127.0.0.1",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "0.0.0.0",
            "100.64.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "::1",
            "::",
            "fe80::1",
            "fd00::1",
            "::ffff:10.0.0.1",
            "::ffff:127.0.0.1",
            "64:ff9b::7f00:1",
            "2002:7f00:1::",
            "ff02::1",
        ];
        for address in private {
            assert!(!is_public(address.parse().unwrap()), "{address}");
        }
        for address in ["8.8.8.8", "1.1.1.1", "172.32.0.1", "2606:4700::1111", "::ffff:8.8.8.8"] {
            assert!(is_public(address.parse().unwrap()), "{address}");
        }
        let guarded = Deliveries::new(false).unwrap();
        for url in [
            "ftp://example.com",
            "http://127.0.0.1:80/x",
            "http://0x7f.1/",
            "http://[::1]/",
            "http://a:b@example.com/",
            "nothing",
        ] {
            assert!(guarded.check_url(url).is_err(), "{url}");
        }
        assert!(guarded.check_url("https://example.com/hook").is_ok());
        assert!(Deliveries::new(true).unwrap().check_url("http://127.0.0.1:80/x").is_ok());
    }

    #[test]
    fn a_message_is_tried_at_growing_pauses_for_about_three_days() {
        let n_pauses = u32::try_from(PAUSES_S.len()).unwrap();
        for answer in [Ok((500, None)), Ok((302, Some(1))), Err(anyhow::anyhow!("refused"))] {
            let (mut earliest, mut latest) = (0, 0);
            for n_tries in 0..n_pauses {
                let at = |draw| match judge(n_tries, &answer, 1000, draw) {
                    Tried::Again(at) => at - 1000,
                    other => panic!("{other:?}"),
                };
                let pause = PAUSES_S[n_tries as usize];
                assert!(at(0.0) == pause && at(0.5) > pause && at(1.0) <= pause * 6 / 5, "{n_tries}");
                (earliest, latest) = (earliest + at(0.0), latest + at(1.0));
            }
            assert!(earliest > 60 * 3600 && latest < 84 * 3600, "{earliest} to {latest} s");
            assert_eq!(judge(n_pauses, &answer, 1000, 0.0), Tried::GivenUp);
        }
        // What a receiver that is busy asks for, but not sooner than otherwise, and not for ever.
        for (asked, pause) in [(1, 5), (77, 77), (1 << 40, MAX_RETRY_AFTER_S)] {
            assert_eq!(judge(0, &Ok((503, Some(asked))), 1000, 1.0), Tried::Again(1000 + pause));
        }
        assert_eq!(judge(3, &Ok((204, None)), 1000, 0.0), Tried::Told);
        assert_eq!(judge(0, &Ok((410, None)), 1000, 0.0), Tried::Gone);
    }

    /// The vector of the Standard Webhooks' own libraries.
    #[test]
    fn a_signature_is_the_standards() {
        let signature = sign(
            "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
            "msg_p5jXN8AQM9LWM0D4loKWxJek",
            1_614_265_330,
            "{\"test\": 2432232314}",
        );
        assert_eq!(signature.unwrap(), "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    }
}

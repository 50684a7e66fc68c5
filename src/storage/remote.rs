//! URLs to remote stores, and what goes wrong there in words. Credentials, regions and endpoints come from each provider's
//! own environment variables, read by `object_store`'s builders. Invariant: no message holds a secret: what a server
//! answers (it may echo signed headers) and request URLs (they may be signed) are never shown, only codes and kinds.

use std::error::Error as StdError;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use object_store::aws::{AmazonS3, AmazonS3Builder, AmazonS3ConfigKey, AwsCredential, AwsCredentialProvider};
use object_store::azure::MicrosoftAzureBuilder;
use object_store::client::{ClientConfigKey, CredentialProvider, HttpError, HttpErrorKind};
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::http::HttpBuilder;
use object_store::multipart::MultipartStore;
use object_store::path::Path;
use object_store::{BackoffConfig, ClientOptions, Error, ObjectStore, RetryConfig};
use url::{Host, Url};

use super::container::Container;
use super::location::Uploads;

/// Times that a request is tried again, at most.
const MAX_RETRIES: usize = 10;
/// How long a web server may say nothing.
const SILENCE: Duration = Duration::from_secs(30);
/// How long a request is tried again, at most.
const RETRY_TIMEOUT: Duration = Duration::from_mins(3);

/// What a URL means.
pub(super) struct Opened {
    pub(super) store: Arc<dyn ObjectStore>,
    /// The same, where uploads can be told by their ids.
    pub(super) uploads: Option<Uploads>,
    pub(super) path: Path,
}

impl Opened {
    /// A store whose uploads have ids and keep what is said of them.
    fn with_uploads<S: ObjectStore + MultipartStore>(store: S, path: Path) -> Self {
        let store = Arc::new(store);
        Self { store: store.clone(), uploads: Some(Uploads(store)), path }
    }

    fn without_uploads(store: impl ObjectStore, path: Path) -> Self {
        Self { store: Arc::new(store), uploads: None, path }
    }
}

/// The store and the path that a URL with this scheme means.
pub(super) fn open(scheme: &str, text: &str) -> Result<Opened> {
    install_cryptography();
    match scheme {
        "s3" | "s3a" | "gs" | "az" => {
            let (bucket, key) = text[scheme.len() + 3..].split_once('/').unwrap_or((&text[scheme.len() + 3..], ""));
            ensure!(!bucket.is_empty(), "{text} names no bucket: write {scheme}://bucket/key");
            ensure!(!key.starts_with('/'), "the key of {text} begins with a slash: such keys can't be named here");
            let path = Path::parse(key).map_err(|e| anyhow!("can't use the key of {text}: {e}"))?;
            Ok(match scheme {
                "gs" => {
                    let builder = GoogleCloudStorageBuilder::from_env().with_bucket_name(bucket).with_retry(retries());
                    Opened::with_uploads(builder.build().map_err(|e| settings(text, &e))?, path)
                }
                "az" => {
                    let builder = MicrosoftAzureBuilder::from_env().with_container_name(bucket).with_retry(retries());
                    Opened::without_uploads(builder.build().map_err(|e| settings(text, &e))?, path)
                }
                _ => Opened::with_uploads(s3(text, bucket)?, path),
            })
        }
        "http" | "https" => http(text),
        _ => bail!("{text}: {scheme}:// is not known; give a path, or a URL with file, s3, gs, az, http or https"),
    }
}

/// `reqwest` wants one provider for the whole process: the one that is there for model hubs anyway.
pub(super) fn install_cryptography() {
    // It may be there already: then there is nothing to do.
    let _already_there = rustls::crypto::ring::default_provider().install_default();
}

fn retries() -> RetryConfig {
    RetryConfig { backoff: BackoffConfig::default(), max_retries: MAX_RETRIES, retry_timeout: RETRY_TIMEOUT }
}

fn s3(text: &str, bucket: &str) -> Result<AmazonS3> {
    let settled = AmazonS3Builder::from_env();
    let value = |key| settled.get_config_value(&key).unwrap_or_default();
    let allows_http =
        ["true", "1"].contains(&&*value(AmazonS3ConfigKey::Client(ClientConfigKey::AllowHttp)).to_ascii_lowercase());
    let mut is_here = false;
    for key in [AmazonS3ConfigKey::S3Endpoint, AmazonS3ConfigKey::Endpoint] {
        let endpoint = value(key);
        if endpoint.is_empty() {
            continue;
        }
        let url = Url::parse(&endpoint).ok().filter(|url| ["http", "https"].contains(&url.scheme()) && url.has_host());
        let Some(url) = url else { bail!("{text}: AWS_ENDPOINT_URL is no URL; write it like http://localhost:9000") };
        is_here |= is_loopback(&url);
        if url.scheme() == "http" && !allows_http && !is_loopback(&url) {
            bail!("{text}: AWS_ENDPOINT_URL is plain http; set AWS_ALLOW_HTTP=true to send data and signatures unencrypted");
        }
    }
    if value(AmazonS3ConfigKey::AccessKeyId).is_empty() {
        check_token(&value(AmazonS3ConfigKey::ContainerAuthorizationTokenFile), text)?;
    }
    let builder = || {
        let builder = AmazonS3Builder::from_env().with_bucket_name(bucket);
        // Where nothing leaves the machine, nobody listens.
        if is_here { builder.with_allow_http(true) } else { builder }
    };
    // A machine that is no cloud instance answers nothing where credentials would be: that must not take minutes.
    let soon = RetryConfig { max_retries: 2, retry_timeout: Duration::from_secs(10), ..retries() };
    let inner: AwsCredentialProvider = match Container::of(|name| std::env::var(name).ok()).context(text.to_owned())? {
        Some(container) => Arc::new(container),
        None => Arc::clone(builder().with_retry(soon).build().map_err(|e| settings(text, &e))?.credentials()),
    };
    let credentials = Arc::new(Told { inner, had_some: AtomicBool::new(false) });
    let store = builder().with_credentials(credentials).with_retry(retries()).build();
    store.map_err(|e| settings(text, &e))
}

pub(super) fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(Host::Domain(name)) => name == "localhost",
        Some(Host::Ipv4(ip)) => ip.is_loopback(),
        Some(Host::Ipv6(ip)) => ip.is_loopback(),
        None => false,
    }
}

/// A container's token is sent as a header, which takes no line feed.
fn check_token(file: &str, text: &str) -> Result<()> {
    let token = if file.is_empty() { None } else { std::fs::read(file).ok() };
    let is_header = token.is_none_or(|token| token.iter().all(|byte| !byte.is_ascii_control()));
    ensure!(
        is_header,
        "{text}: the file that AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE names must hold the token alone, without a line feed"
    );
    Ok(())
}

fn http(text: &str) -> Result<Opened> {
    let url = Url::parse(text).map_err(|e| anyhow!("an http(s) URL can't be read: {e}"))?;
    let plain = url.username().is_empty() && url.password().is_none() && url.query().is_none() && url.fragment().is_none();
    ensure!(plain, "an http(s) URL must have no user, password, query or fragment: it is kept in reports and journals");
    ensure!(url.has_host(), "{text} names no host");
    let path = Path::from_url_path(url.path()).map_err(|e| anyhow!("can't use the path of {text}: {e}"))?;
    // A file may be long, if a server gives it as a whole only: what ends a request is silence.
    let options = ClientOptions::default().with_allow_http(url.scheme() == "http");
    let options = options.with_timeout_disabled().with_read_timeout(SILENCE);
    let origin = url.origin().ascii_serialization();
    let store = HttpBuilder::new().with_url(origin).with_client_options(options).with_retry(retries()).build();
    Ok(Opened::without_uploads(store.map_err(|e| settings(text, &e))?, path))
}

/// What a builder refuses. It may quote a variable's content, so that only what never does is shown.
fn settings(text: &str, error: &Error) -> anyhow::Error {
    let why = error.to_string();
    let harmless = ["Missing bucket name", "Missing AccessKeyId", "Missing SecretAccessKey", "Account must be specified"];
    match harmless.iter().find(|known| why.contains(**known)) {
        Some(known) => anyhow!("{text}: the store's settings (environment variables) are incomplete: {known}"),
        None => anyhow!("{text}: the store's settings (environment variables) can't be used"),
    }
}

/// Tells that what failed were the credentials.
#[derive(Debug)]
struct Told {
    inner: AwsCredentialProvider,
    /// Whether there were credentials before: then a failure is one of the moment.
    had_some: AtomicBool,
}

/// There are no credentials.
#[derive(Debug, thiserror::Error)]
#[error("no credentials")]
struct NoCredentials;

/// There should be credentials, but whoever gives them does not.
#[derive(Debug, thiserror::Error)]
#[error("the credentials can't be fetched")]
struct CredentialsFailed(#[source] Error);

#[async_trait::async_trait]
impl CredentialProvider for Told {
    type Credential = AwsCredential;

    async fn get_credential(&self) -> object_store::Result<Arc<AwsCredential>> {
        let error = match self.inner.get_credential().await {
            Ok(credential) => {
                self.had_some.store(true, Ordering::Relaxed);
                return Ok(credential);
            }
            Err(error) => error,
        };
        // Where nobody answers that might give some, there are none.
        let nobody =
            has::<HttpError>(&error).is_some_and(|e| [HttpErrorKind::Connect, HttpErrorKind::Timeout].contains(&e.kind()));
        let source: Box<dyn StdError + Send + Sync> = if nobody && !self.had_some.load(Ordering::Relaxed) {
            Box::new(NoCredentials)
        } else {
            Box::new(CredentialsFailed(error))
        };
        Err(Error::Generic { store: "S3", source })
    }
}

/// What a store on another machine does not do, in words. It may get better by itself.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct RemoteFault(String);

/// An error of a store in words; for local files, as it is.
pub(super) fn tell(error: Error) -> anyhow::Error {
    match words(&error) {
        Some(words) => anyhow::Error::new(RemoteFault(words)),
        None => anyhow::Error::new(error),
    }
}

/// Of a store on another machine.
fn words(error: &Error) -> Option<String> {
    if has::<NoCredentials>(error).is_some() {
        return Some(
            "no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run where a container or instance role gives them"
                .to_owned(),
        );
    }
    if let Some(CredentialsFailed(why)) = has(error) {
        let why = has::<HttpError>(why).map_or("what gives them refuses", |http| kind(http.kind()));
        return Some(format!(
            "the credentials of the container's or instance's role can't be fetched ({why}); without a role, set AWS_ACCESS_KEY_ID \
             and AWS_SECRET_ACCESS_KEY"
        ));
    }
    let whole = whole_text(error);
    let code = between(&whole, "<Code>", "</Code>").filter(|code| code.chars().all(|c| c.is_ascii_alphanumeric()));
    let code = code.map(|code| format!(" ({code})")).unwrap_or_default();
    let is_remote = !code.is_empty() || has::<HttpError>(error).is_some() || whole.contains("Error performing ");
    Some(match error {
        _ if code == " (NoSuchBucket)" => "there is no such bucket".to_owned(),
        // Listing gives no such error, only the answer's text.
        _ if code == " (AccessDenied)" => format!("forbidden{code}: these credentials may not do that"),
        Error::PermissionDenied { .. } => format!("forbidden{code}: these credentials may not do that"),
        Error::Unauthenticated { .. } => format!("not authorised{code}: the store does not know these credentials"),
        Error::NotFound { .. } if is_remote => format!("not found{code}"),
        Error::Precondition { .. } if is_remote => format!("it changed meanwhile{code}"),
        _ if whole.contains("Received redirect without LOCATION") => "the bucket is in another region: set AWS_REGION".to_owned(),
        _ if is_remote => match (has::<HttpError>(error), between(&whole, "status code: ", ":")) {
            (Some(http), _) => format!("the store can't be reached or breaks off ({})", kind(http.kind())),
            (None, Some(status)) => format!("the store answers {status}{code}"),
            (None, None) => format!("the store's answer can't be used{code}"),
        },
        _ => return None,
    })
}

/// Whether the connection failed after the request was sent: to ask again is right if that changes nothing.
pub(super) fn broke_off(error: &Error) -> bool {
    has::<HttpError>(error).is_some_and(|http| http.kind() != HttpErrorKind::Connect)
}

fn kind(kind: HttpErrorKind) -> &'static str {
    match kind {
        HttpErrorKind::Connect => "no connection",
        HttpErrorKind::Timeout => "it takes too long",
        HttpErrorKind::Interrupted => "the connection was cut",
        _ => "what it sends is no HTTP answer",
    }
}

fn has<E: StdError + 'static>(error: &Error) -> Option<&E> {
    let mut next: Option<&(dyn StdError + 'static)> = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        next = error.source();
    }
    None
}

fn whole_text(error: &Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        text.push_str(&error.to_string());
        next = error.source();
    }
    text
}

fn between<'a>(text: &'a str, before: &str, after: &str) -> Option<&'a str> {
    let rest = &text[text.find(before)? + before.len()..];
    rest.find(after).map(|end| &rest[..end])
}

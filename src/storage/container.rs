//! Credentials of a container that is told where to ask for them and, as a value, what to show there
//! (`AWS_CONTAINER_CREDENTIALS_FULL_URI`, `AWS_CONTAINER_AUTHORIZATION_TOKEN`); `object_store` knows only tokens in files.
//! Invariant: neither is shown, and in plain text they go to this machine or to the addresses of AWS's own agents alone.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use chrono::{DateTime, Utc};
use object_store::Error;
use object_store::aws::AwsCredential;
use object_store::client::CredentialProvider;
use reqwest::header::{AUTHORIZATION, HeaderValue};
use serde::Deserialize;
use tokio::sync::Mutex;
use url::{Host, Url};

use super::remote::is_loopback;

/// Where agents of ECS and EKS answer, besides the machine itself.
const AGENTS: [&str; 3] = ["169.254.170.2", "169.254.170.23", "fd00:ec2::23"];
/// How long an answer may take, how often it is asked for, and the pause between.
const LIMIT: Duration = Duration::from_secs(5);
const TRIES: usize = 3;
const PAUSE: Duration = Duration::from_millis(500);
/// How long before their end credentials are fetched anew.
const MARGIN: Duration = Duration::from_mins(5);

/// Asks for credentials.
#[derive(Debug)]
pub(super) struct Container {
    client: reqwest::Client,
    url: Url,
    token: Option<HeaderValue>,
    /// The last ones, and when they should be fetched anew.
    known: Mutex<Option<(Arc<AwsCredential>, Instant)>>,
}

/// What is answered.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Given {
    access_key_id: String,
    secret_access_key: String,
    token: Option<String>,
    expiration: Option<String>,
}

impl Container {
    /// As the environment says it; `None` if credentials come from elsewhere.
    ///
    /// # Errors
    /// A setting that can't be used.
    pub(super) fn of(value: impl Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        let before = [
            "AWS_ACCESS_KEY_ID",
            "AWS_SECRET_ACCESS_KEY",
            "AWS_WEB_IDENTITY_TOKEN_FILE",
            "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
            "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
        ];
        let value = |name: &str| value(name).filter(|value| !value.is_empty());
        let Some(url) = value("AWS_CONTAINER_CREDENTIALS_FULL_URI").filter(|_| before.iter().all(|name| value(name).is_none()))
        else {
            return Ok(None);
        };
        let url = Url::parse(&url).ok().filter(|url| ["http", "https"].contains(&url.scheme()) && url.has_host());
        let url = url.context("AWS_CONTAINER_CREDENTIALS_FULL_URI is no http(s) URL")?;
        let is_agent = match url.host() {
            Some(Host::Ipv4(ip)) => AGENTS.contains(&&*ip.to_string()),
            Some(Host::Ipv6(ip)) => AGENTS.contains(&&*ip.to_string()),
            _ => false,
        };
        ensure!(
            url.scheme() == "https" || is_agent || is_loopback(&url),
            "AWS_CONTAINER_CREDENTIALS_FULL_URI is plain http to another machine: credentials are asked for there by https alone"
        );
        let token = value("AWS_CONTAINER_AUTHORIZATION_TOKEN").map(|token| HeaderValue::from_str(&token));
        let mut token = token.transpose().map_err(|_| anyhow!("AWS_CONTAINER_AUTHORIZATION_TOKEN can't be sent as a header"))?;
        if let Some(token) = &mut token {
            token.set_sensitive(true);
        }
        let client = reqwest::Client::builder().timeout(LIMIT).no_proxy().build().context("cannot ask for credentials")?;
        Ok(Some(Self { client, url, token, known: Mutex::default() }))
    }

    async fn fetch(&self) -> Result<(Arc<AwsCredential>, Instant)> {
        let request = self.client.get(self.url.clone());
        let request = match &self.token {
            Some(token) => request.header(AUTHORIZATION, token.clone()),
            None => request,
        };
        let body = request.send().await?.error_for_status()?.bytes().await?;
        let Given { access_key_id, secret_access_key, token, expiration } = serde_json::from_slice(&body)?;
        let end = expiration.map(|end| DateTime::parse_from_rfc3339(&end)).transpose()?;
        let lasts = end.map_or(Duration::MAX, |end| (end.to_utc() - Utc::now()).to_std().unwrap_or_default());
        let credential = AwsCredential { key_id: access_key_id, secret_key: secret_access_key, token };
        // Some that say nothing of an end are asked for again now and then.
        let stale = Instant::now() + lasts.saturating_sub(MARGIN).min(12 * MARGIN);
        Ok((Arc::new(credential), stale))
    }
}

#[async_trait::async_trait]
impl CredentialProvider for Container {
    type Credential = AwsCredential;

    async fn get_credential(&self) -> object_store::Result<Arc<AwsCredential>> {
        let mut known = self.known.lock().await;
        if let Some((credential, stale)) = &*known
            && Instant::now() < *stale
        {
            return Ok(Arc::clone(credential));
        }
        let mut fetched = self.fetch().await;
        for _ in 1..TRIES {
            if fetched.is_ok() {
                break;
            }
            tokio::time::sleep(PAUSE).await;
            fetched = self.fetch().await;
        }
        match fetched {
            Ok(found) => Ok(Arc::clone(&known.insert(found).0)),
            Err(error) => match &*known {
                // Those that are known last a while yet.
                Some((credential, stale)) if Instant::now() < *stale + MARGIN => Ok(Arc::clone(credential)),
                _ => Err(Error::Generic { store: "S3", source: error.into() }),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(settings: &[(&str, &str)]) -> Result<Option<Container>> {
        super::super::remote::install_cryptography();
        Container::of(|name| settings.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned()))
    }

    #[test]
    fn tokens_go_in_plain_text_to_agents_alone() {
        let uri = "AWS_CONTAINER_CREDENTIALS_FULL_URI";
        for url in
            ["http://localhost:1/x", "http://127.0.0.1/x", "http://169.254.170.23/v1", "http://[fd00:ec2::23]/v1", "https://a.b/"]
        {
            assert!(of(&[(uri, url)]).unwrap().is_some(), "{url}");
        }
        for url in ["http://a.b/", "http://169.254.170.24/", "ftp://localhost/", "localhost/x"] {
            let error = of(&[(uri, url)]).unwrap_err().to_string();
            assert!(error.contains(uri) && !error.contains(url), "{error}");
        }
        let hidden = "hidden\ntoken";
        let error = of(&[(uri, "http://localhost/"), ("AWS_CONTAINER_AUTHORIZATION_TOKEN", hidden)]).unwrap_err().to_string();
        assert!(error.contains("AWS_CONTAINER_AUTHORIZATION_TOKEN") && !error.contains("hidden"), "{error}");
        let known = of(&[(uri, "http://localhost/"), ("AWS_CONTAINER_AUTHORIZATION_TOKEN", "hidden")]).unwrap().unwrap();
        assert!(!format!("{known:?}").contains("hidden"), "{known:?}");
        // What comes first.
        assert!(of(&[(uri, "http://localhost/"), ("AWS_ACCESS_KEY_ID", "a")]).unwrap().is_none());
        assert!(of(&[(uri, "http://localhost/"), ("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", "f")]).unwrap().is_none());
        assert!(of(&[]).unwrap().is_none());
    }
}

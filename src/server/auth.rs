//! API keys. Invariant: no key is kept as it was given, and comparing takes the same time whatever was sent.

use super::errors::ApiError;
use super::ids;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use std::ops::Deref;
use std::sync::Arc;

/// Whose a stored thing is: a name for the key that it was made with. Without keys everything is everybody's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Owner(Arc<str>);

impl Deref for Owner {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

/// The keys that the server takes; without any, it takes every call.
#[derive(Debug, Clone, Default)]
pub(super) struct Keys {
    hashes: Vec<blake3::Hash>,
}

impl Keys {
    /// These keys.
    pub(super) fn new<'a>(keys: impl IntoIterator<Item = &'a str>) -> Self {
        Self { hashes: keys.into_iter().map(|key| blake3::hash(key.as_bytes())).collect() }
    }

    /// Checks a call's key, whichever way its client sends it; who it is.
    ///
    /// # Errors
    /// None, or a wrong one: 401.
    pub(super) fn check(&self, headers: &HeaderMap) -> Result<Owner, ApiError> {
        if self.hashes.is_empty() {
            return Ok(Owner("".into()));
        }
        let refuse = |message: &str| Err(ApiError::new(StatusCode::UNAUTHORIZED, Some("invalid_api_key"), message));
        let Some(key) = key(headers) else {
            return refuse("no API key was given; send it as \"Authorization: Bearer KEY\" or \"x-api-key: KEY\"");
        };
        // Comparing hashes takes constant time, and every one is compared.
        let hash = blake3::hash(key);
        let n_equal = self.hashes.iter().filter(|other| **other == hash).count();
        // Not the hash itself: what is stored must not be of use to whoever guesses keys.
        let owner = || Owner(ids::derived("valar owner of stored objects 1", hash.as_bytes()).into());
        if n_equal > 0 { Ok(owner()) } else { refuse("the API key is not known here") }
    }
}

fn key(headers: &HeaderMap) -> Option<&[u8]> {
    let bearer = headers.get(header::AUTHORIZATION).map(HeaderValue::as_bytes);
    let bearer = bearer.and_then(|value| {
        let (scheme, key) = value.split_at_checked(7)?;
        scheme.eq_ignore_ascii_case(b"bearer ").then(|| key.trim_ascii())
    });
    bearer.or_else(|| headers.get("x-api-key").map(|value| value.as_bytes().trim_ascii()))
}

//! API keys: who calls, and how much it may ask for. Invariant: no key is kept as it was given, and comparing takes the same
//! time whatever was sent.

use super::budgets::Purse;
use super::errors::ApiError;
use super::ids;
use super::limits::{Allowance, Rates};
use super::once::Claim;
use super::spans::Spot;
use crate::config::serve::KeyConfig;
use crate::window::turns::Share;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use std::ops::Deref;
use std::sync::Arc;

/// Whose a stored thing is: a name for the key that it was made with. Without keys everything is everybody's.
#[derive(Debug, Clone)]
pub(super) struct Owner {
    id: Arc<str>,
    /// Of a request that may come again.
    pub(super) claim: Option<Arc<Claim>>,
    /// The id of its request, if it has one.
    pub(super) request: Option<Arc<str>>,
    /// Where in a trace what it asks for belongs.
    pub(super) spot: Spot,
}

impl Owner {
    /// As it is stored.
    pub(super) fn stored(id: &str) -> Self {
        Self { id: id.into(), claim: None, request: None, spot: Spot::default() }
    }

    /// With the id of its request.
    pub(super) fn of_request(self, id: &str) -> Self {
        Self { request: Some(id.into()), ..self }
    }

    /// As a part of a trace.
    pub(super) fn at(self, spot: Spot) -> Self {
        Self { spot, ..self }
    }

    /// With a request that may come again.
    pub(super) fn with(self, claim: Arc<Claim>) -> Self {
        Self { claim: Some(claim), ..self }
    }
}

impl Deref for Owner {
    type Target = str;

    fn deref(&self) -> &str {
        &self.id
    }
}

/// The keys that the server takes; without any, it takes every call.
#[derive(Debug)]
pub(super) struct Keys {
    known: Vec<Known>,
    /// Of everybody, where there are no keys.
    shared: Arc<Allowance>,
}

#[derive(Debug)]
struct Known {
    hash: blake3::Hash,
    owner: String,
    name: String,
    is_admin: bool,
    weight: u32,
    allowance: Arc<Allowance>,
    purse: Option<Arc<Purse>>,
}

impl Keys {
    /// These keys; `rates` are everybody's where there are none, budgets are in that currency.
    pub(super) fn new(keys: &[KeyConfig], rates: Rates, currency: &str) -> Self {
        let known = keys.iter().map(|key| {
            // Not the hash itself: what is stored must not be of use to whoever guesses keys.
            let owner = ids::derived("valar owner of stored objects 1", key.hash.as_bytes());
            let name = key.name.clone().unwrap_or_else(|| format!("key-{}", owner.get(..8).unwrap_or(&owner)));
            let allowance = Arc::new(Allowance::new(key.rates));
            let purse = key.budget.map(|budget| Arc::new(Purse::new(owner.clone(), budget, currency.to_owned())));
            Known { hash: key.hash, owner, name, is_admin: key.is_admin, weight: key.weight, allowance, purse }
        });
        Self { known: known.collect(), shared: Arc::new(Allowance::new(rates)) }
    }

    fn find(&self, owner: &str) -> Option<&Known> {
        self.known.iter().find(|known| known.owner == owner)
    }

    /// What people call an owner.
    pub(super) fn name(&self, owner: &str) -> String {
        self.find(owner).map_or_else(|| owner.get(..8).unwrap_or(owner).to_owned(), |known| known.name.clone())
    }

    /// What an owner may ask for; `None` of a key that is not taken any more.
    pub(super) fn allowance(&self, owner: &str) -> Option<&Arc<Allowance>> {
        if self.known.is_empty() { Some(&self.shared) } else { self.find(owner).map(|known| &known.allowance) }
    }

    /// What an owner may be charged, if that is limited.
    pub(super) fn purse(&self, owner: &str) -> Option<&Arc<Purse>> {
        self.find(owner)?.purse.as_ref()
    }

    /// Whose turns an owner's work takes, and how many it has; all keys that are not taken any more have theirs together.
    pub(super) fn share(&self, owner: &str) -> Share {
        let known = (1..).zip(&self.known).find(|(_, known)| known.owner == owner);
        known.map_or_else(Share::default, |(number, known)| Share { owner: number, weight: known.weight })
    }

    /// Whether an owner sees what others have used.
    pub(super) fn sees_all(&self, owner: &str) -> bool {
        self.known.is_empty() || self.find(owner).is_some_and(|known| known.is_admin)
    }

    /// Checks a call's key, whichever way its client sends it; who it is.
    ///
    /// # Errors
    /// None, or a wrong one: 401.
    pub(super) fn check(&self, headers: &HeaderMap) -> Result<Owner, ApiError> {
        if self.known.is_empty() {
            return Ok(Owner::stored(""));
        }
        let refuse = |message: &str| Err(ApiError::new(StatusCode::UNAUTHORIZED, Some("invalid_api_key"), message));
        let Some(key) = key(headers) else {
            return refuse("no API key was given; send it as \"Authorization: Bearer KEY\" or \"x-api-key: KEY\"");
        };
        // Comparing hashes takes constant time, and every one is compared.
        let hash = blake3::hash(key);
        let found = self.known.iter().fold(None, |found, known| if known.hash == hash { Some(known) } else { found });
        found.map_or_else(|| refuse("the API key is not known here"), |known| Ok(Owner::stored(&known.owner)))
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

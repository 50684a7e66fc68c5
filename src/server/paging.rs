//! Pages of lists: `after`, `limit` and `order` of a query.

use super::errors::ApiError;
use axum::extract::Query;

/// A query's pairs; names may come again.
pub(super) type Pairs = Query<Vec<(String, String)>>;

/// Which part of a list is asked for.
#[derive(Debug, Clone)]
pub(super) struct Page {
    /// Only what comes after the one with this id.
    pub(super) after: Option<String>,
    /// At most so many.
    pub(super) limit: usize,
    /// Oldest first.
    pub(super) is_ascending: bool,
}

/// A query's value.
pub(super) fn get<'q>(query: &'q [(String, String)], name: &str) -> Option<&'q str> {
    query.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
}

impl Page {
    /// # Errors
    /// A limit that is no number from 1 to `most`, or an order that is none.
    pub(super) fn of(query: &[(String, String)], (default, most): (usize, usize)) -> Result<Self, ApiError> {
        let limit = match get(query, "limit") {
            None => default,
            Some(text) => {
                let limit = text.parse().ok().filter(|limit| (1..=most).contains(limit));
                limit.ok_or_else(|| ApiError::invalid_value("limit", format!("{text:?} is no number from 1 to {most}")))?
            }
        };
        let is_ascending = match get(query, "order") {
            None | Some("desc") => false,
            Some("asc") => true,
            Some(other) => return Err(ApiError::invalid_value("order", format!("{other:?} is not one of asc, desc"))),
        };
        Ok(Self { after: get(query, "after").map(str::to_owned), limit, is_ascending })
    }
}

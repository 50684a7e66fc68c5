//! The page for people at `/`: one file, which asks the server's own JSON. Knows nothing of what it shows. Invariant: its
//! policy lets the browser run that file's script and style, speak to this server, and do nothing else.

use axum::http::{HeaderName, HeaderValue, header};
use axum::response::{IntoResponse as _, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest as _, Sha256};
use std::sync::LazyLock;

/// The page.
const PAGE: &str = include_str!("page.html");

/// What a browser may do with it.
static POLICY: LazyLock<HeaderValue> = LazyLock::new(|| {
    let policy = [
        "default-src 'none'".to_owned(),
        format!("script-src {}", hash_of("script")),
        format!("style-src {}", hash_of("style")),
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'".to_owned(),
        // Text never becomes markup or code, whatever the script does.
        "require-trusted-types-for 'script'; trusted-types 'none'".to_owned(),
    ];
    HeaderValue::try_from(policy.join("; ")).expect("a policy is plain ASCII")
});

/// What allows the text of that element, and no other.
fn hash_of(element: &str) -> String {
    let rest = PAGE.split_once(&format!("<{element}>")).map_or("", |(_, rest)| rest);
    let text = rest.split_once(&format!("</{element}>")).map_or("", |(text, _)| text);
    format!("'sha256-{}'", STANDARD.encode(Sha256::digest(text)))
}

/// `GET /`
pub(super) async fn show() -> Response {
    let fixed = |name: HeaderName, value: &'static str| (name, HeaderValue::from_static(value));
    let headers = [
        fixed(header::CONTENT_TYPE, "text/html; charset=utf-8"),
        fixed(header::CACHE_CONTROL, "no-cache"),
        fixed(header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        fixed(header::REFERRER_POLICY, "no-referrer"),
        (header::CONTENT_SECURITY_POLICY, POLICY.clone()),
    ];
    (headers, PAGE).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_policy_allows_what_the_page_holds_and_the_page_holds_no_more() {
        // Of nothing, as if the elements were not found.
        let empty = format!("'sha256-{}'", STANDARD.encode(Sha256::digest("")));
        for element in ["script", "style"] {
            assert_eq!(PAGE.matches(&format!("<{element}")).count(), 1, "one {element}, without attributes");
            assert_ne!(hash_of(element), empty);
        }
        for (forbidden, why) in [
            (" style=", "the policy forbids it"),
            (" onclick=", "the policy forbids it"),
            ("innerHTML", "text becomes markup"),
            ("http-equiv", "the policy is the header's"),
            ("https://", "it works without the internet"),
            (" src=", "it is one file"),
        ] {
            assert!(!PAGE.contains(forbidden), "{forbidden}: {why}");
        }
    }
}

//! Patterns to objects: `*` and `?` match within a name, `**` any number of directories. As in a shell, a name that
//! begins with a dot is matched only by a pattern that does. Directories are listed one level at a time, so that
//! `*.jsonl` never walks what lies below.

use anyhow::{Result, bail};

use super::{Location, Storage};

/// How deep `**` looks: ends loops of symbolic links.
const MAX_DEPTH: usize = 32;

impl Storage {
    /// The objects that `pattern` means, sorted by URL; a path without wildcards is itself, one that ends with a slash
    /// all objects under it. Matching nothing is an error that names the pattern.
    pub fn expand(&self, pattern: &str) -> Result<Vec<Location>> {
        // A web address has no patterns; what follows its question mark may be a secret, and is refused without showing it.
        let wild = if Location::is_web_url(pattern) { None } else { pattern.find(['*', '?']) };
        let Some(wild) = wild else {
            let at = Location::parse(pattern)?;
            if !at.is_web() && pattern.ends_with('/') {
                return self.expand_under(&at, "**");
            }
            self.open(&at)?;
            return Ok(vec![at]);
        };
        let cut = pattern[..wild].rfind('/').map_or(0, |slash| slash + 1);
        let (base, rest) = pattern.split_at(cut);
        let root = if base.is_empty() { Location { url: "".into(), ..Location::parse(".")? } } else { Location::parse(base)? };
        self.expand_under(&root, rest)
    }

    /// The objects under `root` that `pattern` means, sorted by URL. Matching nothing is an error.
    pub fn expand_under(&self, root: &Location, pattern: &str) -> Result<Vec<Location>> {
        let segments: Vec<&str> = pattern.split('/').filter(|s| !s.is_empty()).collect();
        let mut found = Vec::new();
        self.walk(root, &segments, MAX_DEPTH, &mut found)?;
        found.sort_unstable_by(|a, b| a.url.cmp(&b.url));
        found.dedup_by(|a, b| a.url == b.url);
        if found.is_empty() {
            bail!("{}{pattern} matches no file", root.url);
        }
        Ok(found)
    }

    fn walk(&self, dir: &Location, segments: &[&str], depth: usize, found: &mut Vec<Location>) -> Result<()> {
        let Some((&head, rest)) = segments.split_first() else { return Ok(()) };
        if depth == 0 {
            return Ok(());
        }
        let listed = self.list_level(dir)?;
        let any_depth = head == "**";
        if any_depth {
            self.walk(dir, if rest.is_empty() { &["*"] } else { rest }, depth, found)?;
        } else if rest.is_empty() {
            for name in listed.objects.iter().filter_map(|o| o.location.filename()).filter(|name| matches(head, name)) {
                found.push(dir.child(name)?);
            }
            return Ok(());
        }
        let (below, pattern) = if any_depth { (segments, "*") } else { (rest, head) };
        for name in listed.common_prefixes.iter().filter_map(|p| p.filename()).filter(|name| matches(pattern, name)) {
            self.walk(&dir.child(name)?, below, depth - 1, found)?;
        }
        Ok(())
    }
}

/// Whether a file name matches one segment of a pattern.
fn matches(pattern: &str, name: &str) -> bool {
    if name.starts_with('.') && !pattern.starts_with('.') {
        return false;
    }
    let (pattern, name): (Vec<char>, Vec<char>) = (pattern.chars().collect(), name.chars().collect());
    // Greedy with one way back: only the last star ever needs to take more.
    let (mut p, mut n, mut retry) = (0, 0, None);
    while n < name.len() {
        match pattern.get(p) {
            Some('*') => {
                retry = Some((p, n));
                p += 1;
            }
            Some(&c) if c == '?' || c == name[n] => (p, n) = (p + 1, n + 1),
            _ => match retry {
                Some((star, taken)) => {
                    retry = Some((star, taken + 1));
                    (p, n) = (star + 1, taken + 1);
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|&c| c == '*')
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use object_store::memory::InMemory;
    use proptest::prelude::*;

    use super::*;

    /// The obvious recursive definition.
    fn matches_slowly(pattern: &[char], name: &[char]) -> bool {
        match (pattern.first(), name.first()) {
            (None, None) => true,
            (Some('*'), _) => matches_slowly(&pattern[1..], name) || (!name.is_empty() && matches_slowly(pattern, &name[1..])),
            (Some('?'), Some(_)) => matches_slowly(&pattern[1..], &name[1..]),
            (Some(a), Some(b)) => a == b && matches_slowly(&pattern[1..], &name[1..]),
            _ => false,
        }
    }

    proptest! {
        #[test]
        fn matching_is_the_recursive_definition(pattern in "[ab*?]{0,6}", name in "[ab]{0,8}") {
            let chars = |text: &str| text.chars().collect::<Vec<_>>();
            prop_assert_eq!(matches(&pattern, &name), matches_slowly(&chars(&pattern), &chars(&name)));
        }
    }

    fn expand(files: &[&str], pattern: &str) -> Vec<String> {
        let storage = Storage::new().unwrap();
        let root = Location::new(Arc::new(InMemory::new()), object_store::path::Path::default(), "");
        for file in files {
            storage.put(&root.child(file).unwrap(), bytes::Bytes::from_static(b"x")).unwrap();
        }
        let found = storage.expand_under(&root, pattern);
        found.map_or_else(|e| vec![e.to_string()], |found| found.iter().map(|at| at.url.to_string()).collect())
    }

    #[test]
    fn globs_walk_only_what_they_name() {
        let files = ["b.jsonl", "a.jsonl", ".hidden.jsonl", "x/c.jsonl", "x/y/d.jsonl", "x/y/e.parquet", ".git/f.jsonl"];
        assert_eq!(expand(&files, "*.jsonl"), ["a.jsonl", "b.jsonl"]);
        assert_eq!(expand(&files, "?.jsonl"), ["a.jsonl", "b.jsonl"]);
        assert_eq!(expand(&files, ".*.jsonl"), [".hidden.jsonl"]);
        assert_eq!(expand(&files, "*/?.jsonl"), ["x/c.jsonl"]);
        assert_eq!(expand(&files, "*/y/*"), ["x/y/d.jsonl", "x/y/e.parquet"]);
        assert_eq!(expand(&files, "**/*.jsonl"), ["a.jsonl", "b.jsonl", "x/c.jsonl", "x/y/d.jsonl"]);
        assert_eq!(expand(&files, "**/y/**"), ["x/y/d.jsonl", "x/y/e.parquet"]);
        assert_eq!(expand(&files, "*.csv"), ["*.csv matches no file"]);
    }
}

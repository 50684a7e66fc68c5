//! PTX text to tokens.

use crate::ParseError;

/// A token and the line it stands on, counted from 1.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Token<'t> {
    pub(crate) kind: Kind<'t>,
    pub(crate) line: u32,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Kind<'t> {
    /// An opcode, directive, name or number: whatever has no space or punctuation in it.
    Word(&'t str),
    Text(&'t str),
    Sign(char),
}

impl<'t> Token<'t> {
    pub(crate) fn word(&self) -> Option<&'t str> {
        match self.kind {
            Kind::Word(word) => Some(word),
            _ => None,
        }
    }

    pub(crate) fn is(&self, sign: char) -> bool {
        self.kind == Kind::Sign(sign)
    }
}

/// All tokens of a module, comments left out. An error where a character has no meaning in PTX.
pub(crate) fn tokens(text: &str) -> Result<Vec<Token<'_>>, ParseError> {
    let bytes = text.as_bytes();
    let (mut at, mut line) = (0, 1u32);
    let mut found = Vec::new();
    while at < bytes.len() {
        let rest = &bytes[at..];
        let start = at;
        match bytes[at] {
            b'\n' => {
                line += 1;
                at += 1;
            }
            b' ' | b'\t' | b'\r' => at += 1,
            b'/' if rest.starts_with(b"//") => at += rest.iter().position(|&b| b == b'\n').unwrap_or(rest.len()),
            b'/' if rest.starts_with(b"/*") => {
                let len = text[at..].find("*/").ok_or_else(|| ParseError::new(line, "a comment without end"))? + 2;
                line += u32::try_from(text[at..at + len].matches('\n').count()).unwrap_or(0);
                at += len;
            }
            b'"' => {
                let len = text[at + 1..].find('"').ok_or_else(|| ParseError::new(line, "a string without end"))?;
                found.push(Token { kind: Kind::Text(&text[at + 1..at + 1 + len]), line });
                at += len + 2;
            }
            b if in_word(b) => {
                while at < bytes.len() && (in_word(bytes[at]) || is_double_colon(bytes, at)) {
                    at += if bytes[at] == b':' { 2 } else { 1 };
                }
                found.push(Token { kind: Kind::Word(&text[start..at]), line });
            }
            b if b"{}()[]<>,;:=@!|+-".contains(&b) => {
                found.push(Token { kind: Kind::Sign(char::from(b)), line });
                at += 1;
            }
            b => return Err(ParseError::new(line, format!("no PTX has {:?} here", char::from(b)))),
        }
    }
    Ok(found)
}

fn in_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"_$%.".contains(&byte)
}

/// The `::` of `.shared::cta`, not the `:` after a label.
fn is_double_colon(bytes: &[u8], at: usize) -> bool {
    bytes[at] == b':' && bytes.get(at + 1) == Some(&b':') && bytes.get(at + 2).is_some_and(|&b| in_word(b))
}

//! The bytes of tokens: GPT-2's alphabet of bytes, and `SentencePiece`'s blanks and byte tokens. Knows nothing of how
//! text becomes tokens.

use std::borrow::Cow;

/// `SentencePiece` writes a blank like this.
pub(super) const BLANK: char = '▁';

/// The bytes and kinds of all tokens.
#[derive(Default)]
pub(super) struct Vocabulary {
    /// The bytes of all tokens, one after the other.
    bytes: Vec<u8>,
    /// Token `id` is `bytes[starts[id]..ends[id]]`.
    ends: Vec<u32>,
    is_special: Vec<bool>,
}

impl Vocabulary {
    /// Adds the token of the next id.
    pub(super) fn push(&mut self, bytes: &[u8], is_special: bool) {
        self.bytes.extend_from_slice(bytes);
        self.ends.push(self.bytes.len() as u32);
        self.is_special.push(is_special);
    }

    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    pub(super) fn bytes(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let start = id.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.bytes[start as usize..self.ends[id] as usize]
    }

    pub(super) fn is_special(&self, id: u32) -> bool {
        self.is_special[id as usize]
    }
}

/// What decoding a whole text takes off its front: encoding has put it there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LeadingBlank {
    /// Nothing.
    Keep,
    /// One blank.
    One,
    /// The blanks of the first token.
    FirstToken,
}

impl LeadingBlank {
    /// `n_first`: the length of the first token.
    pub(super) fn take_off(self, bytes: &mut Vec<u8>, n_first: usize) {
        match self {
            Self::Keep => {}
            Self::One => {
                bytes.drain(..usize::from(bytes.first() == Some(&b' ')));
            }
            Self::FirstToken => {
                let kept: Vec<u8> = bytes.drain(..n_first).filter(|&byte| byte != b' ').collect();
                bytes.splice(..0, kept);
            }
        }
    }
}

/// How a vocabulary writes the bytes of its tokens.
pub(super) enum Writing {
    /// Each byte as a character.
    ByteLevel(Box<Alphabet>),
    /// As text with `▁` for a blank; whether `<0x0A>` is a byte.
    Blanks {
        /// Whether there are byte tokens.
        byte_tokens: bool,
    },
}

impl Writing {
    pub(super) fn byte_level() -> Self {
        Self::ByteLevel(Box::new(Alphabet::new()))
    }

    /// The bytes that a token of text stands for.
    pub(super) fn bytes<'a>(&self, token: &'a str) -> Cow<'a, [u8]> {
        match self {
            Self::ByteLevel(alphabet) => alphabet.bytes(token).map_or(Cow::Borrowed(token.as_bytes()), Cow::Owned),
            Self::Blanks { byte_tokens } => match byte_token(token) {
                Some(byte) if *byte_tokens => Cow::Owned(vec![byte]),
                _ if token.contains(BLANK) => Cow::Owned(token.replace(BLANK, " ").into_bytes()),
                _ => Cow::Borrowed(token.as_bytes()),
            },
        }
    }
}

/// The byte of `<0x0A>`.
pub(super) fn byte_token(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok())?
}

/// GPT-2's way to write bytes as printable characters: printable Latin-1 stands for itself, the other 68 bytes, in
/// order, for the characters from U+0100 (<https://github.com/openai/gpt-2/blob/master/src/encoder.py>).
pub(super) struct Alphabet {
    /// The byte of each character below U+0144.
    bytes: [Option<u8>; 0x144],
}

impl Alphabet {
    fn new() -> Self {
        let mut bytes = [None; 0x144];
        let mut next = 0x100;
        for byte in 0..=u8::MAX {
            if matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..) {
                bytes[usize::from(byte)] = Some(byte);
            } else {
                bytes[next] = Some(byte);
                next += 1;
            }
        }
        Self { bytes }
    }

    /// The character of each byte.
    pub(super) fn chars() -> [char; 256] {
        let mut chars = ['\0'; 256];
        for (c, byte) in (0u32..).zip(Self::new().bytes) {
            if let Some(byte) = byte {
                chars[usize::from(byte)] = char::from_u32(c).expect("below U+0144 all numbers are characters");
            }
        }
        chars
    }

    /// The bytes of a token; `None` if it is not written in this alphabet.
    fn bytes(&self, token: &str) -> Option<Vec<u8>> {
        token.chars().map(|c| self.bytes.get(c as usize).copied().flatten()).collect()
    }
}

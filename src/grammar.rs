//! Formats that a completion must have, compiled for a model's vocabulary (llguidance). Knows nothing of requests on the
//! wire or of sampling. Invariant: a format is compiled once, however many rows ask for it; what it allows next depends on
//! the format and on the completion's own tokens alone.

use crate::engine::shaping::{Constraint, Grammar};
use crate::request::AnswerFormat;
use crate::text::tokenizer::Tokenizer;
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{InferenceCapabilities, TokEnv, TokRxInfo, TokTrie, TokenId, TokenizerEnv};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Of what formats are compiled to, the compiler's version included. Who changes that raises it, for completions are kept by
/// their formats.
const VERSION: &str = "1, llguidance 1.9.1";
/// Distinct formats that are kept compiled; when there are more, the oldest are forgotten.
const MAX_COMPILED: usize = 1024;

/// A compiled format, or why it can't be.
type Compiled = Result<Arc<dyn Grammar>, String>;

/// Compiles formats for one model; one for all threads.
pub struct Grammars {
    tokenizer: Arc<Tokenizer>,
    /// Made at the first use: it takes a while, and most jobs need none.
    factory: OnceLock<Result<ParserFactory, String>>,
    compiled: Mutex<HashMap<[u8; 32], Arc<OnceLock<Compiled>>>>,
}

impl Grammars {
    /// For a model with this tokenizer.
    pub fn new(tokenizer: Arc<Tokenizer>) -> Self {
        Self { tokenizer, factory: OnceLock::new(), compiled: Mutex::default() }
    }

    /// A format's grammar; `None` if it allows any text.
    ///
    /// # Errors
    /// The format is wrong or asks for what the compiler can't do; the message says what.
    pub fn compile(&self, format: &AnswerFormat) -> Result<Option<Arc<dyn Grammar>>, String> {
        let source = match format {
            AnswerFormat::Text => return Ok(None),
            AnswerFormat::JsonObject => TopLevelGrammar::from_json_schema(with_separators(json!({"type": "object"}))),
            AnswerFormat::JsonSchema(schema) => TopLevelGrammar::from_json_schema(with_separators(Value::clone(schema))),
            AnswerFormat::Regex(regex) => TopLevelGrammar::from_regex(regex),
            AnswerFormat::Lark(lark) => TopLevelGrammar::from_lark(lark.clone()),
        };
        let key = *blake3::hash(format!("{VERSION} {format:?}").as_bytes()).as_bytes();
        let slot = {
            let mut compiled = self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
            if compiled.len() >= MAX_COMPILED {
                compiled.clear();
            }
            Arc::clone(compiled.entry(key).or_default())
        };
        slot.get_or_init(|| self.compile_source(key, source)).clone().map(Some)
    }

    fn compile_source(&self, identity: [u8; 32], source: TopLevelGrammar) -> Compiled {
        let factory = self.factory.get_or_init(|| factory(&self.tokenizer).map_err(|error| error.to_string()));
        let factory = factory.as_ref().map_err(Clone::clone)?;
        let parser = catch_unwind(AssertUnwindSafe(|| factory.create_parser(source)));
        let parser = parser.map_err(|_| "the compiler failed".to_owned())?.map_err(|error| first_lines(&error))?;
        let mut matcher = Matcher::new(Ok(parser));
        // What can't be followed should be found now, not in every row.
        matcher.compute_mask().map_err(|error| first_lines(&error))?;
        Ok(Arc::new(CompiledFormat { identity, start: Mutex::new(matcher), end_ids: self.tokenizer.end_ids().into() }))
    }
}

/// JSON as Python's `json.dumps` writes it, unless the schema says otherwise: free white space is where small models
/// lose themselves.
fn with_separators(mut schema: Value) -> Value {
    if let Some(object) = schema.as_object_mut() {
        object
            .entry("x-guidance")
            .or_insert_with(|| json!({"whitespace_flexible": false, "item_separator": ", ", "key_separator": ": "}));
    }
    schema
}

/// The beginning of a message; the compiler's can be very long.
fn first_lines(error: &anyhow::Error) -> String {
    let text = error.to_string();
    let text = text.lines().take(3).collect::<Vec<_>>().join(" ");
    match text.char_indices().nth(300) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

fn factory(tokenizer: &Tokenizer) -> anyhow::Result<ParserFactory> {
    let words: Vec<Vec<u8>> = (0..tokenizer.n_vocab() as u32)
        .map(|id| match tokenizer.token_bytes(id) {
            // A mark is no text: the compiler knows it by this byte, which text never has.
            bytes if tokenizer.is_special(id) => [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat(),
            bytes => bytes.to_vec(),
        })
        .collect();
    let end_ids = tokenizer.end_ids();
    anyhow::ensure!(!end_ids.is_empty(), "the model has no end token: its completions can't be held to a format");
    let trie = TokTrie::from(&TokRxInfo::new(words.len() as u32, end_ids[0]), &words).with_eos_tokens(end_ids);
    let env: TokEnv = Arc::new(Vocabulary(trie));
    let slices = llguidance::earley::SlicedBiasComputer::general_slices();
    let mut factory = ParserFactory::new(&env, InferenceCapabilities::default(), &slices)?;
    factory.quiet();
    Ok(factory)
}

/// The vocabulary as the compiler wants it. It never asks us to tokenize where that would matter: we force no tokens.
struct Vocabulary(TokTrie);

impl TokenizerEnv for Vocabulary {
    fn tok_trie(&self) -> &TokTrie {
        &self.0
    }

    fn tokenize_bytes(&self, text: &[u8]) -> Vec<TokenId> {
        self.0.greedy_tokenize(text)
    }

    fn tokenize_is_canonical(&self) -> bool {
        false
    }
}

struct CompiledFormat {
    /// Hash of the format.
    identity: [u8; 32],
    start: Mutex<Matcher>,
    end_ids: Box<[u32]>,
}

impl fmt::Debug for CompiledFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CompiledFormat")
    }
}

impl Grammar for CompiledFormat {
    fn identity(&self) -> Option<[u8; 32]> {
        Some(self.identity)
    }

    fn start(&self) -> Box<dyn Constraint> {
        // A plain clone would share the lexer, its limits and its errors: what one row does could end another.
        let matcher = self.start.lock().unwrap_or_else(PoisonError::into_inner).deep_clone();
        Box::new(Progress { matcher, end_ids: self.end_ids.clone() })
    }
}

/// A completion on its way.
struct Progress {
    matcher: Matcher,
    end_ids: Box<[u32]>,
}

impl Constraint for Progress {
    fn mask(&mut self, words: &mut [u32]) -> Result<(), String> {
        words.fill(0);
        if self.matcher.is_stopped() && !self.matcher.is_error() {
            // Complete: nothing may follow.
            for &id in &self.end_ids {
                words[id as usize / 32] |= 1 << (id % 32);
            }
            return Ok(());
        }
        let mask = self.matcher.compute_mask().map_err(|error| first_lines(&error))?;
        let mask = mask.as_slice();
        let n_words = words.len().min(mask.len());
        words[..n_words].copy_from_slice(&mask[..n_words]);
        Ok(())
    }

    fn accept(&mut self, token: u32) -> Result<(), String> {
        if self.matcher.is_stopped() && !self.matcher.is_error() {
            return Ok(());
        }
        self.matcher.consume_token(token).map_err(|error| first_lines(&error))
    }
}
